"""Context parallelism: the tokens of a sequence spread over `cp` ranks, keys and values gathered, queries
local.

A sequence is cut into 2·cp chunks; rank r holds chunks r and 2·cp-1-r. A causal query reads the keys up to
its own chunk, so the two chunks together cost every rank the same (the split of Llama 3, arXiv 2407.21783
§3.3.2).

Shape legend: B sequences, T tokens of a whole sequence, t = T / cp tokens here, C = T / (2·cp) tokens of a
chunk, H heads, X head width, D model width, J kernel taps, W channels of a scan.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridtrain.kernels.document_attention.op import document_attention
from hybridtrain.kernels.engram.op import ConvRule, short_conv
from hybridtrain.model.common import SequenceContext
from hybridtrain.model.exchanges import Convolve, position_in_expert
from hybridtrain.model.scan import affine_scan
from hybridtrain.parallel.collectives import Group, all_gather_autograd


class ContextParallel:
    """This rank's chunks, and the exchanges that a layer needs: keys and values, the state of a scan, the
    convolution's left edge, and under a capacity who chose which expert."""

    def __init__(self, group: Group, seq_len: int, convolve: Convolve = short_conv) -> None:
        self.group, self._convolve = group, convolve
        self.chunk = seq_len // (2 * group.size)
        self.chunks = (group.rank, 2 * group.size - 1 - group.rank)
        every = [chunk for rank in range(group.size) for chunk in (rank, 2 * group.size - 1 - rank)]
        # where chunk i lies among the gathered ones
        self._order = [every.index(chunk) for chunk in range(len(every))]

    def positions(self) -> Tensor:
        """int64 [t]: the places in the sequence of the tokens that this rank holds, in its order."""
        return torch.cat([torch.arange(self.chunk) + chunk * self.chunk for chunk in self.chunks])

    def attend(self, q_BtHX: Tensor, k_BtHX: Tensor, v_BtHX: Tensor, context: SequenceContext) -> Tensor:
        """Softmax attention of this rank's queries over the whole sequence; `context.mask_B1TT` is [B, 1, t,
        T], or None where there are `context.spans`."""
        kv = torch.stack([k_BtHX, v_BtHX])  # one exchange for both
        k_BTHX, v_BTHX = self._gather(kv, dim=2)
        out = []
        for place, chunk in enumerate(self.chunks):
            here, seen = slice(place * self.chunk, (place + 1) * self.chunk), (chunk + 1) * self.chunk
            if context.spans is not None:
                q, k, v = q_BtHX[:, here], k_BTHX[:, :seen], v_BTHX[:, :seen]
                out.append(
                    document_attention(q, k, v, context.documents_BT, context.spans, chunk * self.chunk)
                )
                continue
            mask = context.mask_B1TT
            assert mask is not None  # for the type checker: make_context gives a part one of the two
            out_BHCX = F.scaled_dot_product_attention(
                q_BtHX[:, here].transpose(1, 2),
                k_BTHX[:, :seen].transpose(1, 2),
                v_BTHX[:, :seen].transpose(1, 2),
                attn_mask=mask[:, :, here, :seen],
                enable_gqa=k_BTHX.size(2) != q_BtHX.size(2),
            )
            out.append(out_BHCX.transpose(1, 2))
        return torch.cat(out, dim=1)

    def scan(self, factor_BtW: Tensor, input_BtW: Tensor, context: SequenceContext) -> Tensor:
        """See `Scan`: every chunk is scanned from zero, and then the contribution of the state before it is
        added.

        A chunk's last product and last state determine what it makes of the state before it. Those of all
        chunks are gathered, in float32: 4 B·W numbers of each rank, however long the sequence.
        """
        factor_BtW = self._stop_at_documents(factor_BtW, context.documents_BT)
        scans = [
            affine_scan(*both)
            for both in zip(factor_BtW.chunk(2, dim=1), input_BtW.chunk(2, dim=1), strict=True)
        ]
        last = torch.stack([torch.stack([x[:, -1].float() for x in scan]) for scan in scans])
        gathered = all_gather_autograd(last, self.group).flatten(0, 1)  # [2 cp, 2, B, W], by rank and place
        before_BW = torch.zeros_like(gathered[0, 0])  # the state that reaches the chunk
        before = []
        for place in self._order:
            before.append(before_BW)
            product_BW, state_BW = gathered[place]
            before_BW = product_BW * before_BW + state_BW
        out = [
            state_BCW + (product_BCW.float() * before[chunk][:, None]).to(state_BCW.dtype)
            for (product_BCW, state_BCW), chunk in zip(scans, self.chunks, strict=True)
        ]
        return torch.cat(out, dim=1)

    def _stop_at_documents(self, factor_BtW: Tensor, documents_BT: Tensor | None) -> Tensor:
        """The factors here, zero at the first token of every document."""
        if documents_BT is None:
            return factor_BtW
        here_t = self.positions().to(documents_BT.device)
        same_Bt = documents_BT[:, here_t] == documents_BT[:, (here_t - 1).clamp_min(0)]
        return factor_BtW * same_Bt[..., None]

    def convolve(
        self,
        x_BtD: Tensor,
        weight_D: Tensor,
        kernel_JD: Tensor,
        documents_BT: Tensor | None,
        rule: ConvRule,
    ) -> Tensor:
        """The short convolution with its norm, each chunk with the tokens left of it from the rank that has
        them.
        """
        halo = (kernel_JD.size(0) - 1) * rule.dilation
        tails = torch.stack([chunk[:, self.chunk - halo :] for chunk in x_BtD.chunk(2, dim=1)])
        gathered = all_gather_autograd(tails, self.group).flatten(
            0, 1
        )  # [2 cp, B, halo, D], by rank and place
        out = []
        for x_BCD, chunk in zip(x_BtD.chunk(2, dim=1), self.chunks, strict=True):
            left = gathered[self._order[chunk - 1]] if chunk else torch.zeros_like(gathered[0])
            documents = None
            if documents_BT is not None:
                start = chunk * self.chunk
                before = (
                    documents_BT[:, start - halo : start]
                    if chunk
                    else documents_BT.new_full((len(x_BCD), halo), -1)
                )
                documents = torch.cat([before, documents_BT[:, start : start + self.chunk]], dim=1)
            wide = torch.cat([left, x_BCD], dim=1)
            out.append(self._convolve(wide, weight_D, kernel_JD, documents, rule)[:, halo:])
        return torch.cat(out, dim=1)

    def position_in_expert(self, experts_BtK: Tensor) -> Tensor:
        """The places of this rank's pairs in the lines of whole sequences; expert numbers alone are sent."""
        parts = position_in_expert(self._gather(experts_BtK, dim=1)).split(self.chunk, dim=1)
        return torch.cat([parts[chunk] for chunk in self.chunks], dim=1)

    def _gather(self, x: Tensor, dim: int) -> Tensor:
        """Every rank's chunks along `dim`, in the order of the sequence."""
        parts = all_gather_autograd(x, self.group)
        chunks = [chunk for rank in parts for chunk in rank.chunk(2, dim=dim)]
        return torch.cat([chunks[place] for place in self._order], dim=dim)
