"""timm's augmentation policies, without their traps on newer Pillow, and with quicker shears and translations."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from PIL import Image
from timm.data import auto_augment, create_transform

from zoo.data import shifting
from zoo.data.config import AugmentConfig
from zoo.data.streaming import reason
from zoo.errors import ConfigError

__all__ = ["mend", "policy"]

SHIFTS = (
    auto_augment.shear_x,
    auto_augment.shear_y,
    auto_augment.translate_x_abs,
    auto_augment.translate_y_abs,
    auto_augment.translate_x_rel,
    auto_augment.translate_y_rel,
)


def policy(preprocess: dict[str, Any], augment: AugmentConfig) -> list[Any]:
    """timm's own steps between the flips and the tensor: Pillow image to Pillow image.

    Raises ConfigError for a policy that timm does not know.
    """
    # Pillow's affine transforms have no lanczos
    interpolation = "bicubic" if augment.train_interpolation == "lanczos" else augment.train_interpolation
    try:
        _, steps, _ = create_transform(
            input_size=preprocess["input_size"],
            is_training=True,
            color_jitter=augment.color_jitter or None,
            auto_augment=augment.aa,
            interpolation=interpolation,
            mean=preprocess["mean"],
            separate=True,
        )
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise ConfigError(f"augment.aa is {augment.aa!r}, which timm does not understand: {reason(error)}") from None
    mend(steps)
    return steps.transforms


def mend(transform: Any) -> None:
    """Put our forms of timm's operations in their place: equal in what they do, but for what is said here.

    Posterizing keeps one bit at least: timm's policies can ask for none, which Pillow 13 refuses in the middle of an
    epoch. Shears and translations round a pixel's levels by themselves: see `zoo.data.shifting`.
    """
    for step in transform.transforms:
        for op in _flatten([getattr(step, name, None) for name in ("ops", "policy", "augmentations")]):
            function = getattr(op, "aug_fn", None)
            if function is auto_augment.posterize:
                op.aug_fn = _posterize
            elif function in SHIFTS:
                op.aug_fn = functools.partial(shifting.quickly, function)


def _flatten(items: Any) -> Iterator[Any]:
    for item in items or ():
        if isinstance(item, list | tuple):
            yield from _flatten(item)
        else:
            yield item


def _posterize(image: Image.Image, bits_to_keep: int, **unused: Any) -> Image.Image:
    return auto_augment.posterize(image, max(1, bits_to_keep))
