"""torch.compile, layer by layer. Graphs end at every exchange, at MoEs and at running sums; those run as they
are.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
from torch import nn


def compile_layer(layer: nn.Module) -> None:
    """Compile what `layer` computes while it trains; validation, which another graph would be needed for,
    runs uncompiled.

    Layers of one kind share their graphs. Exchanges break them by themselves (collectives.py).
    """
    from torch import _dynamo as dynamo  # here: it takes seconds, and most runs do not compile

    # a graph for each kind of layer, with and without inner document starts; beyond the limit torch would
    # stop compiling silently
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, 64)
    # Several graphs may fit a layer: one that ends before its feed-forward fits all kinds of those. The graph
    # used last would be tried first, and a layer that is run again would be given another than the first
    # time. So they are tried in order of age.
    torch._C._dynamo.eval_frame._set_lru_cache(False)  # type: ignore[attr-defined]  # torch's stubs lack it
    for module in layer.modules():
        if hasattr(
            module, "dispatch"
        ):  # shapes that only the data know, and products that inductor does not take in float32
            _leave_out(module, "forward")
        if hasattr(module, "counters"):
            _leave_out(module.counters, "add")
    forward = layer.forward
    compiled = torch.compile(forward, dynamic=False)

    def run(*args: Any) -> Any:
        return compiled(*args) if torch.is_grad_enabled() else forward(*args)

    setattr(layer, "forward", run)  # noqa: B010  (a method to mypy)


def _leave_out(owner: object, attribute: str) -> None:
    setattr(owner, attribute, torch.compiler.disable(getattr(owner, attribute)))


def missing_compiler() -> str | None:
    """The C++ compiler that torch.compile would call, where there is none of that name; None where all is
    well.
    """
    name = os.environ.get("CXX", "g++")
    return None if shutil.which(name) else name
