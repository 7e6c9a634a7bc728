"""What a torch_dist folder of somebody else may hold: odd arguments, tensors that are not taken by name
alone, odd chunks.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridtrain.checkpoint.files import METADATA
from hybridtrain.checkpoint.stored import LazyTensor
from hybridtrain.errors import DataError, FormatError, UserError
from hybridtrain.formats.megatron_args import from_args
from hybridtrain.formats.megatron_fields import LACKING
from hybridtrain.formats.megatron_import import import_megatron
from hybridtrain.formats.torch_dist import COMMON, RELEASE, Region, TorchDist, read_common, write_torch_dist
from tests.hybridtrain.formats.tiny import megatron_refusal, whole, write_args


def test_every_refused_argument_is_refused_by_name(exported: Path) -> None:
    args = vars(read_common(exported / RELEASE)["args"])
    assert from_args(Namespace(**args))[1] == []
    for key, absent, what in LACKING:
        other = not absent[-1] if isinstance(absent[-1], bool) else "other"
        assert f"{key}={json.dumps(other)}: {what}" in from_args({**args, key: other})[1], key
        for value in absent:
            assert from_args({**args, key: value})[1] == [], key


def test_a_scale_of_attention_scores_other_than_the_usual_is_refused(exported: Path) -> None:
    args = vars(read_common(exported / RELEASE)["args"])
    assert from_args({**args, "softmax_scale": 12**-0.5})[1] == []
    scaled = "softmax_scale=0.5: attention scores of another scale than 1 / sqrt(kv_channels) = 0.288675"
    assert from_args({**args, "softmax_scale": 0.5})[1] == [scaled]


def test_arguments_may_have_the_names_of_megatron_cores_fields(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = vars(read_common(exported / RELEASE)["args"])
    renamed = {
        key: value
        for key, value in args.items()
        if key not in ("norm_epsilon", "apply_layernorm_1p", "num_experts")
    }
    renamed |= {
        "layernorm_epsilon": 3e-6,
        "layernorm_zero_centered_gamma": True,
        "num_moe_experts": 8,
        "some_new_thing": 2,
    }
    model, problems = from_args(renamed)
    assert (model["norm_eps"], model["moe"]["num_experts"]) == (3e-6, 8)
    assert problems == ["apply_layernorm_1p=true: norm weights less one"]
    assert "not known here, and taken for harmless: some_new_thing=2\n" in capsys.readouterr().err
    with pytest.raises(
        FormatError, match="layernorm_epsilon=3e-06 and norm_epsilon=1e-06 are the same argument"
    ):
        from_args({**args, "layernorm_epsilon": 3e-6})


ODD: tuple[tuple[dict[str, Any], str], ...] = (
    ({"moe_layer_freq": 0}, "moe_layer_freq: Value error, must be a number from 1 on"),
    ({"moe_layer_freq": 1.0}, "moe_layer_freq: Value error, must be a number from 1 on"),
    ({"moe_layer_freq": "[0,1]"}, "moe_layer_freq: Value error, must be a number from 1 on"),
    ({"moe_layer_freq": [0, True, 1]}, "moe_layer_freq: Value error, must be a number from 1 on"),
    ({"moe_layer_freq": [0, 1]}, "moe_layer_freq=[0, 1]: a number, or 0 or 1 for each of 3 layers"),
    ({"num_layers": 9_000, "moe_layer_freq": 1}, "9000 layers are promised, 3 stored"),
    ({"num_experts": 50_000}, "50000 experts are promised, 8 stored"),
    ({"num_layers": -1, "hidden_size": "48"}, "num_layers: Input should be greater"),
    ({"num_layers": -1, "hidden_size": "48"}, "hidden_size: Input should be a valid integer"),
    ({"num_attention_heads": 0}, "num_attention_heads: Input should be greater"),
    ({"kv_channels": 7}, "model.attention.head_dim=7 is odd"),
    ({"hidden_size": 10**40}, "hidden_size: Input should be less"),
    ({"norm_epsilon": float("nan")}, "norm_epsilon: Input should be"),
    ({"rotary_base": None, "swiglu": [True]}, "swiglu=[true]: an activation other than SwiGLU"),
    ({"window_size": (127, 0)}, "window_size=[127, 0]: attention to a sliding window"),
    (
        {"moe_router_score_function": "softplus"},
        "moe_router_score_function: Input should be 'softmax' or 'sigmoid'",
    ),
    (
        {"untie_embeddings_and_output_weights": 1},
        "untie_embeddings_and_output_weights: Input should be a valid boolean",
    ),
)


def test_odd_arguments_end_in_a_message(exported: Path, tmp_path: Path) -> None:
    common = torch.load(exported / RELEASE / COMMON, weights_only=False)
    args = vars(common["args"])
    for changes, message in ODD:
        torch.save({**common, "args": {**args, **changes}}, exported / RELEASE / COMMON)
        with pytest.raises(UserError, match=re.escape(message)):
            import_megatron(exported, tmp_path / "back")
    torch.save({**common, "args": [args]}, exported / RELEASE / COMMON)
    assert megatron_refusal(exported, tmp_path / "back") == [
        "they are list, must be a namespace or a dict of names"
    ]
    torch.save({**common, "args": args}, exported / RELEASE / COMMON)
    import_megatron(exported, tmp_path / "back")  # a dict is as good


def test_what_json_has_not_is_not_given_back(exported: Path, tmp_path: Path) -> None:
    write_args(
        exported, init_method_std=[torch.float32], tokenizer_type=[["a"]], moe_aux_loss_coeff=[0.1, 0.2]
    )
    import_megatron(exported, tmp_path / "back")
    args = json.loads((tmp_path / "back/origin.json").read_text())["args"]
    assert args["moe_aux_loss_coeff"] == [0.1, 0.2]
    assert not {"init_method_std", "tokenizer_type"} & args.keys()


def test_a_common_file_is_read_in_bounds(exported: Path) -> None:
    file, text = exported / RELEASE / COMMON, "x" * 1_000_000
    many = [0] * 1000
    for content in ([text] * 1000, {"args": [text] * 1000}, {str(number): many for number in range(1000)}):
        torch.save(content, file)
        with pytest.raises(DataError, match="more than 262,144 parts"):
            read_common(exported / RELEASE)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(DataError, match="is not a regular file"):
        read_common(exported / RELEASE)


def edit(folder: Path, change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> None:
    """Write the checkpoint again with what `change` makes of each tensor."""
    old = TorchDist(folder)
    values = {new: value for key in old.shapes for new, value in change(key, whole(old, key)).items()}
    shapes = {key: tuple(value.shape) for key, value in values.items()}
    regions = [Region(key, shape, (0,) * len(shape), shape) for key, shape in shapes.items()]
    tensors = [
        LazyTensor(shapes[key], value.dtype, partial(torch.clone, value)) for key, value in values.items()
    ]
    common = read_common(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    write_torch_dist(folder, list(zip(regions, tensors, strict=True)), [], common, 10**6)


EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
FC1, NORM = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight", "decoder.final_layernorm.weight"


def test_tensors_are_looked_at_and_not_taken_by_name(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def odd_dtypes(key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        return {key: value.to({NORM: torch.complex64, HEAD: torch.int8}.get(key, torch.float32))}

    first = Path(shutil.copytree(exported, tmp_path / "first"))
    edit(first / RELEASE, odd_dtypes)
    assert megatron_refusal(first, tmp_path / "back") == [
        f"{key} is {dtype}: weights may be float32, bfloat16, float16, float64; dequantise others first"
        for key, dtype in ((NORM, "complex64"), (HEAD, "int8"))
    ]

    def not_numbers(key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        value = value.double() if key == NORM else value
        if key in (FC1, "decoder.layers.0.self_attention.linear_qkv.weight"):
            value[-1, -1] = torch.nan  # of the last expert, of the last head
        return {key: value}

    second = Path(shutil.copytree(exported, tmp_path / "second"))
    edit(second / RELEASE, not_numbers)
    problems = megatron_refusal(second, tmp_path / "back")
    assert f"{FC1} has 48 NaN and 0 infinite values" in problems
    assert "decoder.layers.0.self_attention.linear_qkv.weight has 1 NaN and 0 infinite values" in problems

    write_args(exported, untie_embeddings_and_output_weights=False)
    assert megatron_refusal(exported, tmp_path / "back") == [
        f"{HEAD} differs from {EMBEDDING}, and the settings say that they are tied"
    ]
    embedding = whole(TorchDist(exported / RELEASE), EMBEDDING)
    edit(exported / RELEASE, lambda key, value: {key: embedding if key == HEAD else value})
    assert import_megatron(exported, tmp_path / "tied").model.tie_embeddings


def damage_index(folder: Path, change: Callable[[Any], None]) -> None:
    index = pickle.loads((folder / METADATA).read_bytes())
    change(index)
    (folder / METADATA).write_bytes(pickle.dumps(index))


def test_pieces_must_be_what_the_index_says_and_lie_in_the_folder(exported: Path, tmp_path: Path) -> None:
    saved, back = exported / RELEASE, tmp_path / "back"
    good = (saved / METADATA).read_bytes()

    def outside(index: Any) -> None:
        for place in index.storage_data.values():
            place.relative_path = f"../{RELEASE}/{place.relative_path}"

    def twice(index: Any) -> None:
        index.state_dict_metadata[NORM].chunks *= 2

    def other_dtype(index: Any) -> None:
        index.state_dict_metadata[NORM].properties.dtype = torch.float16

    def other_dims(index: Any) -> None:
        index.state_dict_metadata[NORM].chunks[0].sizes = torch.Size([48, 1])

    for change, message in (
        (outside, r"which is not one below"),
        (twice, f"{NORM}: its chunks leave out a part of .* or lie one over the other"),
        (other_dtype, f"{NORM} cannot be read: "),
        (other_dims, f"{NORM}: a chunk of another number of dims than 1"),
    ):
        damage_index(saved, change)
        with pytest.raises(UserError, match=message):
            import_megatron(exported, back)
        (saved / METADATA).write_bytes(good)
    import_megatron(exported, back)
