"""From a decoded image to what the model gets: timm's transforms, faster where that changes nothing one could measure.

Images are uint8 tensors as long as can be: torch's resize is several times Pillow's speed and differs by rounding.
Workers stop at the cropped and augmented uint8 image; `Prepare` normalises and erases on the model's device.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from timm.layers import SpaceToDepth
from torch import Tensor, nn
from torchvision import transforms

from zoo.data.config import AugmentConfig, DataConfig
from zoo.data.policies import policy
from zoo.data.segmentation_config import SegmentationDataConfig
from zoo.errors import ConfigError

__all__ = [
    "Batch",
    "EvalTransform",
    "LabelMaps",
    "Prepare",
    "RandomTransform",
    "View",
    "eval_transform",
    "preprocessing",
    "random_transform",
]

NO_ERASURES = torch.empty(0, 6, dtype=torch.int64)


class LabelMaps(NamedTuple):
    """Label maps of a batch, (B, 2, k, H, W) as they are stored, and what of each the image shows (see `View`)."""

    maps: Tensor
    regions: Tensor  # (B, 4) float32
    flips: Tensor  # (B, 2) bool


class View(NamedTuple):
    """What a random transform shows of an image: left, top, right, bottom in shares of its sides, and how it flips."""

    region: tuple[float, float, float, float]
    flips: tuple[bool, bool]  # left to right, upside down


class Batch(NamedTuple):
    """What workers hand over: images (B, C, H, W) uint8, labels (B,), and the damaged images met on the way.

    `erased` (K, 6) lists the areas that random erasing chose: number in the batch, top, left, height, width and the
    seed of the noise that fills it. `label_maps` are there where images have such (`zoo.data.token_labels`).
    """

    images: Tensor
    labels: Tensor
    damaged: tuple[str, ...]
    erased: Tensor = NO_ERASURES
    label_maps: LabelMaps | None = None


def preprocessing(model: nn.Module, config: DataConfig | SegmentationDataConfig | None = None) -> dict[str, Any]:
    """Input size, mean, std, crop and interpolation of `model`, from its `pretrained_cfg`, with `config` over them."""
    given = (
        {}
        if config is None
        else {
            key: value
            for key in ("input_size", "crop_pct", "interpolation", "mean", "std")
            if (value := getattr(config, key, None)) is not None
        }
    )
    cfg = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    first = cfg.get("first_conv")  # a name, or several of a model with several ways in
    modules = dict(model.named_modules())
    stems = [modules.get(name) for name in ([first] if isinstance(first, str) else first or ())]
    channels = next((stem.in_channels for stem in stems if isinstance(stem, nn.Conv2d)), cfg["input_size"][0])
    for module in modules.values():
        if isinstance(module, SpaceToDepth):  # TResNet's, before its first convolution
            channels //= module.bs**2
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


# ------------------------------------------------------------------------------------------------------ on the device


class Prepare:
    """A batch as workers hand it over -> images as the model takes them, (B, C, H, W) float, on its device."""

    def __init__(self, preprocess: dict[str, Any], erase_mode: str = "const") -> None:
        self.erase_mode = erase_mode
        self.mean, self.std = (
            torch.tensor([255 * value for value in preprocess[key]]).view(-1, 1, 1) for key in ("mean", "std")
        )

    def __call__(
        self, batch: Batch, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format
    ) -> Tensor:
        if self.mean.device != device:
            self.mean, self.std = self.mean.to(device), self.std.to(device)
        pixels = batch.images.to(device, non_blocking=True)
        images = torch.empty_like(pixels, dtype=torch.float32, memory_format=memory_format)
        # a processor's cache holds one image, not a batch
        for part, given in zip(images, pixels, strict=True) if device.type == "cpu" else [(images, pixels)]:
            part.copy_(given).sub_(self.mean).div_(self.std)
        for number, top, left, height, width, seed in batch.erased.tolist():
            area = images[number, :, top : top + height, left : left + width]
            area.copy_(self._filling(area, seed))
        return images

    def _filling(self, area: Tensor, seed: int) -> Tensor:
        if self.erase_mode == "const":
            return area.new_zeros(())
        generator = torch.Generator(area.device).manual_seed(seed)
        shape = area.shape if self.erase_mode == "pixel" else (len(area), 1, 1)
        return torch.empty(shape, device=area.device).normal_(generator=generator)


# -------------------------------------------------------------------------------------------------------- in the worker


class _ImageTransform:
    """What evaluation's and training's transforms share: `pixels` in a worker, then `prepare` on the device."""

    prepare: Prepare

    def pixels(self, image: Tensor) -> Tensor:
        """(C, H, W) uint8 of any size -> (C, H, W) uint8 of the model's."""
        raise NotImplementedError

    def erasures(self) -> list[tuple[int, ...]]:
        """Areas to erase: top, left, height, width, seed of each."""
        return []

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """One image, (C, H, W) uint8 or Pillow's -> (C, H, W) float, normalised."""
        pixels = self.pixels(to_tensor(image))
        erased = torch.tensor([(0, *area) for area in self.erasures()], dtype=torch.int64).view(-1, 6)
        return self.prepare(Batch(pixels[None], torch.empty(0), (), erased), torch.device("cpu"))[0]


class EvalTransform(_ImageTransform):
    """Resize, centre crop."""

    def __init__(self, preprocess: dict[str, Any]) -> None:
        self.prepare = Prepare(preprocess)
        self.size = tuple(preprocess["input_size"][1:])
        self.interpolation = preprocess["interpolation"]
        self.resized = [math.floor(side / preprocess["crop_pct"]) for side in self.size]
        keys = ("input_size", "interpolation", "crop_pct", "crop_mode")
        self.timms = create_transform(**{key: preprocess[key] for key in keys if key in preprocess}, normalize=False)
        usual = preprocess.get("crop_mode") in (None, "", "center") and self.resized[0] == self.resized[1]
        self.on_tensors = usual and self.interpolation in ON_TENSORS

    def pixels(self, image: Tensor) -> Tensor:
        if not self.on_tensors:
            return self.timms(to_pil(image))
        height, width = image.shape[1:]
        shorter, longer = self.resized[0], int(self.resized[0] * max(height, width) / min(height, width))
        new = (shorter, longer) if height <= width else (longer, shorter)
        top, left = (round((side - cut) / 2) for side, cut in zip(new, self.size, strict=True))
        image = resize(image, new, self.interpolation)
        return image[:, top : top + self.size[0], left : left + self.size[1]]


class RandomTransform(_ImageTransform):
    """A random crop, flips, then timm's policy or colour jitter; random erasing follows on the device.

    Chance is drawn from the same generators and in the same order as timm's transforms draw it.
    """

    def __init__(self, preprocess: dict[str, Any], augment: AugmentConfig) -> None:
        self.prepare = Prepare(preprocess, augment.remode)
        self.augment, self.size = augment, tuple(preprocess["input_size"][1:])
        random_one = augment.train_interpolation == "random"
        self.interpolations = ("bilinear", "bicubic") if random_one else (augment.train_interpolation,)
        self.flips: list[Callable[[Tensor], Tensor] | None] = [
            transforms.RandomHorizontalFlip(augment.hflip) if augment.hflip else None,
            transforms.RandomVerticalFlip(augment.vflip) if augment.vflip else None,
        ]
        self.shift = transforms.RandomCrop(self.size, padding=4, padding_mode="reflect")
        self.on_pil = policy(preprocess, augment)
        self.erasing = (
            RandomErasing(augment.reprob, max_count=augment.recount, device="cpu") if augment.reprob else None
        )

    def pixels(self, image: Tensor) -> Tensor:
        return self.pixels_and_view(image)[0]

    def pixels_and_view(self, image: Tensor) -> tuple[Tensor, View | None]:
        """What `pixels` gives, and which part of the image that is; None for the crop "src", which adds a border.

        Shears and the like of a policy come after it, and are not told.
        """
        image, region = self._crop(image)
        flipped = []
        for flip in self.flips:
            before, image = image, image if flip is None else flip(image)
            flipped.append(image is not before)  # torchvision hands back what it does not flip
        if self.on_pil:
            picture = to_pil(image)
            for step in self.on_pil:
                picture = step(picture)
            image = to_tensor(picture)
        return image, None if region is None else View(region, (flipped[0], flipped[1]))

    def _crop(self, image: Tensor) -> tuple[Tensor, tuple[float, float, float, float] | None]:
        whole = image.shape[1:]
        if self.augment.train_crop_mode == "src":
            scale = max(self.size[0] / whole[0], self.size[1] / whole[1])
            size = (max(self.size[0], round(whole[0] * scale)), max(self.size[1], round(whole[1] * scale)))
            return self.shift(resize(image, size, self._interpolation())), None
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(
            image, self.augment.scale, self.augment.ratio
        )
        region = (left / whole[1], top / whole[0], (left + width) / whole[1], (top + height) / whole[0])
        return resize(image[:, top : top + height, left : left + width], self.size, self._interpolation()), region

    def _interpolation(self) -> str:
        return random.choice(self.interpolations) if len(self.interpolations) > 1 else self.interpolations[0]

    def erasures(self) -> list[tuple[int, ...]]:
        if self.erasing is None:
            return []
        recorder = _Recorder(self.size)
        self.erasing(recorder)
        return [(*area, random.getrandbits(62)) for area in recorder.areas]


class _Recorder:
    """Stands in for an image without channels, to learn which areas timm's random erasing chooses."""

    dtype = torch.float32

    def __init__(self, size: tuple[int, ...]) -> None:
        self.shape = (0, *size)
        self.areas: list[tuple[int, int, int, int]] = []

    def size(self) -> tuple[int, ...]:
        return self.shape

    def __setitem__(self, key: tuple[slice, slice, slice], value: Tensor) -> None:
        _, rows, columns = key
        self.areas.append((rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start))


def eval_transform(preprocess: dict[str, Any]) -> EvalTransform:
    """Resize, centre crop, normalise. An image -> (C, H, W)."""
    return EvalTransform(preprocess)


def random_transform(preprocess: dict[str, Any], augment: AugmentConfig) -> RandomTransform:
    """The augmentation that `augment` describes, then normalisation. An image -> (C, H, W).

    Raises ConfigError for a policy that timm does not know.
    """
    return RandomTransform(preprocess, augment)


# ------------------------------------------------------------------------------------------------------------- resizing

ON_TENSORS = ("bilinear", "bicubic")


def resize(image: Tensor, size: tuple[int, ...], interpolation: str) -> Tensor:
    """(C, H, W) uint8 -> (C, *size) uint8, with antialiasing, as Pillow does it."""
    if tuple(image.shape[1:]) == size:
        return image
    if interpolation not in ON_TENSORS:
        return to_tensor(to_pil(image).resize((size[1], size[0]), str_to_pil_interp(interpolation)))
    # the copy costs less than it saves: torch keeps this layout, and is fastest in it
    image = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(image, size, mode=interpolation, antialias=True)[0]


def to_tensor(image: Image.Image | Tensor) -> Tensor:
    """(C, H, W) uint8; the memory is laid out as (H, W, C)."""
    if isinstance(image, Tensor):
        return image
    pixels = np.array(image)
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


def to_pil(image: Tensor) -> Image.Image:
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
