"""The model: embedding, layers, norm, head. It knows nothing of ranks.

B batch, T tokens, D model width, V vocabulary, L memory layers, S slots, C row width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from hybridtrain.kernels.cross_entropy.op import cross_entropy_sum
from hybridtrain.kernels.linear_cross_entropy.op import linear_cross_entropy_sum
from hybridtrain.model.common import RMSNorm, SequenceContext, make_context
from hybridtrain.model.component import Carried, Frame
from hybridtrain.model.engram import EngramLayer, StepRows
from hybridtrain.model.exchanges import LOCAL
from hybridtrain.model.feedforwards.dense import make_dense
from hybridtrain.model.feedforwards.moe import MoE
from hybridtrain.model.mixers.attention import Attention
from hybridtrain.model.residuals import RESIDUALS
from hybridtrain.model.residuals.add import Stream
from hybridtrain.settings.layers import LayerSpec, engram_layers, layer_specs
from hybridtrain.settings.tree import Settings

MIXERS: dict[str, Callable[[Settings], nn.Module]] = {"attention": Attention}
FEEDFORWARDS: dict[str, Callable[[Settings], nn.Module]] = {"dense": make_dense, "moe": MoE}


def _frame(settings: Settings, path: str = "") -> Frame:
    model, train = settings.model, settings.train
    return Frame(model.dim, model.norm_eps, train.seq_len, train.global_batch * train.seq_len, path)


def _residual(settings: Settings, place: int) -> nn.Module:
    """Of layer `place`, or behind the last layer."""
    scheme = RESIDUALS[settings.model.residual]
    return scheme.build(scheme.section(), _frame(settings, f"layers.{place}.residual"), LOCAL)


class Layer(nn.Module):
    def __init__(self, settings: Settings, spec: LayerSpec, place: int) -> None:
        super().__init__()
        model = settings.model
        self.residual = _residual(settings, place)
        self.engram = EngramLayer(settings) if spec.engram else None
        self.mixer_norm = RMSNorm(model.dim, model.norm_eps)
        self.mixer = MIXERS[spec.mixer](settings)
        self.feedforward_norm = RMSNorm(model.dim, model.norm_eps)
        self.feedforward = FEEDFORWARDS[spec.feedforward](settings)

    def forward(self, stream: Stream, context: SequenceContext, rows_BTSC: Tensor | None) -> Stream:
        """What this layer makes of the stream: the carry, and of the sources those that are new.

        `rows_BTSC` are its looked-up rows, None for a layer without memory.
        """
        before, number = stream.sources, 0
        if self.engram is not None:
            memory = self.engram
            stream = self.residual(stream, number, lambda h: memory(h, rows_BTSC, context.documents_BT))
            number += 1
        stream = self.residual(stream, number, lambda h: self.mixer(self.mixer_norm(h), context))
        stream = self.residual(stream, number + 1, lambda h: self.feedforward(self.feedforward_norm(h)))
        # not those that were there before: hooks of parallel wrappers may have made views of them
        return Stream(stream.carry, {n: x for n, x in stream.sources.items() if n not in before})


IGNORED = -100


def token_losses_sum(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Sum over tokens of the cross-entropy in nats, float32 scalar; targets of -100 do not count."""
    return cross_entropy_sum(logits_BTV.flatten(0, -2), targets_BT.flatten(), IGNORED)


def head_losses_sum(h_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor) -> Tensor:
    """`token_losses_sum` of the logits h @ weight^T, which are never held all at once on the CPU."""
    return linear_cross_entropy_sum(h_BTD.flatten(0, -2), weight_VD, targets_BT.flatten(), IGNORED)


def _stream(held: dict[str, Tensor]) -> Stream:
    """The carry comes first."""
    carry, *sources = held.items()
    return Stream(carry[1], dict(sources))


@dataclass(frozen=True)
class Part:
    """Layers `low` to `high-1` of the model, with the embedding before them (`first`) or norm and head behind
    (`last`).
    """

    low: int
    high: int
    first: bool
    last: bool


class HybridLM(nn.Module):
    """A causal language model of mixers, dense and expert feed-forwards and lookup memories, or a part of
    one.

    Its parameters are not meaningful before `init_parameters` (init.py) or a checkpoint fills them; a part's
    have the names and values that they have in the whole. `rows` is where memory layers find their rows;
    parts may share it.
    """

    def __init__(
        self, settings: Settings, vocab_size: int, part: Part | None = None, rows: StepRows | None = None
    ) -> None:
        super().__init__()
        model, specs = settings.model, layer_specs(settings)
        self.settings = settings
        self.part = part or Part(0, len(specs), first=True, last=True)
        self.engram_layers = tuple(i for i in engram_layers(settings) if self.part.low <= i < self.part.high)
        with_table = self.part.first or (self.part.last and model.tie_embeddings)
        self.embed = nn.Embedding(vocab_size, model.dim) if with_table else None
        # A dict and not a list: a pipeline stage that holds some of the layers keeps their names.
        self.layers = nn.ModuleDict(
            {str(i): Layer(settings, specs[i], i) for i in range(self.part.low, self.part.high)}
        )
        self.scheme = RESIDUALS[model.residual]
        self.residual = _residual(settings, len(specs)) if self.part.last else None
        self.names = {
            i: [carried.name for carried in self.carried(i)]
            for i in (0, *range(self.part.low, self.part.high + 1))
        }
        self.norm = RMSNorm(model.dim, model.norm_eps) if self.part.last else None
        self.head = (
            nn.Linear(model.dim, vocab_size, bias=False)
            if self.part.last and not model.tie_embeddings
            else None
        )
        self.rows = rows if rows is not None else StepRows()
        self.positions_T: Tensor | None = None  # which tokens of a sequence are here; None: all
        # A parallel layout may hand in others: `project` makes the logits of tied embeddings.
        self.head_losses, self.project = head_losses_sum, F.linear

    def forward(
        self,
        inputs: Tensor | dict[str, Tensor],
        documents_BT: Tensor | None,
        row_index_BTLS: Tensor | None = None,
        micro_batch: int = 0,
        targets_BT: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Logits [B, T, V] of the next token; with targets their summed loss (loss.py), without ever holding
        all logits.

        `inputs` are tokens [B, T]. A part that is not the first takes the tensors that `carried` names before
        its first layer; one that is not the last returns, of those behind its last layer, the carry and the
        sources that it did not take itself. `documents_BT` numbers the documents inside each sequence
        (rising; None: one per sequence); attention and memory convolutions stay inside a document.
        `row_index_BTLS` points into the rows of this micro-batch. Raises ValueError where memory layers have
        no index.
        """
        if self.engram_layers and row_index_BTLS is None:
            raise ValueError(
                f"layers {list(self.engram_layers)} have a memory; the forward pass needs row_index"
            )
        attention = self.settings.model.attention
        first = inputs if isinstance(inputs, Tensor) else next(iter(inputs.values()))
        # not of a later part's inputs: their tokens may be a tp rank's own
        tokens = first.size(1) if documents_BT is None else documents_BT.size(1)
        context = make_context(
            documents_BT, tokens, attention.head_dim, attention.rope_theta, first.device, self.positions_T
        )
        held = inputs if isinstance(inputs, dict) else self._start(inputs)
        for name, layer in self.layers.items():
            stream, rows_BTSC = _stream(held), None
            if int(name) in self.engram_layers and row_index_BTLS is not None:
                column = self.engram_layers.index(int(name))
                rows_BTSC = self.rows.gather(row_index_BTLS[:, :, column], micro_batch, stream.carry)
            held = self._behind(int(name), held, layer(stream, context, rows_BTSC))
        if self.norm is None:
            there = inputs if isinstance(inputs, dict) else {}
            return {n: x for place, (n, x) in enumerate(held.items()) if place == 0 or n not in there}
        assert self.residual is not None
        h_BTD = self.norm(self.scheme.finish(self.residual, _stream(held)))
        if targets_BT is not None:
            return self.head_losses(h_BTD, self.head_weight_VD, targets_BT)
        return self.project(h_BTD, self.head_weight_VD) if self.head is None else self.head(h_BTD)

    def carried(self, before: int) -> tuple[Carried, ...]:
        """What layer `before` and later ones read of earlier ones: the carry, then sources."""
        return self.scheme.carried(self.scheme.section(), _frame(self.settings), before)

    def _start(self, tokens_BT: Tensor) -> dict[str, Tensor]:
        """The tensors before the first layer, by the names of `carried`."""
        assert self.embed is not None
        return self._behind(-1, {}, self.scheme.start(self.embed(tokens_BT)))

    def _behind(self, layer: int, before: dict[str, Tensor], stream: Stream) -> dict[str, Tensor]:
        """The tensors behind `layer`, which made `stream` of those before it."""
        names = self.names[layer + 1]
        known = {**before, **stream.sources, names[0]: stream.carry}
        return {name: known[name] for name in names}

    @property
    def head_weight_VD(self) -> Tensor:
        head = self.head if self.head is not None else self.embed
        assert head is not None
        return head.weight
