"""What came of every fault of a story, and whether its run ended as the undisturbed one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybridtrain import checkpoint
from hybridtrain.checkpoint import StoredTensors
from hybridtrain.monitor.metrics import read_metrics
from tests.faults.story import DAMAGE, Fault, Story

NAMED = {
    "fail": "Input/output error",
    "fill": "No space left on device",
    "vanish": r"train-\d+\.tokens: is missing",
    "cut": r"train-\d+\.tokens: has ",
    "nan": r"step \d+: the loss is nan.* come out of layers\.\d\.mixer \(rank {rank}\)",
}
"""What a refusal must say, by the kind of the fault; of a damaged file its name."""
STALLS = {
    "stop": r"error: no progress for \d+ s \(parallel\.timeout=8\): rank {rank} gave no sign",
    "hang": r"error: no progress for \d+ s \(parallel\.timeout=8\): rank {rank} has not come to \w+ number "
    r"\d+ of group ",
}
"""What the watchdog must say."""
KILLED, KILLED_ALL = "rank {rank} was ended by SIGKILL", r"rank \d was ended by SIGKILL"
"""What the launcher must say."""


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


def judge(story: Story, plan: Plan, messages: Sequence[str], reference: Path) -> list[Outcome]:
    """One outcome for every fault that happened."""
    events = story.events()
    fired = [event for event in events if event["event"] == "fired"]
    made = max(event["attempt"] for event in events if event["event"] == "attempt")
    wrong = different_end(story.run, reference)
    if without := sorted(set(range(made)) - {event["attempt"] for event in fired}):
        wrong += f"attempt(s) {without} ended without a fault: {[messages[n] for n in without if messages]}"
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
    if fault.kind == "pause":
        return "unharmed", f"it was not waited for: {message}" if "no progress" in message else ""
    if "was ended by SIGKILL" in message or message.startswith("error: no progress"):
        hangs_all = fault.kind == "hang" and fault.when == "file"  # the watchdog cannot write either
        kind = "stop" if hangs_all else fault.kind
        said = STALLS.get(kind, KILLED_ALL if kind == "kill all" else KILLED).format(rank=fault.rank)
        return "restarted", "" if re.match(said, message) else f"it does not say {said}: {message}"
    if message.startswith("error: "):
        named = NAMED.get(fault.kind, "nothing").format(rank=fault.rank)
        return "refused", "" if re.search(named, message) else f"the refusal does not say {named}: {message}"
    return "unharmed", "" if last and not message else f"it ended with: {message}"


def _fallen_back(
    story: Story, event: dict[str, Any], resumed: int | None, message: str | None
) -> tuple[str, str]:
    """The same of a damaged file; the one before its checkpoint is the best that there is, and the file is
    named.
    """
    step = _step(event["committed"])
    if resumed is None:
        named = message is not None and event["file"] in message
        return (
            "refused",
            "" if named else f"{event['file']} was damaged, and the attempt ended with: {message}",
        )
    if resumed == step:
        return "unharmed", ""
    told = event["file"] in (story.folder / "ranks.log").read_text(errors="replace")
    expected = step - int(story.settings["checkpoint"]["every"])
    problem = "" if resumed == expected else f"the run went on from step {resumed} and not from {expected}"
    return "fell back", problem or ("" if told else f"{event['file']} is not named")


def _lost(committed: str | None, resumed: int | None) -> str:
    """Whether the run went on from less than was committed when the fault happened."""
    if committed is None or resumed is None or resumed >= _step(committed):
        return ""
    return f"{committed} was committed, and the run went on from step {resumed}"


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def different_end(run: Path, reference: Path) -> str:
    """In what the run is not the undisturbed one, bit for bit: its losses, or a tensor of its last
    checkpoint.
    """
    if curve(run) != curve(reference):
        return "the curve is not that of the undisturbed run; "
    mine, theirs = (StoredTensors(checkpoint.latest(folder / "checkpoints")) for folder in (run, reference))
    if mine.shapes != theirs.shapes:
        return "the last checkpoint has other tensors than the undisturbed run's; "
    wrong = [name for name in theirs.shapes if not torch.equal(mine.read(name), theirs.read(name))]
    return f"the last checkpoint's {', '.join(wrong)} are not those of the undisturbed run; " if wrong else ""


def curve(run: Path) -> list[tuple[int, str, float]]:
    """Every loss of the run, in the order written: a step that stands there twice shows."""
    names = ("loss", "grad_norm", "validation_loss")
    return [(line["step"], name, line[name]) for line in read_metrics(run) for name in names if name in line]
