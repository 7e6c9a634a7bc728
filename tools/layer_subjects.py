"""The subjects of count_launches.py: one layer of attention and experts on meta tensors, in bfloat16, as
hybridtrain, transformers and torchtitan compute it.

None has documents, norms of heads, shared experts or balance losses. A subject is a function from a shape to
`Made`: the module, and its forward pass from [B, T, D] to [B, T, D].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridtrain.kernels.choose import Backends
from hybridtrain.kernels.ops import resolve
from hybridtrain.model.common import make_context
from hybridtrain.model.component import LOCAL_WIRING
from hybridtrain.model.exchanges import local_exchanges
from hybridtrain.model.lm import Layer
from hybridtrain.model.residuals.add import Stream
from hybridtrain.settings.layers import layer_specs
from hybridtrain.settings.tree import Settings

META = torch.device("meta")
Made = tuple[nn.Module, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Shape:
    """A layer and its micro-batch."""

    dim: int = 1024
    heads: int = 16
    experts: int = 16
    top_k: int = 2
    hidden: int = 512
    batch: int = 4
    seq_len: int = 512

    def input(self) -> Tensor:
        size = (self.batch, self.seq_len, self.dim)
        return torch.empty(size, dtype=torch.bfloat16, device=META, requires_grad=True)


def hybridtrain(shape: Shape, choice: str = "auto") -> Made:
    """Ours with the kernels that `auto` chooses on a GPU, or with torch's formulation of every operation."""
    chosen = resolve({}, "cuda").chosen if choice == "auto" else {}
    backends = Backends(chosen, META.type)
    wiring = replace(LOCAL_WIRING, backends=backends)
    wiring = replace(wiring, whole=local_exchanges(backends), shards=local_exchanges(backends))
    settings = _settings(shape)
    attention = settings.model.attention
    with META:
        layer = Layer(settings, layer_specs(settings)[0], "layers.0", wiring)
        context = make_context(None, shape.seq_len, attention.head_dim, attention.rope_theta, META)
    return _in_bfloat16(layer), lambda x: layer(Stream(x, {}), context, None).carry


def transformers(shape: Shape) -> Made:
    """A decoder layer of Mixtral, with SDPA and `grouped_mm`."""
    from transformers import MixtralConfig, MixtralModel

    config = MixtralConfig(
        vocab_size=8,
        hidden_size=shape.dim,
        intermediate_size=shape.hidden,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        sliding_window=None,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    )
    with META:
        model: Any = MixtralModel(config).train()
        places = torch.arange(shape.seq_len)[None]
        rotation = model.rotary_emb(shape.input().detach(), position_ids=places)
    layer = model.layers[0]
    return _in_bfloat16(layer), lambda x: layer(x, position_embeddings=rotation)


def torchtitan(shape: Shape) -> Made:
    """A MoE block of its Qwen3, with SDPA in the place of FlexAttention, which is compiled."""
    from torchtitan.models import qwen3
    from torchtitan.models.common import CosSinRoPE
    from torchtitan.models.common.attention import ScaledDotProductAttention

    width = shape.dim // shape.heads
    (config,) = qwen3._build_qwen3_moe_layers(
        n_layers=1,
        dim=shape.dim,
        n_heads=shape.heads,
        n_kv_heads=shape.heads,
        head_dim=width,
        moe_hidden_dim=shape.hidden,
        num_experts=shape.experts,
        top_k=shape.top_k,
        attn_backend="flex",
        moe_comm_backend="standard",
        rope=CosSinRoPE.Config(dim=width, max_seq_len=shape.seq_len),
    )
    config.attention = replace(
        config.attention, qk_norm=None, inner_attention=ScaledDotProductAttention.Config()
    )
    with META:
        block: Any = config.build().train()
    gate = block.moe.router.gate
    # what autocast to float32 makes of it, which meta tensors do not have
    gate.forward = lambda x: F.linear(x.float(), gate.weight.float())
    return _in_bfloat16(block), lambda x: block(x, None)


SUBJECTS: dict[str, tuple[str, Callable[[Shape], Made]]] = {
    "hybridtrain, `auto` on a GPU": ("triton", hybridtrain),
    "hybridtrain, torch's formulations": ("torch", lambda shape: hybridtrain(shape, "torch")),
    "transformers, Mixtral": ("transformers", transformers),
    "torchtitan, Qwen3 MoE": ("torchtitan", torchtitan),
}
"""By the name in the table: the package that it needs, and the subject."""


def _settings(shape: Shape) -> Settings:
    attention = {
        "num_heads": shape.heads,
        "num_kv_heads": shape.heads,
        "head_dim": shape.dim // shape.heads,
        "qk_norm": False,
    }
    moe = {"num_experts": shape.experts, "top_k": shape.top_k, "hidden": shape.hidden}
    model = {"dim": shape.dim, "layers": ("attention+moe",), "attention": attention, "moe": moe}
    train = {"seq_len": shape.seq_len, "global_batch": shape.batch}
    return Settings.model_validate({"model": model, "engram": {"enabled": False}, "train": train})


def _in_bfloat16(module: nn.Module) -> nn.Module:
    """The module with its parameters in bfloat16; buffers stay."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return module
