"""Checkpoints, run folders and pickles with anything wrong in them: a message or the right tensors, never
code, never a part.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hybridtrain import checkpoint
from hybridtrain.checkpoint.damage import damage
from hybridtrain.checkpoint.files import METADATA
from hybridtrain.checkpoint.stored import LazyTensor, StoredTensors, write_tensors
from hybridtrain.data.compress import read_compression, to_npy
from hybridtrain.files.pickles import _ACTIONS, unpickle
from hybridtrain.formats.torch_dist import COMMON, Region, TorchDist, read_common, write_torch_dist
from hybridtrain.kernels.engram_hash.addressing import Addressing, TableShape
from hybridtrain.run import init_from as weights
from hybridtrain.run.run_folder import SETTINGS, find_checkpoint
from hybridtrain.settings.load import load_settings, parse_settings
from tests.fuzz.harness import Trap, examples, outcome
from tests.hybridtrain.checkpoint.test_history import DESCRIPTION
from tests.hybridtrain.formats.tiny import whole

TENSORS = {
    "model.a": torch.randn(6, 4),
    "model.b": torch.arange(5).to(torch.bfloat16),
    "model.c": torch.tensor(3),
}
ODD: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        1,
        3,
        2**31,
        2**60,
        2**70,
        -(2**70),
        0.5,
        float("nan"),
        "",
        ".",
        "..",
        "/etc/passwd",
        "../x",
        "a\0b",
    ),
    *(
        "x" * 2000,
        "\ud800",
        "1",
        [],
        {},
        [[]] * 3,
        [1, 2],
        {"a": {"b": []}},
        [[[[0]]]],
        {"size": -1},
        {"": None},
        "9" * 5000,
    ),
]
ODDER = [
    *ODD,
    (),
    (2**40, 2**40),
    (-1,),
    torch.Size((0,)),
    torch.float64,
    torch.strided,
    os.system,
    os.path.join,
    b"x",
    1j,
    {1},
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a small checkpoint. Its files are put back after each input."""
    run = tmp_path_factory.mktemp("fuzz") / "run"
    path = run / "checkpoints" / "step-00000003"
    path.mkdir(parents=True)
    files = write_tensors(
        path, {k: LazyTensor(tuple(v.shape), v.dtype, lambda v=v: v) for k, v in TENSORS.items()}
    )
    checkpoint.write_info(
        path, DESCRIPTION | {"step": 3, "files": files, "guard": {"losses": [1.0], "skipped_batches": 0}}
    )
    (run / SETTINGS).write_text('[run]\ndir = "x"\n')
    return path


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of Megatron's format."""
    folder = tmp_path_factory.mktemp("foreign")
    value, chunks = TENSORS["model.a"], []
    for low in (0, 3):
        part = LazyTensor((3, 4), value.dtype, lambda low=low: value[low : low + 3])
        chunks.append((Region("model.a", (6, 4), (low, 0), (3, 4)), part))
    write_torch_dist(
        folder,
        chunks,
        ["extra"],
        {"args": argparse.Namespace(layers=2, dtype=torch.float32), "iteration": 3},
        10**6,
    )
    return folder


def with_file(path: Path, content: bytes, act: Callable[[], Any]) -> Any:
    """What comes of `act` while the file is another."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        return outcome(act)
    finally:
        path.write_bytes(before)


def read_all(path: Path) -> dict[str, Tensor]:
    stored = StoredTensors(path)
    return {name: stored.read(name) for name in stored.shapes}


def right(found: dict[str, Tensor] | None) -> bool:
    """Whether it was refused, or every tensor has its values; one of another name is none of the model's."""
    return found is None or all(torch.equal(value, TENSORS.get(name, value)) for name, value in found.items())


def changed(data: st.DataObject, value: Any, odd: list[Any], depth: int = 0) -> Any:
    """The value with one part of it, at any depth, replaced by an odd one, left out or doubled."""
    parts: list[Any] = []
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = list(vars(value))
    elif isinstance(value, dict):
        parts = list(value)
    elif isinstance(value, list | tuple):
        parts = list(range(len(value)))
    if not parts or (depth and data.draw(st.integers(0, 3)) == 0):
        return data.draw(st.sampled_from(odd))
    part = data.draw(st.sampled_from(parts))
    if dataclasses.is_dataclass(value):
        out = copy.copy(value)
        object.__setattr__(out, part, changed(data, getattr(value, part), odd, depth + 1))
        return out
    if isinstance(value, dict):
        if data.draw(st.integers(0, 4)) == 0:
            key = data.draw(st.sampled_from([o for o in odd if isinstance(o, str)]))
            return {(key if k == part else k): v for k, v in value.items()}
        return value | {part: changed(data, value[part], odd, depth + 1)}
    items = list(value)
    items[part : part + 1] = data.draw(
        st.sampled_from(([], [items[part]] * 2, [changed(data, items[part], odd, depth + 1)]))
    )
    return items if isinstance(value, list) else tuple(items)


def mutated(data: st.DataObject, content: bytes, low: int = 0, high: int | None = None) -> bytes:
    """The content with a few bytes between `low` and `high` changed, and now and then some left out or put
    in.
    """
    out = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(low, (high or len(content)) - 1))
        out[at] = data.draw(
            st.sampled_from([0, 1, 0x2E, 0x52, 0x63, 0x72, 0x7F, 0x80, 0x8E, 0x94, 0xFF])
            | st.integers(0, 255)
        )
    if low == 0 and high is None and data.draw(st.integers(0, 3)) == 0:
        at = data.draw(st.integers(0, len(out)))
        out[at : at + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
    return bytes(out)


def dumped(value: Any, trap: Trap) -> bytes:
    """A pickle of the value; of what cannot be pickled, the trap."""
    try:
        return pickle.dumps(value)
    except Exception:
        return pickle.dumps(trap)


@examples(30)
@given(data=st.data())
def test_an_index_with_an_odd_part(data: st.DataObject, saved: Path, tmp_path: Path) -> None:
    trap = Trap(tmp_path / "sprung")
    index = changed(data, pickle.loads((saved / METADATA).read_bytes()), [*ODDER, *[trap] * 8])
    assert right(with_file(saved / METADATA, dumped(index, trap), lambda: read_all(saved)))
    assert not trap.sprang


@examples(15)
@given(data=st.data())
def test_an_index_with_odd_bytes(data: st.DataObject, saved: Path) -> None:
    content = mutated(data, (saved / METADATA).read_bytes())
    assert right(with_file(saved / METADATA, content, lambda: read_all(saved)))


@examples(15)
@given(data=st.data())
def test_instructions_in_any_order(data: st.DataObject) -> None:
    names = [b"\x8c\x02os", b"\x8c\x06system", b"cos\nsystem\n", b"K\x01", b"X\xff\xff\xff\xff"]
    atoms = [bytes([code]) for code in _ACTIONS] + names
    content = b"\x80\x04" + b"".join(data.draw(st.lists(st.sampled_from(atoms), max_size=40))) + b"."
    outcome(lambda: unpickle(content, "it", None, persistent=True))


@examples(10)
@given(data=st.data())
def test_a_file_of_tensors_with_odd_bytes_beside_the_tensors(data: st.DataObject, saved: Path) -> None:
    stored, file = (
        StoredTensors(saved),
        data.draw(st.sampled_from(sorted(p.name for p in saved.glob("*.distcp")))),
    )
    for name in TENSORS:
        stored.read(name)
    chunks = {index.fqn: chunk for index, chunk in stored._found.items() if chunk.file.name == file}
    spans = [(chunk.start, chunk.start + TENSORS[name].nbytes) for name, chunk in chunks.items()]
    content = (saved / file).read_bytes()
    new = bytearray(mutated(data, content, 0, len(content)))
    for low, high in spans:
        new[low:high] = content[low:high]
    found = with_file(
        saved / file, bytes(new), lambda: read_all(saved)
    )  # strides may be others: checksums are for that
    assert found is None or {k: (v.shape, v.dtype) for k, v in found.items()} == {
        k: (v.shape, v.dtype) for k, v in TENSORS.items()
    }


@examples(20)
@given(data=st.data())
def test_a_description_with_an_odd_part(data: st.DataObject, saved: Path) -> None:
    info = {k: v for k, v in checkpoint.read_info(saved).items() if k != "xxh3"}
    before = (saved / checkpoint.INFO).read_bytes()
    odd = changed(data, info, ODD)
    checkpoint.write_info(saved, odd if isinstance(odd, dict) else {"format": checkpoint.FORMAT, "x": odd})
    try:
        assert right(outcome(lambda: read_all(saved)))
        assert all(isinstance(problem, str) for problem in damage(saved, "full"))
        outcome(lambda: parse_settings(checkpoint.read_info(saved)["settings"]))
    finally:
        (saved / checkpoint.INFO).write_bytes(before)


@examples(10)
@given(data=st.data())
def test_a_compression_map_of_anything(data: st.DataObject, tmp_path: Path) -> None:
    good = to_npy(np.arange(6, dtype=np.int64))
    header: dict[str, Any] = changed(data, {"descr": "<i8", "fortran_order": False, "shape": (6,)}, ODD)
    kind = data.draw(st.sampled_from(["bytes", "header", "object"]))
    stream = io.BytesIO()
    if kind == "object":
        np.save(stream, np.array([Trap(tmp_path / "sprung")]), allow_pickle=True)
    elif kind == "header":
        text = repr(header).encode("utf-8", "replace")[:60_000] + b"\n"
        stream.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + good[-48:])
    path = tmp_path / "compression.npy"
    path.write_bytes(stream.getvalue() or mutated(data, good))
    found = outcome(lambda: read_compression(path, 10))
    assert found is None or (found.dtype == np.int64 and found.shape == (6,))
    assert not (tmp_path / "sprung").exists()


LINES = [
    'dir = "memory://x"',
    "[checkpoint]",
    "[[checkpoint]]",
    "checkpoint = 3",
    "=",
    "\x00",
    "dir = 1",
    'dir = ".."',
    "\ud800",
]
LINES += [
    "a = " + "[" * 3000,
    ".".join("a" * 300) + " = 1",
    "checkpoint.dir = 'nowhere://x'",
    "x = " + "9" * 5000,
    "[model]",
    "dim = -1",
]


@examples(10)
@given(lines=st.lists(st.sampled_from(LINES), max_size=5))
def test_settings_of_anything(lines: list[str], saved: Path) -> None:
    run = saved.parent.parent
    text = "\n".join(lines).encode("utf-8", "replace")
    found = with_file(run / SETTINGS, text, lambda: find_checkpoint(run))
    assert found in (None, (run, saved))
    with_file(run / SETTINGS, text, lambda: load_settings(run / SETTINGS))


@examples(15)
@given(data=st.data())
def test_an_addressing_with_an_odd_part(data: st.DataObject) -> None:
    settings = parse_settings(
        {"model": {"layers": ["engram+attention+dense"]}, "engram": {"rows_per_head": 11, "heads": 2}}
    )
    compression = np.arange(20)
    good = Addressing.draw(TableShape((0,), settings.engram.orders, 2, 11), compression, 3)
    odd = changed(data, json.loads(good.to_json()), ODD)
    text = data.draw(st.sampled_from([json.dumps(odd), json.dumps(odd), good.to_json()[:-5], "[" * 100_000]))
    stored = SimpleNamespace(path="it", shapes={"table.rows": (good.num_rows, settings.engram.head_dim)})
    info = {"addressing": text}
    found = outcome(lambda: weights.read_addressing(info, settings, compression, cast(StoredTensors, stored)))
    assert found is None or (found.num_rows == good.num_rows and found.layers == (0,))


@examples(15)
@given(data=st.data())
def test_megatrons_index_and_arguments_with_an_odd_part(
    data: st.DataObject, foreign: Path, tmp_path: Path
) -> None:
    trap = Trap(tmp_path / "sprung")
    index = changed(data, pickle.loads((foreign / METADATA).read_bytes()), [*ODDER, *[trap] * 8])

    def read() -> dict[str, Tensor]:
        weights = TorchDist(foreign)
        return {key: whole(weights, key) for key in weights.shapes}

    assert right(with_file(foreign / METADATA, dumped(index, trap), read))
    stream = io.BytesIO()
    common = changed(data, {"args": {"layers": 2, "x": [1, {"y": 2}]}, "iteration": 3}, [*ODDER, *[trap] * 8])
    if isinstance(common, dict) and isinstance(common.get("args"), dict):
        common["args"] = argparse.Namespace(**{str(k): v for k, v in common["args"].items()})
    torch.save(common, stream)
    content = stream.getvalue() if data.draw(st.booleans()) else mutated(data, stream.getvalue())
    found = with_file(foreign / COMMON, content, lambda: read_common(foreign))
    json.dumps(found, default=str)
    assert not trap.sprang
