"""The mesh: groups and device meshes agree with the layout on every rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hybridtrain.parallel.collectives import all_reduce_, gather_objects
from hybridtrain.parallel.layout import Degrees, Layout, LayoutError
from hybridtrain.parallel.mesh import Joining, close_mesh, make_mesh, ranks_of_a_node, world_from_environment
from tests.parallel.groups import mesh_here
from tests.ranks import run_on_ranks


def check_mesh(ep: int, mem: int) -> None:
    mesh = mesh_here(ep=ep, mem=mem)
    layout, rank = mesh.layout, mesh.rank
    assert world_from_environment() == (rank, layout.world)
    for axis in ("dp", "ep", "mem", "mem_replicate"):
        group = getattr(mesh, axis)
        assert group.name == axis
        assert list(group.ranks) == next(g for g in layout.groups(axis) if rank in g)
        assert group.rank == layout.coordinate(rank, axis)
        assert gather_objects(rank, group) == list(group.ranks)
        assert int(all_reduce_(torch.tensor(rank), group)) == sum(group.ranks)
        assert group.traffic is mesh.traffic
    assert mesh.world.ranks == tuple(range(layout.world))

    assert mesh.dense_mesh is not None
    assert mesh.expert_mesh is not None
    assert mesh.mem_mesh is not None
    assert mesh.dense_mesh.get_coordinate() == (layout.coordinate(rank, "dp_shard"),)
    assert mesh.expert_mesh.get_coordinate() == (
        layout.coordinate(rank, "edp"),
        layout.coordinate(rank, "ep"),
    )
    assert mesh.mem_mesh.get_coordinate() == (
        layout.coordinate(rank, "mem_replicate"),
        layout.coordinate(rank, "mem"),
    )
    assert mesh.expert_mesh["ep"].mesh.tolist() == list(mesh.ep.ranks)

    own = [mesh.planning_groups(name) for name in ("plan", "eval_plan")]
    for (mem_group, replicas), name in zip(own, ("plan", "eval_plan"), strict=True):
        assert (mem_group.name, replicas.name) == (f"mem_{name}", f"mem_replicate_{name}")
        assert (mem_group.ranks, replicas.ranks) == (mesh.mem.ranks, mesh.mem_replicate.ranks)
        assert gather_objects(rank, mem_group) == list(mem_group.ranks)
        for group in (mem_group, replicas):
            assert (group.process_group is None) == (group.size == 1)
    handles = [g.process_group for pair in [*own, (mesh.mem, mesh.mem_replicate)] for g in pair if g.size > 1]
    assert len({id(h) for h in handles}) == len(handles)  # a thread never shares a group with another


def check_levels() -> None:
    """What tokens are dispatched over: ep itself, or its nodes and then its ranks on one."""
    mesh = mesh_here(ep=4)
    assert mesh.ep_levels == (mesh.ep,)
    for node_size in (1, 2):
        mesh = mesh_here(ep=4, node_size=node_size)
        for level, axis in zip(mesh.ep_levels, ("ep_inter", "ep_intra"), strict=True):
            assert level.name == axis
            assert list(level.ranks) == next(g for g in mesh.layout.groups(axis) if mesh.rank in g)
            assert gather_objects(mesh.rank, level) == list(level.ranks)
            assert level.traffic is mesh.traffic
        assert [level.size for level in mesh.ep_levels] == [4 // node_size, node_size]
    assert ranks_of_a_node(7) == 4  # as run_on_ranks says, like every launcher


def check_meshes(degrees: list[tuple[int, int]]) -> None:
    for ep, mem in degrees:
        check_mesh(ep, mem)
    check_levels()
    far = mesh_here(mem=2, mem_placement="strided")
    assert gather_objects(far.rank, far.mem) == [far.rank % 2, far.rank % 2 + 2] == list(far.mem.ranks)
    assert far.mem_mesh is not None
    assert far.mem_mesh.mesh_dim_names == ("mem", "mem_replicate")
    assert far.mem_mesh.get_coordinate() == (far.mem.rank, far.mem_replicate.rank)


def meet_and_part(rendezvous: str) -> None:
    dist.destroy_process_group()
    rank, world = world_from_environment()
    mesh = make_mesh(Layout.resolve(world), rank, torch.device("cpu"), 60, Joining(rendezvous))
    assert gather_objects(rank, mesh.world) == [0, 1]
    close_mesh()
    assert not dist.is_initialized()
    close_mesh()  # a second time does nothing


def disagree() -> None:
    rank = dist.get_rank()
    layout = Layout.resolve(
        2, Degrees(ep=2, node_size=1 + rank)
    )  # as where two machines have other numbers of ranks
    with pytest.raises(LayoutError) as caught:
        make_mesh(layout, rank, torch.device("cpu"), timeout=60)
    assert caught.value.violations == [
        "ranks have resolved different layouts: rank 0 has dp_shard 2 · ep 2 · ep_inter 2 · mem 2; "
        "rank 1 has dp_shard 2 · ep 2 · mem 2; set parallel.node_size to one number"
    ]


def test_ranks_that_do_not_agree_are_refused() -> None:
    run_on_ranks(disagree, 2)


def test_groups_and_device_meshes_agree_with_the_layout() -> None:
    run_on_ranks(check_meshes, 4, [(2, 2), (4, 4), (1, 1), (2, 1)])


def test_ranks_meet_at_a_file(tmp_path: Path) -> None:
    run_on_ranks(meet_and_part, 2, f"file://{tmp_path / 'rendezvous'}")


def test_one_rank_needs_no_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert world_from_environment() == (0, 1)
    assert ranks_of_a_node(3) == 3
    mesh = make_mesh(Layout.resolve(1), 0, torch.device("cpu"), timeout=60)
    assert not dist.is_initialized()
    assert (mesh.dense_mesh, mesh.expert_mesh, mesh.mem_mesh) == (None, None, None)
    assert all(
        g.ranks == (0,) and g.process_group is None
        for g in (mesh.world, mesh.ep, *mesh.planning_groups("plan"))
    )
