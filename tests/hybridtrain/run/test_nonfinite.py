"""A value that is not finite ends the run with its step and place, and nothing of that step is kept."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridtrain.errors import TrainingError
from hybridtrain.monitor.metrics import read_metrics
from hybridtrain.parallel.row_exchange import StepPlan
from hybridtrain.run import loop as module
from hybridtrain.run.assemble import Run
from hybridtrain.run.step import StepInput
from hybridtrain.settings.tree import Settings
from tests.ranks import run_on_ranks
from tests.training import ci_settings, train_here

STEP = 4


def poison(run: Run, plan: StepPlan, where: str) -> None:
    experts = run.model.layers["1"].get_submodule("feedforward.experts")
    if where == "expert" and run.mesh.rank == run.mesh.layout.world - 1:
        weight: Any = experts.w_down
        (weight.to_local() if hasattr(weight, "to_local") else weight)[-1] = math.nan
    if where == "row" and run.table is not None and run.mesh.rank == run.mesh.layout.world - 1:
        run.table.weight[plan.touched_N[0]] = math.inf
    if where == "gradient":
        run.model.norm.weight.register_hook(lambda grad: grad * math.nan)


def snapshot(run: Run) -> dict[str, torch.Tensor]:
    assert run.table is not None
    state = {f"table.{name}": value for name, value in run.table.state().items()} | run.model.state_dict()
    for number, optimizer in enumerate(run.engine.optimizers):
        for place, values in enumerate(optimizer.state.values()):
            state |= {f"optim.{number}.{place}.{key}": value for key, value in values.items()}
    return {name: (v.to_local() if hasattr(v, "to_local") else v).clone() for name, v in state.items()}


def train_poisoned(settings: Settings, where: str) -> str:
    """On a rank: the message of a run whose state is poisoned before step STEP."""
    real = module.train_step

    def train_step(run: Run, step: int, data: StepInput, *rest: Any) -> Any:
        if step + 1 != STEP:
            return real(run, step, data, *rest)
        with torch.no_grad():
            poison(run, data.plan, where)
        before = snapshot(run)
        totals = real(run, step, data, *rest)
        after = snapshot(run)
        assert after.keys() == before.keys()
        for name, value in after.items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True, msg=name)
        assert run.table is not None
        assert run.table.optimizer.step_count == STEP - 1
        return totals

    module.train_step = train_step  # type: ignore[assignment]
    with pytest.raises(TrainingError) as caught:
        train_here(settings, False)
    return str(caught.value)


@pytest.mark.parametrize(
    ("where", "nproc", "place"),
    [
        ("expert", 2, "the first values that are not finite come out of layers.1.feedforward (rank 0)"),
        ("row", 2, "the first values that are not finite come out of the fetched table rows (rank "),
        ("gradient", 1, "every layer's output is finite, so it arose in the backward pass"),
    ],
)
def test_the_run_stops_and_says_where(
    ci_data: Path, tmp_path: Path, where: str, nproc: int, place: str
) -> None:
    run = tmp_path / "run"
    overrides = ["checkpoint.every=2", "train.steps=6", "train.eval_batches=1", "parallel.mem=-1"]
    overrides += ["parallel.ep=2", "train.micro_batches=2", "engram.exchange_groups=2"] if nproc == 2 else []
    overrides += (
        ["engram.fetch=overlap"] if where == "expert" else []
    )  # rows of the next step are then still under way
    messages = run_on_ranks(train_poisoned, nproc, ci_settings(run, ci_data, *overrides), where)
    assert len(set(messages)) == 1  # every rank ends with the same words
    loss = "[0-9.]+" if where == "gradient" else "(nan|inf)"
    assert re.match(rf"step {STEP}: the loss is {loss} and the gradient norm (nan|inf); ", messages[0]), (
        messages[0]
    )
    assert place in messages[0]
    assert messages[0].endswith(
        f"The last good checkpoint is {run}/checkpoints/step-00000002; nothing of this step was kept"
    )
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["latest", "step-00000002"]
    assert max(line["step"] for line in read_metrics(run)) == STEP - 1
