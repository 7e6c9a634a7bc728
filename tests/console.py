"""The `hybridtrain` command as a user runs it: exit status, standard output, standard error.

Each run is a process of its own, forked from the server that has imported torch already, which saves most of
its start.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.ranks import PRELOAD


@dataclass(frozen=True)
class Outcome:
    status: int | None
    out: str
    err: str


def hybridtrain(*arguments: object, timeout: float = 120) -> Outcome:
    """Run the command; the process is ended after `timeout` seconds, and its status is then that of
    SIGKILL.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory(prefix="hybridtrain-test-") as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = context.Process(target=_main, args=([str(a) for a in arguments], str(out), str(err)))
        process.start()
        process.join(timeout)
        process.kill()
        process.join(10)
        return Outcome(process.exitcode, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))


def refused(outcome: Outcome) -> str:
    """The message of a command that the user has to mend: status 2, no traceback."""
    assert outcome.status == 2, outcome
    assert "Traceback" not in outcome.err + outcome.out, outcome
    return outcome.err


def _main(arguments: list[str], out: str, err: str) -> None:
    gc.freeze()  # as the launcher's ranks
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ["COLUMNS"] = "120"
    sys.argv = ["hybridtrain", *arguments]
    from hybridtrain.cli import main

    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
