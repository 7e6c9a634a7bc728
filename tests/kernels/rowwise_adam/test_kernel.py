"""The Triton source of the row-wise update, interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

from hybridtrain.kernels.rowwise_adam import reference

kernel = pytest.importorskip("hybridtrain.kernels.rowwise_adam.kernel", reason="needs triton", exc_type=ImportError)

RULE = {"lr": 0.02, "eps": 1e-8, "beta2": 0.9, "gain": 0.1, "correction": 0.75}


def state(R: int, D: int, N: int, dtype: torch.dtype) -> list[torch.Tensor]:
    last = torch.randint(0, 12, (R,), dtype=torch.int32)
    return [torch.randn(R, D).to(dtype), torch.rand(R), last, torch.randperm(R)[:N].sort().values, torch.randn(N, D)]


@pytest.mark.parametrize(("N", "D"), [(1, 60), (63, 96), (257, 100), (0, 8)])
@pytest.mark.parametrize("decayed", [False, True])
@pytest.mark.parametrize("beta2", [0.0, 0.9, 1.0])
def test_float32_rows(N: int, D: int, decayed: bool, beta2: float) -> None:
    before = state(300, D, N, torch.float32)
    decay = torch.rand(13, dtype=torch.float64).mul(-0.1).cumsum(0) if decayed else None
    rule = RULE | {"beta2": beta2}
    exact = reference.rowwise_adam(*(x.double() if x.is_floating_point() else x for x in before), decay, 12, **rule)
    plain = reference.rowwise_adam(*before, decay, 12, **rule)
    mine = [x.clone() for x in before]
    kernel.rowwise_adam(*mine, decay, step=12, seed=3, **rule)
    for got, own, wanted in zip(mine[:2], plain[:2], exact[:2], strict=True):
        assert (got - wanted).abs().max() <= 4 * (own - wanted).abs().max() + 1.2e-7 * wanted.abs().max()
    assert torch.equal(mine[2], exact[2])
    untouched = torch.ones(300, dtype=torch.bool).index_fill(0, before[3], False)
    assert all(torch.equal(a[untouched], b[untouched]) for a, b in zip(mine[:3], before[:3], strict=True))


def test_bfloat16_rows_move_by_the_right_amount_on_average() -> None:
    before = state(64, 96, 64, torch.bfloat16)
    before[4] *= 1e-3
    rule = RULE | {"lr": 0.3}  # steps far below half a unit of the last place: rounding to nearest would move almost nothing
    wanted = reference.rowwise_adam(before[0].double(), *before[1:], None, 12, **rule)[0] - before[0].double()
    unit = before[0].double().abs() * 2**-8
    assert (wanted.abs() / unit).median() < 0.2
    moved = torch.zeros(64, 96, dtype=torch.float64)
    for seed in range(64):
        mine = [x.clone() for x in before]
        kernel.rowwise_adam(*mine, None, step=12, seed=seed, **rule)
        assert ((mine[0].double() - before[0].double() - wanted).abs() <= 2 * (unit + wanted.abs() * 2**-8)).all()
        moved += (mine[0].double() - before[0].double()) / 64
    assert abs((moved * wanted).sum() / wanted.square().sum() - 1) < 0.05  # one standard deviation is about 0.01
    assert abs(((moved - wanted) / unit).mean()) < 0.005


def test_the_seed_decides_the_rounding() -> None:
    before = state(40, 60, 40, torch.bfloat16)
    results = []
    for seed in (1, 1, 2):
        mine = [x.clone() for x in before]
        kernel.rowwise_adam(*mine, None, step=12, seed=seed, **RULE)
        results.append(mine[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_equals_the_optimizer_over_steps() -> None:
    from hybridtrain.optim.rowwise import RowwiseAdam

    table = torch.randn(50, 24)
    optimizer = RowwiseAdam(table.clone(), beta2=0.9, weight_decay=0.1)
    mine, v, last = table.clone(), torch.zeros(50), torch.zeros(50, dtype=torch.int32)
    decay = torch.zeros(9, dtype=torch.float64)
    for step in range(1, 9):
        rows, grad = torch.randperm(50)[:20].sort().values, torch.randn(20, 24)
        optimizer.step(rows, grad, 0.01)
        decay[step] = decay[step - 1] + torch.log1p(torch.tensor(-0.001, dtype=torch.float64))
        rule = {"lr": 0.01, "eps": 1e-8, "beta2": 0.9, "gain": 0.1, "correction": 1 - 0.9**step}
        kernel.rowwise_adam(mine, v, last, rows, grad, decay, step=step, seed=0, **rule)
    torch.testing.assert_close(mine, optimizer.table_RD, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(v, optimizer.state["v"], rtol=1e-5, atol=1e-7)
    assert torch.equal(last, optimizer.state["last"])


def test_op_is_a_torch_op() -> None:
    before = state(9, 8, 4, torch.float32)
    torch.library.opcheck(kernel._op, (*before, None, 12, 0.01, 1e-8, 0.9, 0.1, 0.75, 3))
