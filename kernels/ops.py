"""All operations, one line each, and what a run's settings choose for them.

`auto` is torch's formulation on the CPU and, on a GPU, what the operation's `Op` says. An implementation that
is asked for by name and missing is refused with what is missing.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

import torch

from hybridtrain.kernels.choose import Backends, Implementation, Op
from hybridtrain.kernels.cross_entropy.op import CROSS_ENTROPY
from hybridtrain.kernels.depth_attention.op import DEPTH_ATTENTION
from hybridtrain.kernels.document_attention.op import DOCUMENT_ATTENTION
from hybridtrain.kernels.engram.op import ENGRAM_GATE, SHORT_CONV
from hybridtrain.kernels.engram_hash.op import ENGRAM_HASH
from hybridtrain.kernels.grouped_mlp.op import GROUPED_MLP
from hybridtrain.kernels.norms.op import RMS_NORM, ROPE
from hybridtrain.kernels.permute.op import PERMUTE
from hybridtrain.kernels.router_topk.op import ROUTER_TOPK
from hybridtrain.kernels.rows.op import ROW_GATHER, SEGMENT_SUM
from hybridtrain.kernels.rowwise_adam.op import ROWWISE_ADAM
from hybridtrain.kernels.swiglu.op import SWIGLU

_LISTED: tuple[Op, ...] = (
    RMS_NORM,
    SWIGLU,
    ROPE,
    SEGMENT_SUM,
    PERMUTE,
    CROSS_ENTROPY,
    GROUPED_MLP,
    ROUTER_TOPK,
    ENGRAM_GATE,
    SHORT_CONV,
    ROW_GATHER,
    ROWWISE_ADAM,
    DEPTH_ATTENTION,
    ENGRAM_HASH,
    DOCUMENT_ATTENTION,
)
OPS: dict[str, Op] = {op.name: op for op in _LISTED}
TRITON_OPS = tuple(op.name for op in _LISTED if op.sources)
"""Those with Triton kernels."""

_MODULES = {"triton": "triton", "fp8": "triton", "liger": "liger_kernel", "apex": "apex"}


class KernelChoiceError(ValueError):
    """An implementation was asked for that is not here; `problems` lists all of them."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


def resolve(wanted: Mapping[str, str], device_type: str) -> Backends:
    """The implementation of every operation with a choice, where `wanted` names one or `auto`, on devices of
    the type.

    Raises KernelChoiceError listing everything that is missing.
    """
    problems: list[str] = []
    chosen: dict[str, Implementation] = {}
    for op in (op for op in _LISTED if len(op.implementations) > 1):
        choice = wanted.get(op.name, "auto")
        named = next((known for known in op.implementations if known == choice), None)
        if choice == "auto":
            there = device_type == "cuda" and _missing(op.on_gpu, device_type) is None
            chosen[op.name] = op.on_gpu if there else "torch"
        elif named is None:
            known = ", ".join(op.implementations)
            problems.append(f"kernels.{op.name}={choice} does not exist; it may be auto, {known}")
        elif (missing := _missing(named, device_type)) is not None:
            problems.append(f"kernels.{op.name}={choice} needs {missing}; it may be auto or torch here")
        else:
            chosen[op.name] = named
    if problems:
        raise KernelChoiceError(problems)
    return Backends(chosen, device_type)


def _missing(implementation: Implementation, device_type: str) -> str | None:
    """What the implementation lacks here, in words; None where it is here."""
    if implementation == "torch":
        return None
    module = _MODULES[implementation]
    if importlib.util.find_spec(module) is None:
        return f"the package {module.replace('_', '-')}"
    interpreted = module == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not interpreted:
        tests = " (or TRITON_INTERPRET=1, which is for tests)" if module == "triton" else ""
        return f"a CUDA device{tests}"
    if implementation != "fp8" or interpreted:
        return None
    lacks = torch.version.hip or torch.cuda.get_device_capability() < (8, 9)
    return "an NVIDIA GPU of compute capability 8.9 or higher" if lacks else None
