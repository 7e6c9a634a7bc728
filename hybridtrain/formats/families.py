"""The published architectures that our model can take, as tables: settings by config key, tensors by name,
keys that are refused.

One table serves both directions. A family is what transformers calls a model type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_ATTENTION = {
    "mixer_norm.weight": "input_layernorm.weight",
    "mixer.wq.weight": "self_attn.q_proj.weight",
    "mixer.wk.weight": "self_attn.k_proj.weight",
    "mixer.wv.weight": "self_attn.v_proj.weight",
    "mixer.wo.weight": "self_attn.o_proj.weight",
    "mixer.q_norm.weight": "self_attn.q_norm.weight",
    "mixer.k_norm.weight": "self_attn.k_norm.weight",
    "feedforward_norm.weight": "post_attention_layernorm.weight",
}
_DENSE = {
    "feedforward.w_gate.weight": "mlp.gate_proj.weight",
    "feedforward.w_up.weight": "mlp.up_proj.weight",
    "feedforward.w_down.weight": "mlp.down_proj.weight",
}
_EXPERTS = {
    "feedforward.router.weight": "mlp.gate.weight",
    "feedforward.experts.w_gate": "mlp.experts.{expert}.gate_proj.weight",
    "feedforward.experts.w_up": "mlp.experts.{expert}.up_proj.weight",
    "feedforward.experts.w_down": "mlp.experts.{expert}.down_proj.weight",
}
_MIXTRAL_EXPERTS = {
    "feedforward.router.weight": "block_sparse_moe.gate.weight",
    "feedforward.experts.w_gate": "block_sparse_moe.experts.{expert}.w1.weight",
    "feedforward.experts.w_up": "block_sparse_moe.experts.{expert}.w3.weight",
    "feedforward.experts.w_down": "block_sparse_moe.experts.{expert}.w2.weight",
}
_BIASED_AND_SHARED = {
    "feedforward.router.bias_E": "mlp.gate.e_score_correction_bias",
    "feedforward.shared.w_gate.weight": "mlp.shared_experts.gate_proj.weight",
    "feedforward.shared.w_up.weight": "mlp.shared_experts.up_proj.weight",
    "feedforward.shared.w_down.weight": "mlp.shared_experts.down_proj.weight",
}
OUTSIDE = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}

_KEYS = {  # config key to setting below `model`
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_attention_heads": "attention.num_heads",
    "num_key_value_heads": "attention.num_kv_heads",
    "head_dim": "attention.head_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
_ALL_PAIRS = {"moe.capacity": 0.0}  # no expert drops a token
_SOFTMAX = {
    "moe.score": "softmax",
    "moe.num_shared": 0,
    "moe.gate_scale": 1.0,
    "moe.num_groups": 1,
    "moe.top_groups": 1,
    **_ALL_PAIRS,
}


@dataclass(frozen=True)
class Family:
    """One published architecture.

    keys: config key to setting, both below their roots. fixed: settings that the architecture has in one form
    only. layer: our name of a layer's tensor to theirs, `{expert}` once per expert. kinds: "dense" or "moe"
    per layer from a config; arrange: the config keys that say so, or None where it cannot; structure: the
    keys that `kinds` reads.
    """

    name: str
    architecture: str
    keys: Mapping[str, str]
    fixed: Mapping[str, Any]
    layer: Mapping[str, str]
    kinds: Callable[[Any], list[str]]
    arrange: Callable[[Sequence[str]], dict[str, Any] | None]
    pattern: str  # what `arrange` can say, in words
    structure: tuple[str, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)  # config values of an export

    def their_names(self, name: str, num_experts: int) -> tuple[str, ...]:
        """Their tensors for our tensor `name`: one, one per expert, or none where the architecture has no
        such thing.
        """
        if name in OUTSIDE:
            return (OUTSIDE[name],)
        _, layer, rest = name.split(".", 2)
        theirs = self.layer.get(rest)
        if theirs is None:
            return ()
        each = range(num_experts) if "{expert}" in theirs else range(1)
        return tuple(f"model.layers.{layer}.{theirs.format(expert=expert)}" for expert in each)


def _all(kind: str) -> dict[str, Any]:
    return {
        "kinds": lambda config: [kind] * config.num_hidden_layers,
        "arrange": lambda kinds: {} if set(kinds) == {kind} else None,
        "pattern": f"every layer {kind}",
    }


def _qwen3_moe_kinds(config: Any) -> list[str]:
    step, dense = config.decoder_sparse_step, config.mlp_only_layers
    return ["dense" if i in dense or (i + 1) % step else "moe" for i in range(config.num_hidden_layers)]


def _dense_first(kinds: Sequence[str]) -> dict[str, Any] | None:
    first = next((i for i, kind in enumerate(kinds) if kind == "moe"), len(kinds))
    return {"first_k_dense_replace": first} if "dense" not in kinds[first:] else None


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            keys={**_KEYS, "intermediate_size": "dense.hidden"},
            fixed={"attention.qk_norm": False},
            layer=_ATTENTION | _DENSE,
            **_all("dense"),
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            keys={**_KEYS, "intermediate_size": "dense.hidden"},
            fixed={"attention.qk_norm": True},
            layer=_ATTENTION | _DENSE,
            **_all("dense"),
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            keys={
                **_KEYS,
                "intermediate_size": "moe.hidden",
                "num_local_experts": "moe.num_experts",
                "num_experts_per_tok": "moe.top_k",
            },
            fixed={"attention.qk_norm": False, "moe.normalize_gates": True, **_SOFTMAX},
            layer=_ATTENTION | _MIXTRAL_EXPERTS,
            **_all("moe"),
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            keys={
                **_KEYS,
                "intermediate_size": "dense.hidden",
                "moe_intermediate_size": "moe.hidden",
                "num_experts": "moe.num_experts",
                "num_experts_per_tok": "moe.top_k",
                "norm_topk_prob": "moe.normalize_gates",
            },
            fixed={"attention.qk_norm": True, **_SOFTMAX},
            layer=_ATTENTION | _DENSE | _EXPERTS,
            kinds=_qwen3_moe_kinds,
            arrange=lambda kinds: {"mlp_only_layers": [i for i, kind in enumerate(kinds) if kind == "dense"]},
            pattern="any layers dense, the others moe",
            structure=("mlp_only_layers", "decoder_sparse_step"),
            constants={"decoder_sparse_step": 1},
        ),
        Family(  # the experts and the router of DeepSeek-V3 beside ordinary attention
            "glm4_moe",
            "Glm4MoeForCausalLM",
            keys={
                **_KEYS,
                "use_qk_norm": "attention.qk_norm",
                "intermediate_size": "dense.hidden",
                "moe_intermediate_size": "moe.hidden",
                "n_routed_experts": "moe.num_experts",
                "num_experts_per_tok": "moe.top_k",
                "n_shared_experts": "moe.num_shared",
                "norm_topk_prob": "moe.normalize_gates",
                "routed_scaling_factor": "moe.gate_scale",
                "n_group": "moe.num_groups",
                "topk_group": "moe.top_groups",
            },
            fixed={"moe.score": "sigmoid", **_ALL_PAIRS},
            layer=_ATTENTION | _DENSE | _EXPERTS | _BIASED_AND_SHARED,
            kinds=lambda config: [
                "dense" if i < config.first_k_dense_replace else "moe"
                for i in range(config.num_hidden_layers)
            ],
            arrange=_dense_first,
            pattern="the first layers dense, all others moe",
            structure=("first_k_dense_replace",),
            constants={"num_nextn_predict_layers": 0, "partial_rotary_factor": 1.0},
        ),
    )
}

# Every key of a config.json is in one of these tables, in Family.keys, or in Family.structure. Keys that
# transformers' classes do not have are told where they have a value;
# tests/hybridtrain/formats/test_config_fields.py walks the classes.
MAPPED = frozenset(  # for every family: read by name where it is used
    (
        *("model_type", "architectures", "num_hidden_layers"),
        *("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"),
    )
)
# Keys that change no logits: what a training did, how the model is used, what a class of transformers keeps
# for itself. An export gives them back as they came.
HARMLESS = frozenset(
    (
        *(
            "transformers_version",
            "dtype",
            "torch_dtype",
            "name_or_path",
            "_name_or_path",
            "id2label",
            "label2id",
            "num_labels",
        ),
        *(
            "problem_type",
            "return_dict",
            "use_cache",
            "output_hidden_states",
            "output_attentions",
            "output_router_logits",
        ),
        *(
            "tie_last_hidden_states",
            "chunk_size_feed_forward",
            "attn_implementation",
            "_attn_implementation_autoset",
        ),
        *(
            "experts_implementation",
            "initializer_range",
            "attention_dropout",
            "router_aux_loss_coef",
            "router_jitter_noise",
        ),
        *("pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"),
        *(
            "use_sliding_window",
            "max_window_layers",
        ),  # where `sliding_window`, which must be null, would be used
        *(
            "num_nextn_predict_layers",
            "num_mtp_layers",
        ),  # of further tokens: their weights have no place here and are refused
    )
)
# What a config may say that our model does not have: key, the values that mean its absence, and what it is.
LACKING: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("kv_lora_rank", (None,), "multi-head latent attention (MLA): keys and values here have full width"),
    ("q_lora_rank", (None,), "low-rank queries (MLA)"),
    ("attention_bias", (None, False), "biases in attention"),
    ("mlp_bias", (None, False), "biases in the feed-forward"),
    ("hidden_act", (None, "silu", "swish"), "an activation other than SiLU"),
    ("sliding_window", (None,), "attention to a sliding window"),
    ("attention_chunk_size", (None,), "attention in chunks"),
    ("quantization_config", (None,), "quantised weights; dequantise them first"),
    ("layers_block_type", (None,), "mixers other than attention"),
    ("ssm_state_size", (None,), "state-space layers"),
    ("state_size", (None,), "state-space layers"),
    ("mamba_d_state", (None,), "state-space layers"),
    ("final_logit_softcapping", (None,), "capped logits"),
    ("attn_logit_softcapping", (None,), "capped attention scores"),
    ("is_encoder_decoder", (None, False), "an encoder"),
    ("add_cross_attention", (None, False), "attention to an encoder"),
    ("per_layer_config", (None, {}), "layers of different shapes"),
    ("embedding_multiplier", (None, 1), "scaled embeddings"),
    ("residual_multiplier", (None, 1), "a scaled residual stream"),
    ("attention_multiplier", (None,), "attention scores of another scale"),
    ("logits_scaling", (None, 1), "scaled logits"),
    ("logit_scale", (None, 1), "scaled logits"),
    ("rope_interleaved", (None, False), "rotations of neighbours; those of halves are read"),
    ("no_rope_layers", (None, []), "layers without positions"),
    (
        "auto_map",
        (None, {}),
        "code of its own; remove the key where the weights are those of the architecture that is named",
    ),
    (
        "custom_pipelines",
        (None, {}),
        "code of its own; remove the key where the weights are those of the architecture that is named",
    ),
    ("compression_config", (None,), "quantised weights; dequantise them first"),
    (
        "configuration_files",
        (None, [], {}),
        "another config.json by the version of transformers; rename the one to import",
    ),
    ("transformers_weights", (None,), "a file of weights of another name; name it model.safetensors"),
)
