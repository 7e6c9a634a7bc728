"""DeepSpeed as the engine: ZeRO 0 to 3 over all ranks, with our dispatch of tokens, our table and our
checkpoints.

This file and deepspeed_model.py rely on public names of DeepSpeed and on four others, which `REQUIRED` pins
to the versions tried: gradients stand in `averaged_gradients`, fp32 weights in the flat partitions of the
optimizer, moments are linked by `_lazy_init_…`, and expert groups are looked up in `deepspeed.utils.groups`.
"""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from hybridtrain.parallel.deepspeed_model import Groups, as_moe, own_experts, take_out
from hybridtrain.parallel.engine import Accumulation, clip_, global_squares
from hybridtrain.parallel.interfaces import Schedule
from hybridtrain.parallel.mesh import Mesh

REQUIRED = ((0, 19, 8), (0, 20))  # from, below
MOMENTS = ("exp_avg", "exp_avg_sq")
_BUCKET = 500_000_000  # elements: DeepSpeed's default, an upper bound here


def missing() -> str | None:
    """What to install where DeepSpeed is missing or has a version that this file was not written for; else
    None.
    """
    low, below = (".".join(map(str, version)) for version in REQUIRED)
    wanted = (
        f"deepspeed >= {low}, < {below}; pip install 'hybridtrain[deepspeed]', or set train.engine=native"
    )
    try:
        found = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return f"needs {wanted}"
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:3] if part.isdigit())
    return None if REQUIRED[0] <= numbers < REQUIRED[1] else f"finds deepspeed {found} but needs {wanted}"


@dataclass(frozen=True)
class ZeroSettings:
    """What DeepSpeed is told. A step has `micro_batches` of `micro_batch` sequences on each rank, and
    `tokens_per_step` tokens over all ranks.
    """

    stage: Literal[0, 1, 2, 3]
    offload_optimizer: bool
    micro_batch: int
    micro_batches: int
    tokens_per_step: int


class DeepSpeedEngine:
    """An `Engine` (engine.py) of the whole model (pp 1, tp 1): see there for what its methods promise."""

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        mesh: Mesh,
        outside: nn.Module,
        zero: ZeroSettings,
    ) -> None:
        """`model` has whole parameters, but experts cut over ep as DTensors; `make_optimizer` makes an AdamW
        of them. `outside` is a module inside it whose parameters the engine does not touch.
        """
        deepspeed = _import(mesh.device)
        if not dist.is_initialized():  # a single rank, for which mesh.py starts nothing
            os.environ.setdefault("LOCAL_RANK", "0")
            dist.init_process_group(
                "nccl" if mesh.device.type == "cuda" else "gloo", store=HashStore(), rank=0, world_size=1
            )
        self.name = f"deepspeed {deepspeed.__version__}, ZeRO-{zero.stage}" + (
            ", optimizer on the CPU" if zero.offload_optimizer else ""
        )
        self.model, self.mesh, self.zero_stage, self.offload = model, mesh, zero.stage, zero.offload_optimizer
        take_out(outside, model)
        self.experts = own_experts(deepspeed, model, mesh)
        self.params = dict(model.named_parameters())
        self.optimizer = make_optimizer(model)
        root = model
        if self.experts:
            split = deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer
            self.optimizer.param_groups[:] = split(self.optimizer.param_groups)
            root = as_moe(deepspeed, model)
        elements = sum(p.numel() for p in self.params.values())
        config = _config(zero, elements, mesh.device)
        self.engine, *_ = deepspeed.initialize(
            model=root, optimizer=self.optimizer, config=config, mpu=Groups(mesh)
        )
        self.allocate_state()
        self.optimizers: Sequence[torch.optim.Optimizer] = [self.optimizer]
        boundary = self.engine.set_gradient_accumulation_boundary
        self.schedule: Schedule = _EngineAccumulation(
            self.engine, zero.tokens_per_step, mesh.device, expect_last=boundary
        )

    def squares(self, rows_ND: Tensor | None) -> Tensor:
        grads = self._gradients()
        # DeepSpeed averages over ranks; every loss is divided by the tokens of the whole step already
        torch._foreach_mul_(grads, self.mesh.world.size)
        layout = self.mesh.layout
        whole = [layout.edp if name in self.experts else layout.world for name in self.params]
        held_by = whole if self.zero_stage == 0 else [1] * len(grads)
        return global_squares(grads, rows_ND, self.mesh, [n * layout.dp_replicate for n in held_by])

    def clip(self, rows_ND: Tensor | None, norm: float, bound: float) -> None:
        clip_([*self._gradients(), *([] if rows_ND is None else [rows_ND])], norm, bound)

    def step(self) -> None:
        self.engine.step()

    def clear_gradients(self) -> None:
        self.engine.optimizer.zero_grad()

    def allocate_state(self) -> None:
        """Done at the start: DeepSpeed's links to moments are made in the first group's first step, when
        other groups have none.
        """
        if self.optimizer.state:
            return
        for part in self._parts():
            self.optimizer.state[part] = {"step": torch.zeros((), device=part.device)}
            self.optimizer.state[part] |= {key: torch.zeros_like(part) for key in MOMENTS}
        if self.zero_stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def state(self, stage: int, with_copies: bool = True) -> dict[str, Tensor]:
        """What ZeRO cuts flat is gathered tensor by tensor and cut again by rows, as checkpoints need it."""
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        slots = self.optimizer.state
        for name, param in self.params.items():
            if self.zero_stage == 0:
                state |= {
                    f"optim.{name}.{key}": self._held(name, value) for key, value in slots[param].items()
                }
            else:
                state[f"optim.{name}.step"] = slots[self._parts()[0]]["step"].clone()
                state |= {f"optim.{name}.{key}": self._cut(name, _gather(param, key)) for key in MOMENTS}
            weight = param.detach() if self.zero_stage < 3 else _gather(param)
            state[f"model.{name}"] = (
                self._held(name, weight) if self.zero_stage < 3 else self._cut(name, weight)
            )
        return state

    def load_state(self, stage: int, state: dict[str, Tensor]) -> None:
        if self.zero_stage == 0:
            return  # `state` returned the tensors themselves
        for part in self._parts():
            self.optimizer.state[part]["step"].copy_(state[f"optim.{next(iter(self.params))}.step"])
        for name, param in self.params.items():
            _scatter(param, self._uncut(name, state[f"model.{name}"]))
            for key in MOMENTS:
                _scatter(param, self._uncut(name, state[f"optim.{name}.{key}"]), key)

    def _parts(self) -> list[Tensor]:
        """What the optimizer updates: this rank's flat parts of its groups, or whole parameters (ZeRO-0)."""
        if self.zero_stage == 0:
            return list(self.params.values())
        zero = self.engine.optimizer
        parts: list[Tensor] = (
            zero.single_partition_of_fp32_groups if self.zero_stage < 3 else zero.fp32_partitioned_groups_flat
        )
        return parts

    def _gradients(self) -> list[Tensor]:
        """The averaged gradients that the optimizer will take: of this rank's parts, or of whole parameters,
        in order (ZeRO-0).
        """
        if self.zero_stage and not self.offload:
            return [grad for group in self.engine.optimizer.averaged_gradients.values() for grad in group]
        if self.offload and self.mesh.device.type == "cuda":
            torch.cuda.synchronize()  # they are still on their way to the CPU
        return [part.grad for part in self._parts() if part.grad is not None]

    def _places(self, name: str) -> tuple[DeviceMesh | None, list[Placement], list[Placement]]:
        """Over which ranks a parameter lies, as they hold it and as they save it."""
        if name in self.experts:
            return (
                self.mesh.expert_mesh,
                [Replicate(), Shard(0)],
                [Shard(1), Shard(0)],
            )  # (edp, ep), as apply.py cuts them
        return self.mesh.dense_mesh, [Replicate()], [Shard(0)]

    def _held(self, name: str, value: Tensor) -> Tensor:
        """The same storage; experts as DTensors that know their place. A tensor that all ranks hold is saved
        once as it is.
        """
        mesh, held, _ = self._places(name)
        return (
            DTensor.from_local(value, mesh, held, run_check=False)
            if name in self.experts and value.ndim
            else value
        )

    def _cut(self, name: str, value: Tensor) -> Tensor:
        """This rank's part of a tensor that ranks hold together; the rest of `value` is not needed."""
        mesh, held, saved = self._places(name)
        return (
            DTensor.from_local(value, mesh, held, run_check=False).redistribute(placements=saved)
            if mesh is not None
            else value
        )

    def _uncut(self, name: str, value: Tensor) -> Tensor:
        """The tensor that `_cut` was given."""
        return (
            value.redistribute(placements=self._places(name)[1]).to_local()
            if isinstance(value, DTensor)
            else value
        )


class _EngineAccumulation(Accumulation):
    """Forward and backward through DeepSpeed's engine."""

    def _backward(self, loss: Tensor) -> None:
        self.model.backward(loss, scale_wrt_gas=False)  # type: ignore[operator]


def _import(device: torch.device) -> Any:
    """The package, for this device; what it would compile or warn of without need is turned off."""
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning
    )  # it calls them by old names
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed
    import deepspeed.moe.layer
    import deepspeed.moe.utils

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
        False  # compiled on first use, for minutes; gloo does
    )
    return deepspeed


def _config(zero: ZeroSettings, elements: int, device: torch.device) -> dict[str, Any]:
    bucket = min(_BUCKET, elements)  # allocated whole, however small the model
    optimization: dict[str, Any] = {"stage": zero.stage, "reduce_bucket_size": bucket}
    if zero.offload_optimizer:
        optimization["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    elif zero.stage in (1, 2):
        optimization["compute_grad_norm"] = False  # ours counts the table as well
    return {
        "train_micro_batch_size_per_gpu": zero.micro_batch,
        "gradient_accumulation_steps": zero.micro_batches,
        "gradient_clipping": 0.0,  # its default is 1.0; ours counts the table as well
        "zero_optimization": optimization,
        "zero_force_ds_cpu_optimizer": False,  # its own CPU optimizer is compiled on first use, for minutes
    }


def _gather(param: nn.Parameter, key: str | None = None) -> Tensor:
    """A parameter's fp32 weights or one of its moments, whole (of experts: this rank's), from the ranks that
    ZeRO cut it over.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    value: Tensor = (
        safe_get_full_fp32_param(param) if key is None else safe_get_full_optimizer_state(param, key)
    )
    return value


def _scatter(param: Any, value: Tensor, key: str | None = None) -> None:
    """The opposite of `_gather`; under ZeRO-3 with the weights that the model computes with."""
    from deepspeed import utils

    if not hasattr(param, "ds_id"):
        if key is None:
            utils.safe_set_full_fp32_param(param, value)
        else:
            utils.safe_set_full_optimizer_state(param, value, key)
        return
    # of ZeRO-3's setters only the local ones can set the last rank's part, which is padded
    size = param.ds_tensor.numel()
    padded = torch.nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    part = padded.narrow(0, size * dist.get_rank(), size)
    if key is None:
        param.ds_tensor.copy_(part)
        utils.safe_set_local_fp32_param(param, part)
    else:
        utils.safe_set_local_optimizer_state(param, part, key)
