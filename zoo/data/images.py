"""Images with labels: a folder, parquet files, a data set of the Hub, or scikit-learn's digits.

Thin over `datasets`, torchvision and `timm.data`. What it adds: an order and an augmentation that depend on nothing but
(seed, epoch, index), so that any number of workers, and a resumed run, sees the same; and damaged images that are
skipped and counted instead of ending a run after a day.
"""

from __future__ import annotations

import dataclasses
import glob
import io
import math
import os
import random
import signal
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.auto_augment import posterize
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from zoo.errors import ConfigError, DataError, MissingDependencyError, did_you_mean

__all__ = [
    "AugmentConfig",
    "Batch",
    "DataConfig",
    "EpochSampler",
    "ImageDataset",
    "ImageSplit",
    "load_split",
    "make_loader",
    "preprocessing",
    "random_transform",
]

SourceName = Literal["digits", "folder", "parquet", "hub"]
Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos"]

VAL_SPLITS = ("val", "validation", "test")
DIGITS_SPLIT_SEED = 0
DIGITS_TEST_IMAGES = 360
# what Pillow raises for bytes that are not, or only partly, an image
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
MAX_DAMAGED_IN_A_ROW = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they reach the model.

    Args:
        name: "digits" (scikit-learn's 1,797 handwritten digits), "folder" (`path/train/<class>/*.jpg`), "parquet"
            (`path/train.parquet` or `path/train-*.parquet` in the Hub's image layout), or "hub" (`path` is an id).
        path: the folder, or the id on the Hub.
        train_split: name of the training split.
        val_split: name of the split to evaluate on; by default the first there is of val, validation and test.
        image_key: column that holds the images of a table; by default the only image column.
        label_key: column that holds the labels of a table; by default "label", or the only class-label column.
        batch_size: images per process and step.
        workers: processes that decode and augment; 0 does it in the main process.
        strict: end with an error at a damaged image, instead of skipping, counting and listing it.
        input_size: channels, height and width that the model gets; by default what its weights were trained with.
        crop_pct: share of the resized image that the centre crop of evaluation keeps; by default the model's.
        interpolation: of the resizing in evaluation; by default the model's.
        mean: of each channel, in [0, 1]; by default the model's.
        std: of each channel, in [0, 1]; by default the model's.
    """

    name: SourceName = "folder"
    path: str | None = None
    train_split: str = "train"
    val_split: str | None = None
    image_key: str | None = None
    label_key: str | None = None
    batch_size: int = 128
    workers: int = 4
    strict: bool = False
    input_size: tuple[int, int, int] | None = None
    crop_pct: float | None = None
    interpolation: Interpolation | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for key, value, options in (
            ("name", self.name, get_args(SourceName)),
            ("interpolation", self.interpolation, (None, *get_args(Interpolation))),
        ):
            if value not in options:
                names = [option for option in options if option]
                raise ConfigError(
                    f"data.{key} is {value!r}, but must be one of {', '.join(names)}.{did_you_mean(str(value), names)}"
                )
        if self.name != "digits" and not self.path:
            raise ConfigError(f"data.name is {self.name!r}: say where it lies with data.path.")
        for key in ("batch_size", "workers"):
            if type(value := getattr(self, key)) is not int:
                raise ConfigError(f"data.{key} must be a whole number, not {value!r}.")
        if self.batch_size < 1:
            raise ConfigError(f"data.batch_size must be at least 1, not {self.batch_size}.")
        if self.workers < 0:
            raise ConfigError(f"data.workers must be 0 or more, not {self.workers}.")
        if self.input_size is not None and min(self.input_size) < 1:
            raise ConfigError(f"data.input_size must be three numbers above zero, not {list(self.input_size)}.")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ConfigError(f"data.crop_pct must be above 0 and at most 1, not {self.crop_pct}.")
        for key in ("mean", "std"):
            values = getattr(self, key)
            if values is not None and not _finite_numbers(values):
                raise ConfigError(f"data.{key} must be a list of finite numbers, one for each channel, not {values!r}.")
        if self.std is not None and min(self.std) <= 0:
            raise ConfigError(f"data.std must be above zero for each channel, not {list(self.std)}.")


def _finite_numbers(values: Any) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) > 0
        and all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes to the training images, under timm's names.

    Args:
        scale: least and greatest share of the image's area that the random crop takes.
        ratio: least and greatest aspect ratio of the random crop.
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip.
        color_jitter: strength of random brightness, contrast and saturation; not used beside `aa`.
        aa: policy of AutoAugment, RandAugment or AugMix, e.g. "rand-m9-mstd0.5-inc1"; null for none.
        train_interpolation: of the random crop's resizing; "random" draws bilinear or bicubic.
        reprob: probability of random erasing.
        remode: what erased areas are filled with: "const" (the mean), "rand" (one colour) or "pixel" (noise).
        recount: greatest number of erased areas.
        mixup: alpha of mixup's Beta distribution; 0 for none.
        cutmix: alpha of cutmix's Beta distribution; 0 for none.
        mixup_prob: probability that a batch (pair, element) is mixed.
        mixup_switch_prob: probability of cutmix where both are on.
        mixup_mode: what shares one draw: "batch", "pair" or "elem".
        mixup_off_epoch: epoch from which on nothing is mixed; 0 for never.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.4
    aa: str | None = None
    train_interpolation: Literal["random", "bilinear", "bicubic", "nearest", "lanczos"] = "random"
    reprob: float = 0.0
    remode: Literal["const", "rand", "pixel"] = "const"
    recount: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    mixup_off_epoch: int = 0

    def __post_init__(self) -> None:
        for name in ("hflip", "vflip", "reprob", "mixup_prob", "mixup_switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"augment.{name} is a probability, from 0 to 1, not {getattr(self, name)}.")
        for name in ("color_jitter", "mixup", "cutmix", "mixup_off_epoch"):
            if getattr(self, name) < 0:
                raise ConfigError(f"augment.{name} must not be negative, but is {getattr(self, name)}.")
        if self.recount < 1:
            raise ConfigError(f"augment.recount must be at least 1, not {self.recount}.")
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ConfigError(f"augment.{name} must rise from a number above zero, not {[low, high]}.")

    @property
    def mixes(self) -> bool:
        return (self.mixup > 0 or self.cutmix > 0) and self.mixup_prob > 0


# --------------------------------------------------------------------------------------------------------------- splits


class ImageSource(Protocol):
    """Images by number, each with a name that a person can find it by."""

    def open(self, index: int) -> Image.Image: ...
    def name(self, index: int) -> str: ...


@dataclasses.dataclass(frozen=True)
class ImageSplit:
    """One split of a data set: images not yet decoded, their labels, and the names of the classes."""

    source: ImageSource
    labels: np.ndarray  # (N,) int64
    classes: tuple[str, ...]
    alphabetical: bool = False  # the classes are numbered by the order of their names, for want of anything better

    def __len__(self) -> int:
        return len(self.labels)


class _Files:
    def __init__(self, paths: Sequence[str]) -> None:
        # one block: forked workers do not copy a million strings
        self.paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)

    def open(self, index: int) -> Image.Image:
        return Image.open(self.name(index))

    def name(self, index: int) -> str:
        return os.fsdecode(self.paths[index])


class _Table:
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


class _Digits:
    def __init__(self, images: np.ndarray) -> None:
        self.images = images  # (N, 8, 8), 0 to 255

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def name(self, index: int) -> str:
        return f"digit {index}"


def load_split(config: DataConfig, training: bool) -> ImageSplit:
    """The training or the evaluation split that `config` names.

    Raises DataError when it is missing, empty, has one class only, or labels out of range.
    """
    load: Callable[[DataConfig, bool], ImageSplit] = {
        "digits": _load_digits,
        "folder": _load_folder,
        "parquet": _load_parquet,
        "hub": _load_hub,
    }[config.name]
    split = load(config, training)
    where = config.path or config.name
    if len(split) == 0:
        raise DataError(f"There are no images in {where}.")
    if len(split.classes) < 2:
        raise DataError(f"{where} has one class only, {split.classes[0]!r}: there is nothing to tell apart.")
    return split


def _load_digits(config: DataConfig, training: bool) -> ImageSplit:
    """Stratified by class, so that both splits hold every digit in equal shares."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise _missing("scikit-learn", "the digits") from error
    digits = load_digits()
    labels = digits.target.astype(np.int64)
    parts = train_test_split(
        np.arange(len(labels)), test_size=DIGITS_TEST_IMAGES, stratify=labels, random_state=DIGITS_SPLIT_SEED
    )
    chosen = np.sort(parts[0 if training else 1])
    images = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return ImageSplit(_Digits(images), labels[chosen], tuple(map(str, digits.target_names)))


def _load_folder(config: DataConfig, training: bool) -> ImageSplit:
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    root = Path(config.path or "").expanduser()
    if not root.is_dir():
        raise DataError(f"There is no folder {str(root)!r}.")
    wanted = [config.train_split] if training else [config.val_split] if config.val_split else VAL_SPLITS
    folder = next((root / name for name in wanted if (root / name).is_dir()), None)
    if folder is None and not training and config.val_split is None and not (root / config.train_split).is_dir():
        folder = root  # classes lie in it directly
    if folder is None:
        there = sorted(path.name for path in root.iterdir() if path.is_dir())
        raise DataError(
            f"{str(root)!r} has no folder {' or '.join(map(repr, wanted))}.{did_you_mean(wanted[0], there)} "
            f"Images are looked for in {str(root / wanted[0] / '<class>')!r}."
        )
    try:
        classes, index_of = find_classes(str(folder))
    except FileNotFoundError:
        raise DataError(f"There is no folder of images for each class in {str(folder)!r}.") from None
    samples = make_dataset(str(folder), index_of, IMG_EXTENSIONS, allow_empty=True)
    if not samples:
        raise DataError(f"There are no images in {str(folder)!r}. Looked for {', '.join(IMG_EXTENSIONS)}.")
    paths, labels = zip(*samples, strict=True)
    return ImageSplit(_Files(paths), np.array(labels, dtype=np.int64), tuple(classes), alphabetical=True)


def _load_parquet(config: DataConfig, training: bool) -> ImageSplit:
    datasets = _datasets("parquet files")
    root = Path(config.path or "").expanduser()
    if root.is_file():
        files = [root]
    elif root.is_dir():
        wanted = [config.train_split] if training else [config.val_split] if config.val_split else VAL_SPLITS
        files = next(filter(None, (_shards(root, name) for name in wanted)), [])
        if not files:
            raise DataError(f"{str(root)!r} holds no file {' or '.join(f'{name}.parquet' for name in wanted)}.")
    else:
        raise DataError(f"There is no file or folder {str(root)!r}.")
    try:
        table = datasets.Dataset.from_parquet([str(file) for file in files])
    except Exception as error:  # pyarrow's and datasets' errors have no base in common
        raise DataError(f"{files[0]} cannot be read as parquet: {_reason(error)}") from None
    return _from_table(table, config, files[0].name)


def _shards(root: Path, split: str) -> list[Path]:
    return sorted([*root.glob(f"{glob.escape(split)}.parquet"), *root.glob(f"{glob.escape(split)}-*.parquet")])


def _load_hub(config: DataConfig, training: bool) -> ImageSplit:
    datasets = _datasets("data sets of the Hub")
    try:
        if training:
            split = config.train_split
        else:
            names = datasets.get_dataset_split_names(config.path)
            split = config.val_split or next((name for name in VAL_SPLITS if name in names), VAL_SPLITS[0])
        table = datasets.load_dataset(config.path, split=split)
    except Exception as error:  # not found, no network, gated, no such split: as many types as causes
        raise DataError(f"The data set {config.path!r} cannot be had from the Hub: {_reason(error)}") from None
    return _from_table(table, config, f"{config.path} ({split})")


def _from_table(table: Any, config: DataConfig, described_as: str) -> ImageSplit:
    import datasets

    features = table.features
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
    table = table.select_columns([image_key, label_key])
    try:
        table = table.cast_column(image_key, datasets.Image(decode=False))
    except Exception as error:
        raise DataError(f"Column {image_key!r} of {described_as} holds no images: {_reason(error)}") from None
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
    return ImageSplit(_Table(table, image_key, described_as), labels.astype(np.int64), classes, alphabetical=names_only)


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
            f"{len(unknown)} classes are not among the {len(classes)} that the model knows: "
            f"{', '.join(map(repr, unknown[:5]))}{', ...' if len(unknown) > 5 else ''}."
            f"{did_you_mean(unknown[0], classes)}"
        )
    numbers = np.array([position[name] for name in split.classes], dtype=np.int64)
    return ImageSplit(split.source, numbers[split.labels], tuple(classes))


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise _missing("datasets", what) from error
    datasets.disable_progress_bars()
    return datasets


def _missing(package: str, what: str) -> MissingDependencyError:
    return MissingDependencyError(f'{package} is needed for {what}: pip install "backbone-zoo[train]".')


def _reason(error: Exception) -> str:
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# ----------------------------------------------------------------------------------------------------------- transforms


def preprocessing(model: nn.Module, config: DataConfig | None = None) -> dict[str, Any]:
    """Input size, mean, std, crop and interpolation of `model`, from its `pretrained_cfg`, with `config` over them."""
    given = (
        {}
        if config is None
        else {
            key: value
            for key in ("input_size", "crop_pct", "interpolation", "mean", "std")
            if (value := getattr(config, key)) is not None
        }
    )
    cfg = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    stem = dict(model.named_modules()).get(str(cfg.get("first_conv")))
    channels = stem.in_channels if isinstance(stem, nn.Conv2d) else cfg["input_size"][0]
    if "input_size" in given and given["input_size"][0] != channels:
        raise ConfigError(
            f"data.input_size asks for {given['input_size'][0]} channels, but the model takes {channels} "
            "(model.args.in_chans)."
        )
    if channels not in (1, 3):
        raise ConfigError(f"The model takes {channels} channels. Images have 3, or 1 in grey.")
    cfg["input_size"] = (channels, *cfg["input_size"][1:])
    for key in ("mean", "std"):
        if len(given.get(key, ())) not in (0, 1, channels):
            raise ConfigError(f"data.{key} has {len(given[key])} values for {channels} channels.")
    resolved = resolve_data_config(given, pretrained_cfg=cfg)
    for key in ("mean", "std"):
        values = resolved[key]
        resolved[key] = tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
    return resolved


EVAL_KEYS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


def eval_transform(preprocess: dict[str, Any]) -> Callable[[Image.Image], Tensor]:
    """Resize, centre crop, normalise. An image -> (C, H, W)."""
    return create_transform(**{key: preprocess[key] for key in EVAL_KEYS if key in preprocess})


def random_transform(preprocess: dict[str, Any], augment: AugmentConfig) -> Callable[[Image.Image], Tensor]:
    """The augmentation that `augment` describes, then normalisation. An image -> (C, H, W)."""
    try:
        transform = create_transform(
            input_size=preprocess["input_size"],
            is_training=True,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            vflip=augment.vflip,
            color_jitter=augment.color_jitter or None,
            auto_augment=augment.aa,
            interpolation=augment.train_interpolation,
            mean=preprocess["mean"],
            std=preprocess["std"],
            re_prob=augment.reprob,
            re_mode=augment.remode,
            re_count=augment.recount,
        )
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise ConfigError(f"augment.aa is {augment.aa!r}, which timm does not understand: {_reason(error)}") from None
    _guard_posterize(transform)
    return transform


def _guard_posterize(transform: Any) -> None:
    """Keep one bit at least: timm's policies can ask for none, which Pillow 13 refuses in the middle of an epoch."""
    for step in transform.transforms:
        for op in _flatten(
            [getattr(step, "ops", None), getattr(step, "policy", None), getattr(step, "augmentations", None)]
        ):
            if getattr(op, "aug_fn", None) is posterize:
                op.aug_fn = _posterize_one_bit_at_least


def _posterize_one_bit_at_least(image: Image.Image, bits_to_keep: int, **unused: Any) -> Image.Image:
    return posterize(image, max(1, bits_to_keep))


def _flatten(items: Any) -> Iterator[Any]:
    for item in items or ():
        if isinstance(item, list | tuple):
            yield from _flatten(item)
        else:
            yield item


# -------------------------------------------------------------------------------------------------------------- loading


class Sample(NamedTuple):
    image: Tensor | None  # None: damaged, and not replaced
    label: int
    damaged: tuple[str, ...]  # names of images that were tried and cannot be read


class Batch(NamedTuple):
    """images (B, C, H, W), labels (B,), and the names of damaged images that were skipped on the way."""

    images: Tensor
    labels: Tensor
    damaged: tuple[str, ...]


class ImageDataset(Dataset[Sample]):
    """Images of a split, transformed.

    An item's number is an index, or `(epoch, index)`: then random transforms draw from (seed, epoch, index) alone. With
    `replace_damaged`, the next readable image takes a damaged one's place, so that training batches keep their size.
    """

    def __init__(
        self,
        split: ImageSplit,
        transform: Callable[[Image.Image], Tensor],
        *,
        channels: int = 3,
        seed: int = 0,
        replace_damaged: bool = False,
    ) -> None:
        self.split, self.transform, self.seed, self.replace_damaged = split, transform, seed, replace_damaged
        self.mode = "L" if channels == 1 else "RGB"

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (None, key)
        damaged: list[str] = []
        while True:
            try:
                with self.split.source.open(index) as file:
                    image = file.convert(self.mode)
                break
            except UNREADABLE as error:
                damaged.append(f"{self.split.source.name(index)}: {_reason(error)}")
            if not self.replace_damaged or len(damaged) >= min(MAX_DAMAGED_IN_A_ROW, len(self)):
                return Sample(None, int(self.split.labels[index]), tuple(damaged))
            index = (index + 1) % len(self)
        if epoch is None:
            tensor = self.transform(image)
        else:
            with _seeded(self.seed, epoch, index):
                tensor = self.transform(image)
        return Sample(tensor, int(self.split.labels[index]), tuple(damaged))


class _seeded:
    """Random numbers from `entropy` alone inside the block; those outside go on as if nothing had been."""

    def __init__(self, *entropy: int) -> None:
        self.entropy = entropy

    def __enter__(self) -> None:
        self.before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        seed = int(np.random.SeedSequence(self.entropy).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)

    def __exit__(self, *_: object) -> None:
        random.setstate(self.before[0])
        np.random.set_state(self.before[1])
        torch.set_rng_state(self.before[2])


class EpochSampler(Sampler[tuple[int, int]]):
    """`(epoch, index)` for this process's share of an epoch: shuffled by (seed, epoch), from the `start`-th on.

    Shares are cut to equal length, as data-parallel steps must be equally many.
    """

    def __init__(self, length: int, *, seed: int, rank: int = 0, processes: int = 1) -> None:
        self.length, self.seed, self.rank, self.processes = length, seed, rank, processes
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.length // self.processes

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        share = order[self.rank : len(self) * self.processes : self.processes]
        return ((self.epoch, int(index)) for index in share[self.start :])


def make_loader(
    dataset: ImageDataset,
    config: DataConfig,
    *,
    sampler: Sampler | Sequence[int] | None = None,
    drop_last: bool = False,
    pin_memory: bool = False,
) -> DataLoader:
    """Batches of `dataset`, in order unless a `sampler` says otherwise."""
    return DataLoader(
        dataset,
        batch_size=config.batch_size,
        sampler=sampler,
        drop_last=drop_last,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        pin_memory=pin_memory,
        collate_fn=_collate,
        worker_init_fn=_init_worker,
        generator=torch.Generator(),  # or each new iterator would draw from the model's random numbers
    )


def _collate(samples: list[Sample]) -> Batch:
    good = [(sample.image, sample.label) for sample in samples if sample.image is not None]
    damaged = tuple(name for sample in samples for name in sample.damaged)
    if not good:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), damaged)
    images, labels = default_collate(good)
    return Batch(images, labels, damaged)


def _init_worker(worker: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process finishes its step and stops its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class DamageReport:
    """Collects damaged images, each once; the first ends everything when `strict`."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.names: dict[str, None] = {}

    def add(self, names: Sequence[str]) -> None:
        if names and self.strict:
            raise DataError(f"A damaged image: {names[0]}. Leave data.strict at false to skip such images.")
        self.names.update(dict.fromkeys(names))

    def __str__(self) -> str:
        shown = [f"  {name}" for name in list(self.names)[:20]]
        more = [f"  ... and {len(self.names) - 20} more"] if len(self.names) > 20 else []
        return "\n".join([f"Skipped {len(self.names)} damaged image{'s' * (len(self.names) != 1)}:", *shown, *more])
