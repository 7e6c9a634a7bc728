"""Activation checkpointing: a layer keeps little for the backward pass and is run again there, without its
exchanges.

    full       the layer's inputs and the results of its exchanges are kept
    selective  the results of matrix products and of attention too: norms, rotations, gates and activations
               are made again

Exchanges are not repeated (replay.py); gathering parameters is FSDP's own business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hybridtrain.choices import Recompute
from hybridtrain.kernels.ops import OPS
from hybridtrain.model.common import not_counting
from hybridtrain.parallel.replay import Replay

_ATEN = torch.ops.aten
PRODUCTS = {
    _ATEN.mm.default,
    _ATEN.bmm.default,
    _ATEN.addmm.default,
    *(getattr(_ATEN, name).default for op in OPS.values() for name in op.keeps),
}
"""What `selective` keeps: the results of nearly all of a layer's arithmetic."""


def recomputed(compute: Callable[..., Any], mode: Recompute) -> Callable[..., Any]:
    """What a layer computes, run again in the backward pass as `mode` says: full, selective or none.

    Hooks on the layer, FSDP's among them, stay outside and run once.
    """
    if mode == "none":
        return compute

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        replay = Replay()
        products = [_KeepProducts(replay)] if mode == "selective" else []
        return _all(replay, *products), _all(replay, *products, not_counting())

    def run(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return compute(*args)
        # nothing in a layer draws random numbers, so no generator's state is kept
        return checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    return run


class _KeepProducts(TorchDispatchMode):
    """Keeps the results of PRODUCTS and gives them again.

    Not torch's own contexts for this: they count every operation, and FSDP's hooks inside a layer do not do
    the same twice.
    """

    def __init__(self, replay: Replay) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._replay = replay

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def run() -> Any:
            return operation(*args, **(kwargs or {}))

        packed = (
            operation.namespace == "torch_attn"
        )  # attention of packed documents, which torch has once it is imported
        return self._replay.result(run) if operation in PRODUCTS or packed else run()


@contextmanager
def _all(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
