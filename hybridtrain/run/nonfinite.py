"""Finds where a loss or gradient stopped being finite, by walking the forward pass of the step once more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain.data.batches import Batch
from hybridtrain.parallel.collectives import gather_objects
from hybridtrain.parallel.row_exchange import StepPlan
from hybridtrain.run.assemble import Run
from hybridtrain.run.step import by_exchange
from hybridtrain.settings.layers import layer_specs


@torch.no_grad()
def name_source_of_nonfinite(run: Run, batch: Batch, plan: StepPlan | None) -> str:
    """In words, the first module of the forward pass whose output is not finite; else that it arose in the
    backward pass.

    Collective: every rank calls it with its own part of the step.
    """
    found: list[tuple[int, int, str]] = []  # place in the model: block, module in it

    def watch(place: tuple[int, int, str]) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not found and any(
                isinstance(t, Tensor) and t.is_floating_point() and not t.isfinite().all() for t in tensors
            ):
                found.append(place)

        return hook

    run.set_mode(training=False)
    table, num_layers = run.table, len(layer_specs(run.settings))
    blocks = {"embed": 0, "norm": num_layers + 1, "": num_layers + 2}
    handles = []
    for stage in run.model_parts:
        for number, (name, module) in enumerate(stage.named_modules()):
            if name.count(".") == 2 or name in ("embed", "norm") or (name == "" and stage.part.last):
                block = blocks[name] if name in blocks else 1 + int(name.split(".")[1])
                handles.append(module.register_forward_hook(watch((block, number, name or "the head"))))
    for exchange, micro_batches in by_exchange(batch, plan, run.mesh.device):
        if table is not None and plan is not None and exchange is not None:
            table.fetch(plan, exchange)
            if not all(leaf.isfinite().all() for leaf in table.leaves.parameters()) and not found:
                found.append((-1, 0, "the fetched table rows"))
        run.schedule.losses(micro_batches)
    for handle in handles:
        handle.remove()
    if table is not None:
        table.leaves.clear()

    firsts = gather_objects(found[0] if found else None, run.mesh.world)
    everywhere = [(first, rank) for rank, first in enumerate(firsts) if first]
    if not everywhere:
        return "every layer's output is finite, so it arose in the backward pass"
    (_, _, name), rank = min(everywhere)
    return f"the first values that are not finite come out of {name} (rank {rank})"
