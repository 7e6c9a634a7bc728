"""Pipeline parallelism: this rank's stages of the model under one of torch's schedules.

Stages pass on what the residual scheme carries there (streams.py), under cp and tp this rank's part of it;
every rank has the tokens, document numbers, targets and table rows of all micro-batches, so nothing else is
sent. Legend: M micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.tensor import DTensor

from hybridtrain.choices import ScheduleName
from hybridtrain.parallel.collectives import Group, swap
from hybridtrain.parallel.engine import MicroBatches
from hybridtrain.parallel.interfaces import Phase
from hybridtrain.parallel.stages import SCHEDULES
from hybridtrain.parallel.streams import StreamPlan
from hybridtrain.parallel.torch_stage import Kept, StageModule, StepShape, TorchStage

_CLASSES: dict[ScheduleName, Any] = {
    "gpipe": torch_schedules.ScheduleGPipe,
    "1f1b": torch_schedules.Schedule1F1B,
    "interleaved": torch_schedules.ScheduleInterleaved1F1B,
    "zero_bubble": torch_schedules.ScheduleInterleavedZeroBubble,
    "zbv": torch_schedules.ScheduleZBVZeroBubble,
    "dualpipev": torch_schedules.ScheduleDualPipeV,
}


class Pipeline:
    """This rank's stages, ascending, with the tables of all stages.

    `tied` are the parameters that the first and the last stage both hold, (first stage's, last stage's), None
    where a stage is not here; their gradients are summed, so that equal optimizers keep them equal.
    """

    def __init__(
        self,
        name: ScheduleName,
        stages: Sequence[StageModule],
        plan: StreamPlan,
        pp: Group,
        shape: StepShape,
        tied: tuple[nn.Parameter | None, nn.Parameter | None] = (None, None),
    ) -> None:
        self.stages, self.pp, self.device, self.tied = stages, pp, shape.device, tied
        self.copies: Sequence[nn.Parameter] = [tied[1]] if tied[1] is not None else []
        last_rank = 0 if SCHEDULES[name].mirrored else pp.size - 1
        self._pair = (0, last_rank) if pp.rank in (0, last_rank) else None
        sends = name != "1f1b"  # that one begins a send and a receive as one
        kept = Kept()
        self.torch_stages = [TorchStage(stage, plan, pp, shape, kept, sends) for stage in stages]
        several = issubclass(_CLASSES[name], torch_schedules.PipelineScheduleMulti)
        self._schedule = _CLASSES[name](
            self.torch_stages if several else self.torch_stages[0],
            n_microbatches=shape.micro_batches,
            loss_fn=lambda loss, _: loss / shape.tokens_per_step,
            scale_grads=False,  # the losses are already divided by the tokens of the whole step
        )
        self._numbers = torch.arange(shape.micro_batches)

    def step(self, batch: MicroBatches, last: bool, phase: Phase) -> Tensor:
        """See Schedule. The schedule reduces gradients at the end of every call, so there is one call per
        step.
        """
        assert last, "a pipeline takes all micro-batches of a step at once"
        losses: list[Tensor] = []
        with phase("pipeline"):
            for stage in self.torch_stages:
                stage.batch = batch
            # torch wants a target to call the loss function at all; the real ones go into the last stage
            try:
                self._schedule.step(target=self._numbers, losses=losses, return_outputs=False)
            except RuntimeError as error:  # torch's own, around what went wrong in a stage
                if isinstance(error.__cause__, MemoryError):
                    raise error.__cause__ from None
                raise
            for stage in self.torch_stages:
                stage.end_sends()
                stage.batch = None
            self._sum_tied_gradients()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in losses:
            loss += part.detach()
        return loss

    @torch.no_grad()
    def losses(self, batch: MicroBatches) -> Tensor:
        """See Schedule. Stage by stage, all micro-batches each, while the next stage's rank works on those
        before.
        """
        out = torch.zeros(len(batch), dtype=torch.float64, device=self.device)
        sent: list[tuple[Any, Tensor]] = []
        local: list[Tensor] = []  # carries of the stage before, where it is on this rank
        for part, stage in zip(self.stages, self.torch_stages, strict=True):
            before, local = local, []
            for m in range(len(batch)):
                if before:
                    stage.set_local_fwd_input((before[m],), m)
                elif not part.stage.is_first:
                    stage.receive(m)
                inputs = None if part.stage.is_first else stage.take(m)
                result = part.module(*part.inputs(batch, m, inputs))
                if part.stage.is_last:
                    out[m] = result.double()
                    continue
                stage.keep(m, result)
                if stage.rank_of(part.stage.number + 1) == self.pp.rank:
                    local.append(next(iter(result.values())))
                else:
                    sent += stage.send(m, result)
        for work, _ in sent:
            work.wait()
        for stage in self.torch_stages:
            stage.clear_runtime_states()
        return out

    def _sum_tied_gradients(self) -> None:
        first, last = (_local_grad(p) for p in self.tied)
        if first is not None and last is not None:
            first += last
            last.copy_(first)
        elif self._pair is not None and (mine := first if first is not None else last) is not None:
            other = swap(mine, self._pair[1 - self._pair.index(self.pp.rank)], self.pp)
            # the first stage's plus the last's on both, so that the copies stay bitwise equal
            mine.copy_(mine + other if first is not None else other + mine)


def _local_grad(parameter: nn.Parameter | None) -> Tensor | None:
    if parameter is None or parameter.grad is None:
        return None
    return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
