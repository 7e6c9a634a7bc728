"""torch.compile, layer by layer. Graphs end at every exchange, at MoEs and at running sums; those run as they
are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch


class CompiledLayer:
    """What a layer computes, compiled for training. Validation would need another graph and runs uncompiled.

    Layers of one kind share their graphs. Exchanges break them by themselves (collectives.py), and so do
    functions that the model marks `uncompiled`.
    """

    def __init__(self, compute: Callable[..., Any]) -> None:
        self._compute = compute
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._compute(*args)
        if self._compiled is None:
            self._compiled = torch.compile(self._compute, dynamic=False)
        return self._compiled(*args)


def prepare_compiler() -> None:
    """What must be set before the first layer is compiled."""
    from torch import _dynamo as dynamo  # here: it takes seconds, and most runs do not compile

    # a graph for each kind of layer, with and without inner document starts; beyond the limit torch would
    # stop compiling silently
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, 64)
    # Several graphs may fit a layer: one that ends before its feed-forward fits all kinds of those. The graph
    # used last would be tried first, and a layer that is run again would be given another than the first
    # time. So they are tried in order of age.
    torch._C._dynamo.eval_frame._set_lru_cache(False)  # type: ignore[attr-defined]  # torch's stubs lack it


def missing_compiler() -> str | None:
    """The name of the C++ compiler that torch.compile would call, where it is not installed; else None."""
    name = os.environ.get("CXX", "g++")
    return None if shutil.which(name) else name
