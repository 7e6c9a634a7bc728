"""Puts a meta-device model on its ranks: the order in which parallelism is applied, once, with the reason on
each line. The exchanges that the model calls while it computes are handed to it before (exchanges.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from hybridtrain.model.component import ComponentError, Cut, Placed
from hybridtrain.parallel.collectives import Group
from hybridtrain.parallel.fsdp import set_collectives
from hybridtrain.parallel.mesh import Mesh
from hybridtrain.parallel.tensor import TensorAxis, cut_component, cut_vocabulary

EXPERT_WIDTH = {Cut.EXPERT_COLUMN: 2, Cut.EXPERT_ROW: 1}
"""The dim of the hidden width in a parameter of experts; cut under etp."""


@dataclass(frozen=True)
class Sharding:
    """How parameters lie on the ranks of a mesh, beside the cuts that components declare.

    Layers compute in `dtype`; parameters and their gradients are float32. Without `fsdp` every rank keeps
    whole parameters, and its own experts; another engine then reduces gradients.
    """

    reshard_after_forward: bool = False
    dtype: torch.dtype = torch.float32
    fsdp: bool = True


def parallelize(
    model: nn.Module,
    layers: Collection[nn.Module],
    components: Sequence[Placed],
    mesh: Mesh,
    sharding: Sharding,
) -> None:
    """Shard `model` or a pipeline stage of it (on the meta device) in place over `mesh`; one rank's stay as
    they are.

    `components` are those in `layers`. The model was built with the exchanges of the same mesh. Raises
    ComponentError where a declared cut cannot be made.
    """
    if sharding.fsdp and sharding.dtype != torch.float32 and mesh.data_mesh is None:
        raise ValueError(
            f"computing in {sharding.dtype} needs a mesh, also of one rank: make_mesh(…, always=True)"
        )
    if mesh.tp.size > 1 and mesh.dense_mesh is not None:
        # before ep and FSDP: it decides what a module computes, they only decide where the parts of a
        # parameter lie
        axis = TensorAxis(mesh.tp, mesh.dense_mesh["tp"])
        cut_vocabulary(model, axis)
        for placed in components:
            cut_component(placed, axis)
    if (mesh.ep.size > 1 or mesh.tp.size > 1) and mesh.expert_mesh is not None:
        # ranks of tp see different tokens: to experts they are data-parallel
        for placed in components:
            for experts, cuts in _experts(placed, mesh.layout.etp).items():
                _split_experts(experts, cuts, mesh.expert_mesh, mesh.layout.etp)
                if sharding.fsdp:  # before their layer, whose own parameters are then those that are left
                    _shard_experts(experts, mesh, sharding)
    shared = mesh.dense_mesh is not None and mesh.dense_mesh.size() > 1
    if sharding.fsdp and mesh.data_mesh is not None and (shared or sharding.dtype != torch.float32):
        groups = (mesh.fsdp, mesh.dp_replicate)
        for layer in layers:
            # layer by layer: one gather per layer, overlapping the one before
            _shard(layer, mesh.data_mesh, groups, sharding)
        # last: the root takes what no layer holds (embedding, final norm, head)
        _shard(model, mesh.data_mesh, groups, replace(sharding, reshard_after_forward=False))


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


def _experts(placed: Placed, etp: int) -> dict[nn.Module, dict[str, Cut]]:
    """The component's modules of experts, each with the cuts of its parameters, all of which are experts'."""
    found: dict[nn.Module, dict[str, Cut]] = {}
    for name, parameter in placed.parameters.items():
        if parameter.cut in EXPERT_WIDTH:
            owner, _, leaf = name.rpartition(".")
            found.setdefault(placed.module.get_submodule(owner), {})[leaf] = parameter.cut
            if etp > 1 and (dims := placed.module.get_parameter(name).ndim) != 3:
                raise ComponentError(
                    f"{placed.path}: {name} has {dims} dims; under etp a parameter that is cut as "
                    f"{parameter.cut} has 3, [experts, in, out]; parallel.etp may be 1"
                )
    for experts, cuts in found.items():
        others = {name for name, _ in experts.named_parameters()} - set(cuts)
        if experts is placed.module or others:
            raise ComponentError(
                f"{placed.path}: {', '.join(cuts)} of experts must be in a submodule of their own, without "
                f"{', '.join(sorted(others)) or 'the rest of the component'}"
            )
    return found


def _split_experts(experts: nn.Module, cuts: Mapping[str, Cut], mesh: DeviceMesh, etp: int) -> None:
    for name, cut in cuts.items():
        param = experts.get_parameter(name)
        if etp > 1:
            part = distribute_tensor(param, mesh["ep", "etp"], [Shard(0), Shard(EXPERT_WIDTH[cut])])
        else:
            part = distribute_tensor(param, mesh["ep"], [Shard(0)])
        experts.register_parameter(name, nn.Parameter(part))


def _shard_experts(experts: nn.Module, mesh: Mesh, sharding: Sharding) -> None:
    """Over the edp ranks that hold copies of them, not over dp_shard; along dim 1, since ep already cuts dim
    0 and two cuts of one dim would interleave in checkpoints."""
    assert mesh.expert_mesh is not None  # for the type checker
    axes = ("dp_replicate", "edp") if mesh.layout.dp_replicate > 1 else ("edp",)
    _shard(experts, mesh.expert_mesh[axes], (mesh.edp, mesh.dp_replicate), sharding, dim=1)


def _shard(
    module: nn.Module, mesh: DeviceMesh, groups: tuple[Group, Group], sharding: Sharding, dim: int = 0
) -> None:
    """`groups` are those of the mesh, sharded and replicated, that what is sent is counted for."""

    def place(param: nn.Parameter) -> Shard:
        """The first dim from `dim` on that is not cut already; a vector that tp cuts is cut again."""
        placements = param.placements if isinstance(param, DTensor) else ()
        cut = {p.dim for p in placements if isinstance(p, Shard)}
        return Shard(next((d for d in range(dim, param.ndim) if d not in cut), 0))

    # parameters are cast once, before they are gathered, and their gradients before they are reduced; inputs
    # cast themselves
    policy = MixedPrecisionPolicy(
        param_dtype=sharding.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    fully_shard(
        module,
        mesh=mesh,
        reshard_after_forward=sharding.reshard_after_forward,
        shard_placement_fn=place,
        mp_policy=policy,
    )
    assert isinstance(module, FSDPModule)  # for the type checker: fully_shard changes the module's class
    # every loss is already divided by the tokens of the whole step, so gradients are summed over ranks, never
    # averaged
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
    set_collectives(module, *groups, torch.device(mesh.device_type))
