"""What a sparse model costs where zeros cost nothing: the figures that papers on sparsity state.

Weights of convolutions and linear layers can be sparse; biases, norms and scales count whole. A layer's MACs go with
the share of its weights that is not zero. It is a count: ordinary kernels multiply by zero as by anything else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError, did_you_mean
from zoo.sparsity.densities import RULES, densities, has_weight

if TYPE_CHECKING:
    from zoo.profiling.report import ModuleCost

ZEROS = "zeros"  # the rule of densities that are counted in the weights


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Effective:
    """What is left of a model's costs without its zeros.

    Attributes:
        rule: "zeros", counted in the weights, or the rule that spreads a stated sparsity over the layers.
        density: share of the weights of convolutions and linear layers that is not zero.
        params: parameters less those zeros.
        macs: MACs of every layer times its density, added up.
    """

    rule: str
    density: float
    params: int
    macs: int

    def __str__(self) -> str:
        said = "counted in the weights" if self.rule == ZEROS else f"stated, by the rule {self.rule}"
        return f"{self.params:,} parameters, {self.macs:,} MACs with {1 - self.density:.1%} zeros ({said})"


def check_sparsity(sparsity: float | None, rule: str) -> None:
    """Raise ConfigError unless `sparsity` is a share from 0 up to, but not, 1, and `rule` one that there is."""
    if rule not in RULES:
        near = did_you_mean(str(rule), RULES)
        raise ConfigError(f"There is no sparsity rule {rule!r}.{near} There are: {', '.join(RULES)}.")
    if sparsity is None:
        return
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise ConfigError(
            f"sparsity is the share of weights that are zero, from 0 up to, but not, 1; not {sparsity!r}."
        )


def effective_costs(
    model: nn.Module, modules: Sequence[ModuleCost], sparsity: float | None = None, rule: str = "uniform"
) -> Effective | None:
    """The costs of `modules`, which are all modules of `model`, without the zeros.

    The zeros are those in the weights, or at a stated `sparsity` those that `rule` spreads over the layers. None where
    neither is known: the weights are on the meta device.
    """
    weights = sparse_weights(model)
    unique = {id(weight): weight for weight in weights.values()}  # a shared weight counts once
    if sparsity is not None:
        shapes = {str(key): tuple(weight.shape) for key, weight in unique.items()}
        shares = {int(key): share for key, share in densities(shapes, 1 - sparsity, rule).items()}
        kept = {key: shares[key] * weight.numel() for key, weight in unique.items()}
    elif any(weight.is_meta for weight in unique.values()):
        return None
    else:
        rule = ZEROS
        kept = {key: float(weight.count_nonzero()) for key, weight in unique.items()}
    total = sum(weight.numel() for weight in unique.values())
    zeros = total - sum(kept.values())

    whole = {module.name: module.weight_macs for module in modules}
    macs = modules[0].macs - sum(
        whole[name] * (1 - kept[id(weight)] / weight.numel()) for name, weight in weights.items()
    )
    return Effective(
        rule=rule,
        density=1 - zeros / total if total else 1.0,
        params=modules[0].params - round(zeros),
        macs=round(macs),
    )


def sparse_weights(model: nn.Module) -> dict[str, Tensor]:
    """What can be sparse, by the name of its module; as it is used, where it is pruned or parametrized."""
    weights = {}
    for name, module in model.named_modules():
        if not has_weight(module):
            continue
        with torch.no_grad():
            weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            weights[name] = weight
    return weights
