"""The Triton source of the row-wise update, interpreted on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybridtrain.kernels.rowwise_adam import op, reference, rounding
from hybridtrain.kernels.rowwise_adam.op import RowState, Step

kernel = pytest.importorskip(
    "hybridtrain.kernels.rowwise_adam.kernel", reason="needs triton", exc_type=ImportError
)

STEP = Step(12, lr=0.02, eps=1e-8, beta2=0.9, gain=0.1, correction=0.75)


def state(R: int, D: int, N: int, dtype: torch.dtype) -> list[torch.Tensor]:
    last = torch.randint(0, 12, (R,), dtype=torch.int32)
    return [
        torch.randn(R, D).to(dtype),
        torch.rand(R),
        last,
        torch.randperm(R)[:N].sort().values,
        torch.randn(N, D),
    ]


def grouped(tensors: list[torch.Tensor]) -> tuple[RowState, torch.Tensor, torch.Tensor]:
    """As the op takes them."""
    return RowState(*tensors[:3]), tensors[3], tensors[4]


def wide(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.double() if x.is_floating_point() else x for x in tensors]


@pytest.mark.parametrize(("N", "D"), [(1, 60), (63, 96), (257, 100), (0, 8)])
@pytest.mark.parametrize("decayed", [False, True])
@pytest.mark.parametrize("beta2", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("by", [kernel, op])
def test_float32_rows(N: int, D: int, decayed: bool, beta2: float, by: Any) -> None:
    before = state(300, D, N, torch.float32)
    decay = torch.rand(13, dtype=torch.float64).mul(-0.1).cumsum(0) if decayed else None
    step = STEP._replace(beta2=beta2)
    exact = reference.rowwise_adam(*grouped(wide(before)), decay, step)
    plain = reference.rowwise_adam(*grouped(before), decay, step)
    mine = [x.clone() for x in before]
    by.rowwise_adam(*grouped(mine), decay, step)
    for got, own, wanted in zip(mine[:2], plain[:2], exact[:2], strict=True):
        assert (got - wanted).abs().max() <= 4 * (own - wanted).abs().max() + 1.2e-7 * wanted.abs().max()
    assert torch.equal(mine[2], exact[2])
    untouched = torch.ones(300, dtype=torch.bool).index_fill(0, before[3], False)
    assert all(torch.equal(a[untouched], b[untouched]) for a, b in zip(mine[:3], before[:3], strict=True))


@pytest.mark.parametrize("by", [kernel, op])
def test_bfloat16_rows_move_by_the_right_amount_on_average(by: Any) -> None:
    before = state(64, 96, 64, torch.bfloat16)
    before[4] *= 1e-3
    step = STEP._replace(
        lr=0.3
    )  # far below half a unit of the last place: rounding to nearest would move almost nothing
    wanted = reference.rowwise_adam(*grouped(wide(before)), None, step)[0] - before[0].double()
    unit = before[0].double().abs() * 2**-8
    assert (wanted.abs() / unit).median() < 0.2
    moved = torch.zeros(64, 96, dtype=torch.float64)
    for number in range(64):
        mine = [x.clone() for x in before]
        by.rowwise_adam(*grouped(mine), None, step._replace(seed=rounding.rounding_seed(0, number)))
        assert (
            (mine[0].double() - before[0].double() - wanted).abs() <= 2 * (unit + wanted.abs() * 2**-8)
        ).all()
        moved += (mine[0].double() - before[0].double()) / 64
    assert (
        abs((moved * wanted).sum() / wanted.square().sum() - 1) < 0.05
    )  # one standard deviation is about 0.01
    assert abs(((moved - wanted) / unit).mean()) < 0.005


def test_rounds_as_torch_does_by_seed_and_number_of_the_row() -> None:
    before = state(40, 60, 40, torch.bfloat16)
    results = []
    for seed, first_row in ((1, 0), (1, 0), (2**31 - 1, 0), (1, 2**31 - 20)):
        mine, plain = ([x.clone() for x in before] for _ in range(2))
        step = STEP._replace(seed=seed, first_row=first_row)
        kernel.rowwise_adam(*grouped(mine), None, step)
        op.rowwise_adam(*grouped(plain), None, step)
        assert (mine[0] != plain[0]).float().mean() < 0.001  # where the last bits before rounding differ
        results.append(mine[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[3])


def test_rounding_has_no_bias_and_no_pattern() -> None:
    numbers = torch.arange(2**31, 2**31 + 4000)
    for fraction in (1 / 16, 1 / 2, 15 / 16):
        up = (
            rounding.round_stochastically(torch.full((4000, 64), 1 + fraction * 2**-7), numbers, 5).float()
            > 1
        )
        deviation = (fraction * (1 - fraction)) ** 0.5
        assert abs(up.double().mean() - fraction) < 4 * deviation / 256000**0.5
        assert (up.double().mean(0) - fraction).abs().max() < 5 * deviation / 4000**0.5  # of each column
        centred = up.double() - fraction
        for other in (centred.roll(1, 0), centred.roll(1, 1)):  # neighbouring rows and columns
            assert abs((centred * other).mean()) < 4 * deviation**2 / 256000**0.5
    ends = torch.tensor([[torch.inf, -torch.inf, 0.0, torch.nan, 1.0, -1.0]])
    out = rounding.round_stochastically(ends, torch.tensor([7]), 5)
    torch.testing.assert_close(out.float(), ends, rtol=0, atol=0, equal_nan=True)


def test_op_is_a_torch_op() -> None:
    before = state(9, 8, 4, torch.float32)
    torch.library.opcheck(kernel._op, (*before, None, *STEP))
    torch.library.opcheck(
        kernel._op, (before[0].bfloat16(), *before[1:], torch.zeros(20, dtype=torch.float64), *STEP)
    )
