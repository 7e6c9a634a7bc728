"""Counts what one pass of a layer would ask of a GPU, on meta tensors, which have no data.

A kernel is an operation of torch that writes device memory, or a launch of one of this project's Triton
kernels. Views, and memory that nothing is written to, are no kernels. An operation of torch counts as one,
though a few of them, such as a sort, launch several.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybridtrain.kernels.launch import recording
from tests.waits import waits_for_device

_ALLOCATING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# autograd's backward passes do these in place, but not under a mode: it might have to see every tensor
_IN_PLACE_BACKWARD = {"add", "index_put", "scatter", "scatter_add"}


class Launches(TorchDispatchMode):
    """Counts by name while it is entered: `kernels`, `waits` of the host, and the bytes of new tensors.

    A value that the host reads is 1, since meta tensors have none.
    """

    def __init__(self, backward: bool = False) -> None:
        super().__init__()
        self._in_place = _IN_PLACE_BACKWARD if backward else set()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.made_bytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        if operation._schema.name in OPDEFS:
            return self._launch(operation, args, kwargs)
        if _is_made_of_others(operation):
            with self:
                return operation.decompose(*args, **kwargs)
        to_host = name == "_to_copy" and args[0].is_meta and kwargs.get("device") == torch.device("cpu")
        if to_host or waits_for_device(operation, args, kwargs):
            self.waits[name] += 1
        if to_host:
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name == "_local_scalar_dense":
            return 1
        out = operation(*args, **kwargs)
        given, made = _tensors((args, kwargs)), _tensors(out)
        size_of_new = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in made if t.is_meta}
        for tensor in given:
            size_of_new.pop(tensor.untyped_storage()._cdata, None)
        if name not in self._in_place:
            self.made_bytes += sum(size_of_new.values())
        changes = operation._schema.is_mutable and torch.Tag.inplace_view not in operation.tags
        if (size_of_new or changes) and name not in _ALLOCATING and any(t.is_meta for t in made or given):
            self.kernels[name] += 1
        return out

    def _launch(self, operation: Any, args: Any, kwargs: Any) -> Any:
        """Run what an operation defined in Python runs on a GPU: its launches of Triton kernels are recorded,
        and all else in it is counted as elsewhere."""
        with self, recording() as launches:
            out = _compute(operation, args, kwargs)
        self.kernels.update(f"triton {operation.overloadpacket.__name__}" for _ in launches)
        return out


class TorchTime(TorchDispatchMode):
    """The CPU time of this thread inside torch's own operations while it is entered, in `seconds`: some are
    written in Python for meta tensors, which on a GPU they are not."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation._schema.name in OPDEFS:
            with self, recording():
                return _compute(operation, args, kwargs or {})
        begin = time.thread_time()
        out = operation(*args, **(kwargs or {}))
        self.seconds += time.thread_time() - begin
        return out


def _compute(operation: Any, args: Any, kwargs: Any) -> Any:
    """What an operation defined in Python does on a device with data."""
    return OPDEFS[operation._schema.name]._init_fn(*args, **kwargs)


def _is_made_of_others(operation: Any) -> bool:
    """Whether it has no kernel on any device. Such a one comes to a mode whole where autograd does not look:
    in the forward pass of an operation with a gradient of its own, and in a backward pass."""
    keys = ("CompositeImplicitAutograd", "CPU")
    composite, cpu = (torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), key) for key in keys)
    return composite and not cpu


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass
class Counted:
    """One pass through a layer, forward and backward; `saved_bytes` is what the backward pass keeps alive,
    parameters left out."""

    forward: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    made_bytes: int = 0
    saved_bytes: int = 0


def count(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Counted:
    """Count a pass from `x`, of a module that holds no gradients yet."""
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_meta and storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with as_on_a_gpu():
        with Launches() as there, torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
            out = forward(x)
        saved_bytes = sum(storage.nbytes() for storage in kept.values())
        grad = torch.empty_like(out)
        with Launches(backward=True) as back:
            out.backward(grad)
    made_bytes = there.made_bytes + back.made_bytes
    return Counted(there.kernels, back.kernels, there.waits + back.waits, made_bytes, saved_bytes)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Give meta tensors what torch has on a GPU alone: one kernel for an RMSNorm, one for attention. For
    autocast, which meta tensors do not have, a layer casts by itself in here."""
    with (
        patch.object(F, "rms_norm", _norm),
        patch.object(F, "scaled_dot_product_attention", _attention),
        patch.object(torch, "autocast", lambda *_, **__: nullcontext()),
    ):
        yield


def _attention(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, scale: float | None = None, **others: Any
) -> Tensor:
    """Flash attention, which torch takes in half precision where there is no mask."""
    if others.get("attn_mask") is not None or others.get("dropout_p") or others.get("enable_gqa"):
        raise NotImplementedError("attention with a mask, with dropout or with fewer heads of keys")
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    out: Tensor = attend(q, k, v, 0.0, is_causal, scale=scale)[0]
    return out


_ops = torch.library.Library("counted", "FRAGMENT")  # lives as long as its operations
_ops.define("rms_norm(Tensor x, Tensor weight) -> (Tensor, Tensor)")
_ops.define("rms_norm_backward(Tensor grad, Tensor x, Tensor scale, Tensor weight) -> (Tensor, Tensor)")
_ops.impl(
    "rms_norm", lambda x, w: (torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)), "Meta"
)
_ops.impl("rms_norm_backward", lambda grad, x, scale, w: (torch.empty_like(x), torch.empty_like(w)), "Meta")


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        out, scale = torch.ops.counted.rms_norm(x, weight)
        ctx.save_for_backward(x, scale, weight)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, scale, weight = ctx.saved_tensors
        return torch.ops.counted.rms_norm_backward(grad, x, scale, weight)


def _norm(x: Tensor, shape: Any, weight: Tensor, eps: float | None = None) -> Tensor:
    return _Norm.apply(x, weight)
