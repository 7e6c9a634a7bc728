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


@dataclass(frozen=True)
class Mesh:
    """Everything distributed that a run is handed. A world of one rank needs no torch.distributed unless it
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
        groups = []
        for axis in MEM_AXES[::-1]:
            groups.append(
                _group(
                    self.layout, self.rank, axis, f"{axis}_{name}", self.traffic, self.timeout, backend="gloo"
                )
            )
        return groups[0], groups[1]

    def own_mem_group(self, name: str) -> Group:
        """A copy of `mem` for exchanges that neither wait for the step's other collectives nor hold them up.
        Collective.
        """
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        return _group(
            self.layout, self.rank, "mem", f"mem_{name}", self.traffic, self.timeout, backend=backend
        )

    def own_world_group(self, name: str, timeout: float) -> Group:
        """A gloo copy of `world` for a thread of its own, whose collectives may take `timeout` seconds.
        Collective.
        """
        return _group(self.layout, self.rank, "world", name, self.traffic, timeout, backend="gloo")


def world_from_environment() -> tuple[int, int]:
    """(rank, world size) as torchrun sets them; (0, 1) alone."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def ranks_of_a_node(world: int) -> int:
    """Ranks on this machine as the launcher says; all of them where none does."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world))


def choose_device() -> torch.device:
    """The accelerator of this local rank where there is one, else the CPU: the one place where it is decided."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def make_mesh(
    layout: Layout,
    rank: int,
    device: torch.device,
    timeout: float,
    rendezvous: str = "env://",
    table_device: torch.device | None = None,
    *,
    always: bool = False,
) -> Mesh:
    """Start torch.distributed for `layout.world` ranks and build all groups; `timeout` in seconds bounds
    every collective.

    The ranks meet at `rendezvous`: torchrun's environment, or a `file://` path that all of them see.
    `table_device` is where this rank's part of the lookup table lies, None where the model does. With
    `always` a world of one rank has device meshes too, for FSDP, which then does nothing but mix precisions.
    """
    traffic = Traffic()
    backend = "nccl" if device.type == "cuda" else "gloo"
    if layout.world == 1 and always and not dist.is_initialized():
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        atexit.register(close_mesh)  # evaluation and generation, unlike training, have no end of their own
    elif layout.world > 1 and not dist.is_initialized():
        dist.init_process_group(
            backend,
            init_method=rendezvous,
            rank=rank,
            world_size=layout.world,
            timeout=timedelta(seconds=timeout),
        )

    meshes = layout.world > 1 or always
    layouts = gather_objects(
        layout, _group(layout, rank, "world", "world", Traffic(), timeout)
    )  # not of the run
    if any(
        other != layout for other in layouts
    ):  # LOCAL_WORLD_SIZE may differ; ranks would wait for each other in other groups
        said = "; ".join(
            f"rank {i} has {other.describe()}" for i, other in enumerate(layouts) if other != layouts[i - 1]
        )
        raise LayoutError(
            layout.world,
            [f"ranks have resolved different layouts: {said}; set parallel.node_size to one number"],
        )

    def group(axis: str) -> Group:
        return _group(layout, rank, axis, axis, traffic, timeout)

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
        table_device=table_device or device,
        traffic=traffic,
        world=group("world"),
        # its own also where it is all ranks: sends between stages must not queue behind collectives of the
        # world
        pp=_group(layout, rank, "pp", "pp", traffic, timeout, backend=backend),
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
        mem_mesh=_device_mesh(layout, table_device or device, layout.mem_axes) if layout.world > 1 else None,
    )


def _group(
    layout: Layout,
    rank: int,
    axis: str,
    name: str,
    traffic: Traffic,
    timeout: float,
    backend: str | None = None,
) -> Group:
    partition = [list(range(layout.world))] if axis == "world" else layout.groups(axis)
    ranks = next(ranks for ranks in partition if rank in ranks)
    process_group = None
    if len(ranks) == layout.world > 1 and backend is None:
        process_group = dist.group.WORLD
    elif len(ranks) > 1:
        process_group, _ = dist.new_subgroups_by_enumeration(
            partition, backend=backend, timeout=timedelta(seconds=timeout)
        )
    return Group(name, tuple(ranks), ranks.index(rank), process_group, traffic)


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
