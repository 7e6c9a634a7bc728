"""The learning rate by step: linear warm-up, then cosine or warm-up-stable-decay."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from hybridtrain.settings.tree import OptimSettings


def lr_scale(step: int, optim: OptimSettings, total_steps: int) -> float:
    """Share of the peak learning rate at `step`, counted from 0, of `total_steps`.

    Step s of the warm-up gets (s + 1) / warmup_steps, so its last step and the one after it have the peak.
    The decay then reaches `final_lr_ratio` at step `total_steps`, one past the end: every step of the run is
    above 0 even where the ratio is 0. "cosine" decays from the end of the warm-up; "wsd" over the last
    `decay_fraction` of all steps, or what the warm-up leaves.
    """
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    start = optim.warmup_steps
    if optim.schedule == "wsd":
        start = max(start, total_steps - round(optim.decay_fraction * total_steps))
    if step < start:
        return 1.0
    if step >= total_steps:
        return optim.final_lr_ratio
    progress = (step - start) / (total_steps - start)
    height = 0.5 * (1.0 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1.0 - progress
    return optim.final_lr_ratio + (1.0 - optim.final_lr_ratio) * height


def set_learning_rates(optimizers: Iterable[torch.optim.Optimizer], scale: float) -> None:
    """Set every group's learning rate to `scale` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
