"""How many parameters a model has, and how many operations a token costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybridtrain.model.build import components_of, frame_of, layer_components, layer_parameters, section_of
from hybridtrain.model.component import LOCAL_WIRING
from hybridtrain.model.lm import HybridLM, Layer, Part
from hybridtrain.settings.layers import LayerSpec, engram_layers, layer_specs
from hybridtrain.settings.tree import Settings


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by use; norms and the lookup table are counted."""

    total: int
    active: int  # read by one token: its experts only, and its own rows of the table
    table: int
    table_active: int


@dataclass(frozen=True)
class LayerCost:
    """A layer's parameters, and those of its matrix products; of each, what one token reads. `flops`: forward
    operations of a token beside those products."""

    total: int
    active: int
    matrices: int
    active_matrices: int
    flops: float


def layer_cost(settings: Settings, spec: LayerSpec, place: int) -> LayerCost:
    """Counted on layer `place` (from 0), which is of this kind, on the meta device."""
    path = f"layers.{place}"
    with torch.device("meta"):
        layer = Layer(settings, spec, path, LOCAL_WIRING)
    declared, components = layer_parameters(settings, spec), layer_components(settings, spec)
    shares, flops = dict[str, float](), 0.0
    for part, component in components.items():
        section = section_of(settings, component)
        shares |= {f"{part}.{name}": share for name, share in component.shares(section).items()}
        flops += component.flops(section, frame_of(settings, f"{path}.{part}"))
    total = active = matrices = active_matrices = 0
    for name, parameter in layer.named_parameters():
        read = round(parameter.numel() * shares.get(name, 1.0))
        product = declared[name].group != "no_decay"
        total, active = total + parameter.numel(), active + read
        matrices, active_matrices = matrices + product * parameter.numel(), active_matrices + product * read
    return LayerCost(total, active, matrices, active_matrices, flops)


def layer_costs(settings: Settings) -> list[LayerCost]:
    """The costs of every layer in order; each kind is counted once where its place makes no difference."""
    scheme = components_of(settings).residuals[settings.model.residual]
    by_place = bool(scheme.parameters(section_of(settings, scheme)))
    kinds = [(spec, i * by_place) for i, spec in enumerate(layer_specs(settings))]
    counted = {kind: layer_cost(settings, *kind) for kind in dict.fromkeys(kinds)}
    return [counted[kind] for kind in kinds]


def count_parameters(settings: Settings, vocab_size: int, table_rows: int) -> ParameterCount:
    """Counts of the whole model with a packed table of `table_rows` rows (all Engram layers together)."""
    with torch.device("meta"):
        outside = HybridLM(settings, vocab_size, Part(0, 0, first=True, last=True))
    rest, costs, engram = sum(p.numel() for p in outside.parameters()), layer_costs(settings), settings.engram
    table = table_rows * engram.head_dim
    table_active = engram.slots * engram.head_dim * len(engram_layers(settings))
    total, active = (rest + sum(cost.total for cost in costs), rest + sum(cost.active for cost in costs))
    return ParameterCount(total + table, active + table_active, table, table_active)


def flops_per_token(settings: Settings, vocab_size: int) -> float:
    """Operations of forward and backward for one token of a `train.seq_len` sequence, a multiply-add being
    two.

    6 * (weights of all matrix products a token takes part in; the embedding and the table are looked up and
    cost none) + 3 * what components declare beside them, as attention its scores and values. Norms, gates and
    the convolution are left out.
    """
    costs = layer_costs(settings)
    weights = vocab_size * settings.model.dim + sum(cost.active_matrices for cost in costs)
    return 6.0 * weights + 3.0 * sum(cost.flops for cost in costs)


def stage_costs(settings: Settings, vocab_size: int) -> tuple[float, list[float], float]:
    """(embedding, [layer], norm and head): what each costs a pipeline stage, as its shares of all parameters
    and of all operations.

    Parameters stand for memory, operations for time; the sum of all costs is 2. The lookup table is on no
    stage.
    """
    layers = layer_costs(settings)
    sizes = [cost.matrices for cost in layers]
    products = [cost.active_matrices + cost.flops / 2 for cost in layers]
    table = vocab_size * settings.model.dim
    size, product = sum(sizes) + 2 * table, sum(products) + table
    costs = [s / size + p / product for s, p in zip(sizes, products, strict=True)]
    return table / size, costs, table / size + table / product
