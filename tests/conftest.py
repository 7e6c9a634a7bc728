"""What every test runs under: one CPU thread, since the ranks of the distributed tests share the machine's cores."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and inherited by every process a test starts
