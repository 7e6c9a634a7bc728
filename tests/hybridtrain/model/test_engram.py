"""The Engram layer's gate and convolution against float64 formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybridtrain.model.build import frame_of
from hybridtrain.model.engram import EngramLayer
from hybridtrain.model.exchanges import LOCAL
from hybridtrain.settings.tree import Settings

B, T, DIM, SLOTS, WIDTH = 2, 20, 12, 6, 5


def build(conv: bool) -> EngramLayer:
    settings = Settings.model_validate(
        {
            "model": {"dim": DIM},
            "engram": {"orders": (2, 3), "heads": 3, "head_dim": WIDTH, "conv": conv, "conv_kernel": 4},
        }
    )
    layer = EngramLayer(settings.engram, frame_of(settings), LOCAL)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return layer


def norm64(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def formula(layer: EngramLayer, p: dict[str, Tensor], h: Tensor, rows: Tensor, documents: Tensor) -> Tensor:
    """The formulas of docs/table.md in float64, position by position where the convolution reads."""
    e = rows.reshape(B, T, SLOTS * WIDTH)
    k, v = e @ p["wk.weight"].t(), e @ p["wv.weight"].t()
    s = (norm64(h, p["h_norm.weight"]) * norm64(k, p["k_norm.weight"])).sum(-1) / math.sqrt(DIM)
    g = torch.sigmoid(torch.sign(s) * torch.sqrt(torch.clamp(s.abs(), min=1e-6)))
    u = g[..., None] * v
    if layer.conv is None:
        return u
    x, out = norm64(u, p["conv_norm.weight"]), []
    for b in range(B):
        for t in range(T):
            sources = [(j, t - (3 - j) * 3) for j in range(4)]
            terms = [
                p["conv"][j] * x[b, i] for j, i in sources if i >= 0 and documents[b, i] == documents[b, t]
            ]
            out.append(F.silu(torch.stack(terms).sum(0)) + u[b, t])
    return torch.stack(out).view(B, T, DIM)


@pytest.mark.parametrize("conv", [True, False])
@pytest.mark.parametrize("starts", [(), (1,), (4, 5, 13)])
def test_output_and_gradients_equal_the_formula(conv: bool, starts: tuple[int, ...]) -> None:
    layer = build(conv)
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(B, T, DIM, generator=generator).requires_grad_()
    rows = torch.randn(B, T, SLOTS, WIDTH, generator=generator).requires_grad_()
    weights = torch.randn(B, T, DIM, generator=generator)
    documents = torch.zeros(B, T, dtype=torch.int64)
    documents[1] = sum(((torch.arange(T) >= s).long() for s in starts), torch.zeros(T, dtype=torch.int64))
    out = layer(h, rows, documents if starts else None)
    got = torch.autograd.grad((out * weights).sum(), [h, rows, *layer.parameters()])

    p = {name: value.detach().double().requires_grad_() for name, value in layer.named_parameters()}
    h64, rows64 = h.detach().double().requires_grad_(), rows.detach().double().requires_grad_()
    expected = formula(layer, p, h64, rows64, documents)
    expected_grads = torch.autograd.grad((expected * weights).sum(), [h64, rows64, *p.values()])
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)
    for a, b in zip(got, expected_grads, strict=True):
        torch.testing.assert_close(a.double(), b, atol=5e-5, rtol=1e-4)


def test_a_zero_convolution_adds_nothing() -> None:
    layer, plain = build(conv=True), build(conv=False)
    plain.load_state_dict(layer.state_dict(), strict=False)
    torch.nn.init.zeros_(layer.conv)
    h, rows = torch.randn(B, T, DIM), torch.randn(B, T, SLOTS, WIDTH)
    assert torch.equal(layer(h, rows, None), plain(h, rows, None))


def test_gate_statistics() -> None:
    layer = build(conv=True)
    h, rows = torch.randn(B, T, DIM), torch.randn(B, T, SLOTS, WIDTH)
    layer(h, rows, None)
    layer(h, rows, None)
    sums = layer.counters.sums
    assert sums["gate_count"] == 2 * B * T
    assert 0.2 < (sums["gate_sum"] / sums["gate_count"]).item() < 0.8
