"""Parallelism applied to a small model: who holds which part, how parts are filled, and that gradients are
sums over ranks.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hybridtrain.model.component import (
    LOCAL_WIRING,
    ComponentError,
    Cut,
    FeedForward,
    Frame,
    Parameter,
    Wiring,
)
from hybridtrain.model.exchanges import Exchanges
from hybridtrain.parallel.apply import Sharding, materialize, parallelize, write_local
from hybridtrain.parallel.engine import sync_gradients
from hybridtrain.parallel.exchanges import wire
from hybridtrain.parallel.experts import AllToAllDispatch
from hybridtrain.parallel.layout import Degrees, Layout
from hybridtrain.parallel.mesh import make_mesh, mesh_on_paper
from hybridtrain.section import Section
from tests.parallel.groups import mesh_here
from tests.ranks import run_on_ranks

EXPERTS, DIM, VOCABULARY = 4, 6, 10


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(EXPERTS, DIM, DIM))

    def forward(
        self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor, absent: bool = False, present: int = 0
    ) -> Tensor:
        """Each token through its one expert, where that is here."""
        weight = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        here_EN = experts_NK[:, 0] == torch.arange(len(weight))[:, None]
        assert absent or bool(here_EN.any(0).all())
        return torch.einsum("nd,edf,en->nf", x_ND, weight, here_EN.to(x_ND.dtype)) * gates_NK


class Moe(nn.Module):
    """One expert a token, by the token's number."""

    def __init__(self, section: None, frame: Frame, exchanges: Exchanges) -> None:
        super().__init__()
        self.experts = Experts()
        self.dispatch = exchanges.dispatch(EXPERTS, False, frame.path)

    def forward(self, x_ND: Tensor, tokens_N: Tensor) -> Tensor:
        return self.dispatch(x_ND, (tokens_N % EXPERTS)[:, None], torch.ones(len(x_ND), 1), self.experts)()


MOE = FeedForward(
    name="moe",
    section=Section,
    build=Moe,
    parameters=lambda _: {"experts.weight": Parameter(Cut.EXPERT_COLUMN)},
)


class Layer(nn.Module):
    def __init__(self, path: str, wiring: Wiring) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(5, DIM))  # 5 rows: no whole number of them on 2 or 4 ranks
        self.placed = wiring.build(MOE, Section(), Frame(DIM, 1e-6, 7, 7, f"{path}.moe"))
        self.moe = self.placed.module

    def forward(self, x_ND: Tensor, tokens_N: Tensor) -> Tensor:
        return x_ND + torch.tanh(x_ND @ self.weight.T) @ self.weight + self.moe(x_ND, tokens_N)


class Model(nn.Module):
    def __init__(self, wiring: Wiring = LOCAL_WIRING) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, DIM)
        self.layers = nn.ModuleList([Layer(f"layers.{i}", wiring) for i in range(2)])

    def forward(self, tokens_N: Tensor) -> Tensor:
        x_ND = self.embed(tokens_N)
        for layer in self.layers:
            x_ND = layer(x_ND, tokens_N)
        return x_ND.square().sum()


def whole(name: str, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(name.encode()))) / 2


def build(degrees: dict[str, int] | None, reshard: bool = False) -> Model:
    """The model on one rank, or over this world's ranks; its parameters are the same however it is cut."""
    alone = make_mesh(Layout.resolve(1), 0, torch.device("cpu"), 60)
    mesh = mesh_here(**degrees) if degrees is not None else alone
    wiring = wire(mesh, 7)
    with torch.device("meta"):
        model = Model(wiring)
    components = [layer.placed for layer in model.layers]
    parallelize(model, list(model.layers), components, mesh, Sharding(reshard))
    materialize(model, mesh.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            write_local(
                parameter, lambda rows, within=(), n=name, s=parameter.shape: whole(n, s)[(rows, *within)]
            )  # type: ignore[misc]
    return model


def tokens(rank: int, micro_batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * rank + micro_batch)
    return torch.randint(VOCABULARY, (7,), generator=generator)


def full(x: Tensor | None) -> Tensor:
    assert x is not None
    return x.full_tensor() if isinstance(x, DTensor) else x


def check(degrees: dict[str, int], reshard: bool) -> None:
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    model, alone = build(degrees, reshard), build(None)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        assert torch.equal(full(parameter), whole(name, parameter.shape)), name
    layout = Layout.resolve(size, Degrees(**degrees))
    experts = model.layers[0].moe.experts.weight  # type: ignore[union-attr]
    assert isinstance(experts, DTensor)
    if layout.ep > 1:
        assert experts.to_local().shape == (EXPERTS // layout.ep, DIM // layout.edp, DIM)
        dispatch = model.layers[0].moe.dispatch  # type: ignore[union-attr]
        assert isinstance(dispatch, AllToAllDispatch)
        assert dispatch.layer == "layers.0.moe"
        assert [group.name for group in dispatch.groups] == (
            ["ep_inter", "ep_intra"] if layout.ep_inter > 1 else ["ep"]
        )

    for step in range(2):
        losses = [alone(tokens(i, m)) for i in range(size) for m in range(2)]
        alone.zero_grad()
        torch.stack(losses).sum().backward()
        model.zero_grad()
        for m in range(2):
            sync_gradients(model, m == 1)
            loss = model(tokens(rank, m))
            # a row's gradients arrive from other ranks and in another order
            torch.testing.assert_close(loss, losses[2 * rank + m], rtol=1e-5, atol=1e-6)
            loss.backward()
            # nothing is reduced before the last micro-batch of a step
            assert (model.embed.weight.grad is None) == (m == 0)
        ours, theirs = dict(model.named_parameters()), dict(alone.named_parameters())
        for name in theirs:
            scale = float(full(theirs[name].grad).abs().max())
            torch.testing.assert_close(
                full(ours[name].grad),
                full(theirs[name].grad),
                rtol=1e-5,
                atol=1e-5 * scale,
                msg=lambda t, n=name: f"{n}: {t}",
            )
        with torch.no_grad():
            for parameters in (ours, theirs):
                for parameter in parameters.values():
                    parameter -= 1e-3 * parameter.grad  # type: ignore[operator]
        assert step == 0 or not torch.equal(
            full(ours["embed.weight"]), whole("embed.weight", ours["embed.weight"].shape)
        )


def check_all(cases: list[tuple[dict[str, int], bool]]) -> None:
    for degrees, reshard in cases:
        try:
            check(degrees, reshard)
        except Exception as error:
            raise AssertionError(f"{degrees}, reshard_after_forward={reshard}") from error


def test_two_ranks() -> None:
    run_on_ranks(check_all, 2, [({}, False), ({"ep": 2}, False), ({"ep": 2}, True)])


def test_four_ranks() -> None:
    run_on_ranks(
        check_all, 4, [({"ep": 2}, False), ({"ep": 4}, False), ({"ep": 4, "node_size": 2}, True), ({}, True)]
    )


def test_a_world_of_one_is_left_as_it_is() -> None:
    model = build(None)
    assert {type(p) for p in model.parameters()} == {nn.Parameter}
    assert [type(m) for m in model.modules()].count(Moe) == 2
    sync_gradients(model, False)
    model(tokens(0, 0)).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("rows", [1, 5])
def test_write_local_asks_for_the_rows_that_are_here(rows: int) -> None:
    asked: list[slice] = []
    parameter = nn.Parameter(torch.zeros(rows, 2))
    with torch.no_grad():
        write_local(parameter, lambda part: asked.append(part) or torch.ones(rows, 2)[part])  # type: ignore[func-returns-value]
    assert asked == [slice(0, rows)]
    assert bool((parameter == 1).all())


def test_another_precision_needs_a_mesh() -> None:
    with torch.device("meta"):
        model = Model()
    mesh = make_mesh(Layout.resolve(1), 0, torch.device("cpu"), 60)
    with pytest.raises(
        ValueError, match=r"torch.bfloat16 needs a mesh, also of one rank: make_mesh\(…, always=True\)"
    ):
        parallelize(model, list(model.layers), [], mesh, Sharding(dtype=torch.bfloat16))


class Flat(Moe):
    """Its experts have a bias each, and the module itself a matrix of theirs."""

    def __init__(self, section: None, frame: Frame, exchanges: Exchanges) -> None:
        super().__init__(section, frame, exchanges)
        self.experts.bias = nn.Parameter(torch.empty(EXPERTS, DIM))
        self.w = nn.Parameter(torch.empty(EXPERTS, DIM, DIM))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("experts.bias", "experts.bias has 2 dims; under etp a parameter that is cut as expert column has 3"),
        ("w", "w of experts must be in a submodule of their own, without experts.bias, experts.weight"),
    ],
)
def test_experts_that_cannot_be_cut_are_an_error_with_their_path(name: str, why: str) -> None:
    flat = replace(MOE, build=Flat, parameters=lambda _: {name: Parameter(Cut.EXPERT_COLUMN)})
    with torch.device("meta"):
        placed = LOCAL_WIRING.build(flat, Section(), Frame(DIM, 1e-6, 7, 7, "layers.0.moe"))
    model = nn.ModuleList([placed.module])
    layout = Layout.resolve(2, Degrees(tp=2, etp=2))
    with mesh_on_paper(layout, 0) as mesh, pytest.raises(ComponentError, match=f"layers.0.moe: {why}"):
        parallelize(model, [placed.module], [placed], mesh, Sharding())
