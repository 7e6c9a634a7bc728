"""A training step allocates nothing of the table's size, whatever the table's size."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hybridtrain.data.batches import Batch, BatchLoader, BatchShare
from hybridtrain.data.shards import TokenDataset
from hybridtrain.monitor.clock import Clock
from hybridtrain.parallel.mesh import make_mesh
from hybridtrain.run.assemble import Run, Vocabulary, assemble, make_addressing
from hybridtrain.run.process_setup import resolve_layout
from hybridtrain.run.step import Hooks, StepInput, train_step
from tests.training import ci_settings


class LargestStorage(TorchDispatchMode):
    """Notes the largest storage that any operation made, other than those that existed before."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.operation = 0, ""
        self._known: set[int] = set()

    def know(self, tensors: Iterator[Tensor]) -> None:
        self._known |= {t.untyped_storage().data_ptr() for t in tensors}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._known and storage.nbytes() > self.largest:
                    self.largest, self.operation = storage.nbytes(), str(function)
        return out


def build(tmp_path: Path, data: Path, *overrides: str) -> tuple[Run, BatchLoader]:
    settings = ci_settings(tmp_path / "run", data, "engram.rows_per_head=25000", *overrides)
    dataset = TokenDataset.open(data)
    vocabulary = Vocabulary.of(dataset)
    mesh = make_mesh(resolve_layout(settings, 1), 0, torch.device("cpu"), 60)
    run = assemble(settings, mesh, vocabulary, make_addressing(settings, vocabulary))
    train = settings.train
    share = BatchShare(train.global_batch, train.micro_batches)
    return run, BatchLoader(dataset.split("train"), train.seq_len, share, seed=0)


def largest_of_steps(run: Run, loader: BatchLoader, steps: int = 2) -> LargestStorage:
    """The largest allocation of `steps` steps with their plans, and of one validation batch's exchange."""
    table = run.table
    assert table is not None
    clock = Clock(torch.device("cpu"))

    def step(number: int) -> None:
        batch: Batch = loader.load(number)
        train_step(run, number, StepInput(batch, table.plan(batch)), Hooks(clock.phase))

    step(0)  # optimizers make their state in the first step
    watch = LargestStorage()
    watch.know(iter([table.weight, *table.optimizer.state.values()]))
    with watch:
        for number in range(1, 1 + steps):
            step(number)
        plan = table.plan(loader.load(9), evaluate=True)
        table.fetch(plan, plan.exchanges[0])
        table.leaves.clear()
    return watch


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("engram.weight_decay=0.1",),
        ("engram.optimizer=rowwise_adagrad", "train.micro_batches=2", "engram.exchange_groups=2"),
    ],
    ids=["adam", "decay", "adagrad, two exchanges"],
)
def test_no_tensor_of_the_tables_size_is_made(
    tmp_path: Path, ci_data: Path, overrides: tuple[str, ...]
) -> None:
    run, loader = build(tmp_path, ci_data, *overrides)
    assert run.table is not None
    table = run.table.weight
    assert len(table) > 400_000
    watch = largest_of_steps(run, loader)
    assert watch.largest > 10_000  # it does see allocations
    assert watch.largest < table.nbytes / 2, watch.operation


def test_the_watch_finds_an_optimizer_that_does(tmp_path: Path, ci_data: Path) -> None:
    run, loader = build(tmp_path, ci_data, "engram.optimizer=adam")
    assert run.table is not None
    assert largest_of_steps(run, loader).largest >= run.table.weight.nbytes


def test_numpy_makes_none_either(tmp_path: Path, ci_data: Path) -> None:
    run, loader = build(tmp_path, ci_data)
    assert run.table is not None
    batch = loader.load(0)
    run.table.plan(batch)
    tracemalloc.start()
    try:
        run.table.plan(loader.load(1))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.dtype(np.int64).itemsize < peak < run.table.weight.nbytes / 2
