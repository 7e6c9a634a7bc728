"""What carries each operation in a run, for its header."""

from __future__ import annotations

import torch

from hybridtrain.kernels.ops import OPS, resolve
from hybridtrain.model.build import layer_components
from hybridtrain.model.common import MASKED_TOKENS
from hybridtrain.model.component import Sees
from hybridtrain.run.assemble import Run
from hybridtrain.run.process_setup import compute_dtype
from hybridtrain.settings.layers import layer_specs


def implementations(run: Run) -> dict[str, str]:
    """What carries each operation in this run."""
    cuda = run.mesh.device.type == "cuda"
    train, dtype = run.settings.train, compute_dtype(run.settings, run.mesh.device)
    blocked = not cuda and dtype == torch.float32
    compiled = " · compiled between exchanges" if train.compile else ""
    there = {name: op.torch_on_gpu if cuda and op.torch_on_gpu else op.torch for name, op in OPS.items()}
    if not blocked:  # torch's own kernels take other types than float32
        there |= {name: OPS[name].torch_on_gpu for name in ("rms_norm", "cross_entropy")}
    ops = {
        "layers": f"{str(dtype).removeprefix('torch.')} · recompute {train.recompute}{compiled}",
        "rms_norm": there["rms_norm"],
        "head and loss": there["cross_entropy"],
    }
    if run.mesh.tp.size > 1:
        ops["head and loss"] = f"vocabulary over tp={run.mesh.tp.size}, blocked over tokens, own backward"
    used = [c for spec in layer_specs(run.settings) for c in layer_components(run.settings, spec).values()]
    if any(component.sees is Sees.KEYS for component in used):
        ops["attention"] = there["attention"] + _long_attention(run, cuda and dtype != torch.float32)
    ops |= {op: there[op] for component in used for op in component.ops}
    if run.table is not None:
        ops |= {name: there[name] for name in ("engram_hash", "segment_sum")}
        ops["row optimizer"] = type(run.table.optimizer).__name__
        if not run.settings.engram.conv:
            del ops["short_conv"]
        if run.settings.engram.optimizer != "adam":
            ops["rowwise_adam"] = there["rowwise_adam"]
    on_host = run.table is not None and run.table.weight.device.type != run.mesh.device.type
    for op, how in resolve(run.settings.kernels.model_dump(), run.mesh.device.type).chosen.items():
        if on_host and op == "rowwise_adam":
            continue
        row = "head and loss" if op == "cross_entropy" else op
        if how != "torch" and row in ops and not (op == "cross_entropy" and run.mesh.tp.size > 1):
            ops[row] = how
    ops["dispatch"] = _dispatch(run)
    return ops


def _long_attention(run: Run, packs: bool) -> str:
    """The attention of sequences that are too long for a mask of all pairs."""
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
