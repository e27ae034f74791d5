"""What all benchmarks record: the command, the versions, a file that is written whole; and where real data lie."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import zoo
from zoo.errors import DataError
from zoo.files import whole_file

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def command() -> str:
    """The command that runs, with the part of its environment on which times depend."""
    environment = [
        f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY") if name in os.environ
    ]
    return shlex.join([*environment, "python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def versions(*packages: str) -> dict[str, str | None]:
    """Of the zoo and of these packages, None for one that is not installed."""
    return {"zoo": zoo.__version__, **{package: _version(package) for package in packages}}


def _version(package: str) -> str | None:
    if stated := getattr(sys.modules.get(package), "__version__", None):
        return str(stated)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_json(report: dict[str, Any], path: Path) -> None:
    """Whole or not at all, into a folder that is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write((json.dumps(report, indent=1) + "\n").encode())


def data_folder(name: str, holds: str, given: str | Path | None = None) -> Path:
    """The folder of a data set, `given` or `name` in $ZOO_DATA, with something called `holds`. Raises DataError."""
    folder = Path(given) if given else Path(os.environ.get("ZOO_DATA") or ROOT.parent / "shared" / "data") / name
    if not (folder / holds).exists():
        told = "" if given else f": let ZOO_DATA name the folder that {name} lies in"
        raise DataError(f"There is no {holds} in {str(folder)!r}{told}.")
    return folder
