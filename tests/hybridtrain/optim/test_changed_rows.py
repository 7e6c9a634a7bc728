"""Which rows a checkpoint must save, and a resume with another rule."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from hybridtrain.optim.dense_adam import DenseAdam
from hybridtrain.optim.rowwise import RowwiseAdagrad, RowwiseAdam
from tests.hybridtrain.optim.steps import D, R, make_steps


@pytest.mark.parametrize("make", [RowwiseAdam, RowwiseAdagrad])
def test_what_changed_is_known_and_told_before(make):
    table = torch.ones(10, 2)
    optimizer = make(table, weight_decay=0.1)
    told = []
    assert optimizer.watch(lambda rows: told.append((rows.tolist(), bool((table[rows] == 1).all()))))
    grad = torch.ones(2, 2)
    optimizer.step(torch.tensor([1, 4]), grad, 0.1)
    assert told == [([1, 4], True)]
    optimizer.watch(None)
    optimizer.step(torch.tensor([2, 4]), grad, 0.1)
    assert len(told) == 1
    saved = optimizer.step_count
    optimizer.catch_up(torch.tensor([7]))  # after it was saved, but of the same step
    optimizer.step(torch.tensor([5]), grad[:1], 0.1)
    changed = optimizer.changed_since(saved).tolist()
    assert set(changed) >= {5, 7}
    assert set(changed) <= {2, 4, 5, 7}  # those of the last step before may be among them
    assert optimizer.changed_since(0).tolist() == list(range(10))


def test_dense_adam_changes_everything():
    optimizer = DenseAdam(torch.ones(3, 2))
    assert not optimizer.watch(lambda rows: None)
    assert optimizer.changed_since(0).tolist() == [0, 1, 2]


def simulate_changes(table, phases):
    """Every row at every step with the beta2 and weight decay of that step, in float64; phases of (steps,
    beta2, weight decay).
    """
    w, v, weight = table.double().numpy().copy(), np.zeros(len(table)), 0.0
    for steps, beta2, weight_decay in phases:
        gain = 1 - beta2 if beta2 < 1 else 1.0
        for rows, grad, lr in steps:
            g = np.zeros_like(w)
            g[rows.numpy()] = grad.double().numpy()
            v = beta2 * v + gain * (g**2).mean(axis=1)
            weight = beta2 * weight + gain
            w = w * (1 - lr * weight_decay) - lr * g / (np.sqrt(v / weight) + 1e-8)[:, None]
    return w, v


@pytest.mark.parametrize(
    "rules",
    [
        [(0.5, 0.0), (0.99, 0.0)],
        [(0.99, 0.3), (0.5, 0.3)],
        [(0.9, 0.3), (0.9, 0.0), (0.95, 0.1)],  # weight decay changes too, once alone
        [(0.0, 0.0), (0.9, 0.2), (1.0, 0.2), (0.8, 0.0)],
    ],
)
def test_a_change_of_beta2_at_a_resume_is_applied_to_the_steps_after_it_alone(rules):
    table = torch.randn(R, D, generator=torch.Generator().manual_seed(1))
    steps = make_steps(number=10 * len(rules))
    phases = [(steps[10 * i : 10 * i + 10], *rule) for i, rule in enumerate(rules)]
    expected, moment = simulate_changes(table, phases)
    optimizer = None
    for part, beta2, weight_decay in phases:
        before, optimizer = optimizer, RowwiseAdam(table, beta2=beta2, weight_decay=weight_decay)
        if before is not None:
            for name, value in before.state.items():
                optimizer.state[name].copy_(value)
            optimizer.load_scalars(json.loads(json.dumps(before.scalars())))
        for rows, grad, lr in part:
            optimizer.step(rows, grad, lr)
    optimizer._apply(torch.arange(R), beta2)
    np.testing.assert_allclose(table.numpy(), expected, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(optimizer.state["v"].numpy(), moment, rtol=1e-5, atol=1e-12)


def test_rows_brought_up_to_date_by_a_change_of_beta2_are_saved_as_changed():
    first, second = RowwiseAdam(torch.ones(4, 2), beta2=0.9), RowwiseAdam(torch.ones(4, 2), beta2=0.5)
    first.step(torch.tensor([1]), torch.ones(1, 2), 0.1)
    second.load_scalars(first.scalars())
    assert second.changed_since(1).tolist() == [0, 1, 2, 3]
