"""Errors that a user can cause and mend. Commands print them without a traceback and exit with status 1."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ZooError(Exception):
    """Base of every error that is a user's to mend."""

    def __str__(self) -> str:  # KeyError and OSError subclasses would otherwise quote or drop the message
        return str(self.args[0]) if self.args else ""


class UnknownModelError(ZooError, LookupError):
    """No model, or no weights, of that name."""


class CheckpointError(ZooError, ValueError):
    """A checkpoint that cannot be read, or does not fit its model."""


class DownloadError(ZooError, OSError):
    """Weights could not be fetched, or what was fetched is not what was promised."""


class PublishError(ZooError, OSError):
    """A model could not be published, or what was published cannot be proved; the message says which."""


class ConfigError(ZooError, ValueError):
    """An argument or configuration value that makes no sense."""


class DataError(ZooError, ValueError):
    """A data set that is missing, empty or damaged."""


class MissingDependencyError(ZooError, ImportError):
    """An optional package is needed; the message says which extra installs it."""


def describe_os_error(error: OSError) -> str:
    """What the system says, and of which file."""
    said = ": ".join(filter(None, (error.strerror or str(error), error.filename and str(error.filename))))
    return said or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of what `error` says, or its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def some(names: Iterable[str], most: int = 20) -> str:
    """The first of `names`, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_keywords(function: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError, as Python does, where one of the keywords that `function` passes on is not known there."""
    known = list(known)
    for key in given:
        if key not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {key!r}.{did_you_mean(key, known)}")


PART = 3  # letters from which on a part of a name is meant for it


def did_you_mean(name: str, options: Iterable[str], count: int = 3) -> str:
    """`" Did you mean a, b or c?"`, or the empty string when nothing is near and nothing contains `name`."""
    name, options = str(name).lower(), sorted(options)

    def likeness(option: str) -> float:
        return difflib.SequenceMatcher(None, option, name).ratio()

    near = difflib.get_close_matches(name, options, n=99, cutoff=0.6)
    if not near and len(name) >= PART:
        near = [option for option in options if name in option.lower()]
    near = sorted(near, key=lambda option: (-likeness(option), option))[:count]
    if not near:
        return ""
    listed = near[0] if len(near) == 1 else f"{', '.join(near[:-1])} or {near[-1]}"
    return f" Did you mean {listed}?"
