"""Our model as DeepSpeed must see it: with experts that it recognizes, without our table, and with our
groups.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hybridtrain.parallel.mesh import Mesh


def take_out(outside: nn.Module, model: nn.Module) -> None:
    """Leave `outside` where it is as an attribute, but not as a submodule: ZeRO-0 would average whatever
    parameters it finds.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child is outside:
                del module._modules[name]
                module.__dict__[name] = child


def own_experts(deepspeed: Any, model: nn.Module, mesh: Mesh) -> frozenset[str]:
    """Put plain local parameters in the place of experts cut over ep, marked as DeepSpeed marks them; returns
    their names.

    A parameter marked so is reduced and partitioned over edp alone.
    """
    group, found = f"ep_size_{mesh.layout.ep}", set()
    for prefix, module in model.named_modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if isinstance(param, DTensor):
                local: Any = nn.Parameter(param.to_local())
                local.allreduce, local.group_name = False, group
                module.register_parameter(name, local)
                found.add(f"{prefix}.{name}")
    if found and mesh.expert_mesh is not None:
        groups = deepspeed.utils.groups
        groups._EXPERT_PARALLEL_GROUP[group] = mesh.expert_mesh.get_group("ep")
        groups._EXPERT_DATA_PARALLEL_GROUP[group] = mesh.expert_mesh.get_group("edp")
    return frozenset(found)


def as_moe(deepspeed: Any, model: nn.Module) -> nn.Module:
    """The model inside a module of DeepSpeed's own MoE class: only where it finds one does it reduce marked
    experts over edp.
    """

    class Root(deepspeed.moe.layer.MoE):  # type: ignore[misc]
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.model, self.num_experts = model, 0

        def set_deepspeed_parallelism(self, *_: Any) -> None:
            """Nothing to do: the groups exist already."""

        def forward(self, *inputs: Any) -> Tensor:
            output: Tensor = self.model(*inputs)
            return output

    return Root()


class Groups:
    """The process groups that DeepSpeed asks a model-parallel unit for: every rank reads other tokens, none
    shares a matrix.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.world = mesh.world

    def get_data_parallel_group(self) -> Any:
        return dist.group.WORLD

    def get_data_parallel_world_size(self) -> int:
        return self.world.size

    def get_data_parallel_rank(self) -> int:
        return self.world.rank

    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0
