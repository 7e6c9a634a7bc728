"""A hybridtrain model for transformers: attention, dense and expert feed-forwards, n-gram lookup memories.

This file stands alone: it needs torch and transformers, and is loaded from a model's folder with
`trust_remote_code=True`. The separator token starts a document; attention, memory n-grams and convolutions
stay inside one. There is no key/value cache: every generated token reads the whole text again.

B batch, T tokens, D model width, H heads, C head or row width, S slots (orders * heads), N = B*T, K experts
per token.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class HybridTrainConfig(PretrainedConfig):
    """`feedforwards` says "dense" or "moe" per layer; `moe` and `engram` are what those parts need, None
    where there are none.
    """

    model_type = "hybridtrain"

    def __init__(
        self,
        vocab_size=0,
        hidden_size=0,
        num_hidden_layers=0,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        rope_theta=10000.0,
        qk_norm=True,
        intermediate_size=0,
        norm_eps=1e-6,
        tie_word_embeddings=False,
        feedforwards=(),
        moe=None,
        engram=None,
        separator_token_id=0,
        max_position_embeddings=0,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.rope_theta = rope_theta
        self.qk_norm = qk_norm
        self.intermediate_size = intermediate_size
        self.norm_eps = norm_eps
        self.feedforwards = list(feedforwards)
        self.moe = moe
        self.engram = engram
        self.separator_token_id = separator_token_id
        self.max_position_embeddings = max_position_embeddings
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.w_gate = nn.Linear(dim, hidden, bias=False)
        self.w_up = nn.Linear(dim, hidden, bias=False)
        self.w_down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.w_down(F.silu(self.w_gate(x)) * self.w_up(x))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim, width = config.hidden_size, config.head_dim
        self.head_dim = width
        self.wq = nn.Linear(dim, config.num_attention_heads * width, bias=False)
        self.wk = nn.Linear(dim, config.num_key_value_heads * width, bias=False)
        self.wv = nn.Linear(dim, config.num_key_value_heads * width, bias=False)
        self.wo = nn.Linear(config.num_attention_heads * width, dim, bias=False)
        self.q_norm = RMSNorm(width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_BTD, rotation_TR, documents_BT, mask_B1TT):
        q, k, v = (w(x_BTD).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(self.q_norm(q), rotation_TR), rotate(self.k_norm(k), rotation_TR)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if mask_B1TT is None:
            out = by_blocks(q, k, v, documents_BT)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask_B1TT, enable_gqa=k.size(1) != q.size(1)
            )
        return self.wo(out.transpose(1, 2).flatten(-2))


MASKED_TOKENS = 2048  # the longest text with a mask of all pairs


def by_blocks(q_BHTC, k_BHTC, v_BHTC, documents_BT, block=256):
    """Attention some queries at a time, each time with the mask of their own rows, which the backward pass
    makes again.
    """

    def attend(q, k, v, start, end):
        place_T = torch.arange(end, device=q.device)
        mask = (place_T[start:, None] >= place_T) & (
            documents_BT[:, start:end, None] == documents_BT[:, None, :end]
        )
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask[:, None], enable_gqa=k.size(1) != q.size(1)
        )

    out = []
    for start in range(0, q_BHTC.size(2), block):
        end = min(start + block, q_BHTC.size(2))
        parts = (q_BHTC[:, :, start:end], k_BHTC[:, :, :end], v_BHTC[:, :, :end], start, end)
        grad = torch.is_grad_enabled() and q_BHTC.requires_grad
        out.append(checkpoint(attend, *parts, use_reentrant=False) if grad else attend(*parts))
    return torch.cat(out, 2)


def rotations(length, width, theta, device):
    """exp(i * position * theta^(-2r/width)), complex64 [T, width/2]."""
    rate_R = theta ** (-torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
    angle_TR = torch.arange(length, dtype=torch.float32, device=device)[:, None] * rate_R
    return torch.polar(torch.ones_like(angle_TR), angle_TR)


def rotate(x_BTHC, rotation_TR):
    """Turn the neighbours (2r, 2r + 1) of every head by the angle of its position."""
    complex_BTHR = torch.view_as_complex(x_BTHC.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(complex_BTHR * rotation_TR[:, None]).flatten(-2).to(x_BTHC.dtype)


class Router(nn.Module):
    """Top-k of the scores plus a selection bias, within the best groups; the gates come from the scores
    alone.
    """

    def __init__(self, dim, moe):
        super().__init__()
        self.moe = moe
        self.weight = nn.Parameter(torch.empty(moe["num_experts"], dim))
        self.register_buffer("bias_E", torch.zeros(moe["num_experts"]))

    def forward(self, x_ND):
        moe = self.moe
        logits_NE = F.linear(x_ND.float(), self.weight.float())
        scores_NE = logits_NE.softmax(-1) if moe["score"] == "softmax" else logits_NE.sigmoid()
        biased_NE = scores_NE + self.bias_E.float()
        if moe["num_groups"] > 1:
            grouped_NGX = biased_NE.unflatten(1, (moe["num_groups"], -1))
            score_NG = grouped_NGX.topk(min(2, grouped_NGX.size(2)), -1).values.sum(-1)
            best_NG = score_NG.topk(moe["top_groups"], -1).indices
            barred_NG = torch.ones_like(score_NG, dtype=torch.bool).scatter_(1, best_NG, False)
            biased_NE = grouped_NGX.masked_fill(barred_NG[:, :, None], -torch.inf).flatten(1)
        experts_NK = biased_NE.topk(moe["top_k"], -1).indices
        gates_NK = scores_NE.gather(1, experts_NK)
        if moe["normalize_gates"]:
            gates_NK = gates_NK / gates_NK.sum(-1, keepdim=True).clamp_min(1e-20)
        return experts_NK, gates_NK * moe["gate_scale"]


class Experts(nn.Module):
    def __init__(self, num_experts, dim, hidden):
        super().__init__()
        self.w_gate = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.w_up = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.w_down = nn.Parameter(torch.empty(num_experts, hidden, dim))

    def forward(self, x_ND, experts_NK, gates_NK):
        out_ND = torch.zeros_like(x_ND)
        for expert in experts_NK.unique().tolist():
            token, k = (experts_NK == expert).nonzero(as_tuple=True)
            x = x_ND[token]
            y = (F.silu(x @ self.w_gate[expert]) * (x @ self.w_up[expert])) @ self.w_down[expert]
            out_ND.index_add_(0, token, y * gates_NK[token, k, None].to(y.dtype))
        return out_ND


class MoE(nn.Module):
    def __init__(self, dim, moe):
        super().__init__()
        self.most = moe["most"]  # tokens that an expert takes of a text; 0: all
        self.router = Router(dim, moe)
        self.experts = Experts(moe["num_experts"], dim, moe["hidden"])
        self.shared = SwiGLU(dim, moe["num_shared"] * moe["hidden"]) if moe["num_shared"] else None

    def forward(self, x_BTD, real_BT=None):
        x_ND = x_BTD.flatten(0, -2)
        experts_NK, gates_NK = self.router(x_ND)
        if self.most:
            gates_NK = self.drop(experts_NK.view(*x_BTD.shape[:2], -1), gates_NK, real_BT)
        y_BTD = self.experts(x_ND, experts_NK, gates_NK).view_as(x_BTD)
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)

    def drop(self, experts_BTK, gates_NK, real_BT):
        """The gates, zero where `most` earlier tokens of the text chose the same expert; padding (not
        `real_BT`) takes no place.
        """
        chosen_BTE = F.one_hot(experts_BTK, self.router.weight.size(0)).sum(2)
        if real_BT is not None:
            chosen_BTE = chosen_BTE * real_BT[:, :, None]
        place_BTK = (chosen_BTE.cumsum(1) - chosen_BTE).gather(2, experts_BTK)
        return gates_NK * (place_BTK < self.most).view_as(gates_NK)


class Engram(nn.Module):
    """Table rows chosen by a hash of the last tokens, gated by how far they agree with the hidden state
    (arXiv 2601.07372).

    A row's number is `mix_n mod prime` with mix_n = x0*m0 xor x1*m1 xor … over the last n compressed ids, in
    int64.
    """

    def __init__(self, config, layer):
        super().__init__()
        engram, dim = config.engram, config.hidden_size
        self.orders, self.boundary, self.pad_id = engram["orders"], engram["boundary"], engram["pad_id"]
        place = engram["layers"].index(layer)
        self.multipliers, self.primes_OK = engram["multipliers"][place], engram["primes"][place]
        self.floor, self.dilation = engram["gate_floor"], engram["orders"][-1]
        width, taps = len(self.orders) * engram["heads"] * engram["head_dim"], engram["conv_kernel"]
        self.tables = nn.ParameterList(
            nn.Parameter(torch.empty(prime, engram["head_dim"]))
            for of_order in self.primes_OK
            for prime in of_order
        )
        self.wk = nn.Linear(width, dim, bias=False)
        self.wv = nn.Linear(width, dim, bias=False)
        self.h_norm = RMSNorm(dim, config.norm_eps)
        self.k_norm = RMSNorm(dim, config.norm_eps)
        self.conv_norm = RMSNorm(dim, config.norm_eps) if taps else None
        self.conv = nn.Parameter(torch.empty(taps, dim)) if taps else None

    def forward(self, h_BTD, compressed_BT, reach_BT, documents_BT):
        e_BTX = self.rows(compressed_BT, reach_BT)
        s_BT1 = (self.h_norm(h_BTD) * self.k_norm(self.wk(e_BTX))).sum(-1, keepdim=True) / math.sqrt(
            h_BTD.size(-1)
        )
        u_BTD = torch.sigmoid(s_BT1.sign() * s_BT1.abs().clamp_min(self.floor).sqrt()) * self.wv(e_BTX)
        if self.conv is None:
            return u_BTD
        return F.silu(self.convolve(self.conv_norm(u_BTD), documents_BT)) + u_BTD

    def rows(self, compressed_BT, reach_BT):
        """The rows of all slots side by side, [B, T, S*C]; `reach_BT` counts the tokens that may be seen to
        the left.
        """
        rows, slot = [], 0
        mix_BT = torch.zeros_like(compressed_BT)
        for back in range(max(self.orders)):
            gram_BT = F.pad(compressed_BT, (back, 0), value=self.pad_id)[:, : compressed_BT.size(1)]
            gram_BT = torch.where(reach_BT >= back, gram_BT, self.pad_id)
            mix_BT = mix_BT ^ (gram_BT * self.multipliers[back])
            if back + 1 in self.orders:
                for prime in self.primes_OK[self.orders.index(back + 1)]:
                    rows.append(F.embedding(torch.remainder(mix_BT, prime), self.tables[slot]))
                    slot += 1
        return torch.cat(rows, -1)

    def convolve(self, x_BTD, documents_BT):
        """Depthwise and causal; tap j reads (J-1-j)*dilation tokens back, never across the start of a
        document.
        """
        taps = self.conv.size(0)
        out_BTD = x_BTD * self.conv[-1]
        for j in range(taps - 1):
            back = (taps - 1 - j) * self.dilation
            if back < x_BTD.size(1):
                same_BT = documents_BT[:, back:] == documents_BT[:, :-back]
                out_BTD = out_BTD + F.pad(
                    x_BTD[:, :-back] * self.conv[j] * same_BT[:, :, None], (0, 0, back, 0)
                )
        return out_BTD


class Layer(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        dim, eps = config.hidden_size, config.norm_eps
        has_engram = config.engram is not None and number in config.engram["layers"]
        self.engram = Engram(config, number) if has_engram else None
        self.mixer_norm, self.feedforward_norm = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.mixer = Attention(config)
        self.is_moe = config.feedforwards[number] == "moe"
        self.feedforward = MoE(dim, config.moe) if self.is_moe else SwiGLU(dim, config.intermediate_size)


class HybridTrainForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = HybridTrainConfig
    base_model_prefix = ""
    # where the config says tie_word_embeddings; transformers leave them apart where both are stored and
    # differ
    _tied_weights_keys: ClassVar = {"head.weight": "embed.weight"}
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.engram is not None:
            self.register_buffer("compression", torch.zeros(config.vocab_size, dtype=torch.int64))
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def set_input_embeddings(self, value):
        self.embed = value

    def get_output_embeddings(self):
        return self.head

    def set_output_embeddings(self, value):
        self.head = value

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, input_ids, attention_mask=None, labels=None, logits_to_keep=0, **kwargs):
        """Logits [B, T, V], or of the last `logits_to_keep` tokens; `attention_mask` [B, T] is 0 on padding,
        left or right.
        """
        starts_BT = input_ids == self.config.separator_token_id
        real_BT = None if attention_mask is None else attention_mask.bool()
        if real_BT is not None:
            starts_BT = starts_BT | (
                real_BT & ~F.pad(real_BT, (1, 0))[:, :-1]
            )  # padding is a document of its own
        documents_BT = starts_BT.cumsum(-1)
        length = input_ids.size(1)
        mask_B1TT = None
        if length <= MASKED_TOKENS:
            mask_B1TT = (documents_BT[:, :, None] == documents_BT[:, None, :]).tril()[:, None]
        rotation_TR = rotations(length, self.config.head_dim, self.config.rope_theta, input_ids.device)
        compressed_BT, reach_BT = self.grams(input_ids, starts_BT, real_BT)
        h_BTD = self.embed(input_ids)
        for layer in self.layers:
            if layer.engram is not None:
                h_BTD = h_BTD + layer.engram(h_BTD, compressed_BT, reach_BT, documents_BT)
            h_BTD = h_BTD + layer.mixer(layer.mixer_norm(h_BTD), rotation_TR, documents_BT, mask_B1TT)
            x_BTD = layer.feedforward_norm(h_BTD)
            h_BTD = h_BTD + (layer.feedforward(x_BTD, real_BT) if layer.is_moe else layer.feedforward(x_BTD))
        if labels is None and logits_to_keep:
            h_BTD = h_BTD[:, -logits_to_keep:]
        logits_BTV = self.head(self.norm(h_BTD))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits_BTV[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV)

    def grams(self, input_ids, starts_BT, real_BT) -> tuple[Tensor | None, Tensor | None]:
        """Compressed ids [B, T] and how many tokens to the left an n-gram may see: to its document, or to the
        text's beginning.
        """
        engram = self.config.engram
        if engram is None:
            return None, None
        position_T = torch.arange(input_ids.size(1), device=input_ids.device)
        bounds_BT = starts_BT
        if engram["boundary"] == "stream":
            bounds_BT = torch.zeros_like(starts_BT)
            if real_BT is not None:
                bounds_BT = real_BT & ~F.pad(real_BT, (1, 0))[:, :-1]
        reach_BT = position_T - torch.where(bounds_BT, position_T, 0).cummax(-1).values
        return self.compression[input_ids], reach_BT
