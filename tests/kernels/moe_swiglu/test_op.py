"""The experts from tokens to tokens against their definition: empty experts, absent choices, one and several
threads.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hybridtrain.kernels.moe_swiglu import op, reference

CASES = [(1, 1, 1, 1), (7, 1, 3, 2), (13, 2, 8, 2), (40, 3, 12, 3), (9, 3, 40, 2), (0, 2, 4, 2)]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _inputs(tokens: int, choices: int, experts: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    dim, hidden = 8, 12
    chosen = torch.rand(tokens, experts, generator=generator).topk(choices).indices
    shapes = (
        (tokens, dim),
        (tokens, choices),
        (experts, dim, hidden),
        (experts, dim, hidden),
        (experts, hidden, dim),
    )
    weights = torch.randn(tokens, dim, generator=generator)
    return chosen, weights, [torch.randn(shape, generator=generator) for shape in shapes]


def _run(
    function: object, chosen: Tensor, weights: Tensor, inputs: list[Tensor], dtype: torch.dtype, **keys: bool
) -> list[Tensor]:
    x, gates, *w = (value.to(dtype).requires_grad_() for value in inputs)
    if function is op.moe_swiglu:
        out = op.moe_swiglu(x, op.Choice(chosen, gates, **keys), op.ExpertWeights(*w))
    else:
        out = function(x, chosen, gates, *w)  # type: ignore[operator]
    return [out, *torch.autograd.grad((out * weights.to(dtype)).sum(), (x, gates, *w))]


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize(("tokens", "choices", "experts", "num_threads"), CASES)
def test_op_equals_reference(
    tokens: int, choices: int, experts: int, num_threads: int, absent: bool, threads: None
) -> None:
    torch.set_num_threads(num_threads)
    chosen, weights, inputs = _inputs(tokens, choices, experts)
    if absent:
        chosen = torch.where(
            torch.arange(tokens * choices).view(tokens, choices) % 3 == 0, chosen - experts, chosen
        )
        chosen = torch.where(
            torch.arange(tokens * choices).view(tokens, choices) % 4 == 1, chosen + experts, chosen
        )
    mine = _run(op.moe_swiglu, chosen, weights, inputs, torch.float32, absent=absent)
    plain, exact = (
        _run(reference.moe_swiglu, chosen, weights, inputs, dtype) for dtype in (torch.float32, torch.float64)
    )
    for a, b, c in zip(mine, plain, exact, strict=True):
        if a.numel():
            assert (a - c).abs().max() <= 3 * (b - c).abs().max() + 1e-6 * c.abs().max()


@pytest.mark.parametrize("absent", [False, True])
def test_grouped_products_say_the_same(absent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of other devices, on the CPU."""
    chosen, weights, inputs = _inputs(13, 2, 8)
    chosen = torch.where(chosen < 3, chosen - 5, chosen) if absent else chosen
    expected = _run(op.moe_swiglu, chosen, weights, inputs, torch.float32, absent=absent)
    monkeypatch.setattr(op, "_one_by_one", lambda *_: False)
    for a, b in zip(
        _run(op.moe_swiglu, chosen, weights, inputs, torch.float32, absent=absent), expected, strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_number_of_threads_changes_no_bit(threads: None) -> None:
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append(_run(op.moe_swiglu, *_inputs(200, 3, 12), torch.float32))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_failure_in_a_thread_reaches_the_caller(threads: None) -> None:
    torch.set_num_threads(2)

    def work(pieces: Iterator[int]) -> None:
        if 3 in pieces:
            raise ValueError("piece 3")

    with pytest.raises(ValueError, match="piece 3"):
        op.share_out(work, range(8))
