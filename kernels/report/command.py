"""`hybridtrain kernels report`: compiles every kernel for every target, prints the rows, or writes the page
of documentation.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from hybridtrain.kernels.ops import TRITON_OPS
from hybridtrain.kernels.report.hardware import TARGETS

START, END = "<!-- written by hybridtrain kernels report --page -->", "<!-- end of what is written -->"
PAGE, STORED = "docs/kernels.md", "docs/kernels.json"


def requirements() -> list[str]:
    """What stands against compiling here, in words."""
    if importlib.util.find_spec("triton") is None:
        return ["kernels report needs the package triton: pip install triton"]
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ["TRITON_INTERPRET=1 turns the compiler off; unset it for kernels report"]
    return []


def unknown(ops: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Names that are no op or target, in words."""
    out = [
        f'"{op}" is not an op with a kernel; it may be {", ".join(TRITON_OPS)}'
        for op in ops
        if op not in TRITON_OPS
    ]
    return out + [
        f'"{target}" is not a target; it may be {", ".join(TARGETS)}'
        for target in targets
        if target not in TARGETS
    ]


def write_page(root: Path, markdown: str, stored: str) -> None:
    """Put the tables between the marks of docs/kernels.md, and the rows beside it."""
    page = root / PAGE
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{START}\n\n{markdown}\n{END}{after}", encoding="utf-8")
    (root / STORED).write_text(stored + "\n", encoding="utf-8")
