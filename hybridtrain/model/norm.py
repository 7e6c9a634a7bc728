"""The norm of every layer."""

from __future__ import annotations

from torch import Tensor, nn

from hybridtrain.kernels.rms_norm.op import rms_norm


class RMSNorm(nn.RMSNorm):
    """torch's module on this project's op."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps)
        self.epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon)
