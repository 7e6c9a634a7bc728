"""The Triton source of rotary positions, interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

from hybridtrain.kernels.norms import op, reference
from hybridtrain.kernels.testing import check

kernel = pytest.importorskip(
    "hybridtrain.kernels.norms.rope_kernel", reason="needs triton", exc_type=ImportError
)


def rotation(T: int, C: int) -> torch.Tensor:
    angles = torch.arange(T)[:, None] * 10_000.0 ** (-torch.arange(0, C, 2) / C)
    return torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).flatten(1)


@pytest.mark.parametrize(("B", "T", "H", "C"), [(1, 1, 1, 60), (2, 63, 3, 96), (1, 257, 2, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope(B: int, T: int, H: int, C: int, dtype: torch.dtype) -> None:
    x = torch.randn(B, T, H, C).to(dtype)
    check(
        lambda x, turn: kernel.rope(x, turn),
        lambda x, turn: reference.rope(x, turn, None, 0.0),
        [x],
        rotation(T, C),
    )
    swap = lambda f: lambda x, w, turn: f(x, turn, w, 1e-6)  # noqa: E731
    check(swap(kernel.rope), swap(reference.rope), [x, torch.randn(C).to(dtype)], rotation(T, C))


def test_equals_torchs_form() -> None:
    x, turn = torch.randn(2, 9, 3, 16), rotation(9, 16)
    complex_turn, weight = torch.view_as_complex(turn.view(9, 8, 2)), torch.randn(16)
    torch.testing.assert_close(kernel.rope(x, turn), op.rope(x, complex_turn))
    torch.testing.assert_close(kernel.rope(x, turn, weight, 1e-6), op.rope(x, complex_turn, weight, 1e-6))


def test_a_program_sums_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridtrain.kernels.launch.MAX_PROGRAMS", 2)
    swap = lambda f: lambda x, w, turn: f(x, turn, w, 1e-6)  # noqa: E731
    check(
        swap(kernel.rope),
        swap(reference.rope),
        [torch.randn(2, 63, 3, 24), torch.randn(24)],
        rotation(63, 24),
    )


def test_op_is_a_torch_op_and_refuses_odd_heads() -> None:
    x, weight = torch.randn(2, 3, 2, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    torch.library.opcheck(kernel._op, (x, rotation(3, 8), weight, 1e-6))
    torch.library.opcheck(kernel._op, (x, rotation(3, 8), None, 1e-6))
    with pytest.raises(ValueError, match=r"x \[2, 3, 2, 7\] and rotation \[3, 7\] must be .* C even"):
        kernel.rope(torch.ones(2, 3, 2, 7), torch.ones(3, 7))
