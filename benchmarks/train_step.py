"""One training step, ours and timm's: time and peak memory of model and loop under equal settings.

    OMP_WAIT_POLICY=passive python benchmarks/train_step.py

Ours is `zoo.training.fit` itself, timed from the moment it gets a batch until it asks for the next. timm's is its model
in the step of its train.py: mixup, autocast, loss, backward, clipping, optimizer, schedule; once in the memory layout
that ours runs in, and once, where that is channels_last, in timm's default. They take turns in one process, and all get
the same batch. Reported are medians over the steps after warm-up: on a GPU of wall-clock time, on a CPU of CPU time
summed over threads, which does not depend on what else runs (OMP_WAIT_POLICY=passive keeps waiting threads out of it),
and page faults. Peak memory is measured in a process of its own for each: on a GPU what torch allocated, on a CPU how
far the resident set rose above what it was before the model was made.

PoolFormer's head is the authors' here and timm's there (the order of norm and pooling); all else computes the same.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from record import RESULTS, command, versions, write_json
from rich.console import Console
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import dispatch_clip_grad

from zoo.config import run_command
from zoo.data import AugmentConfig, Batch, DataConfig
from zoo.devices import device_and_threads
from zoo.errors import ZooError
from zoo.training import ImageClassification, TrainingConfig, fit
from zoo.training.config import ModelConfig, OptimizerConfig, OutputConfig, SchedulerConfig, TrainConfig
from zoo.training.loop import make_accelerator

MODELS = ("poolformer_s12", "poolformerv2_s12", "convformer_s18", "caformer_s18")
FILE = RESULTS / "train_step.json"
MEMORY_STEPS = 3


def configuration(model: str, arguments: argparse.Namespace, folder: str) -> TrainingConfig:
    """The settings of both sides. The images are digits, enlarged: what they show costs nothing."""
    return TrainingConfig(
        model=ModelConfig(name=model, args={"drop_path_rate": 0.1}),
        data=DataConfig(
            name="digits",
            batch_size=arguments.batch_size,
            workers=0,
            input_size=(3, arguments.input_size, arguments.input_size),
        ),
        augment=AugmentConfig(mixup=0.8, cutmix=1.0),
        optimizer=OptimizerConfig(lr=1e-4, clip_grad=1.0),
        scheduler=SchedulerConfig(epochs=1, warmup_epochs=0),
        train=TrainConfig(
            amp=arguments.amp,
            channels_last=arguments.channels_last,
            torchcompile=arguments.compile,
            device=arguments.device,
        ),
        output=OutputConfig(dir=folder, tracker=None),
    )


class Timed(ImageClassification):
    """One batch, again and again; the seconds that the loop takes with it, and what runs in between."""

    def __init__(self, config: TrainingConfig, steps: int, between: Callable[[Timed, Batch], None] | None) -> None:
        super().__init__(config, make_accelerator(config.train, config.output))
        self.batches_per_epoch, self.between = steps, between
        self.seconds: list[float] = []
        self.faults: list[int] = []
        self.peak = 0

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        batch = next(super().batches(epoch, start))
        for _ in range(self.batches_per_epoch):
            if self.between is not None:
                self.between(self, batch)
            started, faults = now(self.accelerator.device), page_faults()
            yield batch
            self.seconds.append(now(self.accelerator.device) - started)
            self.faults.append(page_faults() - faults)
            self.peak = peak_memory(self.accelerator.device)

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        return {"loss": 0.0, "top1": 0.0}  # not what is measured

    def save(self, folder: Path) -> Path:
        folder.mkdir()
        return folder


class TimmsLoop:
    """The step of timm's train.py, on timm's model."""

    def __init__(self, config: TrainingConfig, task: Timed, steps: int, channels_last: bool) -> None:
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        device, self.task, self.config = task.accelerator.device, task, config
        model = timm.create_model(config.model.name, num_classes=task.num_classes, **config.model.args)
        model.to(device)
        model.to(memory_format=self.memory_format)
        self.optimizer = create_optimizer_v2(
            model, opt=config.optimizer.opt, lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay
        )
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, num_epochs=1, step_on_epochs=False, updates_per_epoch=steps
        )
        self.parameters = list(model.parameters())
        model.train()
        self.model = torch.compile(model) if config.train.torchcompile else model
        self.mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=task.num_classes)
        self.loss = SoftTargetCrossEntropy()
        self.autocast = (
            (lambda: torch.autocast(device.type, torch.bfloat16))
            if config.train.amp == "bf16"
            else contextlib.nullcontext
        )
        self.updates = 0
        self.seconds: list[float] = []
        self.faults: list[int] = []

    def step(self, task: Timed, batch: Batch) -> None:
        device = task.accelerator.device
        started, faults = now(device), page_faults()
        images = task.train_loader.prepare(batch, device, self.memory_format)
        images, labels = self.mixup(images, batch.labels.to(device, non_blocking=True))
        with self.autocast():
            loss = self.loss(self.model(images), labels)
        loss.backward()
        dispatch_clip_grad(self.parameters, self.config.optimizer.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        self.scheduler.step_update(self.updates)
        self.seconds.append(now(device) - started)
        self.faults.append(page_faults() - faults)


def now(device: torch.device) -> float:
    """Seconds: of the wall clock when a GPU has finished its work, of this process's CPU time on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def page_faults() -> int:
    """How often the system had to give this process a page of memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def peak_memory(device: torch.device) -> int:
    """Bytes, at their highest: what torch allocated on a GPU, the resident set on a CPU."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM:")


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def quiet() -> Console:
    return Console(quiet=True)


def time_both(model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a step, ours and timm's in turns."""
    steps = arguments.warmup + arguments.steps + 1  # the loop does not ask again after the last
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(model, arguments, f"{folder}/run")
        task = Timed(config, steps, between=None)
        loops: dict[str, Timed | TimmsLoop] = {"zoo": task}
        loops["timm"] = TimmsLoop(config, task, steps, arguments.channels_last)
        if arguments.channels_last:
            loops["timm_default_layout"] = TimmsLoop(config, task, steps, False)
        timms = [loop for loop in loops.values() if isinstance(loop, TimmsLoop)]

        def between(task: Timed, batch: Batch) -> None:
            for loop in timms:
                loop.step(task, batch)

        task.between = between
        fit(task, config, task.accelerator, quiet())
    found: dict[str, Any] = {"steps": arguments.steps}
    middle = {}
    for side, loop in loops.items():
        seconds = loop.seconds[arguments.warmup :][: arguments.steps]
        middle[side] = statistics.median(seconds)
        found |= {
            f"{side}_ms": round(1000 * middle[side], 2),
            f"{side}_ms_fastest": round(1000 * min(seconds), 2),
            f"{side}_page_faults": int(statistics.median(loop.faults[arguments.warmup :][: arguments.steps])),
        }
        if side != "zoo":
            found[f"{side}_over_zoo"] = round(middle[side] / middle["zoo"], 3)
    return found


def measure_memory(side: str, model: str, arguments: argparse.Namespace) -> int:
    """Bytes that a few steps of one side need at their peak, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(model, arguments, f"{folder}/run")
        before = resident("VmRSS:")
        task = Timed(config, MEMORY_STEPS, between=None)
        device = task.accelerator.device
        if side == "zoo":
            fit(task, config, task.accelerator, quiet())
            peak = task.peak
        else:
            timms = TimmsLoop(config, task, MEMORY_STEPS, arguments.channels_last)
            del task.model, task.learner
            for batch in itertools.islice(ImageClassification.batches(task, 0, 0), MEMORY_STEPS):
                timms.step(task, batch)
            peak = peak_memory(device)
    return peak if device.type == "cuda" else peak - before


def memory_in_a_child(side: str, model: str) -> float:
    """MiB. The child gets this process's own flags."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", side, model]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ZooError(f"Measuring the memory of {side}'s {model} failed: {done.stderr.strip().splitlines()[-1]}")
    return round(int(done.stdout.split()[-1]) / 2**20, 1)


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--batch-size", type=int, default=128 if gpu else 4)
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=50 if gpu else 7)
    parser.add_argument("--warmup", type=int, default=10 if gpu else 2, help="steps before the clock counts")
    parser.add_argument("--amp", choices=("no", "bf16"), default="bf16" if gpu else "no")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=gpu)
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--results", type=Path, default=FILE)
    parser.add_argument("--memory-of", nargs=2, metavar=("SIDE", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        side, model = arguments.memory_of
        print(measure_memory(side, model, arguments))
        return

    on_gpu = gpu and arguments.device == "auto"
    device = device_and_threads(torch.device("cuda" if on_gpu else "cpu"))
    settings = {key: getattr(arguments, key) for key in ("batch_size", "input_size", "amp", "compile", "channels_last")}
    key = "gpu" if on_gpu else "cpu"
    report = json.loads(arguments.results.read_text()) if arguments.results.is_file() else {}
    report[key] = {
        "command": command(),
        "device": device,
        "versions": versions("torch", "timm"),
        "settings": settings,
        "models": {},
    }
    for model in arguments.models:
        found = time_both(model, arguments)
        found |= {f"{side}_peak_mib": memory_in_a_child(side, model) for side in ("zoo", "timm")}
        report[key]["models"][model] = found
        print(
            f"{model:<16} zoo {found['zoo_ms']:.1f} ms, {found['zoo_peak_mib']:.0f} MiB   "
            f"timm {found['timm_ms']:.1f} ms, {found['timm_peak_mib']:.0f} MiB   "
            f"timm/zoo {found['timm_over_zoo']:.2f}"
            + (
                f", in its default layout {found['timm_default_layout_over_zoo']:.2f}"
                if arguments.channels_last
                else ""
            ),
            flush=True,
        )
        write_json(report, arguments.results)
    print(f"Written to {arguments.results}")


if __name__ == "__main__":
    sys.exit(run_command(main))
