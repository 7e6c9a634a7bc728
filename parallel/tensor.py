"""Tensor parallelism with sequence shards: how one module is cut over `tp` (Megatron, arXiv 1909.08053 and
2205.05198).

Between these modules every rank holds the hidden state of its own part of each sequence. A column-parallel
product reads the whole sequence and writes its own columns; a row-parallel one reads its own columns and
leaves a partial sum, which is summed and cut back to sequence shards in one reduce-scatter. Weights are
DTensors, so that checkpoints and optimizers know their place in the whole; the products run on local tensors,
and every collective is counted.

Shape legend: B sequences, T tokens of a sequence, S = T / tp of them here, D width, N = B * T, V vocabulary,
W its part here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hybridtrain.kernels.cross_entropy.op import partial_gradient, partial_sums, wide_product
from hybridtrain.parallel.collectives import Group, all_gather_autograd, all_reduce_, reduce_scatter_autograd

CPU_BLOCK_ELEMENTS = 1 << 19  # logits per block: 2 MiB of float32
BLOCK_ELEMENTS = 1 << 27


@dataclass(frozen=True)
class TensorAxis:
    """The ranks of `tp`: as a group for collectives, as a mesh for the weights' places."""

    group: Group
    mesh: DeviceMesh


Style = Callable[[nn.Module, TensorAxis], nn.Module]
"""Cuts a module and returns what stands in its place."""


def gather_sequence(x_BSD: Tensor, group: Group) -> Tensor:
    """The whole sequences [B, T, D]; gradients come back summed over the ranks."""
    return all_gather_autograd(x_BSD, group).transpose(0, 1).flatten(1, 2)


def scatter_sequence(x_BTD: Tensor, group: Group) -> Tensor:
    """This rank's part [B, S, D] of the sum of every rank's `x_BTD`."""
    return reduce_scatter_autograd(x_BTD.unflatten(1, (group.size, -1)).transpose(0, 1), group)


def cut(weight: nn.Parameter, axis: TensorAxis, dim: int) -> nn.Parameter:
    """`weight` (on the meta device) as a parameter of which this rank holds a part of dim `dim`."""
    return nn.Parameter(distribute_tensor(weight, axis.mesh, [Shard(dim)]))


def local(weight: Tensor) -> Tensor:
    """This rank's part; its gradient is complete, since every user reads whole sequences."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


class ColumnLinear(nn.Module):
    """Rows of the weight [out, in] are cut: whole input, gathered by `gather_input` once for all readers, to
    own outputs.
    """

    def __init__(self, linear: nn.Module, axis: TensorAxis) -> None:
        super().__init__()
        self.weight = cut(_weight(linear), axis, 0)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.linear(x_BTD, local(self.weight))


class RowLinear(nn.Module):
    """Columns of the weight [out, in] are cut: own inputs of whole sequences to the sum's sequence shard."""

    def __init__(self, linear: nn.Module, axis: TensorAxis) -> None:
        super().__init__()
        self.weight, self.group = cut(_weight(linear), axis, 1), axis.group

    def forward(self, x_BTX: Tensor) -> Tensor:
        return scatter_sequence(F.linear(x_BTX, local(self.weight)), self.group)


class VocabularyEmbedding(nn.Module):
    """Each rank looks up the tokens of its part of the vocabulary; whole token ids in, the sequence shard
    out.
    """

    def __init__(self, embedding: nn.Module, axis: TensorAxis) -> None:
        super().__init__()
        self.vocab_size = len(_weight(embedding))
        self.weight, self.group = cut(_weight(embedding), axis, 0), axis.group

    def forward(self, tokens_BT: Tensor) -> Tensor:
        weight_WD = local(self.weight)
        local_BT = tokens_BT - first_of(self.vocab_size, self.group)
        inside_BT = (local_BT >= 0) & (local_BT < len(weight_WD))
        x_BTD = F.embedding(local_BT.where(inside_BT, 0), weight_WD) * inside_BT.unsqueeze(-1)
        return scatter_sequence(x_BTD, self.group)  # one term of each sum is not zero, so it is exact


class VocabularyHead(nn.Module):
    """Logits of whole sequences over the whole vocabulary, from sequence shards. Training takes
    `VocabularyLoss` instead.
    """

    def __init__(self, linear: nn.Module, axis: TensorAxis) -> None:
        super().__init__()
        self.weight, self.project = cut(_weight(linear), axis, 0), VocabularyLogits(axis.group)

    def forward(self, h_BSD: Tensor) -> Tensor:
        return self.project(h_BSD, self.weight)


@dataclass(frozen=True)
class VocabularyLogits:
    """The product with a weight [V, D] that is cut along V; for evaluation, without a gradient."""

    group: Group

    @torch.no_grad()
    def __call__(self, h_BSD: Tensor, weight_VD: Tensor) -> Tensor:
        logits_BTW = F.linear(gather_sequence(h_BSD, self.group), local(weight_VD))
        part = -(-len(weight_VD) // self.group.size)
        padded_BTW = F.pad(
            logits_BTW, (0, part - logits_BTW.size(-1))
        )  # the last part of the vocabulary may be smaller
        return torch.cat(all_gather_autograd(padded_BTW, self.group).unbind(), -1)[..., : len(weight_VD)]


@dataclass(frozen=True)
class VocabularyLoss:
    """Summed cross-entropy of all tokens, the same on every rank, with a head [V, D] that is cut along V.

    No rank sees another's logits: three numbers per token are reduced. Logits are made block by block of
    tokens and once more in the backward pass, so that they are never held all at once.
    """

    group: Group
    ignored: int = -100

    def __call__(self, h_BSD: Tensor, weight_VD: Tensor, targets_BT: Tensor) -> Tensor:
        h_ND = gather_sequence(h_BSD, self.group).flatten(0, 1)
        first = first_of(len(weight_VD), self.group)
        args = (h_ND, local(weight_VD), targets_BT.flatten(), first, self.ignored, self.group)
        loss: Tensor = _VocabularyLoss.apply(*args)  # type: ignore[no-untyped-call]
        return loss


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, weight_WD: Tensor, targets_N: Tensor, first: int, ignored: int, group: Group
    ) -> Tensor:
        highest_N, summed_N, chosen_N = (h_ND.new_empty(len(h_ND), dtype=torch.float32) for _ in range(3))
        for block in _blocks(h_ND, weight_WD):
            parts = partial_sums(h_ND[block] @ weight_WD.T, targets_N[block], first)
            highest_N[block], summed_N[block], chosen_N[block] = parts
        top_N = all_reduce_(highest_N.clone(), group, dist.ReduceOp.MAX)
        both = torch.stack([summed_N * (highest_N - top_N).exp(), chosen_N])
        summed_N, chosen_N = all_reduce_(both, group).unbind()
        normalizer_N = top_N + summed_N.log()
        keep_N = targets_N != ignored
        ctx.first = first
        ctx.save_for_backward(h_ND, weight_WD, normalizer_N, targets_N, keep_N)
        return ((top_N - chosen_N + summed_N.log()) * keep_N).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        """Of the whole loss by this rank's logits: for `h` a partial sum, which `gather_sequence` completes."""
        h_ND, weight_WD, normalizer_N, targets_N, keep_N = ctx.saved_tensors
        grad_h = torch.empty_like(h_ND)
        grad_weight = torch.zeros_like(weight_WD, dtype=torch.promote_types(weight_WD.dtype, torch.float32))
        scale_N = keep_N * grads[0]
        for block in _blocks(h_ND, weight_WD):
            h = h_ND[block]
            grad = partial_gradient(
                h @ weight_WD.T, targets_N[block], ctx.first, normalizer_N[block], scale_N[block]
            )
            torch.mm(grad, weight_WD, out=grad_h[block])
            if h.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad.T, h)
            else:
                grad_weight += wide_product(grad.T, h)
        return grad_h, grad_weight.to(weight_WD.dtype), None, None, None, None


def _blocks(h_ND: Tensor, weight_WD: Tensor) -> list[slice]:
    elements = CPU_BLOCK_ELEMENTS if h_ND.device.type == "cpu" else BLOCK_ELEMENTS
    rows = max(64, elements // len(weight_WD))
    return [slice(start, min(start + rows, len(h_ND))) for start in range(0, len(h_ND), rows)]


@dataclass(frozen=True)
class SequenceConvolution:
    """The short convolution on sequence shards: gathers whole sequences and keeps the own part of the result."""

    convolve: Callable[..., Tensor]
    group: Group

    def __call__(self, x_BSD: Tensor, *others: Any) -> Tensor:
        out_BTD = self.convolve(gather_sequence(x_BSD, self.group), *others)
        return out_BTD.chunk(self.group.size, 1)[self.group.rank]


@dataclass(frozen=True)
class SequencePlaces:
    """Places in the lines before experts, which are of whole sequences: gathers the choices and keeps the own
    part.
    """

    position_in_expert: Callable[[Tensor], Tensor]
    group: Group

    def __call__(self, experts_BSK: Tensor) -> Tensor:
        return self.position_in_expert(gather_sequence(experts_BSK, self.group)).chunk(self.group.size, 1)[
            self.group.rank
        ]


def gather_input(module: nn.Module, axis: TensorAxis) -> nn.Module:
    """The module as it is, reading whole sequences: one gather for all column-parallel products inside."""
    module.register_forward_pre_hook(lambda _, args: (gather_sequence(args[0], axis.group), *args[1:]))
    return module


def first_of(size: int, group: Group) -> int:
    """Where this rank's part of a cut dim begins (as Shard cuts: equal parts, the last may be smaller)."""
    return min(group.rank * -(-size // group.size), size)


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)  # for the type checker: styles are for modules of one weight
    return weight
