"""Counts what makes the host wait for an accelerator, in a run on the CPU, where the same calls do not
wait.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# a single element read, and operations whose size only the data know
_WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "lift_fresh",  # torch.tensor(number, device=…): a copy to the device, for which the host waits as well
}
_READING = ("tolist", "cpu", "numpy")


def waits_for_device(operation: Any, args: Any, kwargs: Any) -> bool:
    """Whether the host would wait in this call of torch; also `repeat_interleave` without a size and indexing
    by a mask.
    """
    name = operation.overloadpacket.__name__
    unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
    by_mask = name in ("index", "index_put_") and any(
        i is not None and i.dtype == torch.bool for i in args[1]
    )
    return name in _WAITING or unsized or by_mask


class HostWaits(TorchDispatchMode):
    """Counts by name while it is entered, in this thread."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self._real: dict[str, Any] = {}

    def total(self) -> int:
        return self.counts.total()

    def __enter__(self) -> HostWaits:
        thread = threading.current_thread()
        for name in _READING:
            self._real[name] = real = getattr(Tensor, name)

            def counted(tensor: Tensor, *args: Any, _name: str = name, _real: Any = real, **keys: Any) -> Any:
                if threading.current_thread() is thread:
                    self.counts[_name] += 1
                return _real(tensor, *args, **keys)

            setattr(Tensor, name, counted)
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, real in self._real.items():
            setattr(Tensor, name, real)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if waits_for_device(operation, args, kwargs or {}):
            self.counts[operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {}))
