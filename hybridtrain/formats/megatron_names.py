"""Where Megatron-core's GPT model has the tensors of ours: names, stacks of layers and experts, joined
matrices.

D model width, E experts, G key/value heads, L layers; X and Y rows of queries, and of keys or values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridtrain.formats.tensors import is_stacked
from hybridtrain.formats.torch_dist import Region
from hybridtrain.settings.tree import ModelSettings

LOCAL, TRANSFORMER_ENGINE = (
    "local",
    "transformer_engine",
)  # what builds Megatron's layers: its --transformer-impl
# ends of modules' names that keep an object beside their tensors, which is empty but for FP8
_LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
_STATEFUL: Mapping[str, tuple[str, ...]] = {LOCAL: _LINEAR, TRANSFORMER_ENGINE: (*_LINEAR, "layernorm")}
IMPLEMENTATIONS = tuple(_STATEFUL)

JOINED = (".wq.weight", ".wk.weight", ".wv.weight")  # ends of the names of those tensors of ours that are
QKV = "self_attention.linear_qkv.weight"
FC1_NORM, MOE_NORM = "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"
# our tensor of a layer to theirs; of several names the first that is there is read
LAYER: Mapping[str, tuple[str, ...]] = {
    "mixer_norm.weight": ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    "mixer.wq.weight": (QKV,),
    "mixer.wk.weight": (QKV,),
    "mixer.wv.weight": (QKV,),
    "mixer.wo.weight": ("self_attention.linear_proj.weight",),
    "mixer.q_norm.weight": ("self_attention.q_layernorm.weight",),
    "mixer.k_norm.weight": ("self_attention.k_layernorm.weight",),
    "feedforward_norm.weight": (FC1_NORM, MOE_NORM),
    "feedforward.w_gate.weight": ("mlp.linear_fc1.weight",),
    "feedforward.w_up.weight": ("mlp.linear_fc1.weight",),
    "feedforward.w_down.weight": ("mlp.linear_fc2.weight",),
    "feedforward.router.weight": ("mlp.router.weight",),
    "feedforward.router.bias_E": ("mlp.router.expert_bias",),
    "feedforward.experts.w_gate": ("mlp.experts.experts.linear_fc1.weight",),
    "feedforward.experts.w_up": ("mlp.experts.experts.linear_fc1.weight",),
    "feedforward.experts.w_down": ("mlp.experts.experts.linear_fc2.weight",),
    "feedforward.shared.w_gate.weight": ("mlp.shared_experts.linear_fc1.weight",),
    "feedforward.shared.w_up.weight": ("mlp.shared_experts.linear_fc1.weight",),
    "feedforward.shared.w_down.weight": ("mlp.shared_experts.linear_fc2.weight",),
}
OUTSIDE = {
    "embed.weight": "embedding.word_embeddings.weight",
    "norm.weight": "decoder.final_layernorm.weight",
    "head.weight": "output_layer.weight",
}


@dataclass(frozen=True)
class Layout:
    """How Megatron cuts a model of L layers and E experts into stored tensors.

    `layers`: one tensor holds all layers, [L, …]. `experts`: one tensor holds all experts, [E, …], and one
    matrix both halves of a gated unit; else each is a tensor of its own (Megatron's
    `singleton_local_shards`).
    """

    num_layers: int
    num_experts: int
    layers: bool
    experts: bool = True

    @classmethod
    def of_keys(cls, keys: Collection[str], num_layers: int, num_experts: int) -> Layout:
        """The one that stored tensors of these names have."""
        apart = any(key.startswith("decoder.") and key.endswith(".weight_w") for key in keys)
        return cls(num_layers, num_experts, f"decoder.layers.{QKV}" in keys, experts=not apart)

    def regions(self, ours: str, name: str, shape: tuple[int, ...]) -> list[Region]:
        """Where the stored tensors of the name `name` have our tensor `ours` of a layer: one region, or one
        per expert.

        `shape` is that of the stored counterpart of our tensor, without stacks: of one expert, of one half of
        a gated unit.
        """
        half = next((half for half, leaf in enumerate(("w_gate", "w_up")) if leaf in ours), None)
        joined = half is not None and self.experts
        first, rows = (half * shape[0], 2 * shape[0]) if joined and half is not None else (0, shape[0])
        suffix = "" if half is None or joined else ("_w", "_v")[half]
        out = []
        for layer, expert in self._each(ours):
            number, count = self._stacks(layer, expert)
            offsets = (*number, first, *(0 for _ in shape[1:]))
            sizes = (*(1 for _ in number), *shape)
            out.append(
                Region(self._key(layer, expert, name) + suffix, (*count, rows, *shape[1:]), offsets, sizes)
            )
        return out

    def states(self, ours: str, name: str, implementation: str) -> list[str]:
        """Keys of the empty objects that go with a tensor `name` of the module that an implementation
        builds.
        """
        module, _, leaf = name.rpartition(".")
        modules = [module] if leaf == "weight" and module.endswith(_STATEFUL[implementation]) else []
        if implementation == TRANSFORMER_ENGINE and module.endswith("linear_proj"):
            modules.append("self_attention.core_attention")
        out = []
        for layer, expert in self._each(ours):
            number, count = (".".join(map(str, n)) for n in self._stacks(layer, expert))
            out += [
                f"{self._key(layer, expert, module)}._extra_state/shard_{number or 0}_{count or 1}"
                for module in modules
            ]
        return out

    def _each(self, ours: str) -> list[tuple[int, int | None]]:
        layer = int(ours.split(".")[1])
        return (
            [(layer, expert) for expert in range(self.num_experts)] if is_stacked(ours) else [(layer, None)]
        )

    def _key(self, layer: int, expert: int | None, name: str) -> str:
        if expert is not None and not self.experts:
            name = name.replace("experts.experts.", f"experts.experts.{expert}.")
        return f"decoder.layers.{name}" if self.layers else f"decoder.layers.{layer}.{name}"

    def _stacks(self, layer: int, expert: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Number, and count, of the layer and of the expert, as far as the stored tensor holds them all."""
        stacks = [(layer, self.num_layers)] if self.layers else []
        stacks += [(expert, self.num_experts)] if self.experts and expert is not None else []
        return tuple(number for number, _ in stacks), tuple(count for _, count in stacks)


def outside(name: str, shape: tuple[int, ...]) -> Region:
    """The place of our tensor `name`, which is in no layer."""
    return Region(OUTSIDE[name], shape, tuple(0 for _ in shape), shape)


def qkv_shape(model: ModelSettings) -> tuple[int, int]:
    """The shape of the one matrix that makes queries, keys and values."""
    a = model.attention
    return (a.num_heads + 2 * a.num_kv_heads) * a.head_dim, model.dim


def join_qkv(q_XD: Tensor, k_YD: Tensor, v_YD: Tensor, head_dim: int) -> Tensor:
    """Megatron's one matrix: for each key/value head its queries, its key, its value."""
    groups = k_YD.size(0) // head_dim
    return torch.cat([w.unflatten(0, (groups, -1)) for w in (q_XD, k_YD, v_YD)], 1).flatten(0, 1)


def split_qkv(joined_XD: Tensor, groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of join_qkv for `groups` key/value heads."""
    grouped_GXD = joined_XD.unflatten(0, (groups, -1))
    rows = [grouped_GXD.size(1) - 2 * head_dim, head_dim, head_dim]
    q_XD, k_YD, v_YD = (w.flatten(0, 1) for w in grouped_GXD.split(rows, 1))
    return q_XD, k_YD, v_YD
