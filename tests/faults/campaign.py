"""Runs that faults are injected into, and what came of each: `draw` a campaign by its seed, `play` a story, judge it.

A story passes where its run ends with the undisturbed run's curve, bit for bit, every fault having led to a restart from the
last committed checkpoint or to a refusal that names the cause; what was refused for is then mended and the run goes on.
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybridtrain.launch.local import USER_ERROR, run_ranks
from hybridtrain.metrics import read_metrics
from tests.faults.inject import DAMAGE, PHASES, STORY, Fault, Story, harmed_checkpoints
from tests.ranks import PRELOAD
from tests.training import TINY, ci_settings

SEED, STORIES, UNDER_TORCHRUN, LEAST = 5, 28, 3, 200
STEPS, EVERY, ATTEMPTS = 30, 3, 8
CAMPAIGN = (
    *TINY,
    *f"train.steps={STEPS} checkpoint.every={EVERY} train.eval_every=5 train.seq_len=16 parallel.timeout=8".split(),
    *["parallel.ep=2", "memory.weight_decay=0.1"],
)
VARIANTS = {
    "": [],
    "overlap": ["memory.fetch=overlap", "checkpoint.background=true"],
    "stale": ["memory.fetch=stale"],
    "increments": ["checkpoint.table_full_every=3", "checkpoint.background=true", "checkpoint.keep_last=3"],
    "replicas": ["parallel.mem=1"],
}
NAMED = {"fail": "Input/output error", "fill": "No space left on device", "vanish": r"train-\d+\.tokens"}
"""What a refusal must say, by the kind of the fault; of a damaged file its name."""
STALLS = {"stop": r"no progress for \d+ s .*rank {rank} gave no sign", "hang": r"no progress for \d+ s .*rank {rank} "}
KINDS = {
    "kill at a phase": 0.44,
    "kill at a file": 0.2,
    "kill at any time": 0.1,
    "stop": 0.05,
    "hang": 0.03,
    "fail": 0.05,
    "fill": 0.03,
    "vanish": 0.02,
    "truncate": 0.03,
    "flip": 0.03,
    "delete": 0.02,
}
"""Shares of the attempts of a campaign; one with a damaged file has a kill as well."""


@dataclass(frozen=True)
class Plan:
    """A story before it has a place: which run, started by what, and the faults of each attempt."""

    seed: int
    variant: str
    launcher: str
    attempts: tuple[tuple[Fault, ...], ...]


@dataclass(frozen=True)
class Outcome:
    """What came of a fault: how its attempt ended, and what is wrong with it or with the run as a whole."""

    fault: Fault
    plan: Plan
    ended: str
    problem: str


def draw(seed: int, stories: int, with_torchrun: int) -> list[Plan]:
    """A campaign. Those under torchrun have kills only: it starts ranks anew whatever they ended for."""
    chance = random.Random(seed)
    plans = []
    for number in range(stories):
        variant = list(VARIANTS)[number % len(VARIANTS)]
        kinds = chance.choices(list(KINDS), list(KINDS.values()), k=ATTEMPTS)
        plans.append(Plan(chance.randrange(2**32), variant, "launch", tuple(_attempt(chance, kind) for kind in kinds)))
    for number in range(with_torchrun):
        variant = list(VARIANTS)[number % len(VARIANTS)]
        kills = tuple(_attempt(chance, chance.choice(list(KINDS)[:2])) for _ in range(ATTEMPTS // 2))
        plans.append(Plan(chance.randrange(2**32), variant, "torchrun", kills))
    return plans


def _attempt(chance: random.Random, kind: str) -> tuple[Fault, ...]:
    rank, phase = chance.randrange(2), chance.choice(PHASES)
    number = chance.randint(1, {"save": 2, "validation": 1}.get(phase, 6))
    if kind in DAMAGE:
        return (Fault(kind, 0, number=chance.randrange(2**16)), *_attempt(chance, "kill at a phase"))
    if kind == "kill at any time":
        return (Fault("kill", rank, "start", delay=chance.uniform(0.1, 4.0)),)
    if kind in ("kill at a file", "fail"):
        return (Fault(kind.split()[0], rank, "file", chance.randint(1, 30 if rank == 0 else 4)),)
    if kind in ("fill", "vanish"):
        return (Fault(kind, 0, "forward", chance.randint(1, 6)),)
    if kind in ("stop", "hang"):
        return (Fault(kind, rank, phase, number),)
    return (Fault("kill", rank, phase, number, chance.choice((0.0, 0.0, chance.uniform(0.0005, 0.01)))),)


def settings_of(folder: Path, variant: str) -> dict[str, Any]:
    return ci_settings(folder / "disk" / "run", folder / "data", *CAMPAIGN, *VARIANTS[variant]).model_dump()


def undisturbed(data: Path, folder: Path, variant: str) -> Path:
    """The run folder of the variant without faults."""
    story = Story(folder, settings_of(folder, variant), (), 0)
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
    """`hybridtrain launch --max-restarts`, again after each refusal, with the cause mended; what was said of each attempt."""
    messages: list[str] = []
    while True:
        error = io.StringIO()
        arguments, restarts = (replace(story, base=len(messages)), None), len(story.attempts) + 2
        with contextlib.redirect_stderr(error):
            status = run_ranks("tests.faults.inject:rank_of", arguments, 2, threads=1, preload=PRELOAD, restarts=restarts)
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
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={len(story.attempts) + 2}"]
    command = [sys.executable, "-m", *command, "-m", "tests.faults.inject"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return []


def mend(story: Story, data: Path) -> None:
    """What a user would do after a refusal: make room, bring back what is missing."""
    (story.folder / "disk" / "ballast").unlink(missing_ok=True)
    shutil.copytree(data, story.folder / "data", dirs_exist_ok=True)
    for folder, copy in sorted(harmed_checkpoints(story))[:1]:  # a run that went on from before the others has dropped their lines
        shutil.copytree(copy, folder, dirs_exist_ok=True)


def judge(story: Story, plan: Plan, messages: Sequence[str], reference: Path) -> list[Outcome]:
    """One outcome for every fault that happened."""
    events = story.events()
    fired = [event for event in events if event["event"] == "fired"]
    made = max(event["attempt"] for event in events if event["event"] == "attempt")
    wrong = "" if curve(story.run) == curve(reference) else "the curve is not that of the undisturbed run"
    if without := set(range(made)) - {event["attempt"] for event in fired}:
        wrong = f"attempt(s) {sorted(without)} ended without a fault: {[messages[n] for n in without if messages]}"
    out, harmed = [], {event["committed"] for event in fired if "file" in event}
    for event in fired:
        fault, attempt = story.attempts[event["attempt"]][event["number"]], event["attempt"]
        resumed = {e["attempt"]: e["step"] for e in events if e["event"] == "resumed"}
        message = messages[attempt] if messages else None
        if fault.kind in DAMAGE:
            ended, problem = _fallen_back(story, event, resumed.get(attempt), message)
        else:
            ended, problem = _ended(fault, message, attempt == made)
            after = next((step for number, step in sorted(resumed.items()) if number > attempt), None)
            problem = problem or ("" if event["committed"] in harmed else _lost(event["committed"], after))
        out.append(Outcome(fault, plan, ended, wrong or problem))
    return out


def _ended(fault: Fault, message: str | None, last: bool) -> tuple[str, str]:
    """How the attempt with this fault ended, and what is wrong with that."""
    if message is None:
        return "restarted", ""
    if "was ended by SIGKILL" in message or message.startswith("error: no progress"):
        said = STALLS.get(fault.kind, "rank {rank} was ended by SIGKILL").format(rank=fault.rank)
        return "restarted", "" if re.search(said, message, re.S) else f"it does not say {said}: {message}"
    if message.startswith("error: "):
        named = NAMED.get(fault.kind)
        return "refused", "" if named and re.search(named, message) else f"the refusal does not name the cause: {message}"
    return "unharmed", "" if last and not message else f"it ended with: {message}"


def _fallen_back(story: Story, event: dict[str, Any], resumed: int | None, message: str | None) -> tuple[str, str]:
    """The same of a damaged file; the one before its checkpoint is the best that there is, and the file is named."""
    step = _step(event["committed"])
    if resumed is None:
        named = message is not None and event["file"] in message
        return "refused", "" if named else f"{event['file']} was damaged, and the attempt ended with: {message}"
    if resumed == step:
        return "unharmed", ""
    told = event["file"] in (story.folder / "ranks.log").read_text(errors="replace")
    expected = step - EVERY
    problem = "" if resumed == expected else f"the run went on from step {resumed} and not from {expected}"
    return "fell back", problem or ("" if told else f"{event['file']} is not named")


def _lost(committed: str | None, resumed: int | None) -> str:
    """Whether the run went on from less than was committed when the fault happened."""
    if committed is None or resumed is None or resumed >= _step(committed):
        return ""
    return f"{committed} was committed, and the run went on from step {resumed}"


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def curve(run: Path) -> list[tuple[int, str, float]]:
    """Every loss of the run, in the order written: a step that stands there twice shows."""
    names = ("loss", "grad_norm", "validation_loss")
    return [(line["step"], name, line[name]) for line in read_metrics(run) for name in names if name in line]


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
