"""A checkpoint's descriptions are read once, however many of the checks and loads use them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridtrain import checkpoint
from hybridtrain.checkpoint import saved as saved_module
from hybridtrain.checkpoint.load import ALONE
from hybridtrain.checkpoint.saved import Saved
from hybridtrain.checkpoint.stored import CHANGED
from hybridtrain.errors import DamagedCheckpoint
from tests.hybridtrain.checkpoint.test_info import make


def _counting(name: str, read: Callable[..., Any], count: Counter[str]) -> Callable[..., Any]:
    def counted(*args: Any) -> Any:
        count[name] += 1
        return read(*args)

    return counted


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file of this kind was read since."""
    count: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any], *args: Any) -> Any:
        count[name] += 1
        return function(*args)

    for name in ("read_info", "read_index"):
        monkeypatch.setattr(saved_module, name, partial(counted, name, getattr(saved_module, name)))
    return count


def test_all_that_a_resume_looks_at_is_read_once(tmp_path: Path, reads: Counter[str]) -> None:
    saved = Saved(make(tmp_path / "step-2", make(tmp_path / "step-1")))
    reads.clear()
    checkpoint.verify(saved, "full")
    first, second = {"t1": torch.zeros(100)}, {"t2": torch.zeros(200)}
    for state in (first, second):  # as for each stage of a rank
        checkpoint.read_into(state, saved, ALONE)
    stored = checkpoint.StoredTensors(saved)
    assert checkpoint.Base.of(saved) is None  # these have no table
    assert torch.equal(first["t1"], torch.ones(100))
    assert torch.equal(second["t2"], torch.full((200,), 2.0))
    assert torch.equal(stored.read("t3"), torch.full((300,), 3.0))
    assert reads == {"read_info": 2, "read_index": 2}  # its own and its base's


def test_a_base_is_not_based_on_another(tmp_path: Path) -> None:
    first = make(tmp_path / "step-1")
    second = make(tmp_path / "step-2", first)
    third = Saved(make(tmp_path / "step-3", second))
    with pytest.raises(DamagedCheckpoint, match=r"its base .*step-2 is based on another one"):
        checkpoint.StoredTensors(third)
    own = make(tmp_path / "step-4", first)
    info = checkpoint.read_info(own)
    checkpoint.write_info(own, info | {"base": info["base"] | {"name": "step-4"}})
    with pytest.raises(DamagedCheckpoint, match="names itself as its base"):
        checkpoint.StoredTensors(own)


def test_without_a_description_there_is_an_index_alone(tmp_path: Path) -> None:
    path = make(tmp_path / "step-1")
    (path / checkpoint.INFO).unlink()
    saved = Saved(path)
    assert not saved.finished
    assert saved.base is None
    assert not [name for name in saved.index.tensors if name.startswith(CHANGED)]
    assert Saved.of(saved) is saved
