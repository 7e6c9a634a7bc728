"""Words that settings offer and that `parallel/` acts on."""

from typing import Literal

ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev"]
Recompute = Literal["none", "selective", "full"]
MemPlacement = Literal["contiguous", "strided"]
