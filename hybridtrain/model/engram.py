"""The Engram layer: its gate and fusion (arXiv 2601.07372). Rows come from outside: `StepRows`.

B batch, T tokens, D model width, S slots (orders * heads), C row width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain.kernels.choose import TORCH, Backends
from hybridtrain.kernels.engram.op import ConvRule, GateNorms, engram_gate
from hybridtrain.kernels.rows.op import row_gather
from hybridtrain.model.common import CountingModule, RMSNorm
from hybridtrain.model.component import NORM, Cut, Engram, Frame, Parameter, Sees
from hybridtrain.model.exchanges import Exchanges
from hybridtrain.settings.engram import EngramSettings


class EngramLayer(CountingModule):
    """y = SiLU(conv(RMSNorm(u))) + u with u = g * W_V e, where g says how far the hidden state agrees with
    W_K e.

    g = sigmoid(sign(s) sqrt(max(|s|, floor))) of s = <h, W_K e> / sqrt(D), both RMS-normed. The square root
    is in every released code, with the floor 1e-6; the paper's text has sigmoid(s). Its slope is 1 / (2
    sqrt(|s|)), up to 1 / (2 sqrt(floor)): single tokens near s = 0 can dominate a step's gradient.
    """

    def __init__(self, engram: EngramSettings, frame: Frame, exchanges: Exchanges) -> None:
        super().__init__()
        dim, eps, width = frame.dim, frame.norm_eps, engram.slots * engram.head_dim
        self.eps, self.gate_floor, self.backends = eps, engram.gate_floor, frame.backends
        self.conv_rule = ConvRule(engram.orders[-1], eps)
        self.wk = nn.Linear(width, dim, bias=False)
        self.wv = nn.Linear(width, dim, bias=False)
        self.h_norm = RMSNorm(dim, eps)
        self.k_norm = RMSNorm(dim, eps)
        self.conv_norm = RMSNorm(dim, eps) if engram.conv else None
        self.convolve = exchanges.convolve
        self.conv = nn.Parameter(torch.empty(engram.conv_kernel, dim)) if engram.conv else None

    def forward(self, h_BTD: Tensor, rows_BTSC: Tensor, documents_BT: Tensor | None) -> Tensor:
        """What the layer adds to the hidden state: [B, T, D]. `documents_BT` None: one document per
        sequence.
        """
        e_BTX = rows_BTSC.flatten(-2)
        k_BTD, v_BTD = self.wk(e_BTX), self.wv(e_BTX)
        norms = GateNorms(self.h_norm.weight, self.k_norm.weight, self.eps, self.gate_floor)
        u_BTD, g_BT1 = engram_gate(h_BTD, k_BTD, v_BTD, norms, self.backends)
        if self.training:
            self.counters.add("gate_sum", g_BT1.sum())
            self.counters.add("gate_count", torch.full((), float(g_BT1.numel()), device=g_BT1.device))
        if self.conv is None or self.conv_norm is None:
            return u_BTD
        return self.convolve(u_BTD, self.conv_norm.weight, self.conv, documents_BT, self.conv_rule)


def _parameters(engram: EngramSettings) -> Mapping[str, Parameter]:
    conv = (
        {"conv": Parameter(Cut.WHOLE, "zeros", "no_decay"), "conv_norm.weight": NORM} if engram.conv else {}
    )
    return {
        "wk.weight": Parameter(Cut.ROW),  # over the slots: each rank fetched the rows of its own
        "wv.weight": Parameter(Cut.ROW, "residual"),
        "h_norm.weight": NORM,
        "k_norm.weight": NORM,
        **conv,
    }


ENGRAM = Engram(
    name="engram",
    section=EngramSettings,
    build=EngramLayer,
    parameters=_parameters,
    sees=Sees.NEIGHBOURS,
    divides=lambda engram: {"len(engram.orders) x engram.heads": engram.slots},
    reach=lambda engram: (engram.conv_kernel - 1) * max(engram.orders) if engram.conv else 0,
    sums=lambda _: {"gate_sum": (), "gate_count": ()},
    ops=("engram_gate", "row_gather", "short_conv"),
    formats=("hf",),
)


class StepRows(nn.Module):
    """The rows fetched for a step, one leaf [U_m, head_dim] per micro-batch m.

    The leaves are registered parameters, made anew each step: a plain leaf tensor gets no gradient under the
    zero-bubble pipeline schedules and a wrongly scaled one under the others. They are not model state and
    stay out of the state dict; `clear` before anything walks the model's parameters.
    """

    def __init__(self, backends: Backends = TORCH) -> None:
        super().__init__()
        self.backends = backends

    def set(self, leaves: Sequence[Tensor]) -> None:
        """Replace the leaves by these tensors (shared, not copied), one per micro-batch."""
        self.clear()
        for micro_batch, leaf in enumerate(leaves):
            self.register_parameter(f"leaf{micro_batch}", nn.Parameter(leaf))

    def gather(self, index: Tensor, micro_batch: int, beside: Tensor | None = None) -> Tensor:
        """Rows `index` (int64, any shape) of the micro-batch's leaf: [*index.shape, head_dim].

        `beside` is the hidden state that the rows are about to meet, whose dtype they get. Raises
        RuntimeError where that micro-batch has no leaf.
        """
        leaf = self._parameters.get(f"leaf{micro_batch}")
        if leaf is None:
            raise RuntimeError(
                f"micro-batch {micro_batch} has no table rows; the step set {len(self._parameters)} leaves"
            )
        rows = row_gather(leaf, index, self.backends)
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

    Zero-bubble schedules first go back to a stage's input and then from every node on that way to the weights
    beside it. Weights that rows alone run through would meet the way later, several at one node and the rows
    at several nodes, which torch 2.13 goes through twice and fails (docs/log.md). So the rows join the way
    where they are looked up.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, beside: Tensor) -> Tensor:
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


_join: Callable[[Tensor, Tensor], Tensor] = _Join.apply
