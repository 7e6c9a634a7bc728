from __future__ import annotations

import importlib.util
import json
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hybridtrain.errors import SettingsError
from hybridtrain.kernels.choose import Backends
from hybridtrain.optim.dense_adam import DenseAdam
from hybridtrain.optim.row_optimizer import make_row_optimizer
from hybridtrain.optim.rowwise import RowwiseAdagrad, RowwiseAdam
from hybridtrain.settings.engram import EngramSettings
from tests.hybridtrain.optim.steps import D, R, make_steps, random_step


def simulate(table, steps, beta2, eps, weight_decay, adagrad=False):
    """Every row at every step, in float64."""
    w, v = table.double().numpy().copy(), np.zeros(len(table))
    for t, (rows, grad, lr) in enumerate(steps, start=1):
        g = np.zeros_like(w)
        g[rows.numpy()] = grad.double().numpy()
        square = (g**2).mean(axis=1)
        if adagrad:
            v = v + square
            v_hat = v
        elif beta2 == 1.0:
            v = v + square
            v_hat = v / t
        else:
            v = beta2 * v + (1 - beta2) * square
            v_hat = v / (1 - beta2**t)
        w = w * (1 - lr * weight_decay) - lr * g / (np.sqrt(v_hat) + eps)[:, None]
    return w, v


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["adagrad", 0.0, 0.5, 0.95, 0.9999, 1.0])
@pytest.mark.parametrize("catch_up", [False, True])
def test_touched_rows_only_equals_the_rule_on_every_row(kind, weight_decay, catch_up):
    table = torch.randn(R, D, generator=torch.Generator().manual_seed(1))
    steps = make_steps()
    beta2 = 0.0 if kind == "adagrad" else kind
    expected, moment = simulate(table, steps, beta2, 1e-8, weight_decay, adagrad=kind == "adagrad")
    optimizer = (
        RowwiseAdagrad(table, weight_decay=weight_decay)
        if kind == "adagrad"
        else RowwiseAdam(table, beta2=beta2, weight_decay=weight_decay)
    )
    for rows, grad, lr in steps:
        if catch_up:
            optimizer.catch_up(rows)
            optimizer.catch_up(
                torch.arange(0, R, 3)
            )  # rows that are read and not updated, as in a validation
        optimizer.step(rows, grad, lr)
    optimizer.catch_up(torch.arange(R))
    assert optimizer.step_count == len(steps)
    np.testing.assert_allclose(table.numpy(), expected, rtol=2e-5, atol=2e-6)
    if weight_decay:
        np.testing.assert_allclose(optimizer.state["v"].numpy(), moment, rtol=1e-5, atol=1e-12)


def test_a_hand_computed_first_step():
    table = torch.zeros(2, 2)
    RowwiseAdam(table, beta2=0.9, eps=0.0).step(torch.tensor([1]), torch.tensor([[3.0, 4.0]]), lr=0.1)
    rms = math.sqrt(12.5)  # the bias correction undoes the (1 - beta2) of the first step
    torch.testing.assert_close(table, torch.tensor([[0.0, 0.0], [-0.3 / rms, -0.4 / rms]]))


def test_catch_up_applies_the_product_of_the_missed_steps():
    table = torch.ones(3, 2)
    optimizer = RowwiseAdam(table, weight_decay=0.5)
    nothing = torch.empty(0, dtype=torch.int64)
    for lr in (0.1, 0.2, 0.4):
        optimizer.step(nothing, torch.empty(0, 2), lr)
    assert torch.equal(table, torch.ones(3, 2))
    optimizer.catch_up(torch.tensor([0, 2]))
    optimizer.catch_up(torch.tensor([2]))  # nothing is owed twice
    owed = 0.95 * 0.9 * 0.8
    torch.testing.assert_close(table[:, 0], torch.tensor([owed, 1.0, owed]))


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("make", [RowwiseAdam, RowwiseAdagrad, DenseAdam])
def test_a_restored_optimizer_goes_on_bitwise(make, weight_decay):
    steps = make_steps(3)
    table = torch.randn(R, D)
    optimizer = make(table, weight_decay=weight_decay)
    for step in steps[:17]:
        optimizer.step(*step)
    copy = table.clone()
    restored = make(copy, weight_decay=weight_decay)
    for name, tensor in optimizer.state.items():
        assert len(tensor) == R
        restored.state[name].copy_(tensor)
    restored.load_scalars(json.loads(json.dumps(optimizer.scalars())))
    for rows, grad, lr in steps[17:]:
        for one in (optimizer, restored):
            one.catch_up(rows)
            one.step(rows, grad, lr)
    for one in (optimizer, restored):
        one.catch_up(torch.arange(R))
    assert torch.equal(table, copy)
    assert all(torch.equal(optimizer.state[name], restored.state[name]) for name in optimizer.state)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("make", [RowwiseAdam, RowwiseAdagrad])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_the_bits_that_catch_up_will_write(make, weight_decay, dtype):
    table = torch.randn(R, D, generator=torch.Generator().manual_seed(2)).to(dtype)
    optimizer = make(table, weight_decay=weight_decay)
    everything = torch.arange(R)
    for number, (rows, grad, lr) in enumerate(make_steps(5)):
        others = everything[~torch.isin(everything, rows)]
        kept = [tensor.clone() for tensor in (table, *optimizer.state.values())]
        now, later = optimizer.values(everything), optimizer.values(others, lr)
        assert all(
            torch.equal(a, b) for a, b in zip(kept, (table, *optimizer.state.values()), strict=True)
        )  # only read
        if number % 3 == 0:
            optimizer.catch_up(rows)
            assert torch.equal(table[rows], now[rows])
        optimizer.step(rows, grad, lr)
        if number % 3 == 2:
            optimizer.catch_up(others[::2])  # a validation in between changes nothing
            optimizer.catch_up(others)
            assert torch.equal(table[others], later)
    assert optimizer.values(everything[:0], 0.1).shape == (0, D)


def test_dense_adam_knows_no_row_ahead():
    table = torch.randn(R, D)
    optimizer = DenseAdam(table)
    assert torch.equal(optimizer.values(torch.tensor([3, 5])), table[[3, 5]])
    with pytest.raises(ValueError, match="dense Adam updates every row"):
        optimizer.values(torch.tensor([3]), 0.1)


def test_weight_decay_may_be_turned_on_and_off_between_runs():
    steps = make_steps(4, number=6)
    table = torch.randn(R, D)
    expected = table.clone()
    optimizer = RowwiseAdam(table)
    for weight_decay in (0.0, 0.4, 0.0):
        following = RowwiseAdam(table, weight_decay=weight_decay)
        following.state = optimizer.state
        following.load_scalars(optimizer.scalars())
        optimizer = following
        for step in steps:
            optimizer.step(*step)
    optimizer.catch_up(torch.arange(R))
    untouched = torch.tensor([r for r in range(R) if all(r not in rows for rows, _, _ in steps)])
    assert len(untouched)
    owed = math.prod(1 - 0.4 * lr for _, _, lr in steps)
    torch.testing.assert_close(table[untouched], expected[untouched] * owed)


def test_load_refuses_a_log_of_another_length():
    with pytest.raises(ValueError, match=r"decay_log has 1 entries, must have step_count \+ 1 = 4"):
        RowwiseAdam(torch.ones(1, 1)).load_scalars({"step_count": 3, "decay_log": [0.0]})


def test_the_decay_log_outgrows_its_first_buffer():
    table = torch.ones(1, 1)
    optimizer = RowwiseAdam(table, weight_decay=1e-3)
    for _ in range(2500):
        optimizer.step(torch.empty(0, dtype=torch.int64), torch.empty(0, 1), lr=0.1)
    optimizer.catch_up(torch.tensor([0]))
    assert table.item() == pytest.approx((1 - 1e-4) ** 2500, rel=1e-6)


def test_refuses_a_decay_that_would_flip_rows():
    with pytest.raises(ValueError, match=r"lr \* weight_decay = 2.0 \* 0.5 must be below 1"):
        RowwiseAdam(torch.ones(1, 1), weight_decay=0.5).step(torch.tensor([0]), torch.ones(1, 1), lr=2.0)


@pytest.mark.parametrize("make", [RowwiseAdam, RowwiseAdagrad, DenseAdam])
def test_no_touched_rows_and_no_local_rows(make):
    nothing = torch.empty(0, dtype=torch.int64)
    for rows in (0, 3):
        table = torch.ones(rows, D)
        optimizer = make(table)
        optimizer.catch_up(nothing)
        optimizer.step(nothing, torch.empty(0, D), lr=0.1)
        assert optimizer.step_count == 1
        assert torch.equal(table, torch.ones(rows, D))
        assert all(len(tensor) == rows for tensor in optimizer.state.values())


@pytest.mark.parametrize("make", [RowwiseAdam, RowwiseAdagrad])
def test_bfloat16_rows_are_float32_math_rounded_to_a_neighbour(make):
    wide = torch.randn(R, D).bfloat16().float()
    narrow = wide.bfloat16()
    rows, grad = random_step(torch.Generator().manual_seed(0))
    make(wide, weight_decay=0.1).step(rows, grad, lr=0.1)
    make(narrow, weight_decay=0.1).step(rows, grad, lr=0.1)
    below = (wide[rows].view(torch.int32) & -0x10000).view(torch.float32)  # the neighbour nearer to zero
    above = (below.view(torch.int32) + 0x10000).view(torch.float32)
    got = narrow[rows].float()
    assert ((got == below) | (got == above)).all()
    assert (got == below).any()
    assert (got == above).any()


def test_steps_and_decays_below_the_last_place_count_on_average():
    table = torch.full((2000, 16), 1.0).bfloat16()  # the next number below is 1 - 2^-8
    optimizer = RowwiseAdagrad(table, weight_decay=0.01)
    everything = torch.arange(2000)
    for _ in range(20):
        optimizer.catch_up(everything)
        optimizer.step(everything[::2], torch.ones(1000, 16), lr=1e-4)
    optimizer.catch_up(everything)
    decayed = (1 - 1e-6) ** 20
    moved = 1e-4 * sum(n**-0.5 for n in range(1, 21))
    spread = 4 * (2**-8 * moved / 16000) ** 0.5  # four standard deviations of the mean
    assert abs(table[::2].double().mean() - (decayed - moved)) < spread
    assert abs(table[1::2].double().mean() - decayed) < spread
    assert table[::2].unique().numel() > 1


def test_rounding_depends_on_seed_step_and_row_and_not_on_where_the_table_is_cut():
    whole, grad = torch.randn(R, D).bfloat16(), torch.randn(R, D)

    def step(low, high, seed=3, steps=1):
        table = whole[low:high].clone()
        optimizer = RowwiseAdam(table, seed=seed, first_row=low)
        for _ in range(steps):
            optimizer.step(torch.arange(high - low), grad[low:high], lr=1e-3)
        return table

    assert torch.equal(torch.cat([step(0, 17), step(17, R)]), step(0, R))
    assert not torch.equal(step(0, R), step(0, R, seed=4))
    moved = step(0, R, steps=2) != step(0, R)
    assert not torch.equal(moved, step(0, R) != whole)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("make", [RowwiseAdam, RowwiseAdagrad])
def test_triton_goes_the_same_way(make):
    tables = []
    for how in ("torch", "triton"):
        table = torch.randn(R, D, generator=torch.Generator().manual_seed(1))
        optimizer = make(table, weight_decay=0.5, backends=Backends({"rowwise_adam": how, "row_gather": how}))
        for rows, grad, lr in make_steps(7):
            optimizer.catch_up(rows[::2])  # the others owe more than one step
            optimizer.step(rows, grad, lr)
        tables.append((table, *optimizer.state.values()))
    for mine, plain in zip(*tables, strict=True):
        torch.testing.assert_close(mine, plain, rtol=2e-5, atol=2e-6)


class LargestAllocation(TorchDispatchMode):
    """Elements of the largest tensor that any operation newly allocates."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        owned = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in owned:
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("make", [RowwiseAdam, RowwiseAdagrad])
def test_a_step_allocates_touched_rows_only(make, weight_decay):
    table = torch.zeros(20_000, D)
    optimizer = make(table, weight_decay=weight_decay)
    rows, grad = torch.arange(0, 20_000, 40), torch.randn(500, D)
    optimizer.step(rows, grad, 0.1)
    with LargestAllocation() as watch:
        optimizer.catch_up(rows)
        optimizer.step(rows, grad, 0.1)
    assert 0 < watch.elements <= 500 * D


def test_dense_adam_is_torchs_adam():
    table = torch.randn(R, D)
    parameter = torch.nn.Parameter(table.clone())
    adam = torch.optim.Adam([parameter], lr=0.1, betas=(0.9, 0.95))
    optimizer = DenseAdam(table)
    for rows, grad, lr in make_steps(2, number=6):
        optimizer.step(rows, grad, lr)
        parameter.grad = torch.zeros(R, D).index_copy_(0, rows, grad)
        adam.param_groups[0]["lr"] = lr
        adam.step()
    assert torch.equal(table, parameter.detach())


@pytest.mark.parametrize(
    ("name", "kind", "names"),
    [
        ("rowwise_adam", RowwiseAdam, {"v", "last"}),
        ("rowwise_adagrad", RowwiseAdagrad, {"v", "last"}),
        ("adam", DenseAdam, {"m", "v"}),
    ],
)
def test_make_row_optimizer(name, kind, names):
    optimizer = make_row_optimizer(EngramSettings(optimizer=name), torch.zeros(4, 2))
    assert type(optimizer) is kind
    assert set(optimizer.state) == names


def test_dense_adam_refuses_beta2_of_one():
    with pytest.raises(SettingsError, match=r'engram.beta2=1.0 must be below 1 for engram.optimizer="adam"'):
        make_row_optimizer(EngramSettings(optimizer="adam", beta2=1.0), torch.zeros(4, 2))
