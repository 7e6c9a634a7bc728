"""Results are kept once and given once, in order; what changed or was not kept is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hybridtrain.parallel.collectives import Group, barrier
from hybridtrain.parallel.replay import Replay, refuse_again, replayed, replayed_start

calls: list[float] = []


@replayed
def double(x: Tensor) -> Tensor:
    calls.append(float(x[0]))
    return x * 2


def test_the_second_pass_gets_the_first_ones_results() -> None:
    replay = Replay()
    calls.clear()
    with replay:
        first = [double(torch.full((3,), float(n))) for n in range(3)]
        refuse_again("an exchange")
    with replay:
        again = [double(torch.full((3,), float(n))) for n in range(2)]  # it may end early
        with pytest.raises(
            RuntimeError, match="an exchange would run a second time in the backward pass; mark it `replayed`"
        ):
            refuse_again("an exchange")
    assert calls == [0.0, 1.0, 2.0]
    assert all(torch.equal(a, b) and a is not b for a, b in zip(again, first, strict=False))
    assert torch.equal(double(torch.ones(3)), torch.full((3,), 2.0))  # outside nothing is kept
    assert calls[-1] == 1.0
    with (
        replay,
        pytest.raises(
            RuntimeError, match="asks for more results than its forward pass had, or for the third time"
        ),
    ):
        double(torch.ones(3))


def test_what_is_begun_is_not_begun_again() -> None:
    begun: list[int] = []

    @replayed_start
    def start(number: int) -> Callable[[], Tensor]:
        begun.append(number)
        return lambda: torch.full((2,), float(number))

    replay = Replay()
    for _ in range(2):
        with replay:
            first, second = start(1), start(2)
            assert [float(finish()[0]) for finish in (second, first)] == [
                2.0,
                1.0,
            ]  # kept in the order in which they ended
    assert begun == [1, 2]
    assert float(start(3)()[0]) == 3.0


def test_tuples_are_kept_with_what_is_no_tensor() -> None:
    replay = Replay()
    with replay:
        replay.result(lambda: (torch.ones(2), None, 3))
    with replay:
        tensor, nothing, number = replay.result(lambda: (torch.zeros(2), None, 4))
    assert torch.equal(tensor, torch.ones(2))
    assert (nothing, number) == (None, 3)


def test_a_result_that_was_changed_is_not_given() -> None:
    replay = Replay()
    with replay:
        double(torch.ones(3)).add_(1)
    with replay, pytest.raises(RuntimeError, match=r"a result \[3\] that a layer kept was changed in place"):
        double(torch.ones(3))


def test_a_collective_that_is_not_marked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "barrier", lambda group: None)
    replay, group = Replay(), Group("ep", (0, 1), 0)
    with replay:
        barrier(group)
    with replay, pytest.raises(RuntimeError, match="barrier over ep would run a second time"):
        barrier(group)
    assert group.traffic.entries() == {("ep", "barrier"): (1, 0)}
