"""Expert parallelism's token exchange: a token travels once to each rank that has one of its experts, and one
sum comes back.

With two groups it does so in two hops: once to each node that has one of its experts, from there to the ranks
inside, and the sums are added up on the node before one comes back.

Shape legend: N tokens here, K experts per token, R ranks of the group, P (token, rank) pairs sent, Q pairs
received, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hybridtrain.kernels.choose import TORCH, Backends
from hybridtrain.kernels.permute.op import collect, sort_by_destination, spread
from hybridtrain.model.exchanges import Dispatch
from hybridtrain.parallel.async_all_to_all import all_to_all_autograd, start_all_to_all
from hybridtrain.parallel.collectives import (
    Group,
    all_gather_autograd,
    exchange_counts,
    reduce_scatter_autograd,
)
from hybridtrain.parallel.replay import replayed

# (x_QD, experts_QK, gates_QK, absent=True, present=pairs) -> each token's gated sum over the experts here
Experts = Callable[..., Tensor]


class DispatchMemoryError(MemoryError):
    """A rank could not hold the tokens that were sent to its experts; the message says how many and what
    bounds them.
    """


@dataclass(frozen=True)
class Load:
    """What one exchange brings to this rank, for the message where memory does not hold it."""

    layer: str
    group: Group
    tokens: int
    pairs: int
    even: int

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Raises DispatchMemoryError where an allocation fails inside."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, DispatchMemoryError) or not _is_allocation_failure(error):
                raise
            times = f"{self.pairs / self.even:.1f} times " if self.even else ""
            raise DispatchMemoryError(
                f"{self.layer}: rank {self.group.ranks[self.group.rank]} ran out of memory in the exchange "
                f"over {self.group.name}: it received {self.tokens:,} tokens for {self.pairs:,} token-expert "
                f"pairs, {times}the even share of {self.even:,}; bound it by model.moe.capacity (a multiple "
                "of the even share; 0 is no bound), or raise train.micro_batches or parallel.ep "
                f"({type(error).__name__}: {str(error).partition(chr(10))[0]})"
            ) from error


class AllToAllDispatch:
    """Dispatch by one all-to-all per group, from the outermost group to the innermost.

    Experts are numbered along the groups, the first slowest: over (`ep`), or over (`ep_inter`, `ep_intra`).
    Pairs whose expert is outside 0..num_experts-1 are absent: they go nowhere.
    """

    def __init__(
        self, groups: Sequence[Group], num_experts: int, layer: str = "MoE", backends: Backends = TORCH
    ) -> None:
        self.groups, self.num_experts, self.layer, self.backends = groups, num_experts, layer, backends

    def __call__(
        self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor, experts: Experts
    ) -> Callable[[], Tensor]:
        """Send the tokens off; what is returned ends it: the gate-weighted sum `[N, D]` of the chosen
        experts' outputs.

        `experts` are this rank's own. What is computed between the two runs while the tokens of the first
        group travel.
        """
        # where every rank has as many tokens, and every expert gets as many of them
        even = experts_NK.numel()
        hop = Hop(self.groups[0], self.num_experts, self.layer, even, self.backends)
        first = ExpertExchange.dispatch(hop, x_ND, experts_NK, gates_NK)

        def finish() -> Tensor:
            trips, arrived = [first], first.arrive()
            for group in self.groups[1:]:
                hop = Hop(group, trips[-1].here, self.layer, even, self.backends)
                trips.append(ExpertExchange.dispatch(hop, *arrived))
                arrived = trips[-1].arrive()
            x_QD, experts_QK, gates_QK = arrived
            with trips[-1].load.guard():
                y_QD = experts(x_QD, experts_QK, gates_QK, absent=True, present=trips[-1].load.pairs)
            for trip in reversed(trips):
                y_QD = trip.combine(y_QD)
            return y_QD

        return finish


@dataclass(frozen=True)
class Hop:
    """One group that tokens travel over. `even`: pairs of each rank where all have as many, for messages."""

    group: Group
    num_experts: int  # of the whole group
    layer: str
    even: int
    backends: Backends = TORCH


@dataclass(frozen=True)
class ExpertExchange:
    """Tokens under way over one group: each once to every rank that has one of its experts."""

    load: Load
    here: int  # experts behind each rank of the group
    order_P: Tensor  # the pair n*K+k that stands for its token at its rank
    inverse_NK: Tensor
    send: list[int]
    receive: list[int]
    # x_QD, experts_QK from 0 here, gates_QK; to be called once
    arrive: Callable[[], tuple[Tensor, Tensor, Tensor]]
    backends: Backends

    @classmethod
    def dispatch(cls, hop: Hop, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor) -> ExpertExchange:
        """Collective over the hop's group."""
        group, here = hop.group, hop.num_experts // hop.group.size
        order_Q, inverse_NK, asked_R2 = sort_by_destination(
            experts_NK, hop.num_experts, group.size, hop.backends
        )
        # where the host waits for the device
        both = read_numbers(torch.stack([asked_R2, exchange_counts(asked_R2, group)]))
        send, receive = ([tokens for tokens, _ in side] for side in both)
        load = Load(hop.layer, group, sum(receive), sum(pairs for _, pairs in both[1]), hop.even)

        with load.guard():
            order_P = order_Q[: sum(send)]
            rank_P = torch.repeat_interleave(
                torch.arange(group.size, device=x_ND.device), asked_R2[:, 0], output_size=len(order_P)
            )
            # outside 0..here-1: lives elsewhere
            local_PK = experts_NK[order_P // experts_NK.size(1)] - rank_P[:, None] * here
            gates_PK, x_PD = (spread(rows, order_P, inverse_NK, hop.backends) for rows in (gates_NK, x_ND))
            start = partial(start_all_to_all, send=send, receive=receive, group=group, guard=load.guard)
            # one message: gates are float32, which has all integers to 2^24
            finish_chosen, finish_x = start(torch.cat([gates_PK, local_PK], 1)), start(x_PD)

        def arrive() -> tuple[Tensor, Tensor, Tensor]:
            gates_QK, local_QK = finish_chosen().chunk(2, 1)
            return finish_x(), local_QK.detach().long(), gates_QK

        return cls(load, here, order_P, inverse_NK, send, receive, arrive, hop.backends)

    def combine(self, y_QD: Tensor) -> Tensor:
        """Send each received token's result back, and add up those of each token here: [N, D]."""
        with self.load.guard():
            y_PD = all_to_all_autograd(y_QD, self.receive, self.send, self.load.group, self.load.guard)
            return collect(y_PD, self.order_P, self.inverse_NK, self.backends)


@replayed
def read_numbers(x: Tensor) -> list[Any]:
    """A tensor's elements as lists; a recomputed layer, whose numbers are the same, does not wait for the
    device again.
    """
    out: list[Any] = x.tolist()
    return out


class SharedWidthDispatch:
    """Around another dispatch, for experts whose hidden width is cut over a group: its ranks gather their
    tokens, each makes a part of every output, and the parts are summed back to the ranks that the tokens came
    from."""

    def __init__(self, inner: Dispatch, group: Group) -> None:
        self.inner, self.group = inner, group

    def __call__(
        self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor, experts: Experts
    ) -> Callable[[], Tensor]:
        """As the inner dispatch's, for as many tokens on every rank of the group."""
        x, chosen, gates = (
            all_gather_autograd(part, self.group).flatten(0, 1) for part in (x_ND, experts_NK, gates_NK)
        )
        finish = self.inner(x, chosen, gates, experts)
        return lambda: reduce_scatter_autograd(finish().unflatten(0, (self.group.size, -1)), self.group)


def _is_allocation_failure(error: BaseException) -> bool:
    """CUDA and Python say so by type, the CPU allocator of torch in words alone."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
