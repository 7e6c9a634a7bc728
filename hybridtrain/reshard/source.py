"""The tensors of a checkpoint as the target has them: as they are, or with experts or tokens added.

A new expert e is a copy of expert e mod E: weights, selection bias and optimizer state. So are the router's
rows, but for noise; an expert's share of the load is divided among its copies. Softmax scores of copies are E
/ N of what they were, so the biases that are added to them become E / N as well, and select as before. A new
token has the mean of all tokens' embeddings and of all rows of the head (J. Hewitt, "Initializing New Word
Embeddings for Pretrained Language Models", 2021), and optimizer state of zeros.

D model width, E experts, V tokens before, N experts or tokens after.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hybridtrain.checkpoint.stored import StoredTensors
from hybridtrain.model.init import draw

Shape = tuple[int, ...]
MEAN_ROWS = 1 << 12  # tokens read at a time for their mean


class Source:
    """Reads the target's tensors from `stored`; `shapes` are those of all tensors of the target."""

    def __init__(
        self, stored: StoredTensors, changed: Mapping[str, Shape], noise: float, seed: int, softmax: bool
    ) -> None:
        """`changed`: target shapes of tensors that get more rows. `noise`: on new router rows, over their
        root mean square.
        """
        self.stored, self.noise, self.seed, self.softmax = stored, noise, seed, softmax
        self.shapes: dict[str, Shape] = {**stored.shapes, **changed}
        self.changed = frozenset(changed)
        self._means: dict[str, Tensor] = {}

    def dtype(self, name: str) -> torch.dtype:
        return self.stored.dtype(name)

    def num_bytes(self, name: str, low: int, high: int) -> int:
        """The size of rows `low` to `high-1`."""
        return (high - low) * math.prod(self.shapes[name][1:]) * self.dtype(name).itemsize

    def read(self, name: str, low: int, high: int) -> Tensor:
        """Rows `low` to `high-1` of a tensor, on the CPU; all of one without dims."""
        shape = self.shapes[name]
        out = torch.empty((high - low, *shape[1:]) if shape else (), dtype=self.dtype(name))
        if name not in self.changed:
            self.stored.read_into(out, name, low)
        elif ".feedforward." in name:
            self._with_experts(out, name, low)
        else:
            self._with_tokens(out, name, low)
        return out

    def _with_experts(self, out: Tensor, name: str, low: int) -> None:
        old, new = self.stored.shapes[name][0], self.shapes[name][0]
        done = 0
        while done < len(out):  # up to where the old experts begin again
            start = (low + done) % old
            count = min(old - start, len(out) - done)
            self.stored.read_into(out[done : done + count], name, start)
            done += count
        if name.endswith("router.load_E"):
            numbers = torch.arange(low, low + len(out))
            out /= (new - 1 - numbers % old) // old + 1  # copies of each expert
        elif name.endswith("router.bias_E") and self.softmax:
            out *= old / new
        elif name.startswith("model.") and name.endswith("router.weight") and self.noise:
            first = max(low, old)
            rows = slice(first - old, low + len(out) - old)
            if rows.stop > rows.start:
                normal_ND = draw(f"grow:{name}", (new - old, out.shape[1]), self.seed, self.noise, rows)
                copies = out[first - low :]
                copies += normal_ND * copies.square().mean(1, keepdim=True).sqrt()

    def _with_tokens(self, out: Tensor, name: str, low: int) -> None:
        there = max(0, min(self.stored.shapes[name][0] - low, len(out)))
        if there:
            self.stored.read_into(out[:there], name, low)
        if there < len(out):
            out[there:] = self._mean(name) if name.startswith("model.") else 0

    def _mean(self, name: str) -> Tensor:
        if name not in self._means:
            rows, width = self.stored.shapes[name]
            total = torch.zeros(width, dtype=torch.float64)
            for low in range(0, rows, MEAN_ROWS):
                total += self.stored.read(name, low, min(low + MEAN_ROWS, rows)).double().sum(0)
            self._means[name] = total / rows
        return self._means[name]


def grown_shapes(
    stored: Mapping[str, Shape], before: Mapping[str, Shape], after: Mapping[str, Shape]
) -> dict[str, Shape]:
    """Target shapes of the tensors that get more rows: parameters by their shapes before and after, and their
    optimizer state.
    """
    out = {}
    for name, shape in stored.items():
        kind, _, rest = name.partition(".")
        parameter = rest if kind == "model" else rest.rpartition(".")[0] if kind == "optim" else ""
        if parameter in after and shape == before[parameter] != after[parameter]:
            out[name] = after[parameter]
    return out
