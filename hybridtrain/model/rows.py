"""The memory rows of one step, as the model sees them: small leaves, whatever the size of the table.

U unique rows of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain.kernels.row_gather.op import row_gather


class StepRows(nn.Module):
    """The rows fetched for a step, one leaf [U_m, head_dim] per micro-batch m.

    The leaves are registered parameters, made anew each step: a plain leaf tensor gets no gradient under the
    zero-bubble pipeline schedules and a wrongly scaled one under the others. They are no model state and stay out of
    the state dict; `clear` before anything walks the model's parameters.
    """

    def set(self, leaves: Sequence[Tensor]) -> None:
        """Replace the leaves by these tensors (shared, not copied), one per micro-batch."""
        self.clear()
        for micro_batch, leaf in enumerate(leaves):
            self.register_parameter(f"leaf{micro_batch}", nn.Parameter(leaf))

    def gather(self, index: Tensor, micro_batch: int, beside: Tensor | None = None) -> Tensor:
        """Rows `index` (int64, any shape) of the micro-batch's leaf: [*index.shape, head_dim].

        `beside` is the hidden state that the rows are about to meet, whose dtype they get. Raises RuntimeError where
        that micro-batch has no leaf.
        """
        leaf = self._parameters.get(f"leaf{micro_batch}")
        if leaf is None:
            raise RuntimeError(f"micro-batch {micro_batch} has no memory rows; the step set {len(self._parameters)} leaves")
        rows = row_gather(leaf, index)
        return rows if beside is None else _join(rows, beside).to(beside.dtype)

    def grads(self) -> list[Tensor]:
        """The leaves' gradients in micro-batch order; zeros where none arrived."""
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.parameters()]

    def clear(self) -> None:
        self._parameters.clear()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


class _Join(torch.autograd.Function):
    """The identity on `rows`, which in the graph comes from `beside` too, without a gradient to it.

    Zero-bubble schedules first go back to a stage's input and then from every node on that way to the weights beside it.
    Weights that rows alone run through would meet the way later, several at one node and the rows at several nodes, which
    torch 2.13 goes through twice and fails (docs/log.md). So the rows join the way where they are looked up.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, beside: Tensor) -> Tensor:
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


_join: Callable[[Tensor, Tensor], Tensor] = _Join.apply
