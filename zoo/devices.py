"""Which device a user means, and whether this machine has it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.errors import ConfigError, did_you_mean

DEVICES = ("cpu", "cuda", "mps")


def find_device(device: Any) -> torch.device:
    """`device` ("cpu", "cuda:1", a torch.device, ...) as a torch.device that is here. Raises ConfigError."""
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        near = did_you_mean(str(device), DEVICES)
        raise ConfigError(f"There is no device {device!r}.{near} Choose one of {', '.join(DEVICES)}.") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"There is no device {device!r} here: torch sees {torch.cuda.device_count()} CUDA devices.")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("There is no device 'mps' here: it takes a Mac with Apple silicon.")
    return chosen


def device_name(device: torch.device) -> str:
    """What the hardware is called, such as "NVIDIA H200"; of a CPU, its model where the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def device_and_threads(device: torch.device) -> str:
    """What a measurement ran on: the GPU's name, or the CPU's model and how many threads PyTorch takes."""
    name = device_name(device)
    threads = torch.get_num_threads()
    return name if device.type == "cuda" else f"{name}, {threads} thread{'s' * (threads != 1)}"


def choose_device(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """`device` as torch has it: "auto" is the accelerator there is, None where the model lies. Raises ConfigError."""
    if device is None:
        return next(model.parameters()).device
    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return find_device(device)
