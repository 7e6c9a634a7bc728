"""Which experts a token goes to, with which gates, and what keeps the experts balanced; float32 throughout.

N tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridtrain.kernels.router_topk.op import Routing, Rule, router_topk
from hybridtrain.model.counters import Counters
from hybridtrain.settings import MoESettings


class Router(nn.Module):
    """Top-k routing with a selection bias, group limits, a global load-balance loss and a z-loss.

    `bias_E` shifts the selection and never the gates (arXiv 2408.15664). `load_E` is the share of each expert in the
    last step's choices over all its tokens.
    """

    bias_E: Tensor
    load_E: Tensor

    def __init__(self, dim: int, moe: MoESettings, tokens_per_step: int) -> None:
        super().__init__()
        self.moe = moe
        self.rule = Rule(moe.top_k, moe.score, moe.normalize_gates, moe.gate_scale, moe.num_groups, moe.top_groups)
        self.tokens_per_step = tokens_per_step
        self.counters = Counters()
        self.weight = nn.Parameter(torch.empty(moe.num_experts, dim))
        self.register_buffer("bias_E", torch.empty(moe.num_experts, dtype=torch.float32))
        self.register_buffer("load_E", torch.empty(moe.num_experts, dtype=torch.float32))
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Before the first step: no bias, uniform load."""
        self.bias_E.zero_()
        self.load_E.fill_(1 / self.moe.num_experts)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """(experts_NK int64, gates_NK float32); the balance losses ride on the gates' gradient."""
        logits_NE = F.linear(x_ND.float(), self.weight.float())
        routing = router_topk(logits_NE, self.bias_E, self.rule)
        return routing.experts_NK, self._balance(routing) if self.training else routing.gates_NK

    def update(self, counts_E: Tensor) -> None:
        """Take in how many pairs each expert got in the step over all ranks; see statistics.py."""
        counts_E = counts_E.to(self.load_E)
        self.load_E.copy_(counts_E / counts_E.sum().clamp_min(1))
        self.bias_E.add_(torch.sign(counts_E.mean() - counts_E), alpha=self.moe.bias_rate)

    def _balance(self, routing: Routing) -> Tensor:
        """The gates with the balance losses attached, after taking the statistics.

        Both losses are sums over local tokens divided by the tokens of the whole step, so they add up over
        micro-batches and ranks to the means over the step, as the main loss does.
        """
        moe, add, gates_NK = self.moe, self.counters.add, routing.gates_NK
        add("expert_tokens", routing.counts_E)
        add("router_entropy", routing.entropy)
        add("router_tokens", torch.full((), float(len(gates_NK)), device=gates_NK.device))
        if moe.aux_weight:
            # f is last step's global load, a constant: a product of two sums over the step would not add up.
            aux = moe.aux_weight * moe.num_experts / self.tokens_per_step * (routing.shares_E @ self.load_E)
            add("aux_loss", aux)
            gates_NK = _attach_loss(gates_NK, aux)
        if moe.z_weight:
            z = moe.z_weight / self.tokens_per_step * routing.z
            add("z_loss", z)
            gates_NK = _attach_loss(gates_NK, z)
        return gates_NK


class _AttachLoss(torch.autograd.Function):
    """The identity on `x`, whose backward also starts `loss` with gradient one.

    For losses that arise inside a pipeline stage, which hands on nothing but activations.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return x.clone()  # a view would be refused as the output of a pipeline stage

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (one,) = ctx.saved_tensors
        return grad, one


_attach_loss: Callable[[Tensor, Tensor], Tensor] = _AttachLoss.apply
