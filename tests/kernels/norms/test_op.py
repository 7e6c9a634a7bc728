"""RMSNorm's hand-written gradient: error against float64 within a small multiple of plain torch's own."""

from __future__ import annotations

import pytest
import torch

from hybridtrain.kernels.norms import op, reference


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 3, 32), (64, 129), (0, 4)])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_op_equals_reference(shape: tuple[int, ...], scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * scale).requires_grad_()
    weight = torch.randn(shape[-1], generator=generator).requires_grad_()
    weights = torch.randn(shape, generator=generator)

    def run(function: object, dtype: torch.dtype) -> list[torch.Tensor]:
        a, w = x.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_()
        out = function(a, w, 1e-6)  # type: ignore[operator]
        return [out, *torch.autograd.grad((out * weights).sum(), (a, w))]

    for mine, plain, exact in zip(
        run(op.rms_norm, torch.float32),
        run(reference.rms_norm, torch.float32),
        run(reference.rms_norm, torch.float64),
        strict=True,
    ):
        if mine.numel():
            error, own = (mine - exact).abs().max(), (plain - exact).abs().max()
            assert error <= 3 * own + 1e-6 * exact.abs().max(), (error, own)


def test_strided_input() -> None:
    x = torch.randn(6, 5, 8).transpose(0, 1)
    torch.testing.assert_close(
        op.rms_norm(x, torch.ones(8), 1e-6), reference.rms_norm(x, torch.ones(8), 1e-6)
    )
