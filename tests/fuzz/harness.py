"""What every fuzzer shares: how many inputs it tries, and what may come of one.

`make test` tries a few hundred inputs over all fuzzers, `make test-fuzz` (FUZZ=many) more than ten thousand.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis

from hybridtrain.errors import UserError
from hybridtrain.parallel.layout import LayoutError

MANY = 35  # times as many inputs in the slow suite
tried = 0  # inputs in this session, over all fuzzers


def examples(few: int) -> hypothesis.settings:
    """Settings of a fuzzer that tries `few` inputs in `make test` and 35 times as many in `make
    test-fuzz`.
    """
    checks = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture]
    count = few * (MANY if os.environ.get("FUZZ") == "many" else 1)
    return hypothesis.settings(
        max_examples=count, derandomize=True, deadline=None, suppress_health_check=checks
    )


def outcome(act: Callable[[], Any]) -> Any:
    """What `act` returned, or None where it refused its input as a command does: by an error that is printed
    without a traceback.

    Any other exception is a failure of the test.
    """
    global tried
    tried += 1
    message = ""
    try:
        return act()
    except (UserError, LayoutError) as error:
        message = str(error)
    assert message.strip(), "an error without a message"
    return None


class Trap:
    """A pickle of this runs code: it makes the file `path`. A test then asks whether it `sprang`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)

    @property
    def sprang(self) -> bool:
        return self.path.exists()
