from __future__ import annotations

import pytest
import torch
from torch import nn

from hybridtrain.model.build import model_parameters
from hybridtrain.model.component import Cut, Parameter
from hybridtrain.model.lm import HybridLM
from hybridtrain.optim.groups import build_optimizers, group_kind
from hybridtrain.optim.muon import Muon
from hybridtrain.optim.schedule import set_learning_rates
from hybridtrain.settings.load import parse_settings
from hybridtrain.settings.tree import OptimSettings

DECAY = [
    "head.weight",
    "layers.0.mixer.wq.weight",
    "layers.1.feedforward.router.weight",
    "layers.0.feedforward.w_up.weight",
    "layers.1.engram.wk.weight",
]
NO_DECAY = [
    "embed.weight",
    "layers.0.mixer_norm.weight",
    "layers.1.engram.conv",
    "layers.0.mixer.q_norm.weight",
]
EXPERTS = ["layers.1.feedforward.experts.w_gate", "layers.1.feedforward.experts.w_down"]


DECLARED = model_parameters(
    parse_settings({}, ["model.layers=['engram+attention+dense', 'engram+attention+moe']"])
)


class Named(HybridLM):
    """A module tree with parameters of the given dotted names; experts are 3-D, norms 1-D, the rest 2-D."""

    def __init__(self, names, mesh=None):
        nn.Module.__init__(self)
        for name in names:
            *path, leaf = name.split(".")
            node: nn.Module = self
            for part in path:
                if part not in node._modules:
                    node.add_module(part, nn.Module())
                node = node._modules[part]
            shape = (2, 4, 6) if "experts" in name else (4,) if "norm" in name else (4, 6)
            parameter = nn.Parameter(torch.randn(shape))
            if mesh is not None and mesh(name) is not None:
                parameter.device_mesh = mesh(name)
            node.register_parameter(leaf, parameter)

    def declared_parameters(self):
        return {n: (p, DECLARED[n]) for n, p in self.named_parameters() if not n.startswith("rows.")}


class FakeMesh:
    def __init__(self, *names):
        self.mesh_dim_names = names


def groups_of(model, optimizers):
    names = {id(p): n for n, p in model.named_parameters()}
    return {g["name"]: sorted(names[id(p)] for p in g["params"]) for o in optimizers for g in o.param_groups}


def test_adamw_decays_matrices_only():
    model = Named(DECAY + NO_DECAY + EXPERTS)
    (optimizer,) = build_optimizers(
        model, OptimSettings(lr=0.1, weight_decay=0.2, beta1=0.8, beta2=0.7, eps=1e-6)
    )
    assert groups_of(model, [optimizer]) == {"decay": sorted(DECAY + EXPERTS), "no_decay": sorted(NO_DECAY)}
    by_name = {g["name"]: g for g in optimizer.param_groups}
    assert (by_name["decay"]["weight_decay"], by_name["no_decay"]["weight_decay"]) == (0.2, 0.0)
    assert by_name["decay"]["betas"] == (0.8, 0.7)
    assert by_name["decay"]["eps"] == 1e-6
    assert by_name["decay"]["fused"] is True


def test_muon_takes_hidden_matrices_and_experts():
    model = Named(DECAY + NO_DECAY + EXPERTS)
    muon, adamw = build_optimizers(
        model, OptimSettings(backbone="muon", lr=0.1, muon_lr=0.3, muon_momentum=0.9)
    )
    assert isinstance(muon, Muon)
    kept = ["head.weight", "layers.1.feedforward.router.weight"]
    assert groups_of(model, [muon, adamw]) == {
        "muon": sorted(set(DECAY) - set(kept)),
        "muon_experts": sorted(EXPERTS),
        "decay": kept,
        "no_decay": sorted(NO_DECAY),
    }
    assert [
        (g["peak_lr"], g["momentum"], g["weight_decay"], g["input_first"]) for g in muon.param_groups
    ] == [
        (0.3, 0.9, 0.1, False),
        (0.3, 0.9, 0.1, True),
    ]
    assert {g["peak_lr"] for g in adamw.param_groups} == {0.1}


@pytest.mark.parametrize("backbone", ["adamw", "muon"])
def test_table_rows_and_frozen_parameters_are_left_out(backbone):
    model = Named([*DECAY, "rows.leaf0", "rows.leaf1"])
    model.head.weight.requires_grad = False
    names = [
        n
        for members in groups_of(model, build_optimizers(model, OptimSettings(backbone=backbone))).values()
        for n in members
    ]
    assert sorted(names) == sorted(set(DECAY) - {"head.weight"})


@pytest.mark.parametrize(
    ("group", "ndim", "kind"),
    [
        ("no_decay", 2, "no_decay"),
        ("adamw", 2, "decay"),
        ("matrix", 2, "muon"),
        ("matrix", 3, "muon_experts"),
    ],
)
def test_the_declared_group_says_who_updates(group, ndim, kind):
    assert group_kind(Parameter(Cut.WHOLE, group=group), ndim, muon=True) == kind
    assert group_kind(Parameter(Cut.WHOLE, group=group), ndim, muon=False).removeprefix("no_") == "decay"


def test_meshes_do_not_share_groups():
    dense, experts, twin = FakeMesh("dp_shard", "tp"), FakeMesh("edp"), FakeMesh("edp")
    of = {"experts.w_gate": experts, "experts.w_down": twin, "mixer.wq.weight": dense, "head.weight": dense}
    model = Named(
        DECAY + EXPERTS, mesh=lambda name: next((m for end, m in of.items() if name.endswith(end)), None)
    )
    optimizers = build_optimizers(model, OptimSettings())
    assert groups_of(model, optimizers) == {
        "decay@dp_shardxtp": ["head.weight", "layers.0.mixer.wq.weight"],
        "decay": [
            "layers.0.feedforward.w_up.weight",
            "layers.1.engram.wk.weight",
            "layers.1.feedforward.router.weight",
        ],
        "decay@edp": ["layers.1.feedforward.experts.w_gate"],
        "decay@edp#2": ["layers.1.feedforward.experts.w_down"],
    }


def test_set_learning_rates():
    model = Named(DECAY + NO_DECAY)
    optimizers = build_optimizers(model, OptimSettings(backbone="muon", lr=0.1, muon_lr=0.4))
    for scale in (0.5, 0.25):
        set_learning_rates(optimizers, scale)
    assert {g["name"]: g["lr"] for o in optimizers for g in o.param_groups} == {
        "muon": 0.1,
        "decay": 0.025,
        "no_decay": 0.025,
    }


@pytest.mark.parametrize("backbone", ["adamw", "muon"])
def test_a_step_moves_every_parameter(backbone):
    model = Named(DECAY + NO_DECAY + EXPERTS)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in build_optimizers(model, OptimSettings(backbone=backbone)):
        optimizer.step()
    assert not [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
