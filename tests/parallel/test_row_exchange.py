"""The row exchange against a whole table on one rank: what is fetched, what the owners sum, how often a row
travels.

Table and gradients hold small integers, so that sums are exact in any order and every comparison is of
equality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridtrain.kernels.rows.op import pack, unpack
from hybridtrain.parallel import row_exchange as module
from hybridtrain.parallel.checksums import ExchangeError, checksums
from hybridtrain.parallel.collectives import Group, gather_objects
from hybridtrain.parallel.early_rows import EarlyRowExchange, OverlapPlanner
from hybridtrain.parallel.mesh import Mesh
from hybridtrain.parallel.row_exchange import (
    CommDtypes,
    RowExchange,
    RowPlanner,
    StepPlan,
    exchange_rows,
)
from tests.parallel.groups import mesh_here
from tests.ranks import run_on_ranks

WIDTH = 3
SHAPE = (4, 2, 5, 2, 2)  # M, B, T, L, S


def table(num_rows: int) -> Tensor:
    return torch.arange(num_rows * WIDTH, dtype=torch.float64).view(num_rows, WIDTH)


def scattered(rank: int, num_rows: int) -> Tensor:
    """Ids over the whole table, many of them twice."""
    return torch.randint(num_rows, SHAPE, generator=torch.Generator().manual_seed(rank))


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


def message(act: Callable[[], Any]) -> str | None:
    try:
        act()
    except ExchangeError as error:
        return str(error)
    return None


def ask_outside(ids: list[int]) -> list[str | None]:
    mesh = mesh_here(mem=2)
    planner = RowPlanner(mesh.layout.row_bounds(10), mesh.planning_groups("plan"), mesh.device)
    return [message(lambda i=i: planner.plan(torch.full(SHAPE, i))) for i in ids]  # type: ignore[misc]


def test_an_id_outside_the_table_is_refused() -> None:
    texts = "row ids computed here reach from {0} to {0}, outside 0 to 9 (group mem_plan, rank {1})"
    for rank, found in enumerate(run_on_ranks(ask_outside, 2, [10, -1, 9])):
        assert found == [texts.format(10, rank), texts.format(-1, rank), None]


@contextmanager
def damaged(receiver: int, harm: Callable[[Tensor], None]) -> Iterator[None]:
    """While entered, whatever reaches rank `receiver` in an exchange of rows is harmed on the way; counts are
    not.
    """
    real = module.all_to_all

    def all_to_all(x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
        out = real(x, send, receive, group)
        if group.ranks[group.rank] == receiver:
            harm(out)
        return out

    module.all_to_all = all_to_all
    try:
        yield
    finally:
        module.all_to_all = real


def flip_a_bit(x: Tensor) -> None:
    x.view(torch.uint8)[0, 0] ^= 1  # of the first row, which comes from rank 0


def swap_rows(x: Tensor) -> None:
    x[:2] = x[:2].flip(0)


def shift_id(x: Tensor) -> None:
    x[0] += 5


def exchange_damaged(checksum: bool) -> dict[str, str | None]:
    mesh = mesh_here(mem=2)
    send = [3, 3]
    found: dict[str, str | None] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        x = table(6).to(dtype) + mesh.rank
        found[f"sound {name}"] = message(lambda x=x: exchange_rows(x, send, send, mesh.mem, "rows", checksum))  # type: ignore[misc]
        for harm in (flip_a_bit, swap_rows):
            with damaged(1, harm):
                found[f"{harm.__name__} {name}"] = message(
                    lambda x=x: exchange_rows(x, send, send, mesh.mem, "rows", checksum)  # type: ignore[misc]
                )
    planner = RowPlanner([0, 5, 10], mesh.planning_groups("plan"), mesh.device, checksum=checksum)
    with damaged(1, shift_id):
        found["row ids"] = message(lambda: planner._exchange(torch.arange(10).view(1, 10)))
    return found


def test_a_damaged_payload_is_found() -> None:
    sound, harmed = run_on_ranks(exchange_damaged, 2, True)
    assert set(sound.values()) == {None}
    rows = "rows from rank 0 arrived damaged at rank 1 (group mem)"
    expected = {
        f"{harm} {dtype}": rows for harm in ("flip_a_bit", "swap_rows") for dtype in ("float32", "bfloat16")
    }
    expected |= {"row ids": "row ids from rank 0 arrived damaged at rank 1 (group mem_plan)"}
    assert {what: text for what, text in harmed.items() if text is not None} == expected


def test_without_checksum_only_ids_outside_an_owner_are_found() -> None:
    sound, harmed = run_on_ranks(exchange_damaged, 2, False)
    assert set(sound.values()) == {None}
    text = "row ids received by owner 1 reach from 5 to 10, outside 5 to 9 (group mem_plan, rank 1)"
    assert {what: text for what, text in harmed.items() if text is not None} == {"row ids": text}


def test_checksums_tell_place_and_value() -> None:
    x = torch.randint(-5, 5, (7, 4), generator=torch.Generator().manual_seed(0))
    before = checksums(x, [3, 0, 4])
    assert before.shape == (3,)
    assert before[1] == 0
    for row in range(7):
        for column in range(4):
            harmed = x.clone()
            harmed[row, column] += 1
            differs = checksums(harmed, [3, 0, 4]) != before
            assert differs.tolist() == [row < 3, False, row >= 3]


@pytest.mark.parametrize("shape", [(0,), (0, 4)])
def test_checksums_of_nothing(shape: tuple[int, ...]) -> None:
    assert checksums(torch.empty(shape), [0, 0]).tolist() == [0, 0]


def check_ahead() -> list[str | None]:
    """Plans in a row: early and late rows are what the owners' touched rows say, and arrive in their places;
    damage is found.
    """
    mesh = mesh_here(mem=2)
    num_rows = 37
    bounds = mesh.layout.row_bounds(num_rows)
    low, high = bounds[mesh.mem.rank], bounds[mesh.mem.rank + 1]
    whole = table(num_rows)
    planner = OverlapPlanner(bounds, mesh.planning_groups("plan"), mesh.device, exchange_groups=2)
    own, ahead = whole[low:high].clone(), mesh.own_mem_group("ahead")
    exchange = EarlyRowExchange(own, (mesh.mem, mesh.mem_replicate), ahead, checksum=True)
    ids = [
        torch.randint(num_rows, (2, 1, 4, 1, 1), generator=torch.Generator().manual_seed(10 * i + mesh.rank))
        for i in range(5)
    ]
    everyones = gather_objects(ids, mesh.world)
    plans = [planner.plan(i) for i in ids]
    assert [plan.number for plan in plans] == [1, 2, 3, 4, 5]
    assert plans[0].late_rows is None
    for step in range(1, 5):
        first, second = plans[step].exchanges
        assert first.early is not None
        assert first.late is not None
        assert second.early is second.late is None  # nothing is updated between the exchanges of a step
        changed = torch.cat([rank[step - 1].flatten() for rank in everyones])
        unique = ids[step][:1].unique()
        is_late = torch.isin(unique, changed)
        assert torch.equal(first.late.place, is_late.nonzero().flatten())
        assert torch.equal(first.early.place, (~is_late).nonzero().flatten())
        assert plans[step].late_rows == int(is_late.sum())
        arrival = exchange.begin(first.early, own[first.early.wanted_Q])
        own[plans[step - 1].touched_N] += 1000  # the update of the step before
        whole[changed.unique()] += 1000
        assert torch.equal(exchange.complete(first, arrival), whole[unique])
    part = plans[1].exchanges[1]
    arrival = exchange.begin(part, own[part.wanted_Q])
    if mesh.rank == 1:
        real = arrival.pending.wait

        def wait() -> Tensor:  # on its way it could still be overwritten
            rows = real()
            flip_a_bit(rows)
            return rows

        arrival.pending.wait = wait  # type: ignore[method-assign]
    return [message(arrival.wait)]


def test_early_and_late_rows() -> None:
    sound, harmed, *_ = run_on_ranks(check_ahead, 4)
    assert (sound, harmed) == ([None], ["rows from rank 0 arrived damaged at rank 1 (group mem_ahead)"])


def test_a_table_may_lie_elsewhere_than_the_model() -> None:
    """The meta device stands for an accelerator: what the owner reads stays with the table, what the model
    reads does not.
    """
    model, host = torch.device("meta"), torch.device("cpu")
    alone = Group("mem", (0,), 0)
    planner = OverlapPlanner([0, 37], (alone, alone), model, table_device=host)
    planner.plan(scattered(0, 37))
    plan = planner.plan(scattered(1, 37))
    (part,) = plan.exchanges
    assert part.early is not None
    read_by_owner = [plan.touched_N, part.wanted_Q, part.early.wanted_Q]
    read_by_model = [*part.index, *part.select, part.slot_Q, part.early.place]
    assert {t.device for t in read_by_owner} == {host}
    assert {t.device for t in read_by_model} == {model}
    exchange = EarlyRowExchange(table(37), (alone, alone), alone, model)
    fetched = exchange.fetch(part)
    assert (fetched.device, fetched.shape) == (model, (part.num_rows, WIDTH))
    assert exchange.begin(part.early, table(37)[part.early.wanted_Q]).wait().device == model


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
