"""How a resumed run goes on with the data: from which position, which changes are refused unless they are
allowed by name, and which are told.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from hybridtrain import checkpoint
from hybridtrain.checkpoint import Consumed
from hybridtrain.data.batches import BatchLoader
from hybridtrain.data.position import Position
from hybridtrain.data.shards import TokenDataset
from hybridtrain.errors import CheckpointError, UserError
from hybridtrain.monitor.loss_spikes import SpikeGuard
from hybridtrain.settings.tree import Settings

Info = dict[str, Any]
SEED, DATA, VALIDATION = ALLOWABLE = ("seed", "data", "validation")


def parse_allow(text: str, resumes: bool) -> frozenset[str]:
    """The names in "seed,data". Raises UserError for others, and for any where the run is not one that
    `resumes`.
    """
    names = frozenset(name for name in (part.strip() for part in text.split(",")) if name)
    if unknown := sorted(names - set(ALLOWABLE)):
        raise UserError(
            f"--allow {text}: {', '.join(unknown)} cannot be allowed; it may be {', '.join(ALLOWABLE)}"
        )
    if names and not resumes:
        raise UserError(
            f"--allow {text} says what a resumed run may do; it goes with --resume or --auto-resume"
        )
    return names


class Reading:
    """How much of the data a run has read and trained on, for its checkpoints and its report.

    `tokens` counts the targets of the steps whose update was made and is still in the model. `before` is the
    description of the checkpoint that the run goes on from; None for a new run.
    """

    def __init__(
        self,
        loader: BatchLoader,
        guard: SpikeGuard,
        seed: int,
        digests: dict[str, str],
        before: Consumed | None = None,
    ) -> None:
        self._loader, self._guard, self._seed, self._digests = loader, guard, seed, digests
        self._before = before.sequences if before else 0
        self.tokens = before.tokens if before else 0

    def took(self, step: int) -> None:
        """The update of step `step` (from 0) was made."""
        self.tokens += self._loader.targets(step + self._guard.skipped_batches)

    def sequences(self, done: int) -> int:
        """How many sequences were read before step `done`, at whatever lengths, those that rollbacks left out
        included.
        """
        return self._before + self._loader.samples_before(done + self._guard.skipped_batches)

    def describe(self, done: int) -> Info:
        """The entry `data` of a checkpoint after `done` steps."""
        at = self._loader.position(done + self._guard.skipped_batches)
        consumed = Consumed(
            sequences=self.sequences(done),
            tokens=self.tokens,
            seed=self._seed,
            **self._digests,
            epoch=at.epoch,
            window=at.window,
            read=at.read,
        )
        return {"sequences": consumed.sequences, "data": consumed.model_dump()}


class Continuation:
    """A checkpoint's data beside those of the settings that resume it. `allow`: names of ALLOWABLE that may
    differ.
    """

    def __init__(self, settings: Settings, dataset: TokenDataset, allow: Collection[str] = ()) -> None:
        self.settings, self.allow = settings, allow
        self.digests = dataset.manifest.digests()
        self._num_targets = dataset.manifest.train.tokens - 1

    def check(self, path: Path, info: Info) -> None:
        """Raise CheckpointError naming all that would let samples be skipped or repeated, or validate on what
        was trained on.
        """
        if lacking := {name: why for name, why in self._differences(info).items() if name not in self.allow}:
            raise CheckpointError(
                "\n".join(
                    [
                        f"{path}: its data and their order cannot go on",
                        *(f"  {why}" for why in lacking.values()),
                        f"set it back, or go on all the same with --allow {','.join(lacking)}",
                    ]
                )
            )

    def position(self, info: Info) -> Position:
        """Where the run goes on: behind what was read, or with the next epoch where the order is new."""
        consumed = Consumed.of(info)
        position = consumed.position(self._num_targets)
        if position is None or self._differences(info).keys() & {SEED, DATA}:
            position = Position(consumed.epoch + (consumed.read > 0), self.settings.train.seq_len)
        return position if position.fits(self._num_targets) else Position(0, self.settings.train.seq_len)

    def told(self, path: Path, info: Info, layout: str) -> list[str]:
        """Every setting that differs from the checkpoint's, and what that means for the data; [] where all
        are the same.
        """
        lines = [
            f"  {key}={json.dumps(ours)}, and the checkpoint was written with {json.dumps(theirs)}"
            for key, ours, theirs in checkpoint.changed_settings(self.settings, info["settings"])
        ]
        if (theirs := info.get("layout", layout)) != layout:
            lines.append(f"  the layout is {layout}, and the checkpoint's was {theirs}")
        differences = self._differences(info)
        lines += [f"  allowed: {why}" for why in differences.values()]
        if differences.keys() & {SEED, DATA}:
            lines.append(
                "  the rest of the epoch is left out; the new order begins with epoch "
                f"{self.position(info).epoch}"
            )
        if Consumed.of(info).train is None:
            lines.append(
                "  the checkpoint does not say which data it was trained on, so they could not be compared"
            )
        return (
            [f"going on from {path} with changes:", *lines, *self._joined(self.position(info))]
            if lines
            else []
        )

    def _joined(self, at: Position) -> list[str]:
        length = self.settings.train.seq_len
        if at.read == 0 or (at.window == length and at.read % length == 0):
            return []
        rest = self._num_targets // at.window * at.window - at.read
        padding = (
            f"; the last one has {-rest % length:,} tokens of padding, over which the loss of its step is "
            "averaged too"
        )
        return [
            f"  the last {rest:,} tokens of epoch {at.epoch} come in their old order, of windows of "
            f"{at.window} tokens, cut into sequences of {length}{padding if rest % length else ''}. No "
            f"document reaches over the border of two windows. Later epochs have windows of {length}"
        ]

    def _differences(self, info: Info) -> dict[str, str]:
        """The names of ALLOWABLE whose values differ from the checkpoint's, and why that matters."""
        theirs, seed, data = Consumed.of(info), self.settings.run.seed, f"data.path={self.settings.data.path}"
        out = {}
        if theirs.seed != seed:
            out[SEED] = (
                f"run.seed={seed}: the samples come in another order than with the checkpoint's {theirs.seed}"
            )
        if theirs.train not in (None, self.digests["train"]) or theirs.position(self._num_targets) is None:
            out[DATA] = (
                f"{data}: its train split is not the one (or not in the same shards) that the checkpoint was "
                "trained on"
            )
        if self.digests["validation"] and theirs.validation not in (None, self.digests["validation"]):
            out[VALIDATION] = (
                f"{data}: its validation split is not the checkpoint's, and may hold texts that were trained "
                "on"
            )
        return out
