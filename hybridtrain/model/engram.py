"""The lookup memory's gate and fusion (Engram, arXiv 2601.07372). Rows come from outside; see rows.py.

B batch, T tokens, D model width, S slots (orders * heads), C row width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from hybridtrain.kernels.choose import TORCH, Backends
from hybridtrain.kernels.engram.op import ConvRule, GateNorms, engram_gate
from hybridtrain.kernels.rows.op import row_gather
from hybridtrain.model.common import CountingModule, RMSNorm
from hybridtrain.model.component import NORM, Cut, Engram, Frame, Parameter, Sees
from hybridtrain.model.exchanges import Exchanges
from hybridtrain.section import Fraction, Natural, NonNegative, Positive, Section


class EngramSettings(Section):
    enabled: bool = Field(True, description="false removes the memory from every layer of the pattern")
    orders: tuple[Positive, ...] = Field((2, 3), description="n-gram lengths")
    heads: Positive = Field(4, description="hash heads per order")
    head_dim: Positive = Field(32, description="width of one row")
    rows_per_head: Positive = Field(16384, description="a head has the first unused prime >= this many rows")
    hash_seed: Natural = Field(0, description="seed of the multipliers")
    addressing: str = Field(
        "", description="JSON file with stored multipliers and primes to use instead of drawing them"
    )
    boundary: Literal["document", "stream"] = Field(
        "document", description="n-grams stop at document starts, or run across"
    )
    gate_floor: float = Field(
        1e-6,
        gt=0,
        le=1e6,
        description="least |s| under the gate's root; bounds its slope to 1/(2*sqrt(gate_floor))",
    )
    conv: bool = Field(True, description="short convolution after the gate")
    conv_kernel: Positive = Field(
        4, description="taps of the short convolution; its dilation is the longest order"
    )
    init_std: float = Field(0.02, gt=0, description="standard deviation of rows at initialisation")
    checksum: bool = Field(False, description="verify every exchanged payload with a checksum")
    exchange_groups: Positive = Field(1, description="exchanges per step; divides train.micro_batches")
    fetch: Literal["step", "overlap", "stale"] = Field(
        "step",
        description="when rows are read: before their step; those that the step before leaves alone already "
        "during it (the same numbers); or all of them during it, one update old",
    )
    device: Literal["device", "host"] = Field(
        "device", description="table, row state and row update: with the model, or on the CPU"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of the table; bfloat16 rows are rounded stochastically, by run.seed, step and row",
    )
    wire: Literal["exact", "bfloat16", "float8"] = Field(
        "exact",
        description="what rows travel as: as they are, or rounded; float8 is e4m3 with a scale for each row",
    )
    wire_gradients: Literal["exact", "bfloat16", "float8"] = Field(
        "exact", description="what the rows' gradients travel as: float32 as they are, or rounded like `wire`"
    )
    optimizer: Literal["rowwise_adam", "rowwise_adagrad", "adam"] = Field(
        "rowwise_adam",
        description="of the table; adam is the dense reference, with two moments per element and a dense "
        "update",
    )
    lr_multiplier: float = Field(
        5.0, gt=0, description="learning rate of the table as a multiple of optim.lr"
    )
    beta2: Fraction = Field(0.95, description="decay of the table's second moment per step")
    eps: float = Field(1e-8, gt=0, description="added to the root of the table's second moment")
    weight_decay: NonNegative = Field(
        0.0, description="of the table; decoupled, replayed when a row is next read"
    )

    @property
    def slots(self) -> int:
        """Rows that a token reads in one layer."""
        return len(self.orders) * self.heads

    def problems(self) -> list[str]:
        out: list[str] = []
        if not self.orders or list(self.orders) != sorted(set(self.orders)) or self.orders[0] < 2:
            out.append(f"orders={list(self.orders)} must be rising n-gram lengths from 2 on, e.g. [2, 3]")
        return out


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
        """What the memory adds to the hidden state: [B, T, D]. `documents_BT` None: one document per
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
    formats=("hf", "megatron"),
)


class StepRows(nn.Module):
    """The rows fetched for a step, one leaf [U_m, head_dim] per micro-batch m.

    The leaves are registered parameters, made anew each step: a plain leaf tensor gets no gradient under the
    zero-bubble pipeline schedules and a wrongly scaled one under the others. They are no model state and stay
    out of the state dict; `clear` before anything walks the model's parameters.
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
                f"micro-batch {micro_batch} has no memory rows; the step set {len(self._parameters)} leaves"
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
