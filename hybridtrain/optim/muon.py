"""Muon: momentum whose matrices are replaced by their nearest orthogonal ones, on whole matrices of sharded
parameters.

Shapes: … any leading dims (experts), P rows and Q columns of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate

# The quintic a x + b x^3 + c x^5 that grows small singular values fastest while it keeps all of them near 1
# (K. Jordan, 2024).
_QUINTIC = (3.4445, -4.7750, 2.0315)
_QUINTIC_STEPS = 5
_SMALLEST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """b <- momentum b + (1 - momentum) g; w <- (1 - lr decay) w - lr sqrt(max(1, out / in)) orthogonal(g +
    momentum (b - g)).

    The rule of `torch.optim.Muon`, and beyond it: parameters of more than two dims are stacks of matrices; a
    group with `input_first=True` holds matrices [in, out], as experts are, instead of [out, in]; a DTensor
    whose matrices are cut is gathered once per step and each rank orthogonalises whole matrices, where
    torch's would communicate in each of the iteration's products and round differently at every layout.
    Stacks cut along their first dim are not gathered. The iteration runs in bfloat16 on accelerators and in
    float32 on CPU, where bfloat16 products are emulated.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "input_first": False}
        )
        flat = [p.shape for group in self.param_groups for p in group["params"] if p.ndim < 2]
        if flat:
            raise ValueError(
                f"Muon takes matrices and stacks of them; got a parameter of shape {list(flat[0])}"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; returns what `closure` gives, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum = state["momentum_buffer"].lerp_(grad, 1.0 - group["momentum"])
        direction = _on_whole_matrices(orthogonalize, grad.lerp(momentum, group["momentum"]))
        fan_in, fan_out = parameter.shape[-2:] if group["input_first"] else parameter.shape[:-3:-1]
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-group["lr"] * math.sqrt(max(1.0, fan_out / fan_in)))


def orthogonalize(matrices_PQ: Tensor) -> Tensor:
    """Each matrix of [..., P, Q] with its singular values brought near 1, to 0.7 … 1.2 as a rule; zero stays
    zero.
    """
    x = matrices_PQ.float() if matrices_PQ.device.type == "cpu" else matrices_PQ.bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(_SMALLEST_NORM)
    a, b, c = _QUINTIC
    for _ in range(_QUINTIC_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    whole_PQ: Tensor = x.mT if tall else x
    return whole_PQ.to(matrices_PQ.dtype)


def _on_whole_matrices(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """function(tensor), which works matrix by matrix; a DTensor's cut matrices are gathered before and cut
    again after.
    """
    if not isinstance(tensor, DTensor):
        return function(tensor)
    whole = [
        Replicate() if _cuts_matrices(placement, tensor.ndim) else placement
        for placement in tensor.placements
    ]
    result = function(tensor.redistribute(placements=whole).to_local())
    out = DTensor.from_local(
        result, tensor.device_mesh, whole, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    cut: Tensor = out.redistribute(placements=tensor.placements)
    return cut


def _cuts_matrices(placement: Placement, ndim: int) -> bool:
    """Whether a mesh axis holds parts of matrices: a shard of one of the last two dims, or a partial sum."""
    return bool(placement.is_partial()) or getattr(placement, "dim", -1) >= ndim - 2
