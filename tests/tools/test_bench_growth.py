"""The measurements of growth run, each says how long it took, and what a part costs is less than what the
whole does.
"""

from __future__ import annotations

import mmap
import re

import pytest

from tools.bench_growth import in_a_child, main


def test_every_measurement_runs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--small"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 + 5 + 2 + 4 + 1
    assert all(re.fullmatch(r".{75} +\d+\.\d{4} s +[\d,]+ bytes", line) for line in lines), lines


def test_help_says_how_it_is_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "`python tools/bench_growth.py [--small]`" in text
    assert "docs/scaling.md has the laws" in text


def test_a_child_tells_by_how_much_it_grew() -> None:
    def fill() -> None:
        pages = mmap.mmap(-1, 64 << 20)  # memory that the process has not had before
        for _ in range(64):
            pages.write(b"x" * (1 << 20))

    _, grown = in_a_child(fill)
    assert 60 << 20 < grown < 100 << 20


def test_a_child_that_dies_is_no_measurement() -> None:
    def die() -> None:
        import os

        os._exit(1)

    with pytest.raises(RuntimeError, match="ended before it was done"):
        in_a_child(die)
