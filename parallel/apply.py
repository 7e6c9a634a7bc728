"""Puts a meta-device model on its ranks: the order in which parallelism is applied, once, with the reason on each line."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from hybridtrain.parallel.context import ContextParallel
from hybridtrain.parallel.dispatch import AllToAllDispatch
from hybridtrain.parallel.mesh import Mesh


def parallelize(
    model: nn.Module,
    layers: Iterable[nn.Module],
    mesh: Mesh,
    *,
    num_experts: int,
    reshard_after_forward: bool,
    context: ContextParallel | None = None,
) -> None:
    """Shard `model` (on the meta device) in place over `mesh`; a world of one rank is left as it is.

    A MoE module is one that has `experts` (a module of `[E, …]` parameters) and `dispatch` (replaced under ep > 1).
    """
    if mesh.dense_mesh is None or mesh.expert_mesh is None:
        return
    if context is not None:  # no parameter changes: before or after the rest makes no difference, so it stands first
        for module in model.modules():
            for name in ("attend", "convolve"):
                if hasattr(module, name):
                    setattr(module, name, getattr(context, name))
    for moe in [m for m in model.modules() if hasattr(m, "experts") and hasattr(m, "dispatch")]:
        if mesh.ep.size > 1:
            experts = moe.get_submodule("experts")
            _split_experts(experts, mesh.expert_mesh["ep"])  # first: everything after must see the local experts only
            setattr(moe, "dispatch", AllToAllDispatch(mesh.ep, num_experts))  # noqa: B010  (a plain attribute of nn.Module to mypy)
            # before their layer: experts shard over the edp ranks that hold copies of them, not over dp_shard; along dim 1,
            # since ep already cuts dim 0 and two cuts of one dim would interleave in checkpoints
            copies = mesh.expert_mesh["dp_replicate", "edp"] if mesh.layout.dp_replicate > 1 else mesh.expert_mesh["edp"]
            _shard(experts, copies, reshard_after_forward, dim=1)
    for layer in layers:
        _shard(layer, mesh.dense_mesh, reshard_after_forward)  # layer by layer: one gather per layer, overlapping the one before
    _shard(model, mesh.dense_mesh, False)  # last: the root takes what no layer holds (embedding, final norm, head)


def materialize(model: nn.Module, device: torch.device) -> None:
    """Allocate this rank's part of every parameter and buffer, uninitialised."""
    model.to_empty(device=device)


def write_local(param: Tensor, draw: Callable[[slice], Tensor]) -> None:
    """Fill this rank's part of `param` from `draw(rows)`, which returns the given rows (dim 0) of the whole parameter."""
    if not isinstance(param, DTensor):
        param.copy_(draw(slice(0, param.shape[0])))
        return
    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    part = draw(slice(offset[0], offset[0] + shape[0]))
    for dim in range(1, part.dim()):
        part = part.narrow(dim, offset[dim], shape[dim])
    param.to_local().copy_(part)


def _split_experts(experts: nn.Module, ep: DeviceMesh) -> None:
    for name, param in list(experts.named_parameters(recurse=False)):
        experts.register_parameter(name, nn.Parameter(distribute_tensor(param, ep, [Shard(0)])))


def _shard(module: nn.Module, mesh: DeviceMesh, reshard_after_forward: bool, dim: int = 0) -> None:
    fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward, shard_placement_fn=lambda _: Shard(dim))
    assert isinstance(module, FSDPModule)  # for the type checker: fully_shard changes the module's class
    # every loss is already divided by the tokens of the whole step, so gradients are summed over ranks, never averaged
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def sync_gradients(model: nn.Module, on: bool) -> None:
    """Whether the next backward pass reduces gradients over ranks; off for all micro-batches of a step but the last."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)
