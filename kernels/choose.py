"""Which implementation carries each op: chosen once, from the settings, and said aloud in the run header.

`auto` takes Triton on a GPU and the torch formulation elsewhere. An implementation that is asked for by name and missing
is refused, with what is missing.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

TRITON_OPS = (
    "rms_norm",
)
