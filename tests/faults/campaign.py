"""Runs that faults are injected into: `draw` a campaign by its seed, `play` a story, which judge.py judges.

A story passes where its run ends as the undisturbed one, bit for bit, every fault having led to a restart
from the last committed checkpoint or to a refusal that names the cause; what was refused for is then mended
and the run goes on.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybridtrain.launch.local import USER_ERROR, run_ranks
from tests.faults.acts import harmed_checkpoints
from tests.faults.inject import STORY
from tests.faults.judge import Outcome, Plan, judge
from tests.faults.story import DAMAGE, PHASES, PIPELINE_PHASES, Fault, Story
from tests.ranks import PRELOAD
from tests.training import TINY, ci_settings

SEED, STORIES, UNDER_TORCHRUN, LEAST = 95, 24, 3, 200
STEPS, EVERY, ATTEMPTS = 40, 2, 9
CAMPAIGN = (
    *TINY,
    *[f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "train.eval_every=5", "train.seq_len=48"],
    *["parallel.timeout=8", "parallel.ep=2", "engram.weight_decay=0.1"],
)
VARIANTS = {
    "overlap": ["engram.fetch=overlap", "checkpoint.background=true"],
    "pipeline": ["parallel.pp=2", "parallel.ep=1", "train.micro_batches=2"],
    "": [],
    "stale": ["engram.fetch=stale"],
    "increments": ["checkpoint.table_full_every=3", "checkpoint.background=true", "checkpoint.keep_last=3"],
    "replicas": ["parallel.mem=1"],
}
KINDS = {
    "kill at a phase": 0.36,
    "kill at a file": 0.18,
    "kill at any time": 0.08,
    "kill all": 0.06,
    "abandon": 0.03,
    "stop": 0.03,
    "hang": 0.03,
    "pause": 0.02,
    "nan": 0.03,
    "fail": 0.04,
    "fill": 0.02,
    "vanish": 0.015,
    "cut": 0.015,
    "truncate": 0.03,
    "flip": 0.04,
    "delete": 0.02,
}
"""Shares of the attempts of a campaign; one with a pause or a damaged file has a kill as well."""
UNDER_TORCHRUN_KINDS = ("kill at a phase", "kill at a file", "kill all")


def draw(seed: int, stories: int, with_torchrun: int, attempts: int = ATTEMPTS) -> list[Plan]:
    """A campaign. Those under torchrun have kills only, and fewer: it starts ranks anew whatever they ended
    for, and slowly.
    """
    chance = random.Random(seed)
    plans = []
    for number in range(stories + with_torchrun):
        launcher = "launch" if number < stories else "torchrun"
        variant = list(VARIANTS)[(number if number < stories else number - stories) % len(VARIANTS)]
        if launcher == "launch":
            kinds = chance.choices(list(KINDS), list(KINDS.values()), k=attempts)
        else:
            kinds = chance.choices(UNDER_TORCHRUN_KINDS, k=attempts // 3)
        plans.append(
            Plan(
                chance.randrange(2**32),
                variant,
                launcher,
                tuple(_attempt(chance, variant, kind) for kind in kinds),
            )
        )
    return plans


def _attempt(chance: random.Random, variant: str, kind: str) -> tuple[Fault, ...]:
    rank, phase = chance.randrange(2), chance.choice(PIPELINE_PHASES if variant == "pipeline" else PHASES)
    number = chance.randint(1, {"save": 3, "validation": 1, "restore": 1}.get(phase, 6))
    if kind in DAMAGE:
        (kill,) = _attempt(chance, variant, "kill at a phase")
        late = (
            replace(kill, when="data") if kill.when == "restore" else kill
        )  # what was damaged is to be met first
        return (Fault(kind, 0, number=chance.randrange(2**16)), late)
    if kind == "pause":
        return (Fault(kind, rank, phase, number), *_attempt(chance, variant, "kill at a phase"))
    if kind == "kill at any time":
        return (Fault("kill", rank, "start", delay=chance.uniform(0.1, 1.0)),)
    if kind in ("kill at a file", "fail"):
        return (Fault(kind.split()[0], rank, "file", chance.randint(1, 30 if rank == 0 else 4)),)
    if kind == "hang" and chance.random() < 0.3:
        return (Fault(kind, 1, "file", chance.randint(1, 4)),)  # rank 1 has no files but those of checkpoints
    if kind in ("fill", "vanish", "cut"):
        return (Fault(kind, 0, "fetch", chance.randint(1, 6)),)
    if kind == "nan":
        return (Fault(kind, rank, "fetch", chance.randint(1, 6)),)
    if kind == "kill at a phase":
        within = 0.3 if phase == "restore" else 0.01
        return (
            Fault("kill", rank, phase, number, chance.choice((0.0, 0.0, chance.uniform(0.0005, within)))),
        )
    return (Fault(kind, rank, phase, number),)


def settings_of(folder: Path, variant: str) -> dict[str, Any]:
    return ci_settings(folder / "disk" / "run", folder / "data", *CAMPAIGN, *VARIANTS[variant]).model_dump()


def undisturbed(data: Path, folder: Path, variant: str) -> Path:
    """The run folder of the variant without faults, and with no checkpoint but the last: saving changes
    nothing either.
    """
    settings = settings_of(folder, variant)
    settings["checkpoint"]["every"] = 0
    story = Story(folder, settings, (), 0)
    shutil.copytree(data, folder / "data")
    messages = _launch(story, data)
    assert messages == [""], messages
    return story.run


def play(plan: Plan, data: Path, folder: Path, reference: Path) -> list[Outcome]:
    """Run the story to its end in `folder`; one outcome for every fault that happened."""
    wanted = any(fault.kind == "fill" for attempt in plan.attempts for fault in attempt)
    with small_disk(folder / "disk", wanted) as small:
        attempts = tuple(attempt for attempt in plan.attempts if small or attempt[0].kind != "fill")
        shutil.copytree(data, folder / "data")
        story = Story(folder, settings_of(folder, plan.variant), attempts, plan.seed)
        messages = _launch(story, data) if plan.launcher == "launch" else _torchrun(story)
        return judge(story, plan, messages, reference)


def _launch(story: Story, data: Path) -> list[str]:
    """`hybridtrain launch --max-restarts`, again after each refusal, with the cause mended; what was said of
    each attempt.
    """
    messages: list[str] = []
    while True:
        error = io.StringIO()
        arguments, restarts = (replace(story, base=len(messages)), None), len(story.attempts) + 2
        with contextlib.redirect_stderr(error):
            status = run_ranks(
                "tests.faults.inject:rank_of", arguments, 2, threads=1, preload=PRELOAD, restarts=restarts
            )
        messages += re.split(r"status \d+: restart .*\n", error.getvalue())
        if status != USER_ERROR or len(messages) > 2 * len(story.attempts):
            return messages
        mend(story, data)


def _torchrun(story: Story) -> list[str]:
    """The same by torchrun, which says too little of single attempts."""
    environment = os.environ | {
        STORY: str(story.write()),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        f"--max-restarts={len(story.attempts) + 2}",
    ]
    command = [sys.executable, "-m", *command, "-m", "tests.faults.inject"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return []


def mend(story: Story, data: Path) -> None:
    """What a user would do after a refusal: make room, bring back what is missing."""
    (story.folder / "disk" / "ballast").unlink(missing_ok=True)
    shutil.copytree(data, story.folder / "data", dirs_exist_ok=True)
    for folder, copy in sorted(harmed_checkpoints(story))[
        :1
    ]:  # a run that went on from before the others has dropped their lines
        shutil.copytree(copy, folder, dirs_exist_ok=True)


@contextlib.contextmanager
def small_disk(folder: Path, wanted: bool) -> Iterator[bool]:
    """A file system of 16 MiB at `folder`, where one is wanted and permitted; whether it is one."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    mounted = wanted and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
