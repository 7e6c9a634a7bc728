"""Runs survive what is done to them: `make test-faults` injects at least 200 faults, `make test` a few of
another draw.

Every fault ends in a restart from the last committed checkpoint or in a refusal that names the cause, and
every run in the curve of the undisturbed one, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.faults.acts import ACTS
from tests.faults.campaign import LEAST, SEED, STEPS, STORIES, UNDER_TORCHRUN, draw
from tests.faults.judge import Outcome
from tests.faults.story import DAMAGE, PHASES, PIPELINE_PHASES
from tools.fault_campaign import problems, run

FEW, FEW_SEED, FEW_STORIES, FEW_ATTEMPTS = 6, 3, 1, 6


def wrong(outcomes: list[Outcome]) -> list[str]:
    return [f"{o.fault} ({o.plan.variant} {o.plan.launcher}): {o.problem}" for o in outcomes if o.problem]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Outcome], Path]:
    folder = tmp_path_factory.mktemp("few")
    return list(run(draw(FEW_SEED, FEW_STORIES, 0, FEW_ATTEMPTS), folder)), folder


def test_few_faults_end_well(few: tuple[list[Outcome], Path]) -> None:
    outcomes, _ = few
    assert not wrong(outcomes)
    assert len(outcomes) >= FEW


def test_tensorboard_has_no_step_twice_after_restarts(few: tuple[list[Outcome], Path]) -> None:
    _, folder = few
    board = EventAccumulator(str(folder / "story-0/disk/run/tensorboard")).Reload()
    steps = [event.step for event in board.Scalars("loss")]
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS


@pytest.mark.faults
@pytest.mark.timeout(3000)
def test_at_least_200_faults_end_well(tmp_path: Path) -> None:
    outcomes = list(run(draw(SEED, STORIES, UNDER_TORCHRUN), tmp_path))
    assert not wrong(outcomes)
    assert len(outcomes) >= LEAST


def test_a_campaign_has_every_kind_of_fault() -> None:
    plans = draw(SEED, STORIES, UNDER_TORCHRUN)
    assert plans == draw(SEED, STORIES, UNDER_TORCHRUN)
    faults = [fault for plan in plans for attempt in plan.attempts for fault in attempt]
    assert {fault.kind for fault in faults} == {*ACTS, *DAMAGE}
    kills = Counter(fault.when for fault in faults if fault.kind == "kill")
    assert kills.keys() == {*PHASES, *PIPELINE_PHASES, "file", "start"}
    assert {fault.rank for fault in faults if fault.kind == "kill"} == {0, 1}


def test_the_page_is_that_of_a_campaign_that_passed() -> None:
    assert not problems()
