"""config.json of a Hugging Face folder: read, checked value by value, and resolved with the defaults that
transformers have.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model

from hybridtrain.errors import FormatError, UserError
from hybridtrain.files.untrusted import read_json, validated
from hybridtrain.formats.families import FAMILIES, HARMLESS, LACKING, MAPPED, Family
from hybridtrain.formats.folder import Count, Number, Size, among, is_off, need_transformers

CONFIG, GENERATION = "config.json", "generation_config.json"
DTYPE_KEYS = ("dtype", "torch_dtype")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

_Natural = Annotated[int, Field(ge=0, le=1 << 16)]
_Token = Annotated[int, Field(ge=-1, le=1 << 31)]


def _dtype(value: str) -> str:
    if not isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype):
        raise ValueError("is not a dtype of torch")
    return value


_Dtype = Annotated[str, AfterValidator(_dtype)]
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size"), Size),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "decoder_sparse_step",
        ),
        Count,
    ),
    **dict.fromkeys(
        (
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "num_experts_per_tok",
            "n_group",
            "topk_group",
        ),
        Count,
    ),
    **dict.fromkeys(("n_shared_experts", "first_k_dense_replace"), _Natural),
    **dict.fromkeys(("rms_norm_eps", "routed_scaling_factor", "rope_theta"), Number),
    **dict.fromkeys(("tie_word_embeddings", "norm_topk_prob", "use_qk_norm", "use_sliding_window"), bool),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), dict[str, Any]),
    **dict.fromkeys(("architectures", "layer_types"), list[str]),
    **dict.fromkeys(DTYPE_KEYS, _Dtype),
    "bos_token_id": _Token,
    "eos_token_id": _Token | list[_Token],
    "pad_token_id": _Token,
    "mlp_only_layers": list[int],
    "max_position_embeddings": Annotated[int, Field(ge=1, le=1 << 40)],
}
_NULLABLE = frozenset(
    (
        *(
            "num_key_value_heads",
            "head_dim",
            "rope_theta",
            "rope_parameters",
            "rope_scaling",
            "layer_types",
            "mlp_only_layers",
        ),
        *(*DTYPE_KEYS, *TOKEN_IDS, "architectures", "use_sliding_window"),
    )
)
_Keys: type[BaseModel] = create_model(
    "_Keys",
    __config__=ConfigDict(extra="allow"),
    **cast(Any, {key: (kind | None if key in _NULLABLE else kind, None) for key, kind in _KINDS.items()}),
)


class _Named(BaseModel):
    """The keys that every config.json has."""

    model_type: str
    architectures: list[str] | None = None


class _Rotations(BaseModel):
    """rope_parameters with the defaults of transformers."""

    rope_type: str = "default"
    rope_theta: Number
    partial_rotary_factor: Number | None = None


class _Generation(BaseModel):
    """The keys of generation_config.json that are read."""

    bos_token_id: _Token | None = None
    eos_token_id: _Token | list[_Token] | None = None
    pad_token_id: _Token | None = None


@dataclass(frozen=True)
class Config:
    """tree: the file's own keys and values. values: transformers' config of the keys that are known. told:
    keys that are not.
    """

    tree: dict[str, Any]
    values: Any
    family: Family
    rotations: _Rotations
    told: dict[str, Any]

    @property
    def kinds(self) -> list[str]:
        """ "dense" or "moe" for each layer."""
        return self.family.kinds(self.values)

    @property
    def head_dim(self) -> int:
        return int(
            getattr(self.values, "head_dim", None)
            or self.values.hidden_size // self.values.num_attention_heads
        )

    def get(self, key: str) -> Any:
        return self.head_dim if key == "head_dim" else getattr(self.values, key, None)


def read_config(folder: Path) -> Config:
    """The config of a folder. Raises UserError where the file cannot be read, and as `resolve`."""
    path = folder / CONFIG
    try:
        tree = read_json(path, dict[str, Any])
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return resolve(tree, path)


def resolve(tree: dict[str, Any], path: Path) -> Config:
    """The parsed config.json `path`. Raises UntrustedFileError listing every value of another type than its
    key's, and FormatError listing everything that the architecture has and our model lacks.
    """
    validated(tree, str(path), _Named)
    transformers = need_transformers()
    model_type, family = tree["model_type"], FAMILIES.get(tree["model_type"])
    if model_type not in transformers.CONFIG_MAPPING:
        raise FormatError(
            str(path.parent), [f"model_type={json.dumps(model_type)} is not one of {', '.join(FAMILIES)}"]
        )
    named = (tree.get("architectures") or [None])[0]
    if family is None or named not in (None, family.architecture):
        known = ", ".join(f.architecture for f in FAMILIES.values())
        lacking = lacking_of(_resolved(model_type, tree, path), tree)
        raise FormatError(
            str(path.parent), [f"architecture {named or model_type} is not one of {known}", *lacking]
        )
    validated(tree, str(path), _Keys)
    known_keys = known_of(family)
    values = _resolved(model_type, tree, path)
    rotations = validated(
        getattr(values, "rope_parameters", None) or {}, f"{path}: rope_parameters", _Rotations
    )
    generation = transformers.GenerationConfig._get_default_generation_params()
    told = {
        key: value
        for key, value in tree.items()
        if key not in known_keys and key not in generation and not is_off(value)
    }
    return Config(tree, values, family, rotations, told)


def known_of(family: Family) -> frozenset[str]:
    """The keys of a config.json of the family that are mapped, harmless or refused."""
    aliases = need_transformers().CONFIG_MAPPING[family.name].attribute_map
    names = {
        *MAPPED,
        *HARMLESS,
        *family.keys,
        *family.structure,
        "layer_types",
        *(key for key, _, _ in LACKING),
    }
    return frozenset(
        names
        | {alias for alias, name in aliases.items() if name in names}
        | {aliases[n] for n in names & aliases.keys()}
    )


def problems_of(config: Config) -> list[str]:
    """The features that the config asks for and our model lacks."""
    out = lacking_of(config.values, config.tree)
    types = config.tree.get("layer_types") or getattr(config.values, "layer_types", None)
    if types and (set(types) != {"full_attention"} or len(types) != config.values.num_hidden_layers):
        out.append(
            f'layer_types={json.dumps(types)}: "full_attention" for each of '
            f"{config.values.num_hidden_layers} layers"
        )
    for alias, name in type(config.values).attribute_map.items():
        if alias in config.tree and name in config.tree and config.tree[alias] != config.tree[name]:
            out.append(
                f"{alias}={json.dumps(config.tree[alias])} and {name}={json.dumps(config.tree[name])} are "
                "the same key"
            )
    return out


def lacking_of(values: Any, tree: Mapping[str, Any]) -> list[str]:
    """The same of any of transformers' configs `values`, which was made of `tree`."""
    fields = _fields(type(values))
    found = {key: getattr(values, key) if key in fields else tree.get(key) for key, _, _ in LACKING}
    out = [
        f"{key}={json.dumps(found[key], default=str)}: {what}"
        for key, absent, what in LACKING
        if not among(found[key], absent)
    ]
    rope = getattr(values, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        out.append(f"rope_parameters.rope_type={json.dumps(rope['rope_type'])}: scaled rotations")
    if rope.get("partial_rotary_factor") not in (None, 1):
        out.append(
            f"rope_parameters.partial_rotary_factor={rope['partial_rotary_factor']}: rotations of a part of "
            "each head"
        )
    return out


def generation_ids(folder: Path) -> dict[str, Any]:
    """Ids of special tokens as the folder's generation_config.json has them; empty where there is no such
    file.

    Raises UntrustedFileError where it is not one.
    """
    try:
        return read_json(folder / GENERATION, _Generation).model_dump(exclude_unset=True)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{folder / GENERATION}: cannot be read: {error.strerror}") from None


def _resolved(model_type: str, tree: Mapping[str, Any], path: Path) -> Any:
    """transformers' config of the keys that its class has; others would become attributes of it, whatever
    their names.
    """
    kind = need_transformers().CONFIG_MAPPING[model_type]
    names = {
        *_fields(kind),
        *kind.attribute_map,
        *kind.attribute_map.values(),
        *MAPPED,
        *DTYPE_KEYS,
        "head_dim",
    } - {"model_type"}
    try:
        return kind.from_dict(
            copy.deepcopy({key: value for key, value in tree.items() if key in names})
        )  # which it may write into
    except Exception as error:  # each model type has checks of its own
        raise UserError(f"{path}: transformers refuses it: {error}") from None


def _fields(kind: type) -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(kind))
