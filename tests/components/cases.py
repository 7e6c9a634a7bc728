"""Every registered component with small settings: those of the package, Engram and the examples."""

from __future__ import annotations

from hybridtrain.model.engram import ENGRAM
from hybridtrain.model.feedforwards.dense import DENSE, DenseSettings
from hybridtrain.model.feedforwards.moe import MOE, MoESettings
from hybridtrain.model.mixers.attention import ATTENTION, AttentionSettings
from hybridtrain.model.registry import Components
from hybridtrain.model.residuals.add import ADD, AddSettings
from hybridtrain.model.residuals.dense_former import DENSE_FORMER, DenseFormerSettings
from hybridtrain.settings.engram import EngramSettings
from tests.components import fakes
from tests.components.contract import Case

OUTSIDE = Components.load(("examples.gated_recurrence", "examples.scaled_residual"))
MOE_SMALL = MoESettings(num_experts=4, hidden=16, num_shared=1, aux_weight=0.01, z_weight=0.01)
CASES = {
    "attention": Case(ATTENTION, AttentionSettings(num_heads=4, num_kv_heads=2, head_dim=8)),
    "dense": Case(DENSE, DenseSettings(hidden=48)),
    "moe": Case(MOE, MOE_SMALL),
    "engram": Case(ENGRAM, EngramSettings(heads=2, head_dim=8)),
    "add": Case(ADD, AddSettings()),
    "dense_former": Case(DENSE_FORMER, DenseFormerSettings()),
    **{c.name: Case(c, c.section()) for c in OUTSIDE.added},
}
CAPACITY = {"moe with a capacity": Case(MOE, MoESettings(num_experts=4, hidden=16, capacity=0.5))}
"""Not for every check: what it drops of a document depends on those before it in the sequence, by design."""

SOUND = {component.name: Case(component, component.section()) for component in fakes.SOUND}
"""Fakes without a fault."""
