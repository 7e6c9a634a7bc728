"""torch.compile, layer by layer. Graphs end at every exchange, at the experts and at running sums, which run as they are."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
from torch import nn


def compile_layer(layer: nn.Module) -> None:
    """Compile what `layer` computes while it trains; validation, which another graph would be needed for, runs uncompiled.

    Layers of one kind share their graphs. Exchanges break them by themselves (collectives.py).
    """
    from torch import _dynamo as dynamo  # here: it takes seconds, and most runs do not compile

    # a graph for each kind of layer, with and without inner document starts; beyond the limit torch would stop compiling silently
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, 64)
    for module in layer.modules():
        if hasattr(module, "dispatch"):  # shapes that only the data know, and products that inductor does not take in float32
            setattr(module, "dispatch", torch.compiler.disable(getattr(module, "dispatch")))  # noqa: B009, B010  (as in apply.py)
        if hasattr(module, "counters"):
            counters: Any = module.counters
            counters.add = torch.compiler.disable(counters.add)
    forward = layer.forward
    compiled = torch.compile(forward, dynamic=False)

    def run(*args: Any) -> Any:
        return compiled(*args) if torch.is_grad_enabled() else forward(*args)

    setattr(layer, "forward", run)  # noqa: B010  (a method to mypy)


def missing_compiler() -> str | None:
    """The C++ compiler that torch.compile would call, where there is none of that name; None where all is well."""
    name = os.environ.get("CXX", "g++")
    return None if shutil.which(name) else name
