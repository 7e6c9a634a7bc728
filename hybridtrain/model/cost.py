"""How many parameters a model has, and how many operations a token costs."""

from __future__ import annotations

from dataclasses import dataclass

from hybridtrain.settings.layers import layer_specs
from hybridtrain.settings.tree import Settings


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by use; norms and the lookup table are counted."""

    total: int
    active: int  # read by one token: its experts only, and its own rows of the table
    table: int
    table_active: int


def count_parameters(settings: Settings, vocab_size: int, table_rows: int) -> ParameterCount:
    """Counts of the whole model with a packed table of `table_rows` rows (all memory layers together)."""
    model, engram = settings.model, settings.engram
    specs = layer_specs(settings)
    outside = vocab_size * model.dim * (1 if model.tie_embeddings else 2) + model.dim
    slots_width = len(engram.orders) * engram.heads * engram.head_dim
    total = active = outside
    for spec in specs:
        common = _mixer(settings) + _norms(settings, spec.engram)
        if spec.engram:
            common += 2 * slots_width * model.dim + (engram.conv_kernel * model.dim if engram.conv else 0)
        feedforward, feedforward_active = _feedforward(settings, spec.feedforward)
        total += common + feedforward
        active += common + feedforward_active
    table = table_rows * engram.head_dim
    table_active = slots_width * sum(spec.engram for spec in specs)
    return ParameterCount(total + table, active + table_active, table, table_active)


def flops_per_token(settings: Settings, vocab_size: int) -> float:
    """Operations of forward and backward for one token of a `train.seq_len` sequence, a multiply-add being
    two.

    6 * (weights of all matrix products a token takes part in; the embedding and the table are looked up and
    cost none) + 6 * num_heads * head_dim * (seq_len + 1) per attention layer: scores and values, 2 products *
    2 operations * 3 passes over the (seq_len + 1) / 2 keys that a token sees on average. Norms, gates and the
    convolution are left out.
    """
    model, engram = settings.model, settings.engram
    weights, attention = vocab_size * model.dim, 0
    for spec in layer_specs(settings):
        weights += _mixer(settings) + _feedforward(settings, spec.feedforward)[1]
        weights += 2 * len(engram.orders) * engram.heads * engram.head_dim * model.dim if spec.engram else 0
        attention += 6 * model.attention.num_heads * model.attention.head_dim * (settings.train.seq_len + 1)
    return 6.0 * weights + attention


def stage_costs(settings: Settings, vocab_size: int) -> tuple[float, list[float], float]:
    """(embedding, [layer], norm and head): what each costs a pipeline stage, as its shares of all parameters
    and of all operations.

    Parameters stand for memory, operations for time; the sum of all costs is 2. The lookup table is on no
    stage.
    """
    model, engram, specs = settings.model, settings.engram, layer_specs(settings)
    slots_width = len(engram.orders) * engram.heads * engram.head_dim
    keys = model.attention.num_heads * model.attention.head_dim * (settings.train.seq_len + 1)
    sizes, products = [], []
    for spec in specs:
        feedforward, feedforward_active = _feedforward(settings, spec.feedforward)
        fusion = 2 * slots_width * model.dim if spec.engram else 0
        common = _mixer(settings) + fusion
        sizes.append(common + feedforward)
        products.append(common + feedforward_active + keys)
    table = vocab_size * model.dim
    size, product = sum(sizes) + 2 * table, sum(products) + table
    costs = [s / size + p / product for s, p in zip(sizes, products, strict=True)]
    return table / size, costs, table / size + table / product


def _mixer(settings: Settings) -> int:
    attention = settings.model.attention
    return 2 * settings.model.dim * attention.head_dim * (attention.num_heads + attention.num_kv_heads)


def _norms(settings: Settings, has_memory: bool) -> int:
    model = settings.model
    memory = (3 if settings.engram.conv else 2) * model.dim if has_memory else 0
    return 2 * model.dim + memory + (2 * model.attention.head_dim if model.attention.qk_norm else 0)


def _feedforward(settings: Settings, kind: str) -> tuple[int, int]:
    """Weights of a feed-forward: (all, those of one token)."""
    dim, moe = settings.model.dim, settings.model.moe
    if kind == "dense":
        return (dense := 3 * dim * settings.model.dense.hidden), dense
    expert, router = 3 * dim * moe.hidden, dim * moe.num_experts
    return router + (moe.num_experts + moe.num_shared) * expert, router + (
        moe.top_k + moe.num_shared
    ) * expert
