"""One run at many layouts: the same losses over 20 steps, the same rows, row state and parameters.

Layouts sum float32 gradients in different orders, so equality is of real numbers, not of bits. ci.toml's
gate_floor keeps the rounding of tokens whose gate is near zero from growing (docs/table.md).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybridtrain.run.generate import open_checkpoint
from tests.training import ci_settings, loss_curve, train_on

LAYOUTS = [
    (2, "parallel.ep=2", "parallel.mem=2"),
    (4, "parallel.ep=4", "parallel.mem=4", 'parallel.dispatch="hierarchical"', "parallel.node_size=2"),
]
MORE = [
    (4, "parallel.dp_replicate=2", "parallel.ep=2", "parallel.mem=4"),
    (4, "parallel.ep=2", "parallel.mem=4"),
    (4, "parallel.ep=4", "parallel.mem=2", "parallel.zero=3", "parallel.reshard_after_forward=true"),
    (4, "parallel.ep=1", "parallel.mem=1"),
    (4, "parallel.cp=2", "parallel.ep=4", "parallel.mem=2"),
]
SLOW = [pytest.param(layout, marks=pytest.mark.parity) for layout in MORE]
LR = 0.001  # optim.lr: what one update moves a parameter by, at most
STEP = LR * 5  # optim.lr * engram.lr_multiplier: what one update moves a row by, in each dim


def state(folder: Path, step: int) -> dict[str, Tensor]:
    run, _, _ = open_checkpoint(folder / "checkpoints" / f"step-{step:08d}")
    assert run.table is not None
    return run.model.state_dict() | {f"table.{name}": value for name, value in run.table.state().items()}


def assert_same_curve(run: Path, reference: Path) -> None:
    ours, theirs = loss_curve(run), loss_curve(reference)
    assert len(ours) == 20
    assert theirs[-1] < theirs[0] - 0.2  # it learns, so that equal losses mean equal updates
    assert ours == pytest.approx(theirs, rel=1e-5)


def assert_same_state(run: Path, reference: Path) -> None:
    for step in (10, 20):
        ours, theirs = state(run, step), state(reference, step)
        assert ours.keys() == theirs.keys()
        assert torch.equal(
            ours["table.state.last"], theirs["table.state.last"]
        )  # the same rows were touched at the same steps
        rows = (ours["table.rows"] - theirs["table.rows"]).abs().amax(1)
        assert float(rows.max()) < STEP / 100  # 1 % of what one update moves a row by
        # a wrong factor in the gradient, which Adam hides from the table, is bare here
        v, v_reference = ours["table.state.v"], theirs["table.state.v"]
        torch.testing.assert_close(v, v_reference, rtol=1e-2, atol=1e-14)
        for name, value in ours.items():
            if not name.startswith("table.") and "router." not in name.replace("router.weight", ""):
                # Adam magnifies the rounding of single elements with hardly any gradient, hence one bound on
                # all and one on each
                difference = (value - theirs[name]).double()
                assert float(difference.square().mean().sqrt()) < LR / 1000, name
                assert float(difference.abs().max()) < LR / 10, name


@pytest.mark.parametrize("layout", [*LAYOUTS, *SLOW], ids=lambda layout: " ".join(map(str, layout)))
def test_layouts_train_alike(trained: Callable[..., Path], layout: tuple[int, ...]) -> None:
    assert_same_curve(trained(*layout), trained(1))
    assert_same_state(trained(*layout), trained(1))


def test_micro_batches_and_exchange_groups_change_nothing(trained: Callable[..., Path]) -> None:
    one, two = (
        trained(
            2,
            "parallel.ep=2",
            "train.micro_batches=2",
            f"engram.exchange_groups={groups}",
            "engram.checksum=true",
        )
        for groups in (1, 2)
    )
    for run in (one, two):
        assert_same_curve(run, trained(1))
        assert_same_state(run, trained(1))


def test_a_repeated_run_is_bitwise_equal(trained: Callable[..., Path], ci_data: Path, tmp_path: Path) -> None:
    first = trained(2, "parallel.ep=2", "parallel.mem=2")
    train_on(2, ci_settings(tmp_path / "run", ci_data, "parallel.ep=2", "parallel.mem=2"))
    assert loss_curve(tmp_path / "run") == loss_curve(first)
    ours, theirs = state(tmp_path / "run", 20), state(first, 20)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_another_seed_is_another_run(trained: Callable[..., Path]) -> None:
    ours, theirs = loss_curve(trained(1, "run.seed=1")), loss_curve(trained(1))
    assert ours != pytest.approx(theirs, rel=1e-5)
