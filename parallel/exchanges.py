"""The exchanges of a model's components on a mesh, made before the model is built with them.

Under cp an exchange reaches over the chunks of a sequence; under tp, for what works on this rank's part of a
sequence, it gathers the parts around that; under ep tokens travel to their experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from hybridtrain.choices import Recompute
from hybridtrain.kernels.choose import TORCH, Backends
from hybridtrain.model.component import Wiring
from hybridtrain.model.exchanges import Dispatch, Exchanges, local_dispatch, local_exchanges
from hybridtrain.parallel.compile import CompiledLayer, prepare_compiler
from hybridtrain.parallel.context import ContextParallel
from hybridtrain.parallel.experts import AllToAllDispatch, SharedWidthDispatch
from hybridtrain.parallel.mesh import Mesh
from hybridtrain.parallel.recompute import recomputed
from hybridtrain.parallel.tensor import VocabularyLogits, VocabularyLoss, WholeSequences


def wire(
    mesh: Mesh,
    seq_len: int,
    recompute: Recompute = "none",
    *,
    compiled: bool = False,
    backends: Backends = TORCH,
) -> Wiring:
    """The wiring that a model of sequences of `seq_len` tokens is built with on this rank.

    Its layers are compiled where `compiled` says so, and run again in the backward pass as `recompute` says.
    """
    whole, positions_T = replace(local_exchanges(backends), dispatch=partial(_dispatch, mesh, backends)), None
    if mesh.cp.size > 1:
        context = ContextParallel(mesh.cp, seq_len, whole.convolve)
        positions_T = context.positions().to(mesh.device)
        whole = replace(
            whole,
            attend=context.attend,
            scan=context.scan,
            convolve=context.convolve,
            position_in_expert=context.position_in_expert,
        )
    shards = _on_shards(whole, mesh, backends) if mesh.tp.size > 1 else whole
    if compiled:
        prepare_compiler()

    def wrap_layer(compute: Callable[..., Any]) -> Callable[..., Any]:
        # recomputation is around compilation: it runs again what was compiled
        return recomputed(CompiledLayer(compute) if compiled else compute, recompute)

    return Wiring(whole, shards, positions_T, wrap_layer, backends)


def _on_shards(whole: Exchanges, mesh: Mesh, backends: Backends) -> Exchanges:
    """The exchanges for tensors of which this rank has its part of each sequence."""

    def gathered(function: Callable[..., Tensor], tensors: int) -> WholeSequences:
        return WholeSequences(function, mesh.tp, tensors)

    return replace(
        whole,
        attend=gathered(whole.attend, 3),
        scan=gathered(whole.scan, 2),
        convolve=gathered(whole.convolve, 1),
        position_in_expert=gathered(whole.position_in_expert, 1),
        head_loss=VocabularyLoss(mesh.tp, backends=backends),
        logits=VocabularyLogits(mesh.tp),
    )


def _dispatch(mesh: Mesh, backends: Backends, num_experts: int, drops: bool, path: str) -> Dispatch:
    inner = local_dispatch(num_experts, drops, path)
    if mesh.ep.size > 1:
        inner = AllToAllDispatch(mesh.ep_levels, num_experts, path, backends)
    if mesh.layout.etp == 1:
        return inner
    # around the dispatch over ep: that takes each token to all parts of its experts' width
    return SharedWidthDispatch(inner, mesh.tp)
