"""The configuration of images with masks, and of their augmentation."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from zoo.data.config import Interpolation, check_image_options, check_options, default_workers
from zoo.errors import ConfigError

__all__ = ["SegmentationAugmentConfig", "SegmentationDataConfig"]

SegmentationSourceName = Literal["digits", "cityscapes", "folder", "parquet", "hub"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationDataConfig:
    """Which images with masks of class numbers, and how they reach the model.

    Args:
        name: "digits" (pages composed of scikit-learn's handwritten digits), "cityscapes" (its own layout,
            `leftImg8bit` beside `gtFine`, and its 19 classes), "folder" (`path/images/<split>/**.jpg` or png, and masks
            of the same names in `path/annotations/<split>/**.png`), "parquet" (`path/train.parquet` or
            `path/train-*.parquet` with a column of images and one of masks), or "hub" (`path` is an id).
        path: the folder, or the id on the Hub.
        train_split: name of the training split.
        val_split: name of the split to evaluate on; by default the first there is of val, validation and test.
        image_key: column that holds the images of a table; by default "image".
        mask_key: column that holds the masks of a table; by default the only other column of images.
        num_classes: of data that do not name their classes; those lie in `path/classes.txt`, one on a line, or in
            class_names.
        class_names: names of the classes, in the order of their numbers.
        ignore_index: number in a mask of pixels that have no class: they are neither learned nor counted; by default
            255, or 65535 where there are more classes than fit below.
        reduce_zero_label: 0 stands for no class, and classes are numbered from 1 (as in ADE20k).
        batch_size: images per process and step.
        workers: processes that decode and augment, by default up to four, one for each core that there is; 0 does it
            in the main process.
        strict: end with an error at a damaged image or mask, instead of skipping, counting and listing it.
        input_size: channels, height and width of what the model gets in evaluation: the whole image, scaled to fit in
            at its own aspect ratio, and filled up with the mean; by default what the model's weights were trained with.
        interpolation: of that scaling; by default the model's.
        mean: of each channel, in [0, 1]; by default the model's.
        std: of each channel, in [0, 1]; by default the model's.
    """

    name: SegmentationSourceName = "folder"
    path: str | None = None
    train_split: str = "train"
    val_split: str | None = None
    image_key: str | None = None
    mask_key: str | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()
    ignore_index: int | None = None
    reduce_zero_label: bool = False
    batch_size: int = 8
    workers: int = dataclasses.field(default_factory=default_workers)
    strict: bool = False
    input_size: tuple[int, int, int] | None = None
    interpolation: Interpolation | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_options("name", self.name, get_args(SegmentationSourceName))
        check_image_options(self)
        if self.name != "digits" and not self.path:
            raise ConfigError(f"data.name is {self.name!r}: say where it lies with data.path.")
        for key in ("num_classes", "ignore_index"):
            value = getattr(self, key)
            if value is not None and type(value) is not int:
                raise ConfigError(f"data.{key} must be a whole number, not {value!r}.")
        if self.num_classes is not None and self.num_classes < 2:
            raise ConfigError(f"data.num_classes must be at least 2, not {self.num_classes}.")
        if self.ignore_index is not None and not 0 <= self.ignore_index <= 65535:
            raise ConfigError(f"data.ignore_index must be from 0 to 65535, not {self.ignore_index}.")
        names = self.class_names
        if names and (len(names) < 2 or len(set(names)) < len(names)):
            raise ConfigError("data.class_names must be at least two, all different.")
        if names and self.num_classes not in (None, len(names)):
            raise ConfigError(
                f"data.num_classes is {self.num_classes}, and there are {len(names)} class_names: set one of the two."
            )
        if self.name in ("digits", "cityscapes") and (names or self.num_classes is not None or self.reduce_zero_label):
            raise ConfigError(
                f"data.name {self.name!r} has its own classes: leave out num_classes, class_names and "
                "reduce_zero_label."
            )
        if self.name not in ("parquet", "hub") and (self.image_key or self.mask_key):
            raise ConfigError(f"data.image_key and mask_key are for tables (parquet, hub), not for {self.name!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationAugmentConfig:
    """Random changes to the training images and their masks: scaled, cropped, flipped, coloured, in this order.

    Args:
        scale: least and greatest factor on the size at which the image is evaluated (`data.input_size`).
        crop_size: height and width of what the model learns from; by default those of data.input_size. What is smaller
            is filled up with the mean, and its mask with pixels that are ignored.
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip.
        color_jitter: strength of random brightness, contrast and saturation.
    """

    scale: tuple[float, float] = (0.5, 2.0)
    crop_size: tuple[int, int] | None = None
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0

    def __post_init__(self) -> None:
        for name in ("hflip", "vflip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"augment.{name} is a probability, from 0 to 1, not {getattr(self, name)}.")
        if self.color_jitter < 0:
            raise ConfigError(f"augment.color_jitter must not be negative, but is {self.color_jitter}.")
        low, high = self.scale
        if not 0 < low <= high < math.inf:
            raise ConfigError(f"augment.scale must rise from a number above zero, not {[low, high]}.")
        if self.crop_size is not None and min(self.crop_size) < 1:
            raise ConfigError(f"augment.crop_size must be two numbers above zero, not {list(self.crop_size)}.")
