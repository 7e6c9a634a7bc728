"""Settings from TOML and overrides, back to TOML, and every problem at once."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridtrain.errors import SettingsError
from hybridtrain.settings.load import dump_settings, load_settings, parse_settings
from hybridtrain.settings.tree import Settings

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
# TOML holds every character but surrogates
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_read_back_equal(path: Path, tmp_path: Path) -> None:
    settings = load_settings(path)
    (tmp_path / "settings.toml").write_text(dump_settings(settings), encoding="utf-8")
    assert load_settings(tmp_path / "settings.toml") == settings


@given(
    st.fixed_dictionaries(
        {
            "run": st.fixed_dictionaries({"dir": TEXT, "seed": st.integers(0, 2**62)}),
            "data": st.fixed_dictionaries({"source": st.lists(TEXT, max_size=3), "verify": st.booleans()}),
            "optim": st.fixed_dictionaries(
                {
                    "lr": st.floats(1e-300, 9.0),
                    "beta1": st.floats(0, 0.999),
                    "schedule": st.sampled_from(["cosine", "wsd"]),
                }
            ),
            "engram": st.fixed_dictionaries(
                {"orders": st.sampled_from([[2], [2, 3], [3, 5]]), "eps": st.floats(1e-30, 1)}
            ),
            "model": st.fixed_dictionaries(
                {"moe": st.fixed_dictionaries({"gate_scale": st.floats(1e-3, 1e3)})}
            ),
        }
    )
)
def test_any_settings_read_back_equal(tree: dict[str, Any]) -> None:
    settings = parse_settings(tree)
    text = dump_settings(settings)
    assert parse_settings(tomllib.loads(text)) == settings
    assert dump_settings(parse_settings(tomllib.loads(text))) == text


def test_overrides_are_read_as_toml_else_as_text_and_the_last_wins() -> None:
    settings = parse_settings(
        {"train": {"steps": 3}},
        [
            "train.steps=7",
            "train.steps=9",
            "run.dir=runs/a b",
            'model.layers=["attention+moe"]',
            "optim.lr=1e-3",
            "engram.enabled=false",
            "model.moe.num_experts=4",
            "data.path=x=y",
        ],
    )
    assert settings.train.steps == 9
    assert settings.run.dir == "runs/a b"
    assert settings.model.layers == ("attention+moe",)
    assert settings.optim.lr == 1e-3
    assert settings.engram.enabled is False
    assert settings.model.moe.num_experts == 4
    assert settings.data.path == "x=y"


def problems(tree: dict[str, Any], *overrides: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        parse_settings(tree, overrides)
    return caught.value.problems


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.stepz=3", "train.stepz: unknown key; did you mean train.steps?"),
        ("steps=3", "steps: unknown key; did you mean train.steps?"),
        ("optim.num_experts=3", "optim.num_experts: unknown key; did you mean model.moe.num_experts?"),
        ("train.xylophone=3", "train.xylophone: unknown key"),
        ("attention.head_dim=8", "attention.head_dim: unknown key; did you mean model.attention.head_dim?"),
        ("train=3", "train=3: input should be an object"),
        ("train.steps.x=3", "train.steps.x: steps is a value, not a section"),
        ("optim.lr=inf", "optim.lr=Infinity: input should be a finite number"),
        ("optim.eps=nan", "optim.eps=NaN: input should be"),
        ("nonsense", '"nonsense" is not an override; write section.key=value, e.g. train.steps=50'),
        (".steps=3", '".steps=3" is not an override; write section.key=value, e.g. train.steps=50'),
        ("train.steps=many", 'train.steps="many": input should be a valid integer'),
        ("train.steps=2.5", "train.steps=2.5: input should be a valid integer"),
        ("engram.enabled=1", "engram.enabled=1: input should be a valid boolean"),
        ('run.dir="a\\u0000b"', 'run.dir="a\\u0000b": has a NUL character'),
        ('data.source=["a", "\\u0000"]', 'data.source=["a", "\\u0000"]: has a NUL character'),
        ("run.dir=''", 'run.dir="": string should have at least 1 character'),
        ('data.source=["a", ""]', 'data.source=["a", ""]: has an empty entry'),
        ("optim.schedule=linear", "optim.schedule=\"linear\": input should be 'cosine' or 'wsd'"),
        ("optim.beta1=1.5", "optim.beta1=1.5: input should be less than or equal to 1"),
        ("parallel.mem_placement=far", 'parallel.mem_placement="far" is called "strided" now'),
        ("parallel.mem_placement=near", 'parallel.mem_placement="near" is called "contiguous" now'),
        ("memory.fetch=step", "memory.fetch: is called engram.fetch now"),
        ("parallel.dp_shard=-2", "parallel.dp_shard=-2: input should be greater than or equal to -1"),
    ],
)
def test_a_wrong_key_or_value_is_named(override: str, problem: str) -> None:
    found = problems({"train": {"steps": 5}}, override)
    assert any(p.startswith(problem) for p in found), found


def test_all_problems_come_at_once() -> None:
    found = problems({"train": {"stepz": 1, "seq_len": "x"}, "optim": {"lr": 0}}, "nonsense", "engram.head=3")
    assert len(found) == 5
    for start in ('"nonsense" is', "train.stepz:", 'train.seq_len="x"', "optim.lr=0:", "engram.head:"):
        assert sum(p.startswith(start) for p in found) == 1, (start, found)


def test_the_whole_tree_is_dumped() -> None:
    text = dump_settings(Settings())
    for line in ("[run]", "[model.moe]", "num_experts = 8", "orders = [2, 3]", "tie_embeddings = false"):
        assert line in text.splitlines()
