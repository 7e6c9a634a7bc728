"""torch_dist folders without megatron-core: there and back bit for bit, cut in any way, and what is
refused.
"""

from __future__ import annotations

import json
import pickle
import shutil
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
from hybridtrain.formats.command import ExportOptions, export_model, import_model
from hybridtrain.formats.megatron_export import export_megatron
from hybridtrain.formats.megatron_import import import_megatron
from hybridtrain.formats.megatron_names import join_qkv, split_qkv
from hybridtrain.formats.torch_dist import (
    COMMON,
    RELEASE,
    TRACKER,
    Region,
    TorchDist,
    read_common,
    write_torch_dist,
)
from hybridtrain.run.run_folder import find_checkpoint
from tests.hybridtrain.formats.tiny import (
    MEGATRON_RUNS,
    equal_weights,
    megatron_refusal,
    random_run,
    whole,
    write_args,
)


@pytest.mark.parametrize("name", ["qwen3", "softmax first"])
def test_there_and_back_bit_for_bit(name: str, ci_data: Path, tmp_path: Path) -> None:
    run = random_run(tmp_path / "run", ci_data, *MEGATRON_RUNS[name])
    written = export_model(run, tmp_path / "out", ExportOptions("megatron", transformer_impl="local"))
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
    """Write the checkpoint again with each tensor cut: (new key, its region of the old tensor) for each
    chunk.
    """
    old = TorchDist(folder)
    chunks = []
    for key, shape in old.shapes.items():
        for new, part in cut(Region(key, shape, (0,) * len(shape), shape)):
            stacked = new != key and len(part.sizes) == 3  # one expert of all becomes a tensor of its own
            offsets, sizes = (part.offsets, part.sizes) if new == key else ((0,) * len(shape), part.sizes)
            whole_shape = shape if new == key else part.sizes
            if stacked:
                offsets, sizes, whole_shape = offsets[1:], sizes[1:], whole_shape[1:]
            value = old.read(part).view(sizes)
            chunks.append(
                (
                    Region(new, whole_shape, offsets, sizes),
                    LazyTensor(sizes, value.dtype, partial(torch.clone, value)),
                )
            )
    common = read_common(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    write_torch_dist(folder, chunks, [], common, 10**6)


def halves(region: Region, dim: int) -> list[Region]:
    first = region.sizes[dim] // 2
    out = []
    for low, size in ((0, first), (first, region.sizes[dim] - first)):
        offsets, sizes = list(region.offsets), list(region.sizes)
        offsets[dim], sizes[dim] = low, size
        out.append(Region(region.key, region.whole, tuple(offsets), tuple(sizes)))
    return out


def across(region: Region) -> list[tuple[str, Region]]:
    """Chunks of half of the rows and half of the columns, as ranks of tensor and expert parallelism have
    them.
    """
    cut = [quarter for half in halves(region, 0) for quarter in halves(half, len(region.sizes) - 1)]
    return [(region.key, chunk) for chunk in (cut if len(region.sizes) > 1 else halves(region, 0))]


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
    return [
        (new + suffix, half)
        for new, one in experts
        for suffix, half in zip(("_w", "_v"), halves(one, rows), strict=True)
    ]


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
    assert megatron_refusal(exported, tmp_path / "back") == [
        "multi_latent_attention=true: multi-head latent attention (MLA): keys and values here have full "
        "width",
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
    assert megatron_refusal(exported, tmp_path / "back") == ["num_layers is missing"]


def test_tensors_that_are_not_those_of_the_args_are_all_named(exported: Path, tmp_path: Path) -> None:
    write_args(exported, num_layers=4, moe_layer_freq=[0, 1, 0, 1], ffn_hidden_size=100)
    problems = megatron_refusal(exported, tmp_path / "back")
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
    with pytest.raises(
        UserError, match=r"has no tokenizer\.json, and Megatron keeps none: name one with --tokenizer"
    ):
        import_megatron(exported, tmp_path / "back")
    tokenizer = ci_data / TOKENIZER
    with pytest.raises(UserError, match=r"common\.pt has no args, .* --settings FILE"):
        import_megatron(exported, tmp_path / "back", tokenizer=tokenizer)
    import_megatron(moe[1], tmp_path / "first")
    import_megatron(
        exported, tmp_path / "back", tokenizer=tokenizer, settings_file=tmp_path / "first/settings.toml"
    )
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
    assert megatron_refusal(exported, back) == [
        'sharded_backend="zarr": of Megatron\'s formats torch_dist is read'
    ]
    (exported / TRACKER).write_text("7")
    assert megatron_refusal(exported, back) == [
        "metadata.json is missing: of Megatron's formats torch_dist is read"
    ]
    with pytest.raises(UserError, match="iter_0000007"):
        import_model(exported, back, None, None, None, None)


def test_a_model_that_is_not_megatrons_is_refused_with_every_reason(ci_data: Path, tmp_path: Path) -> None:
    changes = ("model.moe.top_groups=2", "model.moe.num_groups=4", "model.moe.capacity=1.5")
    run = random_run(
        tmp_path / "run", ci_data, 'model.moe.score="sigmoid"', "model.moe.normalize_gates=false", *changes
    )
    name = "Megatron-core's GPT model"
    with pytest.raises(FormatError) as caught:
        export_megatron(run, tmp_path / "out")
    assert caught.value.problems == [
        "engram: the format megatron has no names for its parameters",
        f"model.moe.capacity=1.5: {name} drops tokens by the batch, if at all",
        f"model.moe.normalize_gates=false: {name} has true with top_k=2",
        f"model.moe.top_groups=2: {name} scores a group by its best top_k // top_groups = 1 experts, ours "
        "by its best 2",
    ]
    for problem, to, family, implementation in (
        ('--format "gguf": it may be hf or megatron', "gguf", None, None),
        ('--transformer-impl "apex": it may be local, transformer_engine', "megatron", None, "apex"),
        ('--family "llama": is of --format hf, not of megatron', "megatron", "llama", None),
        ('--transformer-impl "local": is of --format megatron, not of hf', "hf", None, "local"),
    ):
        with pytest.raises(UserError, match=problem):
            export_model(run, tmp_path / "out", ExportOptions(to, family, implementation))
    with pytest.raises(UserError, match="--tokenizer and --settings are for Megatron's checkpoints"):
        import_model(tmp_path, tmp_path / "new", None, None, ci_data / TOKENIZER, None)
    assert not (tmp_path / "out").exists()
