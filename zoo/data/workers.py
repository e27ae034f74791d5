"""Processes that load data and die: torch's errors, which come wherever the main process is, as one for the user."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TypeVar

from zoo.errors import DataError, first_line

__all__ = ["dead_workers_told", "next_batch"]

T = TypeVar("T")

MESSAGE = "A process that loads data died, perhaps for want of memory: lower data.workers or data.batch_size."
NOTICE = 1.0  # seconds, at most, from the end of a process's connections to the signal of its death


@contextlib.contextmanager
def dead_workers_told() -> Iterator[None]:
    """Raise DataError in place of the error that torch raises in the block, at any line, when a worker died."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise _died(error) from error


def next_batch(batches: Iterator[T], workers: int) -> T:
    """The next of `batches`, which so many workers make.

    Raises StopIteration at their end, and DataError where the worker died that was to hand it over.
    """
    with dead_workers_told():
        try:
            return next(batches)
        except (OSError, EOFError) as error:
            if workers == 0 or "in DataLoader worker process" in str(error):  # of the data, not on the way
                raise
            time.sleep(NOTICE)  # the signal of its death comes after the end of its connections, and raises here
            raise _died(error) from error


def _died(error: Exception) -> DataError:
    return DataError(f"{MESSAGE} {first_line(error)}")
