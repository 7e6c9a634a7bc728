"""The model's sums over a step, and what the routers learn from them.

Every sum is additive over micro-batches and over data-parallel ranks, so a loop may add them in any grouping.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hybridtrain.model.build import layer_components, section_of
from hybridtrain.model.common import Counters, CountingModule
from hybridtrain.model.feedforwards.moe import Router
from hybridtrain.settings.layers import layer_specs
from hybridtrain.settings.tree import Settings


def collect(model: nn.Module) -> dict[str, Tensor]:
    """All sums since the last `reset`, in float64, keyed by layer.

    "layers.N." + expert_tokens [E] (pairs per expert, dropped ones too), dropped_pairs (where there is a
    capacity), router_entropy (nats) and router_tokens, aux_loss and z_loss (parts of the step's loss, where
    weighted), gate_sum and gate_count (memory layers).
    """
    return {
        f"{layer}.{key}": value.double()
        for layer, counters in _counters(model)
        for key, value in counters.sums.items()
    }


def no_statistics(settings: Settings, device: torch.device | None = None) -> dict[str, Tensor]:
    """Zeros under every key that `collect` has for the whole model, so that ranks with other layers can add
    up theirs.

    Made on `device` (None: the CPU), since to bring them there would wait for it.
    """
    out: dict[str, Tensor] = {}
    zeros: dict[tuple[int, ...], Tensor] = {}
    for i, spec in enumerate(layer_specs(settings)):
        for component in layer_components(settings, spec).values():
            for name, shape in component.sums(section_of(settings, component)).items():
                if shape not in zeros:
                    zeros[shape] = torch.zeros(shape, dtype=torch.float64, device=device)
                out[f"layers.{i}.{name}"] = zeros[shape]
    return out


def reset(model: nn.Module) -> None:
    """Forget all sums; called once per optimizer step, after they were collected."""
    for _, counters in _counters(model):
        counters.sums.clear()


@torch.no_grad()
def apply_router_statistics(model: nn.Module, totals: dict[str, Tensor]) -> None:
    """Hand every router its expert counts of the step, summed over all tokens of the step.

    Sets `load_E` (shares, sum one) for the next step's auxiliary loss and moves the selection bias by
    `bias_rate * sign(mean - count)` (auxiliary-loss-free balancing, arXiv 2408.15664).
    """
    for name, module in model.named_modules():
        if isinstance(module, Router):
            module.update(totals[f"{_layer(name)}.expert_tokens"])


def _counters(model: nn.Module) -> Iterator[tuple[str, Counters]]:
    for name, module in model.named_modules():
        if isinstance(module, CountingModule):
            yield _layer(name), module.counters


def _layer(module_name: str) -> str:
    return ".".join(module_name.split(".")[:2])
