"""How a tensor of ours becomes theirs and back.

Published models rotate the halves (r, r + C/2) of a head by one angle, ours the neighbours (2r, 2r + 1): what
makes queries and keys has its rows in another order. Experts are stacked here, input first, and one matrix
each there, output first.

C head width, D model width, E experts, F expert width, H heads.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hybridtrain.checkpoint.stored import LazyTensor
from hybridtrain.errors import FormatError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_ROTATED = (".wq.weight", ".wk.weight", "mixer.q_norm.weight", "mixer.k_norm.weight")


def is_stacked(name: str) -> bool:
    """Whether our tensor `name` holds all experts."""
    return ".experts." in name


def their_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of each of their tensors for ours of `shape`."""
    return (shape[2], shape[1]) if is_stacked(name) else shape


def to_theirs(name: str, value: Tensor, head_dim: int) -> Tensor:
    """Our tensor, or one expert [D, F] of it, in their order."""
    if is_stacked(name):
        return value.t()
    return _swap(value, head_dim // 2, 2) if name.endswith(_ROTATED) else value


def to_ours(name: str, values: Iterable[Tensor], shape: tuple[int, ...], head_dim: int) -> Tensor:
    """Our tensor of `shape` from theirs (one, or one per expert, each taken when the one before has its
    place), float32.
    """
    if is_stacked(name):
        out_EDF = torch.empty(shape)
        for into_DF, value in zip(out_EDF, values, strict=True):
            into_DF.copy_(value.t())
        return out_EDF
    (value,) = values
    return (_swap(value, 2, head_dim // 2) if name.endswith(_ROTATED) else value).float()


def new_router_state(name: str, shape: tuple[int, ...]) -> Tensor:
    """Bias or load of a router that has seen no step."""
    return torch.full(shape, 1 / shape[0] if name.endswith("load_E") else 0.0)


def cast(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """In another dtype where it is a matrix or table; norms, router biases and integers stay what they are.

    Making it raises FormatError where values are beyond the dtype.
    """
    if not tensor.dtype.is_floating_point or len(tensor.shape) < 2:
        return tensor
    return LazyTensor(tensor.shape, dtype, lambda: _to(tensor.make(), dtype))


def _to(value: Tensor, dtype: torch.dtype) -> Tensor:
    out = value.to(dtype)
    if beyond := int((out.isinf() & value.isfinite()).sum()):
        largest, name = float(value.abs().max()), str(dtype).removeprefix("torch.")
        raise FormatError(
            f"--dtype {name}",
            [f"{beyond} values of a matrix of {list(value.shape)} are beyond it, up to {largest:.3g}"],
        )
    return out


def _swap(value: Tensor, outer: int, inner: int) -> Tensor:
    """Each head's rows, seen as [outer, inner], in the order [inner, outer]."""
    swapped: Tensor = value.unflatten(0, (-1, outer, inner)).transpose(1, 2).flatten(0, 2)
    return swapped
