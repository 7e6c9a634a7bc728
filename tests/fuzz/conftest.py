"""Says at the end how many inputs were tried."""

from __future__ import annotations

import pytest

from tests.fuzz import harness


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if harness.tried:
        terminalreporter.write_line(f"fuzzers tried {harness.tried:,} inputs")
