"""What a rank makes of the signals that a user sends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from hybridtrain.monitor.signals import StopSignal

TWICE = """
import os, signal
from hybridtrain.monitor.signals import StopSignal
with StopSignal() as stop:
    os.kill(os.getpid(), {number})
    assert stop.received
    print("asked", flush=True)
    os.kill(os.getpid(), {number})
    print("still here")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_is_a_request_and_the_handler_before_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.received
        os.kill(os.getpid(), number)
        assert (stop.received, stop.name, stop.save) == (True, number.name, False)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_ends_at_once(number: signal.Signals) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TWICE.format(number=int(number))], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (-number, "asked\n")


def test_sigusr1_asks_for_a_checkpoint_and_not_for_an_end() -> None:
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (stop.save, stop.received) == (True, False)
