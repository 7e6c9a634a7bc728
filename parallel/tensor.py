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
from torch.distributed.tensor import Shard, distribute_tensor

from hybridtrain.kernels.choose import TORCH, Backends
from hybridtrain.kernels.cross_entropy.op import partial_gradient, partial_sums, wide_product
from hybridtrain.model.common import RMSNorm, local
from hybridtrain.model.component import ComponentError, Cut, Placed
from hybridtrain.parallel.collectives import Group, all_gather_autograd, all_reduce_, reduce_scatter_autograd

CPU_BLOCK_ELEMENTS = 1 << 19  # logits per block: 2 MiB of float32
BLOCK_ELEMENTS = 1 << 27


@dataclass(frozen=True)
class TensorAxis:
    """The ranks of `tp`: as a group for collectives, as a mesh for the weights' places."""

    group: Group
    mesh: DeviceMesh


def gather_sequence(x_BSD: Tensor, group: Group) -> Tensor:
    """The whole sequences [B, T, D]; gradients come back summed over the ranks."""
    return all_gather_autograd(x_BSD, group).transpose(0, 1).flatten(1, 2)


def scatter_sequence(x_BTD: Tensor, group: Group) -> Tensor:
    """This rank's part [B, S, D] of the sum of every rank's `x_BTD`."""
    return reduce_scatter_autograd(x_BTD.unflatten(1, (group.size, -1)).transpose(0, 1), group)


def cut(weight: Tensor, axis: TensorAxis, dim: int) -> nn.Parameter:
    """`weight` (on the meta device) as a parameter of which this rank holds a part of dim `dim`."""
    return nn.Parameter(distribute_tensor(weight, axis.mesh, [Shard(dim)]))


class ColumnLinear(nn.Module):
    """Rows of the weight [out, in] are cut: whole input, gathered by `gather_input` once for all readers, to
    own outputs. A bias is declared as a vector.
    """

    def __init__(self, linear: nn.Linear, axis: TensorAxis) -> None:
        super().__init__()
        self.weight, self.bias = cut(linear.weight, axis, 0), linear.bias

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.linear(x_BTD, local(self.weight), None if self.bias is None else local(self.bias))


class RowLinear(nn.Module):
    """Columns of the weight [out, in] are cut: own inputs of whole sequences to the sum's sequence shard. A
    bias is whole and is added to the sum.
    """

    def __init__(self, linear: nn.Linear, axis: TensorAxis) -> None:
        super().__init__()
        self.weight, self.bias, self.group = cut(linear.weight, axis, 1), linear.bias, axis.group

    def forward(self, x_BTX: Tensor) -> Tensor:
        out_BSD = scatter_sequence(F.linear(x_BTX, local(self.weight)), self.group)
        return out_BSD if self.bias is None else out_BSD + self.bias


class VocabularyEmbedding(nn.Module):
    """Each rank looks up the tokens of its part of the vocabulary; whole token ids in, the sequence shard
    out.
    """

    def __init__(self, embedding: nn.Embedding, axis: TensorAxis) -> None:
        super().__init__()
        self.vocab_size = embedding.num_embeddings
        self.weight, self.group = cut(embedding.weight, axis, 0), axis.group

    def forward(self, tokens_BT: Tensor) -> Tensor:
        weight_WD = local(self.weight)
        local_BT = tokens_BT - first_of(self.vocab_size, self.group)
        inside_BT = (local_BT >= 0) & (local_BT < len(weight_WD))
        x_BTD = F.embedding(local_BT.where(inside_BT, 0), weight_WD) * inside_BT.unsqueeze(-1)
        return scatter_sequence(x_BTD, self.group)  # one term of each sum is not zero, so it is exact


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
    backends: Backends = TORCH

    def __call__(self, h_BSD: Tensor, weight_VD: Tensor, targets_BT: Tensor) -> Tensor:
        h_ND = gather_sequence(h_BSD, self.group).flatten(0, 1)
        first = first_of(len(weight_VD), self.group)
        args = (h_ND, local(weight_VD), targets_BT.flatten(), first, self)
        loss: Tensor = _VocabularyLoss.apply(*args)  # type: ignore[no-untyped-call]
        return loss


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, weight_WD: Tensor, targets_N: Tensor, first: int, head: VocabularyLoss
    ) -> Tensor:
        group = head.group
        highest_N, summed_N, chosen_N = (h_ND.new_empty(len(h_ND), dtype=torch.float32) for _ in range(3))
        for block in _blocks(h_ND, weight_WD):
            parts = partial_sums(h_ND[block] @ weight_WD.T, targets_N[block], first, head.backends)
            highest_N[block], summed_N[block], chosen_N[block] = parts
        top_N = all_reduce_(highest_N.clone(), group, dist.ReduceOp.MAX)
        both = torch.stack([summed_N * (highest_N - top_N).exp(), chosen_N])
        summed_N, chosen_N = all_reduce_(both, group).unbind()
        normalizer_N = top_N + summed_N.log()
        keep_N = targets_N != head.ignored
        ctx.first, ctx.backends = first, head.backends
        ctx.save_for_backward(h_ND, weight_WD, normalizer_N, targets_N, keep_N)
        return ((top_N - chosen_N + summed_N.log()) * keep_N).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """The gradients of the whole loss through this rank's logits: for `h` a partial sum, which
        `gather_sequence` completes.
        """
        h_ND, weight_WD, normalizer_N, targets_N, keep_N = ctx.saved_tensors
        grad_h = torch.empty_like(h_ND)
        grad_weight = torch.zeros_like(weight_WD, dtype=torch.promote_types(weight_WD.dtype, torch.float32))
        scale_N = keep_N * grads[0]
        for block in _blocks(h_ND, weight_WD):
            h = h_ND[block]
            softmax = normalizer_N[block], scale_N[block]
            grad = partial_gradient(h @ weight_WD.T, targets_N[block], ctx.first, *softmax, ctx.backends)
            torch.mm(grad, weight_WD, out=grad_h[block])
            if h.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad.T, h)
            else:
                grad_weight += wide_product(grad.T, h)
        return grad_h, grad_weight.to(weight_WD.dtype), None, None, None


def _blocks(h_ND: Tensor, weight_WD: Tensor) -> list[slice]:
    elements = CPU_BLOCK_ELEMENTS if h_ND.device.type == "cpu" else BLOCK_ELEMENTS
    rows = max(64, elements // len(weight_WD))
    return [slice(start, min(start + rows, len(h_ND))) for start in range(0, len(h_ND), rows)]


@dataclass(frozen=True)
class WholeSequences:
    """A function of sequences on shards of them: gathers its first `gathered` arguments, and keeps the own
    part of the result."""

    function: Callable[..., Tensor]
    group: Group
    gathered: int = 1

    def __call__(self, *args: Any) -> Tensor:
        whole = [gather_sequence(x, self.group) for x in args[: self.gathered]]
        out_BT = self.function(*whole, *args[self.gathered :])
        return out_BT.chunk(self.group.size, 1)[self.group.rank]


def first_of(size: int, group: Group) -> int:
    """Where this rank's part of a cut dim begins (as Shard cuts: equal parts, the last may be smaller)."""
    return min(group.rank * -(-size // group.size), size)


def cut_vocabulary(model: nn.Module, axis: TensorAxis) -> None:
    """Cut the embedding and the head of a model, its own `nn.Embedding` and `nn.Linear`, over the vocabulary.
    Logits and losses are for the exchanges that the model was built with."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Embedding):
            model.set_submodule(name, VocabularyEmbedding(child, axis))
        elif isinstance(child, nn.Linear):
            child.weight = cut(child.weight, axis, 0)


def cut_component(placed: Placed, axis: TensorAxis) -> None:
    """Cut a component's parameters over `tp` as it declares, and give whole sequences to what `gathers` them.

    Experts stay: they are spread with the tokens' exchange (apply.py). Raises ComponentError with the path of
    what cannot be cut so.
    """
    _check_vectors(placed)
    for name, parameter in placed.parameters.items():
        owner_name, _, leaf = name.rpartition(".")
        if parameter.cut == Cut.VECTOR:
            owner = placed.module.get_submodule(owner_name)
            owner.register_parameter(leaf, cut(owner.get_parameter(leaf), axis, 0))
        elif parameter.cut in (Cut.COLUMN, Cut.ROW):
            linear = _linear_of(placed, owner_name, leaf)
            style = ColumnLinear if parameter.cut == Cut.COLUMN else RowLinear
            placed.module.set_submodule(owner_name, style(linear, axis))
    for path in placed.component.gathers:
        if (module := _submodule(placed, path)) is not None:
            gather_input(module, axis)


def gather_input(module: nn.Module, axis: TensorAxis) -> None:
    """Let the module read whole sequences: one gather for all column-parallel products inside."""
    module.register_forward_pre_hook(lambda _, args: (gather_sequence(args[0], axis.group), *args[1:]))


def _check_vectors(placed: Placed) -> None:
    """Raise ComponentError where a vector is cut and its module computes with the whole one, or the other way
    round. A module of the component's own takes its part with `local`, which shows only when it computes."""
    for name, parameter in placed.parameters.items():
        owner = placed.module.get_submodule(name.rpartition(".")[0])
        if type(owner) is nn.Linear and name.endswith("bias"):
            weight = placed.parameters[name.removesuffix("bias") + "weight"].cut
            legal = Cut.VECTOR if weight == Cut.COLUMN else Cut.WHOLE
            if parameter.cut != legal:
                raise ComponentError(
                    f"{placed.path}: {name} is cut as {parameter.cut}; the bias of an nn.Linear whose weight "
                    f"is cut as {weight} may be {legal}"
                )
        elif parameter.cut == Cut.VECTOR and _takes_whole(owner):
            matrix = f"{Cut.COLUMN}, {Cut.ROW} or " if type(owner) is nn.Linear else ""
            raise ComponentError(
                f"{placed.path}: {name} is cut as {Cut.VECTOR}, and the {type(owner).__name__} that has it "
                f"computes with all of it; it may be {matrix}{Cut.WHOLE}, or belong to a module of the "
                "component's own, which takes its part with `local`"
            )
        elif parameter.cut == Cut.VECTOR and placed.module.get_parameter(name).ndim == 0:
            raise ComponentError(
                f"{placed.path}: {name} has 0 dims and is cut as {Cut.VECTOR}; it may be {Cut.WHOLE}"
            )


def _takes_whole(owner: nn.Module) -> bool:
    """Whether what computes with the module's parameters is torch's, or this package's norm."""
    forward = type(owner).forward
    by_torch = forward is not nn.Module.forward and forward.__module__.startswith("torch.")
    return by_torch or type(owner) is RMSNorm


def _linear_of(placed: Placed, owner_name: str, leaf: str) -> nn.Linear:
    owner = placed.module.get_submodule(owner_name)
    if owner_name and type(owner) is nn.Linear and leaf == "weight":
        return owner
    at = f"the {type(owner).__name__} {owner_name}" if owner_name else "the component itself"
    name = f"{owner_name}.{leaf}" if owner_name else leaf
    raise ComponentError(
        f"{placed.path}: {name} is cut by columns or rows, so it must be the weight of an nn.Linear inside "
        f"of the component; it belongs to {at}; it may be a {Cut.VECTOR} or {Cut.WHOLE}"
    )


def _submodule(placed: Placed, path: str) -> nn.Module | None:
    """None where the component was built without it: its attribute is None."""
    owner_name, _, leaf = path.rpartition(".")
    missing = object()
    module = getattr(placed.module.get_submodule(owner_name), leaf, missing) if path else placed.module
    if module is missing or not (module is None or isinstance(module, nn.Module)):
        raise ComponentError(
            f"{placed.path}: `gathers` of {placed.component.name} names {path}, which is not a submodule"
        )
    return module
