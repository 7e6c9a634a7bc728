"""Residual schemes by name: how layers read what came before them."""

from hybridtrain.model.component import Residual
from hybridtrain.model.residuals.add import ADD
from hybridtrain.model.residuals.dense_former import DENSE_FORMER

RESIDUALS: dict[str, Residual] = {scheme.name: scheme for scheme in (ADD, DENSE_FORMER)}
