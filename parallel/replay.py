"""The results of parts of a layer, kept until the layer is run again in the backward pass.

Recomputation (recompute.py) runs a layer's forward pass twice. Nothing is sent the second time: every
collective that a layer calls is marked `replayed`, and answers from here, in the order of the first time.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from torch import Tensor
from torch.utils._pytree import tree_map_only

P = ParamSpec("P")
T = TypeVar("T")


class Replay:
    """The results of one forward pass. Entered once with `again` False, which keeps them, then with True,
    which hands them out.
    """

    def __init__(self) -> None:
        self.again = False
        self._kept: deque[Any] = deque()

    def __enter__(self) -> None:
        self._token = _active.set(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _active.reset(self._token)
        if self.again:
            # recomputation ends with the last tensor that the backward pass needs; the rest is not asked for
            self._kept.clear()
        self.again = True

    def result(self, function: Callable[[], T]) -> T:
        """What `function` returns, a tensor or a tuple with tensors in it; the second time what it returned
        the first time.
        """
        if not self.again:
            out = function()
            self._kept.append(tree_map_only(Tensor, _Kept, out))
            return out
        if not self._kept:
            raise RuntimeError(
                "a recomputed layer asks for more results than its forward pass had, or for the third time"
            )
        kept: T = tree_map_only(_Kept, _Kept.tensor, self._kept.popleft())
        return kept


class _Kept:
    """A tensor without its graph, and the version at which it was kept."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor.detach(), tensor._version

    def tensor(self) -> Tensor:
        if self._tensor._version != self._version:
            raise RuntimeError(
                f"a result {list(self._tensor.shape)} that a layer kept was changed in place and cannot be "
                "given again"
            )
        return self._tensor


def replayed(collective: Callable[P, T]) -> Callable[P, T]:
    """A collective whose result a recomputed layer keeps instead of asking for it again. It must not change
    what it is given.
    """

    @functools.wraps(collective)
    def once(*args: P.args, **kwargs: P.kwargs) -> T:
        replay = _active.get()
        return (
            collective(*args, **kwargs)
            if replay is None
            else replay.result(lambda: collective(*args, **kwargs))
        )

    return once


def replayed_start(start: Callable[P, Callable[[], Tensor]]) -> Callable[P, Callable[[], Tensor]]:
    """`replayed` for a collective that is begun and returns what ends it: the second time neither happens."""

    @functools.wraps(start)
    def once(*args: P.args, **kwargs: P.kwargs) -> Callable[[], Tensor]:
        replay = _active.get()
        if replay is None:
            return start(*args, **kwargs)
        finish = _never if replay.again else start(*args, **kwargs)
        return lambda: replay.result(finish)

    return once


def _never() -> Tensor:
    raise RuntimeError("an exchange that was not begun cannot end")


def refuse_again(what: str) -> None:
    """Raise RuntimeError inside a recomputation: for whatever must happen once and is not `replayed`."""
    replay = _active.get()
    if replay is not None and replay.again:
        raise RuntimeError(f"{what} would run a second time in the backward pass; mark it `replayed`")


_active: ContextVar[Replay | None] = ContextVar("replay", default=None)
