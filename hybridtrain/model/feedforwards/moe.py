"""Mixture of experts: router, dispatch and grouped experts.

B batch, T tokens, N = B*T, D model width, E experts, K experts per token, P = N*K pairs, F expert width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from hybridtrain.kernels.choose import TORCH, Backends
from hybridtrain.kernels.moe_swiglu.op import Choice, ExpertWeights, moe_swiglu
from hybridtrain.kernels.router_topk.op import Routing, Rule, router_topk
from hybridtrain.model.common import CountingModule, local, uncompiled
from hybridtrain.model.component import Cut, FeedForward, Frame, Parameter
from hybridtrain.model.exchanges import Exchanges
from hybridtrain.model.feedforwards.dense import SWIGLU, SwiGLU
from hybridtrain.section import Natural, NonNegative, Positive, Section, divisors_of


class MoESettings(Section):
    num_experts: Positive = Field(8, description="routed experts")
    top_k: Positive = Field(2, description="experts per token")
    hidden: Positive = Field(256, description="width of one expert's SwiGLU")
    num_shared: Natural = Field(0, description="shared experts that see every token, each of width `hidden`")
    score: Literal["softmax", "sigmoid"] = Field("softmax", description="how router logits become scores")
    normalize_gates: bool = Field(True, description="the chosen experts' gates sum to one")
    gate_scale: float = Field(1.0, gt=0, description="factor on the routed output")
    num_groups: Positive = Field(1, description="expert groups of group-limited routing; 1 turns it off")
    top_groups: Positive = Field(1, description="groups a token may choose from")
    bias_rate: NonNegative = Field(
        0.001, description="step of the auxiliary-loss-free selection bias; 0 turns it off"
    )
    aux_weight: NonNegative = Field(0.0, description="weight of the global load-balance loss")
    z_weight: NonNegative = Field(0.0, description="weight of the router z-loss")
    capacity: NonNegative = Field(
        0.0,
        le=1e6,
        description="pairs that an expert takes of a sequence, as a multiple of the even share; it drops "
        "the later tokens'; 0: all",
    )

    def problems(self) -> list[str]:
        out, experts, groups = [], self.num_experts, self.num_groups
        reach = self.top_groups * experts // groups
        if self.top_k > experts:
            out.append(f"top_k={self.top_k} exceeds num_experts={experts}; it may be 1 to {experts}")
        if experts % groups:
            legal = divisors_of(experts)
            out.append(f"num_groups={groups} does not divide num_experts={experts}; it may be {legal}")
        elif self.top_groups > groups:
            out.append(f"top_groups={self.top_groups} exceeds num_groups={groups}; it may be 1 to {groups}")
        elif experts >= self.top_k > reach:
            inside = f"the {reach} experts in top_groups={self.top_groups} groups"
            out.append(f"top_k={self.top_k} exceeds {inside}; it may be 1 to {reach}")
        return out


class Router(CountingModule):
    """Top-k routing with a selection bias, group limits, a global load-balance loss and a z-loss.

    `bias_E` shifts the selection and never the gates (arXiv 2408.15664). `load_E` is the share of each expert
    in the last step's choices over all its tokens.
    """

    bias_E: Tensor
    load_E: Tensor

    def __init__(self, dim: int, moe: MoESettings, tokens_per_step: int, backends: Backends = TORCH) -> None:
        super().__init__()
        self.backends = backends
        self.moe = moe
        limits, losses = (moe.num_groups, moe.top_groups), (moe.aux_weight > 0, moe.z_weight > 0)
        self.rule = Rule(moe.top_k, moe.score, moe.normalize_gates, moe.gate_scale, *limits, *losses)
        self.tokens_per_step = tokens_per_step
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
        routing = router_topk(logits_NE, self.bias_E, self.rule, self.backends)
        return routing.experts_NK, self._balance(routing) if self.training else routing.gates_NK

    def learn(self, sums: Mapping[str, Tensor]) -> None:
        """Take in how many pairs each expert got in the step: shares for the next step's auxiliary loss, and
        a step of the selection bias against them (auxiliary-loss-free balancing, arXiv 2408.15664)."""
        counts_E = sums["expert_tokens"].to(self.load_E)
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
        if routing.shares_E is not None:
            # f is last step's global load, a constant: a product of two sums over the step would not add up.
            aux = moe.aux_weight * moe.num_experts / self.tokens_per_step * (routing.shares_E @ self.load_E)
            add("aux_loss", aux)
            gates_NK = _attach_loss(gates_NK, aux)
        if routing.z is not None:
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


class GroupedExperts(nn.Module):
    """One SwiGLU per expert."""

    def __init__(self, num_experts: int, dim: int, hidden: int, backends: Backends = TORCH) -> None:
        super().__init__()
        self.backends = backends
        self.w_gate = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.w_up = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.w_down = nn.Parameter(torch.empty(num_experts, hidden, dim))

    def forward(
        self,
        x_ND: Tensor,
        experts_NK: Tensor,
        gates_NK: Tensor,
        absent: bool = False,
        present: int | None = None,
    ) -> Tensor:
        """Each token's gated sum over its experts: [N, D]. With `absent`, experts outside 0..E-1 count
        nothing; `present` is how many are inside, where that is known."""
        weights = ExpertWeights(local(self.w_gate), local(self.w_up), local(self.w_down))
        choice = Choice(experts_NK, gates_NK, absent, present)
        return moe_swiglu(x_ND, choice, weights, self.backends)


DROPPED = -1  # no expert's number


class MoE(CountingModule):
    """Routed experts and, where asked for, shared experts that see every token.

    With `moe.capacity` an expert takes the first `most` pairs of each sequence and drops the later ones: a
    drop depends on earlier tokens of the sequence alone, so on no other sequence, no layout and no future.
    Gates stay as they are.
    """

    def __init__(self, moe: MoESettings, frame: Frame, exchanges: Exchanges) -> None:
        super().__init__()
        self.router = Router(frame.dim, moe, frame.tokens_per_step, frame.backends)
        self.experts = GroupedExperts(moe.num_experts, frame.dim, moe.hidden, frame.backends)
        width = moe.num_shared * moe.hidden
        self.shared = SwiGLU(frame.dim, width, frame.backends) if width else None
        even = frame.seq_len * moe.top_k / moe.num_experts
        self.most = math.ceil(moe.capacity * even) if moe.capacity else None
        self.dispatch = exchanges.dispatch(moe.num_experts, self.most is not None, frame.path)
        self.position_in_expert = exchanges.position_in_expert

    @uncompiled  # shapes that only the data know, and products that inductor does not take in float32
    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, -2)
        experts_NK, gates_NK = self.router(x_ND)
        if self.most is not None:
            experts_NK = self._drop(experts_NK.view(*x_BTD.shape[:-1], -1), self.most).flatten(0, -2)
        finish = self.dispatch(x_ND, experts_NK, gates_NK, self.experts)
        shared_BTD = self.shared(x_BTD) if self.shared is not None else None  # while tokens travel
        y_BTD = finish().view_as(x_BTD)
        return y_BTD if shared_BTD is None else y_BTD + shared_BTD

    def _drop(self, experts_BTK: Tensor, most: int) -> Tensor:
        """The experts, with DROPPED in the place of those that are full."""
        dropped_BTK = self.position_in_expert(experts_BTK) >= most
        if self.training:
            self.counters.add("dropped_pairs", dropped_BTK.sum())
        return experts_BTK.masked_fill(dropped_BTK, DROPPED)


def _parameters(moe: MoESettings) -> Mapping[str, Parameter]:
    shared = {f"shared.{name}": parameter for name, parameter in SWIGLU.items()} if moe.num_shared else {}
    return {
        # not for Muon: its rows are compared one by one and are not a linear map between hidden states
        "router.weight": Parameter(Cut.WHOLE, group="adamw"),
        "experts.w_gate": Parameter(Cut.EXPERT_COLUMN),
        "experts.w_up": Parameter(Cut.EXPERT_COLUMN),
        "experts.w_down": Parameter(Cut.EXPERT_ROW, "residual"),
        **shared,
    }


def _shares(moe: MoESettings) -> Mapping[str, float]:
    return dict.fromkeys(("experts.w_gate", "experts.w_up", "experts.w_down"), moe.top_k / moe.num_experts)


def _sums(moe: MoESettings) -> Mapping[str, tuple[int, ...]]:
    optional = {"aux_loss": moe.aux_weight, "z_loss": moe.z_weight, "dropped_pairs": moe.capacity}
    names = ["router_entropy", "router_tokens", *(name for name, on in optional.items() if on)]
    return {"expert_tokens": (moe.num_experts,), **dict.fromkeys(names, ())}


def _divides(moe: MoESettings) -> Mapping[str, int]:
    return {"model.moe.num_shared x hidden": moe.num_shared * moe.hidden}


MOE = FeedForward(
    name="moe",
    section=MoESettings,
    build=MoE,
    parameters=_parameters,
    gathers=("shared",),  # the router and the experts read sequence shards
    divides=_divides,
    shares=_shares,
    sums=_sums,
    ops=("router_topk", "permute", "grouped_mlp", "swiglu"),
    formats=("hf", "megatron"),
)
