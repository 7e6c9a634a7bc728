"""Every field of the config classes of the libraries that are installed is mapped, harmless or refused, and
each refusal is one.
"""

from __future__ import annotations

import ast
import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from hybridtrain.errors import FormatError
from hybridtrain.formats import megatron_fields
from hybridtrain.formats.families import FAMILIES, HARMLESS, LACKING, MAPPED
from hybridtrain.formats.hf_config import known_of, problems_of, resolve
from tests.hybridtrain.formats.tiny import BASE, THEIRS

import transformers  # isort: skip  (after tiny, which takes it off line)

CASES = {case.partition(",")[0]: case for case in THEIRS}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_field_of_a_config_class_of_transformers_is_named(name: str) -> None:
    kind = transformers.CONFIG_MAPPING[name]
    fields = {field.name for field in dataclasses.fields(kind)}
    assert fields <= known_of(FAMILIES[name])
    mapped = {*MAPPED, *FAMILIES[name].keys, *FAMILIES[name].structure}
    assert not mapped & HARMLESS
    assert not {key for key, _, _ in LACKING} & (mapped | HARMLESS)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_value_of_every_refused_key_is_refused_by_name(name: str) -> None:
    tree: dict[str, Any] = {"model_type": name, **BASE, **THEIRS[CASES[name]], "partial_rotary_factor": 1.0}
    assert problems_of(resolve(tree, Path("config.json"))) == []
    others = {"hidden_act": "gelu", "attention_bias": True, "mlp_bias": True, "is_encoder_decoder": True}
    for key, _, what in LACKING:
        changes = {key: others.get(key, 7), "use_sliding_window": True}
        assert [
            p for p in problems_of(resolve(tree | changes, Path("config.json"))) if p.startswith(f"{key}=")
        ], (key, what)
    problems = problems_of(
        resolve(tree | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, Path("c"))
    )
    assert problems[0].startswith(
        'layer_types=["full_attention", "sliding_attention", "full_attention"]: "full_attention" for each'
    )


def fields_of_megatron(root: Path) -> set[str]:
    """Of its TransformerConfig, read from its source: to import it takes seconds."""
    fields = set()
    classes = {
        "ModelParallelConfig": "model_parallel_config.py",
        "TransformerConfig": "transformer/transformer_config.py",
    }
    for name, file in classes.items():
        tree = ast.parse((root / "core" / file).read_text(encoding="utf-8"))
        (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        fields |= {
            n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
        }
    return fields


@pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")
def test_every_field_of_megatrons_config_is_named() -> None:
    spec = find_spec("megatron")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    fields = fields_of_megatron(Path(next(iter(spec.submodule_search_locations))))
    assert {"softmax_scale", "num_layers", "tensor_model_parallel_size"} < fields
    assert len(fields) > 200
    refused = {key for key, _, _ in megatron_fields.LACKING}
    assert fields - (megatron_fields.MAPPED | megatron_fields.HARMLESS | refused) == set()
    assert not megatron_fields.HARMLESS & (megatron_fields.MAPPED | refused)


def test_a_key_under_two_names_with_two_values_is_refused() -> None:
    tree = {"model_type": "mixtral", **BASE, **THEIRS["mixtral"], "num_experts": 8}
    assert problems_of(resolve(tree, Path("config.json"))) == [
        "num_experts=8 and num_local_experts=4 are the same key"
    ]
    assert problems_of(resolve(tree | {"num_experts": 4}, Path("config.json"))) == []


def test_rotations_of_layers_of_two_kinds_are_refused() -> None:
    tree = {
        "model_type": "qwen3",
        **BASE,
        "rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": None},
    }
    with pytest.raises(Exception, match="rope_parameters"):
        resolve(tree, Path("config.json"))
    with pytest.raises(FormatError, match=r'model_type="nonesuch" is not one of llama, qwen3'):
        resolve({"model_type": "nonesuch"}, Path("config.json"))
