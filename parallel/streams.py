"""Which tensors cross between pipeline stages, worked out once from the layout. Pure Python, no torch.

A residual scheme says by name what a layer reads of earlier ones: the carry first, then sources, which are
written once and never change. A rank keeps a source as long as a later stage of the rank reads it, so a stage
is sent the carry and those sources only that its rank does not have yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hybridtrain.parallel.stages import Stage

Carries = Callable[[int], Mapping[str, int]]
"""Name → width of what layer `before` and later ones read of earlier layers, the carry first."""


@dataclass(frozen=True)
class StageStreams:
    """Names of what one stage takes, makes and passes on; where a carry is among them, it is the first.

    enters: the inputs of its module; none for the first stage, which takes tokens
    received: of those, what the stage before it hands over; the others are on its rank already
    made: the outputs of its module; none for the last stage, which has the loss
    sent: what the next stage receives, made here or only handed on
    kept: what this rank has since this stage and a later stage of the rank reads without receiving it
    """

    enters: tuple[str, ...]
    received: tuple[str, ...]
    made: tuple[str, ...]
    sent: tuple[str, ...]
    kept: tuple[str, ...]


@dataclass(frozen=True)
class StreamPlan:
    """The tables of all stages in order, and the width of every name."""

    stages: tuple[StageStreams, ...]
    widths: Mapping[str, int]
    ranks: tuple[int, ...]  # in `pp`, of each stage

    def sent_width(self, stage: int) -> int:
        """Elements per token that leave the rank behind this stage in the forward pass, and come back as
        gradients."""
        if stage == len(self.stages) - 1 or self.ranks[stage] == self.ranks[stage + 1]:
            return 0
        return sum(self.widths[name] for name in self.stages[stage].sent)


def plan_streams(stages: Sequence[Stage], carries: Carries) -> StreamPlan:
    """The tables of `stages` (all of the model, in order).

    Raises ValueError for a scheme that reads a source which it had dropped before, or that changes the width
    of a name.
    """
    widths = _widths([carries(stage.low) for stage in stages[1:]])
    enters = [(), *(tuple(carries(stage.low)) for stage in stages[1:])]
    leaves = [*enters[1:], ()]
    made = [
        (*out[:1], *(n for n in out[1:] if n not in into)) for into, out in zip(enters, leaves, strict=True)
    ]
    _check_sources(enters, made)

    received: list[tuple[str, ...]] = []
    first: list[set[str]] = []  # of each stage: what came to its rank with it
    here: dict[int, set[str]] = {stage.pp_rank: set() for stage in stages}
    for stage, into, new in zip(stages, enters, made, strict=True):
        held = here[stage.pp_rank]
        received.append((*into[:1], *(n for n in into[1:] if n not in held)))
        first.append({*received[-1], *new} - held)
        held.update(into, new)

    kept: list[tuple[str, ...]] = []
    for i, stage in enumerate(stages):
        later = [j for j in range(i + 1, len(stages)) if stages[j].pp_rank == stage.pp_rank]
        read = {n for j in later for n in enters[j][1:] if n not in received[j]}
        kept.append(tuple(n for n in (*received[i], *made[i]) if n in first[i] & read))
    sent = [*received[1:], ()]
    rows = zip(enters, received, made, sent, kept, strict=True)
    return StreamPlan(
        tuple(StageStreams(*row) for row in rows), widths, tuple(stage.pp_rank for stage in stages)
    )


def _widths(cuts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    widths: dict[str, int] = {}
    for name, width in (item for cut in cuts for item in cut.items()):
        if widths.setdefault(name, width) != width:
            raise ValueError(f"a residual scheme carries {name} of width {widths[name]} and of width {width}")
    return widths


def _check_sources(enters: Sequence[tuple[str, ...]], made: Sequence[tuple[str, ...]]) -> None:
    """Raise ValueError where a stage makes a source that an earlier stage had and dropped."""
    seen: set[str] = set()
    for stage, (into, new) in enumerate(zip(enters, made, strict=True)):
        seen.update(into)
        if again := [name for name in new[1:] if name in seen]:
            raise ValueError(
                f"a residual scheme carries {again} behind stage {stage} and not before it, though an "
                "earlier stage had them; a source that is not carried once cannot be read later"
            )
        seen.update(new)
