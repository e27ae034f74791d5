"""The published ways to train sparsely, as data: what `sparsity.method` sets where nothing else is said."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

__all__ = ["METHODS", "Distribution", "Growth", "MaskChoice", "OptimizerState", "Prune", "Schedule", "SparsityRule"]

Distribution: TypeAlias = Literal["uniform", "er", "erk", "snip"]
MaskChoice: TypeAlias = Literal["random", "magnitude", "snip", "weights"]
Prune: TypeAlias = Literal["magnitude", "magnitude_per_sign"]
Growth: TypeAlias = Literal["none", "random", "gradient", "momentum"]
Schedule: TypeAlias = Literal["cosine", "linear", "constant"]
OptimizerState: TypeAlias = Literal["dense", "active", "compact"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsityRule:
    """A `SparsityConfig` in which everything is said; the names mean the same."""

    density: float | None = None
    layers: str | tuple[str, ...] = "all"
    distribution: Distribution = "erk"
    masks: MaskChoice = "random"
    dense_from: float = 1.0
    pattern: str | None = None
    initial_density: float | None = None
    prune: Prune = "magnitude"
    growth: Growth = "none"
    prune_rate: float = 0.3
    final_prune_rate: float = 0.0
    prune_schedule: Schedule = "cosine"
    update_interval: int | Literal["epoch"] = 100
    start: float = 0.0
    stop: float = 0.75
    update_instead_of_step: bool = False
    optimizer_state: OptimizerState = "active"
    regrow_warmup: int = 0
    lr_density_power: float = 0.0
    dead_channels: float = 0.0

    @property
    def n_m(self) -> tuple[int, int] | None:
        """(n, m) of `pattern`."""
        if self.pattern is None:
            return None
        n, _, m = self.pattern.partition(":")
        return int(n), int(m)


METHODS: dict[str, SparsityRule] = {
    # masks that never move, drawn at random
    "static": SparsityRule(),
    # Lee et al., ICLR 2019, arXiv 1810.02340: those weights without which the loss would change most
    "snip": SparsityRule(distribution="snip", masks="snip"),
    # Mocanu et al. 2018, arXiv 1707.04780: after each epoch those closest to zero of either sign move elsewhere
    "set": SparsityRule(
        distribution="er",
        prune="magnitude_per_sign",
        growth="random",
        prune_schedule="constant",
        update_interval="epoch",
        stop=1.0,
    ),
    # Evci et al., ICML 2020, arXiv 1911.11134
    "rigl": SparsityRule(growth="gradient", update_instead_of_step=True),
    # SLaK's published code, with its commands' values for slak_tiny (slak_small, slak_base: prune_rate 0.3, every 100)
    "slak": SparsityRule(
        density=0.6,
        distribution="snip",
        dense_from=0.99,
        growth="random",
        prune_rate=0.5,
        final_prune_rate=0.005,
        update_interval=2000,
        stop=1.0,
        optimizer_state="dense",
    ),
    # Zhu and Gupta 2017, arXiv 1710.01878: from dense to sparse along a cubic curve
    "gmp": SparsityRule(distribution="uniform", initial_density=1.0),
    # Liu et al., NeurIPS 2021, arXiv 2106.10404: the same, and half of the smallest weights grow elsewhere
    "granet": SparsityRule(initial_density=1.0, growth="gradient", prune_rate=0.5),
    # Mishra et al. 2021, arXiv 2104.08378: the two largest of every four inputs, for trained weights
    "nm": SparsityRule(pattern="2:4", masks="magnitude"),
    # Yin et al., NeurIPS 2023: masks move as in RigL, channels with the fewest weights die out and are cut off
    "chase": SparsityRule(growth="gradient", dead_channels=0.3),
}
