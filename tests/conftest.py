"""What every test runs under."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import hypothesis
import pytest

# before torch is imported, and inherited by every process a test starts: the ranks of the distributed tests
# share the cores
os.environ["OMP_NUM_THREADS"] = "1"
# before triton is imported: its own library of functions is made for the interpreter or for a GPU, not for
# both (make test-gpu: 0)
os.environ.setdefault("TRITON_INTERPRET", "1")

# the same examples every time, and no time limit for one of them: on a busy machine it would fail by chance
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def no_process_group_left() -> Iterator[None]:
    """A test that joins process groups leaves them: else a later one fails, and only where both run in one
    session.
    """
    yield
    dist = sys.modules.get("torch.distributed")
    if dist and dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("this test left its process group open; hybridtrain.parallel.mesh.close_mesh leaves it")


@pytest.fixture(autouse=True)
def denormal_numbers_again() -> Iterator[None]:
    """A test that trains in this process sets it to flush denormal numbers, as runs do; hypothesis cannot
    draw floats then.
    """
    yield
    if torch := sys.modules.get("torch"):
        torch.set_flush_denormal(False)
