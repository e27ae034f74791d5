"""Where images with labels come from: a folder, parquet files, a data set of the Hub, or scikit-learn's digits."""

from __future__ import annotations

import dataclasses
import glob
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from zoo.data.config import DataConfig
from zoo.data.streaming import Shards, class_names, count_parquets, count_tars, find_tars, reason
from zoo.errors import DataError, MissingDependencyError, did_you_mean

__all__ = [
    "Arrays",
    "ImageFiles",
    "ImageSource",
    "ImageSplit",
    "SplitNames",
    "Table",
    "align_classes",
    "digit_scans",
    "load_split",
    "open_table",
    "undecoded",
    "wanted_splits",
]

VAL_SPLITS = ("val", "validation", "test")
DIGITS_SPLIT_SEED = 0
DIGITS_TEST_IMAGES = 360


class SplitNames(Protocol):
    """What finding a split asks of a configuration of data."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> str | None: ...
    @property
    def train_split(self) -> str: ...
    @property
    def val_split(self) -> str | None: ...


class ImageSource(Protocol):
    """Images by number, each with a name that a person can find it by."""

    def open(self, index: int) -> Image.Image: ...
    def name(self, index: int) -> str: ...
    def check(self) -> None:
        """Raises DataError when the images are gone altogether, and not only one of them damaged."""


@dataclasses.dataclass(frozen=True)
class ImageSplit:
    """One split of a data set: images not yet decoded, their labels, and the names of the classes."""

    source: ImageSource
    labels: np.ndarray  # (N,) int64; empty for a training stream, whose labels come with its images
    classes: tuple[str, ...]
    alphabetical: bool = False  # the classes are numbered by the order of their names, for want of anything better

    @property
    def empty_classes(self) -> list[str]:
        if not len(self.labels):
            return []
        counts = np.bincount(self.labels, minlength=len(self.classes))
        return [name for name, images in zip(self.classes, counts, strict=True) if not images]

    def __len__(self) -> int:
        return len(self.source) if isinstance(self.source, Shards) else len(self.labels)


class ImageFiles:
    """Image files below a folder. An `ImageSource`."""

    def __init__(self, root: Path, paths: Sequence[str]) -> None:
        self.root = root
        # one block: forked workers do not copy a million strings
        self.paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)

    def open(self, index: int) -> Image.Image:
        return Image.open(self.name(index))

    def name(self, index: int) -> str:
        return os.fsdecode(self.paths[index])

    def place(self, index: int) -> Path:
        """Of the file, from the folder of the split on: `<class>/<image>.jpg`."""
        return Path(self.name(index)).relative_to(self.root)

    def check(self) -> None:
        if not self.root.is_dir():
            raise DataError(f"The images are gone: there is no folder {str(self.root)!r} any more.")


class Table:
    """Rows of a `datasets.Dataset` whose image column is not decoded: `{bytes, path}`."""

    def __init__(self, table: Any, image_key: str, described_as: str) -> None:
        self.table, self.image_key, self.described_as = table, image_key, described_as

    def open(self, index: int) -> Image.Image:
        cell = self.table[int(index)][self.image_key]
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise ValueError("the cell is empty")
        return Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"])

    def name(self, index: int) -> str:
        return f"{self.described_as}, row {index}"

    def check(self) -> None:
        """Nothing: what is open stays readable."""


class Arrays:
    """Images that are in memory, (N, H, W) uint8; `what` one is called."""

    def __init__(self, images: np.ndarray, what: str) -> None:
        self.images, self.what = images, what

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def name(self, index: int) -> str:
        return f"{self.what} {index}"

    def check(self) -> None:
        """Nothing: they are in memory."""


def load_split(config: DataConfig, training: bool) -> ImageSplit:
    """The training or the evaluation split that `config` names.

    Raises DataError when it is missing, empty, has one class only, or labels out of range, and when `config.path` is of
    one split alone, and another will be needed for evaluation.
    """
    if training and _is_one_split(config):
        raise DataError(
            f"{config.path!r} is one split, and another one is needed to evaluate what was learned: give the folder of "
            "both as data.path, and their names as data.train_split and data.val_split."
        )
    load: Callable[[DataConfig, bool], ImageSplit] = {
        "digits": _load_digits,
        "folder": _load_folder,
        "parquet": _stream_parquet if config.streaming else _load_table,
        "hub": _stream_hub if config.streaming else _load_table,
        "webdataset": _stream_tars,
    }[config.name]
    split = load(config, training)
    where = config.path or config.name
    if len(split) == 0:
        raise DataError(f"There are no images in {where}.")
    if len(split.classes) < 2:
        raise DataError(f"{where} has one class only, {split.classes[0]!r}: there is nothing to tell apart.")
    return split


def _is_one_split(config: DataConfig) -> bool:
    path = config.path or ""
    return ".tar" in path if config.name == "webdataset" else config.name == "parquet" and Path(path).is_file()


def _load_digits(config: DataConfig, training: bool) -> ImageSplit:
    images, labels = digit_scans(config, training)
    return ImageSplit(Arrays(images, "digit"), labels, tuple(map(str, range(10))))


def digit_scans(config: SplitNames, training: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's digits of a split, (N, 8, 8) uint8, and which they are, (N,) int64.

    Stratified by class, so that both splits hold every digit in equal shares.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise _missing("scikit-learn", "the digits") from error
    wanted = config.train_split if training else config.val_split or "test"
    if wanted not in ("train", "test"):
        raise DataError(f"The digits have no split {wanted!r}, but train and test.")
    digits = load_digits()
    labels = digits.target.astype(np.int64)
    parts = train_test_split(
        np.arange(len(labels)), test_size=DIGITS_TEST_IMAGES, stratify=labels, random_state=DIGITS_SPLIT_SEED
    )
    chosen = np.sort(parts[0 if wanted == "train" else 1])
    return np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8), labels[chosen]


def _load_folder(config: DataConfig, training: bool) -> ImageSplit:
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    root = Path(config.path or "").expanduser()
    if not root.is_dir():
        raise DataError(f"There is no folder {str(root)!r}.")
    wanted = wanted_splits(config, training)
    folder = next((root / name for name in wanted if (root / name).is_dir()), None)
    if folder is None and not training and config.val_split is None and not (root / config.train_split).is_dir():
        folder = root  # classes lie in it directly
    if folder is None:
        there = sorted(path.name for path in root.iterdir() if path.is_dir())
        raise DataError(
            f"{str(root)!r} has no folder {' or '.join(map(repr, wanted))}.{did_you_mean(wanted[0], there)} "
            f"Images are looked for in {str(root / wanted[0] / '<class>')!r}."
        )
    # no hidden ones, as Jupyter's .ipynb_checkpoints
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise DataError(f"There is no folder of images for each class in {str(folder)!r}.")
    index_of = {name: index for index, name in enumerate(classes)}
    samples = make_dataset(str(folder), index_of, IMG_EXTENSIONS, allow_empty=True)
    if not samples:
        raise DataError(f"There are no images in {str(folder)!r}. Looked for {', '.join(IMG_EXTENSIONS)}.")
    paths, labels = zip(*samples, strict=True)
    return ImageSplit(ImageFiles(folder, paths), np.array(labels, dtype=np.int64), tuple(classes), alphabetical=True)


def _load_table(config: DataConfig, training: bool) -> ImageSplit:
    return _from_table(*open_table(config, training), config)


def open_table(config: SplitNames, training: bool) -> tuple[Any, str]:
    """The `datasets.Dataset` of a split of parquet files ("parquet") or of a data set of the Hub, and what to call it.

    Raises DataError where there is none, MissingDependencyError.
    """
    return _open_hub(config, training) if config.name == "hub" else _open_parquet(config, training)


def _open_parquet(config: SplitNames, training: bool) -> tuple[Any, str]:
    datasets = _datasets("parquet files")
    files = _parquet_files(config, training)
    try:
        return datasets.Dataset.from_parquet([str(file) for file in files]), files[0].name
    except Exception as error:  # pyarrow's and datasets' errors have no base in common
        raise DataError(f"{files[0]} cannot be read as parquet: {reason(error)}") from None


def _parquet_files(config: SplitNames, training: bool) -> list[Path]:
    root = Path(config.path or "").expanduser()
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise DataError(f"There is no file or folder {str(root)!r}.")
    wanted = wanted_splits(config, training)
    files = next(filter(None, (_shards(root, name) for name in wanted)), [])
    if not files:
        raise DataError(f"{str(root)!r} holds no file {' or '.join(f'{name}.parquet' for name in wanted)}.")
    return files


def wanted_splits(config: SplitNames, training: bool) -> Sequence[str]:
    """Names of splits to look for, in this order."""
    return [config.train_split] if training else [config.val_split] if config.val_split else VAL_SPLITS


def _shards(root: Path, split: str) -> list[Path]:
    return sorted([*root.glob(f"{glob.escape(split)}.parquet"), *root.glob(f"{glob.escape(split)}-*.parquet")])


def _open_hub(config: SplitNames, training: bool) -> tuple[Any, str]:
    datasets = _datasets("data sets of the Hub")
    try:
        if training:
            split = config.train_split
        else:
            names = datasets.get_dataset_split_names(config.path)
            split = config.val_split or next((name for name in VAL_SPLITS if name in names), VAL_SPLITS[0])
        return datasets.load_dataset(config.path, split=split), f"{config.path} ({split})"
    except Exception as error:  # not found, no network, gated, no such split: as many types as causes
        raise DataError(f"The data set {config.path!r} cannot be had from the Hub: {reason(error)}") from None


def _stream_tars(config: DataConfig, training: bool) -> ImageSplit:
    urls = find_tars(config.path or "", wanted_splits(config, training))
    classes = class_names(urls[0]) if config.num_classes is None else _numbers(config.num_classes)
    return _streamed(Shards(count_tars(urls), classes, config.image_key, config.label_key), classes, training)


def _stream_parquet(config: DataConfig, training: bool) -> ImageSplit:
    return _stream_tables(list(map(str, _parquet_files(config, training))), config, training)


def _stream_hub(config: DataConfig, training: bool) -> ImageSplit:
    datasets = _datasets("data sets of the Hub")
    try:
        files = datasets.load_dataset_builder(config.path).config.data_files or {}
    except Exception as error:  # as many types as causes
        raise DataError(f"The data set {config.path!r} cannot be had from the Hub: {reason(error)}") from None
    wanted = wanted_splits(config, training)
    split = next((name for name in wanted if name in files), None)
    if split is None:
        raise DataError(
            f"The data set {config.path!r} has no split {' or '.join(map(repr, wanted))}."
            f"{did_you_mean(wanted[0], map(str, files))} There are: {', '.join(map(str, files)) or 'none'}."
        )
    urls = list(map(str, files[split]))
    if not all(url.endswith(".parquet") for url in urls):
        raise DataError(
            f"{config.path!r} is not stored as parquet, so it cannot be streamed: set data.streaming to false."
        )
    return _stream_tables(urls, config, training)


def _stream_tables(urls: list[str], config: DataConfig, training: bool) -> ImageSplit:
    datasets = _datasets("parquet files")
    shards, schema = count_parquets(urls)
    features = datasets.Features.from_arrow_schema(schema)
    image_key, label_key = _columns(features, config, urls[0].rsplit("/", 1)[-1])
    label = features[label_key]
    if isinstance(label, datasets.ClassLabel):
        classes = tuple(label.names)
    else:
        classes = class_names(urls[0]) if config.num_classes is None else _numbers(config.num_classes)
    return _streamed(Shards(shards, classes, image_key, label_key), classes, training)


def _streamed(shards: Shards, classes: tuple[str, ...], training: bool) -> ImageSplit:
    if training:
        return ImageSplit(shards, np.empty(0, dtype=np.int64), classes)
    return ImageSplit(shards, shards.labels(), classes)


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def _columns(features: Any, config: DataConfig, described_as: str) -> tuple[str, str]:
    """Names of the image and the label column. Raises DataError where there are none."""
    import datasets

    image_key = config.image_key or _only_column(features, datasets.Image, "image", described_as)
    label_key = config.label_key or (
        "label" if "label" in features else _only_column(features, datasets.ClassLabel, "label", described_as)
    )
    for option, key in (("image_key", image_key), ("label_key", label_key)):
        if key not in features:
            raise DataError(
                f"{described_as} has no column {key!r} (data.{option}).{did_you_mean(key, features)} "
                f"There are: {', '.join(features)}."
            )
    return image_key, label_key


def _from_table(table: Any, described_as: str, config: DataConfig) -> ImageSplit:
    import datasets

    features = table.features
    image_key, label_key = _columns(features, config, described_as)
    table = undecoded(table.select_columns([image_key, label_key]), image_key, described_as)
    names_only = not isinstance(features[label_key], datasets.ClassLabel) and features[label_key].dtype in (
        "string",
        "large_string",
    )
    if names_only:
        table = table.class_encode_column(label_key)
    values = table.with_format("arrow")[label_key]
    if values.null_count:
        raise DataError(f"{values.null_count} labels of {described_as} are missing.")
    labels = np.asarray(values)
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"Column {label_key!r} of {described_as} holds {labels.dtype} values, not class numbers or names."
        )
    label_feature = table.features[label_key]
    if isinstance(label_feature, datasets.ClassLabel):
        classes = tuple(label_feature.names)
    else:
        classes = tuple(map(str, range(int(labels.max(initial=-1)) + 1)))
    outside = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(outside):
        raise DataError(
            f"{len(outside)} labels of {described_as} are out of range: row {outside[0]} has {labels[outside[0]]}, "
            f"and there are the {len(classes)} classes 0 to {len(classes) - 1}."
        )
    return ImageSplit(Table(table, image_key, described_as), labels.astype(np.int64), classes, alphabetical=names_only)


def undecoded(table: Any, image_key: str, described_as: str) -> Any:
    """`table` with the bytes of an image column as they are. Raises DataError where these are no images."""
    import datasets

    try:
        return table.cast_column(image_key, datasets.Image(decode=False))
    except Exception as error:
        raise DataError(f"Column {image_key!r} of {described_as} holds no images: {reason(error)}") from None


def _only_column(features: Any, kind: type, usual: str, described_as: str) -> str:
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(found) == 1:
        return found[0]
    if usual in features:
        return usual
    raise DataError(
        f"{described_as} has {len(found)} {usual} columns: name one with data.{usual}_key. "
        f"There are: {', '.join(features)}."
    )


def align_classes(split: ImageSplit, classes: Sequence[str]) -> ImageSplit:
    """`split` with its labels numbered as in `classes`, matched by name; a split may lack some of them.

    Raises DataError when the split has a class that is not in `classes`.
    """
    if tuple(classes) == split.classes:
        return split
    position = {name: index for index, name in enumerate(classes)}
    unknown = [name for name in split.classes if name not in position]
    if unknown:
        raise DataError(
            f"{len(unknown)} class{'es are' if len(unknown) > 1 else ' is'} not among the {len(classes)} "
            "that the model knows: "
            f"{', '.join(map(repr, unknown[:5]))}{', ...' if len(unknown) > 5 else ''}."
            f"{did_you_mean(unknown[0], classes)}"
        )
    numbers = np.array([position[name] for name in split.classes], dtype=np.int64)
    labels = np.where(split.labels < 0, -1, numbers[split.labels])  # a stream's samples may lack theirs
    return ImageSplit(split.source, labels, tuple(classes))


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise _missing("datasets", what) from error
    datasets.disable_progress_bars()
    return datasets


def _missing(package: str, what: str) -> MissingDependencyError:
    return MissingDependencyError(f'{package} is needed for {what}: pip install "backbone-zoo[train]".')
