"""One layer: [memory] + mixer + feed-forward, each under the residual scheme. B batch, T tokens, D model width."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from hybridtrain.model.attention import Attention
from hybridtrain.model.context import SequenceContext
from hybridtrain.model.engram import EngramMemory
from hybridtrain.model.feedforward import make_dense
from hybridtrain.model.moe import MoE
from hybridtrain.model.norm import RMSNorm
from hybridtrain.model.residual import RESIDUALS, Stream
from hybridtrain.settings import LayerSpec, Settings

MIXERS: dict[str, Callable[[Settings], nn.Module]] = {"attention": Attention}
FEEDFORWARDS: dict[str, Callable[[Settings], nn.Module]] = {"dense": make_dense, "moe": MoE}


class Layer(nn.Module):
    def __init__(self, settings: Settings, spec: LayerSpec) -> None:
        super().__init__()
        model = settings.model
        self.residual = RESIDUALS[model.residual]()
        self.memory = EngramMemory(settings) if spec.memory else None
        self.mixer_norm = RMSNorm(model.dim, model.norm_eps)
        self.mixer = MIXERS[spec.mixer](settings)
        self.feedforward_norm = RMSNorm(model.dim, model.norm_eps)
        self.feedforward = FEEDFORWARDS[spec.feedforward](settings)

    def forward(self, stream: Stream, context: SequenceContext, rows_BTSC: Tensor | None) -> Stream:
        """The stream behind this layer; `rows_BTSC` are its looked-up rows, None for a layer without memory."""
        if self.memory is not None:
            memory = self.memory
            stream = self.residual(stream, lambda h: memory(h, rows_BTSC, context.documents_BT))
        stream = self.residual(stream, lambda h: self.mixer(self.mixer_norm(h), context))
        out: Stream = self.residual(stream, lambda h: self.feedforward(self.feedforward_norm(h)))
        return out
