"""Initial values do not depend on who draws them, and counts agree with the model built."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
import xxhash

from hybridtrain.model import init
from hybridtrain.model.cost import count_parameters, flops_per_token, stage_costs
from hybridtrain.model.init import TABLE_BLOCK, constant, draw, init_parameters, init_table
from hybridtrain.model.lm import HybridLM
from hybridtrain.settings.load import load_settings, parse_settings
from hybridtrain.settings.tree import Settings
from tests.training import drawn_whole_and_in_halves


@pytest.mark.parametrize("name", ["layers.1.feedforward.experts.w_up", "layers.1.mixer.wq.weight", "x.conv"])
def test_a_slice_is_a_slice_of_the_whole(name: str) -> None:
    std = 0.0 if name == "x.conv" else 0.5
    whole = draw(name, (6, 4, 3), 7, std)
    parts = [draw(name, (6, 4, 3), 7, std, rows=slice(a, b)) for a, b in ((0, 1), (1, 5), (5, 5), (5, None))]
    assert torch.equal(torch.cat(parts), whole)
    if std:
        assert not torch.equal(whole, draw(name, (6, 4, 3), 8, std))
        assert not torch.equal(whole, draw(name + "x", (6, 4, 3), 7, std))


def test_a_slice_of_a_constant() -> None:
    part = constant((6, 4), 0.5, slice(1, 4), (slice(0, 2),))
    assert part.shape == (3, 2)
    assert (part == 0.5).all()


def test_what_fits_one_generator_is_drawn_by_one() -> None:
    """These values are those of every release: runs of the same seed start alike."""
    for name, key, shape in (
        ("embed.weight", "7:embed.weight", (1024, 1024)),
        ("x.experts.w", "7:x.experts.w:1", (1024, 1024)),
    ):
        generator = torch.Generator().manual_seed(xxhash.xxh64_intdigest(key.encode()) >> 1)
        expected = torch.empty(shape).normal_(0.0, 0.5, generator=generator)
        drawn = draw(name, shape, 7, 0.5) if name == "embed.weight" else draw(name, (2, *shape), 7, 0.5)[1]
        assert torch.equal(drawn, expected)


LARGE = {
    "embed.weight": (1100, 1500),
    "x.experts.w_up": (2, 1100, 1500),
    "x.bias": (1_500_000,),
    "narrow.weight": (600_000, 3),
}


@pytest.mark.parametrize("name", list(LARGE))
def test_parts_of_what_is_large_are_drawn_by_themselves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = LARGE[name]
    whole = draw(name, shape, 7, 0.5)
    assert whole.shape == shape
    assert abs(float(whole.std()) / 0.5 - 1) < 0.01
    assert abs(float(whole.mean())) < 0.01
    assert len(whole.flatten().unique()) > 0.9 * whole.numel()  # no tile has the values of another
    drawn, normal = [], init._normal
    monkeypatch.setattr(init, "_normal", lambda *args: drawn.append(math.prod(args[1])) or normal(*args))  # type: ignore[func-returns-value]
    for cuts in itertools.product(
        *([(0, 1), (size // 2, size // 2 + max(1, size // 8)), (size, size)] for size in shape)
    ):
        drawn.clear()
        rows, *within = (slice(*cut) for cut in cuts)
        part = draw(name, shape, 7, 0.5, rows, tuple(within))
        assert torch.equal(part, whole[(rows, *within)])
        assert sum(drawn) <= 4 * part.numel() + 4 * 2**17  # and the rest of the tiles at the edges
        assert part.untyped_storage().nbytes() == 4 * part.numel()


def test_table_rows_do_not_depend_on_the_cut() -> None:
    end = TABLE_BLOCK + 500
    whole = init_table(3, 0, end, 2, 0.02)
    cuts = [0, 10, TABLE_BLOCK - 1, TABLE_BLOCK, TABLE_BLOCK + 1, end]
    assert torch.equal(torch.cat([init_table(3, a, b, 2, 0.02) for a, b in itertools.pairwise(cuts)]), whole)
    assert init_table(3, 5, 5, 2, 0.02).shape == (0, 2)
    assert abs(whole.std().item() - 0.02) < 2e-4
    assert not torch.equal(whole[:500], whole[TABLE_BLOCK:])


def test_scales() -> None:
    settings = Settings()
    model = HybridLM(settings, 512)
    init_parameters(model, settings)
    scaled = 0.02 / math.sqrt(8)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith(".conv"):
            assert (parameter == 0).all(), name
        else:
            residual = any(part in name for part in (".wo.", "w_down", "engram.wv"))
            assert abs(parameter.std().item() / (scaled if residual else 0.02) - 1) < 0.1, name
    assert (model.layers["1"].feedforward.router.load_E == 1 / 8).all()


def test_a_writer_can_take_slices() -> None:
    settings = Settings()
    whole, halves = drawn_whole_and_in_halves(settings)
    for (name, a), b in zip(whole.state_dict().items(), halves.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.tie_embeddings=true", "engram.conv=false", "model.moe.num_shared=2"],
        [
            "engram.enabled=false",
            "model.attention.qk_norm=false",
            "model.attention.num_kv_heads=2",
            "model.attention.head_dim=48",
        ],
    ],
)
def test_counts_agree_with_the_model(overrides: list[str]) -> None:
    settings = parse_settings({}, overrides)
    model = HybridLM(settings, 100)
    count = count_parameters(settings, 100, table_rows=1000)
    assert count.total == sum(p.numel() for p in model.parameters()) + 1000 * 32
    moe = settings.model.moe
    idle = 3 * (moe.num_experts - moe.top_k) * 3 * 128 * moe.hidden  # three layers of experts
    assert count.active == count.total - count.table - idle + count.table_active
    assert count.table_active == (256 if settings.engram.enabled else 0)


def test_flops_by_hand() -> None:
    settings = parse_settings({}, ["model.layers=['engram+attention+moe']"])
    matrices = 100 * 128 + 4 * 128 * 128 + 2 * 256 * 128 + 128 * 8 + 2 * 3 * 128 * 256
    assert flops_per_token(settings, 100) == 6 * matrices + 3 * 2 * 2 * 4 * 32 * 129 / 2


def test_counts_are_those_of_the_formulas_that_there_were() -> None:
    """Written down from the version that had a formula for each kind of layer."""
    root = Path(__file__).parents[3] / "configs"
    ci, quick = load_settings(root / "ci.toml"), load_settings(root / "quickstart.toml")
    count = count_parameters(ci, 1000, 5000)
    assert (count.total, count.active, count.table, count.table_active) == (351504, 208752, 60000, 192)
    count = count_parameters(quick, 1000, 5000)
    assert (count.total, count.active, count.table, count.table_active) == (2665984, 1179136, 160000, 256)
    assert flops_per_token(ci, 1000) == 1049472.0
    assert flops_per_token(quick, 1000) == 6687744.0
    first, layers, last = stage_costs(ci, 1000)
    assert (first, last) == (0.16534391534391535, 0.4397676255524774)
    assert layers == [0.23331678079208265, 0.464127448759721, 0.37969206465364536, 0.3177521648981583]
