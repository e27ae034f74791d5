"""Segmentation as a task: data in every layout, joint augmentation, loss, mIoU, runs, and what a user gets wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image

import zoo
from tests.launcher import Launcher, python
from tests.test_training import assert_same_checkpoint, rows
from zoo.config import load_config
from zoo.data import (
    DataConfig,
    SegmentationAugmentConfig,
    SegmentationDataConfig,
    load_segmentation_split,
    segmentation_evaluation_loader,
    segmentation_training_loader,
)
from zoo.data.segmentation import CITYSCAPES, RandomCrop
from zoo.errors import CheckpointError, ConfigError, DataError
from zoo.evaluation import evaluate, load_model
from zoo.evaluation.config import parse_evaluation
from zoo.evaluation.segmentation import PixelCounts, resized_to_mask
from zoo.loading import model_task
from zoo.training import SegmentationTrainingConfig, train
from zoo.training.checkpoint import read_state
from zoo.training.loop import make_accelerator
from zoo.training.segmentation import Segmentation, build_segmentation_model, pixel_losses
from zoo.training.segmentation_config import SegmentationLossConfig, SegmentationModelConfig

ROOT = Path(__file__).resolve().parents[1]
SMALL = """
task: segmentation
model:
  name: ffnet_test_segmentation
  args: {depths: [1, 1, 1, 1], dims: [8, 8, 16, 16]}
data: {name: digits, batch_size: 8, workers: 0, input_size: [1, 48, 48], mean: [0.2], std: [0.35]}
augment: {scale: [0.8, 1.25], crop_size: [32, 32], hflip: 0.0, color_jitter: 0.2}
optimizer: {lr: 3.0e-3}
scheduler: {epochs: 1, warmup_epochs: 0.1}
train: {device: cpu}
output: {tracker: null}
"""
# everything that draws random numbers or keeps state
EVERYTHING: dict[str, Any] = {
    "model": {"args": {"drop_rate": 0.2}},
    "data": {"batch_size": 4, "num_classes": 11, "input_size": [3, 48, 48], "mean": None, "std": None},
    "augment": {"hflip": 0.5},
    "loss": {"ohem_thresh": 0.9, "ohem_min_kept": 2000, "smoothing": 0.1},
    "optimizer": {"clip_grad": 1.0, "layer_decay": 0.9},
    "scheduler": {"epochs": 2},
    "train": {
        "model_ema": True,
        "model_ema_decay": 0.9,
        "grad_accum_steps": 2,
        "channels_last": True,
        "save_interval_updates": 2,
    },
}
PREPROCESS: dict[str, Any] = {
    "input_size": (3, 32, 64),
    "mean": (0.5, 0.25, 0.75),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bilinear",
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def configure(recipe: Path, folder: Path, **changes: Any) -> SegmentationTrainingConfig:
    changes["output"] = {"dir": str(folder), **changes.get("output", {})}
    return load_config(SegmentationTrainingConfig, recipe, **changes)


def pages(count: int, training: bool = True) -> list[tuple[Image.Image, np.ndarray]]:
    """The first pages of digits: grey images, and masks of 0 (background) to 10."""
    split = load_segmentation_split(SegmentationDataConfig(name="digits"), training=training)
    return [(split.images.open(i), np.array(split.masks.open(i))) for i in range(count)]


def save_png(path: Path, image: Image.Image | np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path)
    return path


def write_folder(root: Path, counts: tuple[int, int] = (4, 2), **named: str) -> SegmentationDataConfig:
    for split, count in zip(("train", "val"), counts, strict=True):
        for number, (image, mask) in enumerate(pages(count, split == "train")):
            save_png(root / "images" / split / "some" / f"{number}.png", image.convert("RGB"))
            save_png(root / "annotations" / split / "some" / f"{number}.png", mask)
    return SegmentationDataConfig(path=str(root), num_classes=11, batch_size=2, workers=0)


def write_cityscapes(root: Path, counts: tuple[int, int] = (3, 2), kinds: str = "labelIds") -> SegmentationDataConfig:
    """Pages in Cityscapes' layout; class n of a page becomes the n-th of Cityscapes' classes."""
    ids = np.array([number for number, _ in CITYSCAPES.values()], dtype=np.uint8)
    for split, count in zip(("train", "val"), counts, strict=True):
        for number, (image, mask) in enumerate(pages(count, split == "train")):
            name = f"ulm_{number:06}_000019"
            save_png(root / "leftImg8bit" / split / "ulm" / f"{name}_leftImg8bit.png", image.convert("RGB"))
            values = {"labelIds": ids[mask], "labelTrainIds": mask.copy()}[kinds]
            values[0] = {"labelIds": 4, "labelTrainIds": 255}[kinds]  # static, which is not evaluated
            save_png(root / "gtFine" / split / "ulm" / f"{name}_gtFine_{kinds}.png", values)
    return SegmentationDataConfig(name="cityscapes", path=str(root), batch_size=2, workers=0)


def encoded(image: Image.Image | np.ndarray, folder: Path) -> dict[str, Any]:
    path = save_png(folder / "one.png", image)
    return {"bytes": path.read_bytes(), "path": None}


def write_parquet(root: Path, mask_key: str = "annotation") -> SegmentationDataConfig:
    features = datasets.Features({"image": datasets.Image(), mask_key: datasets.Image(), "id": datasets.Value("int64")})
    for split, count in (("train", 4), ("val", 2)):
        found = pages(count, split == "train")
        columns = {
            "image": [encoded(image, root) for image, _ in found],
            mask_key: [encoded(mask, root) for _, mask in found],
            "id": list(range(count)),
        }
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(root / f"{split}.parquet"))
    return SegmentationDataConfig(name="parquet", path=str(root), num_classes=11, batch_size=2, workers=0)


# ----------------------------------------------------------------------------------------------------------------- data


def test_pages_are_made_of_scans_that_no_other_page_has():
    train_split, test_split = (
        load_segmentation_split(SegmentationDataConfig(name="digits"), training=training) for training in (True, False)
    )
    assert (len(train_split), len(test_split)) == (360, 90)
    assert train_split.classes == ("background", *"0123456789")
    masks = np.stack([np.array(test_split.masks.open(i)) for i in range(90)])
    assert set(np.unique(masks)) == set(range(11))
    assert 0.15 < (masks > 0).mean() < 0.5
    cells = masks.reshape(90, 2, 48, 2, 48).swapaxes(2, 3).reshape(360, -1)
    digits = cells.max(axis=1)
    assert all(set(np.unique(cell)) == {0, digit} for cell, digit in zip(cells, digits, strict=True))
    counts = np.bincount(digits)[1:]  # the test split of the digits holds each about equally often
    assert counts.sum() == 360
    assert counts.min() >= 34
    again = load_segmentation_split(SegmentationDataConfig(name="digits"), training=False)
    assert all(again.images.open(i).tobytes() == test_split.images.open(i).tobytes() for i in range(90))


@pytest.mark.parametrize("kinds", ["labelIds", "labelTrainIds"])
def test_cityscapes_has_its_own_layout_and_numbers(tmp_path: Path, kinds: str):
    config = write_cityscapes(tmp_path, kinds=kinds)
    split = load_segmentation_split(config, training=True)
    assert (len(split), split.classes) == (3, tuple(CITYSCAPES))
    for number, (image, mask) in enumerate(pages(3)):
        pixels, labels = split.read(number, 3)
        expected = mask.copy()
        expected[0] = 255
        assert np.array_equal(labels, expected)
        assert np.array_equal(pixels[0], np.array(image))
    assert len(load_segmentation_split(config, training=False)) == 2


def test_a_folder_and_parquet_files_hold_the_same(tmp_path: Path):
    folder, table = write_folder(tmp_path / "folder"), write_parquet(tmp_path / "table")
    for training in (True, False):
        splits = [load_segmentation_split(config, training=training) for config in (folder, table)]
        assert len(splits[0]) == len(splits[1]) == (4 if training else 2)
        for number, (image, mask) in enumerate(pages(len(splits[0]), training)):
            for split in splits:
                pixels, labels = split.read(number, 3)
                assert np.array_equal(labels, mask)
                assert np.array_equal(pixels.permute(1, 2, 0), np.array(image.convert("RGB")))
    assert "val.parquet, row 1" in splits[1].images.name(1)


def test_classes_are_named_by_a_file_the_configuration_or_the_model(tmp_path: Path):
    config = dataclasses.replace(write_folder(tmp_path, (2, 1)), num_classes=None)
    names = tuple("abcdefghijk")
    assert load_segmentation_split(config, training=True, classes=names).classes == names
    with pytest.raises(
        DataError, match=r"classes of .* are not known: .*data\.num_classes.*data\.class_names.*classes"
    ):
        load_segmentation_split(config, training=True)
    assert load_segmentation_split(dataclasses.replace(config, class_names=names), training=True).classes == names
    (tmp_path / "classes.txt").write_text("\n".join(names[::-1]) + "\n")
    assert load_segmentation_split(config, training=True, classes=names).classes == names[::-1]
    with pytest.raises(DataError, match=r"data.num_classes is 12, and .*classes.txt' names 11"):
        load_segmentation_split(dataclasses.replace(config, num_classes=12), training=True)


def test_zero_may_stand_for_no_label(tmp_path: Path):
    config = dataclasses.replace(write_folder(tmp_path, (1, 1)), num_classes=10, reduce_zero_label=True)
    _, mask = pages(1)[0]
    _, labels = load_segmentation_split(config, training=True).read(0, 3)
    assert np.array_equal(labels, np.where(mask == 0, 255, mask.astype(int) - 1))


def test_a_mask_may_have_a_palette(tmp_path: Path):
    """As Pascal VOC's, whose colours are for people: the numbers are what counts."""
    config = write_folder(tmp_path, (1, 1))
    _, mask = pages(1)[0]
    picture = Image.fromarray(mask)
    picture.putpalette([7 * value % 256 for value in range(768)])
    assert picture.mode == "P"
    save_png(tmp_path / "annotations" / "train" / "some" / "0.png", picture)
    assert np.array_equal(load_segmentation_split(config, training=True).read(0, 3)[1], mask)


def test_more_classes_than_a_byte_holds(tmp_path: Path):
    """Masks of 16 bits, and a number of one's own for what has no class."""
    config = dataclasses.replace(write_folder(tmp_path, (1, 1)), num_classes=1000, ignore_index=60000)
    values = np.arange(96 * 96, dtype=np.uint16).reshape(96, 96) % 1000
    values[0] = 60000
    save_png(tmp_path / "annotations" / "train" / "some" / "0.png", values)
    split = load_segmentation_split(config, training=True)
    _, labels = split.read(0, 3)
    assert (labels.dtype, split.ignored) == (torch.int32, 65535)
    assert (labels[0] == 65535).all()
    assert np.array_equal(labels[1:], values[1:])


def test_what_is_ignored_is_no_class(tmp_path: Path):
    config = dataclasses.replace(write_folder(tmp_path, (1, 1)), num_classes=3)
    for ignored, reduced, held in ((2, False, "0 to 2"), (0, False, "0 to 2"), (3, True, "1 to 3")):
        wrong = dataclasses.replace(config, ignore_index=ignored, reduce_zero_label=reduced)
        with pytest.raises(DataError, match=rf"ignore_index {ignored} is the number of a class: masks hold {held}\."):
            load_segmentation_split(wrong, training=True)


def test_every_class_counts_where_255_is_one(tmp_path: Path):
    config = dataclasses.replace(write_folder(tmp_path, (1, 1)), num_classes=300)
    save_png(tmp_path / "annotations" / "train" / "some" / "0.png", np.full((96, 96), 255, dtype=np.uint16))
    _, labels = load_segmentation_split(config, training=True).read(0, 3)
    assert (labels == 255).all()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: (root / "annotations/train/some/1.png").unlink(),
            r"1 of 4 images have no mask, the first .*1\.png",
        ),
        (lambda root: (root / "images").rename(root / "imgs"), r"no folder 'images'.*images/<split>/"),
        (
            lambda root: (root / "images/train").rename(root / "images/trian"),
            r"no folder 'train'. Did you mean trian\?",
        ),
        (
            lambda root: save_png(root / "annotations/train/some/1.png", np.zeros((96, 95), dtype=np.uint8)),
            r"1\.png has 96x96 pixels, and its mask .* 95x96",
        ),
        (
            lambda root: save_png(root / "annotations/train/some/1.png", np.full((96, 96), 11, dtype=np.uint8)),
            r"1\.png holds the number 11, and there are the 11 classes 0 to 10",
        ),
        (
            lambda root: save_png(root / "annotations/train/some/1.png", np.zeros((96, 96, 3), dtype=np.uint8)),
            r"1\.png is no mask: it has 3 channels",
        ),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_wrong_with_the_data_is_said(tmp_path: Path, spoil: Any, message: str, workers: int):
    config = dataclasses.replace(write_folder(tmp_path), workers=workers)
    spoil(tmp_path)

    def read_all() -> None:
        split = load_segmentation_split(config, training=True)
        list(segmentation_training_loader(split, config, PREPROCESS, SegmentationAugmentConfig(), seed=0).batches(0))

    with pytest.raises(DataError, match=message):
        read_all()


def test_a_table_says_which_columns_it_has(tmp_path: Path):
    config = write_parquet(tmp_path, "labels")
    with pytest.raises(
        DataError, match=r"no column 'label' \(data.mask_key\). Did you mean labels\? There are: image, labels, id"
    ):
        load_segmentation_split(dataclasses.replace(config, mask_key="label"), training=True)
    with pytest.raises(DataError, match="is one split, and another one is needed"):
        load_segmentation_split(dataclasses.replace(config, path=str(tmp_path / "train.parquet")), training=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "cityscape", "path": "x"}, "Did you mean cityscapes"),
        ({"name": "folder"}, "data.path"),
        ({"name": "digits", "num_classes": 3}, "has its own classes"),
        ({"path": "x", "num_classes": 3, "class_names": ("a", "b")}, "there are 2 class_names"),
        ({"path": "x", "ignore_index": -1}, "data.ignore_index must be from 0 to 65535"),
        ({"path": "x", "ignore_index": 10**12}, "data.ignore_index must be from 0 to 65535"),
        ({"path": "x", "mean": (123.0,)}, r"data.mean must be from 0 to 1 .*of 255: divide"),
        ({"path": "x", "mask_key": "m"}, "are for tables"),
        ({"path": "x", "interpolation": "cubic"}, "Did you mean bicubic"),
    ],
)
def test_configurations_that_cannot_be(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        SegmentationDataConfig(**values)


def test_damaged_images_and_masks_are_skipped_and_named(tmp_path: Path):
    config = write_folder(tmp_path)
    (tmp_path / "images/train/some/0.png").write_bytes(b"no image")
    mask = tmp_path / "annotations/train/some/2.png"
    mask.write_bytes(mask.read_bytes()[:100])
    split = load_segmentation_split(config, training=True)
    loader = segmentation_training_loader(split, config, PREPROCESS, SegmentationAugmentConfig(), seed=0)
    batches: list[Any] = list(loader.batches(0))
    assert [len(batch.images) for batch in batches] == [2, 2]  # the next readable takes a damaged one's place
    damaged = {name for batch in batches for name in batch.damaged}
    assert len(damaged) == 2
    assert any("2.png: its mask: " in name for name in damaged)
    found: list[Any] = list(segmentation_evaluation_loader(split, config, PREPROCESS))
    assert [len(batch.masks) for batch in found] == [1, 1]


# --------------------------------------------------------------------------------------------------------- augmentation


def test_image_and_mask_are_changed_alike():
    """A picture that shows its own mask still does, wherever it was not interpolated."""
    mask = torch.from_numpy(pages(1)[0][1]).long()
    image = (mask * 20).to(torch.uint8).expand(3, -1, -1).contiguous()
    augment = SegmentationAugmentConfig(scale=(0.5, 2.0), crop_size=(64, 48), hflip=0.5, vflip=0.5)
    random = RandomCrop({**PREPROCESS, "input_size": (3, 96, 96)}, augment, ignored=255)
    sizes = set()
    for seed in range(20):
        torch.manual_seed(seed)
        pixels, labels = random(image, mask.to(torch.uint8))
        assert (pixels.shape, labels.shape) == ((3, 64, 48), (64, 48))
        filled = labels == 255
        expected = torch.tensor([128, 64, 191], dtype=torch.uint8)[:, None, None].expand_as(pixels)
        assert torch.equal(pixels[:, filled], expected[:, filled])
        there = ~filled
        alike = (pixels[0].int() - labels.int() * 20).abs() <= 10
        assert alike[there].float().mean() > 0.85
        sizes.add(int(filled.sum()))
    assert len(sizes) > 2  # of the filling


def test_flips_flip_both():
    image, mask = pages(1)[0]
    pixels, labels = torch.from_numpy(np.array(image))[None], torch.from_numpy(mask)
    augment = SegmentationAugmentConfig(scale=(1.0, 1.0), crop_size=(96, 96), hflip=1.0, vflip=1.0)
    random = RandomCrop({**PREPROCESS, "input_size": (1, 96, 96), "mean": (0.0,)}, augment, ignored=255)
    changed, where = random(pixels, labels)
    assert torch.equal(changed, pixels.flip(1, 2))
    assert torch.equal(where, labels.flip(0, 1))


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_workers_or_processes(workers: int):
    augment = SegmentationAugmentConfig(scale=(0.5, 2.0), crop_size=(32, 32), color_jitter=0.4)
    config = SegmentationDataConfig(name="digits", batch_size=4, workers=0)
    split = load_segmentation_split(config, training=True)
    preprocess = {**PREPROCESS, "input_size": (1, 48, 48), "mean": (0.2,), "std": (0.3,)}

    def first(epoch: int, start: int, **changes: Any) -> list[Any]:
        other = dataclasses.replace(config, **{k: v for k, v in changes.items() if k in ("workers", "batch_size")})
        share = {k: v for k, v in changes.items() if k in ("rank", "processes")}
        loader = segmentation_training_loader(split, other, preprocess, augment, seed=3, **share)
        batches = loader.batches(epoch, start)
        return [next(batches) for _ in range(3)]

    torch.manual_seed(0)
    alone = first(1, 5)
    with_workers = first(1, 5, workers=workers)
    for a, b in zip(alone, with_workers, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.masks, b.masks)
    shares = [first(1, 5, batch_size=2, rank=rank, processes=2) for rank in (0, 1)]
    for whole, *parts in zip(alone, *shares, strict=True):
        assert torch.equal(whole.images[0::2], parts[0].images)
        assert torch.equal(whole.masks[1::2], parts[1].masks)
    assert not torch.equal(alone[0].images, first(2, 5)[0].images)


# ----------------------------------------------------------------------------------------------------------- evaluation


class Told(torch.nn.Module):
    """Says of each pixel the class that its grey value encodes, at a quarter of the height and width."""

    task = "segmentation"

    def __init__(self, num_classes: int, size: tuple[int, int, int], stride: int = 4) -> None:
        super().__init__()
        self.num_classes, self.stride = num_classes, stride
        self.pretrained_cfg = {
            "architecture": "told",
            "input_size": size,
            "mean": (0.0,) * size[0],
            "std": (1.0,) * size[0],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
        }
        self.scale = torch.nn.Parameter(torch.tensor(10.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        classes = (x[:, 0, :: self.stride, :: self.stride] * 255 / 20).round().long()
        return (
            self.scale
            * F.one_hot(classes.clamp(max=self.num_classes - 1), self.num_classes).permute(0, 3, 1, 2).float()
        )


def blocks(values: list[list[int]], side: int = 8) -> np.ndarray:
    return np.kron(np.array(values, dtype=np.uint8), np.ones((side, side), dtype=np.uint8))


def write_blocks(root: Path, shown: np.ndarray, true: np.ndarray) -> SegmentationDataConfig:
    save_png(root / "images" / "val" / "0.png", shown * 20)
    save_png(root / "annotations" / "val" / "0.png", true)
    return SegmentationDataConfig(path=str(root), num_classes=4, batch_size=2, workers=0)


def test_figures_are_those_of_a_confusion_counted_by_hand(tmp_path: Path):
    """Blocks of 8x8 pixels; one is ignored, class 3 is neither true nor predicted."""
    true = blocks([[0, 0, 1, 1], [0, 2, 2, 255]])
    shown = blocks([[0, 1, 1, 1], [0, 2, 0, 2]])
    data = write_blocks(tmp_path, shown, true)
    found = evaluate(Told(4, (3, 16, 32), stride=1), data)
    assert np.array_equal(found.confusion, 64 * np.array([[2, 1, 0, 0], [0, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]))
    assert found.per_class == {"0": 50.0, "1": pytest.approx(200 / 3), "2": 50.0, "3": None}
    assert found.miou == pytest.approx((50 + 200 / 3 + 50) / 3)
    assert found.mean_accuracy == pytest.approx((200 / 3 + 100 + 50) / 3)
    assert found.pixel_accuracy == pytest.approx(500 / 7)
    right, wrong = math.log(1 + 3 * math.exp(-10)), 10 + math.log(1 + 3 * math.exp(-10))
    assert found.loss == pytest.approx((5 * right + 2 * wrong) / 7, rel=1e-5)
    assert (found.images, found.classes) == (1, ("0", "1", "2", "3"))
    counts = PixelCounts(4, 255, torch.device("cpu"))
    counts.add(torch.zeros(4, 2, 2), torch.full((2, 2), 255))
    with pytest.raises(DataError, match="has a pixel with a class"):
        counts.metrics()


@pytest.mark.parametrize("size", [(3, 32, 32), (3, 16, 64), (3, 64, 128)])
def test_images_keep_their_shape_and_masks_their_size(tmp_path: Path, size: tuple[int, int, int]):
    """Whatever the input's size, with filling below or beside the image, what is shown is found in its place."""
    true = blocks([[0, 1, 2, 3], [3, 2, 1, 0]], side=16)
    found = evaluate(Told(4, size, stride=1), write_blocks(tmp_path, true, true))
    assert found.confusion.sum() == 32 * 64
    assert found.pixel_accuracy > (85 if size[1] < 32 or size[2] < 64 else 97)
    assert found.preprocessing["input_size"] == size


def test_logits_are_resized_as_torch_does_it():
    torch.manual_seed(0)
    split = load_segmentation_split(SegmentationDataConfig(name="digits"), training=False)
    config = SegmentationDataConfig(name="digits", batch_size=2, workers=0)
    preprocess = {**PREPROCESS, "input_size": (1, 48, 48), "mean": (0.2,), "std": (0.3,)}
    batch: Any = next(iter(segmentation_evaluation_loader(split, config, preprocess)))
    logits = torch.randn(2, 11, 12, 12)
    expected = F.interpolate(logits, (96, 96), mode="bilinear", align_corners=False)
    for (mask, resized), whole in zip(resized_to_mask(logits, batch), expected, strict=True):
        assert mask.shape == (96, 96)
        torch.testing.assert_close(resized, whole)


def test_classes_are_matched_by_name(tmp_path: Path):
    true = blocks([[0, 1], [2, 2]])
    data = dataclasses.replace(write_blocks(tmp_path, true, true), num_classes=None, class_names=("sky", "sea", "land"))
    model = Told(4, (3, 16, 16), stride=1)
    model.pretrained_cfg["label_names"] = ["other", "sky", "sea", "land"]
    found = evaluate(model, data)
    assert found.classes == ("other", "sky", "sea", "land")
    assert found.confusion.sum(axis=1).tolist() == [0, 64, 64, 128]
    model.pretrained_cfg["label_names"] = None
    with pytest.raises(DataError, match=r"The data has 3 classes and the model 4.*'sky', 'sea', 'land'"):
        evaluate(model, data)


def test_each_model_has_its_own_kind_of_data():
    segmenter = zoo.create_model("ffnet_test_segmentation")
    with pytest.raises(ConfigError, match=r"data must be a zoo\.data\.SegmentationDataConfig, not DataConfig"):
        evaluate(segmenter, DataConfig(name="digits"))
    with pytest.raises(ConfigError, match="classifies pixels, not images"):
        zoo.predict(segmenter, Image.new("RGB", (8, 8)))
    with pytest.raises(ConfigError, match="classifies images, not pixels"):
        zoo.evaluation.evaluate_segmentation(zoo.create_model("ffnet_test"), SegmentationDataConfig(name="digits"))


# ----------------------------------------------------------------------------------------------------------------- loss


def test_pixels_without_a_class_are_not_learned():
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 5, 4, 4, requires_grad=True), torch.randint(5, (2, 4, 4))
    masks[:, :, 0] = 255
    total, weight = pixel_losses(logits, masks, 255, SegmentationLossConfig())
    assert weight == 24
    torch.testing.assert_close(total / weight, F.cross_entropy(logits, masks, ignore_index=255))
    (gradient,) = torch.autograd.grad(total, logits)
    assert not gradient[:, :, :, 0].any()
    assert gradient[:, :, :, 1:].all()
    nothing, none = pixel_losses(logits, torch.full_like(masks, 255), 255, SegmentationLossConfig())
    assert (nothing.item(), none.item()) == (0, 0)


def test_logits_meet_the_mask_at_its_size():
    torch.manual_seed(0)
    logits, masks = torch.randn(1, 3, 4, 6), torch.randint(3, (1, 16, 24))
    total, weight = pixel_losses(logits, masks, 255, SegmentationLossConfig(smoothing=0.1))
    large = F.interpolate(logits, (16, 24), mode="bilinear")
    torch.testing.assert_close(total / weight, F.cross_entropy(large, masks, label_smoothing=0.1))


def test_class_weights_weigh_the_mean():
    torch.manual_seed(0)
    logits, masks, weights = torch.randn(1, 3, 8, 8), torch.randint(3, (1, 8, 8)), torch.tensor([1.0, 5.0, 0.0])
    masks[0, 0] = 255
    total, weight = pixel_losses(logits, masks, 255, SegmentationLossConfig(), weights)
    torch.testing.assert_close(total / weight, F.cross_entropy(logits, masks, weights, ignore_index=255))


def test_hard_examples_are_mined():
    """Below the bound, or the least probable where these are too few; never those without a class."""
    answers = torch.tensor([0.99, 0.2, 0.95, 0.6, 0.5, 0.01]).view(1, 1, 6)
    logits = torch.cat([answers.log(), (1 - answers).log()]).view(1, 2, 1, 6)
    masks = torch.tensor([0, 0, 0, 0, 0, 255]).view(1, 1, 6)

    def kept(**options: Any) -> list[float]:
        total, weight = pixel_losses(logits, masks, 255, SegmentationLossConfig(**options))
        return [float(weight), float(total)]

    minus_log = [-math.log(value) for value in (0.2, 0.5, 0.6)]
    assert kept(ohem_thresh=0.55, ohem_min_kept=1) == pytest.approx([2, sum(minus_log[:2])])
    assert kept(ohem_thresh=0.55, ohem_min_kept=3) == pytest.approx([3, sum(minus_log)])
    assert kept(ohem_thresh=0.1, ohem_min_kept=1) == pytest.approx([1, minus_log[0]])
    assert kept(ohem_thresh=0.1, ohem_min_kept=100)[0] == 5


# --------------------------------------------------------------------------------------------------------------- models


def test_a_backbone_of_a_classifier_with_a_fresh_head(tmp_path: Path):
    torch.manual_seed(1)
    classifier = zoo.create_model("ffnet_test")
    folder = zoo.save_pretrained(classifier, tmp_path / "classifier")
    theirs = classifier.state_dict()
    published = {}  # as FFNet's authors name tensors
    for key, tensor in theirs.items():
        stage = re.match(r"stages\.(\d)\.(.*)", key)
        name = f"layer{int(stage[1]) + 1}.{stage[2]}" if stage else key.removeprefix("stem.")
        if key.startswith(("stem.", "stages.")):
            published[f"backbone_model.{name}"] = tensor
    published["head.layers.2.classifier.weight"] = theirs["head.fc.weight"]
    torch.save(published, tmp_path / "published.pth")
    for source in (str(folder), str(folder / "model.safetensors"), str(tmp_path / "published.pth")):
        config = SegmentationModelConfig(name="ffnet_test_segmentation", backbone_weights=source)
        model, said = build_segmentation_model(config, 7, None)
        assert "Fresh: neck, head." in said
        own = model.state_dict()
        for key, tensor in own.items():
            same = key in theirs and theirs[key].shape == tensor.shape and torch.equal(tensor, theirs[key])
            assert same == key.startswith(("stem.", "stages.")) or ".bn" in key or "num_batches" in key, key
        assert own["head.conv2.weight"].shape[0] == 7


def test_the_shortcut_that_a_classifier_lacks_stays_fresh(tmp_path: Path):
    """The form called d halves the map in its first block: 64 x 64 weights and a norm of 64, which is 4,224."""
    small: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (64, 8, 8, 8)}
    classifier = zoo.create_model("ffnet_test", **small)
    folder = str(zoo.save_pretrained(classifier, tmp_path / "classifier"))
    args = {**small, "first_stride": 2}
    model, said = build_segmentation_model(
        SegmentationModelConfig(name="ffnet_test_segmentation", backbone_weights=folder, args=args), 3, None
    )
    assert "the shortcut stages.0.0.downsample (4,224 parameters)" in said
    assert torch.equal(model.stages[0][0].conv1.weight, classifier.stages[0][0].conv1.weight)  # type: ignore[index,union-attr]
    deeper = {**small, "depths": (1, 2, 1, 1)}
    config = SegmentationModelConfig(name="ffnet_test_segmentation", backbone_weights=folder, args=deeper)
    with pytest.raises(
        CheckpointError, match=r"is not that of ffnet_test_segmentation: .* missing.* such as stages\.1\.1"
    ):
        build_segmentation_model(config, 3, None)
    with pytest.raises(ConfigError, match="is for networks of segmentation such as FFNet's"):
        build_segmentation_model(SegmentationModelConfig(name="poolformer_s12", backbone_weights=folder), 3, None)
    with pytest.raises(ConfigError, match="begins with a backbone and a fresh head"):
        SegmentationModelConfig(backbone_weights="ffnet_test", checkpoint_path="x")


def test_any_backbone_carries_the_head(recipe: Path, tmp_path: Path):
    """A run of one is a folder that opens, with its head, from its path alone; a smaller learning rate ends it."""
    args = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "up_head": "C", "seg_head": "C"}
    text = recipe.read_text().replace(recipe.read_text().split("model:")[1].split("data:")[0], "\n  name: x\n")
    recipe.write_text(text)
    model = {"name": "poolformer_s12", "args": args, "freeze": ["backbone"]}
    run = train(configure(recipe, tmp_path / "run", model=model, train={"max_updates": 2, "grad_checkpointing": True}))
    assert model_task(str(run.folder)) == "segmentation"
    loaded: Any = load_model(str(run.folder))
    assert (loaded.task, loaded.num_classes) == ("segmentation", 11)
    assert list(loaded.pretrained_cfg["label_names"]) == ["background", *"0123456789"]
    found = evaluate(loaded, SegmentationDataConfig(name="digits", workers=0))
    assert found.miou == pytest.approx(run.history[-1]["val_miou"])
    assert found.preprocessing["input_size"] == (1, 48, 48)
    # a run whose head has other classes begins where that one ended
    data = write_folder(tmp_path / "folder", (2, 1))
    other = train(
        configure(
            recipe,
            tmp_path / "other",
            model={"name": str(run.folder)},
            data={"name": "folder", "path": data.path, "num_classes": 12, "batch_size": 2},
            train={"max_updates": 1},
        )
    )
    weights = safetensors.torch.load_file(other.folder / "last" / "model.safetensors")
    assert weights["head.conv2.weight"].shape[0] == 12
    before = safetensors.torch.load_file(run.folder / "last" / "model.safetensors")
    near = {key: torch.allclose(weights[key], before[key], atol=0.01) for key in weights if key.startswith("backbone.")}
    assert near
    assert all(near.values())


# ----------------------------------------------------------------------------------------------------------------- runs


def test_it_learns(recipe: Path, tmp_path: Path):
    """Where ink is, from 40 pages; who says background everywhere has an mIoU of 36%."""
    for split, count in (("train", 40), ("val", 10)):
        for number, (image, mask) in enumerate(pages(count, split == "train")):
            save_png(tmp_path / "images" / split / f"{number}.png", image)
            save_png(tmp_path / "annotations" / split / f"{number}.png", (mask > 0).astype(np.uint8))
    data = {"name": "folder", "path": str(tmp_path), "num_classes": 2, "batch_size": 4}
    changes: dict[str, Any] = {"optimizer": {"clip_grad": 1.0}, "scheduler": {"epochs": 5}}
    run = train(configure(recipe, tmp_path / "run", data=data, **changes))
    losses = [row["train_loss"] for row in run.history]
    assert losses == sorted(losses, reverse=True)
    assert run.metric == "miou"
    assert run.best > 60


def test_a_run_goes_on_exactly(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Broken off in the second epoch, after update 7 of 10: it ends as if it had not been.

    With accumulation, averaged weights, mining, dropout and decay by layer.
    """
    data = {**EVERYTHING["data"], "name": "folder", "path": write_folder(tmp_path / "data", (42, 4)).path}
    changes = {**EVERYTHING, "data": data}
    train(configure(recipe, tmp_path / "whole", **changes))
    loss, calls = Segmentation.loss, 0

    def breaks(self: Segmentation, *args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 7 * 2:
            raise KeyboardInterrupt
        return loss(self, *args)

    monkeypatch.setattr(Segmentation, "loss", breaks)
    with pytest.raises(KeyboardInterrupt):
        train(configure(recipe, tmp_path / "parts", **changes))
    monkeypatch.setattr(Segmentation, "loss", loss)
    assert read_state(tmp_path / "parts" / "last")["progress"]["updates"] == 6
    train(configure(recipe, tmp_path / "parts", **changes, resume="auto"))
    assert_same_checkpoint(tmp_path / "whole" / "last", tmp_path / "parts" / "last")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"sparsity": {"method": "rigl", "density": 0.5, "update_interval": 2}}, marks=pytest.mark.slow),
        pytest.param({"sparsity": {"method": "snip", "density": 0.5}}, marks=pytest.mark.slow),
        {"train": {"amp": "bf16"}},
        pytest.param({"sparsity": {"method": "chase", "density": 0.5, "update_interval": 2}}, marks=pytest.mark.slow),
    ],
    ids=["rigl", "snip", "bf16", "chase"],
)
def test_options_of_the_loop(recipe: Path, tmp_path: Path, changes: dict[str, Any]):
    changes = {**changes, "train": {**changes.get("train", {}), "max_updates": 4}}
    run = train(configure(recipe, tmp_path / "run", data={"batch_size": 4}, **changes))
    assert math.isfinite(run.history[-1]["val_loss"])
    if "sparsity" in changes:
        assert run.history[-1]["density"] == pytest.approx(0.5, abs=0.01)
        assert (run.folder / "sparsity.json").is_file()


def test_the_command_line_trains_and_evaluates(recipe: Path, tmp_path: Path):
    output, found = tmp_path / "run", tmp_path / "found"
    config = ["--config", recipe, "--output.dir", output, "--data.workers", "1"]
    done = python(ROOT / "train.py", *config, "--train.max_updates", "3")
    assert done.returncode == 0, done.stderr
    assert "Best mIoU " in done.stderr
    (best,) = rows(output)
    done = python(ROOT / "eval.py", "--model", output, "--output", found, "--pictures", "2")
    assert done.returncode == 0, done.stderr
    assert f"mIoU {float(best['val_miou']):.2f}%, mean accuracy" in done.stdout
    assert {path.name for path in found.iterdir()} == {
        *("results.json", "results.csv", "per_class.csv", "confusion.csv", "confusion.png", "predictions.png")
    }
    results = json.loads((found / "results.json").read_text())
    assert results["command"] == "python eval.py --model run --output found --pictures 2"
    assert (results["task"], results["images"], len(results["per_class"])) == ("segmentation", 90, 11)
    row = pd.read_csv(found / "results.csv").iloc[0]
    assert (row["miou"], row["img_height"]) == (round(results["miou"], 4), 48)
    table = pd.read_csv(found / "per_class.csv")
    assert table["pixels"].sum() == 90 * 96 * 96 == np.sum(results["confusion"])
    assert table["iou"].mean() == pytest.approx(results["miou"])
    assert Image.open(found / "predictions.png").size[0] > 1000


def test_a_list_of_models_has_one_table(eval_py: Any, recipe: Path, tmp_path: Path):
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model: Any = zoo.create_model("ffnet_test_segmentation", num_classes=11, in_chans=1)
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (1, 48, 48), "mean": (0.2,), "std": (0.3,)}
        folders.append(zoo.save_pretrained(model, tmp_path / f"model{seed}"))
    data = ["--data.name", "digits", "--data.workers", "0", "--device", "cpu"]
    status, text, errors = eval_py("--model", *folders, *data, "--output", tmp_path / "out")
    assert status == 0, errors
    assert "mean acc.  pixel acc." in text
    assert len(pd.read_csv(tmp_path / "out" / "results.csv")) == 2
    assert len(list((tmp_path / "out").glob("*/predictions.png"))) == 2
    status, _, errors = eval_py("--model", folders[0], "poolformer_s12", *data)
    assert status != 0
    assert "is a segmentation network and poolformer_s12 an image classifier: evaluate them by two commands" in errors


def test_a_last_convolution_that_the_weights_lack(eval_py: Any, tmp_path: Path):
    folder = Path(zoo.save_pretrained(zoo.create_model("ffnet_test_segmentation", num_classes=7), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["num_classes"] = config["zoo"]["model_args"]["num_classes"] = 11
    (folder / "config.json").write_text(json.dumps(config))
    status, _, errors = eval_py("--model", folder, "--data.name", "digits", "--data.workers", "0")
    assert (status, errors.count("\n")) == (1, 1)
    assert "for the 11 classes of ffnet_test_segmentation, which would be random" in errors


def test_models_of_cityscapes_are_evaluated_by_number(tmp_path: Path):
    """As the published weights are, which do not name their classes."""
    data = write_cityscapes(tmp_path, (1, 2))
    config: Any = parse_evaluation(
        ["--model", "ffnet_test_segmentation", "--data.name", "cityscapes", "--data.path", str(tmp_path)]
    )
    assert (config.data.name, config.data.path) == (data.name, data.path)
    found = evaluate(zoo.create_model("ffnet_test_segmentation"), data)
    assert found.classes == tuple(CITYSCAPES)
    assert found.confusion.sum() == 2 * 95 * 96  # all but the row that is not evaluated


def test_classes_go_by_name_or_by_number_and_never_by_both(tmp_path: Path):
    data = write_folder(tmp_path, (2, 2))
    for path in (tmp_path / "annotations").rglob("*.png"):
        save_png(path, np.array(Image.open(path)) % 3)
    data = dataclasses.replace(data, num_classes=None, class_names=("background", "cat", "dog"))
    model: Any = zoo.create_model("ffnet_test_segmentation", num_classes=3)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ["dog", "background", "cat"]}
    assert evaluate(model, data).classes == ("dog", "background", "cat")
    with pytest.raises(DataError, match=r"1 of the data's 3 classes are not among the model's 3: 'bird'"):
        evaluate(model, dataclasses.replace(data, class_names=("background", "bird", "dog")))
    by_number = dataclasses.replace(data, class_names=(), num_classes=3)
    assert evaluate(model, by_number).classes == ("0", "1", "2")
    wider: Any = zoo.create_model("ffnet_test_segmentation", num_classes=4)
    wider.pretrained_cfg = {**wider.pretrained_cfg, "label_names": ["background", "0", "1", "2"]}
    with pytest.raises(DataError, match="3 classes and the model 4"):
        evaluate(wider, by_number)


def test_a_model_of_one_size_gets_no_other_crop(recipe: Path, tmp_path: Path):
    changes: dict[str, Any] = {"model": {"name": "randformer_s12"}, "augment": {"crop_size": [32, 32]}}
    with pytest.raises(
        ConfigError, match=r"augment.crop_size is \[32, 32\], but randformer_s12 takes images of one size"
    ):
        train(configure(recipe, tmp_path / "run", **changes))


def test_a_card_says_what_was_measured(recipe: Path, tmp_path: Path):
    from zoo.publishing import model_card

    run = train(configure(recipe, tmp_path / "run", train={"max_updates": 2}))
    text = model_card(str(run.folder))
    assert "pipeline_tag: image-segmentation" in text
    assert "name: pages of scikit-learn digits" in text
    assert f"| mIoU, % | {run.best:.2f} |" in text
    assert "zoo.predict" not in text
    assert '| `model.name` | `"ffnet_test_segmentation"` |' in text
    assert "`loss." not in text  # all defaults


@pytest.mark.slow
def test_two_processes_learn_what_one_does(launcher: Launcher, tmp_path: Path):
    """With the norms at rest, which each process has statistics of its own for."""
    (tmp_path / "small.yaml").write_text(SMALL)
    for processes in (1, 2):
        launcher.run(
            tmp_path,
            *("--config", tmp_path / "small.yaml", "--output.dir", tmp_path / str(processes)),
            *("--model.freeze", "[stem, stages, neck, head.conv1, head.bn1]", "--train.max_updates", "6"),
            *("--data.batch_size", 8 // processes, "--augment.scale", "[0.3, 0.6]"),
            processes=processes,
        )
    one, two = rows(tmp_path / "1"), rows(tmp_path / "2")
    for a, b in zip(one, two, strict=True):
        for key in a:
            assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-4), key


def test_what_a_user_gets_wrong_is_said(recipe: Path, tmp_path: Path):
    for changes, error, message in (
        ({"model": {"name": "timm/resnet18"}}, ConfigError, "no head for segmentation"),
        ({"model": {"name": "smollm_135m"}}, ConfigError, "is a language model"),
        ({"model": {"args": {"num_classes": 3}}}, ConfigError, "the data has 11 classes: leave it out"),
        ({"loss": {"class_weights": [1.0, 2.0]}}, ConfigError, "loss.class_weights are 2, and the data has 11 classes"),
        ({"data": {"batch_size": 400}}, DataError, "360 training images do not fill one batch"),
        ({"data": {"val_split": "val"}}, DataError, "The digits have no split 'val'"),
        ({"data": {"mean": [0.1, 0.2, 0.3]}}, ConfigError, "data.mean has 3 values for 1 channels"),
    ):
        with pytest.raises(error, match=message):
            train(configure(recipe, tmp_path / "run", **changes))


def test_the_task_is_named(recipe: Path):
    from zoo.training import parse_training_config

    config = parse_training_config(["--config", str(recipe)], prog="train.py")
    assert isinstance(config, SegmentationTrainingConfig)
    with pytest.raises(ConfigError, match=r"no task 'segment': .* Did you mean segmentation"):
        parse_training_config(["--task", "segment"], prog="train.py")


def test_the_loss_of_a_batch_is_that_of_its_pixels(recipe: Path, tmp_path: Path):
    config = configure(recipe, tmp_path / "run")
    task = Segmentation(config, make_accelerator(config.train, config.output))
    batch: Any = next(task.batches(0, 0))
    task.model.eval()
    images = task.train_loader.prepare(batch, torch.device("cpu"))
    logits = F.interpolate(task.model(images), (32, 32), mode="bilinear")
    expected = F.cross_entropy(logits, batch.masks.long(), ignore_index=255)
    torch.testing.assert_close(task.loss(task.model, batch, 0), expected)
    torch.testing.assert_close(task.plain_loss(task.model, batch), expected)
