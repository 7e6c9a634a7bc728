"""Puts a meta-device model on its ranks: the order in which parallelism is applied, once, with the reason on
each line.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from hybridtrain.parallel.collectives import Group
from hybridtrain.parallel.compile import compile_layer
from hybridtrain.parallel.context import ContextParallel
from hybridtrain.parallel.experts import AllToAllDispatch, SharedWidthDispatch
from hybridtrain.parallel.fsdp import set_collectives
from hybridtrain.parallel.mesh import Mesh
from hybridtrain.parallel.plans import EXPERT_WIDTH, TENSOR_PARTS, TENSOR_PLAN
from hybridtrain.parallel.recompute import recompute_layer
from hybridtrain.parallel.tensor import Style, TensorAxis


def parallelize(
    model: nn.Module,
    layers: Collection[nn.Module],
    mesh: Mesh,
    *,
    num_experts: int,
    reshard_after_forward: bool,
    context: ContextParallel | None = None,
    recompute: str = "none",
    compiled: bool = False,
    dtype: torch.dtype = torch.float32,
    fsdp: bool = True,
) -> None:
    """Shard `model` or a pipeline stage of it (on the meta device) in place over `mesh`; one rank's stay as
    they are.

    A MoE module is one that has `experts` (a module of `[E, …]` parameters) and `dispatch` (replaced under ep
    > 1). Layers compute in `dtype`; parameters and their gradients are float32. Without `fsdp` every rank
    keeps whole parameters, of the experts its own; another engine then reduces gradients.
    """
    if dtype != torch.float32 and mesh.data_mesh is None:
        raise ValueError(f"computing in {dtype} needs a mesh, also of one rank: make_mesh(…, always=True)")
    shared = mesh.dense_mesh is not None and mesh.dense_mesh.size() > 1
    shard = partial(_shard, reshard_after_forward=reshard_after_forward, dtype=dtype)
    if (
        context is not None
    ):  # no parameter changes, but tp's convolution goes around this one, so it stands first
        for module in model.modules():
            for name in ("attend", "convolve", "position_in_expert"):
                if hasattr(module, name):
                    setattr(module, name, getattr(context, name))
    if mesh.tp.size > 1 and mesh.dense_mesh is not None:
        # before ep and FSDP: it decides what a module computes, they only decide where the parts of a
        # parameter lie
        _split_tensors(model, TensorAxis(mesh.tp, mesh.dense_mesh["tp"]), TENSOR_PLAN)
    if (mesh.ep.size > 1 or mesh.tp.size > 1) and mesh.expert_mesh is not None:
        # ranks of tp see different tokens: to experts they are data-parallel
        for name, moe in [
            (n, m) for n, m in model.named_modules() if hasattr(m, "experts") and hasattr(m, "dispatch")
        ]:
            experts = moe.get_submodule("experts")
            _split_experts(
                experts, mesh.expert_mesh, mesh.layout.etp
            )  # first: everything after must see the local experts only
            if mesh.ep.size > 1:
                dispatch = AllToAllDispatch(mesh.ep_levels, num_experts, name)
                setattr(moe, "dispatch", dispatch)  # noqa: B010  (a plain attribute of nn.Module to mypy)
            if (
                mesh.layout.etp > 1
            ):  # around the dispatch over ep: that takes each token to all parts of its experts' width
                setattr(moe, "dispatch", SharedWidthDispatch(getattr(moe, "dispatch"), mesh.tp))  # noqa: B009, B010
            # before their layer: experts shard over the edp ranks that hold copies of them, not over
            # dp_shard; along dim 1, since ep already cuts dim 0 and two cuts of one dim would interleave in
            # checkpoints
            copies = (
                mesh.expert_mesh["dp_replicate", "edp"]
                if mesh.layout.dp_replicate > 1
                else mesh.expert_mesh["edp"]
            )
            if fsdp:
                shard(experts, copies, (mesh.edp, mesh.dp_replicate), dim=1)
    groups = (mesh.fsdp, mesh.dp_replicate)
    for layer in layers:
        # behind all that changes what a layer computes, and inside recomputation, which runs what was
        # compiled again
        if compiled:
            compile_layer(layer)
        recompute_layer(
            layer, recompute
        )  # before FSDP: its hooks stay outside, so that gathering and reducing are not run again
    if fsdp and mesh.data_mesh is not None and (shared or dtype != torch.float32):
        for layer in layers:
            shard(
                layer, mesh.data_mesh, groups
            )  # layer by layer: one gather per layer, overlapping the one before
        # last: the root takes what no layer holds (embedding, final norm, head)
        _shard(model, mesh.data_mesh, groups, reshard_after_forward=False, dtype=dtype)


def materialize(model: nn.Module, device: torch.device) -> None:
    """Allocate this rank's part of every parameter and buffer, uninitialised."""
    model.to_empty(device=device)


def write_local(param: Tensor, draw: Callable[..., Tensor]) -> None:
    """Fill this rank's part of `param` from `draw(rows, within)`, the part of the whole parameter with the
    given slices of dim 0 and, where those are cut too, of the dims after it."""
    if not isinstance(param, DTensor):
        param.copy_(draw(slice(0, param.shape[0])))
        return
    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    rows, *within = (slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    param.to_local().copy_(draw(rows, tuple(within)) if shape[1:] != param.shape[1:] else draw(rows))


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


def _shard(
    module: nn.Module,
    mesh: DeviceMesh,
    groups: tuple[Group, Group],
    dim: int = 0,
    *,
    reshard_after_forward: bool,
    dtype: torch.dtype,
) -> None:
    """`groups` are those of the mesh, sharded and replicated, that what is sent is counted for."""

    def place(param: nn.Parameter) -> Shard:
        """The first dim from `dim` on that is not cut already."""
        cut = (
            {p.dim for p in param.placements if isinstance(p, Shard)} if isinstance(param, DTensor) else set()
        )
        return Shard(next(d for d in range(dim, param.ndim) if d not in cut))

    # parameters are cast once, before they are gathered, and their gradients before they are reduced; inputs
    # cast themselves
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(
        module,
        mesh=mesh,
        reshard_after_forward=reshard_after_forward,
        shard_placement_fn=place,
        mp_policy=policy,
    )
    assert isinstance(module, FSDPModule)  # for the type checker: fully_shard changes the module's class
    # every loss is already divided by the tokens of the whole step, so gradients are summed over ranks, never
    # averaged
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
    set_collectives(module, *groups, torch.device(mesh.device_type))
