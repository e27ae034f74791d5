"""Numbers for people: `11915176` is `11.9M`, `"1.2G"` is `1.2e9`, and `(3, 224, 224)` is `3x224x224`."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SUFFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)([kmgt]?)", re.IGNORECASE)


def humanize(number: float) -> str:
    """Three significant digits and a decimal suffix: `11915176` -> `"11.9M"`."""
    scaled = float(number)
    suffixes = iter(_SUFFIXES)
    suffix = next(suffixes)
    while abs(scaled) >= 999.5 and suffix != "T":
        scaled /= 1000
        suffix = next(suffixes)
    decimals = 0 if not suffix or abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
    return f"{scaled:.{decimals}f}{suffix}"


def shape_text(shape: Iterable[int]) -> str:
    """`(3, 224, 224)` -> `"3x224x224"`, and no sides at all -> `"scalar"`."""
    return "x".join(map(str, shape)) or "scalar"


def parse_quantity(text: str) -> float:
    """A number with or without a decimal suffix: `"6M"`, `"1.2G"`, `"6e6"`. Raises ValueError for anything else."""
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a number such as 6e6, 6M or 1.2G")
    return float(match[1]) * _SUFFIXES[match[2].upper()]
