"""The layers that `model.layers` asks for, in order, with the components of each."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from hybridtrain.model.registry import Components
from hybridtrain.settings.tree import Settings

MAX_LAYERS = 10_000
_ENTRY = re.compile(r"(?:(\d+)\*)?(engram\+)?(\w+)\+(\w+)")


@dataclass(frozen=True)
class LayerSpec:
    """The components of one layer; `engram` says whether an Engram layer stands before the mixer."""

    engram: bool
    mixer: str
    feedforward: str


def layer_specs(settings: Settings) -> tuple[LayerSpec, ...]:
    """The layers of the model in order; `engram.enabled=false` removes every Engram layer.

    Raises ValueError naming the entry that is not `[N*][engram+]MIXER+FEEDFORWARD`.
    """
    return _specs(settings.model.layers, settings.model.components, settings.engram.enabled)


@functools.lru_cache(maxsize=64)
def _specs(layers: tuple[str, ...], components: tuple[str, ...], engram: bool) -> tuple[LayerSpec, ...]:
    known, specs = Components.load(components), list[LayerSpec]()
    for entry in layers:
        match = _ENTRY.fullmatch(entry.replace(" ", ""))
        legal = match is not None and match[3] in known.mixers and match[4] in known.feedforwards
        if match is None or not legal or match[1] == "0":
            renamed = "; memory+ is engram+ now" if "memory+" in entry else ""
            raise ValueError(
                f'model.layers: "{entry}" is not a layer; write "[N*][engram+]MIXER+FEEDFORWARD" '
                f"with MIXER one of {', '.join(known.mixers)} and FEEDFORWARD one of "
                f"{', '.join(known.feedforwards)}{renamed}"
            )
        if len(specs) + (more := int(match[1] or 1)) > MAX_LAYERS:
            raise ValueError(f"model.layers: more than {MAX_LAYERS:,} layers")
        specs += [LayerSpec(bool(match[2]) and engram, match[3], match[4])] * more
    return tuple(specs)


def engram_layers(settings: Settings) -> tuple[int, ...]:
    """0-based ids, in the whole model, of the layers that have an Engram layer."""
    return tuple(i for i, spec in enumerate(layer_specs(settings)) if spec.engram)
