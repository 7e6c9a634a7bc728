"""Megatron-LM's arguments (`args` in common.pt) as our settings of the same model, and back."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field

from hybridtrain.console import say
from hybridtrain.errors import FormatError
from hybridtrain.files.untrusted import validated
from hybridtrain.formats.folder import Count, Number, Size, among, is_off
from hybridtrain.formats.megatron_fields import ALIASES, CARRIED, HARMLESS, LACKING, MAPPED
from hybridtrain.formats.megatron_names import TRANSFORMER_ENGINE
from hybridtrain.formats.native import model_tree, setting
from hybridtrain.formats.origin import Origin
from hybridtrain.formats.torch_dist import COMMON
from hybridtrain.settings.layers import layer_specs
from hybridtrain.settings.tree import Settings

NAME = "Megatron-core's GPT model"

_KEYS = {  # argument to setting below `model`
    "hidden_size": "dim",
    "num_attention_heads": "attention.num_heads",
    "num_query_groups": "attention.num_kv_heads",
    "kv_channels": "attention.head_dim",
    "rotary_base": "attention.rope_theta",
    "qk_layernorm": "attention.qk_norm",
    "norm_epsilon": "norm_eps",
    "ffn_hidden_size": "dense.hidden",
}
_MOE_KEYS = {
    "num_experts": "moe.num_experts",
    "moe_router_topk": "moe.top_k",
    "moe_ffn_hidden_size": "moe.hidden",
    "moe_router_score_function": "moe.score",
}
_CONSTANTS = {  # arguments of every model of ours
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "position_embedding_type": "rope",
    "add_position_embedding": True,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "apply_layernorm_1p": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}

_REQUIRED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "ffn_hidden_size",
    "untie_embeddings_and_output_weights",
)


def _frequency(value: Any) -> Any:
    """One MoE layer in so many, or 0 or 1 for each layer."""
    plain = [value] if type(value) is int else value
    least, most = (1, 1 << 16) if plain is not value else (0, 1)
    if not isinstance(plain, list) or not all(
        type(number) is int and least <= number <= most for number in plain
    ):
        raise ValueError("must be a number from 1 on, or a list with 0 or 1 for each layer")
    return value


class _Args(BaseModel):
    """The arguments that are read, without those that are None."""

    num_layers: Count
    hidden_size: Size
    num_attention_heads: Count
    ffn_hidden_size: Size
    untie_embeddings_and_output_weights: bool
    group_query_attention: bool = False
    num_query_groups: Count | None = None
    kv_channels: Count | None = None
    rotary_base: Number = 10_000  # defaults are Megatron-LM's
    qk_layernorm: bool = False
    norm_epsilon: Number = 1e-5
    softmax_scale: Number | None = None
    max_position_embeddings: Annotated[int, Field(ge=1, le=1 << 40)] | None = None
    num_experts: Annotated[int, Field(ge=0, le=1 << 16)] = 0
    moe_router_topk: Count = 2
    moe_ffn_hidden_size: Size | None = None
    moe_shared_expert_intermediate_size: Annotated[int, Field(ge=0, le=1 << 24)] = 0
    moe_layer_freq: Annotated[Any, AfterValidator(_frequency)] = 1
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    moe_router_pre_softmax: bool = False
    moe_router_topk_scaling_factor: Number | None = None
    moe_router_num_groups: Count | None = None
    moe_router_group_topk: Annotated[int, Field(ge=0, le=1 << 16)] = 0
    moe_router_enable_expert_bias: bool = False
    moe_router_bias_update_rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-3
    moe_router_load_balancing_type: str | list[str] = "aux_loss"

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads


def said_of(args: Any, source: str) -> dict[str, Any]:
    """Arguments by name, under their older names, without those that are None.

    Raises FormatError where `args` is neither a namespace nor a dict, lacks what every model has, or has one
    thing under two names with two values.
    """
    if isinstance(args, Namespace):
        args = vars(args)
    if not isinstance(args, dict) or not all(isinstance(key, str) for key in args):
        raise FormatError(source, [f"they are {type(args).__name__}, must be a namespace or a dict of names"])
    said = {key: value for key, value in args.items() if value is not None and key not in ALIASES}
    problems = []
    for field, argument in ALIASES.items():
        value = args.get(field)
        if value is not None and not among(said.setdefault(argument, value), (value,)):
            problems.append(
                f"{field}={_show(value)} and {argument}={_show(said[argument])} are the same argument"
            )
    if among(said.get("disable_bias_linear"), (True, False)):
        said.setdefault("add_bias_linear", not said["disable_bias_linear"])
    problems += [f"{key} is missing" for key in _REQUIRED if key not in said]
    if problems:
        raise FormatError(source, problems)
    return said


def from_args(args: Any) -> tuple[dict[str, Any], list[str]]:
    """(the settings' section `model` without vocab_size, the features that the arguments ask for and our
    model lacks).

    Arguments that no table knows are printed. Raises as `said_of`, and UntrustedFileError listing every value
    of another type.
    """
    source = f"args in {COMMON}"
    said = said_of(args, source)
    read = validated({key: value for key, value in said.items() if key in _Args.model_fields}, source, _Args)
    problems = [
        f"{key}={_show(said[key])}: {what}"
        for key, absent, what in LACKING
        if not among(said.get(key), absent)
    ]
    if read.softmax_scale is not None and not math.isclose(
        read.softmax_scale, read.head_dim**-0.5, rel_tol=1e-6
    ):
        usual = f"1 / sqrt(kv_channels) = {read.head_dim**-0.5:.6g}"
        problems.append(f"softmax_scale={read.softmax_scale}: attention scores of another scale than {usual}")
    unknown = {
        k: v
        for k, v in said.items()
        if k not in MAPPED | HARMLESS | {key for key, _, _ in LACKING} and not is_off(v)
    }
    if unknown:
        say(
            f"{source}: not known here, and taken for harmless: "
            f"{', '.join(f'{k}={_show(v)[:60]}' for k, v in unknown.items())}"
        )
    values = {ours: getattr(read, key) for key, ours in _KEYS.items()}
    values |= {
        "attention.head_dim": read.head_dim,
        "tie_embeddings": not read.untie_embeddings_and_output_weights,
    }
    if not read.group_query_attention or read.num_query_groups is None:
        values["attention.num_kv_heads"] = read.num_attention_heads
    kinds = ["dense"] * read.num_layers
    if read.num_experts:
        kinds = _kinds(read.moe_layer_freq, read.num_layers)
        values |= {ours: getattr(read, key) for key, ours in _MOE_KEYS.items()}
        values["moe.hidden"] = read.moe_ffn_hidden_size or read.ffn_hidden_size
        if len(kinds) != read.num_layers:
            problems.append(
                f"moe_layer_freq={_show(read.moe_layer_freq)}: a number, or 0 or 1 for each of "
                f"{read.num_layers} layers"
            )
        routing, lacking = _routing(read)
        values |= routing
        problems += lacking
    return model_tree(values, kinds), problems


def _kinds(frequency: int | list[int], num_layers: int) -> list[str]:
    """The kind of each layer: one in so many is MoE, from the first on; or a 0 or 1 for each layer."""
    if isinstance(frequency, int):
        return ["dense" if i % frequency else "moe" for i in range(num_layers)]
    return ["moe" if is_moe else "dense" for is_moe in frequency]


def _routing(read: _Args) -> tuple[dict[str, Any], list[str]]:
    """Settings of the router and of shared experts, and what is lacking."""
    problems = []
    width, shared = read.moe_ffn_hidden_size or read.ffn_hidden_size, read.moe_shared_expert_intermediate_size
    balancing = read.moe_router_load_balancing_type
    if "sinkhorn" in ([balancing] if isinstance(balancing, str) else balancing):
        problems.append(f"moe_router_load_balancing_type={_show(balancing)}: routing by Sinkhorn's algorithm")
    if shared % width:
        problems.append(
            f"moe_shared_expert_intermediate_size={shared}: shared experts as wide as {width} or a multiple "
            "of it"
        )
    sigmoid = read.moe_router_score_function == "sigmoid"
    values = {
        "moe.num_shared": shared // width,
        "moe.normalize_gates": read.moe_router_topk > 1 if sigmoid else not read.moe_router_pre_softmax,
        "moe.gate_scale": read.moe_router_topk_scaling_factor or 1.0,
        "moe.bias_rate": read.moe_router_bias_update_rate if read.moe_router_enable_expert_bias else 0.0,
    }
    if read.moe_router_group_topk:
        values |= {
            "moe.num_groups": read.moe_router_num_groups or 1,
            "moe.top_groups": read.moe_router_group_topk,
        }
    return values, problems


def carried(args: Any) -> dict[str, Any]:
    """The arguments that an export gives back."""
    said = said_of(args, f"args in {COMMON}")
    return {key: said[key] for key in CARRIED if _is_plain(said.get(key))}


def _is_plain(value: Any) -> bool:
    """Whether it is a value that JSON has, or a list of such."""
    parts = value if isinstance(value, list) else [value]
    return all(isinstance(part, bool | int | float | str) for part in parts)


def to_args(settings: Settings, rows: int, bias: bool, implementation: str, origin: Origin) -> Namespace:
    """The arguments of a model that has no misfits, with `rows` in its embedding and, with `bias`, selection
    biases.

    Arguments that training does not change are as they were imported.
    """
    model, moe = settings.model, settings.model.moe
    kinds = [spec.feedforward for spec in layer_specs(settings)]
    said = {key: setting(model, ours) for key, ours in _KEYS.items()} | _CONSTANTS
    said |= {
        "num_layers": len(kinds),
        "group_query_attention": model.attention.num_kv_heads < model.attention.num_heads,
        "untie_embeddings_and_output_weights": not model.tie_embeddings,
        "padded_vocab_size": rows,
        "seq_length": settings.train.seq_len,
        "transformer_impl": implementation,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "ckpt_format": "torch_dist",
        "no_save_optim": True,
        "no_save_rng": True,
    }
    if float(model.attention.rope_theta).is_integer():
        said["rotary_base"] = int(model.attention.rope_theta)  # what its command line takes
    if "moe" in kinds:
        said |= {key: setting(model, ours) for key, ours in _MOE_KEYS.items()}
        said |= {
            "moe_layer_freq": 1 if "dense" not in kinds else [int(kind == "moe") for kind in kinds],
            "moe_shared_expert_intermediate_size": moe.num_shared * moe.hidden or None,
            "moe_router_pre_softmax": moe.score == "softmax" and not moe.normalize_gates,
            "moe_router_topk_scaling_factor": moe.gate_scale if moe.gate_scale != 1 else None,
            "moe_router_num_groups": moe.num_groups if moe.num_groups > 1 else None,
            "moe_router_group_topk": moe.top_groups if moe.num_groups > 1 else None,
            "moe_router_enable_expert_bias": bias,
            "moe_router_dtype": "fp32",
            "moe_grouped_gemm": implementation == TRANSFORMER_ENGINE,
        }
    trained = {"moe_router_bias_update_rate": moe.bias_rate} if bias else {}
    said |= {key: value for key, value in (origin.args or {}).items() if key in CARRIED} | trained
    return Namespace(**said | {"max_position_embeddings": origin.longest(settings.train.seq_len)})


def misfits(settings: Settings, biased: bool) -> list[str]:
    """Why Megatron's model is another than that of the settings; `biased`: some router's selection bias is
    not zero.
    """
    moe = settings.model.moe
    out: list[str] = []
    if "moe" not in [spec.feedforward for spec in layer_specs(settings)]:
        return out
    if moe.capacity:
        out.append(f"model.moe.capacity={moe.capacity}: {NAME} drops tokens by the batch, if at all")
    if moe.score == "softmax" and biased:
        out.append(
            f"the routers have selection biases (model.moe.bias_rate); {NAME} has them with "
            'model.moe.score="sigmoid"'
        )
    if moe.score == "sigmoid" and moe.normalize_gates != (moe.top_k > 1):
        out.append(
            f"model.moe.normalize_gates={_show(moe.normalize_gates)}: {NAME} has {_show(moe.top_k > 1)} with "
            f"top_k={moe.top_k}"
        )
    if moe.score == "softmax" and moe.normalize_gates and moe.top_k == 1:
        out.append(f"model.moe.normalize_gates=true: {NAME} has false with top_k=1")
    if moe.num_groups > 1:
        best = min(2, moe.num_experts // moe.num_groups)
        if moe.top_k // moe.top_groups != best:
            out.append(
                f"model.moe.top_groups={moe.top_groups}: {NAME} scores a group by its best top_k // "
                f"top_groups = {moe.top_k // moe.top_groups} experts, ours by its best {best}"
            )
        if moe.score == "softmax" and moe.normalize_gates:
            out.append(
                f"model.moe.num_groups={moe.num_groups}: {NAME} scores groups by logits where gates of a "
                "softmax sum to one"
            )
    return out


def _show(value: Any) -> str:
    return json.dumps(value, default=str)
