"""Makes the engine of a run: what carries micro-batches through this rank's stages, and what updates them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hybridtrain.model.lm import HybridLM
from hybridtrain.optim.groups import build_optimizers, update_costs
from hybridtrain.parallel.collectives import Group
from hybridtrain.parallel.deepspeed import DeepSpeedEngine, ZeroSettings
from hybridtrain.parallel.engine import Accumulation, NativeEngine
from hybridtrain.parallel.interfaces import Engine, Schedule
from hybridtrain.parallel.mesh import Mesh
from hybridtrain.parallel.pipeline import Pipeline
from hybridtrain.parallel.replicas import Replicas, make_replicas
from hybridtrain.parallel.stages import Stage
from hybridtrain.parallel.streams import plan_streams
from hybridtrain.parallel.torch_stage import StageModule, StepShape
from hybridtrain.parallel.zero import ReplicaEngine
from hybridtrain.run.process_setup import shards_parameters
from hybridtrain.settings.tree import Settings


def make_engine(
    settings: Settings, mesh: Mesh, every: list[Stage], stages: list[HybridLM], dtype: torch.dtype
) -> Engine:
    """What trains this rank's stages, of which `every` has all; they compute in `dtype`."""
    train, model = settings.train, nn.ModuleList(stages)
    if train.engine == "deepspeed":
        return _deepspeed(settings, mesh, stages)
    replicas = None if shards_parameters(settings) else _replicas(settings, mesh, model, dtype)
    if mesh.layout.pp > 1:
        schedule = _pipeline(settings, mesh, every, stages, dtype)
    else:
        expect_last = replicas.expect_last if replicas is not None else None
        tokens = train.global_batch * train.seq_len
        schedule = Accumulation(stages[0], tokens, mesh.device, expect_last)
    if replicas is None:
        return NativeEngine(stages, schedule, build_optimizers(model, settings.optim), mesh)
    optimizers = build_optimizers(model, settings.optim, replicas.updated_here)
    return ReplicaEngine(stages, schedule, optimizers, mesh, replicas)


def _replicas(settings: Settings, mesh: Mesh, model: nn.Module, dtype: torch.dtype) -> Replicas | None:
    """Buckets of parameters that several ranks hold or that compute in another dtype; None without any."""
    copies, experts = (mesh.own_group(name, name) for name in ("copies", "copies_expert"))
    everywhere = mesh.own_group("copies_tp", "copies_tp") if mesh.tp.size > 1 else copies

    def group_of(parameter: nn.Parameter) -> Group:
        axes = parameter.device_mesh.mesh_dim_names or () if isinstance(parameter, DTensor) else ()
        return experts if "ep" in axes else copies if "tp" in axes else everywhere

    costs = update_costs(model, settings.optim)
    replicas = make_replicas(costs, group_of, dtype, shared=settings.parallel.zero == 1)
    return replicas if replicas.buckets else None


def _deepspeed(settings: Settings, mesh: Mesh, stages: list[HybridLM]) -> Engine:
    train, (model,) = settings.train, stages
    zero = ZeroSettings(
        settings.deepspeed.zero_stage,
        settings.deepspeed.offload_optimizer,
        micro_batch=train.global_batch // train.micro_batches // mesh.layout.dp,
        micro_batches=train.micro_batches,
        tokens_per_step=train.global_batch * train.seq_len,
    )
    return DeepSpeedEngine(model, lambda m: build_optimizers(m, settings.optim)[0], mesh, model.rows, zero)


def _pipeline(
    settings: Settings, mesh: Mesh, every: list[Stage], stages: list[HybridLM], dtype: torch.dtype
) -> Schedule:
    """What carries micro-batches through this rank's stages; `every` are all ranks'."""
    train = settings.train
    parts, column = [], 0
    here = [stage for stage in every if stage.pp_rank == mesh.pp.rank]
    for stage, model in zip(here, stages, strict=True):
        parts.append(StageModule(stage, model, slice(column, column + len(model.engram_layers))))
        column += len(model.engram_layers)
    tokens = train.seq_len // mesh.layout.cp
    tables: dict[bool, Any] = {
        model.part.first: model.embed.weight for model in stages if model.embed is not None
    }
    tied = (tables.get(True), tables.get(False)) if settings.model.tie_embeddings else (None, None)
    shape = StepShape(
        micro_batches=train.micro_batches,
        sequences=train.global_batch // train.micro_batches // mesh.layout.dp,
        tokens=tokens,
        own_tokens=tokens // mesh.layout.tp,
        dtype=dtype,
        device=mesh.device,
        tokens_per_step=train.global_batch * train.seq_len,
    )
    carried = stages[0].carried
    plan = plan_streams(every, lambda before: {c.name: c.width for c in carried(before)})
    return Pipeline(settings.parallel.schedule, parts, plan, mesh.pp, shape, tied)
