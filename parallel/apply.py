"""Puts a meta-device model on its ranks: the order in which parallelism is applied, once, with the reason on each line."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from hybridtrain.parallel.collectives import Group
from hybridtrain.parallel.context import ContextParallel
from hybridtrain.parallel.dispatch import AllToAllDispatch, SharedWidthDispatch
from hybridtrain.parallel.fsdp import count_collectives
from hybridtrain.parallel.mesh import Mesh
from hybridtrain.parallel.plans import EXPERT_WIDTH, TENSOR_PARTS, TENSOR_PLAN
from hybridtrain.parallel.tensor import Style, TensorAxis


def parallelize(
    model: nn.Module,
    layers: Iterable[nn.Module],
    mesh: Mesh,
    *,
    num_experts: int,
    reshard_after_forward: bool,
    context: ContextParallel | None = None,
) -> None:
    """Shard `model` or a pipeline stage of it (on the meta device) in place over `mesh`; what one rank holds is left as it is.

    A MoE module is one that has `experts` (a module of `[E, …]` parameters) and `dispatch` (replaced under ep > 1).
    """
    if mesh.dense_mesh is None or mesh.data_mesh is None or mesh.expert_mesh is None or mesh.dense_mesh.size() == 1:
        return
    if context is not None:  # no parameter changes, but tp's convolution goes around this one, so it stands first
        for module in model.modules():
            for name in ("attend", "convolve", "places_in_line"):
                if hasattr(module, name):
                    setattr(module, name, getattr(context, name))
    if mesh.tp.size > 1:
        # before ep and FSDP: it decides what a module computes, they only decide where the parts of a parameter lie
        _split_tensors(model, TensorAxis(mesh.tp, mesh.dense_mesh["tp"]), TENSOR_PLAN)
    for name, moe in [(n, m) for n, m in model.named_modules() if hasattr(m, "experts") and hasattr(m, "dispatch")]:
        if mesh.ep.size > 1 or mesh.tp.size > 1:  # ranks of tp see different tokens: to experts they are data-parallel
            experts = moe.get_submodule("experts")
            _split_experts(experts, mesh.expert_mesh, mesh.layout.etp)  # first: everything after must see the local experts only
            if mesh.ep.size > 1:
                dispatch = AllToAllDispatch(mesh.ep_levels, num_experts, name)
                setattr(moe, "dispatch", dispatch)  # noqa: B010  (a plain attribute of nn.Module to mypy)
            if mesh.layout.etp > 1:  # around the dispatch over ep: that takes each token to all parts of its experts' width
                setattr(moe, "dispatch", SharedWidthDispatch(getattr(moe, "dispatch"), mesh.tp))  # noqa: B009, B010
            # before their layer: experts shard over the edp ranks that hold copies of them, not over dp_shard; along dim 1,
            # since ep already cuts dim 0 and two cuts of one dim would interleave in checkpoints
            copies = mesh.expert_mesh["dp_replicate", "edp"] if mesh.layout.dp_replicate > 1 else mesh.expert_mesh["edp"]
            _shard(experts, copies, (mesh.edp, mesh.dp_replicate), reshard_after_forward, dim=1)
    groups = (mesh.fsdp, mesh.dp_replicate)
    for layer in layers:
        _shard(
            layer, mesh.data_mesh, groups, reshard_after_forward
        )  # layer by layer: one gather per layer, overlapping the one before
    _shard(model, mesh.data_mesh, groups, False)  # last: the root takes what no layer holds (embedding, final norm, head)


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


def _split_tensors(model: nn.Module, axis: TensorAxis, plan: dict[str, Style]) -> None:
    """Hand in what works on sequence shards, and put every module that `plan` names in its style."""
    for module in model.modules():
        for attribute, make in TENSOR_PARTS.items():
            if attribute in vars(module):
                setattr(module, attribute, make(getattr(module, attribute), axis.group))
    patterns = [(pattern.split("."), style) for pattern, style in plan.items()]
    for name, module in list(model.named_modules()):
        parts = name.split(".")
        for pattern, style in patterns:
            if len(parts) == len(pattern) and all(p in ("*", n) for p, n in zip(pattern, parts, strict=True)):
                model.set_submodule(name, style(module, axis))


def _split_experts(experts: nn.Module, mesh: DeviceMesh, etp: int) -> None:
    for name, param in list(experts.named_parameters(recurse=False)):
        if etp > 1:
            part = distribute_tensor(param, mesh["ep", "etp"], [Shard(0), Shard(EXPERT_WIDTH[name])])
        else:
            part = distribute_tensor(param, mesh["ep"], [Shard(0)])
        experts.register_parameter(name, nn.Parameter(part))


def _shard(module: nn.Module, mesh: DeviceMesh, groups: tuple[Group, Group], reshard_after_forward: bool, dim: int = 0) -> None:
    """`groups` are those of the mesh, sharded and replicated, that what is sent is counted for."""

    def place(param: nn.Parameter) -> Shard:
        """The first dim from `dim` on that is not cut already."""
        cut = {p.dim for p in param.placements if isinstance(p, Shard)} if isinstance(param, DTensor) else set()
        return Shard(next(d for d in range(dim, param.ndim) if d not in cut))

    fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward, shard_placement_fn=place)
    assert isinstance(module, FSDPModule)  # for the type checker: fully_shard changes the module's class
    # every loss is already divided by the tokens of the whole step, so gradients are summed over ranks, never averaged
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
    count_collectives(module, *groups)


def sync_gradients(model: nn.Module, on: bool) -> None:
    """Whether the next backward pass reduces gradients over ranks; off for all micro-batches of a step but the last."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)
