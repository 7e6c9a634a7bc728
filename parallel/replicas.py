"""Parameters that several ranks hold whole: their gradients lie in flat buckets and are summed while the
backward pass goes on. Under ZeRO 1 (arXiv 1910.02054, §5.1) each parameter has one owner among the ranks,
which updates it and sends it back while the next step is prepared.

A sum has the order of the ranks, so that ranks add up as micro-batches of one rank do, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hybridtrain.parallel.async_all_to_all import Handle, begin_all_to_all
from hybridtrain.parallel.collectives import Group, begin_broadcast

BUCKET = 1 << 22  # elements: a bucket's gradients travel when all of them are complete
UNDER_WAY = 2  # buckets that are summed at a time: each holds its gradients a second time


@dataclass(frozen=True, eq=False)
class Replica:
    """This rank's copy of a parameter, and what its bucket has of it, DTensors where the parameter is one.

    weight: what an optimizer updates here, float32; shares its storage with a parameter that computes in
    float32. None: another rank updates it
    gradient: the parameter's `.grad`, float32
    """

    parameter: nn.Parameter
    owner: int
    weight: Tensor | None
    gradient: Tensor


class Bucket:
    """Some parameters of one group of ranks, those of each owner side by side in the order of the owners."""

    def __init__(
        self, group: Group, owned: Sequence[Sequence[nn.Parameter]], dtype: torch.dtype, shared: bool
    ) -> None:
        """`owned`: the float32 parameters of each rank of the group, the same on all of them. They compute in
        `dtype` from here on; `shared`: each is updated by its owner alone.
        """
        self.group = group
        self.sizes = [sum(local_part(p).numel() for p in parameters) for parameters in owned]
        first, size = next(local_part(p) for parameters in owned for p in parameters), sum(self.sizes)
        self.gradients, self.computed = first.new_empty(size), first.new_empty(size, dtype=dtype)
        before = sum(self.sizes[: group.rank])
        self.updated = slice(before, before + self.sizes[group.rank]) if shared else slice(0, size)
        # float32, of what is updated here
        self.weights = self.computed[self.updated].float()
        self.replicas = list(self._placed(owned))
        self.complete: set[nn.Parameter] = set()
        self._sum: Handle | None = None

    def _placed(self, owned: Sequence[Sequence[nn.Parameter]]) -> Iterator[Replica]:
        """The parameters, whose storage is now in the bucket."""
        start = 0
        for owner, parameters in enumerate(owned):
            for parameter in parameters:
                local, low = local_part(parameter).detach(), start - self.updated.start
                here = slice(start, start := start + local.numel())
                gradient, computed = (
                    _like(parameter, flat[here].view(local.shape)) for flat in (self.gradients, self.computed)
                )
                local_part(computed).copy_(local)
                weight = None
                if self.updated.start <= here.start and here.stop <= self.updated.stop:
                    weight = _like(parameter, self.weights[low : low + local.numel()].view(local.shape))
                    local_part(weight).copy_(local)
                torch.utils.swap_tensors(parameter, nn.Parameter(computed))
                parameter.grad_dtype = torch.float32
                yield Replica(parameter, owner, weight, gradient)

    def part(self, flat: Tensor, owner: int) -> Tensor:
        """What an owner has of `gradients` or `computed`."""
        start = sum(self.sizes[:owner])
        return flat[start : start + self.sizes[owner]]

    def collect(self) -> None:
        """Bring in the gradients that autograd has put elsewhere; of a parameter without one they are 0."""
        for replica in self.replicas:
            if replica.parameter.grad is None:
                local_part(replica.gradient).zero_()
            else:
                move_in(replica)

    def begin_sum(self) -> None:
        """Send every owner the gradients of its parameters."""
        receive = [self.sizes[self.group.rank]] * self.group.size
        self._sum = begin_all_to_all(self.gradients, self.sizes, receive, self.group)

    def end_sum(self) -> None:
        """The sums over ranks take the place of this rank's gradients, for the parameters that it owns."""
        assert self._sum is not None, "a sum ends once for every time that it begins"
        received, self._sum = self._sum.wait(), None
        if self.group.size > 1 and received.numel():
            first, second, *others = received.chunk(self.group.size)
            total = torch.add(first, second, out=self.part(self.gradients, self.group.rank))
            for other in others:
                total += other

    def take_over(self) -> None:
        """Compute with what was updated here."""
        if self.computed.dtype != self.weights.dtype:
            self.computed[self.updated] = self.weights.to(self.computed.dtype)

    def begin_spread(self, flat: Tensor) -> list[Callable[[], None]]:
        """Begin to send what each owner has of `flat` to all ranks; what is returned waits for it."""
        if self.group.size == 1:
            return []
        parts = [self.part(flat, owner) for owner in range(self.group.size)]
        return [begin_broadcast(part, owner, self.group) for owner, part in enumerate(parts) if part.numel()]


class Replicas:
    """The buckets of this rank's parameters, in the order in which the backward pass completes them."""

    def __init__(self, buckets: Sequence[Bucket], shared: bool) -> None:
        """`shared`: each parameter is updated by its owner alone (ZeRO 1); else by all ranks (ZeRO 0)."""
        self.buckets, self.shared = buckets, shared
        self._places = {r.parameter: (n, r) for n, bucket in enumerate(buckets) for r in bucket.replicas}
        self._last = False
        self._begun = self._ended = 0  # sums of this step
        self._coming: list[Callable[[], None]] = []
        for parameter in self._places:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def updated_here(self, parameter: nn.Parameter) -> Tensor | None:
        """What this rank's optimizer updates in the parameter's place; None: another rank does."""
        if parameter not in self._places:
            return parameter
        return self._places[parameter][1].weight

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The parameter's gradient; summed over ranks after `end_sums`, where this rank updates it."""
        return self._places[parameter][1].gradient if parameter in self._places else parameter.grad

    def updated_by(self, parameter: nn.Parameter) -> int:
        """How many ranks update the parameter."""
        if self.shared or parameter not in self._places:
            return 1
        return self.buckets[self._places[parameter][0]].group.size

    def expect_last(self, last: bool) -> None:
        """Whether the next backward pass completes the gradients, so that they may travel as they come."""
        self._last = last

    def _arrived(self, parameter: Tensor) -> None:
        """Autograd has added to a gradient: it moves to its bucket, where the next ones are added to it."""
        number, replica = self._places[cast(nn.Parameter, parameter)]
        if number < self._begun:
            raise RuntimeError("a gradient was added to after its sum over ranks had begun")
        move_in(replica)
        if self._last:
            self.buckets[number].complete.add(replica.parameter)
            while self._begun < len(self.buckets) and _is_complete(self.buckets[self._begun]):
                self._begin_next()

    def _begin_next(self) -> None:
        if self._begun - self._ended == UNDER_WAY:
            self._end_next()
        self.buckets[self._begun].begin_sum()
        self._begun += 1

    def _end_next(self) -> None:
        self.buckets[self._ended].end_sum()
        self._ended += 1

    def end_sums(self) -> None:
        """Complete the gradients of the parameters that this rank updates. Collective."""
        while self._begun < len(self.buckets):
            self.buckets[self._begun].collect()
            self._begin_next()
        while self._ended < len(self.buckets):
            self._end_next()
        if not self.shared:
            for wait in [w for bucket in self.buckets for w in bucket.begin_spread(bucket.gradients)]:
                wait()

    def clear(self) -> None:
        """Forget the step's gradients."""
        self._begun = self._ended = 0
        for bucket in self.buckets:
            bucket.complete.clear()
            for replica in bucket.replicas:
                replica.parameter.grad = None

    def zero(self) -> None:
        for bucket in self.buckets:
            bucket.gradients.zero_()

    def spread(self) -> None:
        """Take over this rank's updates and begin to send them to all ranks. Collective."""
        for bucket in self.buckets:
            bucket.take_over()
            if self.shared:
                self._coming += bucket.begin_spread(bucket.computed)

    def await_parameters(self) -> None:
        """From here on every rank's parameters are those of the last update."""
        for wait in self._coming:
            wait()
        self._coming.clear()


def _is_complete(bucket: Bucket) -> bool:
    return len(bucket.complete) == len(bucket.replicas)


def move_in(replica: Replica) -> None:
    """The gradient that autograd has made becomes the bucket's."""
    grad = replica.parameter.grad
    if grad is not None and grad is not replica.gradient:
        local_part(replica.gradient).copy_(local_part(grad))
        replica.parameter.grad = replica.gradient


class Sharing:
    """Shares the parameters of each group out to its ranks, evenly by the cost of their updates."""

    def __init__(
        self, group: Group, cost: Mapping[nn.Parameter, float], dtype: torch.dtype, shared: bool
    ) -> None:
        self.group, self.cost, self.dtype, self.shared = group, cost, dtype, shared
        self.loads = [0.0] * group.size
        self.open: list[nn.Parameter] = []

    def add(self, parameter: nn.Parameter) -> Iterator[Bucket]:
        """The bucket that the parameter fills, if it does."""
        self.open.append(parameter)
        if sum(local_part(p).numel() for p in self.open) >= BUCKET:
            yield from self.close()

    def close(self) -> Iterator[Bucket]:
        """The bucket of what was added since the last one."""
        owned: list[list[nn.Parameter]] = [[] for _ in self.loads]
        for parameter in sorted(self.open, key=lambda p: -self.cost[p]):
            owner = self.loads.index(min(self.loads))
            self.loads[owner] += self.cost[parameter]
            owned[owner].append(parameter)
        if self.open:
            yield Bucket(self.group, owned, self.dtype, self.shared)
        self.open = []


def make_replicas(
    cost: Mapping[nn.Parameter, float],
    group_of: Callable[[nn.Parameter], Group],
    dtype: torch.dtype = torch.float32,
    shared: bool = True,
) -> Replicas:
    """Buckets for the parameters of `cost`, in whose reverse order the backward pass completes them.

    `cost` of a parameter's update, in any unit, is what its owners share evenly. Parameters that no other
    rank holds and that compute in float32 stay as they are.
    """
    sharings: dict[str, Sharing] = {}
    buckets: list[Bucket] = []
    for parameter in reversed([*cost]):
        group = group_of(parameter)
        if group.size > 1 or dtype != torch.float32:
            sharing = sharings.setdefault(group.name, Sharing(group, cost, dtype, shared))
            buckets += sharing.add(parameter)
    for sharing in sharings.values():
        buckets += sharing.close()
    return Replicas(buckets, shared)


def local_part(tensor: Tensor) -> Tensor:
    """The part of a parameter or of a gradient that this rank has: the storage itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _like(parameter: nn.Parameter, local: Tensor) -> Tensor:
    """A DTensor of the local part where the parameter is one."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
