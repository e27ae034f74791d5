"""Image data: where it comes from, what is refused, and that its order and augmentation depend on nothing by chance."""

from __future__ import annotations

import io
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.random_erasing import RandomErasing

import zoo
from tests.launcher import python
from zoo.data import (
    UNREADABLE,
    AugmentConfig,
    Batch,
    DamageReport,
    DataConfig,
    EpochSampler,
    ImageDataset,
    SegmentationDataConfig,
    align_classes,
    eval_transform,
    evaluation_loader,
    load_split,
    make_loader,
    preprocessing,
    random_transform,
    shifting,
    training_loader,
)
from zoo.data.loading import decode
from zoo.data.transforms import to_tensor
from zoo.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("ZOO_DATA", ROOT.parent / "shared" / "data"))


def picture(seed: int, size: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def make_folder(root: Path, classes: Sequence[str] = "ab", per_class: int = 3) -> Path:
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
    done = python("-c", code, env=environment)
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
            load_split(DataConfig(name="parquet", path=str(tmp_path / name), **options), False)
        return str(caught.value)

    assert "There is no file or folder" in complaint("nowhere")
    assert "holds no file val.parquet" in complaint(".")
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


@pytest.mark.parametrize("name", ["parquet", "webdataset"])
def test_what_is_learned_is_not_what_is_evaluated(tmp_path: Path, name: str):
    """A file by itself can be evaluated; trained on, it would be both splits, and its accuracy nothing worth."""
    path = tmp_path / "all.tar"
    if name == "parquet":
        path = make_parquet(tmp_path / "all.parquet", [0, 1, 0], ["a", "b"])
        assert len(load_split(DataConfig(name="parquet", path=str(path)), training=False)) == 3
    with pytest.raises(DataError, match=f"{path.name}' is one split, and another one is needed to evaluate"):
        load_split(DataConfig(name=name, path=str(path)), training=True)  # type: ignore[arg-type]


def test_classes_are_matched_by_name(tmp_path: Path):
    make_folder(tmp_path / "val", "bd", 2)
    split = load_split(DataConfig(name="folder", path=str(tmp_path)), False)
    assert align_classes(split, "abcd").labels.tolist() == [1, 1, 3, 3]
    with pytest.raises(DataError, match="1 class is not among the 2 that the model knows: 'd'"):
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


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 2), (64, 4)])
def test_no_more_workers_than_cores_where_nobody_says(cores: int, workers: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    for config in (DataConfig, SegmentationDataConfig):
        assert config(name="digits").workers == workers
        assert config(name="digits", workers=7).workers == 7


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
        shares.append([index for _, index, _ in sampler])
        assert len(sampler) == len(shares[-1]) == 3
    assert len({index for share in shares for index in share}) == 9
    whole = EpochSampler(11, seed=0)
    whole.epoch = 2
    assert [index for _, index, _ in whole][:9] == [index for trio in zip(*shares, strict=True) for index in trio]


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("repeats", [0, 3])
def test_the_batches_of_a_step_are_one_processs_batch(processes: int, repeats: int):
    def shares(count: int, epoch: int = 1, start: int = 0) -> list[list[tuple[int, int, int]]]:
        samplers = [EpochSampler(50, seed=4, rank=rank, processes=count, repeats=repeats) for rank in range(count)]
        for sampler in samplers:
            sampler.seek(epoch, start // count)
        return [list(sampler) for sampler in samplers]

    (single,) = shares(1)
    parts = shares(processes)
    size = 8 // processes
    for step in range(6):
        together = [key for share in parts for key in share[step * size : (step + 1) * size]]
        assert sorted(together) == sorted(single[step * 8 : (step + 1) * 8])
    for whole, rest in zip(parts, shares(processes, start=16), strict=True):
        assert rest == whole[16 // processes :]


def test_repeated_augmentation(tmp_path: Path):
    """Copies of an image are augmented each on its own, and go to different processes; the epoch keeps its length."""
    sampler = EpochSampler(30, seed=0, repeats=3)
    keys = list(sampler)
    assert len(keys) == len(set(keys)) == 30
    assert len({index for _, index, _ in keys}) == 10
    assert [copy for _, _, copy in keys[:6]] == [0, 1, 2, 0, 1, 2]
    by_rank = [{index for _, index, _ in EpochSampler(30, seed=0, rank=r, processes=3, repeats=3)} for r in range(3)]
    assert by_rank[0] == by_rank[1] == by_rank[2]

    config = DataConfig(
        name="folder", path=str(make_folder(tmp_path / "train")), train_split=".", batch_size=6, workers=0
    )
    augment = AugmentConfig(aug_repeats=3)
    loader = training_loader(load_split(config, True), config, PREPROCESS, augment, seed=0)
    images = next(loader.batches(0)).images
    assert not torch.equal(images[0], images[1])
    assert torch.equal(images, next(loader.batches(0)).images)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_vanished_folder_ends_the_run_with_a_message(tmp_path: Path, workers: int):
    make_folder(tmp_path / "data" / "train", "abc", 20)
    make_folder(tmp_path / "data" / "val", "abc", 20)
    config = DataConfig(name="folder", path=str(tmp_path / "data"), batch_size=4, workers=workers)
    training = training_loader(load_split(config, True), config, PREPROCESS, AugmentConfig(), seed=0)
    evaluation = evaluation_loader(load_split(config, False), config, PREPROCESS)
    batches = training.batches(0)
    next(batches)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(DataError, match=r"^The images are gone: there is no folder '.*train' any more\.$"):
        list(batches)
    with pytest.raises(DataError, match=r"^The images are gone"):
        list(evaluation)


# ----------------------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize("policy", ["rand-m10-n15-inc1", "rand-m0-n15", "augmix-m10-w5", "v0", "original", "3a"])
def test_no_policy_asks_for_an_image_without_bits(policy: str):
    transform = random_transform(PREPROCESS, AugmentConfig(aa=policy))
    random.seed(0)
    np.random.seed(0)
    for seed in range(40):
        assert torch.isfinite(transform(picture(seed))).all()


@pytest.mark.parametrize("count", [300, pytest.param(1000, marks=pytest.mark.slow)])  # for each kind of augmentation
def test_thousands_of_images_pass_through_every_shipped_recipe(count: int):
    """Real images where there are some; noise otherwise."""
    recipes = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "configs" / "vision").rglob("*.yaml"))]
    distinct: dict[str, AugmentConfig] = {}
    for recipe in recipes:
        if "task" in recipe:  # of other transforms
            continue
        given = {key: value for key, value in (recipe.get("augment") or {}).items() if not key.startswith("mix")}
        chosen = AugmentConfig(**given)
        distinct[repr((chosen.aa, chosen.color_jitter, chosen.train_crop_mode, chosen.reprob > 0))] = chosen
    assert any(chosen.aa for chosen in distinct.values())
    cifar = DATA / "cifar10" / "train.parquet"
    if cifar.is_file():
        table = pq.read_table(cifar, columns=["image"]).slice(0, count).column("image").to_pylist()
        images: list[Image.Image] = [
            Image.open(io.BytesIO(cell["image"]["bytes"] if "image" in cell else cell["bytes"])) for cell in table
        ]
        images = [image.convert("RGB") for image in images]
    else:
        images = [picture(seed, 32) for seed in range(count)]
    for augment in distinct.values():
        transform = random_transform({**PREPROCESS, "input_size": (3, 32, 32)}, augment)
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        for image in images:
            assert transform.pixels(to_tensor(image)).shape == (3, 32, 32)


def photographs(count: int) -> list[bytes]:
    """Real ones where there are some; otherwise smooth ones, of all sizes, made up."""
    found = sorted((DATA / "imagenet_sample" / "val").glob("*/*"))[:count]
    if found:
        return [path.read_bytes() for path in found]
    made = []
    for seed in range(count):
        data = io.BytesIO()
        picture(seed, 16).resize((300 + 31 * seed % 200, 250 + 17 * seed % 300), Image.Resampling.BICUBIC).save(
            data, "jpeg"
        )
        made.append(data.getvalue())
    return made


def drawn_alike(act) -> tuple:
    """What `act` returns, and how it leaves the generators, from the same beginning."""
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    return act(), generators()


@pytest.mark.parametrize("aa", [None, "rand-m9-mstd0.5-inc1", "3a"])
@pytest.mark.parametrize("interpolation", ["random", "lanczos"])
def test_training_draws_as_timm_does(aa: str | None, interpolation: Any, monkeypatch: pytest.MonkeyPatch):
    """The same chance gives the same crop, flips and operations, and pixels that differ by rounding."""
    plain = auto_augment.posterize  # newer Pillow refuses to keep no bits
    for name, operation in auto_augment.NAME_TO_OP.items():
        if operation is plain:
            monkeypatch.setitem(
                auto_augment.NAME_TO_OP, name, lambda image, bits, **more: plain(image, max(1, bits), **more)
            )
    size = {**PREPROCESS, "input_size": (3, 160, 160)}
    augment = AugmentConfig(aa=aa, train_interpolation=interpolation, vflip=0.3)
    ours = random_transform(size, augment)
    theirs = create_transform(
        size["input_size"],
        is_training=True,
        vflip=0.3,
        color_jitter=0.4,
        auto_augment=aa,
        interpolation=interpolation,
        mean=size["mean"],
        normalize=False,
    )
    differences = []
    for data in photographs(12):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        (expected, their_state), (found, our_state) = (
            drawn_alike(lambda: theirs(image)),  # noqa: B023
            drawn_alike(lambda: ours.pixels(to_tensor(image))),  # noqa: B023
        )
        assert our_state == their_state
        differences.append((found.int() - expected.int()).abs().float().mean().item())
    assert np.median(differences) < 0.2  # of 255 levels
    if aa is None and interpolation == "lanczos":
        assert max(differences) == 0


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.NEAREST])
@pytest.mark.parametrize("size", [(64, 48), (31, 57), (1, 9)])
def test_shears_and_translations_are_pillows(resample: Image.Resampling, size: tuple[int, int]):
    """Every pixel within a level, most exactly; beyond the image, the filling, or nothing."""
    image = picture(3, 64).resize(size, Image.Resampling.BICUBIC)
    chance = random.Random(0)
    differ = []
    for _ in range(40):
        shear, shift = chance.uniform(-0.5, 0.5), chance.choice([0, 3, -7, chance.uniform(-40, 40), 200.5, -90])
        for data in ((1, shear, shift, 0, 1, 0), (1, 0, 0, shear, 1, shift), (1, 0, shift, 0, 1, 0)):
            for filling in ((124, 116, 104), None):
                arguments = (size, Image.Transform.AFFINE, data, resample)
                expected = np.asarray(image.transform(*arguments, fillcolor=filling), np.int16)
                found = np.asarray(shifting.transform(image, *arguments, fillcolor=filling), np.int16)
                assert np.abs(found - expected).max() <= 1
                differ.append((found != expected).mean())
    assert np.mean(differ) < 0.05


def test_other_transforms_are_left_to_pillow():
    grey, colour = picture(1, 24).convert("L"), picture(2, 24)
    for image, data, filling in ((grey, (1, 0.2, 0, 0, 1, 0), 9), (colour, (0.9, 0.2, 0, 0.1, 1, 0), (9, 9, 9))):
        arguments = ((24, 24), Image.Transform.AFFINE, data, Image.Resampling.BICUBIC)
        assert shifting.transform(image, *arguments, fillcolor=filling) == image.transform(
            *arguments, fillcolor=filling
        )


@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "v0", "augmix-m5-w3"])
def test_policies_take_no_interpolation_that_pillow_refuses(aa: str):
    """Pillow's affine transforms know no lanczos: the crop is resized with it, and the policy falls back on bicubic."""
    transform = random_transform(PREPROCESS, AugmentConfig(aa=aa, train_interpolation="lanczos"))
    random.seed(0)
    for seed in range(60):
        assert transform(picture(seed)).shape == (3, 16, 16)


@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("more", [{}, {"crop_mode": "squash"}, {"input_size": (3, 96, 128)}])
def test_evaluation_sees_what_timm_sees(crop_pct: float, interpolation: str, more: dict):
    size = {**PREPROCESS, "input_size": (3, 112, 112), "crop_pct": crop_pct, "interpolation": interpolation, **more}
    ours, theirs = eval_transform(size), create_transform(**size)
    for data in photographs(5):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        difference = (ours(image) - theirs(image)).abs() * 255 * 0.25  # in levels
        assert difference.mean() < 0.1
        assert difference.max() < 20


def test_erasing_takes_the_areas_that_timm_takes():
    augment = AugmentConfig(reprob=0.7, recount=3, remode="pixel", aa=None, color_jitter=0)
    ours = random_transform(PREPROCESS, augment)
    theirs = RandomErasing(0.7, max_count=3, mode="pixel", device="cpu")
    base = torch.full((3, 16, 16), 100, dtype=torch.uint8)
    erased_some = 0
    for seed in range(40):
        random.seed(seed)
        areas = ours.erasures()
        erased = torch.tensor([(1, *area) for area in areas], dtype=torch.int64).view(-1, 6)
        batch = Batch(torch.stack([base, base]), torch.zeros(2), (), erased)
        found = ours.prepare(batch, torch.device("cpu"))
        assert torch.equal(found, ours.prepare(batch, torch.device("cpu"), torch.channels_last))
        marked = torch.zeros(16, 16, dtype=torch.bool)
        for top, left, height, width, _ in areas:
            marked[top : top + height, left : left + width] = True
        plain = ours.prepare(batch._replace(erased=erased[:0]), torch.device("cpu"))
        assert torch.equal((found[1] != plain[1]).all(0), marked)
        assert torch.equal(found[0], plain[0])
        if len(areas) == 1:  # a seed is drawn beside each area, so that later areas differ
            random.seed(seed)
            assert torch.equal((theirs(plain[1].clone()) != plain[1]).all(0), marked)
        erased_some += bool(areas)
    assert 20 <= erased_some <= 36


@pytest.mark.parametrize(("mode", "noisy"), [("const", 1), ("rand", 1), ("pixel", 16)])
def test_what_erased_areas_are_filled_with(mode: Any, noisy: int):
    prepare = random_transform(PREPROCESS, AugmentConfig(reprob=1.0, remode=mode)).prepare
    erased = torch.tensor([[0, 2, 3, 4, 4, 99]])
    batch = Batch(torch.full((1, 3, 16, 16), 9, dtype=torch.uint8), torch.zeros(1), (), erased)
    area = prepare(batch, torch.device("cpu"))[0, :, 2:6, 3:7]
    assert {len(channel.unique()) for channel in area} == {noisy}
    assert bool((area == 0).all()) == (mode == "const")
    assert torch.equal(area, prepare(batch, torch.device("cpu"))[0, :, 2:6, 3:7])


def test_three_augment_does_one_of_three():
    """DeiT III (arXiv 2204.07118), section 3.2: solarize, grey or blur, each of the same probability."""
    image = Image.open(io.BytesIO(photographs(1)[0])).convert("RGB").resize((64, 64))
    augment = AugmentConfig(aa="3a", scale=(1, 1), ratio=(1, 1), hflip=0, color_jitter=0, train_interpolation="bicubic")
    transform = random_transform({**PREPROCESS, "input_size": (3, 64, 64)}, augment)
    random.seed(0)
    np.random.seed(0)
    kinds = {"grey": 0, "blurred": 0, "solarized": 0}
    plain = np.asarray(image).astype(int)
    for _ in range(300):
        found = transform.pixels(to_tensor(image)).permute(1, 2, 0).numpy().astype(int)
        rough = np.abs(np.diff(found, axis=1)).mean()
        if (found.max(-1) == found.min(-1)).all():
            kinds["grey"] += 1
        elif np.isin(np.abs(found - plain)[plain < 100], 0).all():
            kinds["solarized"] += 1
        else:
            kinds["blurred"] += 1
            assert rough < np.abs(np.diff(plain, axis=1)).mean()
    assert all(70 <= count <= 130 for count in kinds.values()), kinds


def test_the_simple_random_crop_keeps_the_whole_image():
    """DeiT III, section 3.2: the shorter side to the model's, then a crop at most 4 pixels off; reflected borders."""
    augment = AugmentConfig(train_crop_mode="src", hflip=0, color_jitter=0, train_interpolation="bicubic")
    transform = random_transform({**PREPROCESS, "input_size": (3, 32, 32)}, augment)
    image = picture(1, 32)
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    torch.manual_seed(0)
    seen = set()
    for _ in range(60):
        found = transform.pixels(to_tensor(image)).permute(1, 2, 0).numpy()
        at = [(y, x) for y in range(9) for x in range(9) if np.array_equal(padded[y : y + 32, x : x + 32], found)]
        assert len(at) == 1
        seen.add(at[0])
    assert len(seen) > 30
    wide = transform.pixels(to_tensor(Image.new("RGB", (300, 50))))
    assert wide.shape == (3, 32, 32)


def saved(image: Image.Image, format: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, format, **options)
    return data.getvalue()


def test_every_kind_of_image_is_decoded_as_pillow_does():
    smooth = picture(0, 16).resize((90, 70), Image.Resampling.BICUBIC)
    files = [*photographs(8), saved(smooth, "jpeg", progressive=True), saved(smooth.convert("L"), "jpeg")]
    files += [saved(smooth.convert("CMYK"), "jpeg"), saved(smooth.convert("RGBA"), "png"), saved(smooth, "webp")]
    files += [
        saved(smooth.convert("P"), "png"),
        saved(smooth.convert("1"), "png"),
        saved(smooth, "jpeg", subsampling=1),
    ]
    for data in files:
        for channels, mode in ((3, "RGB"), (1, "L")):
            found = decode(Image.open(io.BytesIO(data)), channels)
            expected = np.asarray(Image.open(io.BytesIO(data)).convert(mode))
            assert np.array_equal(found.permute(1, 2, 0).numpy().squeeze(), expected)
    for cut in (0.2, 0.5, 0.99):
        with pytest.raises(UNREADABLE):
            decode(Image.open(io.BytesIO(files[0][: int(cut * len(files[0]))])), 3)


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


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_are_those_of_the_image_where_a_model_folds_it_first(channels):
    assert preprocessing(timm.create_model("tresnet_m", in_chans=channels))["input_size"][0] == channels
