"""What Megatron-LM's arguments (`args` in common.pt) say of a model, and our settings for it; both directions."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from hybridtrain.errors import FormatError
from hybridtrain.formats.megatron_names import TRANSFORMER_ENGINE
from hybridtrain.formats.ours import model_tree, setting
from hybridtrain.formats.torch_dist import COMMON
from hybridtrain.settings import Settings, layer_specs, memory_layers

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

# What the arguments may say that our model has not: argument, the values that mean its absence, and what it is.
LACKING: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("multi_latent_attention", (None, False), "multi-head latent attention (MLA): keys and values here have full width"),
    ("add_bias_linear", (None, False), "biases"),
    ("add_qkv_bias", (None, False), "biases of queries, keys and values"),
    ("normalization", (None, "RMSNorm"), "norms other than RMSNorm"),
    ("apply_layernorm_1p", (None, False), "norm weights less one"),
    ("apply_residual_connection_post_layernorm", (None, False), "the residual stream after its norm"),
    ("swiglu", (None, True), "an activation other than SwiGLU"),
    ("activation_func_clamp_value", (None,), "a bound on the activation"),
    ("glu_linear_offset", (None, 0), "an offset in the activation"),
    ("position_embedding_type", (None, "rope"), "positions other than rotary ones"),
    ("rotary_percent", (None, 1), "rotations of a part of each head"),
    ("rotary_interleaved", (None, False), "rotations of neighbours; those of halves are read"),
    ("rotary_seq_len_interpolation_factor", (None, 1), "scaled rotations"),
    ("use_rope_scaling", (None, False), "scaled rotations"),
    ("no_rope_freq", (None,), "layers without positions"),
    ("qk_l2_norm", (None, False), "a norm of queries and keys without weights"),
    ("attention_output_gate", (None, False), "a gate after attention"),
    ("softmax_type", (None, "vanilla"), "attention with a sink"),
    ("window_size", (None,), "attention to a sliding window"),
    ("experimental_attention_variant", (None,), "mixers other than attention"),
    ("linear_attention_type", (None,), "mixers other than attention"),
    ("linear_attention_freq", (None,), "mixers other than attention"),
    ("is_hybrid_model", (None, False), "mixers other than attention"),
    ("hybrid_override_pattern", (None,), "mixers other than attention"),
    ("heterogeneous_layers_config_path", (None,), "layers of different shapes"),
    ("heterogeneous_layers_config_encoded_json", (None, ""), "layers of different shapes"),
    ("mtp_num_layers", (None, 0), "heads that predict further tokens"),
    ("moe_shared_expert_gate", (None, False), "a gate on the shared experts"),
    ("moe_latent_size", (None,), "experts of another width than the stream"),
    ("moe_apply_probs_on_input", (None, False), "gates before the experts"),
    ("moe_expert_capacity_factor", (None,), "experts that drop tokens by the batch"),
    ("moe_router_topk_limited_devices", (None,), "groups of experts by device"),
    ("moe_router_score_function", (None, "softmax", "sigmoid"), "scores other than softmax and sigmoid"),
)

_DEFAULTS: Mapping[str, Any] = {  # of Megatron-LM, for arguments that a checkpoint lacks
    "qk_layernorm": False,
    "norm_epsilon": 1e-5,
    "rotary_base": 10_000,
    "moe_router_score_function": "softmax",
    "moe_layer_freq": 1,
    "moe_router_bias_update_rate": 1e-3,
}
_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "untie_embeddings_and_output_weights")


def from_args(args: Namespace) -> tuple[dict[str, Any], list[str]]:
    """(the settings' section `model` but for vocab_size, what the arguments ask for and our model has not).

    Raises FormatError where they lack what every model has.
    """
    said = {**_DEFAULTS, **{key: value for key, value in vars(args).items() if value is not None}}
    if missing := [key for key in _REQUIRED if key not in said]:
        raise FormatError(f"args in {COMMON}", [f"{key} is missing" for key in missing])
    problems = [f"{key}={_show(said[key])}: {what}" for key, absent, what in LACKING if said.get(key) not in absent]
    if not said.get("kv_channels"):
        said["kv_channels"] = said["hidden_size"] // said["num_attention_heads"]
    if not said.get("group_query_attention"):
        said["num_query_groups"] = said["num_attention_heads"]
    values = {ours: said[key] for key, ours in _KEYS.items() if key in said}
    values["tie_embeddings"] = not said["untie_embeddings_and_output_weights"]
    kinds = ["dense"] * said["num_layers"]
    if said.get("num_experts"):
        kinds = _kinds(said["moe_layer_freq"], said["num_layers"])
        said["moe_ffn_hidden_size"] = said.get("moe_ffn_hidden_size") or said["ffn_hidden_size"]
        values |= {ours: said[key] for key, ours in _MOE_KEYS.items()}
        if len(kinds) != said["num_layers"]:
            problems.append(
                f"moe_layer_freq={_show(said['moe_layer_freq'])}: a number, or 0 or 1 for each of {said['num_layers']} layers"
            )
        routing, lacking = _routing(said)
        values |= routing
        problems += lacking
    return model_tree(values, kinds), problems


def _kinds(frequency: Any, num_layers: int) -> list[str]:
    """What each layer is: one in so many is MoE, from the first on; or it is said layer by layer, 0 or 1."""
    if isinstance(frequency, int):
        return ["dense" if i % frequency else "moe" for i in range(num_layers)]
    return ["moe" if is_moe else "dense" for is_moe in frequency]


def _routing(said: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings of the router and of shared experts, and what is lacking."""
    problems = []
    score, width = said["moe_router_score_function"], said["moe_ffn_hidden_size"]
    shared = said.get("moe_shared_expert_intermediate_size") or 0
    if said.get("moe_router_load_balancing_type") == "sinkhorn":
        problems.append('moe_router_load_balancing_type="sinkhorn": routing by Sinkhorn\'s algorithm')
    if shared % width:
        problems.append(f"moe_shared_expert_intermediate_size={shared}: shared experts as wide as {width} or a multiple of it")
    values = {
        "moe.num_shared": shared // width,
        "moe.normalize_gates": said["moe_router_topk"] > 1 if score == "sigmoid" else not said.get("moe_router_pre_softmax"),
        "moe.gate_scale": said.get("moe_router_topk_scaling_factor") or 1.0,
        "moe.bias_rate": said["moe_router_bias_update_rate"] if said.get("moe_router_enable_expert_bias") else 0.0,
    }
    if said.get("moe_router_group_topk"):
        values |= {"moe.num_groups": said.get("moe_router_num_groups") or 1, "moe.top_groups": said["moe_router_group_topk"]}
    return values, problems


def to_args(settings: Settings, rows: int, bias: bool, implementation: str) -> Namespace:
    """The arguments of a model that has no misfits, with `rows` in its embedding and, with `bias`, selection biases."""
    model, moe = settings.model, settings.model.moe
    kinds = [spec.feedforward for spec in layer_specs(settings)]
    said = {key: setting(model, ours) for key, ours in _KEYS.items()} | _CONSTANTS
    said |= {
        "num_layers": len(kinds),
        "group_query_attention": model.attention.num_kv_heads < model.attention.num_heads,
        "untie_embeddings_and_output_weights": not model.tie_embeddings,
        "padded_vocab_size": rows,
        "seq_length": settings.train.seq_len,
        "max_position_embeddings": settings.train.seq_len,
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
            "moe_router_bias_update_rate": moe.bias_rate,
            "moe_router_dtype": "fp32",
            "moe_grouped_gemm": implementation == TRANSFORMER_ENGINE,
        }
    return Namespace(**said)


def misfits(settings: Settings, biased: bool) -> list[str]:
    """Why Megatron's model is another than that of the settings; `biased`: some router's selection bias is not zero."""
    moe, out = settings.model.moe, []
    if layers := memory_layers(settings):
        out.append(f"layers {', '.join(map(str, layers))} have a lookup memory; {NAME} has none")
    if "moe" not in [spec.feedforward for spec in layer_specs(settings)]:
        return out
    if moe.capacity:
        out.append(f"model.moe.capacity={moe.capacity}: {NAME} drops tokens by the batch, if at all")
    if moe.score == "softmax" and biased:
        out.append(f'the routers have selection biases (model.moe.bias_rate); {NAME} has them with model.moe.score="sigmoid"')
    if moe.score == "sigmoid" and moe.normalize_gates != (moe.top_k > 1):
        out.append(
            f"model.moe.normalize_gates={_show(moe.normalize_gates)}: {NAME} has {_show(moe.top_k > 1)} with top_k={moe.top_k}"
        )
    if moe.score == "softmax" and moe.normalize_gates and moe.top_k == 1:
        out.append(f"model.moe.normalize_gates=true: {NAME} has false with top_k=1")
    if moe.num_groups > 1:
        best = min(2, moe.num_experts // moe.num_groups)
        if moe.top_k // moe.top_groups != best:
            out.append(
                f"model.moe.top_groups={moe.top_groups}: {NAME} scores a group by its best top_k // top_groups = "
                f"{moe.top_k // moe.top_groups} experts, ours by its best {best}"
            )
        if moe.score == "softmax" and moe.normalize_gates:
            out.append(f"model.moe.num_groups={moe.num_groups}: {NAME} scores groups by logits where gates of a softmax sum to one")
    return out


def _show(value: Any) -> str:
    return json.dumps(value, default=str)
