"""Folders to write to, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from zoo.errors import ConfigError


def make_folder(path: str | Path) -> Path:
    """`path`, made if need be. Raises ConfigError when it cannot be, or cannot be written to."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        raise ConfigError(f"{str(folder)!r} is a file: give the name of a folder.") from None
    except OSError as error:
        raise ConfigError(f"Cannot write to the folder {str(folder)!r}: {error.strerror}.") from None
    return folder


def check_writable(path: str | Path) -> Path:
    """`path` as a Path, or a ConfigError that says why no file can be written there. To ask before long work."""
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"Cannot write {str(path)!r}: it is a folder. Give the name of a file.")
    if not path.parent.is_dir():
        raise ConfigError(f"Cannot write {str(path)!r}: there is no folder {str(path.parent)!r}. Make it first.")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"Cannot write {str(path)!r}: the folder {str(path.parent)!r} is not yours to write to.")
    return path


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that takes its place at `path` only when the block ends without an error."""
    path = check_writable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raise ConfigError where no folder can be written: without a parent, or one that is not empty, unless allowed."""
    real = Path(os.path.realpath(folder))
    place = real if _must_stay(real) else real.parent
    if not place.is_dir():
        raise ConfigError(f"Cannot make {str(folder)!r}: there is no folder {str(place)!r}. Make it first.")
    if not os.access(place, os.W_OK):
        raise ConfigError(f"Cannot make {str(folder)!r}: the folder {str(place)!r} is not yours to write to.")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{str(folder)!r} is a file: give the name of a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ConfigError(
            f"The folder {str(folder)!r} is not empty: choose another, or pass overwrite=True (--overwrite)."
        )


def fresh_folder(folder: Path) -> Path:
    """Where to make ready what `put_in_place` puts in `folder`'s place: a hidden name on the same disk."""
    real = Path(os.path.realpath(folder))
    name = f".{real.name}.{os.getpid()}.tmp"
    return real / name if _must_stay(real) else real.with_name(name)


def put_in_place(fresh: Path, folder: Path) -> None:
    """Put what the folder `fresh` holds in `folder`; what that held under other names stays. Links are followed.

    `fresh` takes the name of `folder`, at once: an interruption leaves the old folder or the new one. A mount point,
    and a folder that is or holds the current one, cannot be renamed: there each file takes its place at once, one
    after the other, when all are complete on that disk. An interruption before that leaves the old folder, and one
    meanwhile whole files, but some of the old beside some of the new.
    """
    real = Path(os.path.realpath(folder))
    place = fresh_folder(real)
    try:
        if fresh != place:
            shutil.rmtree(place, ignore_errors=True)
            shutil.move(fresh, place)
        if not _must_stay(real):
            try:
                return _rename(place, real)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
            # a folder of the same disk is mounted there, which does not show before
            place = Path(shutil.move(place, real / place.name))
        _move_in(place, real)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _must_stay(folder: Path) -> bool:
    """Whether `folder`, without links in its path, is a mount point, or is or holds the current folder."""
    try:
        return os.path.ismount(folder) or Path.cwd().is_relative_to(folder)
    except FileNotFoundError:  # the current folder was removed
        return False


def _move_in(fresh: Path, folder: Path) -> None:
    """Move what `fresh`, a folder in `folder`, holds up to its parent, in place of what has the same names."""
    with tempfile.TemporaryDirectory(prefix=".", suffix=".old", dir=folder) as old:
        for path in sorted(fresh.iterdir()):
            there = folder / path.name
            if os.path.lexists(there) and (path.is_dir() or there.is_dir()):  # a folder replaces no other
                os.rename(there, Path(old, path.name))
            os.replace(path, there)


def _rename(fresh: Path, folder: Path) -> None:
    """Rename `fresh` to `folder`, what that holds under other names copied into it first."""
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(fresh, folder)
        return
    for path in folder.iterdir():
        if (fresh / path.name).exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, fresh / path.name, symlinks=True)
        else:
            shutil.copy2(path, fresh / path.name, follow_symlinks=False)
    old = fresh.with_suffix(".old")
    os.rename(folder, old)
    try:
        os.rename(fresh, folder)
    except OSError:
        os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def checkpoint_places(path: Path) -> tuple[Path, ...]:
    """Where the checkpoint lies that `path` means: best or last of a run, a folder itself, or that of a file."""
    return (path / "best", path / "last", path) if path.is_dir() else (path.parent,)


def checkpoint_folder(path: Path) -> Path | None:
    """The folder in the Hub's layout that a run, such a folder or a file in one means; None where there is none."""
    return next((place for place in checkpoint_places(path) if (place / "config.json").is_file()), None)
