"""Finds where a loss or gradient stopped being finite, by walking the forward pass of the step once more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain.assemble import Parts
from hybridtrain.data.batches import Batch
from hybridtrain.parallel.collectives import gather_objects
from hybridtrain.parallel.rows import StepPlan


@torch.no_grad()
def name_source_of_nonfinite(parts: Parts, batch: Batch, plan: StepPlan | None) -> str:
    """In words, the first module of the forward pass whose output is not finite; else that it arose in the backward pass.

    Collective: every rank calls it with its own part of the step.
    """
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not found and any(isinstance(t, Tensor) and t.is_floating_point() and not t.isfinite().all() for t in tensors):
                found.append(name)

        return hook

    model, memory = parts.model.eval(), parts.memory
    names = [(n, m) for n, m in model.named_modules() if n.count(".") == 2 or n in ("embed", "norm", "head")]
    handles = [module.register_forward_hook(watch(name)) for name, module in names]
    documents = batch.starts.cumsum(-1)
    for number, exchange in enumerate(plan.exchanges if plan is not None else [None]):
        if memory is not None and plan is not None and exchange is not None:
            memory.fetch(plan, exchange)
            if not all(leaf.isfinite().all() for leaf in memory.rows.parameters()) and not found:
                found.append("the fetched memory rows")
        count = len(batch.tokens) if plan is None else len(batch.tokens) // len(plan.exchanges)
        for i in range(count):
            m = number * count + i
            model(batch.tokens[m], documents[m], exchange.index[i] if exchange is not None else None, micro_batch=i)
    for handle in handles:
        handle.remove()
    if memory is not None:
        memory.rows.clear()

    order = {name: i for i, (name, _) in enumerate(names)}
    everywhere = [
        (order.get(name, -1), rank, name)
        for rank, name in enumerate(gather_objects(found[0] if found else None, parts.mesh.world))
        if name
    ]
    if not everywhere:
        return "every layer's output is finite, so it arose in the backward pass"
    _, rank, name = min(everywhere)
    return f"the first values that are not finite come out of {name} (rank {rank})"
