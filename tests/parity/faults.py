"""Mistakes that the matrix must notice, each as small as a real one would be; see test_matrix.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from torch import Tensor

from hybridtrain.data.batches import Batch
from hybridtrain.parallel.collectives import Group
from hybridtrain.parallel.mesh import Mesh
from hybridtrain.parallel.replicas import Replicas
from hybridtrain.parallel.row_exchange import RowExchange
from hybridtrain.run import step


@contextmanager
def _one_gradient_scaled() -> Iterator[None]:
    """One matrix's gradient is 1 % too large."""
    real = Replicas.end_sums

    def end_sums(replicas: Replicas) -> None:
        real(replicas)
        largest = max(replicas.buckets[0].replicas, key=lambda r: r.gradient.numel())
        largest.gradient.mul_(1.01)

    with patch.object(Replicas, "end_sums", end_sums):
        yield


@contextmanager
def _row_gradients_doubled() -> Iterator[None]:
    """As where two replicas of the table both count the same gradients."""
    real = RowExchange.reduce_replicas

    def reduce_replicas(exchange: RowExchange, total_ND: Tensor) -> None:
        real(exchange, total_ND)
        total_ND.mul_(2)

    with patch.object(RowExchange, "reduce_replicas", reduce_replicas):
        yield


@contextmanager
def _copies_not_summed() -> Iterator[None]:
    """Norms and routers are left with the gradients of their own rank of `tp`."""
    real = Mesh.own_group

    def own_group(mesh: Mesh, axis: str, name: str) -> Group:
        return real(mesh, "copies" if axis == "copies_tp" else axis, name)

    with patch.object(Mesh, "own_group", own_group):
        yield


@contextmanager
def _borders_forgotten() -> Iterator[None]:
    """The first sequence of each micro-batch is taken for one document by attention and by the Engram layer's
    convolution.
    """
    real = step.by_exchange

    def by_exchange(batch: Batch, plan: Any, device: Any) -> Any:
        starts = batch.starts.clone()
        starts[:, 0, 1:] = False
        return real(replace(batch, starts=starts), plan, device)

    with patch.object(step, "by_exchange", by_exchange):
        yield


FAULTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "one gradient 1 % too large": _one_gradient_scaled,
    "row gradients doubled": _row_gradients_doubled,
    "gradients of tp's copies not summed": _copies_not_summed,
    "borders of a sequence forgotten": _borders_forgotten,
}
