"""From settings and declarations to modules, each checked against its declaration as it is built."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from hybridtrain.kernels.choose import TORCH, Backends
from hybridtrain.model.component import Component, ComponentError, Engram, Frame, Parameter, Placed, Wiring
from hybridtrain.model.engram import ENGRAM
from hybridtrain.model.registry import BUILT_IN, Components
from hybridtrain.settings.layers import LayerSpec
from hybridtrain.settings.section import Section
from hybridtrain.settings.tree import Settings


def components_of(settings: Settings) -> Components:
    """What the layers of `settings` may be made of."""
    return BUILT_IN


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


def check_parameters(
    component: Component, module: nn.Module, declared: Mapping[str, Parameter], path: str
) -> None:
    """Raise ComponentError listing the parameters that only the module or only the declaration has."""
    real = {name for name, _ in module.named_parameters()}
    problems = [
        f"{path}.{name}: is not in the declaration's parameters" for name in sorted(real - {*declared})
    ]
    problems += [
        f"{path}.{name}: is declared, and the module has none" for name in sorted({*declared} - real)
    ]
    if problems:
        lines = [f"{type(component).__name__} {component.name}: the module is not as declared", *problems]
        raise ComponentError("\n  ".join(lines))


def declared_parameters(settings: Settings, component: Component) -> Mapping[str, Parameter]:
    """The declaration of each parameter, by its name in the component's module."""
    return component.parameters(section_of(settings, component))
