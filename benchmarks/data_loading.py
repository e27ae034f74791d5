"""What an image costs until the model can take it: ours beside timm's loader and torchvision's, on one core.

    python benchmarks/data_loading.py

Real photographs (ZOO_DATA/imagenet_sample, 250 JPEG files of about 500x375) go through equal transforms in three
loaders: ours, timm's (`timm.data.create_loader` as its train script uses it, with the prefetcher) and torchvision's
usual one (ImageFolder, transforms on Pillow images, ToTensor, Normalize). Everything is done in one process on one
thread, from the file to the normalised float batch, so that images/s are images/s per core. The loaders take turns;
reported are medians over the rounds, and as ratio the median of the rounds' ratios of CPU time.

timm's posterize asks newer Pillow for images without bits and fails: it is held to one bit here, for all three alike.
How close the images are is what tests/test_data.py proves: the same random numbers give the same crops, flips and
operations, and pixels that differ by the rounding of the resize (0.05 of 255 levels in the mean).
"""

from __future__ import annotations

import argparse
import datetime
import io
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timm
import timm.data.auto_augment
import torch
from PIL import Image
from record import RESULTS, command, data_folder, versions, write_json
from timm.data import create_dataset, create_loader, create_transform
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg

from zoo.config import run_command
from zoo.data import AugmentConfig, DataConfig, evaluation_loader, load_split, training_loader
from zoo.devices import device_name

FILE = RESULTS / "data_loading.json"
POLICY = "rand-m9-mstd0.5-inc1"
TARGET = 1.3  # timm's CPU time over ours, at least
SIZE, MEAN, STD, CROP_PCT = (3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.9
KINDS: dict[str, dict[str, Any] | None] = {
    "training, RandAugment": {"aa": POLICY, "reprob": 0.25, "remode": "pixel"},
    "training, no policy": {"aa": None, "reprob": 0.25, "remode": "pixel"},
    "evaluation": None,
}


def ours(folder: Path, batch_size: int, options: dict[str, Any] | None) -> Callable[[], Iterable[torch.Tensor]]:
    config = DataConfig(name="folder", path=str(folder), train_split="val", batch_size=batch_size, workers=0)
    preprocess = {"input_size": SIZE, "mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": CROP_PCT}
    device = torch.device("cpu")
    if options is None:
        evaluation = evaluation_loader(load_split(config, training=False), config, preprocess)
        return lambda: (evaluation.prepare(batch, device) for batch in evaluation)
    augment = AugmentConfig(color_jitter=0.0, **options)
    training = training_loader(load_split(config, training=True), config, preprocess, augment, seed=0)
    epochs = iter(range(10**9))
    return lambda: (training.prepare(batch, device) for batch in training.batches(next(epochs)))


def timms(folder: Path, batch_size: int, options: dict[str, Any] | None) -> Callable[[], Iterable[torch.Tensor]]:
    training: dict[str, Any] = {"is_training": False, "crop_pct": CROP_PCT, "interpolation": "bicubic"}
    if options is not None:
        training = {
            "is_training": True,
            "auto_augment": options["aa"],
            "re_prob": options["reprob"],
            "re_mode": options["remode"],
            "color_jitter": None,
            "interpolation": "random",
        }
    loader = create_loader(
        create_dataset("", root=str(folder / "val")),
        SIZE,
        batch_size,
        mean=MEAN,
        std=STD,
        num_workers=0,
        use_prefetcher=True,
        persistent_workers=False,
        device=torch.device("cpu"),
        **training,
    )
    return lambda: (images for images, _ in loader)


def torchvisions(folder: Path, batch_size: int, options: dict[str, Any] | None) -> Callable[[], Iterable[torch.Tensor]]:
    if options is None:
        transform = create_transform(SIZE, interpolation="bicubic", mean=MEAN, std=STD, crop_pct=CROP_PCT)
    else:
        transform = create_transform(
            SIZE,
            is_training=True,
            auto_augment=options["aa"],
            color_jitter=None,
            interpolation="random",
            mean=MEAN,
            std=STD,
            re_prob=options["reprob"],
            re_mode=options["remode"],
        )
    training = options is not None
    loader = DataLoader(ImageFolder(str(folder / "val"), transform), batch_size, shuffle=training, drop_last=training)
    return lambda: (images for images, _ in loader)


LOADERS = {"zoo": ours, "timm": timms, "torchvision": torchvisions}


def clock(act: Callable[[], int]) -> tuple[float, float]:
    """CPU and wall seconds for each image of those that `act` says it made."""
    cpu, wall = time.process_time(), time.perf_counter()
    images = act()
    return (time.process_time() - cpu) / images, (time.perf_counter() - wall) / images


def decoding(folder: Path) -> dict[str, Callable[[], int]]:
    """Decoding alone, from bytes in memory: what no loader can be faster than, unless it decodes less."""
    files = [path.read_bytes() for path in sorted((folder / "val").glob("*/*"))]

    def pillow() -> int:
        return sum(Image.open(io.BytesIO(data)).convert("RGB").width > 0 for data in files)

    def torchvision_io() -> int:
        tensors = (torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files)
        return sum(len(decode_jpeg(data, ImageReadMode.RGB)) > 0 for data in tensors)

    return {"Pillow": pillow, "torchvision.io": torchvision_io}


def keep_one_bit() -> None:
    plain = timm.data.auto_augment.posterize

    def posterize(image: Image.Image, bits_to_keep: int, **unused: Any) -> Image.Image:
        return plain(image, max(1, bits_to_keep))

    table = timm.data.auto_augment.NAME_TO_OP
    table.update({name: posterize for name, op in table.items() if op is plain})


def counting(passes: Callable[[], Iterable[torch.Tensor]]) -> Callable[[], int]:
    return lambda: sum(map(len, passes()))


def measure(folder: Path, rounds: int, batch_size: int) -> dict[str, Any]:
    keep_one_bit()
    acts: dict[str, dict[str, Callable[[], int]]] = {"decoding alone": decoding(folder)}
    for kind, options in KINDS.items():
        acts[kind] = {}
        for name, make in LOADERS.items():
            passes = make(folder, batch_size, options)
            acts[kind][name] = counting(passes)
    seconds: dict[str, dict[str, list[tuple[float, float]]]] = {kind: {n: [] for n in acts[kind]} for kind in acts}
    for number in range(rounds + 1):  # the first warms caches and is not counted
        for kind, of_kind in acts.items():
            for name, act in of_kind.items():
                taken = clock(act)
                if number:
                    seconds[kind][name].append(taken)
        print(f"round {number} of {rounds}", file=sys.stderr)
    return {kind: _summary(of_kind) for kind, of_kind in seconds.items()}


def _summary(seconds: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for name, taken in seconds.items():
        cpu, wall = (statistics.median(column) for column in zip(*taken, strict=True))
        summary[name] = {
            "cpu_ms_per_image": round(1e3 * cpu, 4),
            "images_per_cpu_second": round(1 / cpu, 1),
            "images_per_wall_second": round(1 / wall, 1),
        }
    if "zoo" in seconds:
        for name in ("timm", "torchvision"):
            ratios = [theirs[0] / mine[0] for mine, theirs in zip(seconds["zoo"], seconds[name], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            summary[f"cpu time, {name} over zoo"] = {
                "median": round(middle, 3),
                "quartiles": [round(low, 3), round(high, 3)],
            }
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--results", type=Path, default=FILE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(data_folder("imagenet_sample", "val"), args.rounds, args.batch_size)
    for kind, summary in found.items():
        print(kind)
        for name, numbers in summary.items():
            print(f"  {name:<32}" + ", ".join(f"{key} {value}" for key, value in numbers.items()))
    results = {
        "command": command(),
        "date": datetime.date.today().isoformat(),
        "target": f"timm's CPU time over ours, at least {TARGET}",
        "rounds": args.rounds,
        "batch_size": args.batch_size,
        "images": 250,
        "cpu": device_name(torch.device("cpu")),
        "load": [round(load, 2) for load in os.getloadavg()],
        "versions": {**versions("torch", "torchvision", "timm", "pillow"), "python": platform.python_version()},
        "results": found,
    }
    write_json(results, args.results)
    missed = [kind for kind in KINDS if found[kind]["cpu time, timm over zoo"]["median"] < TARGET]
    print(f"Missed: {', '.join(missed)}." if missed else "Every target is met.")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(run_command(main))
