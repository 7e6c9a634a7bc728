"""From settings and declarations to modules, each checked against its declaration as it is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from hybridtrain.kernels.choose import TORCH, Backends
from hybridtrain.model.component import (
    NORM,
    Component,
    ComponentError,
    Cut,
    Engram,
    Frame,
    Parameter,
    Placed,
    Wiring,
)
from hybridtrain.model.engram import ENGRAM
from hybridtrain.model.registry import Components
from hybridtrain.section import Section
from hybridtrain.settings.layers import LayerSpec, layer_specs
from hybridtrain.settings.tree import Settings

OUTSIDE: Mapping[str, Parameter] = {
    # along the vocabulary; looked up or compared one by one, so Muon has neither
    "embed.weight": Parameter(Cut.COLUMN, group="no_decay"),
    "head.weight": Parameter(Cut.COLUMN, group="adamw"),
    "norm.weight": NORM,
}
"""The parameters of a model that are in no layer."""

LAYER_NORMS: Mapping[str, Parameter] = {"mixer_norm.weight": NORM, "feedforward_norm.weight": NORM}
"""The parameters of a layer that are in no component."""


def components_of(settings: Settings) -> Components:
    """The components that the layers of `settings` may have."""
    return Components.load(settings.model.components)


def frame_of(settings: Settings, path: str = "", backends: Backends = TORCH) -> Frame:
    """What every component of the model is built for, at `path` in the model."""
    model, train = settings.model, settings.train
    tokens_per_step = train.global_batch * train.seq_len
    return Frame(model.dim, model.norm_eps, train.seq_len, tokens_per_step, path, backends)


def section_of(settings: Settings, component: Component) -> Section:
    """The component's own section of the settings."""
    if isinstance(component, Engram):
        return settings.engram
    section = getattr(settings.model, component.name, None)
    return section if isinstance(section, Section) else component.section()


def layer_components(settings: Settings, spec: LayerSpec) -> dict[str, Component]:
    """What a layer is made of, by the names of its submodules, in the order in which it uses them."""
    known = components_of(settings)
    engram: dict[str, Component] = {"engram": ENGRAM} if spec.engram else {}
    return {
        "residual": known.residuals[settings.model.residual],
        **engram,
        "mixer": known.mixers[spec.mixer],
        "feedforward": known.feedforwards[spec.feedforward],
    }


def build(settings: Settings, component: Component, path: str, wiring: Wiring) -> Placed:
    """The component's module at `path` in the model.

    Raises ComponentError where the module has a parameter that the declaration does not name, or the other
    way round, or takes no exchange that it needs.
    """
    section = section_of(settings, component)
    placed = wiring.build(component, section, frame_of(settings, path, wiring.backends))
    check_parameters(component, placed.module, component.parameters(section), path)
    return placed


def build_end(settings: Settings, wiring: Wiring) -> Placed:
    """The residual scheme's module behind the last layer, "residual" in the model."""
    scheme = components_of(settings).residuals[settings.model.residual]
    placed = build(settings, scheme, f"layers.{len(layer_specs(settings))}.residual", wiring)
    return replace(placed, path="residual")


def check_parameters(
    component: Component, module: nn.Module, declared: Mapping[str, Parameter], path: str
) -> None:
    """Raise ComponentError listing how the module's parameters differ from their declarations."""
    real = dict(module.named_parameters())
    problems = [
        f"{path}.{name}: is not in the declaration's parameters" for name in real if name not in declared
    ]
    for name, parameter in declared.items():
        if name not in real:
            problems.append(f"{path}.{name}: is declared, and the module has none")
        elif parameter.group == "matrix" and real[name].ndim < 2:
            problems.append(
                f'{path}.{name}: has {real[name].ndim} dim and is in the group "matrix"; it may be "adamw" '
                'or "no_decay"'
            )
        elif parameter.cut is Cut.COLUMN and not _gathered(component, name):
            problems.append(
                f"{path}.{name}: is cut as column, which reads whole sequences, and is in no module of "
                f"gathers={list(component.gathers)}"
            )
    if problems:
        kind = type(component).__name__
        raise ComponentError(
            "\n  ".join([f"{kind} {component.name}: the module differs from its declaration", *problems])
        )


def _gathered(component: Component, name: str) -> bool:
    return any(path == "" or name.startswith(f"{path}.") for path in component.gathers)


def layer_parameters(settings: Settings, spec: LayerSpec) -> dict[str, Parameter]:
    """The declarations of a layer's parameters, by their names in the layer."""
    out = dict(LAYER_NORMS)
    for place, component in layer_components(settings, spec).items():
        declared = component.parameters(section_of(settings, component))
        out |= {f"{place}.{name}": parameter for name, parameter in declared.items()}
    return out


def model_parameters(settings: Settings) -> dict[str, Parameter]:
    """The declarations of all parameters of the whole model, by their names."""
    out = dict(OUTSIDE)
    if settings.model.tie_embeddings:
        del out["head.weight"]
    for i, spec in enumerate(layer_specs(settings)):
        out |= {f"layers.{i}.{name}": p for name, p in layer_parameters(settings, spec).items()}
    scheme = components_of(settings).residuals[settings.model.residual]
    declared = scheme.parameters(section_of(settings, scheme)) if scheme.end else {}
    return out | {f"residual.{name}": parameter for name, parameter in declared.items()}


def model_sums(settings: Settings) -> dict[str, tuple[int, ...]]:
    """The shapes of all running sums of the whole model, by the names that `collect` gives them."""
    return {
        f"layers.{i}.{name}": shape
        for i, spec in enumerate(layer_specs(settings))
        for component in layer_components(settings, spec).values()
        for name, shape in component.sums(section_of(settings, component)).items()
    }
