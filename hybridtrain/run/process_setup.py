"""How a process becomes a rank of a run: its layout, device and compute dtype, and the other ranks."""

from __future__ import annotations

import ctypes
import os

import torch

from hybridtrain.errors import SettingsError
from hybridtrain.launch.local import RENDEZVOUS
from hybridtrain.model.build import build, layer_components, section_of
from hybridtrain.model.component import LOCAL_WIRING, Component, Cut, Sees
from hybridtrain.model.engram import ENGRAM
from hybridtrain.parallel.compile import missing_compiler
from hybridtrain.parallel.deepspeed import missing
from hybridtrain.parallel.layout import Degrees, ExpertFacts, Layout, ModelFacts
from hybridtrain.parallel.mesh import (
    Joining,
    Mesh,
    choose_device,
    make_mesh,
    ranks_of_a_node,
    world_from_environment,
)
from hybridtrain.parallel.stages import stage_problems
from hybridtrain.settings.layers import layer_specs
from hybridtrain.settings.rules import unfit_widths
from hybridtrain.settings.tree import Settings

_NET_SECONDS = 30  # torch ends a collective this much later than the watchdog, which can say more


def resolve_layout(settings: Settings, world: int) -> Layout:
    """The run's layout on `world` ranks; raises LayoutError listing everything that does not fit."""
    parallel = settings.parallel
    node_size = parallel.node_size or ranks_of_a_node(world)
    asked = Degrees(
        parallel.pp,
        parallel.dp_replicate,
        parallel.dp_shard,
        parallel.cp,
        parallel.tp,
        parallel.ep,
        parallel.mem,
        parallel.etp,
        node_size if parallel.dispatch == "hierarchical" else 0,
        parallel.mem_placement,
    )
    layout = Layout.resolve(world, asked)
    layout.check(
        model_facts(settings),
        stage_problems(
            parallel.schedule,
            parallel.pp,
            parallel.stages_per_rank,
            parallel.stage_cuts,
            len(layer_specs(settings)),
            settings.train.micro_batches,
        ),
    )
    return layout


def model_facts(settings: Settings) -> ModelFacts:
    """The numbers that a layout must fit, as the components of the layers declare them."""
    specs, train, engram = layer_specs(settings), settings.train, settings.engram
    every = [c for spec in dict.fromkeys(specs) for c in layer_components(settings, spec).values()]
    components = list({id(component): component for component in every}.values())
    divides: dict[str, int] = {}
    reach: dict[str, int] = {}
    for component in components:
        section = section_of(settings, component)
        divides |= component.divides(section)
        if tokens := component.reach(section):
            reach["engram.conv" if component is ENGRAM else f"model.{component.name}"] = tokens
    return ModelFacts(
        global_batch=train.global_batch,
        micro_batches=train.micro_batches,
        seq_len=train.seq_len,
        num_layers=len(specs),
        dim=settings.model.dim,
        table_rows=engram.slots * engram.rows_per_head if any(s.engram for s in specs) else None,
        divides=divides,
        reach=reach,
        whole_sequences=tuple(c.name for c in components if c.sees is Sees.SEQUENCE),
        experts=tuple(facts for c in components for facts in _experts(settings, c)),
        sharded=shards_parameters(settings),
    )


def _experts(settings: Settings, component: Component) -> list[ExpertFacts]:
    """The component's experts, counted on the meta device: one entry for each width among them."""
    declared = component.parameters(section_of(settings, component))
    names = [name for name, parameter in declared.items() if parameter.cut is Cut.EXPERT_COLUMN]
    if not names:
        return []
    with torch.device("meta"):
        module = build(settings, component, component.name, LOCAL_WIRING).module
    of, multiple = f"model.{component.name}", 8 if settings.train.precision == "bfloat16" else 4
    shapes = [module.get_parameter(name).shape for name in names]
    widths = dict.fromkeys((shape[0], shape[-1]) for shape in shapes)
    return [ExpertFacts(number, hidden, of, multiple) for number, hidden in widths]


def join_world(settings: Settings) -> Mesh:
    """Start this rank: threads, device, process groups. Raises LayoutError or SettingsError before anything
    is started.
    """
    if settings.train.engine == "deepspeed" and (problem := missing()):
        raise SettingsError("train.engine=deepspeed", [problem])
    rank, world = world_from_environment()
    layout = resolve_layout(settings, world)
    check_compiler(settings)
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    device = choose_device()
    if device.type == "cpu":
        keep_freed_memory()
        # Before torch's threads start, which inherit it: a moment that decays for a thousand steps without a
        # gradient, or the softmax of a sure head, ends among the denormal numbers, with which x86 computes 20
        # to 150 times slower.
        torch.set_flush_denormal(True)
    rendezvous, mixed = os.environ.get(RENDEZVOUS, "env://"), compute_dtype(settings, device) != torch.float32
    timeout = settings.parallel.timeout + _NET_SECONDS
    return make_mesh(
        layout, rank, device, timeout, Joining(rendezvous, table_device(settings, device), always=mixed)
    )


def table_device(settings: Settings, device: torch.device) -> torch.device:
    """Where this rank's part of the lookup table lies beside a model on `device`."""
    return torch.device("cpu") if settings.engram.device == "host" else device


def check_compiler(settings: Settings) -> None:
    """Raise SettingsError where `train.compile` asks for a compiler that this machine does not have."""
    if settings.train.compile and (name := missing_compiler()) is not None:
        problem = (
            f"torch.compile needs a C++ compiler and there is no {name}; install one, name yours in CXX, or "
            "train.compile=false"
        )
        raise SettingsError("train.compile=true", [problem])


def shards_parameters(settings: Settings) -> bool:
    """Whether FSDP cuts the parameters over data-parallel ranks."""
    return settings.train.engine == "native" and settings.parallel.zero == 3


def compute_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """What the layers compute in on `device`; parameters, their gradients, router, losses and table are
    float32 always.

    Raises SettingsError where `auto` means bfloat16 and the experts' widths do not go with it.
    """
    precision = settings.train.precision
    by_name = device.type != "cuda" or settings.train.engine == "deepspeed"
    if precision == "float32" or (precision == "auto" and by_name):
        return torch.float32
    if problems := unfit_widths(settings, 2):
        raise SettingsError(f"train.precision={precision} is bfloat16 on {device.type}", problems)
    return torch.bfloat16


def keep_freed_memory() -> None:
    """Let the C allocator keep what a step frees for the next one: giving it back costs a page fault per 4
    KiB and step.

    glibc only (`mallopt`); elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
