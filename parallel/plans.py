"""Which module is cut in which style under tensor parallelism: names of modules, with `*` for one part of a
name.

What no line names works on sequence shards with whole parameters: norms, router, gate, residual stream.
Experts are spread by `ep` and read sequence shards as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from hybridtrain.parallel.collectives import Group
from hybridtrain.parallel.tensor import (
    ColumnLinear,
    RowLinear,
    SequenceConvolution,
    SequencePlaces,
    Style,
    TensorAxis,
    VocabularyEmbedding,
    VocabularyHead,
    VocabularyLogits,
    VocabularyLoss,
    gather_input,
)


def gather_unless_routed(feedforward: nn.Module, axis: TensorAxis) -> nn.Module:
    """A MoE routes the tokens of its sequence shard; its shared experts gather for themselves."""
    return feedforward if hasattr(feedforward, "experts") else gather_input(feedforward, axis)


TENSOR_PARTS: dict[str, Callable[[Any, Group], Any]] = {
    "convolve": SequenceConvolution,  # of the memory
    "position_in_expert": SequencePlaces,  # of the experts
    "head_losses": lambda _, group: VocabularyLoss(group),
    "project": lambda _, group: VocabularyLogits(group),  # logits of tied embeddings
}
"""What modules hold as plain attributes, from the local default and the group."""

EXPERT_WIDTH = {"w_gate": 2, "w_up": 2, "w_down": 1}
"""The dim of the hidden width in each parameter of a module of experts; cut under etp."""

SWIGLU: dict[str, Style] = {
    "": gather_unless_routed,
    ".w_gate": ColumnLinear,
    ".w_up": ColumnLinear,
    ".w_down": RowLinear,
}

TENSOR_PLAN: dict[str, Style] = {
    "embed": VocabularyEmbedding,
    "head": VocabularyHead,
    "layers.*.mixer": gather_input,
    "layers.*.mixer.wq": ColumnLinear,  # by heads, as wk and wv: q_norm, k_norm and RoPE see the local heads
    "layers.*.mixer.wk": ColumnLinear,
    "layers.*.mixer.wv": ColumnLinear,
    "layers.*.mixer.wo": RowLinear,
    "layers.*.engram.wk": RowLinear,  # over the slots: each rank fetched the rows of its own
    "layers.*.engram.wv": RowLinear,
    **{f"layers.*.feedforward{name}": style for name, style in SWIGLU.items()},
    **{f"layers.*.feedforward.shared{name}": style for name, style in SWIGLU.items()},
}
