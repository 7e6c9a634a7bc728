"""Folders that one process at a time writes to, on any file system that several hosts may share.

The lock is a file in the folder, which says who holds it. It is made by a hard link, which one of several
makers gets, and touched every BEAT seconds by a thread of the holder. Who finds it there looks whether its
holder lives:

- On the same kernel and in the same pid namespace by the process number and the time at which the process
  began.
- Else by the beats: a file that was not touched for STALE seconds, by the clock of its file system, or is not
  while one waits so long, belongs to nobody. No two clocks are compared.

A dead holder's file is replaced by one heir: whoever links `<file>.<token>.heir` first, once per token. A
holder that was stopped for so long sees that the file is no longer its own when it asks (`confirm`), and
before it saves.

An object store has neither links nor times that can be relied on: there the file is written, read again a
moment later, and written anew at every beat. Two that begin within that moment may both go on until the next
beat of the first, which then ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from hybridtrain.console import say
from hybridtrain.errors import UserError
from hybridtrain.files.holder import Holder

NAME = ".in-use"
BEAT, STALE = 10.0, 90.0  # seconds between two touches, and without one after which the holder is dead
SETTLE = 1.0  # seconds until an object that was put is read again
POLL = 0.5
_MOST_BYTES = 1 << 16


class FolderInUse(UserError):
    """Another process writes to the folder."""


class LockLost(UserError):
    """Another process took the folder over while this one stood still for long."""


@dataclass(frozen=True)
class Attempt:
    """The result of a try to take a lock: it is `taken`, or `holder` has it. `lives`: whether the holder
    lives; None: not known yet.
    """

    taken: bool
    holder: Holder | None = None
    lives: bool | None = None


class FolderLock:
    """The lock that is the file `file`; `attempt` takes it, and it is held until `release`. Of one thread,
    beside its own.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.me = file, Holder.here()
        self._store: _Files | _Objects = _Files(file) if isinstance(file, Path) else _Objects(file)
        self._mutex = threading.RLock()  # a signal may come while it is held
        self._closed = threading.Event()
        self._seen: tuple[object, float] | None = (
            None  # the last sign of life of a holder of whom nothing else is known, and when
        )
        self._confirmed = 0.0
        self._lost = ""
        self._made_folder = False

    def attempt(self, dead: str = "") -> Attempt:
        """Try once; the holder with the token `dead` is known not to live. Raises OSError where nothing can
        be written there.
        """
        if not self.file.parent.exists():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._made_folder = isinstance(self.file, Path)
        if self._store.create(self.me):
            return self._begin()
        found = self._store.read()
        if found is None:  # released just now
            return Attempt(False)
        holder, pulse = found
        lives = holder.lives() if holder is not None else None
        if lives is None:
            lives = self._by_beats((holder.token if holder is not None else "", pulse))
        if lives is False or (holder is not None and holder.token == dead):
            return self._begin() if self._store.replace(holder, self.me) else Attempt(False, holder)
        return Attempt(False, holder, lives)

    def confirm(self, at_once: bool = False) -> None:
        """Raise LockLost where another process has taken the folder; looks at the file where it was not
        looked at for long.
        """
        with self._mutex:
            if not self._lost and (at_once or _now() - self._confirmed > 2 * BEAT):
                self._look()
            if self._lost:
                raise LockLost(self._lost)

    def release(self) -> None:
        """Let go: the file is removed, where it is still this process's. Calling it again does nothing."""
        with self._mutex:
            if self._closed.is_set() or not self._confirmed:
                return
            self._closed.set()
            _held.discard(self)
            with contextlib.suppress(
                OSError
            ):  # a file system that fails: who comes next sees that this process is gone
                found = self._store.read()
                if found is not None and found[0] is not None and found[0].token == self.me.token:
                    self.file.unlink()
                if self._made_folder:
                    os.rmdir(
                        self.file.parent
                    )  # where nothing was written to it; a URL's rmdir would take all that was
        _watch_sigterm(bool(_held))

    def _begin(self) -> Attempt:
        self._confirmed = _now()
        self._store.sweep()
        _held.add(self)
        _watch_sigterm(True)
        threading.Thread(target=self._beat, name="lock", daemon=True).start()
        return Attempt(True)

    def _by_beats(self, sign: tuple[str, object]) -> bool | None:
        if self._store.age(sign[1]) > STALE:
            return False
        before, since = self._seen or (None, 0.0)
        if sign != before:
            self._seen = sign, _now()
            return None if before is None else True
        return False if _now() - since > STALE else None

    def _beat(self) -> None:
        while not self._closed.wait(BEAT):
            with self._mutex:
                if self._closed.is_set() or self._lost:
                    return
                self._look()

    def _look(self) -> None:
        """See whether the file is still this process's, and touch it."""
        try:
            found = self._store.read()
            if found is None and self._store.create(self.me):  # somebody removed it, and nobody has taken it
                self._confirmed = _now()
                return
            holder = (found or self._store.read() or (None,))[0]
            if holder is not None and holder.token == self.me.token:
                self._store.touch(holder)
                self._confirmed = _now()
                return
        except FileNotFoundError:
            holder = None
        except OSError:
            return  # not known; the next one may
        by = f"was taken over by {holder}" if holder is not None else "was removed, or taken over"
        self._lost = (
            f"{self.file.parent}: the lock of this process {by}: it stood still for more than {STALE:g} s, "
            f"or the file {self.file} was changed by hand. It ends, so that no two write there"
        )


class _Files:
    """The lock as a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def create(self, me: Holder, file: Path | None = None) -> bool:
        """Make it; False where it is there already."""
        file, draft = file or self._file, self._draft(me)
        try:
            os.link(draft, file)
            return True
        except FileExistsError:
            return False
        except OSError:
            if os.stat(draft).st_nlink == 2:  # done, though the answer was lost on the way
                return True
            return _create_without_links(file, me)
        finally:
            draft.unlink(missing_ok=True)

    def read(self) -> tuple[Holder | None, object] | None:
        """(who holds it, its last sign of life); None where it is not there."""
        try:
            with self._file.open(
                "rb"
            ) as stream:  # opened, not only looked at: a network file system then asks its server
                return Holder.parse(stream.read(_MOST_BYTES), str(self._file)), os.fstat(
                    stream.fileno()
                ).st_mtime
        except FileNotFoundError:
            return None

    def age(self, touched: object) -> float:
        """Seconds since that sign of life, by the file system's clock."""
        draft = self._draft(None)
        try:
            return draft.stat().st_mtime - float(str(touched))
        finally:
            draft.unlink(missing_ok=True)

    def replace(self, dead: Holder | None, me: Holder) -> bool:
        """Put `me` in the place of a dead holder; False where another was first."""
        heir = self._file.with_name(f"{self._file.name}.{dead.token if dead is not None else 'unknown'}.heir")
        if not self.create(me, heir):
            self._drop_dead_heir(heir)
            return False
        try:
            found = self.read()
            if found is None or found[0] != dead:
                return False
            os.replace(heir, self._file)
            return True
        finally:
            heir.unlink(missing_ok=True)

    def touch(self, me: Holder) -> None:
        os.utime(self._file)

    def sweep(self) -> None:
        """Remove what processes left that were killed while they tried."""
        with contextlib.suppress(OSError):
            now = self._file.stat().st_mtime
            for path in self._file.parent.glob(f"{self._file.name}.*"):
                if now - path.stat().st_mtime > STALE:
                    path.unlink()

    def _draft(self, me: Holder | None) -> Path:
        draft = self._file.with_name(f"{self._file.name}.{uuid.uuid4().hex}")
        draft.write_bytes(me.model_dump_json().encode() if me is not None else b"")
        return draft

    def _drop_dead_heir(self, heir: Path) -> None:
        """Remove the mark of an heir that ended between two steps of a takeover, so that others can try
        again.
        """
        theirs = _Files(heir)
        found = theirs.read()
        if found is not None and (
            (found[0] is not None and found[0].lives() is False) or theirs.age(found[1]) > STALE
        ):
            heir.unlink(missing_ok=True)


class _Objects:
    """The lock as an object of a store."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def create(self, me: Holder) -> bool:
        return self.read() is None and self._put(me)

    def read(self) -> tuple[Holder | None, object] | None:
        self._file.fs.invalidate_cache()  # type: ignore[attr-defined]
        try:
            with self._file.open("rb") as stream:
                content = stream.read(_MOST_BYTES)
        except FileNotFoundError:
            return None
        return Holder.parse(content, str(self._file)), content

    def age(self, content: object) -> float:
        """Not known: the caller waits for a beat."""
        return 0.0

    def replace(self, dead: Holder | None, me: Holder) -> bool:
        return self._put(me)

    def touch(self, me: Holder) -> None:
        self._file.write_bytes(me.model_copy(update={"beats": me.beats + 1}).model_dump_json().encode())

    def sweep(self) -> None:
        """Nothing to do: no other object is ever written."""

    def _put(self, me: Holder) -> bool:
        self._file.write_bytes(me.model_dump_json().encode())
        time.sleep(SETTLE)
        found = self.read()
        return found is not None and found[0] is not None and found[0].token == me.token


@contextmanager
def locked(
    folder: Path, wait: bool = False, error: type[UserError] = FolderInUse, file: Path | None = None
) -> Iterator[FolderLock]:
    """Hold the lock on a folder; its file is `file`, where that does not lie in the folder.

    Raises `error` where another process holds it and not `wait`, or where nothing can be written there.
    """
    lock = FolderLock(file or folder / NAME)
    told = False
    try:
        while not (outcome := lock.attempt()).taken:
            if outcome.lives and not wait:
                raise error(in_use(str(folder), outcome.holder))
            if not told and (outcome.lives or outcome.holder is not None):
                say(waiting(str(folder), outcome))
                told = True
            time.sleep(POLL)
    except OSError as problem:
        raise error(f"{folder}: cannot be written: {problem.strerror or problem}") from None
    try:
        yield lock
    finally:
        lock.release()


def in_use(folder: str, holder: Holder | None) -> str:
    """The message of a refusal; `folder` may be written as `key=value`."""
    return f"{folder} is in use by {holder or 'another process'}; wait for it, end it, or choose another one"


def waiting(folder: str, outcome: Attempt) -> str:
    """The message before the first wait."""
    who = f"{folder} is in use by {outcome.holder or 'another process'}"
    return (
        f"{who}; waiting for it"
        if outcome.lives
        else f"{who}; it shows within {STALE:g} s whether that is still there"
    )


_held: set[FolderLock] = set()


def _watch_sigterm(on: bool) -> None:
    """SIGTERM ends a process as ever, but lets go of its folders before: what comes next, on another host,
    need not wait.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    now = signal.getsignal(signal.SIGTERM)
    if on and now == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end)
    elif not on and now == _end:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> None:
    for lock in [lock for lock in _held if lock.me.pid == os.getpid()]:
        lock.release()
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def _create_without_links(file: Path, me: Holder) -> bool:
    """As `create`, on a file system that has no hard links; for a moment the file is there and says nothing
    yet.

    Raises OSError where it fails for another reason.
    """
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "wb") as stream:
        stream.write(me.model_dump_json().encode())
    return True


def _now() -> float:
    """Seconds that go on while the machine sleeps, where it has such a clock."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)
