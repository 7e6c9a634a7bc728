"""Router, experts and balance losses against loops and formulas."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybridtrain.model.build import build as build_component
from hybridtrain.model.common import collect, learn, reset
from hybridtrain.model.component import LOCAL_WIRING
from hybridtrain.model.exchanges import position_in_expert
from hybridtrain.model.feedforwards.moe import MOE, MoE
from hybridtrain.settings.tree import Settings

DIM, TOKENS_PER_STEP = 16, 4 * 32


def build(**moe: Any) -> MoE:
    settings = Settings.model_validate(
        {
            "model": {"dim": DIM, "moe": {"num_experts": 8, "hidden": 12, **moe}},
            "train": {"global_batch": 4, "seq_len": 32},
        }
    )
    layer = build_component(settings, MOE, "layers.0.feedforward", LOCAL_WIRING).module
    assert isinstance(layer, MoE)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return layer


def by_token(layer: MoE, x_ND: Tensor) -> Tensor:
    """The definition, a token at a time."""
    moe, router, experts = layer.router.moe, layer.router, layer.experts
    rows = []
    for x in x_ND:
        logits = router.weight @ x
        scores = logits.softmax(0) if moe.score == "softmax" else logits.sigmoid()
        biased = (scores + router.bias_E).tolist()
        size = moe.num_experts // moe.num_groups
        groups = [range(g * size, g * size + size) for g in range(moe.num_groups)]
        groups.sort(key=lambda group: -sum(sorted(biased[e] for e in group)[-2:]))
        allowed = [e for group in groups[: moe.top_groups] for e in group]
        chosen = sorted(allowed, key=lambda e: -biased[e])[: moe.top_k]
        gates = scores[chosen] / (scores[chosen].sum() if moe.normalize_gates else 1)
        y = torch.zeros(DIM)
        for gate, e in zip(gates, chosen, strict=True):
            y = y + moe.gate_scale * gate * (
                (F.silu(x @ experts.w_gate[e]) * (x @ experts.w_up[e])) @ experts.w_down[e]
            )
        if layer.shared is not None:
            s = layer.shared
            y = y + s.w_down.weight @ (F.silu(s.w_gate.weight @ x) * (s.w_up.weight @ x))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "moe",
    [
        {},
        {"score": "sigmoid", "gate_scale": 2.5},
        {"normalize_gates": False, "top_k": 3},
        {"score": "sigmoid", "num_groups": 4, "top_groups": 2, "top_k": 3},
        {"num_groups": 8, "top_groups": 2},
        {"num_shared": 2, "top_k": 1},
    ],
    ids=str,
)
def test_output_and_gradients_equal_the_token_loop(moe: dict[str, Any]) -> None:
    layer = build(**moe)
    layer.router.bias_E.copy_(torch.linspace(-0.1, 0.1, 8))
    x = torch.randn(2, 15, DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weights = torch.randn(2, 15, DIM, generator=torch.Generator().manual_seed(2))
    wanted = [x, *layer.parameters()]
    out, reference = layer(x), by_token(layer, x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(out, reference, atol=1e-5, rtol=1e-4)
    got = torch.autograd.grad((out * weights).sum(), wanted)
    expected = torch.autograd.grad((reference * weights).sum(), wanted)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)


def test_the_bias_moves_the_choice_and_not_the_gates() -> None:
    layer = build(normalize_gates=False)
    x = torch.randn(40, DIM)
    scores = F.linear(x, layer.router.weight).softmax(-1)
    layer.router.bias_E[5] = 100.0
    experts, gates = layer.router(x)
    assert (experts[:, 0] == 5).all()
    torch.testing.assert_close(gates, scores.gather(1, experts))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_balance_losses_and_their_gradients(score: str) -> None:
    layer = build(score=score, aux_weight=0.3, z_weight=0.2)
    load = torch.tensor([0.3, 0.1, 0.1, 0.1, 0.05, 0.05, 0.2, 0.1])
    layer.router.load_E.copy_(load)
    x = torch.randn(TOKENS_PER_STEP, DIM)
    for micro_batch in x.split(48):
        _, gates = layer.router(micro_batch)
        (gates.sum() * 0).backward()

    weight = layer.router.weight.detach().clone().requires_grad_()
    logits = x @ weight.t()
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    shares = scores / scores.sum(-1, keepdim=True)
    aux = 0.3 * 8 * (load * shares.mean(0)).sum()
    z = 0.2 * logits.logsumexp(-1).square().mean()
    (aux + z).backward()
    torch.testing.assert_close(layer.router.weight.grad, weight.grad, atol=1e-6, rtol=1e-4)
    sums = layer.router.counters.sums
    torch.testing.assert_close(sums["aux_loss"], aux.detach())
    torch.testing.assert_close(sums["z_loss"], z.detach())
    torch.testing.assert_close(sums["router_entropy"], -(shares * shares.log()).sum().detach())


def test_places_count_the_earlier_tokens_of_the_sequence_that_chose_the_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    experts = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(3 * 20)]).view(3, 20, 3)
    expected = [[[(row[:t] == e).sum().item() for e in row[t]] for t in range(20)] for row in experts]
    assert position_in_expert(experts).tolist() == expected
    assert position_in_expert(experts[:, :0]).shape == (3, 0, 3)


@pytest.mark.parametrize(
    ("capacity", "most"), [(1.0, 8), (0.3, 3), (0.01, 1)]
)  # of 32 * 2 / 8 = 8 pairs, the next higher number
def test_experts_drop_what_comes_after_their_capacity_in_a_sequence(capacity: float, most: int) -> None:
    layer, free = (build(capacity=c, num_shared=1, normalize_gates=True) for c in (capacity, 0.0))
    assert (layer.most, free.most) == (most, None)
    x = torch.randn(3, 32, DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weights = torch.randn(3, 32, DIM, generator=torch.Generator().manual_seed(2))
    experts, gates = free.router(x.flatten(0, 1))
    taken: dict[tuple[int, int], int] = {}
    kept = torch.ones_like(gates)
    for pair, expert in enumerate(experts.flatten().tolist()):
        line = (pair // (32 * 2), expert)
        taken[line] = taken.get(line, 0) + 1
        kept.view(-1)[pair] = taken[line] <= most
    dropped = int((kept == 0).sum())
    assert dropped > 0
    # the definition: gates of dropped pairs are zero, those of kept ones as they were
    finish = free.dispatch(x.flatten(0, 1), experts, gates * kept, free.experts)
    assert free.shared is not None
    expected = finish().view_as(x) + free.shared(x)
    out = layer(x)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    got = torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()])
    wanted = torch.autograd.grad((expected * weights).sum(), [x, *free.parameters()])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)
    totals = collect(_Layers(layer))
    assert totals["layers.3.dropped_pairs"] == dropped
    assert totals["layers.3.expert_tokens"].sum() == 3 * 32 * 2  # what was asked for: the bias learns from it

    # no other sequence and no later token has a say; a shorter sequence has the same bound
    layer.eval()
    torch.testing.assert_close(layer(x[1:2, :20]), out[1:2, :20])
    torch.testing.assert_close(layer(x), out)
    assert collect(_Layers(layer))["layers.3.dropped_pairs"] == dropped


class _Layers(torch.nn.Module):
    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleDict({"3": torch.nn.ModuleDict({"feedforward": layer})})


def test_statistics_add_up_and_teach_the_router() -> None:
    layer = build(bias_rate=0.01)
    model = _Layers(layer)
    x = torch.randn(64, DIM)
    whole = copy.deepcopy(model)
    whole.layers["3"]["feedforward"](x)
    for part in x.split(20):
        layer(part)
    totals = collect(model)
    assert totals["layers.3.expert_tokens"].sum() == 64 * 2
    assert totals["layers.3.router_tokens"] == 64
    expected = collect(whole)
    assert totals.keys() == expected.keys()
    for key, value in expected.items():  # summed in float32: counts are exact, the entropy is rounded
        torch.testing.assert_close(
            totals[key].float(), value.float(), rtol=1e-5 if key.endswith("entropy") else 0, atol=0
        )
    learn(model, totals)
    counts = totals["layers.3.expert_tokens"]
    torch.testing.assert_close(layer.router.load_E.double(), counts / 128)
    torch.testing.assert_close(layer.router.bias_E.double(), 0.01 * torch.sign(16 - counts))
    reset(model)
    assert collect(model) == {}
    model.eval()
    layer(x)
    assert collect(model) == {}


def test_the_bias_evens_out_a_skewed_router() -> None:
    layer = build(bias_rate=0.002)
    with torch.no_grad():
        layer.router.weight[:2] += 0.5
    x = torch.randn(256, DIM, generator=torch.Generator().manual_seed(3)) + 0.5
    spread = []
    for _ in range(250):
        reset(_Layers(layer))
        layer.router(x)
        counts = layer.router.counters.sums["expert_tokens"]
        spread.append((counts.max() / counts.double().mean()).item())
        layer.router.learn({"expert_tokens": counts})
    assert spread[0] > 2.5
    # A fixed step ends in a small cycle around balance, not in balance itself.
    assert max(spread[-20:]) - 1 < (spread[0] - 1) / 4
