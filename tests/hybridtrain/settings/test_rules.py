"""Settings: what contradicts itself and what the user reads then; the layer pattern."""

from __future__ import annotations

import pytest

from hybridtrain.errors import SettingsError
from hybridtrain.settings.layers import LayerSpec, engram_layers, layer_specs
from hybridtrain.settings.load import parse_settings
from hybridtrain.settings.rules import notices
from hybridtrain.settings.tree import Settings

LAYER = 'write "[N*][engram+]MIXER+FEEDFORWARD" with MIXER one of attention and FEEDFORWARD one of dense, moe'


@pytest.mark.parametrize(
    ("overrides", "problems"),
    [
        (
            ["model.attention.num_kv_heads=3"],
            ["model.attention.num_kv_heads=3 does not divide num_heads=4; it may be 1, 2 or 4"],
        ),
        (
            ["model.attention.head_dim=7"],
            ["model.attention.head_dim=7 is odd; RoPE needs an even one, e.g. 8"],
        ),
        (["model.moe.top_k=9"], ["model.moe.top_k=9 exceeds num_experts=8; it may be 1 to 8"]),
        (
            ["model.moe.num_groups=3"],
            ["model.moe.num_groups=3 does not divide num_experts=8; it may be 1, 2, 4 or 8"],
        ),
        (
            ["model.moe.num_groups=4", "model.moe.top_groups=5"],
            ["model.moe.top_groups=5 exceeds num_groups=4; it may be 1 to 4"],
        ),
        (
            ["model.moe.num_groups=4", "model.moe.top_groups=1", "model.moe.top_k=3"],
            ["model.moe.top_k=3 exceeds the 2 experts in top_groups=1 groups; it may be 1 to 2"],
        ),
        (
            ["engram.orders=[3,2]"],
            ["engram.orders=[3, 2] must be rising n-gram lengths from 2 on, e.g. [2, 3]"],
        ),
        (
            ["engram.orders=[1,2]"],
            ["engram.orders=[1, 2] must be rising n-gram lengths from 2 on, e.g. [2, 3]"],
        ),
        (
            ["engram.orders=[2,2]"],
            ["engram.orders=[2, 2] must be rising n-gram lengths from 2 on, e.g. [2, 3]"],
        ),
        (["engram.orders=[]"], ["engram.orders=[] must be rising n-gram lengths from 2 on, e.g. [2, 3]"]),
        (
            ["train.global_batch=6", "train.micro_batches=4"],
            ["train.micro_batches=4 does not divide train.global_batch=6; it may be 1, 2, 3 or 6"],
        ),
        (
            ["train.micro_batches=2", "engram.exchange_groups=3"],
            ["engram.exchange_groups=3 does not divide train.micro_batches=2; it may be 1 or 2"],
        ),
        (
            ["checkpoint.table_full_every=2", "engram.optimizer=adam"],
            [
                'checkpoint.table_full_every=2 saves the rows that changed, and engram.optimizer="adam" '
                "changes all; it may be 1"
            ],
        ),
        (["checkpoint.keep=3"], ["checkpoint.keep: unknown key; did you mean checkpoint.keep_last?"]),
        (
            ["engram.fetch=overlap", "engram.optimizer=adam"],
            [
                'engram.fetch="overlap" needs rows that an update leaves alone, and engram.optimizer="adam" '
                "changes all; "
                'it may be "step" or "stale"'
            ],
        ),
        (
            ["engram.fetch=stale", "train.micro_batches=2", "engram.exchange_groups=2"],
            ['engram.exchange_groups=2: engram.fetch="stale" reads all rows of a step at once; it may be 1'],
        ),
        (
            [
                "optim.lr=0.1",
                "optim.backbone=muon",
                "optim.muon_lr=0.5",
                "optim.weight_decay=2",
                "engram.weight_decay=2.0",
            ],
            [
                "optim.muon_lr * optim.weight_decay = 0.5 * 2 = 1 turns weights to zero or round in one "
                "step; optim.weight_decay may be below 2",
                "optim.lr * engram.lr_multiplier * engram.weight_decay = 0.5 * 2 = 1 turns weights to zero "
                "or round in one step; engram.weight_decay may be below 2",
            ],
        ),
        (
            ["optim.beta2=1.0", "optim.muon_momentum=1.0"],
            ["optim.beta2=1.0 would never take in a gradient; it may be below 1"],
        ),
        (
            ["optim.beta1=1.0", "optim.muon_momentum=1.0", "optim.backbone=muon"],
            [
                "optim.beta1=1.0 would never take in a gradient; it may be below 1",
                "optim.muon_momentum=1.0 would never take in a gradient; it may be below 1",
            ],
        ),
        (
            ["optim.weight_decay=400.0", "engram.weight_decay=400.0", "engram.enabled=false"],
            [
                "optim.lr * optim.weight_decay = 0.003 * 400 = 1.2 turns weights to zero or round in one "
                "step; optim.weight_decay may be below 333.333"
            ],
        ),
        (
            ["train.on_spike=rollback", "checkpoint.every=0"],
            [
                'train.on_spike="rollback" goes back to checkpoints, and checkpoint.every=0 writes none; set '
                "it above 0"
            ],
        ),
        (
            ["train.on_spike=skip", "train.engine=deepspeed"],
            [
                'train.on_spike="skip": DeepSpeed keeps the gradients of a step that is not made; with '
                'train.engine="deepspeed" '
                'it may be "stop"'
            ],
        ),
        (
            ['data.validation=["held.txt"]', "data.validation_fraction=0.1"],
            [
                "data.validation_fraction and data.validation are both given; either is held out, leave one "
                "out"
            ],
        ),
        (
            ["data.tokenizer=t.json", "data.vocab_size=100"],
            [
                "data.vocab_size and data.tokenizer are both given; a loaded tokenizer has its own "
                "vocabulary, leave one out"
            ],
        ),
        (
            ["parallel.pp=2", "train.micro_batches=4", "engram.exchange_groups=2"],
            ["engram.exchange_groups=2: a pipeline needs the rows of all micro-batches at once; it may be 1"],
        ),
        (
            ["parallel.reshard_after_forward=true"],
            [
                "parallel.reshard_after_forward=true frees gathered parameters, and with zero=1 none are "
                "gathered; it may be false, or zero 3"
            ],
        ),
        (
            [
                "parallel.pp=2",
                "parallel.zero=3",
                "parallel.reshard_after_forward=true",
                "parallel.schedule=zero_bubble",
            ],
            [
                "parallel.reshard_after_forward=true frees parameters that parallel.schedule=zero_bubble "
                "still needs; it may be false, or parallel.schedule gpipe or 1f1b"
            ],
        ),
        (
            ["train.compile=true", "train.recompute=selective"],
            [
                "train.recompute=selective: the products inside compiled layers are not seen; it may be "
                "none or full, or train.compile=false"
            ],
        ),
        (
            ["train.compile=true", "parallel.pp=2", "parallel.schedule=zbv"],
            [
                "train.compile=true: parallel.schedule=zbv goes back through a layer in parts, and a "
                "compiled layer does all of it each time and may overwrite what the next needs; it may be "
                "false, or parallel.schedule one of gpipe, 1f1b, interleaved"
            ],
        ),
        (
            ["train.precision=bfloat16", "model.dim=36"],
            [
                "model.dim=36 is not a multiple of 8, as grouped products need (rows of 16 bytes); the next "
                "is 40"
            ],
        ),
        (
            ["train.engine=deepspeed", "train.init_from=runs/a", "engram.enabled=false"],
            [
                "train.init_from: DeepSpeed keeps copies of the weights that would not be filled; "
                "start with train.engine=native, and go on with --resume train.engine=deepspeed"
            ],
        ),
        (["model.layers=[]"], ["model.layers is empty; a model needs at least one layer"]),
        (['model.layers=["attention+fast"]'], [f'model.layers: "attention+fast" is not a layer; {LAYER}']),
        (['model.layers=["attention"]'], [f'model.layers: "attention" is not a layer; {LAYER}']),
        (['model.layers=["0*attention+moe"]'], [f'model.layers: "0*attention+moe" is not a layer; {LAYER}']),
        (
            ["model.attention.head_dim=5", "model.moe.top_k=11", "train.micro_batches=5"],
            [
                "model.attention.head_dim=5 is odd; RoPE needs an even one, e.g. 6",
                "model.moe.top_k=11 exceeds num_experts=8; it may be 1 to 8",
                "train.micro_batches=5 does not divide train.global_batch=32; it may be 1, 2, 4, 8, 16 or 32",
            ],
        ),
    ],
)
def test_contradictions_are_all_told_with_what_would_be_legal(
    overrides: list[str], problems: list[str]
) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings({}, overrides)
    assert caught.value.problems == problems
    assert str(caught.value) == "\n".join(
        [f"settings: {len(problems)} problem(s)", *(f"  {p}" for p in problems)]
    )


@pytest.mark.parametrize(("key", "width"), [("model.dim", 50), ("model.moe.hidden", 30)])
def test_widths_that_grouped_products_cannot_have_are_refused_where_there_are_experts(
    key: str, width: int
) -> None:
    text = (
        f"{key}={width} is not a multiple of 4, as grouped products need (rows of 16 bytes); the next is "
        f"{width + 2}"
    )
    with pytest.raises(SettingsError) as caught:
        parse_settings({}, [f"{key}={width}"])
    assert caught.value.problems == [text]
    parse_settings({}, [f"{key}={width}", 'model.layers=["attention+dense"]'])


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], []),
        (["train.steps=100", "checkpoint.keep_every=200"], []),
        (
            ["train.steps=4"],
            [
                "optim.warmup_steps=50 with train.steps=4: the learning rate only rises, to 8% of its peak "
                "at the last step",
                "train.eval_every=100 with train.steps=4: validation at the end only",
                "checkpoint.every=100 with train.steps=4: a checkpoint at the end only",
            ],
        ),
        (
            [
                "optim.schedule=wsd",
                "optim.decay_fraction=0.95",
                "checkpoint.every=100",
                "checkpoint.keep_every=150",
            ],
            [
                "optim.decay_fraction=0.95 of train.steps=500 begins within the warm-up: the decay has the "
                "450 steps that optim.warmup_steps=50 leaves",
                "checkpoint.keep_every=150 is not a multiple of checkpoint.every=100: kept for good "
                "is the checkpoint of every 300th step",
            ],
        ),
        (
            ["train.steps=100", "train.spike_score=6"],
            ["train.spike_window=100 with train.steps=100: no loss is judged to be a spike"],
        ),
    ],
)
def test_what_is_legal_and_hardly_wanted_is_told(overrides: list[str], told: list[str]) -> None:
    assert notices(parse_settings({}, overrides)) == told


def test_layers_are_read_in_order_and_repeated() -> None:
    settings = parse_settings(
        {}, ['model.layers=["attention+dense", "2 * engram+attention+moe", "attention+moe"]']
    )
    engram = LayerSpec(engram=True, mixer="attention", feedforward="moe")
    assert layer_specs(settings) == (
        LayerSpec(engram=False, mixer="attention", feedforward="dense"),
        engram,
        engram,
        LayerSpec(engram=False, mixer="attention", feedforward="moe"),
    )
    assert engram_layers(settings) == (1, 2)


def test_the_engram_can_be_taken_out_of_every_layer() -> None:
    settings = parse_settings({}, ["engram.enabled=false"])
    assert engram_layers(settings) == ()
    assert len(layer_specs(settings)) == 4


def test_every_field_is_frozen_and_the_defaults_agree() -> None:
    settings = Settings()
    assert settings == parse_settings({})
    with pytest.raises(ValueError, match="frozen"):
        settings.train.steps = 3  # type: ignore[misc]
