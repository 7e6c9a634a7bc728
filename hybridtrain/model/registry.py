"""The components that a model may be made of: those of this package, a line each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hybridtrain.model.component import FeedForward, Mixer, Residual
from hybridtrain.model.feedforwards.dense import DENSE
from hybridtrain.model.feedforwards.moe import MOE
from hybridtrain.model.mixers.attention import ATTENTION
from hybridtrain.model.residuals.add import ADD


@dataclass(frozen=True)
class Components:
    """By the names that `model.layers` and `model.residual` know them by."""

    mixers: Mapping[str, Mixer]
    feedforwards: Mapping[str, FeedForward]
    residuals: Mapping[str, Residual]


BUILT_IN = Components(
    mixers=MappingProxyType({c.name: c for c in (ATTENTION,)}),
    feedforwards=MappingProxyType({c.name: c for c in (DENSE, MOE)}),
    residuals=MappingProxyType({c.name: c for c in (ADD,)}),
)
