"""Causal attention with grouped key/value heads, rotary positions and document masks.

B batch, T tokens, D model width, H heads, C head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from pydantic import Field
from torch import Tensor, nn

from hybridtrain.kernels.norms.op import rope
from hybridtrain.model.common import HeadNorm, SequenceContext
from hybridtrain.model.component import NORM, Cut, Frame, Mixer, Parameter, Sees
from hybridtrain.model.exchanges import Exchanges
from hybridtrain.section import Positive, Section, divisors_of


class AttentionSettings(Section):
    num_heads: Positive = Field(4, description="heads of queries")
    num_kv_heads: Positive = Field(4, description="heads of keys and values; divides num_heads")
    head_dim: Positive = Field(32, description="even; num_heads * head_dim need not equal model.dim")
    rope_theta: float = Field(10_000.0, gt=0)
    qk_norm: bool = Field(True, description="RMS-normalise queries and keys per head")

    def problems(self) -> list[str]:
        out: list[str] = []
        if self.num_heads % self.num_kv_heads:
            out.append(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; it may be "
                f"{divisors_of(self.num_heads)}"
            )
        if self.head_dim % 2:
            out.append(f"head_dim={self.head_dim} is odd; RoPE needs an even one, e.g. {self.head_dim + 1}")
        return out


class Attention(nn.Module):
    """`Exchanges.attend` does the attention proper on [B, T, H, C] tensors."""

    def __init__(self, section: AttentionSettings, frame: Frame, exchanges: Exchanges) -> None:
        super().__init__()
        a, dim = section, frame.dim
        self.head_dim = a.head_dim
        self.wq = nn.Linear(dim, a.num_heads * a.head_dim, bias=False)
        self.wk = nn.Linear(dim, a.num_kv_heads * a.head_dim, bias=False)
        self.wv = nn.Linear(dim, a.num_kv_heads * a.head_dim, bias=False)
        self.wo = nn.Linear(a.num_heads * a.head_dim, dim, bias=False)
        self.q_norm = HeadNorm(a.head_dim, frame.norm_eps, frame.backends) if a.qk_norm else None
        self.k_norm = HeadNorm(a.head_dim, frame.norm_eps, frame.backends) if a.qk_norm else None
        self.turn = partial(rope, backends=frame.backends)
        self.attend = exchanges.attend

    def forward(self, x_BTD: Tensor, context: SequenceContext) -> Tensor:
        q_BTHC, k_BTHC, v_BTHC = (
            w(x_BTD).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv)
        )
        turn_q, turn_k = self.q_norm or self.turn, self.k_norm or self.turn
        q_BTHC, k_BTHC = turn_q(q_BTHC, context.rotation_TR), turn_k(k_BTHC, context.rotation_TR)
        out_BTD: Tensor = self.wo(self.attend(q_BTHC, k_BTHC, v_BTHC, context).flatten(-2))
        return out_BTD


def _parameters(a: AttentionSettings) -> Mapping[str, Parameter]:
    norms = {"q_norm.weight": NORM, "k_norm.weight": NORM} if a.qk_norm else {}
    return {
        "wq.weight": Parameter(Cut.COLUMN),  # by heads, as wk and wv: norms and RoPE see the local heads
        "wk.weight": Parameter(Cut.COLUMN),
        "wv.weight": Parameter(Cut.COLUMN),
        "wo.weight": Parameter(Cut.ROW, "residual"),
        **norms,
    }


def _divides(a: AttentionSettings) -> Mapping[str, int]:
    return {
        "model.attention.num_kv_heads": a.num_kv_heads,
        "model.attention.num_heads": a.num_heads,
    }


def _flops(a: AttentionSettings, frame: Frame) -> float:
    """Scores and values, two products over the (T + 1) / 2 keys that a token sees on average."""
    return 2.0 * a.num_heads * a.head_dim * (frame.seq_len + 1)


ATTENTION = Mixer(
    name="attention",
    section=AttentionSettings,
    build=Attention,
    parameters=_parameters,
    sees=Sees.KEYS,
    divides=_divides,
    flops=_flops,
    ops=("rope",),
    formats=("hf", "megatron"),
)
