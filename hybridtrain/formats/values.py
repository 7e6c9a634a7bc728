"""The check of every foreign tensor, whatever the format: its values are numbers."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from hybridtrain.console import say
from hybridtrain.errors import FormatError


class Values:
    """Takes foreign tensors as they are read, and notes those that hold NaN or infinite values."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._bad: dict[
            str, dict[Hashable, tuple[int, int]]
        ] = {}  # NaN and infinite values by tensor and part of it
        self._rounded: set[str] = set()

    def take(self, name: str, value: Tensor, part: Hashable = None) -> Tensor:
        """The tensor `name`, or the part of it that `part` identifies, in float32."""
        if value.dtype == torch.float64:
            self._rounded.add(name)
        value = value.float()
        if not bool(torch.isfinite(value).all()):
            self._bad.setdefault(name, {})[part] = int(value.isnan().sum()), int(value.isinf().sum())
        return value

    def check(self) -> None:
        """Raises FormatError listing every tensor taken so far that holds NaN or infinite values, with their
        numbers.
        """
        problems = []
        for name, parts in self._bad.items():
            nan, inf = (sum(counts) for counts in zip(*parts.values(), strict=True))
            problems.append(f"{name} has {nan} NaN and {inf} infinite values")
        if problems:
            raise FormatError(f"{self._source}: its weights are not all numbers", problems)
        if self._rounded:
            say(f"{self._source}: {len(self._rounded)} float64 tensors are rounded to float32")
