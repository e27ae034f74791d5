"""Golden files: what an architecture's published code computes, without its weights.

A file names every tensor of the published checkpoint (key, shape, fill) and holds samples of the outputs that the
authors' code gave for the weights and inputs which these functions regenerate, bit for bit, from the keys alone.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOLDENS = Path(__file__).parent / "goldens"


def load(family: str, name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((GOLDENS / family / f"{name}.json.gz").read_bytes()))


def names(family: str) -> list[str]:
    return sorted(path.name.removesuffix(".json.gz") for path in (GOLDENS / family).glob("*.json.gz"))


def _uniform(name: str, shape: list[int]) -> np.ndarray:
    """Float64 in [-1, 1), a function of `name` alone."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return (np.random.Generator(np.random.PCG64(seed)).random(math.prod(shape)) * 2.0 - 1.0).reshape(shape)


def state_dict(golden: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The checkpoint in its published layout, float32; tensors that a port computes itself ("keep") are left out."""
    tensors = {}
    for key, spec in golden["keys"].items():
        shape = spec["shape"]
        match spec["fill"]:
            case "keep":
                continue
            case "counter":
                tensors[key] = torch.zeros(shape, dtype=torch.int64)
                continue
            case "scale":
                values = 1.0 + 0.5 * _uniform(key, shape)
            case "shift":
                values = 0.1 * _uniform(key, shape)
            case "matrix":
                values = _uniform(key, shape) * math.sqrt(3.0 / max(1, math.prod(shape[1:])))
            case fill:
                raise ValueError(f"{key}: no fill named {fill!r}")
        tensors[key] = torch.from_numpy(values.astype(np.float32))
    return tensors


def inputs(golden: dict[str, Any]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, spec in golden["inputs"].items():
        u = _uniform(f"input:{name}", spec["shape"])
        if spec["kind"] == "tokens":
            tensors[name] = torch.from_numpy(np.floor((u + 1.0) / 2.0 * spec["vocab"]).astype(np.int64))
        else:
            tensors[name] = torch.from_numpy((u * math.sqrt(3.0)).astype(np.float32))
    return tensors


def errors(golden: dict[str, Any], outputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest deviation of each output from the golden samples, mean and absmax, relative to absmax."""
    found = {}
    for name, want in golden["outputs"].items():
        got = outputs[name]
        assert list(got.shape) == want["shape"], f"{golden['name']}: {name} is {list(got.shape)}, not {want['shape']}"
        flat = got.detach().double().flatten()
        samples = flat[:: want["step"]][: len(want["values"])]
        deviations = [
            (samples - torch.tensor(want["values"], dtype=torch.float64)).abs().max().item(),
            abs(flat.mean().item() - want["mean"]),
            abs(flat.abs().max().item() - want["absmax"]),
        ]
        found[name] = max(deviations) / want["absmax"]
    return found
