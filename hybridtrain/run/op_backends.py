"""What carries each operation in a run, for its header."""

from __future__ import annotations

import torch

from hybridtrain.kernels import choose
from hybridtrain.model.common import MASKED_TOKENS
from hybridtrain.run.assemble import Run
from hybridtrain.run.process_setup import compute_dtype
from hybridtrain.settings.layers import layer_specs


def implementations(run: Run) -> dict[str, str]:
    """What carries each operation in this run."""
    cuda = run.mesh.device.type == "cuda"
    train, dtype = run.settings.train, compute_dtype(run.settings, run.mesh.device)
    blocked = not cuda and dtype == torch.float32
    compiled = " · compiled between exchanges" if train.compile else ""
    ops = {
        "layers": f"{str(dtype).removeprefix('torch.')} · recompute {train.recompute}{compiled}",
        "attention": f"torch scaled_dot_product_attention{_long_attention(run, cuda and dtype != torch.float32)}",
        "rope": "torch complex product",
        "swiglu": "torch, two passes",
        "rms_norm": "torch, own backward" if blocked else "torch rms_norm",
        "grouped_mlp": "torch grouped_mm",
        "permute": "torch index_select, own backward",
        "head and loss": "blocked over tokens, own backward"
        if blocked
        else "torch product, then cross_entropy",
    }
    if run.mesh.tp.size > 1:
        ops["head and loss"] = f"vocabulary over tp={run.mesh.tp.size}, blocked over tokens, own backward"
    if any(spec.feedforward == "moe" for spec in layer_specs(run.settings)):
        ops["router_topk"] = "torch topk"
    if run.table is not None:
        ops |= {
            "engram_hash": "torch int64",
            "engram_gate": "torch, around rms_norm",
            "row_gather": "torch index_select",
            "segment_sum": "torch sort + embedding_bag" if cuda else "torch index_add",
            "row optimizer": type(run.table.optimizer).__name__,
        }
        if run.settings.engram.conv:
            ops["short_conv"] = "torch tap by tap"
        if run.settings.engram.optimizer != "adam":
            ops["rowwise_adam"] = "torch, several passes"
    on_host = run.table is not None and run.table.weight.device.type != run.mesh.device.type
    for op, how in choose.table().items():
        if on_host and op == "rowwise_adam":
            continue
        row = "head and loss" if op == "cross_entropy" else op
        if how != "torch" and row in ops and not (op == "cross_entropy" and run.mesh.tp.size > 1):
            ops[row] = how
    ops["dispatch"] = _dispatch(run)
    return ops


def _long_attention(run: Run, packs: bool) -> str:
    """What sequences too long for a mask of all pairs have instead."""
    if run.settings.train.seq_len <= MASKED_TOKENS:
        return ""
    return (
        ", varlen_attn over documents"
        if packs and run.mesh.cp.size == 1
        else ", blocks of queries over documents"
    )


def _dispatch(run: Run) -> str:
    levels = ", then ".join(f"{group.name}={group.size}" for group in run.mesh.ep_levels)
    how = f"all-to-all over {levels}" if run.mesh.ep.size > 1 else "local"
    if run.settings.parallel.dispatch == "hierarchical" and run.mesh.layout.ep_inter == 1:
        how += " (hierarchical: ep x etp is on one node)"
    return how
