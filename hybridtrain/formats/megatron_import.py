"""From a folder of Megatron-core's torch_dist format to a folder of ours that runs start from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridtrain.checkpoint.dtypes import dtype_problems
from hybridtrain.checkpoint.stored import LazyTensor
from hybridtrain.console import say
from hybridtrain.data.manifest import TOKENIZER
from hybridtrain.errors import FormatError, SettingsError, UserError
from hybridtrain.formats.megatron_args import NAME, carried, from_args, misfits
from hybridtrain.formats.megatron_names import (
    JOINED,
    LAYER,
    OUTSIDE,
    QKV,
    Layout,
    outside,
    qkv_shape,
    split_qkv,
)
from hybridtrain.formats.native import SEQ_LEN, Import, ImportedTokenizer, settings_of_import, write_run
from hybridtrain.formats.origin import Origin
from hybridtrain.formats.tensors import new_router_state, their_shape, to_ours
from hybridtrain.formats.torch_dist import COMMON, Region, TorchDist, find_iteration, read_common
from hybridtrain.formats.values import Values
from hybridtrain.run.init_from import model_tensors
from hybridtrain.settings.layers import layer_specs
from hybridtrain.settings.load import load_settings
from hybridtrain.settings.tree import ModelSettings, Settings

_TRAINING = (
    "optimizer.",
    "chained_",
    "rng_state",
    "rerun_state_machine",
)  # where the keys of what is not the model begin


def import_megatron(
    folder: Path,
    out: Path,
    *,
    tokenizer: Path | None = None,
    settings_file: Path | None = None,
    separator: str | None = None,
    seq_len: int | None = None,
) -> Settings:
    """Write `out` as `import_hf` does, from a checkpoint or the latest of a folder of them; any parallel
    layout wrote it.

    The model is that of `settings_file` (our TOML, its section `model`), else that of the checkpoint's
    arguments. The tokenizer is `tokenizer`, else the tokenizer.json beside the checkpoint. Raises FormatError
    listing everything that our model lacks and every tensor that is missing, unknown or of another shape.
    """
    saved = find_iteration(folder)
    if tokenizer is None and not (folder / TOKENIZER).is_file():
        raise UserError(f"{folder} has no {TOKENIZER}, and Megatron keeps none: name one with --tokenizer")
    words = ImportedTokenizer(tokenizer or folder / TOKENIZER, separator)
    weights = TorchDist(saved)
    embedding = weights.shapes.get(OUTSIDE["embed.weight"])
    if embedding is None:
        raise FormatError(
            str(saved), [f"{OUTSIDE['embed.weight']} is missing: the checkpoint is not one of {NAME}"]
        )
    model, args, problems = _model(saved, settings_file)
    model["vocab_size"] = embedding[0]  # what is padded stays padded
    settings = None
    try:
        settings = settings_of_import(
            model, out, seq_len or min(SEQ_LEN, args.get("max_position_embeddings") or SEQ_LEN), "args"
        )
        problems += misfits(settings, biased=False)
    except SettingsError as error:
        problems += error.problems
    problems += words.misfits(embedding[0])
    if settings is None or problems:
        raise FormatError(str(saved), problems)
    values = Values(str(saved))
    dtype, positions = (
        str(weights.dtype(OUTSIDE["embed.weight"])).removeprefix("torch."),
        args.get("max_position_embeddings"),
    )
    origin = Origin(args=args, dtype=dtype, positions=positions)
    return write_run(out, settings, Import(NAME, _tensors(weights, settings, values), values, origin), words)


def _model(saved: Path, settings_file: Path | None) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(section `model` of settings, the arguments that an export gives back, what our model lacks)."""
    if settings_file is not None:
        settings = load_settings(settings_file)
        say(f"{saved}: the model is that of {settings_file}; args in {COMMON} are not looked at")
        return settings.model.model_dump(mode="json"), {"max_position_embeddings": settings.train.seq_len}, []
    common = read_common(saved)
    args = common.get("args") if isinstance(common, dict) else None
    if args is None:
        raise UserError(
            f"{saved / COMMON} has no args, which say what model it is: describe it with --settings FILE"
        )
    model, problems = from_args(args)
    return model, carried(args), problems


def _tensors(weights: TorchDist, settings: Settings, values: Values) -> dict[str, LazyTensor]:
    """Our tensors, to be made of theirs; FormatError where theirs are not the ones that the settings
    promise.
    """
    _check_counts(weights, settings)
    model = settings.model
    has_bias = model.moe.score == "sigmoid" and model.moe.bias_rate > 0
    layout = Layout.of_keys(weights.shapes, len(layer_specs(settings)), model.moe.num_experts)
    expected: dict[str, tuple[int, ...]] = {}
    out: dict[str, LazyTensor] = {}
    for name, value in model_tensors(settings, model.vocab_size).items():
        shape = tuple(value.shape)
        regions = _regions(name, shape, layout, model, weights.shapes)
        if name.endswith("bias_E") and regions[0].key not in weights.shapes and not has_bias:
            regions = []
        expected |= {region.key: region.whole for region in regions}
        out[f"model.{name}"] = LazyTensor(
            shape, torch.float32, partial(_make, weights, values, name, regions, model, shape)
        )
    head = OUTSIDE["head.weight"]
    if model.tie_embeddings and head in weights.shapes:
        expected[head] = expected[OUTSIDE["embed.weight"]]
    problems = _tensor_problems(expected, weights)
    if (
        model.tie_embeddings
        and head in weights.shapes
        and not problems
        and not _same(weights, OUTSIDE["embed.weight"], head)
    ):
        problems.append(
            f"{head} differs from {OUTSIDE['embed.weight']}, and the settings say that they are tied"
        )
    if problems:
        raise FormatError(
            f"{weights.folder}: its tensors are not those of {NAME} of these settings", problems
        )
    return out


def _regions(
    name: str, shape: tuple[int, ...], layout: Layout, model: ModelSettings, keys: Collection[str]
) -> list[Region]:
    """Where our tensor is: in one place, one per expert, or none. Of several names that which is there, else
    the first.
    """
    if name in OUTSIDE:
        return [outside(name, shape)]
    theirs = LAYER.get(name.split(".", 2)[2], ())
    shape = qkv_shape(model) if QKV in theirs else their_shape(name, shape)
    choices = [layout.regions(name, choice, shape) for choice in theirs]
    return next((regions for regions in choices if regions[0].key in keys), choices[0] if choices else [])


def _check_counts(weights: TorchDist, settings: Settings) -> None:
    """Raises FormatError where far more layers or experts are promised than stored, before a model of so many
    is described.
    """
    numbers = {key.split(".")[2] for key in weights.shapes if key.startswith("decoder.layers.")}
    stacked = [shape[0] for key, shape in weights.shapes.items() if key == f"decoder.layers.{QKV}" and shape]
    routers = [
        shape[-2]
        for key, shape in weights.shapes.items()
        if key.endswith("mlp.router.weight") and len(shape) > 1
    ]
    moe = any(spec.feedforward == "moe" for spec in layer_specs(settings))
    counts = [("layers", len(layer_specs(settings)), max([len(numbers), *stacked]))]
    counts += [("experts", settings.model.moe.num_experts, max(routers, default=0))] if moe else []
    if problems := [
        f"{asked} {what} are promised, {found} stored"
        for what, asked, found in counts
        if asked > 2 * found + 64
    ]:
        raise FormatError(str(weights.folder), problems)


def _same(weights: TorchDist, one: str, other: str) -> bool:
    """Whether two matrices of one shape hold the same values, looked at in blocks of rows."""
    rows, width = weights.shapes[one]
    blocks = [(low, min(4096, rows - low)) for low in range(0, rows, 4096)]
    parts = (
        [weights.read(Region(key, (rows, width), (low, 0), (count, width))) for key in (one, other)]
        for low, count in blocks
    )
    return all(torch.equal(a.float(), b.float()) for a, b in parts)


def _make(
    weights: TorchDist,
    taken: Values,
    name: str,
    regions: list[Region],
    model: ModelSettings,
    shape: tuple[int, ...],
) -> Tensor:
    if not regions:
        return new_router_state(name, shape)
    a = model.attention
    read = (taken.take(region.key, weights.read(region), region.offsets) for region in regions)
    values = (value.flatten(0, value.ndim - len(their_shape(name, shape))) for value in read)
    if name.endswith(JOINED):
        values = (
            split_qkv(value, a.num_kv_heads, a.head_dim)[JOINED.index(name[-len(JOINED[0]) :])]
            for value in values
        )
    return to_ours(name, values, shape, a.head_dim)


def _tensor_problems(expected: Mapping[str, tuple[int, ...]], weights: TorchDist) -> list[str]:
    found = {key: shape for key, shape in weights.shapes.items() if not key.startswith(_TRAINING)}
    problems = [f"{key} is missing" for key in expected if key not in found]
    problems += [
        f"{key} has shape {list(found[key])}, must have {list(shape)}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    problems += dtype_problems({key: weights.dtype(key) for key in expected if key in found})
    if others := [
        key for key in weights.objects if "._extra_state" not in key and not key.startswith(_TRAINING)
    ]:
        say(
            f"{weights.folder}: objects beside the tensors that are not read: "
            f"{', '.join(sorted(others)[:10])}"
        )
    return problems + [f"{key} has no place in our model" for key in found if key not in expected]
