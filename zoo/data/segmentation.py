"""Images with a mask that says the class of each pixel: where they come from, their augmentation, and batches.

Order and augmentation depend on nothing but (seed, epoch, index), as those of `zoo.data.loading`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import InterpolationMode, v2
from torchvision.tv_tensors import Image as ImageTensor
from torchvision.tv_tensors import Mask

from zoo.data.loading import (
    MAX_DAMAGED_IN_A_ROW,
    UNREADABLE,
    EpochSampler,
    EvaluationLoader,
    SampleDataset,
    TrainingLoader,
    decode,
    draw_from,
    make_loader,
    whole_batches,
)
from zoo.data.segmentation_config import SegmentationAugmentConfig, SegmentationDataConfig
from zoo.data.sources import Arrays, ImageFiles, ImageSource, Table, digit_scans, open_table, undecoded, wanted_splits
from zoo.data.streaming import reason
from zoo.data.transforms import NO_ERASURES, Prepare, resize
from zoo.errors import DataError, did_you_mean

__all__ = [
    "CITYSCAPES",
    "SegmentationBatch",
    "SegmentationSplit",
    "load_segmentation_split",
    "segmentation_evaluation_loader",
    "segmentation_training_loader",
]

IMAGES = (".jpg", ".jpeg", ".png")
CLASSES = "classes.txt"  # in the folder of the data: names of the classes, one on a line

# the classes that are evaluated: number in *_labelIds.png, colour
CITYSCAPES: dict[str, tuple[int, tuple[int, int, int]]] = {
    "road": (7, (128, 64, 128)),
    "sidewalk": (8, (244, 35, 232)),
    "building": (11, (70, 70, 70)),
    "wall": (12, (102, 102, 156)),
    "fence": (13, (190, 153, 153)),
    "pole": (17, (153, 153, 153)),
    "traffic light": (19, (250, 170, 30)),
    "traffic sign": (20, (220, 220, 0)),
    "vegetation": (21, (107, 142, 35)),
    "terrain": (22, (152, 251, 152)),
    "sky": (23, (70, 130, 180)),
    "person": (24, (220, 20, 60)),
    "rider": (25, (255, 0, 0)),
    "car": (26, (0, 0, 142)),
    "truck": (27, (0, 0, 70)),
    "bus": (28, (0, 60, 100)),
    "train": (31, (0, 80, 100)),
    "motorcycle": (32, (0, 0, 230)),
    "bicycle": (33, (119, 11, 32)),
}

# a page of digits: two by two cells of so many pixels, in each a scan of 8x8 enlarged to a side drawn from these
CELL = 48
SCAN_SIDES = (32, 48)
INK = 96  # of 255: where a page is brighter, it is the digit's
PAGES_SEED = 0


@dataclasses.dataclass(frozen=True)
class SegmentationSplit:
    """One split: images and masks, not yet decoded, and the names of the classes.

    `numbers` says for each value in a mask the class's number, `ignored` for none, or -1 where it is out of range.
    """

    images: ImageSource
    masks: ImageSource
    length: int
    classes: tuple[str, ...]
    numbers: np.ndarray

    @property
    def ignored(self) -> int:
        """What stands in a decoded mask for pixels without a class."""
        return _ignored(len(self.classes))

    def __len__(self) -> int:
        return self.length

    def read(self, index: int, channels: int) -> tuple[Tensor, Tensor]:
        """Image (C, H, W) uint8 and mask (H, W), uint8 up to 255 classes, else int32.

        Raises one of UNREADABLE where one of them is damaged, DataError where they are whole and make no sense.
        """
        with self.images.open(index) as file:
            image = decode(file, channels)
        try:
            with self.masks.open(index) as file:
                values = np.array(file)
        except UNREADABLE as error:
            raise ValueError(f"its mask: {reason(error)}") from None
        name = self.masks.name(index)
        if values.ndim != 2:
            raise DataError(f"{name} is no mask: it has {values.shape[-1]} channels, and not one of class numbers.")
        if values.shape != tuple(image.shape[1:]):
            sizes = [f"{width}x{height}" for height, width in (image.shape[1:], values.shape)]
            raise DataError(f"{self.images.name(index)} has {sizes[0]} pixels, and its mask {name} {sizes[1]}.")
        values = values.astype(np.int64)
        low, high = int(values.min()), int(values.max())
        numbers = None if low < 0 or high >= len(self.numbers) else self.numbers[values]
        if numbers is None or (numbers < 0).any():
            bad = (low if low < 0 else high) if numbers is None else int(values[numbers < 0][0])
            raise DataError(
                f"{name} holds the number {bad}, and there are the {len(self.classes)} classes "
                f"{self._range()}. See data.num_classes, data.ignore_index and data.reduce_zero_label."
            )
        dtype = torch.uint8 if len(self.classes) <= 255 else torch.int32
        return image, torch.from_numpy(numbers).to(dtype)

    def _range(self) -> str:
        known = np.flatnonzero((self.numbers >= 0) & (self.numbers != self.ignored))
        return f"{known[0]} to {known[-1]}"


def _ignored(num_classes: int) -> int:
    return 255 if num_classes <= 255 else 65535


# -------------------------------------------------------------------------------------------------------------- sources


def load_segmentation_split(
    config: SegmentationDataConfig, training: bool, classes: Sequence[str] | None = None
) -> SegmentationSplit:
    """The training or the evaluation split that `config` names.

    `classes` are those of data that do not say which theirs are. Raises DataError when it is missing or empty, an image
    has no mask, or the classes are not known.
    """
    load = {"digits": _load_pages, "cityscapes": _load_cityscapes, "folder": _load_folder}.get(config.name)
    if load is not None:
        split = load(config, training, classes)
    else:
        if training and config.name == "parquet" and Path(config.path or "").expanduser().is_file():
            raise DataError(
                f"{config.path!r} is one split, and another one is needed to evaluate what was learned: give the "
                "folder of both as data.path, and their names as data.train_split and data.val_split."
            )
        split = _load_table(config, training, classes)
    if len(split) == 0:
        raise DataError(f"There are no images in {config.path or config.name}.")
    return split


def _load_pages(config: SegmentationDataConfig, training: bool, classes: Sequence[str] | None) -> SegmentationSplit:
    """Pages of scikit-learn's handwritten digits: real scans, but composed here, four to a page.

    A page is 96x96, black, with up to four scans of the 1,797 enlarged from 8x8 and put where chance says. A pixel's
    class is the digit where the enlarged scan is bright (96 of 255 and above), and else the background: nobody
    labelled pixels. Each scan is on one page, so no scan is in both splits: 360 training pages, 90 test pages.
    """
    scans, labels = digit_scans(config, training)
    chance = np.random.default_rng((PAGES_SEED, int(training)))
    order = chance.permutation(len(scans))
    pages = np.zeros((-(-len(scans) // 4), 2 * CELL, 2 * CELL), dtype=np.uint8)
    masks = np.zeros_like(pages)
    for place, scan in enumerate(order):
        page, cell = divmod(place, 4)
        side = int(chance.integers(SCAN_SIDES[0], SCAN_SIDES[1] + 1))
        top, left = (CELL * part + int(chance.integers(CELL - side + 1)) for part in divmod(cell, 2))
        enlarged = np.array(Image.fromarray(scans[scan]).resize((side, side), Image.Resampling.BILINEAR))
        area = page, slice(top, top + side), slice(left, left + side)
        pages[area] = enlarged
        masks[area] = np.where(enlarged >= INK, labels[scan] + 1, 0)
    names = ("background", *map(str, range(10)))
    numbers = _plain_numbers(len(names), config.ignore_index, reduce_zero_label=False)
    return SegmentationSplit(Arrays(pages, "page"), Arrays(masks, "mask of page"), len(pages), names, numbers)


def _load_cityscapes(
    config: SegmentationDataConfig, training: bool, classes: Sequence[str] | None
) -> SegmentationSplit:
    folder = _split_folder(config, training, "leftImg8bit", "Cityscapes lies in leftImg8bit/<split>/<city>/.")
    truth = folder.parents[1] / "gtFine" / folder.name
    ending = "_leftImg8bit.png"
    images = sorted(folder.glob(f"*/*{ending}"))
    if not images:
        raise DataError(f"There are no images <city>/*{ending} in {str(folder)!r}.")
    ready = any(truth.glob("*/*_gtFine_labelTrainIds.png"))
    kind = "labelTrainIds" if ready else "labelIds"
    masks = [truth / path.parent.name / f"{path.name.removesuffix(ending)}_gtFine_{kind}.png" for path in images]
    numbers = np.full(256, _ignored(len(CITYSCAPES)), dtype=np.int64)
    if ready:
        numbers = _plain_numbers(len(CITYSCAPES), config.ignore_index, reduce_zero_label=False)
    else:
        numbers[[label for label, _ in CITYSCAPES.values()]] = range(len(CITYSCAPES))
    return _of_files(folder, images, masks, tuple(CITYSCAPES), numbers)


def _load_folder(config: SegmentationDataConfig, training: bool, classes: Sequence[str] | None) -> SegmentationSplit:
    folder = _split_folder(config, training, "images", "Images are looked for in images/<split>/.")
    truth = folder.parents[1] / "annotations" / folder.name
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
    if not images:
        raise DataError(f"There are no images in {str(folder)!r}. Looked for {', '.join(IMAGES)}.")
    masks = [(truth / path.relative_to(folder)).with_suffix(".png") for path in images]
    names = _class_names(config, classes)
    numbers = _plain_numbers(len(names), config.ignore_index, config.reduce_zero_label)
    return _of_files(folder, images, masks, names, numbers)


def _split_folder(config: SegmentationDataConfig, training: bool, kind: str, layout: str) -> Path:
    root = Path(config.path or "").expanduser()
    if not root.is_dir():
        near = did_you_mean(root.name, [path.name for path in root.parent.iterdir()]) if root.parent.is_dir() else ""
        raise DataError(f"There is no folder {str(root)!r}.{near}")
    if not (root / kind).is_dir():
        there = sorted(path.name for path in root.iterdir() if path.is_dir())
        raise DataError(f"{str(root)!r} has no folder {kind!r}.{did_you_mean(kind, there)} {layout}")
    wanted = wanted_splits(config, training)
    found = next((root / kind / name for name in wanted if (root / kind / name).is_dir()), None)
    if found is None:
        there = sorted(path.name for path in (root / kind).iterdir() if path.is_dir())
        raise DataError(
            f"{str(root / kind)!r} has no folder {' or '.join(map(repr, wanted))}.{did_you_mean(wanted[0], there)} "
            f"There are: {', '.join(there) or 'none'}."
        )
    return found


def _of_files(
    folder: Path, images: Sequence[Path], masks: Sequence[Path], classes: tuple[str, ...], numbers: np.ndarray
) -> SegmentationSplit:
    lacking = [(image, mask) for image, mask in zip(images, masks, strict=True) if not mask.is_file()]
    if lacking:
        image, mask = lacking[0]
        near = did_you_mean(mask.name, [path.name for path in mask.parent.iterdir()]) if mask.parent.is_dir() else ""
        raise DataError(
            f"{len(lacking)} of {len(images)} images have no mask, the first {str(image)!r}: there is no "
            f"{str(mask)!r}.{near}"
        )
    pictures, truth = (ImageFiles(folder, list(map(str, paths))) for paths in (images, masks))
    return SegmentationSplit(pictures, truth, len(images), classes, numbers)


def _load_table(config: SegmentationDataConfig, training: bool, classes: Sequence[str] | None) -> SegmentationSplit:
    import datasets

    table, described_as = open_table(config, training)
    columns = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    image_key = config.image_key or ("image" if "image" in table.features else None)
    others = [name for name in columns if name not in (image_key, config.mask_key)]
    if image_key is None and len(others) == 1:
        image_key = others[0]
    mask_key = config.mask_key or (others[0] if image_key is not None and len(others) == 1 else None)
    keys = {"image": image_key, "mask": mask_key}
    for what, key in keys.items():
        if key is None:
            raise DataError(
                f"Which column of {described_as} holds the {what}s? Name it with data.{what}_key. There are: "
                f"{', '.join(table.features)}."
            )
        if key not in table.features:
            raise DataError(
                f"{described_as} has no column {key!r} (data.{what}_key).{did_you_mean(key, table.features)} "
                f"There are: {', '.join(table.features)}."
            )
    pictures, truth = (
        Table(undecoded(table.select_columns([key]), key, described_as), key, f"{described_as}{of}")
        for key, of in ((cast(str, image_key), ""), (cast(str, mask_key), f", {mask_key}"))
    )
    names = _class_names(config, classes)
    numbers = _plain_numbers(len(names), config.ignore_index, config.reduce_zero_label)
    return SegmentationSplit(pictures, truth, len(table), names, numbers)


def _class_names(config: SegmentationDataConfig, classes: Sequence[str] | None) -> tuple[str, ...]:
    if config.class_names:
        return config.class_names
    root = Path(config.path or "").expanduser()
    listed = (root.parent if root.is_file() else root) / CLASSES
    if config.name != "hub" and listed.is_file():
        names = tuple(line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip())
        if config.num_classes not in (None, len(names)):
            raise DataError(f"data.num_classes is {config.num_classes}, and {str(listed)!r} names {len(names)}.")
        if len(names) < 2 or len(set(names)) < len(names):
            raise DataError(f"{str(listed)!r} must name at least two classes, all different.")
        return names
    if config.num_classes is not None:
        return tuple(map(str, range(config.num_classes)))
    if classes is not None:
        return tuple(classes)
    raise DataError(
        f"The classes of {config.path} are not known: give their number with data.num_classes, or their names with "
        f"data.class_names or, one on a line, in {str(listed)!r}."
    )


def _plain_numbers(num_classes: int, ignore_index: int | None, reduce_zero_label: bool) -> np.ndarray:
    """What the values of a mask mean that holds the classes' own numbers."""
    if ignore_index is None:
        ignore_index = _ignored(num_classes + reduce_zero_label)
    first, last = int(reduce_zero_label), num_classes + reduce_zero_label - 1
    if first <= ignore_index <= last:
        raise DataError(
            f"data.ignore_index {ignore_index} is the number of a class: masks hold {first} to {last}. Choose another, "
            "or set data.reduce_zero_label where 0 is none."
        )
    numbers = np.full(max(last, ignore_index) + 1, -1, dtype=np.int64)
    numbers[first : last + 1] = range(num_classes)
    if reduce_zero_label:
        numbers[0] = _ignored(num_classes)
    numbers[ignore_index] = _ignored(num_classes)
    return numbers


# --------------------------------------------------------------------------------------------------------- augmentation


def fitted(size: Sequence[int], bounds: Sequence[int], factor: float = 1.0) -> tuple[int, int]:
    """Height and width `size` scaled to fit into `bounds` at the same aspect ratio, times `factor`."""
    scale = factor * min(bounds[0] / size[0], bounds[1] / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


class WholeImage:
    """An image as it is evaluated: scaled to fit into the model's input, and filled up with the mean."""

    def __init__(self, preprocess: dict[str, Any]) -> None:
        self.size = tuple(preprocess["input_size"][1:])
        self.interpolation = preprocess["interpolation"]
        self.fill = _mean_bytes(preprocess)

    def __call__(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(C, H, W) uint8 -> (C, *size) uint8, and how much of its height and width the image takes."""
        taken = fitted(image.shape[1:], self.size)
        image = resize(image, taken, self.interpolation)
        if taken == self.size:
            return image, taken
        whole = self.fill.view(-1, 1, 1).repeat(1, *self.size)
        whole[:, : taken[0], : taken[1]] = image
        return whole, taken


class RandomCrop:
    """An image and its mask, scaled, cropped, flipped and coloured at random, alike. Chance is torch's."""

    def __init__(self, preprocess: dict[str, Any], augment: SegmentationAugmentConfig, ignored: int) -> None:
        self.bounds, self.scale = tuple(preprocess["input_size"][1:]), augment.scale
        self.interpolation = preprocess["interpolation"]
        size = augment.crop_size or self.bounds
        fill: dict[Any, Any] = {ImageTensor: _mean_bytes(preprocess).tolist(), Mask: ignored}
        jitter = augment.color_jitter
        self.joint = v2.Compose(
            [
                v2.RandomCrop(size, pad_if_needed=True, fill=fill),
                v2.RandomHorizontalFlip(augment.hflip),
                v2.RandomVerticalFlip(augment.vflip),
                *([v2.ColorJitter(jitter, jitter, jitter)] if jitter else []),
            ]
        )

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(C, H, W) uint8 and (H, W) -> (C, h, w) uint8 and (h, w)"""
        low, high = self.scale
        size = fitted(mask.shape, self.bounds, low + (high - low) * float(torch.rand(())))
        image = resize(image, size, self.interpolation)
        mask = v2.functional.resize(mask[None], list(size), InterpolationMode.NEAREST_EXACT)[0]
        image, mask = self.joint(ImageTensor(image), Mask(mask))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor)


def _mean_bytes(preprocess: dict[str, Any]) -> Tensor:
    return torch.tensor([min(max(round(255 * value), 0), 255) for value in preprocess["mean"]], dtype=torch.uint8)


# -------------------------------------------------------------------------------------------------------------- batches


class SegmentationBatch(NamedTuple):
    """What workers hand over, with the damaged images met on the way.

    Of training: images (B, C, h, w) uint8 and masks (B, h, w). Of evaluation: images (B, C, H, W), masks each at its
    own size, and in `taken` the height and width of each image's own part of `images`; the rest is filling.
    """

    images: Tensor
    masks: Sequence[Tensor]
    damaged: tuple[str, ...]
    taken: tuple[tuple[int, int], ...] = ()
    erased: Tensor = NO_ERASURES


class _Sample(NamedTuple):
    image: Tensor | None  # None: damaged, and not replaced
    mask: Tensor | None
    damaged: tuple[str, ...] = ()
    taken: tuple[int, int] | None = None


class _Pairs(SampleDataset):
    """Images of a split with their masks, as far as workers prepare them.

    An item's number is `(epoch, index, copy)` in training, where `random` transforms both and the next readable image
    takes a damaged one's place; in evaluation, where `whole` transforms the image, an index.
    """

    def __init__(
        self,
        split: SegmentationSplit,
        channels: int,
        *,
        seed: int = 0,
        random: RandomCrop | None = None,
        whole: WholeImage | None = None,
    ) -> None:
        self.split, self.channels, self.seed, self.random, self.whole = split, channels, seed, random, whole

    def __len__(self) -> int:
        return len(self.split)

    def sample(self, key: Any) -> _Sample:
        epoch, index, copy = key if isinstance(key, tuple) else (0, key, 0)
        damaged: list[str] = []
        while True:
            try:
                image, mask = self.split.read(index, self.channels)
                break
            except DataError:
                raise
            except UNREADABLE as error:
                damaged.append(f"{self.split.images.name(index)}: {reason(error)}")
            if self.random is None or len(damaged) >= min(MAX_DAMAGED_IN_A_ROW, len(self)):
                return _Sample(None, None, tuple(damaged))
            index = (index + 1) % len(self)
        if self.random is not None:
            draw_from(self.seed, epoch, index, copy)
            return _Sample(*self.random(image, mask), tuple(damaged))
        assert self.whole is not None
        image, taken = self.whole(image)
        return _Sample(image, mask, tuple(damaged), taken)


def _collate(samples: list[_Sample]) -> SegmentationBatch:
    good: list[Any] = [sample for sample in samples if sample.image is not None]
    damaged = tuple(name for sample in samples for name in sample.damaged)
    if not good:
        return SegmentationBatch(torch.empty(0), (), damaged)
    images = default_collate([sample.image.permute(1, 2, 0) for sample in good]).permute(0, 3, 1, 2)
    masks = [sample.mask for sample in good]
    if good[0].taken is None:
        return SegmentationBatch(images, default_collate(masks), damaged)
    return SegmentationBatch(images, tuple(masks), damaged, tuple(sample.taken for sample in good))


def segmentation_training_loader(
    data: SegmentationSplit,
    config: SegmentationDataConfig,
    preprocess: dict[str, Any],
    augment: SegmentationAugmentConfig,
    *,
    seed: int,
    rank: int = 0,
    processes: int = 1,
    pin_memory: bool = False,
) -> TrainingLoader:
    """The training batches, of SegmentationBatch, of one of `processes` that share `data`.

    Raises DataError when `data` does not fill one batch for each process.
    """
    batches = whole_batches(len(data), config.batch_size, processes)
    order = EpochSampler(len(data), seed=seed, rank=rank, processes=processes)
    random = RandomCrop(preprocess, augment, data.ignored)
    dataset = _Pairs(data, preprocess["input_size"][0], seed=seed, random=random)
    loader = make_loader(dataset, config, sampler=order, drop_last=True, pin_memory=pin_memory, collate_fn=_collate)
    return TrainingLoader(loader, order, data.images.check, Prepare(preprocess), config.batch_size, batches)


def segmentation_evaluation_loader(
    data: SegmentationSplit,
    config: SegmentationDataConfig,
    preprocess: dict[str, Any],
    *,
    rank: int = 0,
    processes: int = 1,
    pin_memory: bool = False,
) -> EvaluationLoader:
    """The evaluation batches, of SegmentationBatch, of one of `processes`: over all of them, every image once."""
    dataset = _Pairs(data, preprocess["input_size"][0], whole=WholeImage(preprocess))
    own = range(rank, len(data), processes)
    loader = make_loader(dataset, config, sampler=own, pin_memory=pin_memory, collate_fn=_collate)
    return EvaluationLoader(loader, data.images.check, Prepare(preprocess))
