"""The implementations that an operation may have, and the one that it has in a run.

An op.py declares its operation as an `Op`; ops.py lists them and resolves the settings to `Backends`, which
is the last argument of every op. Nothing is kept in the process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Implementation = Literal["torch", "triton", "fp8", "liger", "apex"]


@dataclass(frozen=True)
class Op:
    """The declaration of an operation.

    name: its key in [kernels] and its line in the header of a run
    torch: torch's formulation in words, for the header; torch_on_gpu: on a GPU, where that is another
    implementations: what [kernels] may name beside `auto`
    on_gpu: what `auto` is on a GPU; on the CPU it is torch's formulation
    sources: modules with its Triton kernels, whose `cases()` the report compiles
    keeps: torch's operations (of torch.ops.aten) in it whose results `train.recompute=selective` keeps
    has_key: whether [kernels] has a key for it: a model asks for it, and there is a choice
    """

    name: str
    torch: str
    implementations: tuple[Implementation, ...] = ("torch", "triton")
    on_gpu: Implementation = "triton"
    torch_on_gpu: str = ""
    sources: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    has_key: bool = True


@dataclass(frozen=True)
class Backends:
    """The implementation of each operation, by name, on devices of one type; torch's for those not named."""

    chosen: Mapping[str, Implementation] = field(default_factory=dict)
    device_type: str = "cpu"

    def of(self, op: Op, x: Tensor) -> Implementation:
        """The implementation for a call with `x`: torch's for a DTensor or another device (a GPU's host)."""
        if hasattr(x, "to_local") or x.device.type != self.device_type:
            return "torch"
        return self.chosen.get(op.name, "torch")


TORCH = Backends()
"""torch's formulation of every operation."""
