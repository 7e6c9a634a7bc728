"""Tensor parallelism piece by piece, and a whole model's losses, logits and gradients under it against one
rank's.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hybridtrain.data.batches import Batch
from hybridtrain.kernels.choose import Backends
from hybridtrain.kernels.engram.op import ConvRule, short_conv
from hybridtrain.model.exchanges import position_in_expert
from hybridtrain.parallel.apply import materialize, write_local
from hybridtrain.parallel.collectives import Group
from hybridtrain.parallel.engine import local_gradients, sum_over_tp, tp_copies
from hybridtrain.parallel.layout import Layout
from hybridtrain.parallel.mesh import Mesh, make_mesh
from hybridtrain.parallel.tensor import (
    TensorAxis,
    VocabularyEmbedding,
    VocabularyLogits,
    VocabularyLoss,
    WholeSequences,
    gather_sequence,
    scatter_sequence,
)
from hybridtrain.run.assemble import Run, Vocabulary, assemble, make_addressing
from hybridtrain.settings.load import load_settings
from tests.parallel.groups import clip_by_global_norm, mesh_here
from tests.ranks import run_on_ranks
from tests.training import CI

B, T, D, V = 2, 12, 6, 10  # ten tokens of vocabulary on three ranks: 4, 4 and 2


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def full(x: Tensor | None) -> Tensor:
    assert x is not None
    return x.full_tensor() if isinstance(x, DTensor) else x


def axis_of(mesh: Mesh) -> TensorAxis:
    assert mesh.dense_mesh is not None
    return TensorAxis(mesh.tp, mesh.dense_mesh["tp"])


def part(x_BTD: Tensor, mesh: Mesh) -> Tensor:
    return x_BTD.chunk(mesh.tp.size, 1)[mesh.tp.rank]


def sequences(mesh: Mesh) -> None:
    """gather is undone by scatter but for the factor of the ranks, and each is the other's gradient."""
    x_BTD, y_BTD = drawn(0, B, T, D), drawn(1 + mesh.rank, B, T, D)
    x_BSD = part(x_BTD, mesh).clone().requires_grad_()
    gathered_BTD = gather_sequence(x_BSD, mesh.tp)
    assert torch.equal(gathered_BTD, x_BTD)
    summed_BSD = scatter_sequence(y_BTD.requires_grad_(), mesh.tp)
    everyone_BTD = sum(drawn(1 + r, B, T, D) for r in range(mesh.tp.size))
    assert isinstance(everyone_BTD, Tensor)
    torch.testing.assert_close(summed_BSD, part(everyone_BTD, mesh))
    gathered_BTD.backward(y_BTD.detach())
    torch.testing.assert_close(x_BSD.grad, part(everyone_BTD, mesh))
    summed_BSD.backward(part(x_BTD, mesh))
    assert torch.equal(full(y_BTD.grad), x_BTD)
    assert mesh.traffic.entries()["tp", "all_gather"] == (
        2,
        2 * (mesh.tp.size - 1) * part(x_BTD, mesh).numel() * 4,
    )


def vocabulary(mesh: Mesh) -> None:
    axis, weight_VD = axis_of(mesh), drawn(0, V, D)
    h_BTD, tokens_BT = drawn(1, B, T, D), torch.arange(B * T).view(B, T) % V
    targets_BT = tokens_BT.flip(0).clone()
    targets_BT[0, :3] = -100

    h_BSD = part(h_BTD, mesh).clone().requires_grad_()
    weight = nn.Parameter(distribute_tensor(weight_VD, axis.mesh, [Shard(0)]))
    loss = VocabularyLoss(mesh.tp)(h_BSD, weight, targets_BT)
    (3 * loss).backward()
    whole_BTD, whole_VD = h_BTD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    reference = F.cross_entropy((whole_BTD @ whole_VD.T).flatten(0, 1), targets_BT.flatten(), reduction="sum")
    (3 * reference).backward()
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(h_BSD.grad, part(full(whole_BTD.grad), mesh))
    torch.testing.assert_close(full(weight.grad), whole_VD.grad)
    torch.testing.assert_close(VocabularyLogits(mesh.tp)(h_BSD, weight), h_BTD @ weight_VD.T)
    if find_spec("triton") is not None:
        triton = Backends({"cross_entropy": "triton"})
        again_BSD, again = h_BSD.detach().requires_grad_(), nn.Parameter(weight.detach())
        fused = VocabularyLoss(mesh.tp, backends=triton)(again_BSD, again, targets_BT)
        (3 * fused).backward()
        torch.testing.assert_close(fused, loss)
        torch.testing.assert_close(again_BSD.grad, h_BSD.grad)
        torch.testing.assert_close(full(again.grad), full(weight.grad))
    huge = VocabularyLoss(mesh.tp)(h_BSD * 1e4, weight, targets_BT)
    assert torch.isfinite(huge)  # every exponent is taken below the greatest logit of all ranks

    with torch.device("meta"):
        embed = VocabularyEmbedding(nn.Embedding(V, D), axis)
    materialize(embed, mesh.device)
    with torch.no_grad():
        write_local(embed.weight, lambda rows: weight_VD[rows])
    x_BSD = embed(tokens_BT)
    assert torch.equal(x_BSD, part(weight_VD[tokens_BT], mesh))
    x_BSD.backward(part(h_BTD, mesh))
    torch.testing.assert_close(
        full(embed.weight.grad), torch.zeros(V, D).index_add_(0, tokens_BT.flatten(), h_BTD.flatten(0, 1))
    )


def convolution(mesh: Mesh) -> None:
    """Taps reach over the borders of the shards, and over more than one of them."""
    x_BTD, drawn_weights = drawn(0, B, T, D), (drawn(2, D), drawn(1, 4, D))
    documents_BT = torch.tensor([0] * 5 + [1] * 7).expand(B, T)
    for documents in (None, documents_BT):
        x_BSD, own = (
            part(x_BTD, mesh).clone().requires_grad_(),
            [w.clone().requires_grad_() for w in drawn_weights],
        )
        whole, weights = x_BTD.clone().requires_grad_(), [w.clone().requires_grad_() for w in drawn_weights]
        out_BSD = WholeSequences(short_conv, mesh.tp)(x_BSD, *own, documents, ConvRule(3, 1e-6))
        reference_BTD = short_conv(whole, *weights, documents, ConvRule(3, 1e-6))
        assert torch.equal(out_BSD, part(reference_BTD, mesh))
        out_BSD.square().sum().backward()
        reference_BTD.square().sum().backward()
        torch.testing.assert_close(x_BSD.grad, part(full(whole.grad), mesh))
        sum_over_tp(own, mesh.tp)
        for mine, theirs in zip(own, weights, strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)


def lines_before_experts(mesh: Mesh) -> None:
    experts_BTK = torch.randint(3, (B, T, 1), generator=torch.Generator().manual_seed(0))
    places = WholeSequences(position_in_expert, mesh.tp)(part(experts_BTK, mesh))
    assert torch.equal(places, part(position_in_expert(experts_BTK), mesh))


def pieces() -> None:
    for piece in (sequences, vocabulary, convolution, lines_before_experts):
        piece(mesh_here(tp=3))


def test_pieces() -> None:
    run_on_ranks(pieces, 3)


def test_the_heads_gradient_in_bfloat16_is_as_near_over_128_blocks_as_in_one_product() -> None:
    """Added up in bfloat16 the blocks were nine times as far from float64 as one product of all tokens."""
    count = 8192
    h_ND, weight_WD = (2 * drawn(1, count, D)).bfloat16(), drawn(0, V, D).bfloat16()
    targets_N = torch.randint(V, (count,), generator=torch.Generator().manual_seed(2))

    def gradient(dtype: torch.dtype, elements: int) -> Tensor:
        weight = weight_WD.to(dtype).clone().requires_grad_()
        with mock.patch("hybridtrain.parallel.tensor.CPU_BLOCK_ELEMENTS", elements):
            VocabularyLoss(Group("tp", (0,), 0))(h_ND.to(dtype)[None], weight, targets_N[None]).backward()
        return full(weight.grad).double()

    exact, whole, blocks = (
        gradient(torch.float64, 1),
        gradient(torch.bfloat16, V * count),
        gradient(torch.bfloat16, 1),
    )
    assert (blocks - exact).abs().max() <= (whole - exact).abs().max() + 2.0**-9 * exact.abs().max()
    assert (whole - exact).abs().max() < 2.0**-8 * exact.abs().max()


VOCABULARY = 1021  # a prime: no tp divides it
OVERRIDES = [
    "parallel.zero=3",
    "model.moe.num_shared=1",
    "model.moe.aux_weight=0.1",
    "model.attention.num_kv_heads=2",
    "train.global_batch=4",
]


def build(mesh: Mesh, *overrides: str) -> Run:
    settings = load_settings(CI, [*OVERRIDES, *overrides])
    vocabulary = Vocabulary(VOCABULARY, 0, np.arange(VOCABULARY))
    run = assemble(settings, mesh, vocabulary, make_addressing(settings, vocabulary))
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if name.endswith(".conv"):  # zeros at the start, behind which there is no gradient
                write_local(
                    parameter, lambda rows, within=(), p=parameter: drawn(0, *p.shape)[(rows, *within)]
                )  # type: ignore[misc]
    return run


def gradients(run: Run, batch: Batch) -> dict[str, Any]:
    """Loss, logits, norm and all gradients of one step, on every rank those of the whole."""
    model, table, mesh = run.model, run.table, run.mesh
    assert table is not None
    plan = table.plan(batch)
    table.fetch(plan, plan.exchanges[0])
    args = batch.tokens[0], batch.starts[0].cumsum(-1), plan.exchanges[0].index[0]
    loss = model.train()(*args, targets_BT=batch.targets[0]) / run.tokens_per_step
    loss.backward()
    rows = table.new_gradient(plan)
    table.push(plan.exchanges[0], rows)
    table.exchange.reduce_replicas(rows)
    params = [p for o in run.engine.optimizers for g in o.param_groups for p in g["params"]]
    sum_over_tp(params, mesh.tp)
    norm, table_norm = clip_by_global_norm(
        local_gradients(params), rows, mesh, 0.0, tp_copies(params, mesh.tp)
    )
    grads = {name: full(p.grad) for name, p in model.named_parameters()}
    table.fetch(plan, plan.exchanges[0])
    logits = model.eval()(*args)
    table.leaves.clear()
    return {
        "loss": loss.detach(),
        "norm": norm,
        "table_norm": table_norm,
        "rows": rows,
        "logits": logits.detach(),
        "grads": grads,
    }


def whole_model(degrees: dict[str, int], *overrides: str) -> None:
    mesh, alone = mesh_here(**degrees, mem=1), make_mesh(Layout.resolve(1), 0, torch.device("cpu"), 60)
    tokens = torch.randint(1, VOCABULARY, (1, 4, 64), generator=torch.Generator().manual_seed(0))
    tokens[0, :2, 30] = 0
    batch = Batch(tokens, tokens.roll(-1, -1), tokens == 0)
    dp, place = mesh.layout.dp, mesh.layout.coordinate(mesh.rank, "dp")
    mine = Batch(*(x.chunk(dp, 1)[place] for x in (batch.tokens, batch.targets, batch.starts)))
    run = build(mesh, *overrides)
    cut = run.model.get_parameter("layers.0.mixer.wq.weight")
    assert isinstance(cut, DTensor)
    assert cut.to_local().numel() * mesh.tp.size * mesh.layout.dp_shard == cut.numel()
    ours, theirs = gradients(run, mine), gradients(build(alone, *overrides), batch)

    loss = ours["loss"].clone()
    torch.distributed.all_reduce(loss)
    torch.testing.assert_close(
        loss / mesh.tp.size, theirs["loss"], rtol=1e-6, atol=0
    )  # the same on all ranks of tp
    torch.testing.assert_close(ours["logits"], theirs["logits"].chunk(dp)[place], rtol=1e-4, atol=1e-5)
    assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-5)
    assert ours["table_norm"] == pytest.approx(theirs["table_norm"], rel=1e-4)
    assert ours["grads"].keys() == theirs["grads"].keys()
    for name, grad in {**theirs["grads"], "table": theirs["rows"]}.items():
        got = ours["rows"] if name == "table" else ours["grads"][name]
        assert float(grad.abs().max()) > 0, name
        torch.testing.assert_close(
            got, grad, rtol=0, atol=1e-4 * float(grad.abs().max()), msg=lambda t, n=name: f"{n}: {t}"
        )


def whole_models(cases: list[tuple[dict[str, int], tuple[str, ...]]]) -> None:
    for degrees, overrides in cases:
        try:
            whole_model(degrees, *overrides)
        except Exception as error:
            raise AssertionError(f"{degrees} {overrides}") from error


def test_a_model_has_the_gradients_of_one_rank() -> None:
    cases = [
        ({"tp": 2}, ()),
        (
            {"tp": 2, "ep": 4},
            ("model.tie_embeddings=true", "parallel.zero=3", "parallel.reshard_after_forward=true"),
        ),
        ({"tp": 2, "dp_replicate": 2, "ep": 2}, ("engram.conv=false",)),
        ({"tp": 2, "ep": 2, "etp": 2}, ()),
        ({"tp": 2, "etp": 2}, ("model.moe.score=sigmoid",)),
    ]
    run_on_ranks(whole_models, 4, cases)
