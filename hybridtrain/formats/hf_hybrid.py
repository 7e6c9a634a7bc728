"""Our own architecture as a Hugging Face folder: the config and tensors that modeling_hybridtrain.py reads.

Tensors keep their names. The packed table is cut into one matrix per memory layer and slot, so that no shard
must hold it whole.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hybridtrain.checkpoint.stored import LazyTensor, StoredTensors
from hybridtrain.run.init_from import read_addressing, read_compression_of, read_rows
from hybridtrain.settings.layers import engram_layers, layer_specs
from hybridtrain.settings.tree import Settings

NAME = "hybridtrain"
MODELLING_FILE = Path(__file__).with_name("modeling_hybridtrain.py")
_TRAINING_ONLY = "router.load_E"
_ADDRESSING = ("layers", "orders", "heads", "multipliers", "primes", "pad_id", "boundary")


def config(settings: Settings, info: dict[str, Any]) -> dict[str, Any]:
    """config.json of a checkpoint whose description is `info`."""
    model, module = settings.model, MODELLING_FILE.stem
    moe = model.moe.model_dump(exclude={"bias_rate", "aux_weight", "z_weight", "capacity"})
    # of the length that was trained: an expert drops the pairs of a text beyond it
    moe["most"] = math.ceil(
        model.moe.capacity * settings.train.seq_len * model.moe.top_k / model.moe.num_experts
    )
    out: dict[str, Any] = {
        "model_type": NAME,
        "architectures": ["HybridTrainForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.HybridTrainConfig",
            "AutoModelForCausalLM": f"{module}.HybridTrainForCausalLM",
        },
        "hidden_size": model.dim,
        "num_hidden_layers": len(layer_specs(settings)),
        "num_attention_heads": model.attention.num_heads,
        "num_key_value_heads": model.attention.num_kv_heads,
        "head_dim": model.attention.head_dim,
        "rope_theta": model.attention.rope_theta,
        "qk_norm": model.attention.qk_norm,
        "intermediate_size": model.dense.hidden,
        "norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "feedforwards": [spec.feedforward for spec in layer_specs(settings)],
        "moe": moe,
        "engram": None,
        "separator_token_id": info["separator_id"],
        "use_cache": False,
    }
    if engram_layers(settings):
        engram = settings.engram
        out["engram"] = {key: json.loads(info["addressing"])[key] for key in _ADDRESSING}
        out["engram"] |= {
            "head_dim": engram.head_dim,
            "gate_floor": engram.gate_floor,
            "conv_kernel": engram.conv_kernel if engram.conv else 0,
        }
    return out


def tensors(
    stored: StoredTensors, info: dict[str, Any], settings: Settings, run: Path
) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint as the modelling file has them, and the compression map of its run folder.

    Raises CheckpointError where that map is missing or not the one that the checkpoint was trained with.
    """
    out: dict[str, LazyTensor] = {}
    for stored_name, shape in stored.shapes.items():
        name = stored_name.removeprefix("model.")
        if name != stored_name and not name.endswith(_TRAINING_ONLY):
            out[name] = LazyTensor(shape, torch.float32, partial(stored.read, stored_name))
    if not engram_layers(settings):
        return out
    compression = read_compression_of(run, info)
    addressing = read_addressing(info, settings, compression, stored)
    if addressing is None:
        return out
    # rows of the embedding beyond the tokenizer stand for nothing
    compression_V = torch.full((info["vocab_size"],), addressing.pad_id)
    compression_V[: len(compression)] = torch.from_numpy(compression)
    out["compression"] = LazyTensor(tuple(compression_V.shape), torch.int64, lambda: compression_V)
    low = 0
    for layer, primes_OK in zip(addressing.layers, addressing.primes, strict=True):
        for slot, rows in enumerate(primes_OK.reshape(-1).tolist()):
            make = partial(read_rows, stored, info, settings.engram, low, low + rows)
            out[f"layers.{layer}.engram.tables.{slot}"] = LazyTensor(
                (rows, settings.engram.head_dim), torch.float32, make
            )
            low += rows
    return out
