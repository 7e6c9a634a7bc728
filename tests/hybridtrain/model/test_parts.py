"""A model in parts is the whole model: names, values, results and statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybridtrain.model.build import model_sums
from hybridtrain.model.common import collect
from hybridtrain.model.cost import count_parameters, flops_per_token, stage_costs
from hybridtrain.model.engram import StepRows
from hybridtrain.model.feedforwards.dense import DenseSettings
from hybridtrain.model.feedforwards.moe import MoESettings
from hybridtrain.model.init import init_parameters
from hybridtrain.model.lm import HybridLM, Part
from hybridtrain.settings.engram import EngramSettings
from hybridtrain.settings.tree import ModelSettings, Settings

VOCABULARY = 64


def settings(tied: bool = False, residual: str = "add") -> Settings:
    layers = ("attention+dense", "engram+attention+moe", "attention+moe", "engram+attention+dense")
    moe = MoESettings(num_experts=4, hidden=16, aux_weight=0.01, z_weight=0.01)
    model = ModelSettings(
        dim=32,
        layers=layers,
        residual=residual,
        tie_embeddings=tied,
        dense=DenseSettings(hidden=16),
        moe=moe,
    )
    return Settings(model=model, engram=EngramSettings(head_dim=8))


def build(s: Settings, part: Part | None = None, rows: StepRows | None = None) -> HybridLM:
    model = HybridLM(s, VOCABULARY, part, rows)
    init_parameters(model, s)
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (2, 12), generator=draw)
    index = torch.randint(20, (2, 12, 2, 8), generator=draw)
    return tokens, torch.zeros_like(tokens), index, torch.randn(20, 8, generator=draw)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("cuts", [(2, 2), (1, 1, 2), (1, 3)])
@pytest.mark.parametrize("residual", ["add", "dense_former"])
def test_parts_in_a_row_are_the_whole_model(residual: str, cuts: tuple[int, ...], tied: bool) -> None:
    s = settings(tied, residual)
    tokens, documents, index, rows_UD = inputs()
    whole = build(s)
    whole.rows.set([rows_UD])
    expected = whole(tokens, documents, index, 0, tokens)

    rows = StepRows()
    rows.set([rows_UD])
    x, low, column = tokens, 0, 0
    made: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for number, cut in enumerate(cuts):
        part = build(s, Part(low, low + cut, number == 0, number == len(cuts) - 1), rows)
        own = index[:, :, column : column + len(part.engram_layers)]
        x = part(x, documents, own, 0, tokens if part.part.last else None)
        if not part.part.last:
            assert not made.keys() & set(list(x)[1:])  # sources are made once
            made |= x
            x = {carried.name: made[carried.name] for carried in part.carried(low + cut)}
        low, column = low + cut, column + len(part.engram_layers)
        values |= part.state_dict()
    assert torch.equal(x, expected)
    assert values.keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(values[name], value), name


def test_the_statistics_of_a_step_are_known_ahead() -> None:
    s = settings()
    tokens, documents, index, rows_UD = inputs()
    model = build(s)
    model.rows.set([rows_UD])
    model(tokens, documents, index, 0, tokens)
    taken, ahead = collect(model), model_sums(s)
    assert {name: tuple(value.shape) for name, value in taken.items()} == ahead
    assert {value.dtype for value in taken.values()} == {torch.float64}


def test_stage_costs_are_shares_of_parameters_and_operations() -> None:
    s = settings()
    first, layers, last = stage_costs(s, VOCABULARY)
    assert first + sum(layers) + last == pytest.approx(2.0)
    table = VOCABULARY * s.model.dim
    products = flops_per_token(s, VOCABULARY) / 6
    parameters = count_parameters(s, VOCABULARY, 0).total
    assert last - first == pytest.approx(table / products, rel=1e-6)
    assert first == pytest.approx(table / parameters, rel=0.05)  # norms and convolutions are not counted
    assert layers[1] > layers[2] > layers[0]  # an Engram layer and experts, experts, neither
