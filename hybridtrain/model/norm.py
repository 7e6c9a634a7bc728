"""The norm of every layer, and that of queries and keys."""

from __future__ import annotations

from torch import Tensor, nn

from hybridtrain.kernels.rms_norm.op import rms_norm
from hybridtrain.kernels.rope.op import rope


class RMSNorm(nn.RMSNorm):
    """torch's module on this project's op."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps)
        self.epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon)


class HeadNorm(RMSNorm):
    """The norm of each head of queries or keys, and their rotation by position after it."""

    def forward(self, x_BTHC: Tensor, rotation_TR: Tensor) -> Tensor:  # type: ignore[override]
        return rope(x_BTHC, rotation_TR, self.weight, self.epsilon)
