"""DenseFormer in one process against its equations with a plain list."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybridtrain.errors import FormatError
from hybridtrain.formats.command import ExportOptions, export_model
from hybridtrain.model.common import make_context
from hybridtrain.model.init import init_parameters
from hybridtrain.model.lm import HybridLM
from hybridtrain.settings.engram import EngramSettings
from hybridtrain.settings.tree import DenseSettings, ModelSettings, MoESettings, Settings
from tests.training import TINY, ci_settings, make_data, train_on

VOCABULARY = 64
LAYERS = ("attention+dense", "engram+attention+moe", "attention+moe", "engram+attention+dense")


def build(residual: str) -> HybridLM:
    moe = MoESettings(num_experts=4, hidden=16)
    model = ModelSettings(dim=32, layers=LAYERS, residual=residual, dense=DenseSettings(hidden=16), moe=moe)
    settings = Settings(model=model, engram=EngramSettings(head_dim=8))
    out = HybridLM(settings, VOCABULARY)
    init_parameters(out, settings)
    out.rows.set([torch.randn(20, 8, generator=torch.Generator().manual_seed(1))])
    return out


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (2, 12), generator=draw)
    return tokens, torch.zeros_like(tokens), torch.randint(20, (2, 12, 2, 8), generator=draw)


def weights(model: HybridLM) -> list[Tensor]:
    """alpha of Y_0, Y_1, …, Y_L."""
    named = dict(model.named_parameters())
    return [*(named[f"layers.{i}.residual.alpha"] for i in range(len(LAYERS))), named["residual.alpha"]]


def by_list(model: HybridLM, tokens: Tensor, documents: Tensor, index: Tensor) -> Tensor:
    """Logits by the paper: X_i = B_i(Y_(i-1)), Y_i = sum over j <= i of a_ij X_j."""
    attention = model.settings.model.attention
    context = make_context(documents, tokens.size(1), attention.head_dim, attention.rope_theta, tokens.device)
    assert model.embed is not None
    assert model.norm is not None
    assert model.head is not None
    xs = [model.embed(tokens)]
    depth = weights(model)

    def mixed(i: int) -> Tensor:
        assert depth[i].shape == (i + 1,)
        identity = torch.eye(i + 1)[i]
        return torch.einsum("j,jbtd->btd", depth[i] + identity, torch.stack(xs))

    for i, layer in enumerate(model.layers.values()):
        h = mixed(i)
        if i in model.engram_layers:
            rows = model.rows.gather(index[:, :, model.engram_layers.index(i)], 0, h)
            h = h + layer.engram(h, rows, context.documents_BT)
        h = h + layer.mixer(layer.mixer_norm(h), context)
        xs.append(h + layer.feedforward(layer.feedforward_norm(h)))
    return model.head(model.norm(mixed(len(LAYERS))))


def test_logits_and_gradients_are_those_of_the_equations() -> None:
    model = build("dense_former")
    draw = torch.Generator().manual_seed(2)
    for alpha in weights(model):
        alpha.data.copy_(torch.randn(alpha.shape, generator=draw) * 0.3)
    results: list[tuple[Tensor, dict[str, Tensor]]] = []
    for compute in (model, lambda *args: by_list(model, *args)):
        model.zero_grad()
        logits = compute(*inputs())
        (logits.float() ** 2).mean().backward()
        results.append(
            (logits, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
    (ours, our_grads), (theirs, their_grads) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert our_grads.keys() == their_grads.keys()
    assert {n for n in our_grads if n.endswith("alpha")} == {
        *(f"layers.{i}.residual.alpha" for i in range(len(LAYERS))),
        "residual.alpha",
    }
    for name, grad in our_grads.items():
        torch.testing.assert_close(
            grad, their_grads[name], rtol=1e-4, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_a_model_begins_as_one_that_adds() -> None:
    dense, plain = build("dense_former"), build("add")
    assert torch.equal(dense(*inputs()), plain(*inputs()))
    more = {n for n, _ in dense.named_parameters()} - {n for n, _ in plain.named_parameters()}
    count = sum(p.numel() for n, p in dense.named_parameters() if n in more)
    assert count == (len(LAYERS) + 1) * (len(LAYERS) + 2) // 2


@pytest.mark.parametrize("before", range(5))
def test_what_a_layer_reads_of_earlier_ones(before: int) -> None:
    names = [carried.name for carried in build("dense_former").carried(before)]
    assert names == [f"x{before}", *(f"x{j}" for j in range(before))]
    assert [(c.name, c.width) for c in build("add").carried(before)] == [("h", 32)]


def test_formats_that_lack_it_refuse_it(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", documents=100)
    settings = ci_settings(tmp_path / "run", data, *TINY, 'model.residual="dense_former"', "train.steps=1")
    train_on(1, settings)
    for form in ("hf", "megatron"):
        with pytest.raises(
            FormatError, match=f"dense_former: the format {form} has no names for its parameters"
        ):
            export_model(
                tmp_path / "run", tmp_path / form, ExportOptions(form, max_shard_size="1GB", dtype="float32")
            )
