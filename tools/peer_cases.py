"""The models that bench_peers.py compares trainers on, by name, with their batches."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hybridtrain.run.assemble import Vocabulary
from hybridtrain.settings.engram import EngramSettings
from hybridtrain.settings.tree import Settings

AUX_WEIGHT, LEARNING_RATE, CLIP_NORM = 0.01, 1e-3, 1.0


@dataclass(frozen=True)
class Case:
    """The model and its batch; `batch` counts sequences over all ranks. Travels to the processes as JSON.

    hidden: width of an expert
    rows: of the lookup table, or the few more that make its heads' sizes prime; every second layer, from the
        first, has an Engram layer then. 0: no table and no Engram layers
    """

    experts: int = 8
    top_k: int = 2
    hidden: int = 512
    dim: int = 256
    layers: int = 4
    heads: int = 4
    seq_len: int = 256
    batch: int = 8
    vocab: int = 4096
    rows: int = 0
    row_width: int = 32
    ranks: int = 1
    threads: int = 2

    def settings(self, experts: str = "sharded") -> Settings:
        """The same model in hybridtrain's words. `experts` over several ranks: "sharded" as DeepSpeed's, each
        rank with some of them; "zero0" and "zero3" with another parallel.zero than the default; "replicated"
        as transformers' under DDP, each rank with the whole model.
        """
        parallel: dict[str, dict[str, int]] = {
            "sharded": {"ep": self.ranks},
            "zero0": {"ep": self.ranks, "zero": 0},
            "zero3": {"ep": self.ranks, "zero": 3},
            "replicated": {},
        }
        attention = {
            "num_heads": self.heads,
            "num_kv_heads": self.heads,
            "head_dim": self.dim // self.heads,
            "qk_norm": False,
        }
        moe = {
            "num_experts": self.experts,
            "top_k": self.top_k,
            "hidden": self.hidden,
            "aux_weight": AUX_WEIGHT,
        }
        kinds = ("engram+attention+moe", "attention+moe")  # the first without Engram where there is no table
        layers = tuple(kinds[i % 2] for i in range(self.layers))
        model = {"dim": self.dim, "layers": layers, "attention": attention, "moe": moe}
        return Settings.model_validate(
            {
                "model": model,
                "engram": self._engram(),
                "train": {"seq_len": self.seq_len, "global_batch": self.batch},
                "parallel": parallel[experts],
                "optim": {"backbone": "adamw", "lr": LEARNING_RATE, "clip_norm": CLIP_NORM},
                "run": {"threads": self.threads},
            }
        )

    def _engram(self) -> dict[str, Any]:
        if not self.rows:
            return {"enabled": False}
        heads = -(-self.layers // 2) * EngramSettings().slots  # of all Engram layers
        return {"rows_per_head": -(-self.rows // heads), "head_dim": self.row_width}

    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.vocab, 0, torch.arange(self.vocab).numpy())

    def tokens(self) -> Tensor:
        """This rank's sequences with one token more than the model sees: [B, T + 1]."""
        whole = torch.randint(
            1, self.vocab, (self.batch, self.seq_len + 1), generator=torch.Generator().manual_seed(0)
        )
        return whole.chunk(self.ranks)[int(os.environ["RANK"])]


SMALL = Case()
CASES: dict[str, Case] = {
    "small": SMALL,
    "many": replace(SMALL, experts=64, top_k=6, hidden=128),
    "large": replace(SMALL, experts=16, dim=512, layers=8, heads=8, seq_len=512),
    "hybrid": replace(SMALL, rows=200_000),
}
"""The cases that have a name."""
