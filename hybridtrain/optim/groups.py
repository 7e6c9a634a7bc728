"""Which optimizer and which group each parameter of the model goes to, as it is declared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from hybridtrain.model.component import Parameter
from hybridtrain.model.lm import HybridLM
from hybridtrain.optim.muon import Muon
from hybridtrain.settings.tree import OptimSettings

_FUSED_DEVICES = ("cpu", "cuda")
Group = dict[str, object]
GroupKind = Literal["decay", "no_decay", "muon", "muon_experts"]  # AdamW with and without decay, then Muon


def update_costs(model: nn.Module, optim: OptimSettings) -> dict[nn.Parameter, float]:
    """What an update of each trainable parameter costs, in AdamW's updates of one element.

    Five steps of Muon's iteration make about 20 multiply-adds an element and row of the smaller dimension;
    AdamW moves 28 bytes an element. The ratio is that of a core with 16 multiply-adds a byte moved.
    """
    costs = {}
    parts = [module for module in model.modules() if isinstance(module, HybridLM)]
    for parameter, declared in (pair for part in parts for pair in part.declared_parameters().values()):
        if parameter.requires_grad:
            muon = group_kind(declared, parameter.ndim, optim.backbone == "muon").startswith("muon")
            costs[parameter] = parameter.numel() * (1 + min(parameter.shape[-2:]) / 20 if muon else 1)
    return costs


def _itself(parameter: nn.Parameter) -> Tensor | None:
    return parameter


def build_optimizers(
    model: nn.Module,
    optim: OptimSettings,
    updated_here: Callable[[nn.Parameter], Tensor | None] = _itself,
) -> list[torch.optim.Optimizer]:
    """The optimizers of all trainable parameters but the table's rows (`rows.`), which have their own.

    `updated_here` says what they update in the place of a parameter; None: another rank does.

    Every group carries `name`, unique over all optimizers, and `peak_lr`. Parameters on different device
    meshes never share a group, because fused and foreach kernels cannot mix them. `model` may also be a
    container of several pipeline stages.
    """
    members: dict[tuple[GroupKind, int], list[Tensor]] = {}
    meshes: list[object] = []
    parts = [module for module in model.modules() if isinstance(module, HybridLM)]
    for parameter, declared in (pair for part in parts for pair in part.declared_parameters().values()):
        kind = group_kind(declared, parameter.ndim, optim.backbone == "muon")
        if not parameter.requires_grad:
            continue
        mesh = getattr(parameter, "device_mesh", None)
        if mesh not in meshes:
            meshes.append(mesh)
        updated = updated_here(parameter)
        members.setdefault((kind, meshes.index(mesh)), []).extend([] if updated is None else [updated])

    labels = _mesh_labels(meshes)
    adamw: list[Group] = []
    muon: list[Group] = []
    for (kind, mesh_number), parameters in members.items():
        decay = 0.0 if kind == "no_decay" else optim.weight_decay
        lr = optim.muon_lr if kind.startswith("muon") else optim.lr
        group: Group = {
            "params": parameters,
            "name": kind + labels[mesh_number],
            "lr": lr,
            "peak_lr": lr,
            "weight_decay": decay,
        }
        if kind.startswith("muon"):
            muon.append({**group, "input_first": kind == "muon_experts"})
        else:
            adamw.append(group)

    out: list[torch.optim.Optimizer] = []
    if muon:
        out.append(Muon(muon, lr=optim.muon_lr, momentum=optim.muon_momentum))
    if adamw:
        fused = all(
            p.device.type in _FUSED_DEVICES
            for (kind, _), ps in members.items()
            if not kind.startswith("muon")
            for p in ps
        )
        out.append(
            torch.optim.AdamW(
                adamw, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=fused
            )
        )
    return out


def group_kind(declared: Parameter, ndim: int, muon: bool) -> GroupKind:
    """The optimizer and the decay of a parameter; experts are stacks of matrices."""
    if declared.group == "no_decay":
        return "no_decay"
    if not muon or declared.group == "adamw":
        return "decay"
    return "muon" if ndim == 2 else "muon_experts"


def _mesh_labels(meshes: list[object]) -> list[str]:
    """A suffix per mesh, all different: its axes' names, nothing for plain tensors."""
    labels: list[str] = []
    for mesh in meshes:
        names = getattr(mesh, "mesh_dim_names", None) or ("mesh",)
        label = "" if mesh is None else "@" + "x".join(names)
        number = sum(other == label or other.startswith(label + "#") for other in labels)
        labels.append(f"{label}#{number + 1}" if number else label)
    return labels
