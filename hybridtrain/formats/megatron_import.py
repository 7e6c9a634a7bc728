"""From a folder of Megatron-core's torch_dist format to a folder of ours that runs start from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridtrain.checkpoint.stored import LazyTensor
from hybridtrain.config import load_settings
from hybridtrain.data.manifest import TOKENIZER
from hybridtrain.errors import FormatError, SettingsError, UserError
from hybridtrain.formats.megatron_args import NAME, from_args, misfits
from hybridtrain.formats.megatron_names import JOINED, LAYER, OUTSIDE, QKV, Layout, outside, qkv_shape, split_qkv
from hybridtrain.formats.ours import SEQ_LEN, ImportedTokenizer, settings_of_import, write_run
from hybridtrain.formats.tensors import new_router_state, their_shape, to_ours
from hybridtrain.formats.torch_dist import COMMON, Region, TorchDist, find_iteration, read_common
from hybridtrain.settings import ModelSettings, Settings, layer_specs
from hybridtrain.weights import model_tensors

_TRAINING = ("optimizer.", "chained_", "rng_state", "rerun_state_machine")  # where the keys of what is not the model begin


def import_megatron(
    folder: Path,
    out: Path,
    *,
    tokenizer: Path | None = None,
    settings_file: Path | None = None,
    separator: str | None = None,
    seq_len: int | None = None,
) -> Settings:
    """Write `out` as `import_hf` does, from a checkpoint or the latest of a folder of them; any parallel layout wrote it.

    The model is that of `settings_file` (our TOML, its section `model`), else that of the checkpoint's arguments. The tokenizer
    is `tokenizer`, else the tokenizer.json beside the checkpoint.
    Raises FormatError listing everything that our model lacks and every tensor that is missing, unknown or of another shape.
    """
    saved = find_iteration(folder)
    if tokenizer is None and not (folder / TOKENIZER).is_file():
        raise UserError(f"{folder} has no {TOKENIZER}, and Megatron keeps none: name one with --tokenizer")
    words = ImportedTokenizer(tokenizer or folder / TOKENIZER, separator)
    weights = TorchDist(saved)
    embedding = weights.shapes.get(OUTSIDE["embed.weight"])
    if embedding is None:
        raise FormatError(str(saved), [f"{OUTSIDE['embed.weight']} is missing: the checkpoint is none of {NAME}"])
    model, longest, problems = _model(saved, settings_file)
    model["vocab_size"] = embedding[0]  # what is padded stays padded
    settings = None
    try:
        settings = settings_of_import(model, out, seq_len or min(SEQ_LEN, longest), "args")
        problems += misfits(settings, biased=False)
    except SettingsError as error:
        problems += error.problems
    problems += words.misfits(embedding[0])
    if settings is None or problems:
        raise FormatError(str(saved), problems)
    return write_run(out, settings, _tensors(weights, settings), words, NAME)


def _model(saved: Path, settings_file: Path | None) -> tuple[dict[str, Any], int, list[str]]:
    """(section `model` of settings, the longest text that the model was trained on, what our model lacks)."""
    if settings_file is not None:
        settings = load_settings(settings_file)
        return settings.model.model_dump(mode="json"), settings.train.seq_len, []
    args = read_common(saved).get("args")
    if args is None:
        raise UserError(f"{saved / COMMON} has no args, which say what model it is: describe it with --settings FILE")
    model, problems = from_args(args)
    return model, getattr(args, "max_position_embeddings", None) or SEQ_LEN, problems


def _tensors(weights: TorchDist, settings: Settings) -> dict[str, LazyTensor]:
    """Our tensors, to be made of theirs; FormatError where theirs are not the ones that the settings promise."""
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
        out[f"model.{name}"] = LazyTensor(shape, torch.float32, partial(_make, weights, name, regions, model, shape))
    if problems := _tensor_problems(expected, weights):
        raise FormatError(f"{weights.folder}: its tensors are not those of {NAME} of these settings", problems)
    return out


def _regions(name: str, shape: tuple[int, ...], layout: Layout, model: ModelSettings, keys: Collection[str]) -> list[Region]:
    """Where our tensor is: in one place, one per expert, or none. Of several names that which is there, else the first."""
    if name in OUTSIDE:
        return [outside(name, shape)]
    theirs = LAYER.get(name.split(".", 2)[2], ())
    shape = qkv_shape(model) if QKV in theirs else their_shape(name, shape)
    choices = [layout.regions(name, choice, shape) for choice in theirs]
    return next((regions for regions in choices if regions[0].key in keys), choices[0] if choices else [])


def _make(weights: TorchDist, name: str, regions: list[Region], model: ModelSettings, shape: tuple[int, ...]) -> Tensor:
    if not regions:
        return new_router_state(name, shape)
    a = model.attention
    values = (weights.read(region).flatten(0, len(region.sizes) - len(their_shape(name, shape))) for region in regions)
    if name.endswith(JOINED):
        values = (split_qkv(value, a.num_kv_heads, a.head_dim)[JOINED.index(name[-len(JOINED[0]) :])] for value in values)
    return to_ours(name, values, shape, a.head_dim)


def _tensor_problems(expected: Mapping[str, tuple[int, ...]], weights: TorchDist) -> list[str]:
    found = {key: shape for key, shape in weights.shapes.items() if not key.startswith(_TRAINING)}
    problems = [f"{key} is missing" for key in expected if key not in found]
    problems += [
        f"{key} has shape {list(found[key])}, must have {list(shape)}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    problems += [
        f"{key} is {weights.dtype(key)}: quantised weights"
        for key in expected
        if key in found and not (weights.dtype(key).is_floating_point and weights.dtype(key).itemsize > 1)
    ]
    return problems + [f"{key} has no place in our model" for key in found if key not in expected]
