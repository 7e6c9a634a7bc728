"""The compiler's side: the stored report is of these sources and says what it must; a fresh compile agrees
with it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hybridtrain.kernels.ops import OPS, TRITON_OPS
from hybridtrain.kernels.report.command import END, PAGE, START, STORED, unknown, write_page
from hybridtrain.kernels.report.hardware import TARGETS
from hybridtrain.kernels.report.table import digest, markdown

ROOT = Path(__file__).parents[3]
REPORT: dict[str, Any] = json.loads((ROOT / STORED).read_text(encoding="utf-8"))
ROWS: list[dict[str, Any]] = REPORT["rows"]
NVIDIA = ("sm_80", "sm_90", "sm_100")
SMALL_OUTPUTS = {  # too little for 128 bits a thread; such a program reads 16 times as much or more
    ("cross_entropy", "partial"),
    ("depth_attention", "forward"),
}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def name(row: dict[str, Any]) -> str:
    return f"{row['op']} {row['case']} {row['kernel']} {row['target']}"


def test_the_stored_report_is_of_these_sources() -> None:
    assert REPORT["digest"] == digest(), "run: hybridtrain kernels report --page ."
    assert {(row["op"], row["target"]) for row in ROWS} == {
        (op, target) for op in TRITON_OPS for target in TARGETS
    }


def test_the_page_shows_the_stored_report() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    assert text.partition(START)[2].partition(END)[0].strip() == markdown(ROWS).strip()


def test_nothing_spills() -> None:
    assert [name(row) for row in ROWS if row["spill_bytes"]] == []


def test_every_kernel_is_in_the_report() -> None:
    written, op_of = set(), {source: op.name for op in OPS.values() for source in op.sources}
    for file in (ROOT / "kernels").glob("*/*.py"):
        for kernel in re.findall(r"@triton\.jit\ndef _(\w+)_kernel\(", file.read_text(encoding="utf-8")):
            written.add((op_of[f"{file.parent.name}.{file.stem}"], kernel))
    assert len(written) > 20
    for target in ("sm_90", "sm_100"):
        assert written == {(row["op"], row["kernel"]) for row in ROWS if row["target"] == target}


def test_fp8_is_compiled_where_it_exists() -> None:
    rows = [row for row in ROWS if row["op"] == "grouped_mlp" and "fp8" in row["config"]]
    assert {row["target"] for row in rows} == {"sm_90", "sm_100"}
    for row in rows:
        other = [
            r
            for r in ROWS
            if r["case"] == row["case"].replace("fp8", "bfloat16") and r["target"] == row["target"]
        ]
        assert 0.4 < row["roofline_us"] / other[0]["roofline_us"] < 0.6, name(row)


def test_memory_bound_kernels_move_128_bits_at_a_time() -> None:
    rows = [row for row in ROWS if row["bound"] == "memory" and row["target"] in NVIDIA]
    assert [name(row) for row in rows if row["load_bits"] < 128] == []
    assert [
        name(row) for row in rows if row["wide_share"] < 0.5
    ] == []  # the rest are one number a row, and indices
    narrow = {(row["op"], row["kernel"]) for row in rows if row["store_bits"] < 128}
    assert narrow <= SMALL_OUTPUTS


def test_matrix_kernels_use_tensor_cores() -> None:
    matrix = [row for row in ROWS if row["bound"] == "matrix"]
    assert {row["target"] for row in matrix} == set(TARGETS)
    assert [name(row) for row in matrix if row["target"] in NVIDIA and not row["tensor_core"]] == []


def test_occupancy_and_traffic_are_possible() -> None:
    for row in ROWS:
        assert 0 < row["occupancy"] <= 1, name(row)
        assert row["case_bytes_moved"] >= row["case_bytes_minimum"] * 0.999, name(row)
        assert row["roofline_us"] > 0, name(row)


def test_occupancy_by_hand() -> None:
    a100 = TARGETS["sm_80"]
    assert a100.occupancy(32, 0, 8) == 1.0
    assert a100.occupancy(65, 0, 4) == 0.4375  # 72 registers x 128 threads: 7 blocks
    assert a100.occupancy(32, 96 << 10, 8) == 0.125  # one block of 97 KiB in 164
    assert a100.seconds(2_039_000_000, 0) == pytest.approx(1e-3)
    assert a100.seconds(0, 312_000_000_000) == pytest.approx(1e-3)
    assert TARGETS["sm_90"].seconds(0, 1_979_000_000_000, 8) == pytest.approx(1e-3)


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    words = [sys.executable, "-m", "hybridtrain", "kernels", *arguments]
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)


@needs_triton
def test_a_fresh_compile_agrees_with_the_stored_report() -> None:
    done = command("report", "--ops", "swiglu", "--targets", "sm_90", "--json")
    assert done.returncode == 0, done.stderr
    fresh = json.loads(done.stdout)
    assert fresh["rows"] == [row for row in ROWS if row["op"] == "swiglu" and row["target"] == "sm_90"]


@needs_triton
def test_refuses_the_interpreter_and_unknown_names() -> None:
    done = command("report", "--ops", "swigloo", "--targets", "sm_75", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 turns the compiler off" in done.stderr
    assert '"swigloo" is not an op with a kernel; it may be rms_norm' in done.stderr
    assert unknown([], ["sm_75"])[0] in done.stderr


def test_the_benchmark_needs_a_gpu() -> None:
    done = command("bench", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stderr == "error: kernels bench needs a CUDA device, and torch finds none here\n"


def test_the_page_keeps_its_prose(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / PAGE).write_text(f"before\n{START}\nold\n{END}\nafter\n", encoding="utf-8")
    write_page(tmp_path, "| new |\n", "{}")
    assert (tmp_path / PAGE).read_text(encoding="utf-8") == f"before\n{START}\n\n| new |\n\n{END}\nafter\n"
