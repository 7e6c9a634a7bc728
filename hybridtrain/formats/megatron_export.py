"""From a checkpoint of ours to a folder of Megatron-core's torch_dist format, which Megatron-LM loads."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hybridtrain.checkpoint.stored import LazyTensor
from hybridtrain.data.manifest import TOKENIZER
from hybridtrain.errors import FormatError, UserError
from hybridtrain.formats.folder import new_folder
from hybridtrain.formats.megatron_args import NAME, from_args, misfits, to_args
from hybridtrain.formats.megatron_names import (
    FC1_NORM,
    IMPLEMENTATIONS,
    JOINED,
    LAYER,
    MOE_NORM,
    OUTSIDE,
    QKV,
    TRANSFORMER_ENGINE,
    Layout,
    join_qkv,
    outside,
    qkv_shape,
)
from hybridtrain.formats.native import (
    AS_IMPORTED,
    ROUTER_STATE,
    Source,
    biased,
    open_source,
    output_dtype,
    unnamed,
)
from hybridtrain.formats.origin import read_origin
from hybridtrain.formats.tensors import DTYPES, cast, their_shape
from hybridtrain.formats.torch_dist import RELEASE, TRACKER, Region, write_torch_dist
from hybridtrain.run.init_from import ORIGIN, copy_companions
from hybridtrain.settings.layers import layer_specs

_FINAL_NORM = OUTSIDE["norm.weight"].removesuffix(".weight")
_CONTENT = {
    "singleton_local_shards": False
}  # what Megatron-LM keeps of how it cut the model, and asks a model for again


def export_megatron(
    path: Path,
    out: Path,
    *,
    implementation: str = TRANSFORMER_ENGINE,
    max_file_bytes: int = 5 * 10**9,
    dtype: str = AS_IMPORTED,
) -> str:
    """Write the run folder or checkpoint `path` as the folder `out`, which Megatron-LM loads; returns what
    was written.

    `implementation` is that of Megatron's layers, which names one norm. One tensor is in memory at a time, or
    the three of queries, keys and values. `dtype` is of the matrices: one of DTYPES, or that of the import.
    Raises FormatError listing why Megatron's model is another, and where a tensor has values beyond the
    dtype.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f'--transformer-impl "{implementation}": it may be {", ".join(IMPLEMENTATIONS)}')
    source = open_source(path)
    origin = read_origin(source.run)
    dtype = output_dtype(dtype, origin)
    settings = source.settings
    has_bias = biased(source.stored)
    if problems := unnamed(settings, "megatron") + misfits(settings, has_bias):
        raise FormatError(f"{path} is not {NAME}", problems)
    keeps_bias = settings.model.moe.score == "sigmoid" and (has_bias or settings.model.moe.bias_rate > 0)
    args = to_args(settings, source.info["vocab_size"], keeps_bias, implementation, origin)
    if problems := from_args(args)[
        1
    ]:  # whoever made the run folder wrote the arguments of the import that are given back
        raise FormatError(str(source.run / ORIGIN), problems)
    chunks, states = _chunks(source, implementation, keeps_bias)
    chunks = [(region, cast(tensor, DTYPES[dtype])) for region, tensor in chunks]
    common = {"args": args, "iteration": 0, "checkpoint_version": 3.0, "content_metadata": _CONTENT}
    with new_folder(out) as made:
        (made / RELEASE).mkdir()
        write_torch_dist(made / RELEASE, chunks, states, common, max_file_bytes)
        copy_companions(source.run, made, TOKENIZER)
        (made / TRACKER).write_text(RELEASE, encoding="utf-8")
    return f"torch_dist for {implementation}"


def _chunks(
    source: Source, implementation: str, keeps_bias: bool
) -> tuple[list[tuple[Region, LazyTensor]], list[str]]:
    """Their chunks, to be made of our tensors, and the keys of empty states. FormatError where one of ours
    would be left behind.
    """
    model, specs = source.settings.model, layer_specs(source.settings)
    alike = len({spec.feedforward for spec in specs}) == 1
    layout = Layout(len(specs), model.moe.num_experts, layers=alike)
    chunks: list[tuple[Region, LazyTensor]] = []
    states = {f"{_FINAL_NORM}._extra_state/shard_0_1": None} if implementation == TRANSFORMER_ENGINE else {}
    left = []
    for name, shape in source.tensors():
        if name in OUTSIDE:
            chunks.append(
                (outside(name, shape), LazyTensor(shape, torch.float32, partial(source.make, name)))
            )
            continue
        _, layer, rest = name.split(".", 2)
        if rest not in LAYER and not name.endswith(ROUTER_STATE):
            left.append(f"{name} has no place in {NAME}")
        elif (
            rest in LAYER
            and not name.endswith(JOINED[1:])
            and (keeps_bias or not name.endswith(ROUTER_STATE))
        ):
            theirs = LAYER[rest][0]
            if (
                theirs == FC1_NORM
                and specs[int(layer)].feedforward == "moe"
                and implementation == TRANSFORMER_ENGINE
            ):
                theirs = MOE_NORM
            shape = qkv_shape(model) if theirs == QKV else their_shape(name, shape)
            for number, region in enumerate(layout.regions(name, theirs, shape)):
                make = partial(_join, source, name) if theirs == QKV else partial(source.make, name, number)
                chunks.append((region, LazyTensor(shape, torch.float32, make)))
            states |= dict.fromkeys(layout.states(name, theirs, implementation))
    if left:
        raise FormatError(str(source.stored.path), left)
    return chunks, list(states)


def _join(source: Source, name: str) -> Tensor:
    q_XD, k_YD, v_YD = (source.make(name.replace(JOINED[0], joined)) for joined in JOINED)
    return join_qkv(q_XD, k_YD, v_YD, source.settings.model.attention.head_dim)
