"""The fuzzers together try as many inputs as is promised, and a failure of any of them is one of the
suite.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from hybridtrain.errors import DataError
from tests.fuzz.harness import MANY, outcome

FEW_INPUTS, MANY_INPUTS = 300, 10_000


def test_the_fuzzers_try_enough_inputs() -> None:
    few = 0
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "examples":
                (count,) = node.args
                assert isinstance(count, ast.Constant), (
                    f"{path}:{node.lineno}: write the number of examples out"
                )
                assert isinstance(count.value, int)
                few += count.value
    assert few >= FEW_INPUTS
    assert few * MANY >= MANY_INPUTS


def refuse(message: str) -> None:
    raise DataError(message)


def test_a_refusal_has_a_message_and_nothing_else_passes() -> None:
    assert outcome(lambda: refuse("tokens.bin: is damaged")) is None
    assert outcome(lambda: 3) == 3
    with pytest.raises(AssertionError, match="without a message"):
        outcome(lambda: refuse(""))
    with pytest.raises(ZeroDivisionError):
        outcome(lambda: 1 // 0)
