"""Puts a run together from its settings on the ranks that it has: model, table, optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hybridtrain.data.shards import TokenDataset
from hybridtrain.errors import SettingsError
from hybridtrain.kernels.engram_hash.addressing import Addressing, AddressingError, TableShape
from hybridtrain.kernels.ops import KernelChoiceError, resolve
from hybridtrain.model.build import model_sums
from hybridtrain.model.cost import stage_costs
from hybridtrain.model.engram import StepRows
from hybridtrain.model.init import init_parameters
from hybridtrain.model.lm import HybridLM, Part
from hybridtrain.monitor.loss_spikes import SpikeGuard
from hybridtrain.parallel.apply import Sharding, materialize, parallelize, write_local
from hybridtrain.parallel.exchanges import wire
from hybridtrain.parallel.interfaces import Engine, Schedule
from hybridtrain.parallel.mesh import Mesh
from hybridtrain.parallel.stages import SCHEDULES, Stage, balance, plan_stages
from hybridtrain.run.engines import make_engine
from hybridtrain.run.process_setup import compute_dtype, shards_parameters
from hybridtrain.settings.layers import engram_layers, layer_specs
from hybridtrain.settings.tree import Settings
from hybridtrain.table.lookup_table import LookupTable


@dataclass(frozen=True)
class Vocabulary:
    """What the model and its table need to know about the tokenizer."""

    size: int
    separator_id: int
    compression: np.ndarray  # int64 [V], token id to compressed id

    @classmethod
    def of(cls, dataset: TokenDataset, rows: int = 0) -> Vocabulary:
        """The dataset's, with an embedding of `rows` rows where they are given. Raises SettingsError where
        they are too few.
        """
        size = dataset.manifest.vocab_size
        if 0 < rows < size:
            problem = (
                f"model.vocab_size={rows} is less than the tokenizer's {size}; it may be 0, {size} or more"
            )
            raise SettingsError("settings", [problem])
        return cls(rows or size, dataset.manifest.separator_id, dataset.compression)


@dataclass(frozen=True)
class Run:
    """What a run is made of, as this rank holds it. `model_parts` is the whole model, or under pp the stages
    of this rank.
    """

    settings: Settings
    mesh: Mesh
    vocabulary: Vocabulary
    model_parts: tuple[HybridLM, ...]
    table: LookupTable | None
    engine: Engine
    positions: torch.Tensor | None  # under cp: the places in the sequence of this rank's tokens
    guard: SpikeGuard
    sums: Mapping[str, tuple[int, ...]]  # shapes of the running sums of the whole model

    @property
    def model(self) -> HybridLM:
        """The whole model, where this rank has it (pp 1)."""
        (model,) = self.model_parts
        return model

    @property
    def schedule(self) -> Schedule:
        return self.engine.schedule

    def set_mode(self, training: bool) -> None:
        for stage in self.model_parts:
            stage.train(training)

    @property
    def tokens_per_step(self) -> int:
        return self.settings.train.global_batch * self.settings.train.seq_len


def make_addressing(settings: Settings, vocabulary: Vocabulary) -> Addressing | None:
    """The addressing of the model's Engram layers, drawn or read from `engram.addressing`; None without
    such layers.
    """
    layers, engram = engram_layers(settings), settings.engram
    if not layers:
        return None
    pad_id = int(vocabulary.compression[vocabulary.separator_id])
    try:
        if not engram.addressing:
            return Addressing.draw(
                TableShape(layers, engram.orders, engram.heads, engram.rows_per_head),
                vocabulary.compression,
                pad_id,
                engram.boundary,
                engram.hash_seed,
            )
        addressing = Addressing.from_json(
            Path(engram.addressing).read_text(encoding="utf-8"), vocabulary.compression
        )
    except OSError as error:
        raise SettingsError(
            f"engram.addressing={engram.addressing}", [f"cannot be read: {error.strerror}"]
        ) from None
    except AddressingError as error:
        raise SettingsError(f"engram.addressing={engram.addressing}", error.problems) from None
    if problems := addressing_misfits(addressing, settings):
        raise SettingsError(f"engram.addressing={engram.addressing}", problems)
    return addressing


def addressing_misfits(addressing: Addressing, settings: Settings) -> list[str]:
    """How it differs from the Engram layers of the settings."""
    engram = settings.engram
    wanted = {
        "layers": engram_layers(settings),
        "orders": engram.orders,
        "heads": engram.heads,
        "boundary": engram.boundary,
    }
    return [
        f"{k}={getattr(addressing, k)} but the settings say {v}"
        for k, v in wanted.items()
        if getattr(addressing, k) != v
    ]


def assemble(settings: Settings, mesh: Mesh, vocabulary: Vocabulary, addressing: Addressing | None) -> Run:
    """Build the model on the meta device, shard it, and draw this rank's part of every parameter and of the
    table.
    """
    try:
        backends = resolve(settings.kernels.model_dump(), mesh.device.type)
    except KernelChoiceError as error:
        raise SettingsError("settings", error.problems) from None
    dtype = compute_dtype(settings, mesh.device)
    every = resolve_stages(settings, vocabulary.size)
    here = [stage for stage in every if stage.pp_rank == mesh.pp.rank]
    rows = StepRows(backends)
    train = settings.train
    wiring = wire(mesh, train.seq_len, train.recompute, compiled=train.compile, backends=backends)
    sharding = Sharding(settings.parallel.reshard_after_forward, dtype, fsdp=shards_parameters(settings))
    stages: list[HybridLM] = []
    for stage in here:
        part = Part(stage.low, stage.high, stage.is_first, stage.is_last)
        with torch.device("meta"):
            model = HybridLM(settings, vocabulary.size, part, rows, wiring)
        parallelize(model, list(model.layers.values()), model.components, mesh, sharding)
        materialize(model, mesh.device)
        init_parameters(model, settings, write_local)
        stages.append(model)
    layers = tuple(layer for model in stages for layer in model.engram_layers)
    positions = wiring.positions_T.cpu() if wiring.positions_T is not None else None
    table = (
        LookupTable(settings, addressing, mesh, rows, layers, positions) if addressing is not None else None
    )
    engine = make_engine(settings, mesh, every, stages, dtype)
    return Run(
        settings,
        mesh,
        vocabulary,
        tuple(stages),
        table,
        engine,
        positions,
        SpikeGuard(train),
        model_sums(settings),
    )


def resolve_stages(settings: Settings, vocab_size: int) -> list[Stage]:
    """All pipeline stages in order; one without pp."""
    parallel, num_layers = settings.parallel, len(layer_specs(settings))
    if parallel.pp == 1:
        return plan_stages(parallel.schedule, 1, 0, [num_layers])
    count = parallel.pp * (parallel.stages_per_rank or SCHEDULES[parallel.schedule].default)
    first, layers, last = stage_costs(settings, vocab_size)
    cuts = parallel.stage_cuts or balance(layers, first, last, count)
    return plan_stages(parallel.schedule, parallel.pp, parallel.stages_per_rank, cuts)
