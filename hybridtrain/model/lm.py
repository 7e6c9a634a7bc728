"""The model: embedding, layers, norm, head. It knows nothing of ranks.

B batch, T tokens, D model width, V vocabulary, L Engram layers, S slots, C row width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from hybridtrain.model.build import (
    build,
    build_end,
    components_of,
    frame_of,
    layer_components,
    model_parameters,
    section_of,
)
from hybridtrain.model.common import RMSNorm, SequenceContext, make_context
from hybridtrain.model.component import LOCAL_WIRING, Carried, Parameter, Placed, Wiring
from hybridtrain.model.engram import StepRows
from hybridtrain.model.residuals.add import Stream
from hybridtrain.settings.layers import LayerSpec, engram_layers, layer_specs
from hybridtrain.settings.tree import Settings


class Layer(nn.Module):
    """`path` is where it stands in the model: "layers.3"."""

    def __init__(self, settings: Settings, spec: LayerSpec, path: str, wiring: Wiring) -> None:
        super().__init__()
        model = settings.model
        placed = {
            name: build(settings, component, f"{path}.{name}", wiring)
            for name, component in layer_components(settings, spec).items()
        }
        self.components: Sequence[Placed] = tuple(placed.values())
        modules = {name: component.module for name, component in placed.items()}
        self.residual = modules["residual"]
        self.engram = modules.get("engram")
        self.mixer_norm = RMSNorm(model.dim, model.norm_eps, wiring.backends)
        self.mixer = modules["mixer"]
        self.feedforward_norm = RMSNorm(model.dim, model.norm_eps, wiring.backends)
        self.feedforward = modules["feedforward"]
        self.run = wiring.wrap_layer(self.compute)

    def forward(self, stream: Stream, context: SequenceContext, rows_BTSC: Tensor | None) -> Stream:
        """`compute`, as the model's wiring runs it; hooks on the layer stay outside of that."""
        out: Stream = self.run(stream, context, rows_BTSC)
        return out

    def compute(self, stream: Stream, context: SequenceContext, rows_BTSC: Tensor | None) -> Stream:
        """What this layer makes of the stream: the carry and the new sources.

        `rows_BTSC` are its looked-up rows, None for a layer without Engram.
        """
        before, number = stream.sources, 0
        if self.engram is not None:
            engram = self.engram
            stream = self.residual(stream, number, lambda h: engram(h, rows_BTSC, context.documents_BT))
            number += 1
        stream = self.residual(stream, number, lambda h: self.mixer(self.mixer_norm(h), context))
        stream = self.residual(stream, number + 1, lambda h: self.feedforward(self.feedforward_norm(h)))
        # not those that were there before: hooks of parallel wrappers may have made views of them
        return Stream(stream.carry, {n: x for n, x in stream.sources.items() if n not in before})


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
    """A causal language model of mixers, dense and expert feed-forwards and Engram layers, or a part of
    one.

    Its parameters are not meaningful before `init_parameters` (init.py) or a checkpoint fills them; a part's
    have the names and values that they have in the whole. `rows` is where Engram layers find their rows;
    parts may share it. `wiring` reaches tokens and experts that lie elsewhere.
    """

    def __init__(
        self,
        settings: Settings,
        vocab_size: int,
        part: Part | None = None,
        rows: StepRows | None = None,
        wiring: Wiring = LOCAL_WIRING,
    ) -> None:
        super().__init__()
        model, specs = settings.model, layer_specs(settings)
        self.settings = settings
        self.part = part or Part(0, len(specs), first=True, last=True)
        self.engram_layers = tuple(i for i in engram_layers(settings) if self.part.low <= i < self.part.high)
        with_table = self.part.first or (self.part.last and model.tie_embeddings)
        self.embed = nn.Embedding(vocab_size, model.dim) if with_table else None
        # A dict and not a list: a pipeline stage that holds some of the layers keeps their names.
        low, high = self.part.low, self.part.high
        layers = {str(i): Layer(settings, specs[i], f"layers.{i}", wiring) for i in range(low, high)}
        self.layers = nn.ModuleDict(layers)
        self.scheme = components_of(settings).residuals[model.residual]
        end = [build_end(settings, wiring)] if self.part.last and self.scheme.end else []
        self.components: Sequence[Placed] = [*(p for x in layers.values() for p in x.components), *end]
        self.residual = end[0].module if end else None
        self.names = {i: [carried.name for carried in self.carried(i)] for i in (0, *range(low, high + 1))}
        self.norm = RMSNorm(model.dim, model.norm_eps, wiring.backends) if self.part.last else None
        own_head = self.part.last and not model.tie_embeddings
        self.head = nn.Linear(model.dim, vocab_size, bias=False) if own_head else None
        self.rows = rows if rows is not None else StepRows()
        self.wiring = wiring

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
        its first layer; one that is not the last returns the tensors behind its last layer: the carry, and
        the sources that it did not take itself. `documents_BT` numbers the documents inside each sequence
        (rising; None: one per sequence); attention and Engram convolutions stay inside a document.
        `row_index_BTLS` points into the rows of this micro-batch. Raises ValueError where Engram layers have
        no index.
        """
        if self.engram_layers and row_index_BTLS is None:
            raise ValueError(
                f"layers {list(self.engram_layers)} have an engram; the forward pass needs row_index"
            )
        attention = self.settings.model.attention
        first = inputs if isinstance(inputs, Tensor) else next(iter(inputs.values()))
        # not of a later part's inputs: their tokens may be a tp rank's own
        tokens = first.size(1) if documents_BT is None else documents_BT.size(1)
        here = (first.device, self.wiring.positions_T)
        context = make_context(documents_BT, tokens, attention.head_dim, attention.rope_theta, *here)
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
        h_BTD = self.norm(self.scheme.finish(self.residual, _stream(held)))
        if targets_BT is not None:
            return self.wiring.shards.head_loss(h_BTD, self.head_weight_VD, targets_BT)
        return self.wiring.shards.logits(h_BTD, self.head_weight_VD)

    def carried(self, before: int) -> tuple[Carried, ...]:
        """What layer `before` and later ones read of earlier ones: the carry, then sources."""
        section = section_of(self.settings, self.scheme)
        return self.scheme.carried(section, frame_of(self.settings), before)

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

    def declared_parameters(self) -> dict[str, tuple[nn.Parameter, Parameter]]:
        """Each parameter here by its name, with its declaration; the step's rows are not parameters of
        the model."""
        declared = model_parameters(self.settings)
        here = {name: p for name, p in self.named_parameters() if not name.startswith("rows.")}
        return {name: (parameter, declared[name]) for name, parameter in here.items()}
