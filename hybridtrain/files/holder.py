"""Who holds a folder (lock.py): a process, described so that another one can see whether it still runs."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import uuid
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from hybridtrain.files.untrusted import UntrustedFileError, parse_json


class Holder(BaseModel):
    """Who holds a folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token: str = Field(pattern=r"^[0-9a-f]{32}$")  # of this lock alone; names a file
    host: str = Field(max_length=300)
    pid: int = Field(gt=0, lt=2**31)
    began: str  # of the process, in ticks of its kernel
    kernel: str  # boot id and pid namespace, in which the process number means something
    since: str = Field(max_length=30)
    command: str = Field(max_length=300)
    beats: int = 0

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:300] if sys.argv else ""
        pid, began = os.getpid(), ""
        with contextlib.suppress(OSError):
            began = _began(pid) or ""
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname()[:300],
            pid=pid,
            began=began,
            kernel=_kernel(),
            since=now,
            command=command,
        )

    @classmethod
    def parse(cls, content: bytes, source: str) -> Holder | None:
        """None for content that no version of this package writes: then the beats alone show whether the
        holder lives.
        """
        try:
            return parse_json(content, source, cls)
        except UntrustedFileError:
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}" + (
            f" ({self.command})" if self.command else ""
        )

    def lives(self) -> bool | None:
        """Whether the process is there; None where that cannot be seen from here."""
        if not self.kernel or self.kernel != _kernel() or not self.began:
            return None
        try:
            return _began(self.pid) == self.began
        except OSError:
            return None


def _kernel() -> str:
    """Which processes' numbers can be looked at from here; empty where that is not known."""
    try:
        return (
            Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            + " "
            + os.readlink("/proc/self/ns/pid")
        )
    except OSError:
        return ""


def _began(pid: int) -> str | None:
    """When a process began, in ticks since the start of its kernel; None where there is no such process, or
    it has ended and its parent has not yet waited for it.

    Raises OSError where it is there and may not be looked at.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            raise PermissionError(f"process {pid} is hidden") from None
        return None
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZX" else rest[18]
