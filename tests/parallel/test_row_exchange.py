"""The row exchange against a whole table on one rank: what is fetched, what the owners sum, how often a row
travels.

Table and gradients hold small integers, so that sums are exact in any order and every comparison is of
equality.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hybridtrain.kernels.rows.op import pack, unpack
from hybridtrain.parallel.collectives import Group, gather_objects
from hybridtrain.parallel.early_rows import EarlyRowExchange
from hybridtrain.parallel.mesh import Mesh
from hybridtrain.parallel.row_exchange import (
    CommDtypes,
    RowExchange,
    RowPlanner,
    StepPlan,
)
from tests.parallel.groups import mesh_here
from tests.parallel.rows import SHAPE, WIDTH, scattered, table
from tests.ranks import run_on_ranks


def one_owner(rank: int, num_rows: int) -> Tensor:
    """Every rank asks for rows of the first owner alone."""
    return scattered(rank, num_rows) % 2


def one_row(rank: int, num_rows: int) -> Tensor:
    """All ranks ask for the last row, over and over."""
    return torch.full(SHAPE, num_rows - 1)


def own_rows(rank: int, num_rows: int) -> Tensor:
    """No two ranks ask for the same row."""
    return (scattered(rank, num_rows) // 4 * 4 + rank).clamp(max=num_rows - 1)


IDS: list[Callable[[int, int], Tensor]] = [scattered, one_owner, one_row, own_rows]


def gradients(rank: int) -> Tensor:
    return torch.randint(
        -9, 10, (*SHAPE, WIDTH), generator=torch.Generator().manual_seed(100 + rank)
    ).double()


def run_step(
    planner: RowPlanner, exchange: RowExchange, ids: Tensor, grads: Tensor
) -> tuple[list[Tensor], StepPlan, Tensor]:
    """One step as training does it: the rows that every micro-batch looked up, the plan, and the touched
    rows' gradient.
    """
    plan, looked_up = planner.plan(ids), []
    total_ND = exchange.table.new_zeros(len(plan.touched_N), WIDTH)
    grads_of = iter(grads)
    for part in plan.exchanges:
        rows_UD = exchange.fetch(part)
        grad_UD = torch.zeros_like(rows_UD)
        for index, select in zip(part.index, part.select, strict=True):
            leaf = rows_UD[select]
            looked_up.append(leaf[index])
            grad_leaf = torch.zeros_like(leaf).index_add_(
                0, index.flatten(), next(grads_of).reshape(-1, WIDTH)
            )
            grad_UD.index_add_(0, select, grad_leaf)
        exchange.push(part, grad_UD, total_ND)
    exchange.reduce_replicas(total_ND)
    return looked_up, plan, total_ND


def spent(mesh: Mesh, group: str, before: dict[tuple[str, str], tuple[int, int]]) -> tuple[int, int]:
    """Calls of all_to_all, and bytes sent, since `before`."""
    calls, sent = mesh.traffic.entries()[group, "all_to_all"]
    calls_before, sent_before = before.get((group, "all_to_all"), (0, 0))
    return calls - calls_before, sent - sent_before


def check_against_whole_table(mem: int, num_rows: int, exchange_groups: int, checksum: bool) -> None:
    mesh = mesh_here(mem=mem)
    world, rank = mesh.layout.world, mesh.rank
    bounds = mesh.layout.row_bounds(num_rows)
    low, high = bounds[mesh.mem.rank], bounds[mesh.mem.rank + 1]
    whole = table(num_rows)
    plan_groups = mesh.planning_groups("plan")
    planner = RowPlanner(bounds, plan_groups, mesh.device, exchange_groups=exchange_groups, checksum=checksum)
    exchange = RowExchange(whole[low:high].clone(), ((mesh.mem, mesh.mem_replicate)), checksum=checksum)
    for make_ids in IDS:
        ids = make_ids(rank, num_rows)
        before = mesh.traffic.entries()
        looked_up, plan, total_ND = run_step(planner, exchange, ids, gradients(rank))

        assert torch.equal(torch.stack(looked_up), whole[ids]), make_ids.__name__
        asked = [make_ids(i, num_rows) for i in range(world)]
        everything = torch.zeros_like(whole)
        for i in range(world):
            everything.index_add_(0, asked[i].flatten(), gradients(i).view(-1, WIDTH))
        touched = torch.unique(torch.cat(asked))
        touched = touched[(touched >= low) & (touched < high)] - low
        assert torch.equal(plan.touched_N, touched), make_ids.__name__
        assert torch.equal(total_ND, everything[low:high][touched]), make_ids.__name__

        # each unique row of an exchange travels once, and not at all where it is at home
        unique = [[torch.unique(part) for part in asked[i].chunk(exchange_groups)] for i in range(world)]
        assert len(plan.exchanges) == exchange_groups
        assert [part.num_rows for part in plan.exchanges] == [len(u) for u in unique[rank]]
        assert plan.unique == sum(len(u) for u in unique[rank])
        assert plan.lookups == ids.numel()
        owned = [int(((u >= low) & (u < high)).sum()) for i in mesh.mem.ranks if i != rank for u in unique[i]]
        foreign = [int(((u < low) | (u >= high)).sum()) for u in unique[rank]]
        if mem > 1 and not checksum:
            moved = (sum(owned) + sum(foreign)) * WIDTH * 8
            assert spent(mesh, "mem", before) == (2 * exchange_groups, moved)
            asked_for = sum(foreign) * 8 + exchange_groups * (mem - 1) * 8
            assert spent(mesh, "mem_plan", before) == (2 * exchange_groups, asked_for)
        if mem == 1:
            assert "mem" not in mesh.traffic.bytes_by_group()


def check_all(cases: list[tuple[int, int, int, bool]]) -> None:
    for case in cases:
        try:
            check_against_whole_table(*case)
        except Exception as error:
            raise AssertionError(f"mem, num_rows, exchange_groups, checksum = {case}") from error


def test_equals_a_whole_table_on_four_ranks() -> None:
    cases = [(mem, num_rows, groups, False) for mem in (1, 2, 4) for num_rows in (37, 5) for groups in (1, 2)]
    run_on_ranks(check_all, 4, [*cases, (4, 1000, 4, False)])


def test_equals_a_whole_table_with_checksums() -> None:
    run_on_ranks(check_all, 4, [(4, 37, 1, True), (2, 37, 2, True), (4, 5, 1, True)])


def test_equals_a_whole_table_on_one_and_two_ranks() -> None:
    run_on_ranks(check_all, 1, [(1, 37, 1, False), (1, 37, 2, True)])
    run_on_ranks(check_all, 2, [(2, 37, 1, False), (1, 37, 4, False), (2, 1, 1, False)])


def check_replicas() -> None:
    """Sums of float32 that do not round alike in every order: the replicas' totals are equal bit by bit all
    the same.
    """
    mesh = mesh_here(mem=2)
    bounds = mesh.layout.row_bounds(16)
    low, high = bounds[mesh.mem.rank], bounds[mesh.mem.rank + 1]
    planner = RowPlanner(bounds, mesh.planning_groups("plan"), mesh.device)
    exchange = RowExchange(table(16)[low:high].float(), (mesh.mem, mesh.mem_replicate))
    for step in range(3):
        noise = torch.randn((*SHAPE, WIDTH), generator=torch.Generator().manual_seed(10 * step + mesh.rank))
        _, plan, total_ND = run_step(planner, exchange, scattered(10 * step + mesh.rank, 16), noise)
        totals = gather_objects(
            (plan.touched_N.numpy().tobytes(), total_ND.numpy().tobytes()), mesh.mem_replicate
        )
        assert totals[0] == totals[1]


def test_replicas_stay_bitwise_equal() -> None:
    run_on_ranks(check_replicas, 4)


def check_wires() -> None:
    """Narrow rows arrive as one rank alone would see them, and narrow gradients are added up after they
    arrived.
    """
    mesh = mesh_here(mem=2)
    bounds, ids = mesh.layout.row_bounds(37), scattered(mesh.rank, 37)
    low, high = bounds[mesh.mem.rank], bounds[mesh.mem.rank + 1]
    whole = torch.randn(37, WIDTH, generator=torch.Generator().manual_seed(5))
    planner = RowPlanner(bounds, mesh.planning_groups("plan"), mesh.device)
    (part,) = (plan := planner.plan(ids)).exchanges
    unique = ids.unique()
    grad_UD = torch.randn(len(unique), WIDTH, generator=torch.Generator().manual_seed(mesh.rank))
    for wires, row_bytes in (
        (CommDtypes("float8", "bfloat16"), (16, 2 * WIDTH)),
        (CommDtypes("bfloat16", "float8"), (2 * WIDTH, 16)),
    ):

        def seen(x: Tensor, wire: str) -> Tensor:
            return unpack(pack(x, None, wire), WIDTH, wire)

        groups = mesh.mem, mesh.mem_replicate
        exchange = EarlyRowExchange(whole[low:high].clone(), groups, mesh.mem, wires=wires)
        before = mesh.traffic.entries()
        assert torch.equal(exchange.fetch(part), seen(whole[unique], wires.rows))
        arrived = exchange.complete(part, exchange.begin(part, exchange.table[part.wanted_Q]))
        assert torch.equal(arrived, seen(whole[unique], wires.rows))
        total_ND = torch.zeros(len(plan.touched_N), WIDTH)
        exchange.push(part, grad_UD, total_ND)
        everything = torch.zeros_like(whole)
        for numbers, grads in gather_objects((unique, seen(grad_UD, wires.gradients)), mesh.world):
            everything.index_add_(0, numbers, grads)
        assert torch.equal(total_ND, everything[low:high][plan.touched_N])
        own = mesh.mem.rank
        rows, grads = sum(part.receive) - part.receive[own], sum(part.send) - part.send[own]
        assert spent(mesh, "mem", before) == (3, 2 * rows * row_bytes[0] + grads * row_bytes[1])


def test_rows_and_gradients_on_narrow_wires() -> None:
    run_on_ranks(check_wires, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_table_in_host_memory_serves_a_model_on_cuda() -> None:
    model, host = torch.device("cuda"), torch.device("cpu")
    alone = Group("mem", (0,), 0)
    rows_of = table(37)
    planner = RowPlanner([0, 37], (alone, alone), model, table_device=host)
    exchange = RowExchange(rows_of, (alone, alone), model)
    (part,) = (plan := planner.plan(scattered(0, 37))).exchanges
    fetched = exchange.fetch(part)
    assert fetched.device.type == "cuda"
    assert torch.equal(fetched.cpu(), rows_of[part.wanted_Q])
    total_ND = torch.zeros(len(plan.touched_N), WIDTH, dtype=torch.float64, device=model)
    exchange.push(part, torch.ones_like(fetched), total_ND)
    assert torch.equal(total_ND.cpu(), torch.ones(len(plan.touched_N), WIDTH, dtype=torch.float64))
