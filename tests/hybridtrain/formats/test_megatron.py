"""torch_dist folders without megatron-core: there and back bit for bit, cut in any way, and what is refused."""

from __future__ import annotations

import json
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
from hybridtrain.checkpoint.stored import LazyTensor, StoredTensors
from hybridtrain.data.manifest import TOKENIZER
from hybridtrain.errors import DataError, FormatError, UserError
from hybridtrain.formats.command import export_model, import_model
from hybridtrain.formats.megatron_args import from_args
from hybridtrain.formats.megatron_export import export_megatron
from hybridtrain.formats.megatron_fields import LACKING
from hybridtrain.formats.megatron_import import import_megatron
from hybridtrain.formats.megatron_names import join_qkv, split_qkv
from hybridtrain.formats.torch_dist import COMMON, RELEASE, TRACKER, Region, TorchDist, read_common, write_torch_dist
from hybridtrain.run_folder import find_checkpoint
from tests.hybridtrain.formats.tiny import MEGATRON_RUNS, equal_weights, random_run, whole


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory, ci_data: Path) -> tuple[Path, Path]:
    """(a run with every part that Megatron has, its export in several files)."""
    root = tmp_path_factory.mktemp("moe")
    run = random_run(root / "run", ci_data, *MEGATRON_RUNS["glm4_moe"])
    export_megatron(run, root / "out", max_file_bytes=200_000)
    return run, root / "out"


@pytest.fixture
def exported(moe: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of that export to change."""
    return Path(shutil.copytree(moe[1], tmp_path / "exported"))


@pytest.mark.parametrize("name", ["qwen3", "softmax first"])
def test_there_and_back_bit_for_bit(name: str, ci_data: Path, tmp_path: Path) -> None:
    run = random_run(tmp_path / "run", ci_data, *MEGATRON_RUNS[name])
    written = export_model(run, tmp_path / "out", "megatron", None, "local", "5GB", "auto")
    assert written == "torch_dist for local"
    assert import_model(tmp_path / "out", tmp_path / "back", None, 32, None, None).train.seq_len == 32
    assert equal_weights(run, tmp_path / "back")


def test_the_export_is_named_and_described_as_megatrons(moe: tuple[Path, Path], tmp_path: Path) -> None:
    run, out = moe
    assert (out / TRACKER).read_text() == RELEASE
    assert len(list((out / RELEASE).glob("__0_*.distcp"))) > 1
    assert json.loads((out / RELEASE / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
    shapes = TorchDist(out / RELEASE).shapes
    assert shapes["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"] == (8, 2 * 48, 48)
    assert shapes["decoder.layers.1.self_attention.linear_qkv.weight"] == ((4 + 2 * 2) * 12, 48)
    fc1_EXD = whole(TorchDist(out / RELEASE), "decoder.layers.1.mlp.experts.experts.linear_fc1.weight")
    gate_EDF = StoredTensors(find_checkpoint(run)[1]).read("model.layers.1.feedforward.experts.w_gate")
    assert torch.equal(fc1_EXD[:, :48], gate_EDF.mT)
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in shapes
    assert "decoder.layers.1.pre_mlp_layernorm.weight" in shapes
    common = read_common(out / RELEASE)
    assert (common["iteration"], common["content_metadata"]) == (0, {"singleton_local_shards": False})
    args = vars(common["args"])
    said = {
        "num_layers": 3,
        "moe_layer_freq": [0, 1, 1],
        "num_query_groups": 2,
        "moe_shared_expert_intermediate_size": 48,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 1.5,
        "moe_router_group_topk": 1,
        "rotary_base": 10_000,
        "padded_vocab_size": 1024,
        "swiglu": True,
        "add_bias_linear": False,
    }
    assert {key: args[key] for key in said} == said
    settings = import_megatron(out, tmp_path / "back")
    assert settings.model.layers == ("attention+dense", "2*attention+moe")
    assert equal_weights(run, tmp_path / "back")


def test_each_key_value_head_has_its_queries_its_key_and_its_value_together() -> None:
    # heads of two rows: queries 0 to 3, keys 4 and 5, values 6 and 7
    heads = [torch.tensor([[number], [number + 0.5]]) for number in range(8)]
    q, k, v = torch.cat(heads[:4]), torch.cat(heads[4:6]), torch.cat(heads[6:])
    joined = join_qkv(q, k, v, head_dim=2)
    assert joined[::2, 0].tolist() == [0, 1, 4, 6, 2, 3, 5, 7]
    assert all(torch.equal(a, b) for a, b in zip(split_qkv(joined, 2, 2), (q, k, v), strict=True))


def rewrite(folder: Path, cut: Callable[[Region], list[tuple[str, Region]]]) -> None:
    """Write the checkpoint again with each tensor cut: (new key, its region of the old tensor) for each piece."""
    old = TorchDist(folder)
    pieces = []
    for key, shape in old.shapes.items():
        for new, part in cut(Region(key, shape, (0,) * len(shape), shape)):
            stacked = new != key and len(part.sizes) == 3  # one expert of all becomes a tensor of its own
            offsets, sizes = (part.offsets, part.sizes) if new == key else ((0,) * len(shape), part.sizes)
            whole_shape = shape if new == key else part.sizes
            if stacked:
                offsets, sizes, whole_shape = offsets[1:], sizes[1:], whole_shape[1:]
            value = old.read(part).view(sizes)
            pieces.append((Region(new, whole_shape, offsets, sizes), LazyTensor(sizes, value.dtype, partial(torch.clone, value))))
    common = read_common(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    write_torch_dist(folder, pieces, [], common, 10**6)


def halves(region: Region, dim: int) -> list[Region]:
    first = region.sizes[dim] // 2
    out = []
    for low, size in ((0, first), (first, region.sizes[dim] - first)):
        offsets, sizes = list(region.offsets), list(region.sizes)
        offsets[dim], sizes[dim] = low, size
        out.append(Region(region.key, region.whole, tuple(offsets), tuple(sizes)))
    return out


def across(region: Region) -> list[tuple[str, Region]]:
    """Pieces of half of the rows and half of the columns, as ranks of tensor and expert parallelism have them."""
    cut = [quarter for half in halves(region, 0) for quarter in halves(half, len(region.sizes) - 1)]
    return [(region.key, piece) for piece in (cut if len(region.sizes) > 1 else halves(region, 0))]


def apart(region: Region) -> list[tuple[str, Region]]:
    """Every expert and both halves of a gated unit as tensors of their own."""
    experts = [(region.key, region)]
    if ".experts.experts." in region.key:
        experts = []
        for number in range(region.sizes[0]):
            one = Region(region.key, region.whole, (number, 0, 0), (1, *region.sizes[1:]))
            experts.append((region.key.replace(".experts.experts.", f".experts.experts.{number}."), one))
    if not region.key.endswith("linear_fc1.weight"):
        return experts
    rows = len(region.sizes) - 2
    return [(new + suffix, half) for new, one in experts for suffix, half in zip(("_w", "_v"), halves(one, rows), strict=True)]


@pytest.mark.parametrize("cut", [across, apart])
def test_other_cuts_of_the_same_tensors_are_the_same_model(
    cut: Callable[[Region], list[tuple[str, Region]]], moe: tuple[Path, Path], exported: Path, tmp_path: Path
) -> None:
    rewrite(exported / RELEASE, cut)
    import_megatron(exported, tmp_path / "back")
    assert equal_weights(moe[0], tmp_path / "back")


def test_half_precision_halves_the_matrices(moe: tuple[Path, Path], tmp_path: Path) -> None:
    export_megatron(moe[0], tmp_path / "half", dtype="bfloat16")
    full, half = TorchDist(moe[1] / RELEASE), TorchDist(tmp_path / "half" / RELEASE)
    for key in ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight"):
        value = whole(full, key)
        matrix = value.ndim == 2
        assert torch.equal(whole(half, key), value.bfloat16() if matrix else value)
    import_megatron(tmp_path / "half", tmp_path / "back")


def write_args(folder: Path, **changes: Any) -> None:
    common = torch.load(folder / RELEASE / COMMON, weights_only=False)
    torch.save({**common, "args": Namespace(**{**vars(common["args"]), **changes})}, folder / RELEASE / COMMON)


def refusal(folder: Path, out: Path, **options: Any) -> list[str]:
    with pytest.raises(FormatError) as caught:
        import_megatron(folder, out, **options)
    assert not out.exists()
    return caught.value.problems


def test_what_our_model_lacks_is_refused_by_name_all_at_once(exported: Path, tmp_path: Path) -> None:
    write_args(
        exported,
        multi_latent_attention=True,
        add_bias_linear=True,
        normalization="LayerNorm",
        swiglu=False,
        position_embedding_type="learned_absolute",
        rotary_interleaved=True,
        moe_shared_expert_intermediate_size=50,
        moe_router_load_balancing_type="sinkhorn",
        num_query_groups=3,
    )
    assert refusal(exported, tmp_path / "back") == [
        "multi_latent_attention=true: multi-head latent attention (MLA): keys and values here have full width",
        "add_bias_linear=true: biases",
        'normalization="LayerNorm": norms other than RMSNorm',
        "swiglu=false: an activation other than SwiGLU",
        'position_embedding_type="learned_absolute": positions other than rotary ones',
        "rotary_interleaved=true: rotations of neighbours; those of halves are read",
        'moe_router_load_balancing_type="sinkhorn": routing by Sinkhorn\'s algorithm',
        "moe_shared_expert_intermediate_size=50: shared experts as wide as 48 or a multiple of it",
        "model.attention.num_kv_heads=3 does not divide num_heads=4; it may be 1, 2 or 4",
    ]
    write_args(exported, num_layers=None)
    assert refusal(exported, tmp_path / "back") == ["num_layers is missing"]


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


def test_arguments_may_have_the_names_of_megatron_cores_fields(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = vars(read_common(exported / RELEASE)["args"])
    renamed = {key: value for key, value in args.items() if key not in ("norm_epsilon", "apply_layernorm_1p", "num_experts")}
    renamed |= {"layernorm_epsilon": 3e-6, "layernorm_zero_centered_gamma": True, "num_moe_experts": 8, "some_new_thing": 2}
    model, problems = from_args(renamed)
    assert (model["norm_eps"], model["moe"]["num_experts"]) == (3e-6, 8)
    assert problems == ["apply_layernorm_1p=true: norm weights less one"]
    assert "not known here, and taken for harmless: some_new_thing=2\n" in capsys.readouterr().err
    with pytest.raises(FormatError, match="layernorm_epsilon=3e-06 and norm_epsilon=1e-06 are the same argument"):
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
    ({"moe_router_score_function": "softplus"}, "moe_router_score_function: Input should be 'softmax' or 'sigmoid'"),
    ({"untie_embeddings_and_output_weights": 1}, "untie_embeddings_and_output_weights: Input should be a valid boolean"),
)


def test_odd_arguments_end_in_a_message(exported: Path, tmp_path: Path) -> None:
    common = torch.load(exported / RELEASE / COMMON, weights_only=False)
    args = vars(common["args"])
    for changes, message in ODD:
        torch.save({**common, "args": {**args, **changes}}, exported / RELEASE / COMMON)
        with pytest.raises(UserError, match=re.escape(message)):
            import_megatron(exported, tmp_path / "back")
    torch.save({**common, "args": [args]}, exported / RELEASE / COMMON)
    assert refusal(exported, tmp_path / "back") == ["they are list, must be a namespace or a dict of names"]
    torch.save({**common, "args": args}, exported / RELEASE / COMMON)
    import_megatron(exported, tmp_path / "back")  # a dict is as good


def edit(folder: Path, change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> None:
    """Write the checkpoint again with what `change` makes of each tensor."""
    old = TorchDist(folder)
    values = {new: value for key in old.shapes for new, value in change(key, whole(old, key)).items()}
    shapes = {key: tuple(value.shape) for key, value in values.items()}
    regions = [Region(key, shape, (0,) * len(shape), shape) for key, shape in shapes.items()]
    tensors = [LazyTensor(shapes[key], value.dtype, partial(torch.clone, value)) for key, value in values.items()]
    common = read_common(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    write_torch_dist(folder, list(zip(regions, tensors, strict=True)), [], common, 10**6)


EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
FC1, NORM = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight", "decoder.final_layernorm.weight"


def test_tensors_are_looked_at_and_not_taken_by_name(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def odd_dtypes(key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        return {key: value.to({NORM: torch.complex64, HEAD: torch.int8}.get(key, torch.float32))}

    first = Path(shutil.copytree(exported, tmp_path / "first"))
    edit(first / RELEASE, odd_dtypes)
    assert refusal(first, tmp_path / "back") == [
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
    problems = refusal(second, tmp_path / "back")
    assert f"{FC1} has 48 NaN and 0 infinite values" in problems
    assert "decoder.layers.0.self_attention.linear_qkv.weight has 1 NaN and 0 infinite values" in problems

    write_args(exported, untie_embeddings_and_output_weights=False)
    assert refusal(exported, tmp_path / "back") == [f"{HEAD} differs from {EMBEDDING}, and the settings say that they are tied"]
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


def test_tensors_that_are_not_those_of_the_args_are_all_named(exported: Path, tmp_path: Path) -> None:
    write_args(exported, num_layers=4, moe_layer_freq=[0, 1, 0, 1], ffn_hidden_size=100)
    problems = refusal(exported, tmp_path / "back")
    assert "decoder.layers.3.self_attention.linear_qkv.weight is missing" in problems
    assert "decoder.layers.0.mlp.linear_fc1.weight has shape [192, 48], must have [200, 48]" in problems
    assert "decoder.layers.2.mlp.router.weight has no place in our model" in problems


def test_a_settings_file_stands_in_for_args_and_a_tokenizer_must_be_named(
    moe: tuple[Path, Path], exported: Path, ci_data: Path, tmp_path: Path
) -> None:
    common = torch.load(exported / RELEASE / COMMON, weights_only=False)
    del common["args"]
    torch.save(common, exported / RELEASE / COMMON)
    (exported / TOKENIZER).unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json, and Megatron keeps none: name one with --tokenizer"):
        import_megatron(exported, tmp_path / "back")
    tokenizer = ci_data / TOKENIZER
    with pytest.raises(UserError, match=r"common\.pt has no args, .* --settings FILE"):
        import_megatron(exported, tmp_path / "back", tokenizer=tokenizer)
    import_megatron(moe[1], tmp_path / "first")
    import_megatron(exported, tmp_path / "back", tokenizer=tokenizer, settings_file=tmp_path / "first/settings.toml")
    assert equal_weights(moe[0], tmp_path / "back")


class Unwanted:
    """Copies a file when it is unpickled."""

    def __init__(self, source: Path, target: Path) -> None:
        self.paths = str(source), str(target)

    def __reduce__(self) -> tuple[Any, ...]:
        return shutil.copyfile, self.paths


def test_nothing_in_the_files_is_run(exported: Path, tmp_path: Path) -> None:
    trap = Unwanted(exported / TRACKER, tmp_path / "trapped")
    write_args(exported, trap=trap)
    index = pickle.loads((exported / RELEASE / METADATA).read_bytes())
    index.planner_data = trap
    (exported / RELEASE / METADATA).write_bytes(pickle.dumps(index))
    import_megatron(exported, tmp_path / "back")
    assert not (tmp_path / "trapped").exists()
    pickle.loads(pickle.dumps(trap))
    assert (tmp_path / "trapped").exists()


def test_damaged_and_other_folders_are_refused(exported: Path, tmp_path: Path) -> None:
    saved, back = exported / RELEASE, tmp_path / "back"
    (saved / "__0_1.distcp").rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"cannot be read: .*__0_1\.distcp"):
        import_megatron(exported, back)
    (tmp_path / "moved").rename(saved / "__0_1.distcp")
    (saved / COMMON).write_bytes(b"\0" * 20)
    with pytest.raises(DataError, match=r"common\.pt: cannot be read"):
        import_megatron(exported, back)
    (saved / METADATA).write_bytes(b"\0" * 20)
    with pytest.raises(DataError, match=r"\.metadata: cannot be read"):
        import_megatron(exported, back)
    (saved / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert refusal(exported, back) == ['sharded_backend="zarr": of Megatron\'s formats torch_dist is read']
    (exported / TRACKER).write_text("7")
    assert refusal(exported, back) == ["metadata.json is missing: of Megatron's formats torch_dist is read"]
    with pytest.raises(UserError, match="iter_0000007"):
        import_model(exported, back, None, None, None, None)


def test_a_model_that_is_not_megatrons_is_refused_with_every_reason(ci_data: Path, tmp_path: Path) -> None:
    changes = ("model.moe.top_groups=2", "model.moe.num_groups=4", "model.moe.capacity=1.5")
    run = random_run(tmp_path / "run", ci_data, 'model.moe.score="sigmoid"', "model.moe.normalize_gates=false", *changes)
    name = "Megatron-core's GPT model"
    with pytest.raises(FormatError) as caught:
        export_megatron(run, tmp_path / "out")
    assert caught.value.problems == [
        f"layers 1, 3 have a lookup memory; {name} has none",
        f"model.moe.capacity=1.5: {name} drops tokens by the batch, if at all",
        f"model.moe.normalize_gates=false: {name} has true with top_k=2",
        f"model.moe.top_groups=2: {name} scores a group by its best top_k // top_groups = 1 experts, ours by its best 2",
    ]
    for problem, to, family, implementation in (
        ('--format "gguf": it may be hf or megatron', "gguf", None, None),
        ('--transformer-impl "apex": it may be local, transformer_engine', "megatron", None, "apex"),
        ('--family "llama": is of --format hf, not of megatron', "megatron", "llama", None),
        ('--transformer-impl "local": is of --format megatron, not of hf', "hf", None, "local"),
    ):
        with pytest.raises(UserError, match=problem):
            export_model(run, tmp_path / "out", to, family, implementation, "5GB", "auto")
    with pytest.raises(UserError, match="--tokenizer and --settings are for Megatron's checkpoints"):
        import_model(tmp_path, tmp_path / "new", None, None, ci_data / TOKENIZER, None)
    assert not (tmp_path / "out").exists()
