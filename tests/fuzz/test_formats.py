"""Folders of models that somebody else made: config.json, indexes, safetensors files, Megatron's arguments,
with odd values.

Each ends in a message or in a whole import: every value of every stored tensor is in it.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from hybridtrain.checkpoint.stored import StoredTensors
from hybridtrain.data.manifest import TOKENIZER
from hybridtrain.formats import hf_import
from hybridtrain.formats.families import FAMILIES
from hybridtrain.formats.hf_config import known_of
from hybridtrain.formats.hf_export import export_hf
from hybridtrain.formats.hf_import import import_hf
from hybridtrain.formats.megatron_args import from_args, misfits, to_args
from hybridtrain.formats.megatron_fields import HARMLESS, LACKING, MAPPED
from hybridtrain.formats.native import ImportedTokenizer, settings_of_import
from hybridtrain.formats.origin import Origin
from hybridtrain.formats.shards import INDEX, SINGLE, SafetensorsFolder
from hybridtrain.run.run_folder import find_checkpoint
from tests.fuzz.harness import examples, outcome
from tests.hybridtrain.formats.tiny import small_folder
from tests.training import make_data

NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 3, 7, 8, 16, 32, 1 << 31, 1 << 70, 0.0, 0.5, 1.0, -2.5, 1e300, float("nan"), float("inf")]
)
WORDS = st.sampled_from(["", "1", "16", "silu", "gelu", "default", "llama3", "full_attention", "\0"])
SCALARS = st.none() | st.booleans() | NUMBERS | WORDS
LISTS = st.lists(SCALARS, max_size=3) | st.lists(st.sampled_from([0, 1]), max_size=3)
KEYS = st.sampled_from(["rope_theta", "rope_type", "type", "factor", "full_attention", "t", ""])
ODD = SCALARS | LISTS | st.dictionaries(KEYS, SCALARS | LISTS, max_size=3)


@dataclass(frozen=True)
class Given:
    """A folder of a family, its config, the number and the sum of all stored values."""

    folder: Path
    config: dict[str, Any]
    count: int
    total: float


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Given]]:
    root = tmp_path_factory.mktemp("fuzz")
    data = make_data(root / "data")
    out = {}
    for name in FAMILIES:
        one: dict[str, Any] = {
            "qwen3_moe": {"mlp_only_layers": []},
            "glm4_moe": {"first_k_dense_replace": 0},
        }.get(name, {})
        folder = small_folder(name, root / name, data, tie_word_embeddings=False, num_hidden_layers=1, **one)
        values = load_file(folder / SINGLE).values()
        config = json.loads((folder / "config.json").read_text())
        out[name] = Given(
            folder, config, sum(v.numel() for v in values), float(sum(v.double().sum() for v in values))
        )
    tokenizer = ImportedTokenizer(data / TOKENIZER, None)
    with pytest.MonkeyPatch.context() as patch:  # the tokenizer is the same every time
        patch.setattr(hf_import, "ImportedTokenizer", lambda *_: tokenizer)
        patch.setattr(os, "fsync", lambda _: None)
        yield out


def is_whole(run: Path, given: Given) -> bool:
    """Whether an import holds all the values of the given folder."""
    stored = StoredTensors(find_checkpoint(run)[1])
    made_here = ("load_E",) if given.config["model_type"] == "glm4_moe" else ("load_E", "bias_E")
    values = [stored.read(name).double() for name in stored.shapes if not name.endswith(made_here)]
    total = float(sum(value.sum() for value in values))
    return (
        sum(value.numel() for value in values) == given.count
        and abs(total - given.total) < 1e-6 * given.count
    )


def imported(folder: Path, given: Given) -> bool:
    """Whether a folder is imported, whole; else there is a message, and nothing is left."""
    out = folder.with_name("imported")
    shutil.rmtree(out, ignore_errors=True)
    made = outcome(lambda: import_hf(folder, out))
    assert (made is not None) == out.exists()
    assert not list(folder.parent.glob(".*partial"))
    if made is None:
        return False
    assert is_whole(out, given)
    return True


def in_folder(given: Given, root: Path) -> Path:
    """A folder with links to the files of the given one."""
    folder = root / "theirs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in given.folder.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def replace(folder: Path, name: str, content: bytes) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(content)


@examples(40)
@given(data=st.data())
def test_config(data: st.DataObject, folders: dict[str, Given], tmp_path: Path) -> None:
    name = data.draw(st.sampled_from(sorted(folders)))
    case = folders[name]
    keys = sorted({*case.config, *known_of(FAMILIES[name])})
    changes = data.draw(st.dictionaries(st.sampled_from(keys), ODD, min_size=1, max_size=2))
    folder = in_folder(case, tmp_path)
    replace(folder, "config.json", json.dumps(case.config | changes).encode())
    if imported(folder, case):
        shutil.rmtree(tmp_path / "back", ignore_errors=True)
        assert outcome(lambda: export_hf(tmp_path / "imported", tmp_path / "back")) == name


@examples(20)
@given(
    tree=st.recursive(
        ODD,
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2),
        max_leaves=6,
    )
)
def test_config_of_any_shape(tree: Any, folders: dict[str, Given], tmp_path: Path) -> None:
    folder = in_folder(folders["llama"], tmp_path)
    for content in (tree, {"model_type": tree}, {"model_type": "llama", "architectures": tree}):
        replace(folder, "config.json", json.dumps(content).encode())
        assert not imported(folder, folders["llama"])


@examples(25)
@given(data=st.data())
def test_index(data: st.DataObject, folders: dict[str, Given], tmp_path: Path) -> None:
    case = folders["llama"]
    names = sorted(load_file(case.folder / SINGLE))
    folder = in_folder(case, tmp_path)
    (folder / SINGLE).rename(folder / "a.safetensors")
    weight_map: dict[str, Any] = dict.fromkeys(names, "a.safetensors")
    files = (
        st.sampled_from(
            ["a.safetensors", "b.safetensors", "../a.safetensors", "/etc/passwd", "config.json", "", "a\0"]
        )
        | ODD
    )
    weight_map |= data.draw(st.dictionaries(st.sampled_from([*names, "other", ""]), files, max_size=2))
    for key in data.draw(st.sets(st.sampled_from(names), max_size=1)):
        weight_map.pop(key, None)
    tree = data.draw(
        st.sampled_from([{"weight_map": weight_map}]) | st.fixed_dictionaries({"weight_map": ODD}) | ODD
    )
    replace(folder, INDEX, json.dumps(tree).encode())
    read = outcome(lambda: SafetensorsFolder(folder))
    if read is not None:
        assert sorted(read.shapes) == names
        assert weight_map == dict.fromkeys(names, "a.safetensors")


@examples(25)
@given(data=st.data())
def test_bytes_of_weights(data: st.DataObject, folders: dict[str, Given], tmp_path: Path) -> None:
    case = folders["mixtral"]
    content = bytearray((case.folder / SINGLE).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.sampled_from([len(content), len(content) - 1, header, header - 5, 7, 0]))
    folder = in_folder(case, tmp_path)
    replace(folder, SINGLE, bytes(content[:end]))
    imported(folder, case)  # what is not in the header is still there


@pytest.fixture(scope="module")
def arguments() -> dict[str, Any]:
    """Of a model with all that Megatron has, in three layers."""
    model: dict[str, Any] = {"layers": ["attention+dense", "2*attention+moe"], "dim": 16}
    model["moe"] = {"score": "sigmoid", "num_shared": 1, "num_experts": 4}
    model["attention"] = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    settings = settings_of_import(model, Path("out"), 32, "test")
    return vars(to_args(settings, 64, bias=True, implementation="local", origin=Origin()))


@examples(40)
@given(data=st.data())
def test_arguments_of_megatron(data: st.DataObject, arguments: dict[str, Any]) -> None:
    keys = sorted({*MAPPED, *HARMLESS, *arguments, *(key for key, _, _ in LACKING)})
    likely = st.sampled_from(sorted({*MAPPED, *(key for key, _, _ in LACKING)}))
    names, values = likely | st.sampled_from(keys) | st.just("new"), ODD | st.just(torch.ones(2))
    changes = data.draw(st.dictionaries(names, values, min_size=1, max_size=2))
    args: Any = copy.copy(arguments) | changes
    args = data.draw(st.sampled_from([args] * 9 + [[args], None, 1, {1: 2}]))

    def read() -> Any:
        model, problems = from_args(args)
        settings = settings_of_import(model | {"vocab_size": 64}, Path("out"), 32, "args")
        return problems + misfits(settings, biased=False), settings

    made = outcome(read)
    if made is not None and not made[0] and isinstance(args, dict):
        again = vars(to_args(made[1], 64, bias=True, implementation="local", origin=Origin()))
        for key in ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size"):
            assert again[key] == args[key]  # nothing was read as something else
