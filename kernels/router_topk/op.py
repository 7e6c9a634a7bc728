"""Routing: Triton in one pass, or the definition itself, which on the CPU is a few passes over a small
matrix.

N tokens, E experts. See reference.py for the definition.
"""

from __future__ import annotations

from torch import Tensor

from hybridtrain.kernels.choose import chosen
from hybridtrain.kernels.router_topk import reference
from hybridtrain.kernels.router_topk.reference import Routing, Rule

__all__ = ["Routing", "Rule", "router_topk"]


def router_topk(logits_NE: Tensor, bias_E: Tensor, rule: Rule) -> Routing:
    """Experts and gates of every token, and the sums over the tokens; logits and bias float32."""
    if chosen("router_topk", logits_NE) == "triton":
        from hybridtrain.kernels.router_topk.kernel import router_topk as fused

        return fused(logits_NE, bias_E, rule)
    return reference.router_topk(logits_NE, bias_E, rule)
