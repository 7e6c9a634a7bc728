"""The candidates' benchmark: its formulations agree, and its page keeps its prose. Its times are for
people.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridtrain.kernels.ops import OPS
from tools import bench_candidates as tool


def test_formulations_agree_and_one_that_does_not_is_named() -> None:
    races = list(tool.races(N=256, D=8, V=64))
    elsewhere = {
        "attention",
        "grouped_mlp",
        "rowwise_adam",
        "depth_attention",
    }  # moe_swiglu on the CPU; tools/bench_rows.py; no model has it
    assert {race.op.partition(":")[0] for race in races} >= set(OPS) - elsewhere
    for race in races:
        tool.check(race)
    wrong = tool.Race("swiglu", "", races[2].inputs, races[2].forms | {"other": lambda gate, up: gate * up})
    with pytest.raises(AssertionError, match="swiglu, other: "):
        tool.check(wrong)


def test_measures_and_writes_between_the_marks(tmp_path: Path) -> None:
    race = next(tool.races(N=128, D=8, V=64))
    measured = tool.measure(race, rounds=2, seconds=1e-4)
    assert list(measured) == list(race.forms)
    assert measured["gradient by hand"][1] == (1, 1, 1)
    table = tool.render([(race, measured)])
    assert table.splitlines()[2].startswith("| rms_norm | [128, 8] | gradient by hand |")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tool.START}\nold\n{tool.END}\nafter\n", encoding="utf-8")
    tool.write_page(page, table)
    assert page.read_text(encoding="utf-8") == f"before\n{tool.START}\n\n{table}\n{tool.END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no line"):
        tool.write_page(page, table)
