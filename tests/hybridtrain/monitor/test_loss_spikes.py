"""Steps that are refused for their loss: what counts as a spike, and what skipping and rolling back leave
behind.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from hybridtrain.data.batches import BatchLoader
from hybridtrain.errors import TrainingError
from hybridtrain.launch.local import RENDEZVOUS
from hybridtrain.monitor.loss_spikes import SpikeGuard
from hybridtrain.monitor.metrics import read_metrics
from hybridtrain.run import loop as module
from hybridtrain.settings.tree import Settings, TrainSettings
from tests.ranks import run_on_ranks
from tests.training import TINY, ci_settings, loss_curve

STEPS, EVERY, BAD, STOP = (
    10,
    3,
    5,
    8,
)  # the step numbered 5 (from 1) is refused: back to 3, where 5 steps of data are read
TWO = ("parallel.ep=2", "engram.weight_decay=0.1")
SHORT = (f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "train.eval_every=0")


def guard(**values: Any) -> SpikeGuard:
    return SpikeGuard(TrainSettings(spike_window=8, spike_score=6.0, **values))


def test_a_spike_stands_out_of_the_last_losses() -> None:
    watch = guard()
    losses = [5.0, 5.1, 4.9, 5.05, 4.95, 5.0, 5.1, 4.9]
    for step, loss in enumerate(losses, 1):
        assert watch.accepts(50.0, 1.0)  # nothing to compare with yet
        watch.took(step, loss)
    deviation = 1.4826 * 0.075  # the median distance from the median, 5.0, is between 0.05 and 0.1
    assert watch.score(5.0 + 3 * deviation) == pytest.approx(3.0)
    assert watch.accepts(5.0 + 5.9 * deviation, 1.0)
    assert not watch.accepts(5.0 + 6.1 * deviation, 1.0)
    assert watch.accepts(0.0, 1.0)  # below is none
    assert (
        "the loss 6.0000 is 9.0 robust deviations above 5.0000, the median of the last 8"
        in watch.describe(6.0, 1.0)
    )


def test_losses_that_hardly_move_have_no_spikes_within_a_thousandth() -> None:
    watch = guard()
    for step in range(1, 9):
        watch.took(step, 2.0)
    assert watch.accepts(2.0 + 5.9 * 0.002, 1.0)
    assert not watch.accepts(2.0 + 6.1 * 0.002, 1.0)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_what_is_not_finite_is_refused_always(loss: float, norm: float) -> None:
    watch = SpikeGuard(TrainSettings())
    assert not watch.accepts(loss, norm)
    assert watch.describe(loss, norm) == f"the loss is {loss} and the gradient norm {norm}"


def test_refusals_are_counted_until_the_step_is_passed() -> None:
    watch = guard(spike_limit=2)
    assert watch.refuse(5)
    watch.took(4, 1.0)  # rolled back, on the way there again
    assert watch.refuse(5)
    assert not watch.refuse(5)
    watch.took(6, 1.0)
    assert watch.refuse(7)


def test_the_state_makes_the_same_judge() -> None:
    one, other = guard(), guard()
    for step in range(1, 12):
        one.took(step, 3.0 + step % 3)
    one.skipped_batches = 4
    other.load_state(one.state())
    assert (other.score(9.0), other.skipped_batches) == (one.score(9.0), 4)


@dataclass(frozen=True)
class Run:
    settings: Settings
    refuse: Collection[int] = ()  # judgements, numbered from 1 in each run, that say no
    stop_at: int = 0  # the step before which a signal asks this rank to stop
    resume: bool = False
    shift: tuple[int, int] | None = None  # from this step on (from 0), the data of so many steps later


def train_all(runs: list[Run], folder: str) -> list[str]:
    """On a rank: one run after the other; what each was refused for."""
    out = []
    dist.destroy_process_group()
    accepts, step, load = SpikeGuard.accepts, module.train_step, BatchLoader.load
    for number, run in enumerate(runs):
        os.environ[RENDEZVOUS] = f"file://{folder}/rendezvous-{number}"
        judged = 0

        def judge(guard: SpikeGuard, loss: float, norm: float, run: Run = run) -> bool:
            nonlocal judged
            judged += 1
            return judged not in run.refuse and accepts(guard, loss, norm)

        def train_step(built: Any, number: int, *rest: Any, run: Run = run, **named: Any) -> Any:
            if run.stop_at == number + 1 and built.mesh.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(built, number, *rest, **named)

        def shifted(loader: BatchLoader, number: int, run: Run = run) -> Any:
            return load(loader, number + (run.shift[1] if run.shift and number >= run.shift[0] else 0))

        SpikeGuard.accepts, module.train_step, BatchLoader.load = judge, train_step, shifted  # type: ignore[assignment,method-assign]
        try:
            module.train(run.settings, run.resume)
            out.append("")
        except TrainingError as error:
            out.append(str(error))
    return out


MODES = ("step", "overlap", "stale")


@pytest.fixture(scope="module")
def runs(ci_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`runs(name)`: the folder of one of the runs below, all made in one go on two ranks."""
    folder = tmp_path_factory.mktemp("spikes")

    def settings(name: str, *overrides: str) -> Settings:
        return ci_settings(folder / name, ci_data, *TINY, *TWO, *SHORT, *overrides)

    plays = []
    for mode in MODES:
        fetch = f"engram.fetch={mode}"
        plays += [
            Run(settings(f"skip {mode}", fetch, "train.on_spike=skip"), refuse={BAD}),
            Run(settings(f"back {mode}", fetch, "train.on_spike=rollback"), {BAD}, stop_at=STOP),
            Run(settings(f"back {mode}", fetch, "train.on_spike=rollback"), resume=True),
        ]
    plays += [
        Run(settings("want step"), shift=(EVERY, BAD - EVERY)),
        Run(settings("want stale", "engram.fetch=stale"), shift=(EVERY, BAD - EVERY)),
        Run(settings("stop"), refuse={BAD}),
        Run(settings("too often", "train.on_spike=rollback", "train.spike_limit=2"), refuse={5, 7, 9}),
        Run(settings("too early", "train.on_spike=rollback"), refuse={2}),
    ]
    said = run_on_ranks(train_all, 2, plays, str(folder), timeout=240)
    assert said[0] == said[1]
    (folder / "said").write_text("\n".join(said[0]))
    assert said[0][:-3] == [""] * (len(plays) - 3)
    return lambda name: folder / name


def test_a_skipped_step_leaves_no_trace_but_its_note(runs: Callable[[str], Path]) -> None:
    curves = {}
    for mode in MODES:
        lines = read_metrics(runs(f"skip {mode}"))
        (note,) = (line for line in lines if "refused" in line)
        assert (note["step"], note["refused"]) == (BAD, "skip")
        curves[mode] = {line["step"]: line["loss"] for line in lines if "loss" in line}
        assert list(curves[mode]) == [step for step in range(1, STEPS + 1) if step != BAD]
    assert curves["overlap"] == curves["step"]  # also where rows had come as they would be after the update
    undisturbed = loss_curve(runs("want step"))
    assert [curves["step"][step] for step in range(1, EVERY + 1)] == undisturbed[:EVERY]
    assert curves["step"][BAD + 1] != undisturbed[BAD]


@pytest.mark.parametrize("mode", MODES[:2])
def test_a_rollback_goes_on_behind_the_batch_bitwise_and_so_does_a_resumed_run(
    runs: Callable[[str], Path], mode: str
) -> None:
    """As a run that was never there would: its checkpoint, and then the data that lie behind what was
    refused.
    """
    assert loss_curve(runs(f"back {mode}")) == loss_curve(runs("want step"))
    notes = [line for line in read_metrics(runs(f"back {mode}")) if "refused" in line]
    assert notes == []  # the lines after the checkpoint are dropped with their steps


def test_a_rollback_of_stale_rows_is_as_good_as_a_resume(runs: Callable[[str], Path]) -> None:
    """Rows that the checkpoint holds were read for other data, so only close to a run that read its own."""
    assert loss_curve(runs("back stale")) == pytest.approx(loss_curve(runs("want stale")), rel=1e-3)


def test_what_stops_a_run_is_said(runs: Callable[[str], Path]) -> None:
    stop, often, early = runs("said").read_text().splitlines()[-3:]
    last = runs("stop") / "checkpoints/step-00000003"
    assert stop.startswith(f"step {BAD}: the loss ")
    assert stop.endswith(f"The last good checkpoint is {last}; nothing of this step was kept")
    assert "; that is more than train.spike_limit=2 in a row. The last good checkpoint is " in often
    assert early.startswith("step 2: ")
    assert "The last good checkpoint is none" in early
