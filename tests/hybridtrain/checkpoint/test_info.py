"""What a checkpoint says of itself, and that any harm to its files is named with both checksums."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hybridtrain import checkpoint
from hybridtrain.checkpoint.damage import damage
from hybridtrain.errors import CheckpointError, DamagedCheckpoint
from tests.hybridtrain.checkpoint.test_history import DESCRIPTION


def make(path: Path, base: Path | None = None, **more: object) -> Path:
    """A finished folder of three files beside its index, with nothing of a run in it."""
    path.mkdir(parents=True)
    tensors = {
        f"t{i}": checkpoint.LazyTensor(
            (100 * i,), torch.float32, lambda i=i: torch.full((100 * i,), float(i))
        )
        for i in (1, 2, 3)
    }
    info = DESCRIPTION | {"step": 1, "files": checkpoint.write_tensors(path, tensors), **more}
    if base is not None:
        info["base"] = {"name": base.name, "xxh3": checkpoint.read_info(base)["xxh3"], "age": 1}
    checkpoint.write_info(path, info)
    return path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_an_untouched_one_is_whole(tmp_path: Path) -> None:
    path = make(tmp_path / "step-1")
    assert damage(path, "full") == damage(path, "sizes") == []
    parts = itertools.count()
    assert damage(path, "full", alive=lambda: next(parts) and None) == []
    assert next(parts) > 0  # the watchdog hears of every part of a file that was read
    assert set(checkpoint.read_info(path)["files"]) == {p.name for p in path.iterdir()} - {checkpoint.INFO}


@pytest.mark.parametrize(
    ("harm", "full", "sizes"),
    [
        (
            flip,
            r"is damaged: it has \d+ bytes with xxh3 [0-9a-f]{32}, must have \d+ with xxh3 [0-9a-f]{32}$",
            None,
        ),
        (
            lambda p: p.write_bytes(p.read_bytes()[:-1]),
            r"is damaged: it has \d+ bytes with xxh3 [0-9a-f]{32}, must have \d+ with xxh3 [0-9a-f]{32}$",
            r"is damaged: it has \d+ bytes, must have \d+$",
        ),
        (
            Path.unlink,
            r"is missing; it had \d+ bytes with xxh3 [0-9a-f]{32}$",
            r"is missing; it had \d+ bytes with xxh3 [0-9a-f]{32}$",
        ),
    ],
    ids=["flipped", "truncated", "missing"],
)
def test_harm_to_any_file_is_named(
    tmp_path: Path, harm: Callable[[Path], None], full: str, sizes: str | None
) -> None:
    import re

    for name in ("__0_1.distcp", ".metadata"):
        path = make(tmp_path / name / "step-1")
        harm(path / name)
        (problem,) = damage(path, "full")
        assert problem.startswith(f"{path / name}: ")
        assert re.search(full, problem), problem
        assert [bool(re.search(sizes or "", p)) for p in damage(path, "sizes")] == ([True] if sizes else [])


def test_every_file_is_in_one_share(tmp_path: Path) -> None:
    base = make(tmp_path / "step-1")
    path = make(tmp_path / "step-2", base)
    files = [*base.glob("*.distcp"), *path.glob("*.distcp")]
    for file in files:
        flip(file)
    for shares in (1, 2, 3, 9):
        found = [damage(path, "full", share, shares) for share in range(shares)]
        assert sorted(p.split(":")[0] for share in found for p in share) == sorted(map(str, files))
        if shares == 3:
            assert all(found)


def test_a_base_must_be_there_and_be_the_same(tmp_path: Path) -> None:
    base = make(tmp_path / "step-1")
    path = make(tmp_path / "step-2", base)
    checkpoint.write_info(base, checkpoint.read_info(base) | {"step": 7})
    (problem,) = damage(path, "sizes")
    assert problem.startswith(f"{base / checkpoint.INFO}: is another base: it has xxh3 ")
    (base / checkpoint.INFO).unlink()
    assert damage(path, "full") == [f"{base} is not a finished checkpoint: {base}/checkpoint.json is missing"]
    (base / checkpoint.INFO).mkdir()
    assert damage(path, "full") == [f"{base}/checkpoint.json cannot be read: Is a directory"]


def test_its_own_content_is_under_a_checksum(tmp_path: Path) -> None:
    path = make(tmp_path / "step-1", rates=[0.1, 1e-9, None], nested={"a": 1})
    assert checkpoint.read_info(path)["rates"] == [0.1, 1e-9, None]
    text = (path / checkpoint.INFO).read_text()
    (path / checkpoint.INFO).write_text(text.replace("1e-09", "2e-09"))
    with pytest.raises(
        DamagedCheckpoint, match=r"checkpoint.json is damaged: its content has xxh3 [0-9a-f]{32}, it says "
    ):
        checkpoint.read_info(path)
    (path / checkpoint.INFO).write_text(text[:50])
    with pytest.raises(DamagedCheckpoint, match=r"checkpoint.json is damaged: "):
        checkpoint.read_info(path)
    (path / checkpoint.INFO).write_text(json.dumps({"format": 1}))
    with pytest.raises(CheckpointError, match="has checkpoint format 1; this version reads format 2"):
        checkpoint.read_info(path)


@pytest.mark.parametrize(
    "old",
    [
        {"settings": {"memory": {"enabled": True}}},
        {"settings": {"model": {}}, "memory_scalars": {"step_count": 3}},
    ],
)
def test_checkpoints_from_before_the_renames_are_refused(tmp_path: Path, old: dict[str, object]) -> None:
    path = make(tmp_path / "step-1", **old)
    with pytest.raises(CheckpointError) as refused:
        checkpoint.read_info(path)
    assert not isinstance(refused.value, DamagedCheckpoint)
    assert str(refused.value) == (
        f"{path} was written by a version from before 0.1, whose settings and tensors have other names: "
        "train anew, or export it with that version and import the export with this one"
    )
    assert damage(path, "full") == [str(refused.value)]
    with pytest.raises(DamagedCheckpoint, match="train anew, or export it with that version and import"):
        checkpoint.verify(path, "full")  # as a resume does
