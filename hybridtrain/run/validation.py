"""Validation: loss, perplexity and bits per byte of a split, every target once, alike at every layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch

from hybridtrain.data.batches import IGNORED, Batch, BatchShare, EvalBatches
from hybridtrain.data.shards import Split
from hybridtrain.parallel.collectives import all_reduce_
from hybridtrain.run.assemble import Run
from hybridtrain.run.step import by_exchange


def all_or_none(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    """Up to `count` batches as the micro-batches of one, so that all stages of a pipeline have work."""
    rest = iter(batches)
    while group := list(islice(rest, count)):
        yield Batch(
            *(
                torch.cat(tensors)
                for tensors in zip(*((b.tokens, b.targets, b.starts) for b in group), strict=True)
            )
        )


@torch.no_grad()
def evaluate(
    run: Run, split: Split, batches: int = 0, go_on: Callable[[], bool] = lambda: True
) -> dict[str, float]:
    """`loss` (nats per token), `perplexity`, `bits_per_byte` and `tokens` of the split, or of its first
    global batches (0: all).

    Bits per byte spread the split's bytes evenly over its tokens; over a whole split that is exact. An empty
    split gives {}. `go_on` is called by all ranks before every batch; where it says False, on all of them,
    the rest is left and {} returned.
    """
    if split.num_tokens == 0:
        return {}
    run.set_mode(training=False)
    table, mesh, settings = run.table, run.mesh, run.settings
    batch_size = settings.train.global_batch // settings.train.micro_batches
    share = BatchShare(batch_size, 1, mesh.layout.coordinate(mesh.rank, "dp"), mesh.layout.dp)
    holds_head = any(stage.part.last for stage in run.model_parts)  # what it counts is counted once along pp
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    limit = batches * settings.train.micro_batches
    stopped = False
    batches_of_one = EvalBatches(split, settings.train.seq_len, share, limit)
    for batch in all_or_none(batches_of_one, mesh.layout.pp):
        if stopped := not go_on():
            break
        plan = None
        if table is not None:
            plan = table.plan(batch, evaluate=True)
            table.fetch(plan, plan.exchanges[0])
        ((_, micro_batches),) = by_exchange(batch.at(run.positions), plan, mesh.device)
        nats = run.schedule.losses(micro_batches)
        counted = (micro_batches.targets_MBT != IGNORED).sum() * holds_head
        for part in nats:
            sums[0] += part
        sums[1] += counted
    if table is not None:
        table.leaves.clear()
    if stopped:
        return {}
    total, tokens = (all_reduce_(sums, mesh.world) / mesh.layout.tp).tolist()  # tp ranks have the same losses
    bytes_per_token = split.num_bytes / (split.num_tokens - 1)
    loss = total / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
        "tokens": tokens,
    }
