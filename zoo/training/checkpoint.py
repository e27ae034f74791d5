"""Checkpoints that survive: a folder is written beside its place, flushed to disk, and only then put there.

A checkpoint is a folder in the Hub's layout (`config.json`, `model.safetensors`: `zoo.create_model("local-dir:...")`
opens it) with `state.pt` beside them, which holds what a run needs to go on.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.data.streaming import reason
from zoo.errors import CheckpointError, ConfigError, did_you_mean

__all__ = ["STATE", "find_checkpoint", "read_state", "rng_state", "set_rng_state", "write_checkpoint"]

STATE = "state.pt"


def write_checkpoint(folder: Path, save_weights: Callable[[Path], object], state: dict[str, Any] | None = None) -> None:
    """Put a checkpoint at `folder`, in place of the one there, if any, which stays until the new one is whole.

    `save_weights(path)` makes the folder `path` with the weights. Without a `state` no run can go on from it. Raises
    ConfigError when it cannot be written.
    """
    fresh, old = _fresh(folder), _old(folder)
    try:
        recover(folder)
        shutil.rmtree(fresh, ignore_errors=True)
        save_weights(fresh)
        if state is not None:
            with open(fresh / STATE, "wb") as file:
                torch.save(state, file)
        for path in fresh.iterdir():
            _flush(path)
        _flush(fresh)
        if folder.exists():
            os.replace(folder, old)
        os.replace(fresh, folder)
        _flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError, CheckpointError) as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(fresh)
        reason = _reason(error)
        if reason is None:
            raise
        raise ConfigError(
            f"The checkpoint {str(folder)!r} cannot be written: {reason}. The one before it stays."
        ) from error


def _reason(error: BaseException) -> str | None:
    """Why nothing can be written; None when `error` is about something else."""
    if isinstance(error, CheckpointError):  # of who writes the weights
        return str(error).removesuffix("Nothing was left behind.").rstrip(". ")
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):  # torch.save makes a RuntimeError of a full disk
        cause = cause.__cause__ or cause.__context__
    return None if cause is None else cause.strerror or str(cause)


def recover(folder: Path) -> None:
    """Undo a replacement that was cut off between its two renames. Several processes may do so at once."""
    if not folder.exists() and _old(folder).exists():
        with contextlib.suppress(FileNotFoundError):
            os.replace(_old(folder), folder)
    shutil.rmtree(_old(folder), ignore_errors=True)


def clean(run: Path) -> None:
    """Remove from a run's folder what a killed process had begun to write. Several processes may do so at once."""
    for path in run.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _fresh(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.new")


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_checkpoint(resume: str, run: Path) -> Path | None:
    """The checkpoint that `resume` means: "auto" is the run's last or None, a path is a run's last or a checkpoint.

    Raises CheckpointError when there is none at the path.
    """
    base = run if resume == "auto" else Path(resume).expanduser()
    recover(base / "last")
    for folder in (base / "last", base):
        if (folder / STATE).is_file():
            return folder
    if resume == "auto":
        return None
    if not base.exists():
        beside = [path.name for path in base.parent.iterdir() if path.is_dir()] if base.parent.is_dir() else []
        beside += ["auto"] * (base.parent == Path())
        raise CheckpointError(f"There is no run {resume!r} to resume.{did_you_mean(base.name, beside)}")
    raise CheckpointError(f"There is nothing to resume in {resume!r}: no {STATE}, neither in it nor in its 'last'.")


def read_state(folder: Path) -> dict[str, Any]:
    """What `write_checkpoint` was given as `state`. Raises CheckpointError when it cannot be read."""
    try:
        return torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE} cannot be read: {reason(error)}") from None


def rng_state() -> dict[str, Any]:
    """The state of every random number generator of this process, as plain data and tensors."""
    version, numbers, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
