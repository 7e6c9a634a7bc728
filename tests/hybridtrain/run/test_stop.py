"""A stop that is asked for between steps is served there: validations are left, and done whole when the run
goes on.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from hybridtrain import checkpoint
from hybridtrain.checkpoint import Saver
from hybridtrain.monitor.metrics import read_metrics
from hybridtrain.parallel.engine import Accumulation
from hybridtrain.run.loop import train
from hybridtrain.settings.tree import Settings
from tests.faults.judge import different_end
from tests.ranks import run_on_ranks
from tests.training import TINY, ci_settings, train_here

STEPS, BATCHES, SECONDS = 8, 20, 0.3
RUN = (*TINY, f"train.steps={STEPS}", "train.eval_every=3", "checkpoint.every=4", "engram.weight_decay=0.1")


def stop_in_validation(settings: Settings, which: int, rank: int) -> tuple[float, str | None, dict[str, Any]]:
    """On a rank: train; rank `rank` gets SIGTERM in the second, slow batch of the `which`-th validation.

    Returns the seconds from then to the end, the latest checkpoint when that validation began, and the
    summary.
    """
    real, began, at, before = Accumulation.losses, 0, [0.0], list[str]()

    def losses(self: Any, batch: Any) -> Any:
        nonlocal began
        began += 1
        number, place = divmod(began - 1, BATCHES)
        if number + 1 == which:
            if place == 0:
                last = checkpoint.latest(Path(settings.run.dir) / "checkpoints")
                before.append(last.name if last is not None else "none")
            if place == 1:
                at[0] = time.monotonic()
                if int(os.environ["RANK"]) == rank:
                    os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(SECONDS)
        return real(self, batch)

    Accumulation.losses = losses  # type: ignore[method-assign]
    if dist.get_world_size() == 1:
        dist.destroy_process_group()
    summary = train(settings)
    return time.monotonic() - at[0], before[0], summary


@pytest.fixture(scope="module")
def reference(ci_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run_on_ranks(train_here, 1, settings_of(folder, ci_data), False)
    return folder


def settings_of(folder: Path, data: Path, *more: str) -> Settings:
    return ci_settings(folder, data, *RUN, f"train.eval_batches={BATCHES}", *more)


# the last validation is of the whole split, and has 15 batches or more; the first is after step 3, which
# saves nothing
@pytest.mark.parametrize(("which", "step", "before"), [(1, 3, "none"), (3, STEPS, f"step-{STEPS:08d}")])
def test_sigterm_in_a_validation_ends_it_at_the_next_batch_with_a_checkpoint(
    which: int, step: int, before: str, reference: Path, ci_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ((seconds, found, summary),) = run_on_ranks(stop_in_validation, 1, settings_of(run, ci_data), which, 0)
    assert seconds < 10 * SECONDS  # the rest of the validation takes 18 times as long as a batch
    assert found == before
    assert (summary["steps"], summary["stopped"]) == (step, True)
    assert checkpoint.latest(run / "checkpoints") == run / f"checkpoints/step-{step:08d}"
    assert not [line for line in read_metrics(run) if line["step"] == step and "validation_loss" in line]
    (rest,) = run_on_ranks(train_here, 1, settings_of(run, ci_data), True)
    assert different_end(run, reference) == ""
    last = read_metrics(reference)[-1]["validation_loss"]
    assert (rest["steps"], rest["stopped"], rest["validation_loss"]) == (STEPS, False, last)
    assert rest["train_loss"] is not None


def test_two_ranks_agree_on_leaving_a_validation(ci_data: Path, tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "run", ci_data, "parallel.ep=2", "parallel.mem=2")
    for _, _, summary in run_on_ranks(stop_in_validation, 2, settings, 1, 1):
        assert (summary["steps"], summary["stopped"]) == (3, True)


def stop_in_save(settings: Settings) -> dict[str, Any]:
    real = Saver.save

    def save(self: Saver, step: int, wait: bool = False) -> Path:
        out = real(self, step, wait)
        os.kill(os.getpid(), signal.SIGTERM)
        return out

    Saver.save = save  # type: ignore[method-assign]
    return train_here(settings, False)


def test_sigterm_in_a_save_takes_no_further_step(ci_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (summary,) = run_on_ranks(stop_in_save, 1, settings_of(run, ci_data, "train.eval_every=0"))
    assert (summary["steps"], summary["stopped"]) == (4, True)
    assert checkpoint.latest(run / "checkpoints") == run / "checkpoints/step-00000004"


def stop_in_backward(settings: Settings) -> dict[str, Any]:
    real = Accumulation._backward

    def backward(self: Any, loss: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        Accumulation._backward = real  # type: ignore[method-assign]
        real(self, loss)

    Accumulation._backward = backward  # type: ignore[method-assign]
    dist.destroy_process_group()
    return train(settings)


def test_sigterm_in_a_step_takes_no_further_step(ci_data: Path, tmp_path: Path) -> None:
    summary = run_on_ranks(stop_in_backward, 1, settings_of(tmp_path / "run", ci_data))[0]
    assert (summary["steps"], summary["stopped"]) == (1, True)


def test_a_run_that_was_restored_where_it_validates_does_so_again_and_writes_it_once(
    reference: Path, ci_data: Path, tmp_path: Path
) -> None:
    """Validation brings rows up to date, which later steps see in their last bits; the checkpoint was saved
    before it.
    """
    run, ways = tmp_path / "run", ("checkpoint.every=3", "train.steps=6")
    run_on_ranks(train_here, 1, settings_of(run, ci_data, *ways), False)
    (run / "summary.json").unlink()
    run_on_ranks(train_here, 1, settings_of(run, ci_data, "checkpoint.every=3"), True)
    assert [line["step"] for line in read_metrics(run) if "validation_loss" in line] == [3, 6, 8]
