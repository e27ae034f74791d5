"""Data that is read from front to back: shards, their order, and what happens when one is damaged or far away."""

from __future__ import annotations

import collections
import contextlib
import copy
import http.server
import io
import json
import re
import signal
import socketserver
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from PIL import Image

import zoo.data.streaming
from tests.test_training import EVERYTHING, SMALL, assert_same_checkpoint, configure
from zoo.data import AugmentConfig, DamageReport, DataConfig, evaluation_loader, load_split, training_loader
from zoo.data.streaming import Shard, Shards, expand, shuffled
from zoo.errors import ConfigError, DataError
from zoo.training import ImageClassification, Interrupted, TrainingConfig, fit, train
from zoo.training.checkpoint import read_state
from zoo.training.loop import make_accelerator

PREPROCESS = {
    "input_size": (3, 8, 8),
    "mean": (0.5,) * 3,
    "std": (0.25,) * 3,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
}
PLAIN = AugmentConfig(scale=(1, 1), ratio=(1, 1), hflip=0, color_jitter=0)
CPU = torch.device("cpu")


def picture(number: int) -> bytes:
    """An image of one colour, which tells its number."""
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 7)).save(data, format="png")
    return data.getvalue()


def number_of(image: torch.Tensor) -> int:
    red, green, blue = image[:, 4, 4].tolist()
    assert blue == 7
    return red + 256 * green


def write_tar(path: Path, numbers: range, classes: int = 5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            for name, data in (
                (f"{number:06d}.png", picture(number)),
                (f"{number:06d}.cls", f"{number % classes}".encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def write_tars(root: Path, sizes: list[int], split: str = "train") -> Path:
    begin = 0
    for shard, size in enumerate(sizes):
        write_tar(root / f"{split}-{shard:04d}.tar", range(begin, begin + size))
        begin += size
    return root


def write_parquets(root: Path, sizes: list[int], split: str = "train") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abcde"))})
    begin = 0
    for shard, size in enumerate(sizes):
        numbers = range(begin, begin + size)
        begin += size
        rows = {"image": [{"bytes": picture(n), "path": None} for n in numbers], "label": [n % 5 for n in numbers]}
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(str(root / f"{split}-{shard:05d}.parquet"), batch_size=7)  # several row groups
    return root


def options(root: Path | str, name: str = "webdataset", **more) -> DataConfig:
    given: dict[str, Any] = {"name": name, "path": str(root), "batch_size": 4, "workers": 0, "shuffle_buffer": 10}
    given |= {"num_classes": 5} if name == "webdataset" else {"streaming": True}
    return DataConfig(**given | more)


def epoch_of(config: DataConfig, epoch: int = 0, start: int = 0, **share) -> list[list[int]]:
    loader = training_loader(load_split(config, True), config, PREPROCESS, PLAIN, seed=3, **share)
    return [list(map(number_of, batch.images)) for batch in loader.batches(epoch, start)]


# --------------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("sizes", [[40], [11, 3, 9, 17], [1] * 40])
@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 2), (2, 0), (3, 2)])
def test_each_sample_comes_once_in_an_epoch(tmp_path: Path, sizes: list[int], processes: int, workers: int):
    config = options(write_tars(tmp_path, sizes), workers=workers)
    batches = [epoch_of(config, rank=rank, processes=processes) for rank in range(processes)]
    assert {len(of_rank) for of_rank in batches} == {40 // processes // 4}
    seen = [number for of_rank in batches for batch in of_rank for number in batch]
    assert len(seen) == len(set(seen)) == 40 // processes // 4 * 4 * processes
    assert seen != sorted(seen)


@pytest.mark.parametrize("write", [write_tars, write_parquets])
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_an_epoch_goes_on_from_any_batch(tmp_path: Path, write, workers: int):
    config = options(write(tmp_path, [13, 20, 8]), "webdataset" if write is write_tars else "parquet", workers=workers)
    augment = AugmentConfig(aa="rand-m9-mstd0.5-inc1", reprob=0.5, remode="pixel")
    loader = training_loader(load_split(config, True), config, PREPROCESS, augment, seed=3)
    prepared = [(loader.prepare(batch, CPU), batch.labels) for batch in loader.batches(2)]
    assert len(prepared) == loader.batches_per_epoch == 10
    for start in (1, 2, 5, 9):
        again = [(loader.prepare(batch, CPU), batch.labels) for batch in loader.batches(2, start)]
        assert len(again) == 10 - start
        for (images, labels), (expected, expected_labels) in zip(again, prepared[start:], strict=True):
            assert torch.equal(images, expected)
            assert torch.equal(labels, expected_labels)


def test_epochs_differ_and_repeat(tmp_path: Path):
    config = options(write_tars(tmp_path, [10, 10, 10]))
    assert epoch_of(config, 0) == epoch_of(config, 0) != epoch_of(config, 1)


def test_labels_belong_to_their_images(tmp_path: Path):
    for root, name in (
        (write_tars(tmp_path / "a", [10, 14]), "webdataset"),
        (write_parquets(tmp_path / "b", [10, 14]), "parquet"),
    ):
        config = options(root, name)
        loader = training_loader(load_split(config, True), config, PREPROCESS, PLAIN, seed=0)
        for batch in loader.batches(0):
            assert [number_of(image) % 5 for image in batch.images] == batch.labels.tolist()


@pytest.mark.parametrize(("length", "buffer"), [(0, 3), (5, 1), (30, 7), (7, 30)])
def test_a_shuffle_buffer_holds_no_more_than_it_may(length: int, buffer: int):
    leaving = shuffled(length, buffer, np.random.default_rng(0))
    assert sorted(leaving) == list(range(length))
    for at in range(length):  # what leaves as the n-th has come by then
        assert leaving[at] < at + buffer
    if buffer == 1:
        assert leaving == list(range(length))


@pytest.mark.parametrize("write", [write_tars, write_parquets])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_counts_every_sample_once(tmp_path: Path, write, workers: int):
    root = write(tmp_path, [5, 12, 6], "val")
    config = options(root, "webdataset" if write is write_tars else "parquet", workers=workers)
    for processes in (1, 2, 3):
        seen: list[tuple[int, int]] = []
        for rank in range(processes):
            loader = evaluation_loader(load_split(config, False), config, PREPROCESS, rank=rank, processes=processes)
            for batch in loader:
                seen += zip(map(number_of, batch.images), batch.labels.tolist(), strict=True)
        assert sorted(seen) == [(number, number % 5) for number in range(23)]


# -------------------------------------------------------------------------------------------------------------- layouts


def test_patterns_of_shards(tmp_path: Path):
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("{a,b}{0..1}.tar::c.tar") == ["a0.tar", "a1.tar", "b0.tar", "b1.tar", "c.tar"]
    write_tars(tmp_path, [4, 4, 4, 4])
    for path, split, count in (
        (tmp_path, "train", 16),
        (tmp_path, "train-{0001..0002}.tar", 8),
        (tmp_path, "train-*[13].tar", 8),
        (tmp_path / "train-{0000..0002}.tar", "train", 12),
    ):
        assert len(load_split(options(path, train_split=split, val_split=split), path == tmp_path)) == count


def test_classes_and_labels_of_tars(tmp_path: Path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name, data in (
            ("x/1.jpg", picture(1)),
            ("x/1.json", b'{"label": "dog", "kind": 0}'),
            ("x/2.seg.png", picture(9)),
            ("x/2.jpg", picture(2)),
            ("x/2.json", b'{"label": "cat", "kind": 1}'),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")

    def found(**more) -> dict[int, int]:
        config = options(tmp_path, batch_size=2, num_classes=None, **more)
        split = load_split(config, True)
        assert split.classes == ("cat", "dog")
        batch = next(training_loader(split, config, PREPROCESS, PLAIN, seed=0).batches(0))
        return dict(zip(map(number_of, batch.images), batch.labels.tolist(), strict=True))

    assert found() == {1: 1, 2: 0}
    assert found(label_key="kind") == {1: 0, 2: 1}
    assert found(image_key="jpg") == {1: 1, 2: 0}


def test_sizes_that_are_written_down_are_believed(tmp_path: Path):
    write_tars(tmp_path, [6, 6])
    (tmp_path / "sizes.json").write_text(json.dumps({"train-0000.tar": 6, "train-0001.tar": 5}))
    assert len(load_split(options(tmp_path), True)) == 11
    (tmp_path / "sizes.json").unlink()
    lengths = {"filenames": ["train-0000.tar", "train-0001.tar"], "shard_lengths": [6, 3]}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": lengths}}))  # as timm's data sets have it
    assert len(load_split(options(tmp_path), True)) == 9


def test_a_data_set_repository_is_streamed(tmp_path: Path):
    write_parquets(tmp_path, [9, 8])
    write_parquets(tmp_path, [5], "test")
    config = options(tmp_path, "hub")
    split = load_split(config, True)
    assert (len(split), split.classes) == (17, tuple("abcde"))
    assert len({number for batch in epoch_of(config) for number in batch}) == 16
    assert load_split(config, False).labels.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match=r"no split 'trian'. Did you mean train\?"):
        load_split(options(tmp_path, "hub", train_split="trian"), True)


def test_streams_that_make_no_sense(tmp_path: Path):
    write_tars(tmp_path, [6])

    def complaint(**more) -> str:
        with pytest.raises((DataError, ConfigError)) as caught:
            start(**more)
        return str(caught.value)

    def start(**more) -> None:
        config = options(tmp_path, **more)
        training_loader(load_split(config, True), config, PREPROCESS, AugmentConfig(aug_repeats=3), seed=0)

    assert "data.num_classes" in complaint(num_classes=None)
    assert "holds no shards nothing-*.tar" in complaint(train_split="nothing")
    assert "There is no shard" in complaint(train_split="train-{0000..0001}.tar")
    assert "lower data.batch_size (8)" in complaint(batch_size=8)
    assert "augment.aug_repeats needs images that are not streamed" in complaint()
    assert "data.num_classes is for streams" in complaint(name="parquet", streaming=False, num_classes=5)
    assert "data.shuffle_buffer must be at least 1" in complaint(shuffle_buffer=0)
    assert "give their names with data.train_split" in complaint(path="http://127.0.0.1:9/data")
    with pytest.raises(ConfigError, match=r"data\.streaming is for parquet files"):
        DataConfig(name="folder", path="x", streaming=True)
    for sizes in ("[3]", '{"train-0000.tar": -6}', '{"train-0000.tar": 5.5}', '{"train-0000.tar": true}'):
        (tmp_path / "sizes.json").write_text(sizes)
        assert "must hold the number of samples" in complaint()


def test_shards_that_hold_less_than_was_said(tmp_path: Path):
    write_tars(tmp_path, [6])
    (tmp_path / "sizes.json").write_text('{"train-0000.tar": 9}')
    config = options(tmp_path)
    with pytest.raises(
        DataError, match=r"hold as many samples as they should\. .*0000\.tar: samples 6 to 7 are missing"
    ):
        list(training_loader(load_split(config, True), config, PREPROCESS, PLAIN, seed=0).batches(0))


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["cut", "empty", "overwritten"])
def test_a_damaged_shard_is_skipped_and_told(tmp_path: Path, workers: int, damage: str):
    write_tars(tmp_path, [12, 12, 12])
    write_tars(tmp_path, [12, 12, 12], "val")
    sizes = {f"{split}-{n:04d}.tar": 12 for split in ("train", "val") for n in range(3)}
    (tmp_path / "sizes.json").write_text(json.dumps(sizes))
    for split in ("train", "val"):
        path = tmp_path / f"{split}-0001.tar"
        whole = path.read_bytes()
        path.write_bytes(
            {"cut": whole[: 2048 * 5 + 700], "empty": b"", "overwritten": whole[:10240] + b"\xa5" * 9000}[damage]
        )
    readable = 0 if damage == "empty" else 5
    config = options(tmp_path, workers=workers)
    report = DamageReport(strict=False)
    loader = training_loader(load_split(config, True), config, PREPROCESS, PLAIN, seed=0)
    whole_epoch = list(loader.batches(0))
    for batch in whole_epoch:
        report.add(batch.damaged)
    seen = collections.Counter(number_of(image) for batch in whole_epoch for image in batch.images)
    assert seen.total() == 36  # the schedule holds
    assert set(seen) == {*range(12), *range(12, 12 + readable), *range(24, 36)}
    assert all("train-0001.tar: samples " in name for name in report.names)
    assert report.names
    for batch, expected in zip(loader.batches(0, 4), whole_epoch[4:], strict=True):
        assert torch.equal(batch.images, expected.images)

    counted: list[int] = []
    told: list[str] = []
    for batch in evaluation_loader(load_split(config, False), config, PREPROCESS):
        counted += map(number_of, batch.images) if len(batch.images) else []
        told += batch.damaged
    assert sorted(counted) == [*range(12), *range(12, 12 + readable), *range(24, 36)]
    ranges = [re.search(r"val-0001\.tar: samples (\d+) to (\d+) are missing", name) for name in told]
    missing = [number for found in ranges if found for number in range(int(found[1]), int(found[2]) + 1)]
    assert sorted(missing) == list(range(readable, 12))
    with pytest.raises(DataError, match=r"A damaged image: .*0001\.tar: samples \d+ to \d+ are missing"):
        DamageReport(strict=True).add(tuple(told))


def test_a_damaged_sample_leaves_the_batch_whole(tmp_path: Path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for number in range(16):
            image = b"no image" if number == 3 else picture(number)
            label = b"99" if number == 5 else b"1"
            for name, data in ((f"{number:03d}.png", image), (f"{number:03d}.cls", label)):
                if (number, name[-3:]) in ((7, "png"), (9, "cls")):
                    continue
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    config = options(tmp_path)
    loader = training_loader(load_split(config, True), config, PREPROCESS, PLAIN, seed=0)
    batches = list(loader.batches(0))
    assert [len(batch.images) for batch in batches] == [4] * 4
    assert {number_of(image) for batch in batches for image in batch.images} == set(range(16)) - {3, 5, 7, 9}
    told = sorted(name.split("sample ")[1] for batch in batches for name in batch.damaged)
    assert [text.split(":")[0] for text in told] == ["3", "5", "7", "9"]
    assert told[1].endswith("it has no label of a class")
    assert told[2].endswith("it has no image")


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_that_vanish_end_the_run_with_a_message(tmp_path: Path, workers: int):
    config = options(write_tars(tmp_path, [12, 12]), workers=workers, shuffle_buffer=1)
    loader = training_loader(load_split(config, True), config, PREPROCESS, PLAIN, seed=0)
    assert len(list(loader.batches(0))) == 6
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    with pytest.raises(DataError, match=r"^The shard .*train-000\d\.tar is gone\.$"):
        list(loader.batches(1))


# ----------------------------------------------------------------------------------------------------------------- http


class Server(http.server.BaseHTTPRequestHandler):
    """A folder over HTTP; `refusals` and `drops` say how many of the next answers fail, or end early."""

    root: Path
    refusals = drops = 0
    ranges = True
    asked: list[str]
    url: str

    def do_GET(self):
        cls = type(self)
        cls.asked.append(self.path)
        path = cls.root / self.path.lstrip("/")
        if not path.is_file():
            return self.send_error(404)
        if cls.refusals > 0:
            cls.refusals -= 1
            return self.send_error(503)
        data = path.read_bytes()
        begin = 0
        if cls.ranges and (asked := self.headers.get("Range")):
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        rest = data[begin:]
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if cls.drops > 0:
            cls.drops -= 1
            rest = rest[: len(rest) // 2]
            self.close_connection = True
        with contextlib.suppress(ConnectionError):  # a reader that has what it wants hangs up
            self.wfile.write(rest)
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Server]]:
    monkeypatch.setattr(zoo.data.streaming, "RETRY_SECONDS", 0.01)
    handler: type[Server] = type("Handler", (Server,), {"root": tmp_path, "asked": []})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as http_server:  # asks no name server
        threading.Thread(target=http_server.serve_forever, args=(0.01,), daemon=True).start()
        handler.url = f"http://127.0.0.1:{http_server.server_address[1]}"
        yield handler
        http_server.shutdown()


@pytest.mark.parametrize("ranges", [True, False])
def test_shards_over_http(tmp_path: Path, server: type[Server], ranges: bool):
    write_tars(tmp_path, [20, 21, 19])
    (tmp_path / "sizes.json").write_text(
        json.dumps({f"train-{n:04d}.tar": size for n, size in enumerate((20, 21, 19))})
    )
    pattern = "train-{0000..0002}.tar"
    expected = epoch_of(options(tmp_path, train_split=pattern))
    server.ranges = ranges
    assert epoch_of(options(server.url, train_split=pattern)) == expected
    server.drops = 4
    assert epoch_of(options(server.url, train_split=pattern)) == expected
    server.refusals = 2
    assert epoch_of(options(server.url, train_split=pattern), start=7) == expected[7:]
    assert server.drops == server.refusals == 0


def test_shards_over_http_that_cannot_be_had(tmp_path: Path, server: type[Server]):
    write_tars(tmp_path, [20])
    config = options(server.url, train_split="train-{0000..0000}.tar")
    with pytest.raises(DataError, match=r"put sizes\.json beside it"):
        load_split(config, True)
    (tmp_path / "sizes.json").write_text('{"train-0000.tar": 20}')
    server.refusals = 5
    with pytest.raises(DataError, match=r"sizes\.json cannot be had, tried 5 times: .*503"):
        load_split(config, True)
    loader = training_loader(load_split(config, True), config, PREPROCESS, PLAIN, seed=0)
    server.refusals = 99
    with pytest.raises(DataError, match=r"train-0000\.tar cannot be had, tried 5 times: .*503"):
        list(loader.batches(0))
    server.refusals = 0
    (tmp_path / "train-0000.tar").unlink()
    with pytest.raises(DataError, match=r"The shard .* is gone"):
        list(loader.batches(0))


class NoRoute(Exception):
    """Not an OSError, as huggingface_hub's errors of connections are not."""


class Elsewhere(fsspec.AbstractFileSystem):
    """A file system that opens shards and then cannot read them, and does not open anything else."""

    protocol = "elsewhere"

    def open(self, path: str, *_, **__) -> io.RawIOBase:
        if path.endswith(".tar"):
            return self.Broken()
        raise NoRoute("No route to host.\nA page of advice.")

    class Broken(io.RawIOBase):
        def read(self, *_):
            raise NoRoute("The connection broke.\nA page of advice.")


def test_shards_elsewhere_that_cannot_be_reached():
    fsspec.register_implementation("elsewhere", Elsewhere)
    config = options("elsewhere://host", train_split="train-{0000..0000}.tar")
    with pytest.raises(DataError, match=r"elsewhere://host/sizes\.json cannot be had: No route to host\.$"):
        load_split(config, True)
    shards = Shards([Shard("elsewhere://host/train-0000.tar", 20)], ["a", "b"], None, None)
    with pytest.raises(DataError, match=r"train-0000\.tar cannot be read: The connection broke\.$"):
        list(shards.read(0, 0, 20))


# ------------------------------------------------------------------------------------------------------------- training


class Stopped(ImageClassification):
    """Is asked to stop, by a signal, when its fifth batch is under way."""

    batches_left = 5

    def loss(self, *args, **kwargs) -> torch.Tensor:
        self.batches_left -= 1
        if self.batches_left == 0:
            signal.raise_signal(signal.SIGTERM)
        return super().loss(*args, **kwargs)


@pytest.mark.parametrize("write", [write_tars, write_parquets])
def test_a_run_over_a_stream_resumes_exactly_from_the_middle_of_an_epoch(tmp_path: Path, write):
    write(tmp_path / "data", [13, 30, 6])
    write(tmp_path / "data", [7, 4], "val")
    (tmp_path / "recipe.yaml").write_text(SMALL)
    changes = copy.deepcopy(EVERYTHING)
    changes["data"] = vars(options(tmp_path / "data", "webdataset" if write is write_tars else "parquet", workers=2))
    changes["data"] |= {"input_size": [3, 16, 16], "mean": None, "std": None}
    changes["scheduler"] = {"epochs": 2}

    def config(name: str, **more) -> TrainingConfig:
        return configure(tmp_path / "recipe.yaml", tmp_path / name, **changes, **more)

    whole = train(config("whole"))
    assert [row["updates"] for row in whole.history] == [6, 12]
    stopped = config("parts")
    accelerator = make_accelerator(stopped.train, stopped.output)
    with pytest.raises(Interrupted):
        fit(Stopped(stopped, accelerator), stopped, accelerator)
    progress = read_state(tmp_path / "parts" / "last")["progress"]
    assert (progress["epoch"], progress["batch"]) == (0, 6)
    train(config("parts", resume="auto"))
    assert_same_checkpoint(tmp_path / "whole" / "last", tmp_path / "parts" / "last")
    assert_same_checkpoint(tmp_path / "whole" / "best", tmp_path / "parts" / "best")


def test_a_stream_is_evaluated_by_name(tmp_path: Path):
    """What evaluation tells of each image names its shard and its place in it."""
    write_tars(tmp_path, [3, 4], "val")
    split = load_split(options(tmp_path), False)
    assert split.source.name(4) == f"{tmp_path / 'val-0001.tar'}, sample 1"
    assert number_of(torch.from_numpy(np.array(split.source.open(4).convert("RGB"))).permute(2, 0, 1)) == 4
