"""Which implementation carries each op: chosen once, from the settings, and said aloud in the run header.

`auto` is torch's formulation on the CPU and, on a GPU, what `ON_GPU` says. An implementation that is asked
for by name and missing is refused with what is missing. The choice is the process's, like torch's own
backends: an op asks `chosen` at each call.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

import torch
from torch import Tensor

# what a run may choose for each op it uses; liger-kernel and apex are asked for their own fused form
OPS: dict[str, tuple[str, ...]] = {
    "rms_norm": ("torch", "triton", "liger", "apex"),
    "swiglu": ("torch", "triton", "liger"),
    "rope": ("torch", "triton"),
    "segment_sum": ("torch", "triton"),
    "permute": ("torch", "triton"),
    "cross_entropy": ("torch", "triton"),
    "grouped_mlp": ("torch", "triton", "fp8"),  # fp8: Triton's with FP8 operands
    "router_topk": ("torch", "triton"),
    "engram_gate": ("torch", "triton"),
    "short_conv": ("torch", "triton"),
    "row_gather": ("torch", "triton"),
    "rowwise_adam": ("torch", "triton"),
    "depth_attention": (
        "torch",
        "triton",
    ),  # no part of a model asks for it yet, so settings have no key for it
}
# torch has a fused RMSNorm and cuBLAS' grouped products, both at full speed; the other ops it composes of
# several passes
ON_GPU = dict.fromkeys(OPS, "triton") | {"rms_norm": "torch", "grouped_mlp": "torch"}

# every folder with a kernel.py: those above, and the hash, which is made on the CPU ahead of its step
TRITON_OPS = (*OPS, "engram_hash")

_MODULES = {"triton": "triton", "fp8": "triton", "liger": "liger_kernel", "apex": "apex"}
_table: dict[str, str] = {}
_device_type = "cpu"


class KernelChoiceError(ValueError):
    """An implementation was asked for that is not here; `problems` lists all of them."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


def resolve(wanted: Mapping[str, str], device_type: str) -> dict[str, str]:
    """The implementation of every op in OPS, where `wanted` names one or `auto`, on devices of the type.

    Raises KernelChoiceError listing everything that is missing.
    """
    problems, table = [], {}
    for op, known in OPS.items():
        choice = wanted.get(op, "auto")
        if choice == "auto":
            choice = (
                ON_GPU[op] if device_type == "cuda" and _missing(ON_GPU[op], device_type) is None else "torch"
            )
        elif choice not in known:
            problems.append(f"kernels.{op}={choice} does not exist; it may be auto, {', '.join(known)}")
        elif (missing := _missing(choice, device_type)) is not None:
            problems.append(f"kernels.{op}={choice} needs {missing}; it may be auto or torch here")
        table[op] = choice
    if problems:
        raise KernelChoiceError(problems)
    return table


def use(table: Mapping[str, str], device_type: str = "cpu") -> None:
    """From now on ops of this process on devices of the type take what the table says; all others take
    torch's formulation.
    """
    global _device_type
    _device_type = device_type
    _table.clear()
    _table.update(table)


def table() -> dict[str, str]:
    """What `use` was given last."""
    return dict(_table)


def chosen(op: str, x: Tensor) -> str:
    """The implementation of `op` for a call with `x`; torch's, whatever was chosen, for a DTensor and on a
    GPU's host.
    """
    return "torch" if hasattr(x, "to_local") or x.device.type != _device_type else _table.get(op, "torch")


def _missing(implementation: str, device_type: str) -> str | None:
    """What the implementation lacks here, in words; None where it is here."""
    if implementation == "torch":
        return None
    module = _MODULES[implementation]
    if importlib.util.find_spec(module) is None:
        return f"the package {module.replace('_', '-')}"
    interpreted = module == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not interpreted:
        return "a CUDA device" + (
            " (or TRITON_INTERPRET=1, which is for tests)" if module == "triton" else ""
        )
    if (
        implementation == "fp8"
        and not interpreted
        and (torch.version.hip or torch.cuda.get_device_capability() < (8, 9))
    ):
        return "an NVIDIA GPU of compute capability 8.9 or higher"
    return None
