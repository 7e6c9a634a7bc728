"""The model: embedding, layers, norm, head. It knows nothing of ranks.

B batch, T tokens, D model width, V vocabulary, L memory layers, S slots, C row width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hybridtrain.model.context import make_context
from hybridtrain.model.layer import Layer
from hybridtrain.model.loss import head_losses_sum
from hybridtrain.model.norm import RMSNorm
from hybridtrain.model.residual import RESIDUALS
from hybridtrain.model.rows import StepRows
from hybridtrain.settings import Settings, layer_specs, memory_layers


class HybridLM(nn.Module):
    """A causal language model of mixers, dense and expert feed-forwards and lookup memories.

    Its parameters are not meaningful before `init_parameters` (init.py) or a checkpoint fills them. `rows` is where
    memory layers find their rows.
    """

    def __init__(self, settings: Settings, vocab_size: int) -> None:
        super().__init__()
        model = settings.model
        self.settings = settings
        self.memory_layers = memory_layers(settings)
        self.embed = nn.Embedding(vocab_size, model.dim)
        # A dict and not a list: a pipeline stage that holds some of the layers keeps their names.
        self.layers = nn.ModuleDict({str(i): Layer(settings, spec) for i, spec in enumerate(layer_specs(settings))})
        self.residual = RESIDUALS[model.residual]
        self.norm = RMSNorm(model.dim, model.norm_eps)
        self.head = None if model.tie_embeddings else nn.Linear(model.dim, vocab_size, bias=False)
        self.rows = StepRows()
        self.positions_T: Tensor | None = None  # which tokens of a sequence are here; None: all
        # A parallel layout may hand in others: `project` makes the logits of tied embeddings.
        self.head_losses, self.project = head_losses_sum, F.linear

    def forward(
        self,
        tokens_BT: Tensor,
        documents_BT: Tensor | None,
        memory_index_BTLS: Tensor | None = None,
        micro_batch: int = 0,
        targets_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of the next token; with targets their summed loss (loss.py), without ever holding all logits.

        `documents_BT` numbers the documents inside each sequence (rising; None: one per sequence); attention and
        memory convolutions stay inside a document. `memory_index_BTLS` points into the rows of this micro-batch.
        Raises ValueError where memory layers have no index.
        """
        if self.memory_layers and memory_index_BTLS is None:
            raise ValueError(f"layers {list(self.memory_layers)} have a memory; the forward pass needs memory_index")
        attention = self.settings.model.attention
        context = make_context(
            documents_BT, tokens_BT.size(1), attention.head_dim, attention.rope_theta, tokens_BT.device, self.positions_T
        )
        stream = self.residual.start(self.embed(tokens_BT))
        for name, layer in self.layers.items():
            rows_BTSC = None
            if int(name) in self.memory_layers and memory_index_BTLS is not None:
                rows_BTSC = self.rows.gather(memory_index_BTLS[:, :, self.memory_layers.index(int(name))], micro_batch)
            stream = layer(stream, context, rows_BTSC)
        h_BTD = self.norm(self.residual.finish(stream))
        if targets_BT is not None:
            return self.head_losses(h_BTD, (self.head or self.embed).weight, targets_BT)
        return self.project(h_BTD, self.embed.weight) if self.head is None else self.head(h_BTD)
