"""Steps of row optimizers: the rows that each touches, their gradients and its learning rate."""

from __future__ import annotations

import torch

R, D = 40, 6


def random_step(generator, rows=R, share=0.3, dim=D):
    touched = (torch.rand(rows, generator=generator) < share).nonzero().squeeze(1)
    return touched, torch.randn(len(touched), dim, generator=generator)


def make_steps(seed=0, number=30):
    generator = torch.Generator().manual_seed(seed)
    shares = [0.0 if i % 7 == 3 else 0.15 for i in range(number)]
    return [(*random_step(generator, share=share), 0.05 * (1 + i % 5) / 5) for i, share in enumerate(shares)]
