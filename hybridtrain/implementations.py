"""What carries each operation in a run, for its header."""

from __future__ import annotations

import torch

from hybridtrain.assemble import Parts
from hybridtrain.kernels import choose
from hybridtrain.model.context import MASKED_TOKENS
from hybridtrain.settings import layer_specs
from hybridtrain.world import compute_dtype


def implementations(parts: Parts) -> dict[str, str]:
    """What carries each operation in this run."""
    cuda = parts.mesh.device.type == "cuda"
    train, dtype = parts.settings.train, compute_dtype(parts.settings, parts.mesh.device)
    blocked = not cuda and dtype == torch.float32
    compiled = " · compiled between exchanges" if train.compile else ""
    ops = {
        "layers": f"{str(dtype).removeprefix('torch.')} · recompute {train.recompute}{compiled}",
        "attention": f"torch scaled_dot_product_attention{_long_attention(parts, cuda and dtype != torch.float32)}",
        "rope": "torch complex product",
        "swiglu": "torch, two passes",
        "rms_norm": "torch, own backward" if blocked else "torch rms_norm",
        "grouped_mlp": "torch grouped_mm",
        "permute": "torch index_select, own backward",
        "head and loss": "blocked over tokens, own backward" if blocked else "torch product, then cross_entropy",
    }
    if parts.mesh.tp.size > 1:
        ops["head and loss"] = f"vocabulary over tp={parts.mesh.tp.size}, blocked over tokens, own backward"
    if any(spec.feedforward == "moe" for spec in layer_specs(parts.settings)):
        ops["router_topk"] = "torch topk"
    if parts.memory is not None:
        ops |= {
            "engram_hash": "torch int64",
            "engram_gate": "torch, around rms_norm",
            "row_gather": "torch index_select",
            "segment_sum": "torch sort + embedding_bag" if cuda else "torch index_add",
            "row optimizer": type(parts.memory.optimizer).__name__,
        }
        if parts.settings.memory.conv:
            ops["short_conv"] = "torch tap by tap"
        if parts.settings.memory.optimizer != "adam":
            ops["rowwise_adam"] = "torch, several passes"
    on_host = parts.memory is not None and parts.memory.table.device.type != parts.mesh.device.type
    for op, how in choose.table().items():
        if on_host and op == "rowwise_adam":
            continue
        row = "head and loss" if op == "cross_entropy" else op
        if how != "torch" and row in ops and not (op == "cross_entropy" and parts.mesh.tp.size > 1):
            ops[row] = how
    ops["dispatch"] = _dispatch(parts)
    return ops


def _long_attention(parts: Parts, packs: bool) -> str:
    """What sequences too long for a mask of all pairs have instead."""
    if parts.settings.train.seq_len <= MASKED_TOKENS:
        return ""
    return ", varlen_attn over documents" if packs and parts.mesh.cp.size == 1 else ", blocks of queries over documents"


def _dispatch(parts: Parts) -> str:
    levels = ", then ".join(f"{group.name}={group.size}" for group in parts.mesh.ep_levels)
    how = f"all-to-all over {levels}" if parts.mesh.ep.size > 1 else "local"
    if parts.settings.parallel.dispatch == "hierarchical" and parts.mesh.layout.ep_inter == 1:
        how += " (hierarchical: ep x etp is on one node)"
    return how
