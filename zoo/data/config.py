"""The configuration of image data and of its augmentation."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args

from zoo.errors import ConfigError, did_you_mean

__all__ = ["AugmentConfig", "DataConfig", "check_image_options", "check_options", "default_workers"]

SourceName = Literal["digits", "folder", "parquet", "hub", "webdataset"]
Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos"]


def default_workers() -> int:
    """Four, or as many as this process has cores: torch warns of more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(4, cores or 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they reach the model.

    Args:
        name: "digits" (scikit-learn's 1,797 handwritten digits), "folder" (`path/train/<class>/*.jpg`), "parquet"
            (`path/train.parquet` or `path/train-*.parquet` in the Hub's image layout), "hub" (`path` is an id), or
            "webdataset" (tar shards, `path/train-*.tar`, always streamed).
        path: the folder, the URL of one (webdataset), or the id on the Hub.
        train_split: name of the training split; of tar shards also a pattern, such as "train-{0000..0127}.tar".
        val_split: name of the split to evaluate on; by default the first there is of val, validation and test.
        image_key: column that holds the images of a table, or the extension of a tar's images; by default the only one.
        label_key: column that holds the labels of a table; by default "label", or the only class-label column. In tar
            shards "cls", or a field of the json; by default cls, or else the field "label".
        streaming: read parquet files ("parquet", "hub") from front to back, as training goes on, instead of beforehand.
        shuffle_buffer: images, not yet decoded, among which a worker draws the next of a stream.
        num_classes: of a stream that does not name its classes, and has no classes.txt beside it.
        batch_size: images per process and step.
        token_labels: folder with a label map for each training image ("folder"), as `zoo token-labels` makes them: the
            model learns from its tokens, too (`loss.token_weight`, `augment.mix_token`).
        workers: processes that decode and augment, by default up to four, one for each core that there is; 0 does it
            in the main process.
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
    streaming: bool = False
    shuffle_buffer: int = 1000
    num_classes: int | None = None
    token_labels: str | None = None
    batch_size: int = 128
    workers: int = dataclasses.field(default_factory=default_workers)
    strict: bool = False
    input_size: tuple[int, int, int] | None = None
    crop_pct: float | None = None
    interpolation: Interpolation | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_options("name", self.name, get_args(SourceName))
        check_image_options(self)
        if self.name != "digits" and not self.path:
            raise ConfigError(f"data.name is {self.name!r}: say where it lies with data.path.")
        if self.streaming and self.name in ("digits", "folder"):
            raise ConfigError(f"data.streaming is for parquet files and data sets of the Hub, not for {self.name!r}.")
        if self.token_labels is not None and self.name != "folder":
            raise ConfigError(
                f"data.token_labels has a file for each image file: it is for data.name folder, not {self.name}."
            )
        if type(self.shuffle_buffer) is not int:
            raise ConfigError(f"data.shuffle_buffer must be a whole number, not {self.shuffle_buffer!r}.")
        if self.shuffle_buffer < 1:
            raise ConfigError(f"data.shuffle_buffer must be at least 1, not {self.shuffle_buffer}.")
        if self.num_classes is not None and not (self.streaming or self.name == "webdataset"):
            raise ConfigError("data.num_classes is for streams that do not name their classes: leave it out.")
        if self.num_classes is not None and self.num_classes < 2:
            raise ConfigError(f"data.num_classes must be at least 2, not {self.num_classes}.")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ConfigError(f"data.crop_pct must be above 0 and at most 1, not {self.crop_pct}.")


class _ImageOptions(Protocol):
    """What configurations of images have in common."""

    @property
    def batch_size(self) -> int: ...
    @property
    def workers(self) -> int: ...
    @property
    def input_size(self) -> tuple[int, int, int] | None: ...
    @property
    def interpolation(self) -> Interpolation | None: ...
    @property
    def mean(self) -> tuple[float, ...] | None: ...
    @property
    def std(self) -> tuple[float, ...] | None: ...


def check_options(key: str, value: str | None, options: Sequence[str]) -> None:
    """Raises ConfigError for a value of `data.<key>` that is none of `options`."""
    if value not in options:
        raise ConfigError(
            f"data.{key} is {value!r}, but must be one of {', '.join(options)}.{did_you_mean(str(value), options)}"
        )


def check_image_options(config: _ImageOptions) -> None:
    """Raises ConfigError for values that cannot be."""
    if config.interpolation is not None:
        check_options("interpolation", config.interpolation, get_args(Interpolation))
    for key in ("batch_size", "workers"):
        if type(value := getattr(config, key)) is not int:
            raise ConfigError(f"data.{key} must be a whole number, not {value!r}.")
    if config.batch_size < 1:
        raise ConfigError(f"data.batch_size must be at least 1, not {config.batch_size}.")
    if config.workers < 0:
        raise ConfigError(f"data.workers must be 0 or more, not {config.workers}.")
    if config.input_size is not None and min(config.input_size) < 1:
        raise ConfigError(f"data.input_size must be three numbers above zero, not {list(config.input_size)}.")
    for key in ("mean", "std"):
        values = getattr(config, key)
        if values is not None and not _finite_numbers(values):
            raise ConfigError(f"data.{key} must be a list of finite numbers, one for each channel, not {values!r}.")
    if config.mean is not None and not 0 <= min(config.mean) <= max(config.mean) <= 1:
        raise ConfigError(f"data.mean must be from 0 to 1 for each channel (of 255: divide), not {list(config.mean)}.")
    if config.std is not None and min(config.std) <= 0:
        raise ConfigError(f"data.std must be above zero for each channel, not {list(config.std)}.")


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
        train_crop_mode: "rrc", the random resized crop of `scale` and `ratio`; or "src", DeiT III's simple random crop:
            the shorter side to the model's size, 4 pixels of reflected border, a crop of the model's size.
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip.
        color_jitter: strength of random brightness, contrast and saturation; not used beside `aa`, save "3a".
        aa: policy of AutoAugment, RandAugment or AugMix, e.g. "rand-m9-mstd0.5-inc1"; "3a" is DeiT III's three-augment
            (solarize, grey or blur; `color_jitter` comes after it); null for none.
        train_interpolation: of the random crop's resizing; "random" draws bilinear or bicubic.
        reprob: probability of random erasing.
        remode: what erased areas are filled with: "const" (the mean), "rand" (one colour) or "pixel" (noise).
        recount: greatest number of erased areas.
        aug_repeats: repeated augmentation: an epoch takes so many copies of an image, each augmented on its own, and
            sees as many images in all as without it; 0 for none.
        mixup: alpha of mixup's Beta distribution; 0 for none.
        cutmix: alpha of cutmix's Beta distribution; 0 for none.
        mixup_prob: probability that a batch (pair, element) is mixed.
        mixup_switch_prob: probability of cutmix where both are on.
        mixup_mode: what shares one draw: "batch", "pair" or "elem".
        mixup_off_epoch: epoch from which on nothing is mixed; 0 for never.
        mix_token: alpha of MixToken's Beta distribution, for training with `data.token_labels`: a box of the stem's map
            is exchanged with another image's, and their labels alike (arXiv 2104.10858, section 3); 0 for none.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    train_crop_mode: Literal["rrc", "src"] = "rrc"
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.4
    aa: str | None = None
    train_interpolation: Literal["random", "bilinear", "bicubic", "nearest", "lanczos"] = "random"
    reprob: float = 0.0
    remode: Literal["const", "rand", "pixel"] = "const"
    recount: int = 1
    aug_repeats: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    mixup_off_epoch: int = 0
    mix_token: float = 0.0

    def __post_init__(self) -> None:
        for name in ("hflip", "vflip", "reprob", "mixup_prob", "mixup_switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"augment.{name} is a probability, from 0 to 1, not {getattr(self, name)}.")
        for name in ("color_jitter", "mixup", "cutmix", "mixup_off_epoch", "mix_token", "aug_repeats"):
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
