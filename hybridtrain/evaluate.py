"""Validation: loss, perplexity and bits per byte over a split, every target once, the same at every layout."""

from __future__ import annotations

import math

import torch

from hybridtrain.assemble import Parts
from hybridtrain.data.batches import IGNORED, EvalBatches
from hybridtrain.data.shards import Split
from hybridtrain.parallel.collectives import all_reduce_


@torch.no_grad()
def evaluate(parts: Parts, split: Split, batches: int = 0) -> dict[str, float]:
    """`loss` (nats per token), `perplexity`, `bits_per_byte` and `tokens` of the split, or of its first `batches` (0: all).

    Bits per byte spread the split's bytes evenly over its tokens; over a whole split that is exact. An empty split gives {}.
    """
    if split.num_tokens == 0:
        return {}
    model, memory, mesh, settings = parts.model.eval(), parts.memory, parts.mesh, parts.settings
    batch_size = settings.train.global_batch // settings.train.micro_batches
    dp_rank = mesh.layout.coordinate(mesh.rank, "dp")
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for batch in EvalBatches(split, settings.train.seq_len, batch_size, dp_rank, mesh.layout.dp, limit=batches):
        index = None
        if memory is not None:
            plan = memory.plan(batch, evaluate=True)
            memory.fetch(plan, plan.exchanges[0])
            index = plan.exchanges[0].index[0]
        batch = batch.at(parts.positions).to(mesh.device)
        nats = model(batch.tokens[0], batch.starts[0].cumsum(-1), index, targets_BT=batch.targets[0])
        sums += torch.stack([nats.double(), (batch.targets[0] != IGNORED).sum().double()])
    if memory is not None:
        memory.rows.clear()
    total, tokens = (all_reduce_(sums, mesh.world) / mesh.layout.tp).tolist()  # tp ranks have the same losses
    bytes_per_token = split.num_bytes / (split.num_tokens - 1)
    loss = total / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
        "tokens": tokens,
    }
