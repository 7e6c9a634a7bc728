"""The layers that `model.layers` asks for: what each is made of, in order."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hybridtrain.settings.tree import Settings

MIXERS = ("attention",)
FEEDFORWARDS = ("dense", "moe")
MAX_LAYERS = 10_000
_ENTRY = re.compile(r"(?:(\d+)\*)?(engram\+)?(\w+)\+(\w+)")


@dataclass(frozen=True)
class LayerSpec:
    """What one layer is made of; `engram` says whether an Engram layer stands before the mixer."""

    engram: bool
    mixer: str
    feedforward: str


def layer_specs(settings: Settings) -> tuple[LayerSpec, ...]:
    """The layers of the model in order; `engram.enabled=false` removes every Engram layer.

    Raises ValueError naming the entry that is not `[N*][engram+]MIXER+FEEDFORWARD`.
    """
    specs: list[LayerSpec] = []
    for entry in settings.model.layers:
        match = _ENTRY.fullmatch(entry.replace(" ", ""))
        if match is None or match[3] not in MIXERS or match[4] not in FEEDFORWARDS or match[1] == "0":
            renamed = "; memory+ is engram+ now" if "memory+" in entry else ""
            raise ValueError(
                f'model.layers: "{entry}" is not a layer; write "[N*][engram+]MIXER+FEEDFORWARD" '
                f"with MIXER one of {', '.join(MIXERS)} and FEEDFORWARD one of "
                f"{', '.join(FEEDFORWARDS)}{renamed}"
            )
        if len(specs) + (more := int(match[1] or 1)) > MAX_LAYERS:
            raise ValueError(f"model.layers: more than {MAX_LAYERS:,} layers")
        spec = LayerSpec(bool(match[2]) and settings.engram.enabled, match[3], match[4])
        specs += [spec] * more
    return tuple(specs)


def engram_layers(settings: Settings) -> tuple[int, ...]:
    """0-based ids, in the whole model, of the layers that have an Engram layer."""
    return tuple(i for i, spec in enumerate(layer_specs(settings)) if spec.engram)
