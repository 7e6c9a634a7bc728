"""Rows that travel before their step: which may, and whether they arrive in their places."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridtrain.parallel.collectives import Group, gather_objects
from hybridtrain.parallel.early_rows import EarlyRowExchange, OverlapPlanner, late_rows
from tests.parallel.groups import mesh_here
from tests.parallel.rows import WIDTH, flip_a_bit, message, scattered, table
from tests.ranks import run_on_ranks


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
    own, ahead = whole[low:high].clone(), mesh.own_group("mem", "mem_ahead")
    exchange = EarlyRowExchange(own, (mesh.mem, mesh.mem_replicate), ahead, checksum=True)
    ids = [
        torch.randint(num_rows, (2, 1, 4, 1, 1), generator=torch.Generator().manual_seed(10 * i + mesh.rank))
        for i in range(5)
    ]
    everyones = gather_objects(ids, mesh.world)
    plans = [planner.plan(i) for i in ids]
    assert [plan.number for plan in plans] == [1, 2, 3, 4, 5]
    assert late_rows(plans[0]) is None
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
        assert late_rows(plans[step]) == int(is_late.sum())
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
