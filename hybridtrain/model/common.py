"""What components share: norms, running sums, documents and positions of a sequence.

B batch, T tokens, R = head_dim / 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the compiler, for seconds

from hybridtrain.kernels.choose import TORCH, Backends
from hybridtrain.kernels.document_attention.op import Spans, read_spans
from hybridtrain.kernels.norms.op import rms_norm, rope


class RMSNorm(nn.RMSNorm):
    """torch's module on this project's op."""

    def __init__(self, dim: int, eps: float, backends: Backends = TORCH) -> None:
        super().__init__(dim, eps)
        self.epsilon, self.backends = eps, backends

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon, self.backends)


class HeadNorm(RMSNorm):
    """The norm of each head of queries or keys, and their rotation by position after it."""

    def forward(self, x_BTHC: Tensor, rotation_TR: Tensor) -> Tensor:  # type: ignore[override]
        return rope(x_BTHC, rotation_TR, self.weight, self.epsilon, self.backends)


P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """A function that a compiled layer calls as it is: its graphs end before it and begin anew behind it."""
    left_out = _disable_dynamo(function)

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        # without a compiler at work `left_out` would import it
        return (left_out if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return run


def local(parameter: Tensor) -> Tensor:
    """The part of a parameter that this rank has, where it is cut; else the parameter."""
    # not by asking for the attribute: compiled, a parameter that is cut would seem to have none
    if type(parameter) in (Tensor, nn.Parameter):
        return parameter
    cut: Any = parameter
    part: Tensor = cut.to_local()
    return part


_counting: ContextVar[bool] = ContextVar("counting", default=True)


@contextmanager
def not_counting() -> Iterator[None]:
    """A context in which running sums stay as they are: what was counted before is computed a second time."""
    token = _counting.set(False)
    try:
        yield
    finally:
        _counting.reset(token)


class Counters:
    """Named sums since the last reset; detached, on the module's device, additive over micro-batches and
    ranks.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    @uncompiled
    def add(self, name: str, value: Tensor) -> None:
        if not _counting.get():
            return
        value = value.detach()
        self.sums[name] = self.sums[name] + value if name in self.sums else value


class CountingModule(nn.Module):
    """A module that takes running sums while it trains, and may learn from those of all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.counters = Counters()

    def reset_buffers(self) -> None:
        """Fill the buffers with what they are before the first step."""

    def learn(self, sums: Mapping[str, Tensor]) -> None:
        """Take in the sums of the module's layer over all tokens of a step, behind the step's update."""


def collect(model: nn.Module) -> dict[str, Tensor]:
    """All sums since the last `reset`, in float64, under "layers.N." and the names that components declare.

    Every sum is additive over micro-batches and data-parallel ranks, so a loop may add them in any grouping.
    """
    return {
        f"{layer}{name}": value.double()
        for layer, module in _counting_modules(model)
        for name, value in module.counters.sums.items()
    }


def reset(model: nn.Module) -> None:
    """Forget all sums; called once per optimizer step, after they were collected."""
    for _, module in _counting_modules(model):
        module.counters.sums.clear()


@torch.no_grad()
def learn(model: nn.Module, totals: Mapping[str, Tensor]) -> None:
    """Hand every module the sums of its layer, out of those of the whole model over all ranks."""
    for layer, module in _counting_modules(model):
        module.learn({n.removeprefix(layer): v for n, v in totals.items() if n.startswith(layer)})


def _counting_modules(model: nn.Module) -> Iterator[tuple[str, CountingModule]]:
    """("layers.N.", module)"""
    for name, module in model.named_modules():
        if isinstance(module, CountingModule):
            yield ".".join(name.split(".")[:2]) + ".", module


MASKED_TOKENS = 2048
"""The longest sequences that have a mask of all pairs: 4 MB of it each, which attention on the CPU makes 16
of.
"""


@dataclass(frozen=True)
class SequenceContext:
    """`mask_B1TT` is True where a query may read a key; of sequences too long for it there are `spans`
    instead. Neither: causal and nothing else. `documents_BT` goes with both."""

    rotation_TR: Tensor
    documents_BT: Tensor | None
    mask_B1TT: Tensor | None
    spans: Spans | None = None


def make_context(
    documents_BT: Tensor | None,
    seq_len: int,
    head_dim: int,
    theta: float,
    device: torch.device,
    positions_T: Tensor | None = None,
) -> SequenceContext:
    """The context of sequences whose tokens carry the document numbers `documents_BT`; None: one document
    each.

    `positions_T` says which tokens of the sequence are here (None: all); `documents_BT` is of the whole
    sequence all the same, and the mask then has a row for each token here and a column for each of the
    sequence.

    On the CPU, sequences without an inner document start are found here and take the plain causal path. On
    other devices looking would stall the host, so a caller who knows passes None; the spans of long sequences
    are worth it.
    """
    whole = seq_len if documents_BT is None else documents_BT.size(1)
    if (
        documents_BT is not None
        and documents_BT.device.type == "cpu"
        and torch.equal(documents_BT[:, 0], documents_BT[:, -1])
    ):
        documents_BT = None
    rotation_TR = rope_rotations(whole, head_dim, theta, device)
    if positions_T is not None:
        rotation_TR = rotation_TR[positions_T]
    elif documents_BT is None:
        return SequenceContext(rotation_TR, None, None)
    if whole > MASKED_TOKENS:
        return SequenceContext(rotation_TR, documents_BT, None, read_spans(documents_BT, whole))
    key_T = torch.arange(whole, device=device)
    query_T = key_T if positions_T is None else positions_T
    mask = (query_T[:, None] >= key_T)[None]
    if documents_BT is not None:
        mask = mask & (documents_BT[:, query_T, None] == documents_BT[:, None, :])
    return SequenceContext(rotation_TR, documents_BT, mask[:, None])


def rope_rotations(seq_len: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """exp(i * position * theta^(-2r/head_dim)), complex64 [T, R] (RoPE, arXiv 2104.09864)."""
    rate_R = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle_TR = torch.arange(seq_len, dtype=torch.float32, device=device)[:, None] * rate_R
    return torch.polar(torch.ones_like(angle_TR), angle_TR)
