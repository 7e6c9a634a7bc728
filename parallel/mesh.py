"""This rank's place in the layout as torch sees it: device, process groups and device meshes, made once per
run.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh

from hybridtrain.parallel.collectives import Group, gather_objects
from hybridtrain.parallel.layout import MEM_AXES, Layout, LayoutError
from hybridtrain.parallel.traffic import Traffic

AWAKE = 1e-3
"""Seconds that ranks with a core each stay awake while they wait for each other."""


@dataclass(frozen=True)
class Mesh:
    """Everything distributed that a run is handed. One rank alone needs no torch.distributed unless it
    mixes precisions.
    """

    layout: Layout
    rank: int
    device: torch.device
    table_device: torch.device
    traffic: Traffic

    world: Group
    pp: Group
    dp: Group
    cp: Group
    tp: Group
    ep: Group
    ep_levels: tuple[
        Group, ...
    ]  # what tokens are dispatched over, one after the other: (ep,) or (ep_inter, ep_intra)
    mem: Group
    mem_replicate: Group
    # the groups of the meshes below, over which FSDP communicates:
    fsdp: Group
    edp: Group
    dp_replicate: Group
    timeout: float

    # of this rank's pipeline stage:
    dense_mesh: (
        DeviceMesh | None
    )  # ([dp_replicate,] fsdp[, tp]): what dense parameters are cut over; see `data_mesh`
    expert_mesh: DeviceMesh | None  # ([dp_replicate,] edp, ep[, etp])
    # of all ranks:
    mem_mesh: DeviceMesh | None  # layout.mem_axes

    @property
    def data_mesh(self) -> DeviceMesh | None:
        """The dims of `dense_mesh` over which parameters are sharded for memory's sake: HSDP where there are
        two.
        """
        if self.dense_mesh is None or self.layout.tp == 1:
            return self.dense_mesh
        assert self.dense_mesh.mesh_dim_names is not None  # for the type checker: _device_mesh names them
        return self.dense_mesh[self.dense_mesh.mesh_dim_names[:-1]]

    def planning_groups(self, name: str) -> tuple[Group, Group]:
        """Own copies of `mem` and `mem_replicate` for one planner: always gloo (ids live on the CPU), never
        shared between threads.

        Collective: every rank calls it for the same names in the same order.
        """
        groups = _Groups(self.layout, self.rank, self.traffic, self.timeout)
        mem, mem_replicate = (groups.make(axis, f"{axis}_{name}", "gloo") for axis in MEM_AXES[::-1])
        return mem, mem_replicate

    def own_group(self, axis: str, name: str) -> Group:
        """A copy of the group along `axis` for exchanges that neither wait for the step's other collectives
        nor hold them up. Collective.
        """
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        return _Groups(self.layout, self.rank, self.traffic, self.timeout).make(axis, name, backend)

    def own_world_group(self, name: str, timeout: float) -> Group:
        """A gloo copy of `world` for a thread of its own, whose collectives may take `timeout` seconds.
        Collective.
        """
        return _Groups(self.layout, self.rank, self.traffic, timeout).make("world", name, "gloo")


def world_from_environment() -> tuple[int, int]:
    """(rank, world size) as torchrun sets them; (0, 1) alone."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def ranks_of_a_node(world: int) -> int:
    """Ranks on this machine as the launcher says; all of them where none does."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world))


def choose_device() -> torch.device:
    """The accelerator of this local rank where there is one, else the CPU. It is decided here only."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


@dataclass(frozen=True)
class Joining:
    """How ranks find each other, and what is special about what they make.

    rendezvous: torchrun's environment, or a `file://` path that all ranks see
    table_device: where this rank's part of the lookup table lies; None: where the model does
    always: one rank alone has device meshes too, for FSDP, which then does nothing but mix precisions
    """

    rendezvous: str = "env://"
    table_device: torch.device | None = None
    always: bool = False


BY_ENVIRONMENT = Joining()


def _join(world: int, rank: int, backend: str, timeout: float, joining: Joining) -> None:
    """Start torch.distributed where there is something to join, or it is asked for."""
    if world > 1:
        seconds = timedelta(seconds=timeout)
        dist.init_process_group(
            backend, init_method=joining.rendezvous, rank=rank, world_size=world, timeout=seconds
        )
    elif joining.always:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        atexit.register(close_mesh)  # evaluation and generation, unlike training, have no end of their own


def make_mesh(
    layout: Layout, rank: int, device: torch.device, timeout: float, joining: Joining = BY_ENVIRONMENT
) -> Mesh:
    """Start torch.distributed for `layout.world` ranks and build all groups; `timeout` in seconds bounds
    every collective.

    Raises LayoutError where ranks have resolved different layouts.
    """
    a_core_each = device.type == "cpu" and ranks_of_a_node(layout.world) <= (os.cpu_count() or 1)
    traffic = Traffic(AWAKE if a_core_each else 0.0)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        _join(layout.world, rank, backend, timeout, joining)
    meshes = layout.world > 1 or joining.always
    _check_same(layout, _Groups(layout, rank, Traffic(), timeout).make("world", "world"))  # not of the run
    groups = _Groups(layout, rank, traffic, timeout)

    def group(axis: str) -> Group:
        return groups.make(axis, axis)

    dense_mesh, expert_mesh = _parameter_meshes(layout, device) if meshes else (None, None)

    def group_of(mesh: DeviceMesh | None, axis: str) -> Group:
        ranks = next(ranks for ranks in layout.groups(axis) if rank in ranks)
        process_group = mesh[axis].get_group() if mesh is not None and len(ranks) > 1 else None
        return Group(axis, tuple(ranks), ranks.index(rank), process_group, traffic)

    ep = group("ep")
    return Mesh(
        layout=layout,
        rank=rank,
        device=device,
        table_device=joining.table_device or device,
        traffic=traffic,
        world=group("world"),
        # its own also where it is all ranks: sends between stages must not queue behind collectives of
        # all ranks
        pp=groups.make("pp", "pp", backend),
        dp=group("dp"),
        cp=group("cp"),
        tp=group("tp"),
        ep=ep,
        ep_levels=(group("ep_inter"), group("ep_intra")) if layout.ep_inter > 1 else (ep,),
        mem=group("mem"),
        mem_replicate=group("mem_replicate"),
        fsdp=group_of(dense_mesh, "fsdp"),
        edp=group_of(expert_mesh, "edp"),
        dp_replicate=group_of(dense_mesh, "dp_replicate"),
        timeout=timeout,
        dense_mesh=dense_mesh,
        expert_mesh=expert_mesh,
        mem_mesh=_device_mesh(layout, joining.table_device or device, layout.mem_axes)
        if layout.world > 1
        else None,
    )


def _check_same(layout: Layout, world: Group) -> None:
    """Raise LayoutError where ranks have resolved different layouts: LOCAL_WORLD_SIZE may differ between
    machines, and ranks would wait for each other in different groups.
    """
    layouts = gather_objects(layout, world)
    if all(other == layout for other in layouts):
        return
    said = "; ".join(
        f"rank {i} has {other.describe()}" for i, other in enumerate(layouts) if other != layouts[i - 1]
    )
    problem = f"ranks have resolved different layouts: {said}; set parallel.node_size to one number"
    raise LayoutError(layout.world, [problem])


@dataclass(frozen=True)
class _Groups:
    """Makes groups of ranks; collective, so every rank makes the same ones in the same order."""

    layout: Layout
    rank: int
    traffic: Traffic
    timeout: float

    def make(self, axis: str, name: str, backend: str | None = None) -> Group:
        """Of the ranks that differ from this one on `axis` only ("world": all). Without `backend` the group
        of all ranks is torch's own.
        """
        world = self.layout.world
        partition = [list(range(world))] if axis == "world" else self.layout.groups(axis)
        ranks = next(ranks for ranks in partition if self.rank in ranks)
        process_group = None
        if len(ranks) == world > 1 and backend is None:
            process_group = dist.group.WORLD
        elif len(ranks) > 1:
            process_group, _ = dist.new_subgroups_by_enumeration(
                partition, backend=backend, timeout=timedelta(seconds=self.timeout)
            )
        return Group(name, tuple(ranks), ranks.index(self.rank), process_group, self.traffic)


@contextmanager
def mesh_on_paper(layout: Layout, rank: int) -> Iterator[Mesh]:
    """The mesh of `rank` in a process without any other: it says where the parts of a model on the meta
    device lie.

    What is sent over it arrives nowhere.
    """
    if dist.is_initialized():
        raise RuntimeError("a mesh on paper needs a process that has joined no others")
    cpu, traffic = torch.device("cpu"), Traffic()
    if layout.world > 1:
        from torch.testing._internal.distributed import fake_pg  # noqa: F401  # registers the backend "fake"

        dist.init_process_group("fake", store=HashStore(), rank=rank, world_size=layout.world)
    try:
        meshes = _parameter_meshes(layout, cpu) if layout.world > 1 else (None, None)
        ep_levels = ("ep_inter", "ep_intra") if layout.ep_inter > 1 else ("ep",)
        axes = ("pp", "dp", "cp", "tp", "ep", "mem", "mem_replicate", "fsdp", "edp", "dp_replicate")

        def group(axis: str) -> Group:
            ranks = next(ranks for ranks in layout.groups(axis) if rank in ranks)
            return Group(axis, tuple(ranks), ranks.index(rank), None, traffic)

        yield Mesh(
            layout=layout,
            rank=rank,
            device=cpu,
            table_device=cpu,
            traffic=traffic,
            world=Group("world", tuple(range(layout.world)), rank, None, traffic),
            ep_levels=tuple(group(axis) for axis in ep_levels),
            timeout=0,
            dense_mesh=meshes[0],
            expert_mesh=meshes[1],
            mem_mesh=None,
            **{axis: group(axis) for axis in axes},
        )
    finally:
        close_mesh()


def close_mesh() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _parameter_meshes(layout: Layout, device: torch.device) -> tuple[DeviceMesh, DeviceMesh]:
    """`dense_mesh` and `expert_mesh`."""
    replicate = (
        ("dp_replicate",) if layout.dp_replicate > 1 else ()
    )  # a replicate dim of one would still cost an all-reduce
    tensor = ("tp",) if layout.tp > 1 else ()
    etp = ("etp",) if layout.etp > 1 else ()
    dense = _device_mesh(layout, device, (*replicate, "fsdp", *tensor))
    return dense, _device_mesh(layout, device, (*replicate, "edp", "ep", *etp))


def _device_mesh(layout: Layout, device: torch.device, axes: Sequence[str]) -> DeviceMesh:
    names = ("pp", *axes) if layout.pp > 1 and "mem" not in axes else tuple(axes)
    mesh = DeviceMesh(device.type, torch.arange(layout.world).view(layout.shape(names)), mesh_dim_names=names)
    return mesh[tuple(axes)] if "pp" in names else mesh
