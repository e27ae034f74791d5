"""Batches: in an order and with an augmentation that depend on nothing but (seed, epoch, index).

So any number of workers, and a resumed run, sees the same. Damaged images are skipped and counted instead of ending a
run after a day.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import random
import signal
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

import numpy as np
import torch
from PIL import Image
from PIL.ImageFile import ImageFile
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate, get_worker_info
from torchvision.io import ImageReadMode, decode_jpeg

from zoo.data.config import AugmentConfig, DataConfig
from zoo.data.sources import ImageSplit
from zoo.data.streaming import MISSING, RawSample, Shards, reason, shuffled
from zoo.data.token_labels import MapFolder
from zoo.data.transforms import (
    NO_ERASURES,
    Batch,
    LabelMaps,
    Prepare,
    RandomTransform,
    View,
    eval_transform,
    random_transform,
    to_tensor,
)
from zoo.data.workers import next_batch
from zoo.errors import ConfigError, DataError, ZooError

__all__ = [
    "DamageReport",
    "EpochSampler",
    "EvaluationLoader",
    "ImageDataset",
    "StreamBatches",
    "TrainingLoader",
    "evaluation_loader",
    "make_loader",
    "training_loader",
]

# what Pillow raises for bytes that are not, or only partly, an image
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
MAX_DAMAGED_IN_A_ROW = 100


def training_loader(
    data: ImageSplit,
    config: DataConfig,
    preprocess: dict[str, Any],
    augment: AugmentConfig,
    *,
    seed: int,
    rank: int = 0,
    processes: int = 1,
    pin_memory: bool = False,
) -> TrainingLoader:
    """The training batches of one of `processes` that share `data`.

    Raises DataError when `data` does not fill one batch for each process, or label maps are missing or damaged (which
    may come out later), ConfigError for augmentation that cannot be.
    """
    transform = random_transform(preprocess, augment)
    batches = whole_batches(len(data), config.batch_size, processes)
    channels = preprocess["input_size"][0]
    order: EpochSampler | StreamBatches
    if isinstance(data.source, Shards):
        if augment.aug_repeats > 1:
            raise ConfigError("augment.aug_repeats needs images that are not streamed: it deals the copies by number.")
        order = StreamBatches(
            data, transform, config, channels=channels, training=True, seed=seed, rank=rank, processes=processes
        )
        loader = _stream_loader(order, config, pin_memory)
    else:
        order = EpochSampler(len(data), seed=seed, rank=rank, processes=processes, repeats=augment.aug_repeats)
        maps = None
        if config.token_labels is not None:
            if augment.train_crop_mode == "src":
                raise ConfigError(
                    "data.token_labels goes with augment.train_crop_mode rrc: src adds a border, of which no label map "
                    "says anything."
                )
            maps = MapFolder(config.token_labels, data)
        dataset = ImageDataset(data, transform, channels=channels, seed=seed, replace_damaged=True, maps=maps)
        loader = make_loader(dataset, config, sampler=order, drop_last=True, pin_memory=pin_memory)
    return TrainingLoader(loader, order, data.source.check, transform.prepare, config.batch_size, batches)


def whole_batches(images: int, batch_size: int, processes: int) -> int:
    """How many batches each process makes of its share of the training images. Raises DataError for none."""
    batches = images // processes // batch_size
    if batches == 0:
        raise DataError(
            f"{images} training images do not fill one batch{' for each process' * (processes > 1)}: "
            f"lower data.batch_size ({batch_size})."
        )
    return batches


def evaluation_loader(
    data: ImageSplit,
    config: DataConfig,
    preprocess: dict[str, Any],
    *,
    rank: int = 0,
    processes: int = 1,
    pin_memory: bool = False,
) -> EvaluationLoader:
    """The evaluation batches of one of `processes`: over all of them, every sample once."""
    transform = eval_transform(preprocess)
    channels = preprocess["input_size"][0]
    if isinstance(data.source, Shards):
        batches = StreamBatches(
            data, transform, config, channels=channels, training=False, rank=rank, processes=processes
        )
        loader = _stream_loader(batches, config, pin_memory)
    else:
        dataset = ImageDataset(data, transform, channels=channels)
        loader = make_loader(dataset, config, sampler=range(rank, len(data), processes), pin_memory=pin_memory)
    return EvaluationLoader(loader, data.source.check, transform.prepare)


class LoadingConfig(Protocol):
    """What loading asks of a configuration of data."""

    @property
    def batch_size(self) -> int: ...
    @property
    def workers(self) -> int: ...


class _Order(Protocol):
    def seek(self, epoch: int, start: int) -> None:
        """Let the next pass begin at sample `start` of this process's share of `epoch`."""


class TrainingLoader:
    """Batches of equal size, an epoch at a time, the same whenever they are asked for.

    `prepare(batch, device, memory_format)` makes of a batch's images what the model takes.
    """

    def __init__(
        self,
        loader: DataLoader,
        order: _Order,
        check: Callable[[], None],
        prepare: Prepare,
        batch_size: int,
        batches_per_epoch: int,
    ) -> None:
        self.loader, self.order, self.check, self.prepare = loader, order, check, prepare
        self.batch_size, self.batches_per_epoch = batch_size, batches_per_epoch

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from the `start`-th on. Raises DataError where the data cannot fill them."""
        self.order.seek(epoch, start * self.batch_size)
        return self._whole(iter(self.loader))

    def _whole(self, batches: Iterator[Batch | ZooError]) -> Iterator[Batch]:
        for batch in _sound(batches, self.check, self.loader.num_workers):
            if len(batch.images) < self.batch_size:
                raise DataError(f"Too many images in a row cannot be read: {batch.damaged[0]}.")
            yield batch


class EvaluationLoader:
    """Every sample once; the last batch may be smaller, and one whose images are all damaged is empty.

    `prepare(batch, device, memory_format)` makes of a batch's images what the model takes.
    """

    def __init__(self, loader: DataLoader, check: Callable[[], None], prepare: Prepare) -> None:
        self.loader, self.check, self.prepare = loader, check, prepare

    def __iter__(self) -> Iterator[Batch]:
        return _sound(iter(self.loader), self.check, self.loader.num_workers)


def _sound(batches: Iterator[Batch | ZooError], check: Callable[[], None], workers: int) -> Iterator[Batch]:
    """What workers hand over, as long as they hand over batches and the data is still there."""
    while True:
        try:
            batch = next_batch(batches, workers)
        except StopIteration:
            return
        if isinstance(batch, ZooError):
            raise batch
        if batch.damaged:
            check()
        yield batch


# ----------------------------------------------------------------------------------------------------- images by number


class Sample(NamedTuple):
    image: Tensor | None  # (C, H, W) uint8, or None: damaged, and not replaced
    label: int
    damaged: tuple[str, ...] = ()  # names of images that were tried and cannot be read
    erased: Sequence[tuple[int, ...]] = ()  # areas for random erasing
    label_map: Tensor | None = None  # (2, k, H, W), of the whole image
    view: View | None = None  # what of it `image` shows


class PixelTransform(Protocol):
    """A transform's part in the worker: see `zoo.data.transforms`."""

    def pixels(self, image: Tensor) -> Tensor: ...
    def erasures(self) -> list[tuple[int, ...]]: ...


class SampleDataset(Dataset[Any]):
    """Samples that a batch's workers make one by one, with random numbers of their own; an error ends the batch."""

    def __getitems__(self, keys: Sequence[Any]) -> list[Any] | ZooError:
        with chance_kept():
            try:
                return [self.sample(key) for key in keys]
            except ZooError as error:  # raised in a worker, it would come wrapped in a traceback
                return error

    def __getitem__(self, key: Any) -> Any:
        with chance_kept():
            return self.sample(key)

    def sample(self, key: Any) -> Any:
        raise NotImplementedError


class ImageDataset(SampleDataset):
    """Images of a split, transformed as far as workers do it.

    An item's number is an index, or `(epoch, index, copy)`: then random transforms draw from these and the seed alone.
    With `replace_damaged`, the next readable image takes a damaged one's place, so that training batches keep their
    size. With `maps`, samples that are transformed at random bring their images' label maps.
    """

    def __init__(
        self,
        split: ImageSplit,
        transform: PixelTransform,
        *,
        channels: int = 3,
        seed: int = 0,
        replace_damaged: bool = False,
        maps: MapFolder | None = None,
    ) -> None:
        self.split, self.transform, self.seed, self.replace_damaged = split, transform, seed, replace_damaged
        self.channels, self.maps = channels, maps

    def __len__(self) -> int:
        return len(self.split)

    def sample(self, key: int | tuple[int, int, int]) -> Sample:
        index = key[1] if isinstance(key, tuple) else key
        damaged: list[str] = []
        while True:
            try:
                with self.split.source.open(index) as file:
                    image = decode(file, self.channels)
                break
            except UNREADABLE as error:
                damaged.append(f"{self.split.source.name(index)}: {reason(error)}")
            if not self.replace_damaged or len(damaged) >= min(MAX_DAMAGED_IN_A_ROW, len(self)):
                return Sample(None, int(self.split.labels[index]), tuple(damaged))
            index = (index + 1) % len(self)
        label = int(self.split.labels[index])
        if not isinstance(key, tuple):
            return Sample(self.transform.pixels(image), label, tuple(damaged))
        epoch, _, copy = key
        draw_from(self.seed, epoch, index, copy)
        if self.maps is None:
            return Sample(self.transform.pixels(image), label, tuple(damaged), self.transform.erasures())
        assert isinstance(self.transform, RandomTransform)
        pixels, view = self.transform.pixels_and_view(image)
        return Sample(pixels, label, tuple(damaged), self.transform.erasures(), self.maps.read(index), view)


def decode(file: Image.Image, channels: int) -> Tensor:
    """An opened image -> (C, H, W) uint8. Raises one of UNREADABLE where it is damaged."""
    if channels == 3 and file.format == "JPEG" and file.mode in ("RGB", "L"):
        raw = cast(BinaryIO, cast(ImageFile, file).fp)
        raw.seek(0)
        data = torch.frombuffer(bytearray(raw.read()), dtype=torch.uint8)
        try:
            return decode_jpeg(data, ImageReadMode.RGB)  # the same pixels as Pillow's, straight into a tensor
        except RuntimeError:
            pass  # Pillow says what is wrong
    return to_tensor(to_channels(file, channels))


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """An image of any mode as greyscale (1 channel) or RGB (3), of 8 bits.

    Grey values of 16 bits are scaled to 8, which Pillow would cut off at 255. Raises ValueError for those of 32 bits
    and for floats, of which nobody knows what black and white are.
    """
    if image.mode in ("I", "F") and image.format != "PNG":  # an "I" of a PNG has 16 bits
        raise ValueError(f"its pixels have 32 bits (mode {image.mode}): save it with 8 or 16 of them")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


@contextlib.contextmanager
def chance_kept() -> Iterator[None]:
    """Random numbers outside the block go on as if nothing had been drawn in it."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def draw_from(*entropy: int) -> None:
    """Let all random numbers follow from `entropy` alone."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


class EpochSampler(Sampler[tuple[int, int, int]]):
    """`(epoch, index, copy)` for this process's share of an epoch: shuffled by (seed, epoch), from the `start`-th on.

    Process r of n takes every n-th from the r-th on, so that the n batches of a step are the one batch of a single
    process with n times the size. Shares are cut to equal length, as data-parallel steps must be equally many.

    With `repeats` (repeated augmentation: Hoffer et al., arXiv 1901.09335, as in DeiT) the copies of an image follow
    one another, so that they go to different processes; the epoch keeps its length, and so sees one image in `repeats`.
    """

    def __init__(self, length: int, *, seed: int, rank: int = 0, processes: int = 1, repeats: int = 0) -> None:
        self.length, self.seed, self.rank, self.processes, self.repeats = length, seed, rank, processes, max(1, repeats)
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.length // self.processes

    def seek(self, epoch: int, start: int) -> None:
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        epoch = self.epoch
        order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
        share = range(self.rank, len(self) * self.processes, self.processes)[self.start :]
        return ((epoch, int(order[place // self.repeats]), place % self.repeats) for place in share)


def make_loader(
    dataset: Dataset,
    config: LoadingConfig,
    *,
    sampler: Sampler | Sequence[int] | None = None,
    drop_last: bool = False,
    pin_memory: bool = False,
    collate_fn: Callable[[list[Any]], Any] | None = None,
) -> DataLoader:
    """Batches of `dataset`, in order unless a `sampler` says otherwise; of images, unless `collate_fn` does."""
    return DataLoader(
        dataset,
        batch_size=config.batch_size,
        sampler=sampler,
        drop_last=drop_last,
        collate_fn=functools.partial(_collate_sound, collate_fn or collate),
        **_worker_options(config, pin_memory),
    )


def _stream_loader(batches: StreamBatches, config: DataConfig, pin_memory: bool) -> DataLoader:
    return DataLoader(batches, batch_size=None, collate_fn=_as_is, **_worker_options(config, pin_memory))


def _as_is(batch: Any) -> Any:
    return batch


def _collate_sound(collate: Callable[[list[Any]], Any], samples: list[Any] | ZooError) -> Any:
    return samples if isinstance(samples, ZooError) else collate(samples)


def collate(samples: list[Sample]) -> Batch:
    good = [sample for sample in samples if sample.image is not None]
    damaged = tuple(name for sample in samples for name in sample.damaged)
    if not good:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), damaged)
    images = default_collate([sample.image.permute(1, 2, 0) for sample in good])  # type: ignore[union-attr]
    labels = torch.tensor([sample.label for sample in good])
    areas = [(number, *area) for number, sample in enumerate(good) for area in sample.erased]
    erased = torch.tensor(areas) if areas else NO_ERASURES
    return Batch(images.permute(0, 3, 1, 2), labels, damaged, erased, _label_maps(good))


def _label_maps(samples: list[Sample]) -> LabelMaps | None:
    maps = [sample.label_map for sample in samples if sample.label_map is not None]
    views = [sample.view for sample in samples if sample.view is not None]
    if not maps:
        return None
    regions, flips = (torch.tensor(values) for values in zip(*views, strict=True))
    return LabelMaps(torch.stack(maps), regions, flips)


def _worker_options(config: LoadingConfig, pin_memory: bool) -> dict[str, Any]:
    return {
        "num_workers": config.workers,
        "persistent_workers": config.workers > 0,
        "pin_memory": pin_memory,
        "worker_init_fn": _init_worker,
        "generator": torch.Generator(),  # or each new iterator would draw from the model's random numbers
    }


def _init_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C, torchrun and job schedulers signal whole groups of processes: the main process is to finish its step, and
    # stops its workers itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


# -------------------------------------------------------------------------------------------------------------- streams


_At = tuple[int, int]  # the shard, and the sample's number in it
_Found = tuple[_At, RawSample | None, list[str]]  # and what was found out on the way


class StreamBatches(IterableDataset[Batch | ZooError]):
    """Batches of a stream, each determined by (seed, epoch, number of the batch, processes, workers).

    The shards' order is shuffled by (seed, epoch); the samples in that order are cut into one stretch for each process,
    and that into one for each worker, in whole batches. So every sample comes once, however few the shards are, as far
    as batches are full. A worker shuffles its stretch through a buffer; which sample leaves the buffer when is drawn
    beforehand, so that a resumed run passes over what was seen without decoding it.

    In training, a damaged image's place is taken by another of its batch, and what a shard lacks by the next shard's.
    """

    def __init__(
        self,
        split: ImageSplit,
        transform: PixelTransform,
        config: DataConfig,
        *,
        channels: int = 3,
        training: bool = False,
        seed: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        assert isinstance(split.source, Shards)
        self.shards, self.labels, self.transform, self.channels = split.source, split.labels, transform, channels
        self.batch_size, self.buffer = config.batch_size, config.shuffle_buffer
        self.training, self.seed, self.rank = training, seed, rank
        if training:
            size = len(split) // processes // self.batch_size * self.batch_size
            self.share = range(rank * size, (rank + 1) * size)
        else:
            self.share = range(len(split) * rank // processes, len(split) * (rank + 1) // processes)
        self.position = torch.zeros(2, dtype=torch.int64).share_memory_()  # workers outlive an epoch

    def seek(self, epoch: int, start: int) -> None:
        self.position.copy_(torch.tensor([epoch, start]))

    def __iter__(self) -> Iterator[Batch | ZooError]:
        epoch, start = self.position.tolist()
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        try:
            yield from self._batches(epoch, start // self.batch_size, number, workers)
        except ZooError as error:
            yield error

    def _batches(self, epoch: int, start: int, number: int, workers: int) -> Iterator[Batch]:
        turn = (number + start) % workers  # batches are taken from worker 0 first: it must have the first
        total = -(-len(self.share) // self.batch_size)
        sizes = [len(self.share[b * self.batch_size :][: self.batch_size]) for b in range(total)]
        before = sum(sum(sizes[other::workers]) for other in range(turn))
        stretch = self.share[before:][: sum(sizes[turn::workers])]
        if self.training:
            samples = self._shuffled(stretch, epoch, turn, len(range(turn, start, workers)) * self.batch_size)
        else:
            samples = self._in_order(stretch)
        while group := list(itertools.islice(samples, self.batch_size)):
            with chance_kept():
                batch = [self._decoded(epoch, *found) for found in group]
            yield collate(_filled(batch) if self.training else batch)

    def _in_order(self, stretch: range) -> Iterator[_Found]:
        order = np.arange(len(self.shards.shards))
        for place, at, raw in self.shards.stretch(stretch, order=order, wanted=lambda place: True, refill=False):
            if raw is not None:
                yield (at, None, [raw.name]) if place < 0 else (at, raw, [])

    def _shuffled(self, stretch: range, epoch: int, turn: int, done: int) -> Iterator[_Found]:
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.shards.shards))
        leaving = shuffled(len(stretch), self.buffer, np.random.default_rng((self.seed, epoch, self.rank, turn)))
        wanted = np.zeros(len(stretch), dtype=bool)
        wanted[leaving[done:]] = True
        source = self.shards.stretch(stretch, order=order, wanted=lambda place: bool(wanted[place]), refill=True)
        held: dict[int, tuple[_At, RawSample]] = {}
        problems: list[str] = []
        for place in leaving[done:]:
            while place not in held:
                found, at, raw = next(source)
                if raw is None:
                    continue
                if found < 0:
                    problems.append(raw.name)
                else:
                    held[found] = at, raw
            yield *held.pop(place), problems
            problems = []

    def _decoded(self, epoch: int, at: _At, raw: RawSample | None, problems: list[str]) -> Sample:
        """The sample, with what was found out about its shard on the way."""
        if raw is None:
            return Sample(None, -1, tuple(problems))
        label = int(self.labels[self.shards.starts[at[0]] + at[1]]) if len(self.labels) else raw.label
        if raw.data is None or label is None or label < 0:
            lacking = "image" if raw.data is None else "label of a class"
            return Sample(None, -1, (*problems, f"{raw.name}: it has no {lacking}"))
        try:
            image = decode(Image.open(io.BytesIO(raw.data)), self.channels)
        except UNREADABLE as error:
            return Sample(None, -1, (*problems, f"{raw.name}: {reason(error)}"))
        if not self.training:
            return Sample(self.transform.pixels(image), label, tuple(problems))
        draw_from(self.seed, epoch, *at)
        return Sample(self.transform.pixels(image), label, tuple(problems), self.transform.erasures())


def _filled(batch: list[Sample]) -> list[Sample]:
    """`batch` with its damaged samples' places taken by others of it, in turn."""
    whole = itertools.cycle([sample for sample in batch if sample.image is not None] or batch)
    return [sample if sample.image is not None else next(whole)._replace(damaged=sample.damaged) for sample in batch]


class DamageReport:
    """Collects damaged samples, each once; the first ends everything when `strict`. `what` a sample is: its name."""

    def __init__(self, strict: bool, what: str = "image") -> None:
        self.strict, self.what = strict, what
        self.names: dict[str, None] = {}

    def add(self, names: Sequence[str]) -> None:
        if names and self.strict:
            raise DataError(f"A damaged {self.what}: {names[0]}. Leave data.strict at false to skip such {self.what}s.")
        self.names.update(dict.fromkeys(names))

    def __str__(self) -> str:
        shown = [f"  {name}" for name in list(self.names)[:20]]
        more = [f"  ... and {len(self.names) - 20} more"] if len(self.names) > 20 else []
        many = f"Skipped {len(self.names)} damaged {self.what}{'s' * (len(self.names) != 1)}:"
        if any(MISSING in name for name in self.names):  # several in a row
            many = f"Skipped {self.what}s that are damaged or missing:"
        return "\n".join([many, *shown, *more])
