"""What a run was made with, for who reads its figures later: command, versions, devices."""

from __future__ import annotations

import datetime
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

import zoo
from zoo.files import whole_file
from zoo.model_card import ENVIRONMENT, command_without_paths, read_environment

__all__ = ["record_environment"]


def record_environment(run: Path, begun_in: Path, devices: Sequence[str], updates: int) -> None:
    """Add a row to `environment.json` of the folder `run`: one for each time that a run was started or resumed.

    `begun_in` is the folder of the run that is resumed, `devices` names each process's, and `updates` says how far the
    run was. Paths are cut to their last part: whose machine it was is nobody's business.
    """
    row = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_without_paths(sys.argv),
        "updates": updates,
        "processes": len(devices),
        "devices": {name: devices.count(name) for name in dict.fromkeys(devices)},
        "threads": torch.get_num_threads(),
        "zoo": zoo.__version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "python": platform.python_version(),
    }
    rows: list[Mapping[str, Any]] = [*read_environment(begun_in), row]
    with whole_file(run / ENVIRONMENT) as file:
        file.write((json.dumps(rows, indent=1) + "\n").encode())
