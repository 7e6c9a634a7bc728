"""Pipeline parallelism: this rank's stages of the model under one of torch's schedules.

What passes between stages is the hidden state [B, T, D] alone (under cp and tp this rank's part of it); every
rank has the tokens, document numbers, targets and memory rows of all micro-batches, so nothing else is sent.
Legend: M micro-batches, B sequences, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.tensor import DTensor

from hybridtrain.parallel.collectives import Group, count_receive, count_send, swap
from hybridtrain.parallel.engine import MicroBatches, Phase
from hybridtrain.parallel.stages import SCHEDULES, Stage

_CLASSES: dict[str, Any] = {
    "gpipe": torch_schedules.ScheduleGPipe,
    "1f1b": torch_schedules.Schedule1F1B,
    "interleaved": torch_schedules.ScheduleInterleaved1F1B,
    "zero_bubble": torch_schedules.ScheduleInterleavedZeroBubble,
    "zbv": torch_schedules.ScheduleZBVZeroBubble,
    "dualpipev": torch_schedules.ScheduleDualPipeV,
}


@dataclass(frozen=True)
class StageModule:
    """A stage and its module, called as `module(tokens or hidden state, documents, index, micro-batch,
    targets)`.

    It returns a hidden state that is no view (zero-bubble schedules detach it in place), or the last stage
    the summed loss. `columns` are its memory layers among those of this rank.
    """

    stage: Stage
    module: nn.Module
    columns: slice


class Pipeline:
    """This rank's stages, ascending. `hidden` and `dtype` are shape [B, T, D] and type of what passes between
    stages, `tokens` those of a sequence that go into the first: more than T where ranks share the hidden
    state of a sequence.

    `tied` are the parameters that the first and the last stage both hold, (first stage's, last stage's), None
    where a stage is not here; their gradients are summed, so that equal optimizers keep them equal.
    """

    def __init__(
        self,
        name: str,
        stages: Sequence[StageModule],
        pp: Group,
        device: torch.device,
        hidden: tuple[int, int, int],
        dtype: torch.dtype,
        tokens: int,
        micro_batches: int,
        tokens_per_step: int,
        tied: tuple[nn.Parameter | None, nn.Parameter | None] = (None, None),
    ) -> None:
        self.stages, self.pp, self.device, self.tied = stages, pp, device, tied
        self._hidden = torch.empty(hidden, dtype=dtype, device="meta", requires_grad=True)
        self.copies: Sequence[nn.Parameter] = [tied[1]] if tied[1] is not None else []
        last_rank = 0 if SCHEDULES[name].mirrored else pp.size - 1
        self._pair = (0, last_rank) if pp.rank in (0, last_rank) else None
        self._torch_stages = [_TorchStage(stage, pp, device, self._hidden, tokens) for stage in stages]
        several = issubclass(_CLASSES[name], torch_schedules.PipelineScheduleMulti)
        self._schedule = _CLASSES[name](
            self._torch_stages if several else self._torch_stages[0],
            n_microbatches=micro_batches,
            loss_fn=lambda loss, _: loss / tokens_per_step,
            scale_grads=False,  # the losses are already divided by the tokens of the whole step
        )
        self._numbers = torch.arange(micro_batches)

    def step(self, batch: MicroBatches, last: bool, phase: Phase) -> Tensor:
        """See Schedule. The schedule reduces gradients at the end of every call, so there is one call per
        step.
        """
        assert last, "a pipeline takes all micro-batches of a step at once"
        losses: list[Tensor] = []
        with phase("pipeline"):
            for stage in self._torch_stages:
                stage.batch = batch
            # torch wants a target to call the loss function at all; the real ones go into the last stage
            try:
                self._schedule.step(target=self._numbers, losses=losses, return_outputs=False)
            except RuntimeError as error:  # torch's own, around what went wrong in a stage
                if isinstance(error.__cause__, MemoryError):
                    raise error.__cause__ from None
                raise
            for stage in self._torch_stages:
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
        kept: list[Tensor] = []  # of the stage before, where it is on this rank
        for part, stage in zip(self.stages, self._torch_stages, strict=True):
            before, kept = kept, []
            for m in range(len(batch)):
                h_BTD = before[m] if before else self._receive(stage)
                result: Tensor = part.module(*_inputs(part, batch, m, h_BTD))
                if part.stage.is_last:
                    out[m] = result.double()
                elif (peer := stage.rank_of(part.stage.number + 1)) == self.pp.rank:
                    kept.append(result)
                else:
                    count_send(result, self.pp, self.pp.ranks[peer])
                    work = dist.isend(result, group=self.pp.process_group, group_dst=peer)
                    sent.append((work, result))  # the tensor must live until it has left
        for work, _ in sent:
            work.wait()
        return out

    def _receive(self, stage: _TorchStage) -> Tensor | None:
        if stage.is_first:
            return None
        h_BTD = torch.empty_like(self._hidden, device=self.device, requires_grad=False)
        peer = stage.rank_of(stage.stage_index - 1)
        count_receive(self.pp, self.pp.ranks[peer])
        dist.recv(h_BTD, group=self.pp.process_group, group_src=peer)
        return h_BTD

    def _sum_tied_gradients(self) -> None:
        first, last = (_local_grad(p) for p in self.tied)
        if first is not None and last is not None:
            first += last
            last.copy_(first)
        elif self._pair is not None and (mine := first if first is not None else last) is not None:
            other = swap(mine, self._pair[1 - self._pair.index(self.pp.rank)], self.pp)
            # the first stage's plus the last's on both, so that the copies stay bitwise equal
            mine.copy_(mine + other if first is not None else other + mine)


class _TorchStage(PipelineStage):
    """Torch's stage, whose inputs are looked up by micro-batch number instead of cut out of one large batch."""

    def __init__(
        self, part: StageModule, pp: Group, device: torch.device, h_BTD: Tensor, tokens: int
    ) -> None:
        stage = part.stage
        # with all shapes known torch exchanges none
        tokens_BT = torch.empty((len(h_BTD), tokens), dtype=torch.int64, device="meta")
        loss = torch.empty((), device="meta", requires_grad=True)
        super().__init__(
            part.module,
            stage.number,
            stage.num_stages,
            device,
            input_args=tokens_BT if stage.is_first else h_BTD,
            output_args=loss if stage.is_last else h_BTD,
            group=pp.process_group,
        )
        self.part, self.pp = part, pp
        self.batch: MicroBatches | None = None

    def rank_of(self, stage: int) -> int:
        """The rank in `pp` that has the stage of this number."""
        return int(self.stage_index_to_group_rank[stage])

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        assert self.batch is not None
        first, *others = _inputs(self.part, self.batch, fwd_chunk_id, None)
        named = dict(
            zip(("documents_BT", "row_index_BTLS", "micro_batch", "targets_BT"), others, strict=True)
        )
        return super().forward_one_chunk(fwd_chunk_id, (first,), named, save_forward_output)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._counted(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._counted(super().get_bwd_send_ops(bwd_chunk_id))

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._expected(super().get_fwd_recv_ops(fwd_chunk_id))

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._expected(super().get_bwd_recv_ops(bwd_chunk_id))

    def _counted(self, sends: list[dist.P2POp]) -> list[dist.P2POp]:
        for send in sends:
            count_send(send.tensor, self.pp, send.peer)
        return sends

    def _expected(self, receives: list[dist.P2POp]) -> list[dist.P2POp]:
        for receive in receives:
            count_receive(self.pp, receive.peer)
        return receives


def _inputs(part: StageModule, batch: MicroBatches, m: int, h_BTD: Tensor | None) -> tuple[Any, ...]:
    """The arguments of a stage's module for micro-batch m; the first stage takes tokens in place of a hidden
    state.
    """
    index = batch.index[m][:, :, part.columns] if batch.index is not None else None
    targets = batch.targets_MBT[m] if part.stage.is_last else None
    return batch.tokens_MBT[m] if part.stage.is_first else h_BTD, batch.documents_MBT[m], index, m, targets


def _local_grad(parameter: nn.Parameter | None) -> Tensor | None:
    if parameter is None or parameter.grad is None:
        return None
    return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
