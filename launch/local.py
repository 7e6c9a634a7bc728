"""Starts the ranks of a run on this machine and ends them together.

Ranks are forked from one server process that has imported torch already, so four of them cost little more than one.
"""

from __future__ import annotations

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
from typing import Any

RENDEZVOUS = "HYBRIDTRAIN_RENDEZVOUS"
_ERRORS = "HYBRIDTRAIN_ERRORS"  # folder in which a failing rank leaves its message
USER_ERROR = 2
_GRACE_SECONDS = 30.0
_POLL_SECONDS = 0.1


def run_ranks(target: str, arguments: tuple[Any, ...], nproc: int, *, threads: int = 0, preload: Sequence[str] = ()) -> int:
    """Call `module:function` in `nproc` ranks and return the exit status: 0, or the first failing rank's.

    When a rank fails the others get SIGTERM, and SIGKILL 30 s later. SIGTERM and Ctrl-C are passed on to the ranks,
    which end in their own way. `threads` (0: the machine's cores shared out) bounds each rank's CPU threads.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([target.partition(":")[0], *preload])
    threads = threads or max(1, (os.cpu_count() or 1) // nproc)
    with tempfile.TemporaryDirectory(prefix="hybridtrain-") as folder:
        errors = Path(folder) / "errors"
        errors.mkdir()
        environment = {
            "WORLD_SIZE": str(nproc),
            "LOCAL_WORLD_SIZE": str(nproc),
            "OMP_NUM_THREADS": str(threads),
            _ERRORS: str(errors),
            RENDEZVOUS: f"file://{Path(folder) / 'rendezvous'}",
        }
        ranks = [
            context.Process(
                target=_rank,
                args=(target, arguments, {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}),
                name=f"rank {rank}",
            )
            for rank in range(nproc)
        ]
        with _ForwardSignals(ranks):
            for rank in ranks:
                rank.start()
            status = _wait(ranks)
        told = _print_errors(errors)
        return told if told and status in (1, USER_ERROR) else status  # which of several failed ranks was seen first is chance


def _rank(target: str, arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
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
        status = USER_ERROR if _is_user_error(error) else 1
        text = f"error: {error}" if status == USER_ERROR else traceback.format_exc()
        (Path(environment[_ERRORS]) / f"{time.time_ns()}-rank-{environment['RANK']}").write_text(text, encoding="utf-8")
    sys.stdout.flush()
    os._exit(status)  # a background thread in a collective must not keep a failed rank alive


def _end_with_launcher() -> None:
    """A launcher that was killed can end nobody; its ranks see that it is gone."""
    launcher = multiprocessing.parent_process()
    if launcher is not None:
        launcher.join()
        os._exit(1)


def _print_errors(folder: Path) -> int:
    """Print the message of the rank that failed first, mostly the reason why others failed; returns its status or 0."""
    messages = sorted(folder.iterdir(), key=lambda path: int(path.name.partition("-")[0]))
    if not messages:
        return 0
    text, status = messages[0].read_text(encoding="utf-8").rstrip(), USER_ERROR
    if not text.startswith("error: "):
        others = f" first, {len(messages) - 1} other(s) after it" if messages[1:] else ""
        text, status = f"{messages[0].name.partition('-')[2].replace('-', ' ')} failed{others}:\n{text}", 1
    print(text, file=sys.stderr, flush=True)
    return status


def _is_user_error(error: Exception) -> bool:
    """By name, since the launcher stands below the package that defines them."""
    return any(kind.__name__ in ("UserError", "LayoutError") for kind in type(error).__mro__)


def _wait(ranks: Sequence[BaseProcess]) -> int:
    """Wait for all ranks; the first that fails decides the status and ends the others."""
    failed: int | None = None
    deadline = float("inf")
    while any(rank.is_alive() for rank in ranks):
        time.sleep(_POLL_SECONDS)
        for rank in sorted(ranks, key=lambda rank: min(rank.exitcode or 0, 0)):  # killed ranks first: others fail because of them
            if rank.exitcode and failed is None:
                failed = rank.exitcode if rank.exitcode > 0 else 128 - rank.exitcode
                deadline = time.monotonic() + _GRACE_SECONDS
                if rank.exitcode < 0:
                    print(f"{rank.name} was ended by {signal.Signals(-rank.exitcode).name}", file=sys.stderr)
                for other in ranks:
                    if other.is_alive():
                        other.terminate()
        if time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
    codes = [rank.exitcode or 0 for rank in ranks]
    return failed if failed is not None else max(code if code >= 0 else 128 - code for code in codes)


class _ForwardSignals:
    """While entered, SIGTERM and SIGINT go on to the ranks. (A terminal sends Ctrl-C to them itself.)"""

    def __init__(self, ranks: Sequence[BaseProcess]) -> None:
        self._ranks = ranks

    def __enter__(self) -> None:
        self._previous = {number: signal.signal(number, self._forward) for number in (signal.SIGTERM, signal.SIGINT)}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        for rank in self._ranks:
            if rank.pid is not None and rank.is_alive():
                os.kill(rank.pid, number)
