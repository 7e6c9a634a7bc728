"""A mixer of the test's own on ranks: its scan, its cuts, and errors where it is not as declared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hybridtrain.model.common import RMSNorm, SequenceContext, local, make_context
from hybridtrain.model.component import (
    LOCAL_WIRING,
    NORM,
    Component,
    ComponentError,
    Cut,
    FeedForward,
    Frame,
    Mixer,
    Parameter,
    Placed,
    Sees,
    Wiring,
)
from hybridtrain.model.exchanges import Exchanges
from hybridtrain.parallel.apply import Sharding, materialize, parallelize, write_local
from hybridtrain.parallel.engine import sum_over_tp
from hybridtrain.parallel.exchanges import wire
from hybridtrain.parallel.layout import Degrees, Layout
from hybridtrain.parallel.mesh import make_mesh, mesh_on_paper
from hybridtrain.parallel.tensor import TensorAxis, cut_component
from hybridtrain.section import Section
from tests.parallel.groups import mesh_here
from tests.ranks import run_on_ranks

SEQUENCES, TOKENS, DIM, WIDTH = 2, 16, 6, 8
PATH = "layers.0.mixer"


class Nothing(Section):
    """No settings."""


class Model(nn.Module):
    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x_BTD: Tensor, context: SequenceContext) -> Tensor:
        out_BTD: Tensor = self.mixer(x_BTD, context)
        return out_BTD


class Recurrence(nn.Module):
    """h_t = sigmoid(decay + W_f x_t) h_(t-1) + W_i x_t, by channel, and a product with it."""

    def __init__(self, section: Nothing, frame: Frame, exchanges: Exchanges) -> None:
        super().__init__()
        self.w_factor, self.w_input = nn.Linear(frame.dim, WIDTH), nn.Linear(frame.dim, WIDTH, bias=False)
        self.decay = nn.Parameter(torch.empty(WIDTH))
        self.norm = RMSNorm(frame.dim, frame.norm_eps)
        self.w_out = nn.Linear(WIDTH, frame.dim)
        self.scan = exchanges.scan

    def forward(self, x_BTD: Tensor, context: SequenceContext) -> Tensor:
        x_BTD = self.norm(x_BTD)
        factor_BTW = torch.sigmoid(self.w_factor(x_BTD) + local(self.decay))
        out_BTD: Tensor = self.w_out(self.scan(factor_BTW, self.w_input(x_BTD), context))
        return out_BTD


CUTS = {
    "w_factor.weight": Parameter(Cut.COLUMN),
    "w_factor.bias": Parameter(Cut.VECTOR),
    "w_input.weight": Parameter(Cut.COLUMN),
    "decay": Parameter(Cut.VECTOR),
    "norm.weight": NORM,
    "w_out.weight": Parameter(Cut.ROW),
    "w_out.bias": Parameter(Cut.WHOLE),
}
RECURRENCE = Mixer(
    name="recurrence", section=Nothing, build=Recurrence, parameters=lambda _: CUTS, sees=Sees.STATE
)


def place(component: Component, wiring: Wiring = LOCAL_WIRING) -> Placed:
    with torch.device("meta"):
        return wiring.build(component, Nothing(), Frame(DIM, 1e-6, TOKENS, SEQUENCES * TOKENS, PATH))


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(x: Tensor | None) -> Tensor:
    assert x is not None
    return x.full_tensor() if isinstance(x, DTensor) else x


def fill(module: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            value = drawn(sum(name.encode()), *parameter.shape)
            write_local(parameter, lambda rows, within=(), v=value: v[(rows, *within)])  # type: ignore[misc]
            assert torch.equal(whole(parameter), value), name


def documents(packed: bool) -> Tensor:
    starts = torch.zeros(SEQUENCES, TOKENS, dtype=torch.long)
    starts[0, [3, 4, 8, 13]] = starts[1, 6] = int(packed)  # inside chunks and on their borders
    return starts.cumsum(1)


def check_recurrence(packed: bool, degrees: dict[str, int]) -> None:
    """Every rank of dp has the same sequences, so gradients are as many times those of one rank."""
    mesh, alone = mesh_here(**degrees), make_mesh(Layout.resolve(1), 0, torch.device("cpu"), 60)
    wiring = wire(mesh, TOKENS)
    x_BTD, grad_BTD = drawn(0, SEQUENCES, TOKENS, DIM), drawn(1, SEQUENCES, TOKENS, DIM)
    docs, results = documents(packed), []
    for m, how in ((alone, LOCAL_WIRING), (mesh, wiring)):
        placed = place(RECURRENCE, how)
        module = Model(placed.module)
        parallelize(module, [placed.module], [placed], m, Sharding())
        materialize(module, m.device)
        fill(module)
        here = how.positions_T if how.positions_T is not None else torch.arange(TOKENS)
        mine = here.chunk(m.tp.size)[m.tp.rank]
        context = make_context(docs, len(here), DIM, 1e4, m.device, how.positions_T)
        x = x_BTD[:, mine].clone().requires_grad_()
        out = module(x, context)
        out.backward(grad_BTD[:, mine])
        sum_over_tp(module.parameters(), m.tp)
        results.append((out, x, dict(module.named_parameters()), mine))
    (out, x, parameters, _), (ours, x_here, cut, mine) = results
    torch.testing.assert_close(ours, out[:, mine])
    assert x.grad is not None
    torch.testing.assert_close(x_here.grad, x.grad[:, mine])
    assert cut.keys() == parameters.keys()
    for name, parameter in parameters.items():
        expected = whole(parameter.grad) * mesh.layout.dp
        torch.testing.assert_close(
            whole(cut[name].grad), expected, rtol=1e-4, atol=1e-4, msg=lambda t, n=name: f"{n}: {t}"
        )


def check_all(cases: list[dict[str, int]]) -> None:
    for degrees in cases:
        for packed in (False, True):
            try:
                check_recurrence(packed, degrees)
            except Exception as error:
                raise AssertionError(f"{degrees}, documents {packed}") from error


def test_a_mixer_with_a_state_is_the_same_on_two_ranks() -> None:
    run_on_ranks(check_all, 2, [{"cp": 2}, {"tp": 2}])


def test_a_mixer_with_a_state_is_the_same_on_four_ranks() -> None:
    run_on_ranks(check_all, 4, [{"cp": 4}, {"cp": 2, "tp": 2}, {"tp": 2}, {"cp": 2, "dp_replicate": 2}])


def bytes_of_a_scan(tokens: int) -> dict[tuple[str, str], tuple[int, int]]:
    mesh = mesh_here(cp=2)
    scan, own = wire(mesh, tokens).whole.scan, tokens // 2
    factor_BTW = torch.full((SEQUENCES, own, WIDTH), 0.5, requires_grad=True)
    context = SequenceContext(torch.empty(0), None, None)
    scan(factor_BTW, torch.ones(SEQUENCES, own, WIDTH), context).sum().backward()
    return mesh.traffic.entries()


def test_a_scan_sends_as_much_however_long_the_sequence() -> None:
    numbers = 2 * 2 * SEQUENCES * WIDTH * 4  # product and state of two chunks, float32
    expected = {("cp", "all_gather"): (1, numbers), ("cp", "reduce_scatter"): (1, numbers)}
    for tokens in (8, 32):
        assert run_on_ranks(bytes_of_a_scan, 2, tokens) == [expected] * 2


class Deaf(nn.Module):
    """Asks nobody."""

    def __init__(self, section: Nothing, frame: Frame, exchanges: Exchanges) -> None:
        super().__init__()


def declared(kind: type[Component], **also: Any) -> Component:
    return kind(**{"name": "deaf", "section": Nothing, "build": Deaf, "parameters": lambda _: {}, **also})


@pytest.mark.parametrize(
    ("component", "why"),
    [
        (declared(Mixer, sees=Sees.KEYS), "sees keys, but was built without `exchanges.attend`"),
        (declared(Mixer, sees=Sees.STATE), "sees state, but was built without `exchanges.scan`"),
        (
            declared(Mixer, sees=Sees.NEIGHBOURS, reach=lambda _: 9),
            "looks 9 tokens back, but was built without `exchanges.convolve`",
        ),
        (
            declared(FeedForward, parameters=lambda _: {"experts.w": Parameter(Cut.EXPERT_ROW)}),
            "has experts, but was built without `exchanges.dispatch`",
        ),
    ],
    ids=["attend", "scan", "convolve", "dispatch"],
)
def test_a_module_that_does_not_take_its_exchange_is_an_error_with_its_path(
    component: Component, why: str
) -> None:
    with pytest.raises(ComponentError, match=f"layers.0.mixer: deaf {why}; take it when the module is built"):
        place(component)


@pytest.mark.parametrize("name", ["attend", "scan", "convolve", "position_in_expert", "dispatch"])
def test_exchanges_are_handed_in_whatever_a_module_calls_them(name: str) -> None:
    """A module that keeps one under another name has that of its wiring, not the local one."""

    class Renamed(nn.Module):
        def __init__(self, section: Nothing, frame: Frame, exchanges: Exchanges) -> None:
            super().__init__()
            self.any_name_at_all = getattr(exchanges, name)

    def spread(*_: Any) -> Tensor:
        raise AssertionError

    for gathers, side in (((), "shards"), (("",), "whole")):
        wiring = replace(LOCAL_WIRING, **{side: replace(LOCAL_WIRING.whole, **{name: spread})})
        module = place(declared(FeedForward, build=Renamed, gathers=gathers), wiring).module
        assert module.any_name_at_all is spread


def changed(**cuts: Cut) -> Mixer:
    table = {**CUTS, **{name.replace("__", "."): Parameter(cut) for name, cut in cuts.items()}}
    return replace(RECURRENCE, parameters=lambda _: table)


@pytest.mark.parametrize(
    ("component", "why"),
    [
        (
            changed(decay=Cut.COLUMN),
            "layers.0.mixer: decay is cut by columns or rows, so it must be the weight of an nn.Linear "
            "inside of the component; it belongs to the component itself; it may be a vector or whole",
        ),
        (
            changed(norm__weight=Cut.ROW),
            "layers.0.mixer: norm.weight is cut by columns or rows, .* it belongs to the RMSNorm norm",
        ),
        (
            replace(RECURRENCE, gathers=("", "shared")),
            "layers.0.mixer: `gathers` of recurrence names shared, which is not a submodule",
        ),
        (
            changed(norm__weight=Cut.VECTOR),
            "layers.0.mixer: norm.weight is cut as vector, and the RMSNorm that has it computes with all of "
            "it; it may be whole, or belong to a module of the component's own, which takes its part with "
            "`local`",
        ),
        (
            changed(w_input__weight=Cut.VECTOR),
            "layers.0.mixer: w_input.weight is cut as vector, and the Linear that has it computes with all "
            "of it; it may be column, row or whole, or",
        ),
        (
            changed(w_factor__bias=Cut.WHOLE),
            "layers.0.mixer: w_factor.bias is cut as whole; the bias of an nn.Linear whose weight is cut as "
            "column may be vector",
        ),
        (
            changed(w_out__bias=Cut.VECTOR),
            "layers.0.mixer: w_out.bias is cut as vector; the bias of an nn.Linear whose weight is cut as "
            "row may be whole",
        ),
    ],
    ids=[
        "a plain parameter",
        "no nn.Linear",
        "no such submodule",
        "a vector of a norm",
        "a vector of an nn.Linear",
        "a whole bias of own columns",
        "a cut bias of a sum",
    ],
)
def test_a_cut_that_cannot_be_made_is_an_error_with_its_path(component: Mixer, why: str) -> None:
    with mesh_on_paper(Layout.resolve(2, Degrees(tp=2)), 0) as mesh:
        assert mesh.dense_mesh is not None
        axis = TensorAxis(mesh.tp, mesh.dense_mesh["tp"])
        with pytest.raises(ComponentError, match=why):
            cut_component(place(component), axis)


class Scaled(nn.Module):
    """A scale that is one number, and one in a list that does not compute."""

    def __init__(self, section: Nothing, frame: Frame, exchanges: Exchanges) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(()))
        self.scales = nn.ParameterList([nn.Parameter(torch.empty(WIDTH))])


def test_a_vector_may_be_in_a_container_and_has_a_dim() -> None:
    with mesh_on_paper(Layout.resolve(2, Degrees(tp=2)), 0) as mesh:
        assert mesh.dense_mesh is not None
        axis = TensorAxis(mesh.tp, mesh.dense_mesh["tp"])
        table = {"scales.0": Parameter(Cut.VECTOR), "scale": Parameter(Cut.WHOLE)}
        placed = place(declared(Mixer, build=Scaled, parameters=lambda _: table))
        cut_component(placed, axis)
        assert local(placed.module.get_parameter("scales.0")).shape == (WIDTH // 2,)
        table["scale"] = Parameter(Cut.VECTOR)
        with pytest.raises(ComponentError, match=r"mixer: scale has 0 dims and is cut as vector; it may be"):
            cut_component(place(declared(Mixer, build=Scaled, parameters=lambda _: table)), axis)
