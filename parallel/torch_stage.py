"""One of this rank's stages, as torch's schedules drive it.

Torch's own stage sends all that its module returns to the next stage. Here a table (streams.py) says which
tensors a stage gets, hands on and keeps, and gradients of a tensor with several readers are put together in a
fixed order. Legend: B sequences, T tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _batch_p2p

from hybridtrain.parallel.collectives import Group, count_receive, count_send
from hybridtrain.parallel.engine import MicroBatches
from hybridtrain.parallel.stages import Stage
from hybridtrain.parallel.streams import StreamPlan


@dataclass(frozen=True)
class StageModule:
    """A stage and its module, called as `module(tokens or tensors by name, documents, index, micro-batch,
    targets)`.

    It returns the tensors that it made by name, none of them a view (zero-bubble schedules detach them in
    place), or the last stage the summed loss. `columns` are its Engram layers among those of this rank.
    """

    stage: Stage
    module: nn.Module
    columns: slice

    def inputs(self, batch: MicroBatches, m: int, tensors: dict[str, Tensor] | None) -> tuple[Any, ...]:
        """The arguments of the module for micro-batch m; the first stage takes tokens in place of tensors."""
        index = batch.index[m][:, :, self.columns] if batch.index is not None else None
        targets = batch.targets_MBT[m] if self.stage.is_last else None
        first = batch.tokens_MBT[m] if self.stage.is_first else tensors
        return first, batch.documents_MBT[m], index, m, targets


@dataclass(frozen=True)
class StepShape:
    """The micro-batches of a step on this rank.

    sequences, tokens: of a micro-batch, as they go into the first stage
    own_tokens: of a sequence between stages; less than `tokens` where ranks share a sequence
    dtype: of what passes between stages
    tokens_per_step: of all ranks
    """

    micro_batches: int
    sequences: int
    tokens: int
    own_tokens: int
    dtype: torch.dtype
    device: torch.device
    tokens_per_step: int

    def between(self, width: int, device: torch.device | str) -> Tensor:
        """An uninitialised tensor [B, T, width] as it passes between stages."""
        return torch.empty((self.sequences, self.own_tokens, width), dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Kept:
    """What the stages of a rank share, by micro-batch and name: sources, and gradients that later stages of
    the rank have for the stage with which the source came."""

    sources: dict[int, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    gradients: dict[int, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))

    def clear(self) -> None:
        self.sources.clear()
        self.gradients.clear()


class TorchStage(PipelineStage):
    """Torch's stage, whose inputs are looked up by micro-batch number instead of cut out of one large batch.

    Buffers are allocated when a receive is begun and let go when the backward pass of their micro-batch is
    through; torch's would live as long as the run. With `sends` the stage begins its sends by itself, where
    torch would begin them too, and ends each as soon as it can: most schedules end them, and let go of what
    was sent, at the end of the step.
    """

    def __init__(
        self, part: StageModule, plan: StreamPlan, pp: Group, shape: StepShape, kept: Kept, sends: bool
    ) -> None:
        stage = part.stage
        self.part, self.pp, self.shape, self.kept, self.sends = part, pp, shape, kept, sends
        self.names, self.widths = plan.stages[stage.number], plan.widths
        self.batch: MicroBatches | None = None
        # by micro-batch: what came for its forward pass, the inputs that its module got, what came back
        self.received: dict[int, dict[str, Tensor]] = {}
        self.inputs: dict[int, dict[str, Tensor]] = {}
        self.returned: dict[int, dict[str, Tensor]] = {}
        self.sending: dict[int, list[dist.Work]] = {}  # of forward passes
        self.returning: list[dist.Work] = []
        # what torch's loop was asked to receive and to send, and still holds when that is done
        self.asked: dict[tuple[int, bool], list[dist.P2POp]] = {}

        def meta(names: tuple[str, ...]) -> tuple[Tensor, ...]:
            return tuple(shape.between(self.widths[name], "meta").requires_grad_() for name in names)

        # with all shapes known torch exchanges none
        tokens_BT = torch.empty((shape.sequences, shape.tokens), dtype=torch.int64, device="meta")
        loss = torch.empty((), device="meta", requires_grad=True)
        super().__init__(
            part.module,
            stage.number,
            stage.num_stages,
            shape.device,
            input_args=tokens_BT if stage.is_first else meta(self.names.enters),
            output_args=loss if stage.is_last else meta(self.names.made),
            group=pp.process_group,
        )
        self._runtime_validate = False  # it expects tensors by position, not by name

    def rank_of(self, stage: int) -> int:
        """The rank in `pp` that has the stage of this number."""
        return int(self.stage_index_to_group_rank[stage])

    def clear_runtime_states(self) -> None:
        super().clear_runtime_states()
        for cache in (self.received, self.inputs, self.returned, self.sending, self.asked, self.kept):
            cache.clear()

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        """No buffers yet, and no peers for torch to check: a stage talks to its neighbours only."""
        self.args_recv_info = dict.fromkeys(range(num_microbatches), ())

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        """No buffers yet."""
        self.chunks = num_microbatches

    # the forward pass

    def take(self, m: int) -> dict[str, Tensor]:
        """The inputs of the module by name, leaves without a graph."""
        received, kept = self.received.pop(m, {}), self.kept.sources[m]
        inputs = {n: (received[n] if n in received else kept[n]).detach() for n in self.names.enters}
        for name in self.names.kept:
            if name in received:
                kept[name] = received[name]
        self.inputs[m] = inputs
        return inputs

    def keep(self, m: int, made: Mapping[str, Tensor]) -> None:
        """Note what the module made of micro-batch m and a later stage of this rank reads."""
        for name in self.names.kept:
            if name in made:
                self.kept.sources[m][name] = made[name].detach()

    def outgoing(self, m: int, made: Mapping[str, Tensor]) -> list[Tensor]:
        """What goes to the next stage: made here, or handed on as it came."""
        return [(made[n] if n in made else self.inputs[m][n]).detach() for n in self.names.sent]

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple[dict[str, Tensor]]:
        self.asked.pop((fwd_chunk_id, False), []).clear()
        inputs = self.take(fwd_chunk_id)
        return ({name: x.requires_grad_(torch.is_grad_enabled()) for name, x in inputs.items()},)

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        assert self.batch is not None
        first, *others = self.part.inputs(self.batch, fwd_chunk_id, None)
        named = dict(
            zip(("documents_BT", "row_index_BTLS", "micro_batch", "targets_BT"), others, strict=True)
        )
        out = super().forward_one_chunk(fwd_chunk_id, (first,), named, save_forward_output)
        if self.is_last:
            return out
        self.keep(fwd_chunk_id, self.made(fwd_chunk_id))
        # only a stage on this rank takes it from here; torch's loops hold on to it for longer than needed
        return (out[0].detach(),) if self.rank_of(self.stage_index + 1) == self.pp.rank else ()

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward_maybe_with_nosync(*args, **kwargs)  # type: ignore[no-untyped-call]
        return out if self.is_last else tuple(out[name] for name in self.names.made)

    def made(self, m: int) -> dict[str, Tensor]:
        return {} if self.is_last else dict(zip(self.names.made, self.fwd_cache[m][0], strict=True))

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        (carry,) = self.names.received  # the rank keeps the sources already
        self.received[mb_index] = {carry: prev_stage_outputs[0]}

    # the backward pass: gradients of one tensor are added up in the order of its own stage, the next stage,
    # later stages of this rank

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple[Tensor, ...]:
        returned, later = self.returned[bwd_chunk_id], self.kept.gradients[bwd_chunk_id]
        # what is left in `returned` is of tensors that were only handed on
        return tuple(_sum(returned.pop(n, None), later.pop(n, None)) for n in self.names.made)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        for work in self.sending.pop(bwd_chunk_id, ()):
            work.wait()  # it has arrived, since its gradient is here
        self.asked.pop((bwd_chunk_id, True), []).clear()
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        if loss is not None:
            loss.detach_()  # torch keeps it until the end of the step, and with its graph the stage's inputs
        gradients = self.bwd_cache.pop(bwd_chunk_id)
        returned = self.returned.pop(bwd_chunk_id, {})
        inputs = self.inputs.pop(bwd_chunk_id, {})
        later, out = self.kept.gradients[bwd_chunk_id], {}
        for name, own in zip(self.names.enters, gradients if self.names.enters else (), strict=True):
            own = torch.zeros_like(inputs[name]) if own is None else own
            total = _sum(own, returned.get(name))
            if name in self.names.received:
                out[name] = _sum(total, later.pop(name, None) if name in self.names.kept else None)
            else:
                later[name] = _sum(later.get(name), total)
        for name in self.names.kept:
            del self.kept.sources[bwd_chunk_id][name]
        self.bwd_cache[bwd_chunk_id] = tuple(out[name] for name in self.names.received)

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        (gradient,) = next_stage_bwd_outputs
        assert gradient is not None
        self.returned[mb_index] = {self.names.sent[0]: gradient}

    # what passes between ranks

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        sent = self.outgoing(fwd_chunk_id, self.made(fwd_chunk_id))
        ops = self._sends(sent, self.stage_index + 1)
        if not self.sends or not ops:
            self.asked[fwd_chunk_id, True] = ops
            return ops
        self.sending[fwd_chunk_id] = _batch_p2p(ops)
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        ops = self._sends(self.bwd_cache.pop(bwd_chunk_id), self.stage_index - 1)
        if not self.sends or not ops:
            return ops
        self.returning = [work for work in self.returning if not work.is_completed()]
        self.returning += _batch_p2p(ops)
        return []

    def end_sends(self) -> None:
        """Wait until the last gradients have left."""
        for work in self.returning:
            work.wait()
        self.returning.clear()

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self.received[fwd_chunk_id] = buffers = self._buffers(self.names.received)
        self.asked[fwd_chunk_id, False] = ops = self._receives(buffers, self.stage_index - 1)
        return ops

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        self.returned[bwd_chunk_id] = buffers = self._buffers(self.names.sent)
        return self._receives(buffers, self.stage_index + 1)

    def receive(self, m: int) -> None:
        """Wait for what the stage before, on another rank, sends of micro-batch m outside of a schedule."""
        self.received[m] = self._buffers(self.names.received)
        for receive in self._receives(self.received[m], self.stage_index - 1):
            dist.recv(
                receive.tensor, group=self.pp.process_group, group_src=self.rank_of(self.stage_index - 1)
            )

    def send(self, m: int, made: Mapping[str, Tensor]) -> list[tuple[Any, Tensor]]:
        """Begin to send micro-batch m to the next stage, on another rank, outside of a schedule: what to wait
        for, and tensors that must live until they have left."""
        peer = self.rank_of(self.stage_index + 1)
        sent = []
        for send in self._sends(self.outgoing(m, made), self.stage_index + 1):
            work = dist.isend(send.tensor, group=self.pp.process_group, group_dst=peer)
            sent.append((work, send.tensor))
        return sent

    def _buffers(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        return {name: self.shape.between(self.widths[name], self.shape.device) for name in names}

    def _sends(self, tensors: Sequence[Any], stage: int) -> list[dist.P2POp]:
        out = []
        for tensor in tensors:
            peer = self._resolve_peer_global_rank(stage)
            count_send(tensor, self.pp, peer)
            out.append(dist.P2POp(dist.isend, tensor.contiguous(), peer, self.group))
        return out

    def _receives(self, buffers: Mapping[str, Tensor], stage: int) -> list[dist.P2POp]:
        out = []
        for buffer in buffers.values():
            peer = self._resolve_peer_global_rank(stage)
            count_receive(self.pp, peer)
            out.append(dist.P2POp(dist.irecv, buffer, peer, self.group))
        return out


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor:
    """Not in place: a gradient may be that of another tensor as well."""
    if first is None or second is None:
        out = second if first is None else first
        assert out is not None, "a tensor that is passed on has no gradient"
        return out
    return first + second
