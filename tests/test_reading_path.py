"""How much there is to read to follow one step of training on one rank: the files that the step enters."""

from __future__ import annotations

import re
import sys
import threading
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

from hybridtrain.run.step import StepInput, train_step
from tests.training import build_here, ci_settings, make_data

ROOT = Path(__file__).parents[1]
OUTSIDE, EVERYWHERE = (14, 2300), (24, 3000)  # files, lines


def entered_by_a_step(tmp_path: Path, data: Path) -> dict[str, set[str]]:
    """The functions that two steps and their plans enter, by file; in all threads. Batches are at hand."""
    run, loader = build_here(ci_settings(tmp_path / "run", data))
    assert run.table is not None
    batches = [loader.load(number) for number in range(2)]
    inputs = [batch.at(run.positions) for batch in batches]
    entered: defaultdict[str, set[str]] = defaultdict(set)

    def note(frame: FrameType, event: str, _: Any) -> None:
        entered[frame.f_code.co_filename].add(frame.f_code.co_name)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        for number, (batch, data_here) in enumerate(zip(batches, inputs, strict=True)):
            plan = run.table.plan(batch)
            train_step(run, number, StepInput(data_here, plan))
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return {
        str(file.relative_to(ROOT)): functions
        for name, functions in entered.items()
        if (file := Path(name).resolve()).is_relative_to(ROOT) and _is_ours(file)
    }


def _is_ours(file: Path) -> bool:
    return file.suffix == ".py" and file.relative_to(ROOT).parts[0] in ("hybridtrain", "parallel", "kernels")


def test_a_step_is_read_in_few_files(tmp_path: Path) -> None:
    entered = entered_by_a_step(tmp_path, make_data(tmp_path / "data"))
    assert {"hybridtrain/run/step.py", "kernels/norms/op.py", "parallel/row_exchange.py"} <= set(entered)
    lines = {file: len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in entered}
    table = "\n".join(f"{lines[f]:5d} {f}: {', '.join(sorted(entered[f]))}" for f in sorted(entered))
    outside = [file for file in entered if not file.startswith("kernels/")]
    found = {
        "outside of kernels/": (len(outside), sum(lines[f] for f in outside), OUTSIDE),
        "in all": (len(entered), sum(lines.values()), EVERYWHERE),
    }
    for where, (files, length, (most_files, most_lines)) in found.items():
        assert files <= most_files, f"{files} files {where}, at most {most_files}\n{table}"
        assert length <= most_lines, f"{length} lines {where}, at most {most_lines}\n{table}"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    order = readme[readme.index("## Read it") : readme.index("How a model is spread")]
    assert set(re.findall(r"`([\w/]+\.py)`", order)) == set(outside)
