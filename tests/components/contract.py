"""What every component keeps to, as checks that any declaration can be put to; each raises AssertionError or
ComponentError where it does not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hybridtrain.model.build import check_parameters
from hybridtrain.model.common import CountingModule, make_context
from hybridtrain.model.component import (
    LOCAL_WIRING,
    Component,
    Cut,
    Engram,
    FeedForward,
    Frame,
    Mixer,
    Residual,
    Sees,
)
from hybridtrain.model.residuals.add import Stream
from hybridtrain.parallel.recompute import recomputed
from hybridtrain.settings.engram import EngramSettings

DIM, TOKENS, BORDER = 32, 24, 10
FRAME = Frame(DIM, 1e-6, TOKENS, 2 * TOKENS, "layers.0.part")
FLOPS_TOLERANCE = 0.01
"""Relative, of the operations that torch counts: products and attention."""


@dataclass(frozen=True)
class Case:
    component: Component
    section: Any

    def made(self) -> nn.Module:
        """The module as it is made; of a residual scheme those of two layers and its end."""
        if not isinstance(self.component, Residual):
            return LOCAL_WIRING.build(self.component, self.section, FRAME).module
        places = range(3 if self.component.end else 2)
        frames = [replace(FRAME, path=f"layers.{place}.part") for place in places]
        build = LOCAL_WIRING.build
        return nn.ModuleList([build(self.component, self.section, frame).module for frame in frames])

    def own(self, name: str) -> str:
        """A parameter's name in the module that declares it."""
        return name.split(".", 1)[1] if isinstance(self.component, Residual) else name

    def build(self) -> nn.Module:
        """The module with values drawn, checked against its declaration."""
        module = self.made()
        for part in module if isinstance(module, nn.ModuleList) else [module]:
            check_parameters(self.component, part, self.component.parameters(self.section), FRAME.path)
        generator = torch.Generator().manual_seed(0)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        return module

    def call(self, module: nn.Module, x_BTD: Tensor, documents_BT: Tensor | None) -> Tensor:
        """The module's output as a layer gets it."""
        if isinstance(self.component, Mixer):
            context = make_context(documents_BT, TOKENS, 8, 1e4, x_BTD.device)
            out: Tensor = module(x_BTD, context)
        elif isinstance(self.component, FeedForward):
            out = module(x_BTD)
        elif isinstance(self.component, Engram):
            assert isinstance(self.section, EngramSettings)
            slots, width = self.section.slots, self.section.head_dim
            rows = x_BTD[..., :1, None].expand(-1, -1, slots, width).contiguous()
            out = module(x_BTD, rows, documents_BT)
        else:
            assert isinstance(self.component, Residual)
            assert isinstance(module, nn.ModuleList)
            out = self._through_layers(self.component, list(module), x_BTD)
        return out

    def _through_layers(self, scheme: Residual, modules: list[nn.Module], x_BTD: Tensor) -> Tensor:
        """Layers of two sublayers each, with what `carried` names passed from one to the next."""
        end = modules[2] if scheme.end else None
        held: dict[str, Tensor] = {}
        stream = scheme.start(x_BTD)
        for place in range(3):
            first, *others = [c.name for c in scheme.carried(self.section, FRAME, place)]
            held = {**held, **stream.sources, first: stream.carry}
            stream = Stream(held[first], {name: held[name] for name in others})
            for number in range(2 if place < 2 else 0):
                stream = modules[place](stream, number, torch.tanh)
        return scheme.finish(end, stream)


def inputs(seed: int = 1) -> tuple[Tensor, Tensor]:
    """(x_BTD, documents_BT): two sequences of two documents."""
    x_BTD = torch.randn(2, TOKENS, DIM, generator=torch.Generator().manual_seed(seed))
    return x_BTD, (torch.arange(TOKENS) >= BORDER).long().expand(2, -1).contiguous()


def check_declaration(case: Case) -> None:
    """The declared parameters are the module's, wherever it is built, and are all its state but buffers."""
    module = case.build()
    with torch.device("meta"):
        meta = case.made()
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    assert shapes == {name: value.shape for name, value in meta.state_dict().items()}
    buffers = {name for name, _ in module.named_buffers()}
    named = {case.own(name) for name in shapes.keys() - buffers}
    assert named == case.component.parameters(case.section).keys()


def check_cuts(case: Case) -> None:
    """Every parameter has the dims that its cut needs."""
    parameters = {case.own(name): value for name, value in case.build().named_parameters()}
    for name, declared in case.component.parameters(case.section).items():
        dims = {Cut.COLUMN: (2,), Cut.ROW: (2,), Cut.EXPERT_COLUMN: (3,), Cut.EXPERT_ROW: (3,)}
        assert parameters[name].ndim in dims.get(declared.cut, (1, 2, 3)), name


def check_documents(case: Case) -> None:
    """What one document of a sequence holds changes no bit of the other's output."""
    module = case.build()
    x_BTD, documents_BT = inputs()
    other_BTD, _ = inputs(seed=2)
    before = case.call(module, x_BTD, documents_BT)
    for changed, kept in ((slice(0, BORDER), slice(BORDER, None)), (slice(BORDER, None), slice(0, BORDER))):
        mixed = x_BTD.clone()
        mixed[:, changed] = other_BTD[:, changed]
        assert torch.equal(case.call(module, mixed, documents_BT)[:, kept], before[:, kept])


def check_causal(case: Case) -> None:
    """Later tokens change no bit of what earlier ones get."""
    module, place = case.build(), TOKENS // 3
    x_BTD, _ = inputs()
    later = x_BTD.clone()
    later[:, place:] = inputs(seed=2)[0][:, place:]
    ours, theirs = case.call(module, x_BTD, None), case.call(module, later, None)
    assert torch.equal(ours[:, :place], theirs[:, :place])


def check_recompute(case: Case) -> None:
    """Run again in the backward pass, it gives the same gradients to the bit."""
    results = []
    for mode in ("none", "full", "selective"):
        module = case.build()
        x_BTD, documents_BT = inputs()
        x_BTD.requires_grad_()
        run = recomputed(lambda x, d, m=module: case.call(m, x, d), mode)
        run(x_BTD, documents_BT).square().sum().backward()
        results.append([x_BTD.grad, *(p.grad for p in module.parameters())])
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            assert (mine is None and theirs is None) or torch.equal(mine, theirs)


def check_compiled(case: Case, backend: str = "aot_eager") -> None:
    """Compiled, it gives the same output and gradients but for rounding. `backend` is of torch.compile; the
    default runs the graphs that inductor would get as they are.
    """
    results = []
    for compiled in (False, True):
        module = case.build().train()
        if compiled:
            for part in module if isinstance(module, nn.ModuleList) else [module]:
                part.compile(backend=backend, dynamic=False)
        x_BTD, documents_BT = inputs()
        out = case.call(module, x_BTD.requires_grad_(), documents_BT)
        out.square().sum().backward()
        results.append([out, x_BTD.grad, *(p.grad for p in module.parameters())])
    torch.compiler.reset()
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-4, atol=1e-4)


def check_sums(case: Case) -> None:
    """It takes the sums that it declares, of their shapes, while it trains, and none while it does not."""
    module = case.build()
    counting = [m for m in module.modules() if isinstance(m, CountingModule)]
    case.call(module.eval(), *inputs())
    assert not any(m.counters.sums for m in counting)
    case.call(module.train(), *inputs())
    taken = {name: tuple(value.shape) for m in counting for name, value in m.counters.sums.items()}
    assert taken == dict(case.component.sums(case.section))


def check_flops(case: Case) -> None:
    """Products with the declared matrices, and the declared operations, are what torch counts.

    torch counts all pairs of an attention, of which a causal one needs (T + 1) / 2T.
    """
    module = case.build()
    x_BTD, _ = inputs()
    # in its plain form, whose products torch counts on the CPU too
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        case.call(module.eval(), x_BTD, None)
    declared, shares = case.component.parameters(case.section), case.component.shares(case.section)
    weights = sum(
        parameter.numel() * shares.get(name, 1.0)
        for name, parameter in module.named_parameters()
        if declared[case.own(name)].group != "no_decay"
    )
    more = case.component.flops(case.section, FRAME)
    if case.component.sees is Sees.KEYS:
        more *= 2 * TOKENS / (TOKENS + 1)
    expected = x_BTD.shape[:2].numel() * (2 * weights + more)
    assert abs(counter.get_total_flops() - expected) <= FLOPS_TOLERANCE * expected


CHECKS = (
    check_declaration,
    check_cuts,
    check_documents,
    check_causal,
    check_recompute,
    check_compiled,
    check_sums,
    check_flops,
)
