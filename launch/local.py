"""Starts the ranks of a run on this machine, ends them together, and starts them again where that is asked
for.

Ranks are forked from one server process that has imported torch already, so four of them cost little more
than one.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from hybridtrain.launch.cores import shares_of_cores, usable_cores

RENDEZVOUS = "HYBRIDTRAIN_RENDEZVOUS"
RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # how often the ranks were started again, as torchrun says it
_ERRORS = "HYBRIDTRAIN_ERRORS"  # folder in which a failing rank leaves its message
USER_ERROR = 2
STALLED = 3
_GRACE_SECONDS = 30.0
_POLL_SECONDS = 0.1


def run_ranks(
    target: str,
    arguments: tuple[Any, ...],
    nproc: int,
    *,
    threads: int = 0,
    preload: Sequence[str] = (),
    restarts: int = 0,
) -> int:
    """Call `module:function` in `nproc` ranks and return the exit status; see `Launcher`."""
    return Launcher(nproc, threads, preload=preload).run(target, arguments, restarts)


class Launcher:
    """Starts ranks on this machine and waits for their end.

    When a rank fails the others get SIGTERM, and SIGKILL 30 s later. SIGTERM, Ctrl-C and SIGUSR1 are passed
    on to the ranks, which end or save in their own way.
    """

    def __init__(self, nproc: int, threads: int = 0, bind: bool = True, preload: Sequence[str] = ()) -> None:
        """`threads` (0: the machine's cores shared out) bounds each rank's CPU threads; with `bind` each rank
        keeps to its share of the cores, where there are enough. `preload`: modules that all ranks start with.
        """
        cores = usable_cores()
        self._threads = threads or max(1, len(cores) // nproc)
        self._shares = shares_of_cores(cores if bind else [], nproc, self._threads)
        self._preload = preload
        self._context = multiprocessing.get_context("forkserver")

    def run(
        self,
        target: str,
        arguments: tuple[Any, ...],
        restarts: int = 0,
        again: tuple[Any, ...] | None = None,
    ) -> int:
        """Call `module:function` in every rank and return the exit status: 0, or the first failing rank's.

        Ranks that failed are all started again, up to `restarts` times, with the arguments `again` where
        given; not after an error that the user has to mend, nor once they were asked to end.
        """
        self._context.set_forkserver_preload([target.partition(":")[0], *self._preload])
        with _ForwardSignals() as signals:
            for attempt in range(restarts + 1):
                status = self._run_once(target, arguments, attempt, signals)
                if status in (0, USER_ERROR) or signals.ending or attempt == restarts:
                    break
                next_attempt = f"restart {attempt + 1} of at most {restarts}"
                print(f"status {status}: {next_attempt}", file=sys.stderr, flush=True)
                arguments = arguments if again is None else again
        return status

    def _run_once(
        self, target: str, arguments: tuple[Any, ...], attempt: int, signals: _ForwardSignals
    ) -> int:
        with tempfile.TemporaryDirectory(prefix="hybridtrain-") as folder:
            errors = Path(folder) / "errors"
            errors.mkdir()
            environment = {
                "WORLD_SIZE": str(len(self._shares)),
                "LOCAL_WORLD_SIZE": str(len(self._shares)),
                "OMP_NUM_THREADS": str(self._threads),
                RESTARTS: str(attempt),
                _ERRORS: str(errors),
                RENDEZVOUS: f"file://{Path(folder) / 'rendezvous'}",
            }
            signals.ranks = [
                self._context.Process(
                    target=_rank,
                    args=(
                        target,
                        arguments,
                        {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        cores,
                    ),
                    name=f"rank {rank}",
                )
                for rank, cores in enumerate(self._shares)
            ]
            for rank in signals.ranks:
                rank.start()
            status = _wait(signals.ranks)
            told = _print_errors(errors)
            # which of several failed ranks was seen first is chance
            return told if told and status in (1, told) else status


def end_rank(text: str, status: int) -> NoReturn:
    """End this rank at once, from any thread, with `text` as the reason that the launcher prints, or alone
    this process.
    """
    folder = os.environ.get(_ERRORS)
    if folder is None:
        print(text, file=sys.stderr, flush=True)
    else:
        name = f"{time.time_ns()}-rank-{os.environ['RANK']}-{status}"
        (Path(folder) / name).write_text(text, encoding="utf-8")
    sys.stdout.flush()
    os._exit(status)


def _rank(target: str, arguments: tuple[Any, ...], environment: dict[str, str], cores: Sequence[int]) -> None:
    if cores:
        os.sched_setaffinity(0, cores)  # before there are threads, which inherit it
    gc.freeze()  # what the server had imported: collecting it would copy every page of it into this rank
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(
        signal.SIGUSR1, signal.SIG_IGN
    )  # a request to save that comes before there is anything to save
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    import torch

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    module, _, name = target.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    status = 0
    try:
        function(*arguments)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except Exception as error:
        if _is_user_error(error):
            end_rank(f"error: {error}", USER_ERROR)
        end_rank(traceback.format_exc(), 1)
    sys.stdout.flush()
    os._exit(status)  # a background thread in a collective must not keep a failed rank alive


def _end_with_launcher() -> None:
    """A launcher that was killed can end nobody; its ranks see that it is gone."""
    launcher = multiprocessing.parent_process()
    if launcher is not None:
        launcher.join()
        os._exit(1)


def _print_errors(folder: Path) -> int:
    """Print the message of the rank that failed first, mostly the reason why others failed; returns its
    status or 0.
    """
    messages = sorted(folder.iterdir(), key=lambda path: int(path.name.partition("-")[0]))
    if not messages:
        return 0
    text = messages[0].read_text(encoding="utf-8").rstrip()
    _, _, rank, status = messages[0].name.split("-")
    if status == "1":
        others = f" first, {len(messages) - 1} other(s) after it" if messages[1:] else ""
        text = f"rank {rank} failed{others}:\n{text}"
    print(text, file=sys.stderr, flush=True)
    return int(status)


def _is_user_error(error: Exception) -> bool:
    """By name, since the launcher stands below the package that defines them."""
    return any(kind.__name__ in ("UserError", "LayoutError") for kind in type(error).__mro__)


def _wait(ranks: Sequence[BaseProcess]) -> int:
    """Wait for all ranks; the first that fails ends the others. The status: that of a rank that was killed,
    else the first's.

    A rank that was killed is the cause, also where another was seen to fail before: its connections close,
    and others fail by that, before the kernel has ended it. So the status is known when all have ended. What
    this sends itself is not a cause.
    """
    failed, killed, sent, deadline = 0, 0, set[int](), float("inf")
    running = True
    while running:
        time.sleep(_POLL_SECONDS)
        running = any(
            rank.is_alive() for rank in ranks
        )  # before the codes are read: the last time they are all there
        codes = [rank.exitcode or 0 for rank in ranks]
        for rank, code in zip(ranks, codes, strict=True):
            if code < 0 and -code not in sent and not killed:
                killed = 128 - code
                print(f"{rank.name} was ended by {signal.Signals(-code).name}", file=sys.stderr)
        if any(codes) and not sent:
            failed = max((code for code in codes if code > 0), default=0)
            deadline = time.monotonic() + _GRACE_SECONDS
            sent.add(signal.SIGTERM)
            for rank in ranks:
                if rank.is_alive() and rank.pid is not None:
                    rank.terminate()
                    os.kill(rank.pid, signal.SIGCONT)  # one that was stopped cannot end
        if time.monotonic() > deadline:
            sent.add(signal.SIGKILL)
            for rank in ranks:
                rank.kill()
    return killed or failed


class _ForwardSignals:
    """While entered, SIGTERM, SIGINT and SIGUSR1 go on to the ranks. (A terminal sends Ctrl-C to them
    itself.)
    """

    def __init__(self) -> None:
        self.ranks: Sequence[BaseProcess] = ()
        self.ending = False

    def __enter__(self) -> _ForwardSignals:
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        self._previous = {number: signal.signal(number, self._forward) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.ending = self.ending or number != signal.SIGUSR1
        for rank in self.ranks:
            if rank.pid is not None and rank.is_alive():
                os.kill(rank.pid, number)
