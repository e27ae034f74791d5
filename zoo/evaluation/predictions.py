"""Predictions for every image of a split, as a parquet file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from zoo.data import ImageSplit
from zoo.errors import ConfigError, MissingDependencyError
from zoo.evaluation.targets import Targets
from zoo.files import whole_file

__all__ = ["check_topk", "predictions_file"]

ROWS_IN_MEMORY = 16_384


@contextlib.contextmanager
def predictions_file(
    path: str | Path, split: ImageSplit, targets: Targets, topk: int
) -> Iterator[Callable[[Tensor, Tensor], None]]:
    """A function that takes logits (B, C) and the numbers (B,) of their images in `split`, and writes a row for each.

    Columns: `image` (its name), `label` (null without one; of several right answers the one that was given, else the
    first), `classes` and `probabilities`, the `topk` most probable ones. The file is whole when the block ends, or not
    there. Raises MissingDependencyError without pyarrow, ConfigError for a path that cannot be written to.
    """
    check_topk(topk)
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingDependencyError('Parquet files need pyarrow: pip install "backbone-zoo[train]".') from error

    schema = pa.schema(
        [
            ("image", pa.string()),
            ("label", pa.string()),
            ("classes", pa.list_(pa.string())),
            ("probabilities", pa.list_(pa.float32())),
        ]
    )
    names = targets.classes
    rows: list[dict] = []

    def write(logits: Tensor, numbers: Tensor) -> None:
        best = logits.float().softmax(-1).topk(min(topk, len(names)))
        for number, indices, probabilities in zip(
            numbers.tolist(), best.indices.tolist(), best.values.tolist(), strict=True
        ):
            right = [label for label in targets.labels[number].tolist() if label >= 0]
            label = indices[0] if indices[0] in right else right[0] if right else None
            rows.append(
                {
                    "image": split.source.name(number),
                    "label": None if label is None else names[label],
                    "classes": [names[index] for index in indices],
                    "probabilities": probabilities,
                }
            )
        if len(rows) >= ROWS_IN_MEMORY:
            flush()

    def flush() -> None:
        writer.write_table(pa.Table.from_pylist(rows, schema))
        rows.clear()

    with whole_file(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        yield write
        flush()


def check_topk(topk: int) -> None:
    """Raises ConfigError for what is no number of classes to tell."""
    if type(topk) is not int or topk < 1:
        raise ConfigError(f"topk must be a whole number and at least 1, not {topk!r}.")
