"""Image data: where it comes from, what is refused, and that its order and augmentation depend on nothing by chance."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import zoo
from zoo.data.images import (
    AugmentConfig,
    DamageReport,
    DataConfig,
    EpochSampler,
    ImageDataset,
    align_classes,
    eval_transform,
    load_split,
    make_loader,
    preprocessing,
    random_transform,
)
from zoo.errors import ConfigError, DataError


def picture(seed: int, size: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def make_folder(root: Path, classes: str = "ab", per_class: int = 3) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            picture(10 * number + i).save(root / name / f"{i}.png")
    return root


def png(seed: int) -> dict:
    data = io.BytesIO()
    picture(seed).save(data, format="png")
    return {"bytes": data.getvalue(), "path": f"{seed}.png"}


def make_parquet(path: Path, labels: list, names: list[str] | None = None, images: list | None = None) -> Path:
    features = datasets.Features({"image": datasets.Image()})
    if names:
        features["label"] = datasets.ClassLabel(names=names)
    else:
        features["label"] = datasets.Value("string" if isinstance(labels[0], str) else "int64")
    images = images or [png(i) for i in range(len(labels))]
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(str(path))
    return path


PREPROCESS = {
    "input_size": (3, 16, 16),
    "mean": (0.5,) * 3,
    "std": (0.25,) * 3,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
}


# -------------------------------------------------------------------------------------------------------------- sources


def test_digits_are_split_once_and_for_all():
    train, test = (load_split(DataConfig(name="digits"), training) for training in (True, False))
    assert (len(train), len(test)) == (1437, 360)
    assert train.classes == test.classes == tuple("0123456789")
    assert np.bincount(test.labels).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    images = [np.asarray(split.source.open(i)).tobytes() for split in (train, test) for i in range(len(split))]
    assert len(set(images)) == len(images)  # no test digit was trained on: all 1,797 are different
    again = load_split(DataConfig(name="digits"), True)
    assert np.array_equal(again.labels, train.labels)
    first = np.asarray(train.source.open(0))
    assert first.shape == (8, 8)
    assert first.max() > 200  # 16 levels spread over 0 to 255


def test_folder_finds_its_splits(tmp_path: Path):
    make_folder(tmp_path / "train", "abc", 2)
    make_folder(tmp_path / "validation", "abc", 1)
    config = DataConfig(name="folder", path=str(tmp_path))
    train, val = load_split(config, True), load_split(config, False)
    assert train.classes == ("a", "b", "c")
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 0, 1, 1, 2, 2], [0, 1, 2])
    assert train.source.name(3).endswith("train/b/1.png")
    bare = load_split(DataConfig(name="folder", path=str(tmp_path / "train")), False)  # classes without a split
    assert len(bare) == 6


def test_folders_and_files_of_any_language(tmp_path: Path):
    for name in ("grün", "猫"):
        (tmp_path / "train" / name).mkdir(parents=True)
        picture(0).save(tmp_path / "train" / name / "größe ½.png")
    split = load_split(DataConfig(name="folder", path=str(tmp_path)), True)
    assert (split.classes, split.labels.tolist()) == (("grün", "猫"), [0, 1])
    assert split.source.name(1) == str(tmp_path / "train" / "猫" / "größe ½.png")
    assert split.source.open(1).size == (24, 24)


def test_parquet_in_the_hubs_layout(tmp_path: Path):
    make_parquet(tmp_path / "train-00000-of-00002.parquet", [0, 1], ["cat", "dog"])
    make_parquet(tmp_path / "train-00001-of-00002.parquet", [1, 1], ["cat", "dog"])
    make_parquet(tmp_path / "test.parquet", [1], ["cat", "dog"])
    config = DataConfig(name="parquet", path=str(tmp_path))
    train = load_split(config, True)
    assert train.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 1, 1, 1]
    assert np.array_equal(np.asarray(train.source.open(1).convert("RGB")), np.asarray(picture(1)))
    assert load_split(config, False).labels.tolist() == [1]
    file = load_split(DataConfig(name="parquet", path=str(tmp_path / "test.parquet")), False)
    assert file.labels.tolist() == [1]


def test_parquet_labels_without_names(tmp_path: Path):
    make_parquet(tmp_path / "numbers" / "train.parquet", [2, 0, 1])
    make_parquet(tmp_path / "words" / "train.parquet", ["dog", "cat", "dog"])
    numbers = load_split(DataConfig(name="parquet", path=str(tmp_path / "numbers")), True)
    assert (numbers.classes, numbers.labels.tolist()) == (("0", "1", "2"), [2, 0, 1])
    words = load_split(DataConfig(name="parquet", path=str(tmp_path / "words")), True)
    assert (words.classes, words.labels.tolist()) == (("cat", "dog"), [1, 0, 1])


def test_a_data_set_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    make_parquet(tmp_path / "repo" / "train.parquet", [0, 1], ["cat", "dog"])
    make_parquet(tmp_path / "repo" / "test.parquet", [1], ["cat", "dog"])
    config = DataConfig(name="hub", path=str(tmp_path / "repo"))
    assert load_split(config, True).labels.tolist() == [0, 1]
    assert load_split(config, False).labels.tolist() == [1]


def test_a_hub_data_set_that_cannot_be_had():
    code = (
        "from zoo.data import DataConfig, load_split\n"
        "from zoo.errors import DataError\n"
        "try:\n    load_split(DataConfig(name='hub', path='nobody/nothing'), True)\n"
        "except DataError as error:\n    print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "The data set 'nobody/nothing' cannot be had from the Hub" in done.stdout, done.stderr


# -------------------------------------------------------------------------------------------------------------- refusal


def test_folders_that_hold_no_data(tmp_path: Path):
    def complaint(path: Path, **options) -> str:
        with pytest.raises(DataError) as caught:
            load_split(DataConfig(name="folder", path=str(path), **options), True)
        return str(caught.value)

    assert "There is no folder" in complaint(tmp_path / "nowhere")
    (tmp_path / "trian").mkdir()
    assert "no folder 'train'. Did you mean trian?" in complaint(tmp_path)
    (tmp_path / "train").mkdir()
    assert "no folder of images for each class" in complaint(tmp_path)
    (tmp_path / "train" / "a").mkdir()
    assert "no images in" in complaint(tmp_path)
    picture(0).save(tmp_path / "train" / "a" / "0.png")
    assert "one class only, 'a'" in complaint(tmp_path)


def test_tables_that_hold_no_data(tmp_path: Path):
    def complaint(name: str, **options) -> str:
        with pytest.raises(DataError) as caught:
            load_split(DataConfig(name="parquet", path=str(tmp_path / name), **options), True)
        return str(caught.value)

    assert "There is no file or folder" in complaint("nowhere")
    assert "holds no file train.parquet" in complaint(".")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 but then nothing of the kind")
    assert "cannot be read as parquet" in complaint("damaged.parquet")
    make_parquet(tmp_path / "good.parquet", [0, 1])
    assert "no column 'lable' (data.label_key). Did you mean label?" in complaint("good.parquet", label_key="lable")
    assert "holds no images" in complaint("good.parquet", image_key="label")
    make_parquet(tmp_path / "negative.parquet", [0, -1, 1])
    assert "1 labels of negative.parquet are out of range: row 1 has -1" in complaint("negative.parquet")
    good = pq.read_table(make_parquet(tmp_path / "named.parquet", [0, 1], ["cat", "dog"]))
    beyond = good.set_column(1, "label", pa.array([0, 7], pa.int64())).replace_schema_metadata(good.schema.metadata)
    pq.write_table(beyond, tmp_path / "beyond.parquet")
    assert "row 1 has 7, and there are the 2 classes 0 to 1" in complaint("beyond.parquet")
    make_parquet(tmp_path / "missing.parquet", [0, None, 1])
    assert "1 labels of missing.parquet are missing" in complaint("missing.parquet")


def test_classes_are_matched_by_name(tmp_path: Path):
    make_folder(tmp_path / "val", "bd", 2)
    split = load_split(DataConfig(name="folder", path=str(tmp_path)), False)
    assert align_classes(split, "abcd").labels.tolist() == [1, 1, 3, 3]
    with pytest.raises(DataError, match="1 classes are not among the 2 that the model knows: 'd'"):
        align_classes(split, "ab")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"workers": -1}, "workers must be 0 or more"),
        ({"input_size": (3, 0, 8)}, "input_size must be three numbers above zero"),
        ({"crop_pct": 1.5}, "crop_pct"),
        ({"std": (0.0,)}, "std must be above zero"),
        ({"mean": ()}, r"data\.mean must be a list of finite numbers"),
        ({"std": []}, r"data\.std must be a list of finite numbers"),
        ({"mean": (0.5, float("nan"), 0.5)}, r"data\.mean must be a list of finite numbers"),
        ({"std": (float("inf"),)}, r"data\.std must be a list of finite numbers"),
        ({"mean": 0.5}, r"data\.mean must be a list of finite numbers"),
        ({"name": "digit"}, r"data\.name is 'digit', .* Did you mean digits\?"),
        ({"interpolation": "bicubical"}, r"data\.interpolation is 'bicubical', .* Did you mean bicubic\?"),
        ({"batch_size": 2.5}, "batch_size must be a whole number, not 2.5"),
        ({"workers": "2"}, "workers must be a whole number, not '2'"),
        ({"name": "folder"}, "say where it lies"),
    ],
)
def test_data_options_that_make_no_sense(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**{"name": "digits", **options})


# -------------------------------------------------------------------------------------------------------------- damage


@pytest.fixture
def damaged_folder(tmp_path: Path) -> Path:
    train = make_folder(tmp_path / "train", "ab", 4)
    whole = (train / "a" / "1.png").read_bytes()
    (train / "a" / "1.png").write_bytes(whole[: len(whole) // 2])
    (train / "b" / "2.png").write_bytes(b"not an image at all")
    (train / "b" / "3.png").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_skipped_and_counted(damaged_folder: Path, workers: int):
    config = DataConfig(name="folder", path=str(damaged_folder / "train"), batch_size=3, workers=workers)
    dataset = ImageDataset(load_split(config, False), eval_transform(PREPROCESS))
    report = DamageReport(strict=False)
    seen: list[int] = []
    for _ in range(2):  # twice over: each is counted once
        seen = []
        for batch in make_loader(dataset, config):
            report.add(batch.damaged)
            seen += batch.labels.tolist()
            assert len(batch.images) == len(batch.labels)
    assert seen == [0, 0, 0, 1, 1]
    assert [Path(name.split(":")[0]).relative_to(damaged_folder).as_posix() for name in report.names] == [
        "train/a/1.png",
        "train/b/2.png",
        "train/b/3.png",
    ]
    assert str(report).startswith("Skipped 3 damaged images:")
    with pytest.raises(DataError, match=r"A damaged image: .*1\.png.*data\.strict"):
        DamageReport(strict=True).add(tuple(report.names))


def test_training_batches_keep_their_size(damaged_folder: Path):
    config = DataConfig(name="folder", path=str(damaged_folder), batch_size=4, workers=0)
    dataset = ImageDataset(load_split(config, True), eval_transform(PREPROCESS), replace_damaged=True)
    batches = list(make_loader(dataset, config))
    assert [len(batch.images) for batch in batches] == [4, 4]
    assert sum(len(batch.damaged) for batch in batches) == 4  # one of two in a row is met again in its own place


# ----------------------------------------------------------------------------------------------------- order and chance


def batches_of(workers: int, epoch: int, start: int = 0) -> list[torch.Tensor]:
    config = DataConfig(name="digits", batch_size=32, workers=workers)
    split = load_split(config, False)
    preprocess = {**PREPROCESS, "input_size": (1, 16, 16), "mean": (0.5,), "std": (0.25,)}
    augment = AugmentConfig(aa="rand-m9-mstd0.5-inc1", reprob=0.5, remode="pixel")
    dataset = ImageDataset(split, random_transform(preprocess, augment), channels=1, seed=5)
    sampler = EpochSampler(len(split), seed=5)
    sampler.epoch, sampler.start = epoch, start
    return [batch.images for batch in make_loader(dataset, config, sampler=sampler)]


def generators() -> list[str]:
    return [str(random.getstate()), str(np.random.get_state()), str(torch.get_rng_state().tolist())]


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    before = generators()
    here = batches_of(workers=0, epoch=4)
    after = generators()
    assert before == after
    assert all(map(torch.equal, here, batches_of(workers=2, epoch=4)))
    assert all(map(torch.equal, here[3:], batches_of(workers=0, epoch=4, start=3 * 32)))
    assert not torch.equal(here[0], batches_of(workers=0, epoch=5)[0])


def test_processes_share_an_epoch_evenly():
    shares = []
    for rank in range(3):
        sampler = EpochSampler(11, seed=0, rank=rank, processes=3)
        sampler.epoch = 2
        shares.append([index for _, index in sampler])
        assert len(sampler) == len(shares[-1]) == 3
    assert len({index for share in shares for index in share}) == 9
    whole = EpochSampler(11, seed=0)
    whole.epoch = 2
    assert [index for _, index in whole][:9] == [index for trio in zip(*shares, strict=True) for index in trio]


# ----------------------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize("policy", ["rand-m10-n15-inc1", "rand-m0-n15", "augmix-m10-w5", "v0", "original"])
def test_no_policy_asks_for_an_image_without_bits(policy: str):
    transform = random_transform(PREPROCESS, AugmentConfig(aa=policy))
    random.seed(0)
    np.random.seed(0)
    for seed in range(40):
        assert torch.isfinite(transform(picture(seed))).all()


def test_a_policy_that_timm_does_not_know():
    with pytest.raises(ConfigError, match=r"augment\.aa is 'rnd-m9'"):
        random_transform(PREPROCESS, AugmentConfig(aa="rnd-m9"))


def test_preprocessing_is_the_models_unless_told_otherwise():
    model = zoo.create_model("poolformer_s12", pretrained=False, device="meta")
    found = preprocessing(model)
    assert (found["input_size"], found["crop_pct"], found["interpolation"]) == ((3, 224, 224), 0.9, "bicubic")
    given = preprocessing(model, DataConfig(name="digits", input_size=(3, 64, 48), crop_pct=1.0, mean=(0.1, 0.2, 0.3)))
    assert (given["input_size"], given["crop_pct"], given["mean"]) == ((3, 64, 48), 1.0, (0.1, 0.2, 0.3))
    grey = zoo.create_model("poolformer_s12", pretrained=False, in_chans=1, device="meta")
    assert preprocessing(grey)["mean"] == pytest.approx((0.449,), abs=1e-3)
    with pytest.raises(ConfigError, match="asks for 3 channels, but the model takes 1"):
        preprocessing(grey, DataConfig(name="digits", input_size=(3, 32, 32)))
    with pytest.raises(ConfigError, match="mean has 2 values for 3 channels"):
        preprocessing(model, DataConfig(name="digits", mean=(0.1, 0.2)))
