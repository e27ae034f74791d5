"""Checks of a constructor's arguments, shared by families. Each raises ConfigError, which names the argument."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from zoo.errors import ConfigError, did_you_mean


def check_widths(**arguments: Sequence[int]) -> list[tuple[int, ...]]:
    """Sequences of whole numbers above zero, one number for each stage, all equally long."""
    checked: list[tuple[int, ...]] = []
    for what, values in arguments.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ConfigError(f"{what} must be a sequence of whole numbers, one for each stage, not {values!r}.")
        if not all(type(value) is int and value > 0 for value in values):
            raise ConfigError(f"{what} must be whole numbers above zero, not {tuple(values)!r}.")
        checked.append(tuple(values))
    (first, count), *others = [(what, len(values)) for what, values in zip(arguments, checked, strict=True)]
    for what, other in others:
        if other != count:
            raise ConfigError(f"{first} has {count} stages and {what} has {other}: they must be equally many.")
    return checked


def per_stage(what: str, value: Any, stages: int) -> tuple[Any, ...]:
    """One value for each stage; a single one stands for all."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return (value,) * stages
    if len(value) != stages:
        raise ConfigError(f"{what} has {len(value)} items for {stages} stages: give one for each, or one for all.")
    return tuple(value)


def check_counts(least: int, **arguments: Any) -> None:
    """Whole numbers from `least` up."""
    for what, value in arguments.items():
        if type(value) is not int or value < least:
            raise ConfigError(f"{what} must be a whole number from {least} up, not {value!r}.")


def image_sides(img_size: int | Sequence[int], least: int = 1) -> tuple[int, int]:
    """Height and width, of one number for both or a pair, each from `least` up."""
    sides = tuple(img_size) if isinstance(img_size, Sequence) else (img_size, img_size)
    if len(sides) != 2 or not all(type(side) is int and side >= least for side in sides):
        raise ConfigError(
            f"img_size must be a whole number from {least} up, or (height, width) of such, not {img_size!r}."
        )
    return sides


def check_rates(**arguments: Any) -> None:
    """Numbers from 0 up to, but not, 1."""
    for what, value in arguments.items():
        if not _is_number(value) or not 0 <= value < 1:
            raise ConfigError(f"{what} must be a number from 0 up to, but not, 1; it is {value!r}.")


def check_above_zero(**arguments: Any) -> None:
    """Numbers above zero, or sequences of such."""
    for what, value in arguments.items():
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
        if not all(_is_number(v) and v > 0 for v in values):
            raise ConfigError(f"{what} must be numbers above zero, not {value!r}.")


def check_numbers(**arguments: Any) -> None:
    """Finite numbers."""
    for what, value in arguments.items():
        if not _is_number(value):
            raise ConfigError(f"{what} must be a number, not {value!r}.")


def check_numbers_or_none(**arguments: Sequence[Any]) -> None:
    """For each stage a finite number or None."""
    for what, values in arguments.items():
        for value in values:
            if not (value is None or _is_number(value)):
                raise ConfigError(f"{what} must be a number or None, not {value!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def check_flags(**arguments: Any) -> None:
    """True or False."""
    for what, value in arguments.items():
        if type(value) is not bool:
            raise ConfigError(f"{what} must be True or False, not {value!r}.")


def check_choice(what: str, value: Any, options: Sequence[str]) -> None:
    """One of a few names."""
    if value not in options:
        near = did_you_mean(str(value), options)
        raise ConfigError(f"{what} {value!r} is unknown.{near} Choose one of {', '.join(map(repr, options))}.")


POOLS = ("avg", "max", "avgmax", "")  # of a head: these, or none


def check_pool(global_pool: str, num_classes: int) -> None:
    """A pooling that timm's SelectAdaptivePool2d has, and one at all before a classifier."""
    check_choice("global_pool", global_pool, POOLS)
    if num_classes > 0 and global_pool == "":
        raise ConfigError('global_pool="" leaves a map, which no classifier takes: use it with num_classes=0.')
