"""Whether a rank's memory can hold what `parallel.zero` keeps on it, asked before anything is allocated."""

from __future__ import annotations

import os

import torch

from hybridtrain.errors import SettingsError
from hybridtrain.model.cost import count_parameters
from hybridtrain.parallel.layout import Layout
from hybridtrain.parallel.mesh import ranks_of_a_node
from hybridtrain.settings.tree import Settings

_GIB = 1 << 30


def bytes_held(zero: int, parameters: int, layout: Layout, dtype: torch.dtype) -> int:
    """The least that a rank holds between steps of a model with `parameters` that computes in `dtype`: as if
    all axes cut all of them. Counted are parameters with their float32 masters where `dtype` is another type,
    float32 gradients and AdamW's two moments; activations and the table come on top.
    """
    here = parameters // (layout.pp * layout.tp * layout.ep * layout.etp)
    if zero == 3:
        return here * (4 + 4 + 8) // layout.fsdp
    updated = 8 if dtype == torch.float32 else 4 + 8
    owners = layout.dp * layout.cp if zero == 1 else 1
    return here * (dtype.itemsize + 4) + here * updated // owners


def device_bytes(device: torch.device, world: int) -> int:
    """The memory of this rank's device; on the CPU its share of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks_of_a_node(world)


def check_memory(settings: Settings, layout: Layout, vocab_size: int, dtype: torch.dtype, there: int) -> None:
    """Raise SettingsError where a rank with `there` bytes cannot hold its part of the model. DeepSpeed, which
    may keep state elsewhere, is not asked.
    """
    zero = settings.parallel.zero
    if settings.train.engine == "deepspeed":
        return
    parameters = count_parameters(settings, vocab_size, 0).total
    needed = {z: bytes_held(z, parameters, layout, dtype) for z in (0, 1, 3)}
    if needed[zero] <= there:
        return
    fits = [f"parallel.zero={z} needs {n / _GIB:,.1f} GiB" for z, n in needed.items() if n <= there]
    raise SettingsError(
        "settings",
        [
            f"parallel.zero={zero} needs at least {needed[zero] / _GIB:,.1f} GiB a rank for {parameters:,} "
            f"parameters, their gradients and optimizer state, and a rank has {there / _GIB:,.1f} GiB; "
            + (", ".join(fits) if fits else "take more ranks, with parallel.zero=3 or larger tp, pp or ep")
        ],
    )
