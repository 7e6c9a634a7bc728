"""Loads steps ahead in a background thread."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
_POLL_SECONDS = 0.1


class Prefetcher(Generic[T]):
    """Calls `load(first_step)`, `load(first_step + 1)`, ... in a thread, at most `depth` results ahead of
    `get`.

    It stops before `stop_step` where one is given. An exception of `load` is raised by the `get` of its step
    and ends the thread. Use it as a context manager, or call `close`.
    """

    def __init__(
        self, load: Callable[[int], T], first_step: int, depth: int = 2, stop_step: int | None = None
    ) -> None:
        if depth < 1:
            raise ValueError(f"depth={depth} must be at least 1")
        self._load, self._stop_step = load, stop_step
        self._next_step = first_step
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(first_step,), name="prefetch", daemon=True)
        self._thread.start()

    def get(self, step: int) -> T:
        """The result of `step`, which must be the next one in order; blocks until it is loaded.

        Raises what `load` raised for it, ValueError for any other step, and RuntimeError after `close` or an
        exception.
        """
        if step != self._next_step or (self._stop_step is not None and step >= self._stop_step):
            raise ValueError(
                f"step {step} is not the next one to hand over (next {self._next_step}, stop "
                f"{self._stop_step})"
            )
        result, error = self._take()
        if error is not None:
            self._closed.set()
            raise error
        self._next_step += 1
        return result  # type: ignore[return-value]

    def finish(self) -> None:
        """End early, at the same step in every process that calls this after the same `get`; returns once the
        thread has ended.

        Loads may be collective, and one process may be further ahead than another: all go on to the last step
        that any of them can have begun, and throw the results away. A load that takes long is waited for
        however long that is: another thread beside it would talk over it. One that hangs is ended as the loop
        is, by the watchdog or the groups' timeout.
        """
        bound = self._next_step + self._ready.maxsize + 1
        self._stop_step = bound if self._stop_step is None else min(bound, self._stop_step)
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=_POLL_SECONDS)

    def close(self, timeout: float = 5.0) -> bool:
        """Stop loading and wait up to `timeout` seconds for a load in progress; False where it is still
        running.
        """
        self._closed.set()
        deadline = time.monotonic() + timeout
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._thread.join(_POLL_SECONDS)
        return not self._thread.is_alive()

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> tuple[T | None, BaseException | None]:
        while not self._closed.is_set():
            try:
                return self._ready.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
        raise RuntimeError("the prefetcher is closed")

    def _run(self, step: int) -> None:
        while not self._closed.is_set() and (self._stop_step is None or step < self._stop_step):
            try:
                item: tuple[T | None, BaseException | None] = (self._load(step), None)
            except BaseException as error:  # handed to the thread that waits for this step
                item = (None, error)
            self._put(item)
            if item[1] is not None:
                return
            step += 1

    def _put(self, item: tuple[T | None, BaseException | None]) -> None:
        while not self._closed.is_set():
            try:
                return self._ready.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue


class StepPrefetcher(Generic[T]):
    """The results of `load` for the steps of a run up to `steps`, one step ahead; `begin` goes on
    elsewhere.
    """

    def __init__(self, load: Callable[[int], T], steps: int) -> None:
        self._load, self._steps = load, steps
        self._source: Prefetcher[T] | None = None
        self._offset = 0

    def begin(self, step: int, offset: int) -> T:
        """The result for `step`; step k takes `load(k + offset)` from here on. At the same place in every
        process.
        """
        self.finish()
        self._offset = offset
        self._source = Prefetcher(self._load, step + offset, depth=1, stop_step=self._steps + offset)
        return self.get(step)

    def get(self, step: int) -> T:
        """The result for the next step; see Prefetcher."""
        assert self._source is not None, "begin comes first"
        return self._source.get(step + self._offset)

    def finish(self) -> None:
        """End early at the same place in every process; see Prefetcher."""
        if self._source is not None:
            self._source.finish()

    def __enter__(self) -> StepPrefetcher[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._source is not None:
            self._source.close()
