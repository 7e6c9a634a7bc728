"""The whole model: names, shapes, causality, documents, construction."""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hybridtrain.model
from hybridtrain.kernels.cross_entropy.op import cross_entropy_sum
from hybridtrain.model.exchanges import IGNORED
from hybridtrain.model.init import init_parameters
from hybridtrain.model.lm import HybridLM
from hybridtrain.settings.load import parse_settings
from hybridtrain.settings.tree import Settings

VOCAB, ROWS = 50, 40
SMALL = {
    "model": {
        "dim": 32,
        "layers": ["attention+dense", "engram+attention+moe"],
        "init_std": 0.3,
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 12},
        "dense": {"hidden": 48},
        "moe": {"num_experts": 4, "hidden": 16, "num_shared": 1},
    },
    "engram": {"heads": 2, "head_dim": 8},
    "train": {"seq_len": 24, "global_batch": 4},
}


def token_losses_sum(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Sum over tokens of the cross-entropy in nats, float32 scalar; targets of -100 do not count."""
    return cross_entropy_sum(logits_BTV.flatten(0, -2), targets_BT.flatten(), IGNORED)


def small(*overrides: str) -> Settings:
    return parse_settings(copy.deepcopy(SMALL), overrides)


def build(settings: Settings) -> HybridLM:
    model = HybridLM(settings, VOCAB)
    init_parameters(model, settings)
    for layer in model.layers.values():
        if layer.engram is not None and layer.engram.conv is not None:
            torch.nn.init.normal_(layer.engram.conv, std=0.3, generator=torch.Generator().manual_seed(1))
    model.rows.set([torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(2))])
    return model


def batch(seq_len: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCAB, (2, seq_len), generator=generator), torch.randint(
        ROWS, (2, seq_len, 1, 4), generator=generator
    )


def test_a_step_reaches_every_parameter_and_the_leaf() -> None:
    model = build(small("model.attention.qk_norm=true"))
    tokens, index = batch()
    logits = model(tokens, None, index)
    assert logits.shape == (2, 24, VOCAB)
    token_losses_sum(logits, tokens).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    (grad,) = model.rows.grads()
    assert grad.shape == (ROWS, 8)
    assert grad.abs().sum() > 0


def test_parameter_names_are_the_contract() -> None:
    names = set(build(small()).state_dict())
    layer0 = {f"layers.0.{n}" for n in ("mixer_norm.weight", "feedforward_norm.weight")}
    layer0 |= {f"layers.0.mixer.{n}.weight" for n in ("wq", "wk", "wv", "wo", "q_norm", "k_norm")}
    layer1 = {n.replace("layers.0", "layers.1") for n in layer0}
    layer0 |= {f"layers.0.feedforward.{n}.weight" for n in ("w_gate", "w_up", "w_down")}
    layer1 |= {f"layers.1.feedforward.router.{n}" for n in ("weight", "bias_E", "load_E")}
    layer1 |= {f"layers.1.feedforward.experts.{n}" for n in ("w_gate", "w_up", "w_down")}
    layer1 |= {f"layers.1.feedforward.shared.{n}.weight" for n in ("w_gate", "w_up", "w_down")}
    layer1 |= {
        f"layers.1.engram.{n}"
        for n in ("wk.weight", "wv.weight", "h_norm.weight", "k_norm.weight", "conv_norm.weight", "conv")
    }
    assert names == {"embed.weight", "head.weight", "norm.weight"} | layer0 | layer1


def test_the_future_does_not_change_the_past() -> None:
    model = build(small()).eval()
    tokens, index = batch()
    changed_tokens, changed_index = tokens.clone(), index.clone()
    changed_tokens[:, 15:] = (tokens[:, 15:] + 1) % VOCAB
    changed_index[:, 15:] = (index[:, 15:] + 1) % ROWS
    before, after = model(tokens, None, index), model(changed_tokens, None, changed_index)
    torch.testing.assert_close(before[:, :15], after[:, :15], atol=1e-5, rtol=1e-5)
    assert (before[:, 15:] - after[:, 15:]).abs().max() > 0.1


@pytest.mark.parametrize("start", [1, 7, 20])
def test_a_document_is_alone(start: int) -> None:
    """RoPE is relative, so the second document's logits are those of the document by itself."""
    model = build(small()).eval()
    tokens, index = batch()
    documents = (torch.arange(24) >= start).long().expand(2, -1)
    packed = model(tokens, documents, index)
    alone = model(tokens[:, start:], None, index[:, start:])
    torch.testing.assert_close(packed[:, start:], alone, atol=2e-4, rtol=1e-4)
    assert (model(tokens, None, index)[:, start:] - alone).abs().max() > 0.05


def test_one_document_takes_the_causal_path() -> None:
    model = build(small()).eval()
    tokens, index = batch()
    ones = torch.ones(2, 24, dtype=torch.int64)
    assert torch.equal(model(tokens, ones, index), model(tokens, None, index))


def test_meta_construction_equals_eager() -> None:
    settings = small()
    with torch.device("meta"):
        model = HybridLM(settings, VOCAB)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    init_parameters(model, settings)
    eager = HybridLM(settings, VOCAB)
    init_parameters(eager, settings)
    for (name, a), b in zip(model.state_dict().items(), eager.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    tokens, index = batch()
    for m in (model, eager):
        m.rows.set([torch.ones(ROWS, 8)])
    assert torch.equal(model(tokens, None, index), eager(tokens, None, index))


def test_tied_embeddings_share_one_weight() -> None:
    model = build(small("model.tie_embeddings=true"))
    assert "head.weight" not in model.state_dict()
    tokens, index = batch()
    token_losses_sum(model(tokens, None, index), tokens).backward()
    unseen = sorted(set(range(VOCAB)) - set(tokens.flatten().tolist()))
    assert model.embed.weight.grad is not None
    assert model.embed.weight.grad[unseen].abs().sum() > 0


def test_an_engram_layer_without_rows_is_refused() -> None:
    model = build(small())
    tokens, index = batch()
    with pytest.raises(ValueError, match=r"layers \[1\] have an engram; the forward pass needs row_index"):
        model(tokens, None)
    with pytest.raises(RuntimeError, match="micro-batch 3 has no table rows; the step set 1 leaves"):
        model(tokens, None, index, micro_batch=3)
    assert not HybridLM(small("engram.enabled=false"), VOCAB).engram_layers


def test_leaves_belong_to_their_micro_batch_and_to_no_checkpoint() -> None:
    model = build(small())
    tokens, index = batch()
    leaves = [torch.randn(ROWS, 8), torch.randn(ROWS + 3, 8)]
    model.rows.set(leaves)
    token_losses_sum(model(tokens, None, index, micro_batch=1), tokens).backward()
    first, second = model.rows.grads()
    assert first.shape == (ROWS, 8)
    assert first.abs().sum() == 0
    assert second.shape == (ROWS + 3, 8)
    assert second[:ROWS].abs().sum() > 0
    assert not [name for name in model.state_dict() if name.startswith("rows")]
    model.rows.clear()
    assert not [name for name, _ in model.named_parameters() if name.startswith("rows")]


def test_loss_ignores_and_sums() -> None:
    logits = torch.randn(2, 5, 11, requires_grad=True)
    targets = torch.randint(11, (2, 5))
    targets[0, 2] = -100
    chosen = logits.log_softmax(-1).gather(2, targets.clamp_min(0)[:, :, None])[:, :, 0]
    expected = -chosen[targets >= 0].sum()
    loss = token_losses_sum(logits, targets)
    torch.testing.assert_close(loss, expected)
    (a,), (b,) = torch.autograd.grad(3 * loss, logits), torch.autograd.grad(3 * expected, logits)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("tied", ["true", "false"])
def test_loss_inside_the_model_equals_loss_of_its_logits(tied: str) -> None:
    model = build(small(f"model.tie_embeddings={tied}"))
    tokens, index = batch()
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    wanted = list(model.parameters())
    inside = model(tokens, None, index, targets_BT=targets)
    outside = token_losses_sum(model(tokens, None, index), targets)
    torch.testing.assert_close(inside, outside)
    for a, b in zip(torch.autograd.grad(inside, wanted), torch.autograd.grad(outside, wanted), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_model_imports_nothing_distributed() -> None:
    """Everything that hybridtrain.model reaches inside the project, by its import statements."""
    root = Path(hybridtrain.model.__file__).parents[2]
    pending = sorted((root / "hybridtrain/model").glob("*.py"))
    seen: set[Path] = set()
    while pending:
        path = pending.pop()
        if path in seen:
            continue
        seen.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert not name.startswith(
                    ("torch.distributed", "hybridtrain.parallel", "hybridtrain.launch")
                ), f"{path}: {name}"
                file = root / (name.replace(".", "/") + ".py")
                pending += [file] if name.startswith("hybridtrain.") and file.exists() else []
    assert any("kernels" in str(path) for path in seen)
