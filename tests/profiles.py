"""Profiles that more than one test file looks at."""

from __future__ import annotations

import functools

import zoo
from zoo.profiling import Profile

NORMS = ("batch_norm", "group_norm", "layer_norm", "instance_norm", "rms_norm")  # operators whose work fvcore counts


@functools.cache
def profiled(name: str, size: tuple[int, int, int]) -> Profile:
    """The profile of a model by name, counted once."""
    return zoo.profile(name, size)
