"""Which epoch of a run is its best, by the rows of its history, and what a run leaves beside its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

__all__ = ["FIGURES", "SHRUNK", "best_row", "is_better"]

Row: TypeAlias = Mapping[str, Any]

SHRUNK = "shrunk"  # in a run's folder: the last model without the channels that died out
FIGURES = "figures.json"  # in that folder: what was measured of it, as a row of the history has it
SAME_DENSITY = 1e-3  # of it: whole weights are counted, so that densities that are meant to be equal are not quite


def is_better(row: Row, best: Row | None, metric: str, lower_is_better: bool) -> bool:
    """Whether the epoch of `row` takes the place of the best so far, by its value of the column `metric`.

    One at a lower density always does, for there a run that prunes is bound; one at a higher density never does; at
    the same density, to a thousandth of it, the better value decides, and the first of equals stays. A row without
    `density` is of a dense model. One without a value, or whose value is no number, never is better.
    """
    value = row.get(metric)
    if value is None or math.isnan(value):
        return False
    if best is None:
        return True
    density, before = _density(row), _density(best)
    if not math.isclose(density, before, rel_tol=SAME_DENSITY):
        return density < before
    return value < best[metric] if lower_is_better else value > best[metric]


def best_row(rows: Iterable[Row], metric: str, lower_is_better: bool) -> Row | None:
    """The row of the epoch that a run's best checkpoint is of; None where none has a value of `metric`."""
    best = None
    for row in rows:
        if is_better(row, best, metric, lower_is_better):
            best = row
    return best


def _density(row: Row) -> float:
    density = row.get("density")
    return 1.0 if density is None else density
