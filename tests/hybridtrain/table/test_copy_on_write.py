"""Rows are read as they were, whatever happens to them before, meanwhile and after."""

from __future__ import annotations

import threading

import torch

from hybridtrain.table.copy_on_write import CopyOnWrite


def test_rows_are_those_of_the_moment_also_while_another_thread_changes_them() -> None:
    generator = torch.Generator().manual_seed(0)
    live = {
        "table": torch.randn(5000, 3, generator=generator),
        "count": torch.arange(5000, dtype=torch.int32),
    }
    then = {name: value.clone() for name, value in live.items()}
    snapshot, go_on = CopyOnWrite(live), threading.Event()

    def change() -> None:
        for number in range(300):
            rows = torch.randint(0, 5000, (400,), generator=generator).unique()
            snapshot.keep(rows)
            live["table"].index_fill_(0, rows, float(number))
            live["count"].index_fill_(0, rows, -number)
            go_on.set()

    writer = threading.Thread(target=change)
    writer.start()
    go_on.wait()
    some = torch.arange(0, 5000, 7)
    for _ in range(20):
        for low in range(0, 5000, 800):
            high = min(low + 800, 5000)
            for name, value in then.items():
                assert torch.equal(snapshot.read(name, low, high), value[low:high])
        for name, value in then.items():
            assert torch.equal(snapshot.gather(name, some), value[some])
    writer.join()
    for name, value in then.items():
        assert torch.equal(snapshot.read(name, 0, 5000), value)
        assert not torch.equal(live[name], value)


def test_no_rows_are_no_rows() -> None:
    snapshot = CopyOnWrite({"table": torch.ones(4, 2)})
    snapshot.keep(torch.arange(0))
    snapshot.keep(torch.tensor([1, 3]))
    assert snapshot.read("table", 2, 2).shape == (0, 2)
    assert snapshot.gather("table", torch.arange(0)).shape == (0, 2)


def test_a_row_is_kept_once_however_often_it_changes() -> None:
    live = {"table": torch.randn(1000, 8), "v": torch.zeros(1000)}
    then = {name: value.clone() for name, value in live.items()}
    snapshot = CopyOnWrite(live)
    for number in range(200):
        rows = (torch.arange(0, 50) * 3 + number % 2).unique()
        snapshot.keep(rows)
        for value in live.values():
            value.index_fill_(0, rows, float(number))
    kept = [tensor for rows, values in snapshot._kept for tensor in (rows, *values.values())]
    assert sum(tensor.nbytes for tensor in kept) == 100 * (
        8 + 8 * 4 + 4
    )  # a hundred rows, each with its number
    assert len(snapshot._kept) == 2  # nor does the reader go through every step
    for name, value in then.items():
        assert torch.equal(snapshot.read(name, 0, 1000), value)
        assert torch.equal(snapshot.gather(name, torch.arange(0, 1000, 3)), value[::3])
