"""The one training loop. What is particular about images or text is a `Task`'s; this file knows neither.

A run's folder holds `config.yaml`, `environment.json` (a row for each start: command, versions, devices), `history.csv`
(a row for each epoch; `lr` is the rate that it ended with), `curves.png`, and the checkpoints `last` and `best`, which
hold the masks of a sparse run (`masks.safetensors`) beside weights that are zero where these say so. `best` is of the
epoch with the best value of the task's metric among those at the lowest density (`zoo.history`): while a density
falls, each epoch takes the place of denser ones. `shrunk`, where channels died out, is the model of `last` without
them, with what was measured of it (`figures.json`). A run that is stopped by Ctrl-C or SIGTERM saves itself, and
`resume` goes on as if it had not been stopped: on the CPU bit for bit, on the same number of processes.

Several processes (`torchrun --nproc_per_node 8 train.py --config ...`, `accelerate launch --multi_gpu train.py ...`)
learn the same as one with the same images to an update: data order and augmentation depend on (seed, epoch, image), an
update takes `data.batch_size` x processes x `train.grad_accum_steps` successive images of that order, and gradients are
averaged over them. Only what belongs to a batch, not an image, differs: what is drawn for it (mixup, MixToken, drop
path, dropout, SN-Net's path), and batch norms' moments, which are those of each process's batch; and of pixels those of
a batch are averaged before batches that are accumulated are, and hard ones are mined in each batch. On several
machines, run the same command on each, with a folder for the run that all of them share:

    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py --config ...

On CPUs (`train.device cpu`) start them in the same way; `accelerate launch --cpu` would ask for mpirun. A process that
dies ends the run; `--resume auto` goes on from the last checkpoint, with as many processes or others.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import importlib.util
import io
import itertools
import json
import math
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import timm.optim
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration, set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.optim import create_optimizer_v2
from timm.scheduler import MultiStepLRScheduler, create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from zoo.config import to_plain, to_yaml
from zoo.data.workers import dead_workers_told
from zoo.devices import device_name
from zoo.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MissingDependencyError,
    ZooError,
    did_you_mean,
    first_line,
)
from zoo.files import make_folder, whole_file
from zoo.history import FIGURES, SHRUNK, is_better
from zoo.layers.products import FastProducts
from zoo.layers.wrappers import to_channels_last
from zoo.registry import list_models
from zoo.sparsity import apply_masks, load_masks, save_masks
from zoo.training.checkpoint import (
    STATE,
    clean,
    find_checkpoint,
    read_state,
    recover,
    rng_state,
    set_rng_state,
    write_checkpoint,
)
from zoo.training.config import OptimizerConfig, OutputConfig, SchedulerConfig, SparsityConfig, TrainConfig
from zoo.training.environment import record_environment
from zoo.training.parallel import TIMEOUT, Peers, gather, is_broken_connection, shard, shard_optimizer_state, whole
from zoo.training.plots import is_percentage, metric_title, plot_curves
from zoo.training.sparse import MASKS, SparseTraining, snip_scores

__all__ = ["Interrupted", "Run", "RunConfig", "Task", "TrainingError", "fit", "make_accelerator"]

READ_LOSS_EVERY = 20  # updates; reading it waits for the accelerator
FUSED = ("adam", "adamw")  # torch's own, which can update all weights in one pass over memory
DRAW_EVERY = 10.0  # seconds; drawing takes longer than a small epoch
TRACKERS = {"tensorboard": '"backbone-zoo[train]"', "wandb": "wandb", "trackio": "trackio"}  # what pip installs


class TrainingError(ZooError, RuntimeError):
    """Training that cannot go on."""


class Interrupted(ZooError):
    """A run that was asked to stop, and has saved itself. `exit_status` is the shell's for the signal."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class HasBatchSize(Protocol):
    @property
    def batch_size(self) -> int:
        """Samples in a batch of one process."""


class RunConfig(Protocol):
    """What the loop reads of a run's configuration, whatever the task adds to it."""

    @property
    def data(self) -> HasBatchSize: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def scheduler(self) -> SchedulerConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def sparsity(self) -> SparsityConfig: ...
    @property
    def output(self) -> OutputConfig: ...
    @property
    def resume(self) -> str | None: ...


class Task(Protocol):
    """What is learned, from which data, and how well: everything that the loop does not know.

    `model` is averaged, evaluated and saved. `learner` is what is optimised, and prepared for several processes:
    `model` itself, or a module that holds it beside what training alone needs, such as projections onto a teacher's
    features.
    `metric` names the entry of `evaluate`'s answer that decides which checkpoint is best: the highest, or the lowest,
    of the epochs at the lowest density.
    """

    model: nn.Module
    learner: nn.Module
    metric: str
    lower_is_better: bool
    batches_per_epoch: int

    def batches(self, epoch: int, start: int) -> Iterator[Any]:
        """This process's batches of an epoch, from the `start`-th on; the same whenever they are asked for.

        The processes' `i`-th batches together are the `i`-th batch of one process that takes as many samples.
        """

    def begin_update(self, batches: list[Any]) -> None:
        """These are this process's batches of an update: of each `loss` is asked for, and their mean is learned."""

    def loss(self, model: nn.Module, batch: Any, epoch: int) -> Tensor:
        """The mean loss over `batch`, a scalar on the accelerator. `model` is `learner`, prepared."""

    def plain_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The same of `model` or a copy of it, without what is drawn at random or learned from others."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """`loss`, `metric` and what else is worth a column, over the whole evaluation data, each sample once.

        Every process gets the same numbers. `model` is `model` or its average, whole, on the accelerator.
        """

    def save(self, folder: Path) -> object:
        """Make `folder` with the task's model in the Hub's layout."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the task beside the model: numbers, text, lists, dicts."""

    def load_state_dict(self, state: dict[str, Any], in_epoch: bool) -> None:
        """Take it back, before the first batch; empty when the checkpoint has none.

        `in_epoch` says that the run stopped within an epoch. Raises ConfigError where its place cannot be found again.
        """

    def describe_speed(self, batches_per_second: float) -> str:
        """What the device does with so many of each process's batches a second, for the progress bar."""

    def describe_data_problems(self) -> str:
        """What was wrong with the data, for the end of a run; empty when nothing was. All processes ask together."""

    def explain(self, error: Exception) -> ZooError | None:
        """What a user can do about an error of the model's; None where it is a bug."""


@dataclasses.dataclass
class RunState:
    """How far a run is. `loss_sum` (over batches and processes) and `seconds` are of the current epoch."""

    epoch: int = 0
    batch: int = 0  # of the current epoch: batches that are done
    updates: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    best: float = -math.inf
    best_epoch: int = 0
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run: its folder, a row for each epoch, and the best value of the task's metric."""

    folder: Path
    history: list[dict[str, Any]]
    metric: str
    best: float
    best_epoch: int
    seconds: float

    @property
    def best_checkpoint(self) -> Path:
        return self.folder / "best"


def make_accelerator(train: TrainConfig, output: OutputConfig) -> Accelerator:
    """The devices, processes and precision of a run, its seeds set. Raises ConfigError for what cannot be."""
    if output.tracker and importlib.util.find_spec(output.tracker) is None:
        raise MissingDependencyError(
            f"output.tracker needs {output.tracker}: pip install {TRACKERS[output.tracker]}, or set output.tracker to "
            "null."
        )
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "").lower() == "true":
            raise ConfigError(f"accelerate is set to use {name}: leave that out there, and set train.parallel to fsdp.")
    if train.parallel == "fsdp" and train.amp == "fp16":
        raise ConfigError("train.parallel fsdp does not go with train.amp fp16: take bf16, which scales no losses.")
    _forget_accelerator()
    try:
        accelerator = Accelerator(
            mixed_precision=train.amp,
            cpu=train.device == "cpu" or not torch.accelerator.is_available(),  # else its processes would not meet
            log_with=output.tracker,
            project_config=ProjectConfiguration(project_dir=output.dir),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
        )
    except (ValueError, ImportError) as error:
        raise ConfigError(f"train.amp is {train.amp!r}, which this device cannot do: {error}") from None
    except RuntimeError as error:
        if is_broken_connection(error):
            raise TrainingError(f"The processes of the run did not find each other: {first_line(error)}") from None
        raise
    if train.amp == "fp16" and accelerator.device.type == "cpu":  # accelerate would train in float32 instead
        raise ConfigError("train.amp fp16 scales losses, which is for GPUs: on a CPU take bf16 or no.")
    accelerator.gradient_accumulation_steps = 1  # the loop divides; accelerate's own may be set from outside
    set_seed(train.seed, device_specific=True)
    return accelerator


def _forget_accelerator() -> None:
    """accelerate keeps the first run's precision for the life of the process; a second run may want another."""
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    GradientState._reset_state()


def prepare_folder(config: RunConfig) -> Path:
    """The run's folder, made if need be. Raises ConfigError when it holds a run that is not, or cannot be, resumed."""
    folder = make_folder(config.output.dir)
    recover(folder / "last")
    recover(folder / "best")
    clean(folder)
    goes_on = config.resume is not None and (
        config.resume == "auto"
        or Path(config.resume).expanduser().resolve() in (folder.resolve(), *_checkpoints(folder))
    )
    holds_run = any(path.exists() for path in (*_checkpoints(folder), folder / "history.csv"))
    if not goes_on and holds_run:
        raise ConfigError(
            f"{str(folder)!r} holds a run already. Go on with it (--resume auto), or choose another --output.dir."
        )
    if config.resume == "auto" and holds_run and find_checkpoint("auto", folder) is None:
        raise ConfigError(
            f"{str(folder)!r} holds a run already, which cannot be resumed: {folder / 'last'} has no {STATE}. Choose "
            "another --output.dir, or go on from a checkpoint that has one (--resume PATH)."
        )
    return folder


def _checkpoints(folder: Path) -> tuple[Path, Path]:
    return folder.resolve() / "last", folder.resolve() / "best"


def fit(task: Task, config: RunConfig, accelerator: Accelerator, console: Console | None = None) -> Run:
    """Train `task.learner`, evaluate `task.model` after each epoch, and keep its last and its best checkpoint.

    A sparse run also leaves what `zoo.sparsity.report` says of its model: `sparsity.json`, and a picture of the masks.
    Raises TrainingError when the loss is no longer finite, memory does not suffice or another process is gone,
    Interrupted when stopped by a signal (after saving), ConfigError, CheckpointError and DataError for what they say.
    The last good checkpoint stays, whatever happens.
    """
    console = console or Console(stderr=True)
    try:
        with dead_workers_told():
            run = _Loop(task, config, accelerator, console).run()
    except Exception as error:
        explanation = None if isinstance(error, ZooError) else explain(error) or task.explain(error)
        if explanation is None:
            raise
        raise explanation from error
    if config.sparsity.method is not None and accelerator.is_main_process:
        _report_sparsity(run.folder, console)
    return run


def _report_sparsity(folder: Path, console: Console) -> None:
    from zoo.loading import load_model
    from zoo.sparsity import report

    last = folder / "last"
    if not (last / MASKS).is_file():
        return  # a run that was over before it could become sparse
    found = report(load_model(str(last)), masks=load_masks(last / MASKS))
    with whole_file(folder / "sparsity.json") as file:
        file.write(found.to_json().encode())
    found.plot(folder / "masks.png")
    console.print(found.summary(), highlight=False, soft_wrap=True, markup=False)


class _Loop:
    def __init__(self, task: Task, config: RunConfig, accelerator: Accelerator, console: Console) -> None:
        self.task, self.accelerator, self.console = task, accelerator, console
        # as it is written down: a run means the same when a method's values are others one day
        self.config: RunConfig = dataclasses.replace(cast(Any, config), sparsity=config.sparsity.resolved())
        train, device, processes = config.train, accelerator.device, accelerator.num_processes
        self.folder = prepare_folder(config)
        self.peers = Peers(processes)
        self.progress = RunState()
        self.signal: signal.Signals | None = None
        self.evaluating = False
        self.drawn = time.monotonic()
        self.batches_timed, self.timed_from = 0, time.perf_counter()  # of this epoch's speed
        self.begun_in = self.folder
        self.accumulation = accumulation_steps(config, processes)
        self.updates_per_epoch = task.batches_per_epoch // self.accumulation
        if self.updates_per_epoch == 0:
            raise ConfigError(
                f"The training data holds {task.batches_per_epoch} batches for each process, and one update takes "
                f"{self.accumulation}: accumulate less, or lower data.batch_size."
            )

        model, learner = task.model, task.learner
        learner.to(device)
        if train.channels_last:
            to_channels_last(learner)
        if train.grad_checkpointing:
            try:
                model.set_grad_checkpointing(True)  # type: ignore[operator]
            except (AttributeError, AssertionError):  # timm's say so by the latter
                raise ConfigError(f"train.grad_checkpointing: {type(model).__name__} cannot do that.") from None

        saved = self._find_checkpoint()
        if saved is not None:
            self._load_averaged(saved[0])
        else:
            self.peers.copy_from_first([*learner.parameters(), *learner.buffers()])
        self.sharded = train.parallel == "fsdp" and processes > 1
        self.ema = (
            ModelEmaV3(
                model,
                decay=train.model_ema_decay,
                use_warmup=train.model_ema_warmup,
                foreach=not self.sharded,  # it takes no shards beside whole buffers, such as batch norms'
            )
            if train.model_ema
            else None
        )
        if saved is not None:
            self._load_learner(*saved)

        selective = any(getattr(module, "selective", False) for module in learner.modules())
        if selective:  # else DDP waits for the gradients of weights that took no part
            accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        if self.sharded:
            if selective:  # a process would gather weights that the others do not ask for
                raise ConfigError(
                    f"train.parallel fsdp does not go with {type(model).__name__}, of which each process computes a "
                    "part of its own: take ddp."
                )
            if config.optimizer.clip_mode == "agc" and config.optimizer.clip_grad is not None:
                raise ConfigError("optimizer.clip_mode agc does not go with train.parallel fsdp: take norm or value.")
            self.whole_model = copy.deepcopy(model).cpu()
            for module in (learner, *([self.ema.module] if self.ema else [])):
                shard(module, device)
        # a loss scaler must see whether a step was left out, which a fused one keeps to itself
        optimizer = make_optimizer(learner, config.optimizer, fused=accelerator.scaler is None)
        self.scheduler, self.epochs = make_scheduler(optimizer, config.scheduler, self.updates_per_epoch)
        self.sparse = self._make_sparse(saved, optimizer)
        eager = device.type == "cpu" and not train.torchcompile
        self.products = FastProducts if eager else contextlib.nullcontext
        forward = torch.compile(learner) if train.torchcompile else learner
        self.learner: nn.Module = forward if self.sharded else accelerator.prepare_model(forward)  # type: ignore[assignment]
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        if saved is not None:
            self._resume(*saved)

    # ----------------------------------------------------------------------------------------------------------- epochs

    def run(self) -> Run:
        self._write_config()
        self._write_environment()
        if self.scheduler is not None:
            self.scheduler.step_update(self._scheduled())
        self._start_tracker()
        started = time.perf_counter()
        with self._stop_on_signals():
            while not self._is_done() or self.progress.batch:  # an epoch that is begun is also finished
                self._train_epoch()
                self._finish_epoch()
        self._write_history(draw=True)
        self._cut_channels()
        problems = self.task.describe_data_problems()
        self.accelerator.end_training()
        self.accelerator.unwrap_model(self.learner, keep_fp32_wrapper=False)
        if problems:
            self._say(problems)
        progress = self.progress
        if progress.best_epoch:
            best, last = self.folder / "best", self.folder / "last"
            density = (self._best_row() or {}).get("density")
            at = "" if density is None else f" at density {density:.1%}"
            found = f"Best {_metric_text(self.task.metric, progress.best)} in epoch {progress.best_epoch}{at}: {best}."
            self._say(found + (f" Last: {last}." if last.exists() else ""))
        return Run(
            folder=self.folder,
            history=progress.history,
            metric=self.task.metric,
            best=progress.best,
            best_epoch=progress.best_epoch,
            seconds=time.perf_counter() - started,
        )

    def _is_done(self) -> bool:
        return self.progress.epoch >= self.epochs or self._updates_left() == 0

    def _updates_left(self) -> int:
        """Of those that `train.max_updates` allows; of the current epoch where it allows all."""
        left = max(0, self.updates_per_epoch - self.progress.batch // self.accumulation)
        limit = self.config.train.max_updates
        return left if limit is None else min(left, max(0, limit - self.progress.updates))

    def _train_epoch(self) -> None:
        progress, left = self.progress, self._updates_left()
        if left == 0:
            return
        interval = self.config.train.save_interval_updates
        self.task.learner.train()
        started = time.perf_counter() - progress.seconds
        self.batches_timed = progress.batch
        self.timed_from = time.perf_counter()
        loss_sum = self._zero()
        batches = self.task.batches(progress.epoch, progress.batch)
        with self._bar() as advance:
            while left:
                group = list(itertools.islice(batches, self.accumulation))
                if len(group) < self.accumulation:
                    raise DataError(f"The training data ended {left} updates before the end of the epoch.")
                loss_sum += self._update(group)
                progress.batch += len(group)
                progress.updates += 1
                left -= 1
                stop = self.peers.any_lately(self.signal is not None)
                save = interval is not None and left > 0 and progress.updates % interval == 0
                if progress.updates % READ_LOSS_EVERY == 0 or stop or save:
                    loss_sum = self._read_loss(loss_sum)
                    advance(f"loss {self._mean_loss():.3f}  {self.task.describe_speed(self._speed())}")
                else:
                    advance(None)
                progress.seconds = time.perf_counter() - started
                if stop:
                    self._save_and_stop()
                if save:
                    self._save("last")
        self._read_loss(loss_sum)

    def _speed(self) -> float:
        """Batches a second of this process in this epoch, since it was begun or gone on with."""
        return (self.progress.batch - self.batches_timed) / (time.perf_counter() - self.timed_from)

    def _update(self, group: list[Any]) -> Tensor:
        """One optimizer step over the batches of `group`; the sum of their losses."""
        progress, total = self.progress, self._zero()
        self.task.begin_update(group)
        for i, batch in enumerate(group):
            with self._gradients_stay_here(unless=i == len(group) - 1), self.products():
                with self.accelerator.autocast():
                    loss = self.task.loss(self.learner, batch, progress.epoch)
                self.accelerator.backward(loss / len(group))
            total += loss.detach().to(total)
        if self.sparse is not None:
            self.sparse.step(self._scheduled() + 1, self._step)
        else:
            self._step()
        self.optimizer.zero_grad()
        if self.ema is not None and self.sparse is not None:
            self.sparse.average(self.ema, progress.updates + 1)
        elif self.ema is not None:
            self.ema.update(self.task.model, step=progress.updates + 1)
        if self.scheduler is not None:
            self.scheduler.step_update(self._scheduled() + 1)
        return total

    def _scheduled(self) -> int:
        """Updates of the schedule that are done: those made, unless others went on with a batch of another size."""
        return self.progress.epoch * self.updates_per_epoch + self.progress.batch // self.accumulation

    def _gradients_stay_here(self, unless: bool) -> contextlib.AbstractContextManager:
        """Only the last backward pass of an update exchanges gradients with the other processes."""
        if self.sharded:
            self.task.learner.set_requires_gradient_sync(unless)  # type: ignore[operator]
            return contextlib.nullcontext()
        return contextlib.nullcontext() if unless else self.accelerator.no_sync(self.learner)

    def _zero(self) -> Tensor:
        """To sum losses in: double precision, so that the sum does not depend on where a run was interrupted."""
        device = self.accelerator.device
        return torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)

    def _step(self) -> bool:
        """Clip and step. Whether there was a step: mixed precision leaves it out when gradients overflow."""
        self._clip()
        self.optimizer.step()
        return not self.optimizer.step_was_skipped

    def _clip(self) -> None:
        bound, mode = self.config.optimizer.clip_grad, self.config.optimizer.clip_mode
        if bound is None:
            return
        self.accelerator.unscale_gradients()
        parameters = list(self.task.learner.parameters())
        if self.sparse is not None:
            parameters += self.sparse.values.values()  # in the place of others, which have no gradients
        dispatch_clip_grad(parameters, bound, mode=mode)

    def _read_loss(self, loss_sum: Tensor) -> Tensor:
        """Add `loss_sum`, of all processes, to the epoch's, and return zero to go on with."""
        value = sum(self.peers.gather(float(loss_sum)))
        if not math.isfinite(value):
            raise self._diverged("loss is")
        self.progress.loss_sum += value
        return torch.zeros_like(loss_sum)

    def _diverged(self, what: str) -> TrainingError:
        last = self.folder / "last"
        return TrainingError(
            f"The {what} no longer finite (epoch {self.progress.epoch + 1}, update {self.progress.updates}). "
            "Lower optimizer.lr, lengthen the warm-up or set optimizer.clip_grad."
            + (f" The last good checkpoint is {last}." if last.exists() else "")
        )

    def _mean_loss(self) -> float:
        return self.progress.loss_sum / (self.progress.batch * self.accelerator.num_processes)

    def _finish_epoch(self) -> None:
        progress = self.progress
        speed = self.task.describe_speed(progress.batch / progress.seconds) if progress.seconds else ""
        row: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "updates": progress.updates,
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "train_loss": self._mean_loss(),
            **({"density": self.sparse.density} if self.sparse is not None else {}),
            "seconds": round(progress.seconds, 3),
        }
        limit = self.config.train.max_updates
        is_last = progress.epoch + 1 >= self.epochs or (limit is not None and progress.updates >= limit)
        is_best = False
        if is_last or (progress.epoch + 1) % self.config.train.eval_interval == 0:
            metrics = self._evaluate()
            row |= {f"val_{name}": value for name, value in metrics.items()}
            is_best = is_better(row, self._best_row(), f"val_{self.task.metric}", self.task.lower_is_better)
            if is_best:
                progress.best, progress.best_epoch = metrics[self.task.metric], progress.epoch + 1
        progress.history.append(row)
        progress.epoch += 1
        progress.batch, progress.loss_sum, progress.seconds = 0, 0.0, 0.0
        self._save("last", *(["best"] if is_best else []))
        self._write_history(draw=False)
        if self.config.output.tracker:
            self.accelerator.log({k: v for k, v in row.items() if k != "updates"}, step=progress.updates)
        self._say(_row_text(row, self.epochs, is_best, speed))

    def _best_row(self) -> dict[str, Any] | None:
        """The history's of the epoch that the best checkpoint is of."""
        return next((row for row in self.progress.history if row["epoch"] == self.progress.best_epoch), None)

    def _evaluate(self) -> dict[str, float]:
        """What the epoch learned is saved first: evaluation may take long, fail, or be ended by a signal at once."""
        self._save("last")
        self.evaluating = True  # before the question: from here on no signal goes unheard
        try:
            if self.peers.any(self.signal is not None):
                raise self._interrupted()
            model = self.task.model if self.ema is None else self.ema.module
            if self.sharded:
                gather(model, self.whole_model)
                model = self.whole_model.to(self.accelerator.device)
            self.peers.copy_from_first(list(model.buffers()))  # statistics of batch norms: what is saved is the first's
            return self.task.evaluate(model)
        finally:
            self.evaluating = False
            if self.sharded:
                self.whole_model.cpu()

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def _save(self, *names: str) -> None:
        """Write the named checkpoints. They hold the averaged weights where there are such."""
        task, main = self.task, self.accelerator.is_main_process
        norm = get_total_norm(task.learner.parameters())
        if not math.isfinite(float(norm.full_tensor() if isinstance(norm, DTensor) else norm)):
            raise self._diverged("weights are")
        model = task.model if self.ema is None else self.ema.module
        state = {
            "progress": dataclasses.asdict(self.progress),
            "processes": self.accelerator.num_processes,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
            "learner": _others(task.learner, model),
            "rng": self.peers.gather(rng_state()),
            "config": to_plain(self.config),
            "sparsity": self.sparse.state_dict() if self.sparse is not None else None,
            "task": task.state_dict(),
        }
        if self.sharded:
            gather(model, self.whole_model)
            model, state = self.whole_model, whole(state)

        def save_weights(folder: Path) -> None:
            trained, task.model = task.model, model
            try:
                task.save(folder)
            finally:
                task.model = trained
            if self.sparse is not None:
                save_masks(self.sparse.masks, folder / MASKS)

        if main:
            for name in names:
                write_checkpoint(self.folder / name, save_weights, state)
        self.peers.wait()

    def _cut_channels(self) -> None:
        """Beside the last checkpoint: its model without the channels that died out, and what that one achieves."""
        if self.sparse is None or not self.sparse.channels:
            return
        task, last = self.task, self.folder / "last"
        before = sum(parameter.numel() for parameter in task.model.parameters())
        trained, smaller = task.model, copy.deepcopy(task.model if self.ema is None else self.ema.module)
        channels = self.sparse.cut(smaller)
        if not channels:
            return
        after = sum(parameter.numel() for parameter in smaller.parameters())
        metrics, whole_row = task.evaluate(smaller), self.progress.history[-1]
        row = {"epoch": self.progress.epoch, **{f"val_{name}": value for name, value in metrics.items()}}

        def save(folder: Path) -> None:
            task.save(folder)
            (folder / FIGURES).write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")

        task.model = smaller
        try:
            if self.accelerator.is_main_process:
                write_checkpoint(self.folder / SHRUNK, save)
        finally:
            task.model = trained
        self._say(
            f"{channels:,} channels died out: {self.folder / SHRUNK} is {last} without them, {after:,} parameters of "
            f"{before:,}. {_metrics_text(row)}; with them {_metrics_text(whole_row)}."
        )

    def _find_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        checkpoint = None if self.config.resume is None else find_checkpoint(self.config.resume, self.folder)
        found = self.peers.gather((checkpoint is not None, socket.gethostname()))
        if len({here for here, _ in found}) > 1:
            hosts = sorted({host for here, host in found if not here})
            raise CheckpointError(
                f"{', '.join(hosts)} cannot see the checkpoint to resume: all machines must share the run's folder."
            )
        if checkpoint is None:
            return None
        state = read_state(checkpoint)
        missing = {"progress", "processes", "optimizer", "scaler", "learner", "rng", "config"} - state.keys()
        if missing:
            raise CheckpointError(f"{checkpoint / STATE} is of another version: it lacks {', '.join(sorted(missing))}.")
        return checkpoint, state

    def _load_averaged(self, checkpoint: Path) -> None:
        from zoo.weights import load_checkpoint, read_json

        advice = "Begin a run in another output.dir, which may start from these weights (model.checkpoint_path)."
        config = checkpoint / "config.json"
        saved = read_json(config).get("label_names") if config.is_file() else None
        now = (getattr(self.task.model, "pretrained_cfg", None) or {}).get("label_names")
        if saved is not None and now is not None and list(saved) != list(now):
            others = [name for name in (*saved, *now) if (name in saved) != (name in now)] or saved
            raise CheckpointError(
                f"{checkpoint} learned {len(saved)} classes, and the data have {len(now)}, not the same in the same "
                f"order: {', '.join(map(str, others[:5]))}{', ...' * (len(others) > 5)}. {advice}"
            )
        report = load_checkpoint(self.task.model, checkpoint)
        if report.dropped or report.adapted or report.fresh:
            raise CheckpointError(f"{checkpoint} is of another model: {'. '.join(report.notes)}. {advice}")

    def _load_learner(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """What is learned, where that is not what is saved as the model, which is loaded already."""
        try:
            unexpected = self.task.learner.load_state_dict(state["learner"], strict=False).unexpected_keys
        except RuntimeError as error:
            raise CheckpointError(f"{checkpoint} does not fit this configuration: {error}") from None
        if unexpected:
            raise CheckpointError(f"{checkpoint} does not fit this configuration: it also holds {unexpected[0]}.")

    def _make_sparse(
        self, saved: tuple[Path, dict[str, Any]] | None, optimizer: torch.optim.Optimizer
    ) -> SparseTraining | None:
        """The masks of a run that has such: a checkpoint's, or new ones where it has none."""
        config = self.config
        rule = config.sparsity.rule()
        held = None if saved is None else saved[1].get("sparsity")
        if rule is None:
            if saved is not None and held is not None:
                checkpoint, before = saved[0], saved[1]["config"]["sparsity"]["method"]
                raise CheckpointError(
                    f"{checkpoint} was trained with sparsity.method {before}, and none is set now: give the same "
                    f"--sparsity.* again (--config {checkpoint.parent / 'config.yaml'} has them); or, to train all "
                    "weights, begin a run in another output.dir, which may start from these (model.checkpoint_path)."
                )
            return None
        self._check_sparse()
        sparse = SparseTraining(
            self.task.model,
            rule,
            updates=self.epochs * self.updates_per_epoch,
            updates_per_epoch=self.updates_per_epoch,
            seed=config.train.seed,
            agree=self.peers.copy_from_first,
        )
        if saved is not None and held is not None:
            sparse.load_state_dict(held, load_masks(saved[0] / MASKS))
        else:
            sparse.start(self._saliency)
            if self.ema is not None:  # of weights that may be at zero now
                apply_masks(self.ema.module, sparse.masks)
        sparse.attach(optimizer)
        self._say(sparse.describe())
        limit = config.train.max_updates
        if limit is None:
            return sparse
        aims = []  # that a run which is cut off misses
        if sparse.falls and limit < sparse.end:
            reached, aim = sparse.density_at(limit), sparse.density_at(sparse.end)
            aims.append(f"The run will end at density {reached:.2%}, not {aim:.2%}: the density falls")
        if sparse.channels and limit < sparse.end:
            aims.append(f"Fewer than {rule.dead_channels:.1%} of the channels will have died out: they do")
        for text in aims:
            self._say(
                f"{text} up to update {sparse.end}, and train.max_updates stops the run after {limit}. Raise it, or "
                "lower scheduler.epochs, whose updates sparsity.stop is a share of."
            )
        if not aims and sparse.moves and not any(map(sparse.is_due, range(1, limit + 1))):
            self._say(f"Masks do not move up to train.max_updates ({limit}): see sparsity.update_interval.")
        return sparse

    def _check_sparse(self) -> None:
        config = self.config
        if config.train.parallel == "fsdp":
            raise ConfigError(
                "sparsity does not go with train.parallel fsdp, where no process holds a whole mask: take ddp."
            )
        architecture = (getattr(self.task.model, "pretrained_cfg", None) or {}).get("architecture")
        if config.sparsity.dead_channels and architecture is not None and architecture not in list_models():
            raise ConfigError(
                f"sparsity.dead_channels cuts channels off, and a timm/{architecture} without some cannot be opened "
                "again: set it to 0, or train a model of the zoo's."
            )
        agc = config.optimizer.clip_mode == "agc" and config.optimizer.clip_grad is not None
        if agc and config.sparsity.optimizer_state == "compact":
            raise ConfigError("sparsity.optimizer_state compact does not go with optimizer.clip_mode agc: take norm.")

    def _saliency(self, names: list[str]) -> dict[str, Tensor]:
        """How much the loss over the first update's batches, of all processes, depends on each weight."""
        task = self.task
        batches = list(itertools.islice(task.batches(0, 0), self.accumulation))
        losses = [partial(task.plain_loss, batch=batch) for batch in batches]
        return snip_scores(task.model, names, losses, lambda gradient: self.accelerator.reduce(gradient, "mean"))

    def _resume(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """All but the weights."""
        changed = _changes(state["config"], to_plain(self.config))
        if changed:
            self._say(f"Going on with another configuration than the run began with: {', '.join(changed)}.")
        try:
            load_optimizer(self.optimizer.optimizer, state["optimizer"])
        except (ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(f"{checkpoint} does not fit this configuration: {error}") from None
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = RunState(**state["progress"])
        self.task.load_state_dict(state.get("task", {}), self.progress.batch > 0)
        before, processes = state["processes"], self.accelerator.num_processes
        if before == processes:
            set_rng_state(state["rng"][self.accelerator.process_index])
        else:
            many = f"{before} process{'es' * (before > 1)}"
            self._say(f"The run went on with {many}, and goes on with {processes}: random numbers differ.")
            set_seed(self.config.train.seed + self.progress.updates, device_specific=True)
        self._place(before * state["config"]["data"]["batch_size"], before)
        progress = self.progress
        self.begun_in = checkpoint.parent
        self._bring_best(checkpoint)
        self._write_history(draw=False)
        where = f"epoch {progress.epoch + 1}" + (f", batch {progress.batch + 1}" if progress.batch else "")
        if progress.epoch >= self.epochs:
            self._say(
                f"{checkpoint} has {progress.epoch} epochs behind it, of {self.epochs}: raise scheduler.epochs "
                "to go on."
            )
        else:
            self._say(f"Resumed {checkpoint} at {where} of {self.epochs} epochs.")

    def _place(self, together_before: int, processes_before: int) -> None:
        """Find the place in the epoch again where batches are of another size, or shared by other processes."""
        progress, processes = self.progress, self.accelerator.num_processes
        together = self.config.data.batch_size * processes
        batch = progress.batch * together_before // together
        batch -= batch % self.accumulation
        mean = progress.loss_sum / (progress.batch * processes_before) if progress.batch else 0.0
        if (batch, processes) != (progress.batch, processes_before):
            progress.batch, progress.loss_sum = batch, mean * batch * processes

    def _bring_best(self, checkpoint: Path) -> None:
        """A run that goes on in another folder takes its best checkpoint along: nothing later need be better."""
        best = checkpoint.parent / "best"
        elsewhere = checkpoint.resolve() not in _checkpoints(self.folder)
        if elsewhere and (best / STATE).is_file() and self.accelerator.is_main_process:
            state = read_state(best)
            write_checkpoint(self.folder / "best", lambda fresh: shutil.copytree(best, fresh), state)

    # ---------------------------------------------------------------------------------------------------------- signals

    def _save_and_stop(self) -> None:
        self._save("last")
        raise self._interrupted()

    def _interrupted(self) -> Interrupted:
        for tracker in self.accelerator.trackers:
            tracker.finish()
        by = self.signal or signal.SIGTERM
        return Interrupted(
            f"Stopped by {by.name} and saved in {self.folder / 'last'}. Go on with --resume auto.", 128 + by.value
        )

    @contextlib.contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM asks the loop to stop after its update; a second acts at once.

        In an evaluation the first acts at once, too: the epoch is saved, and nobody waits for this process.
        """
        before: dict[int, Any] = {}
        own = os.getpid()

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def ask(number: int, frame: object) -> None:
            if os.getpid() != own:  # a worker that was forked just now
                return
            self.signal = signal.Signals(number)
            restore()
            if self.evaluating:
                raise self._interrupted()

        with contextlib.suppress(ValueError):  # signals belong to the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, ask)
        try:
            yield
        finally:
            restore()

    # ----------------------------------------------------------------------------------------------------------- output

    def _start_tracker(self) -> None:
        """Each has its own words for the run's name and folder."""
        tracker, name = self.config.output.tracker, self.folder.resolve().name
        if tracker:
            own = {"wandb": {"name": name, "dir": str(self.folder)}, "trackio": {"name": name}}
            project = "tensorboard" if tracker == "tensorboard" else "backbone-zoo"
            init = {tracker: own[tracker]} if tracker in own else {}
            self.accelerator.init_trackers(project, config=_flat(to_plain(self.config)), init_kwargs=init)

    def _write_config(self) -> None:
        if self.accelerator.is_main_process:
            with whole_file(self.folder / "config.yaml") as file:
                file.write(to_yaml(self.config).encode())

    def _write_environment(self) -> None:
        devices = self.peers.gather(device_name(self.accelerator.device))
        if self.accelerator.is_main_process:
            record_environment(self.folder, self.begun_in, devices, self.progress.updates)

    def _write_history(self, draw: bool) -> None:
        """Written anew each time: a row more, or none, but never half a row. The curves may wait for some seconds."""
        rows = self.progress.history
        if not rows or not self.accelerator.is_main_process:
            return
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        with whole_file(self.folder / "history.csv") as file:
            file.write(text.getvalue().encode())
        if draw or time.monotonic() - self.drawn > DRAW_EVERY:
            plot_curves(
                {self.folder.name: rows},
                self.task.metric,
                self.folder.name,
                self.folder / "curves.png",
                lower_is_better=self.task.lower_is_better,
            )
            self.drawn = time.monotonic()

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    @contextlib.contextmanager
    def _bar(self) -> Iterator[Any]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        shown = self.accelerator.is_main_process and self.console.is_terminal
        with Progress(
            *columns, TextColumn("{task.fields[loss]}"), console=self.console, transient=True, disable=not shown
        ) as bar:
            steps = self.updates_per_epoch * self.accumulation
            title = f"epoch {self.progress.epoch + 1}/{self.epochs}"
            row = bar.add_task(title, total=steps, completed=self.progress.batch, loss="")

            def advance(loss: str | None) -> None:
                fields: dict[str, Any] = {} if loss is None else {"loss": loss}
                bar.update(row, completed=self.progress.batch, **fields)

            yield advance


def make_optimizer(model: nn.Module, config: OptimizerConfig, *, fused: bool = False) -> torch.optim.Optimizer:
    """timm's optimizer of that name over the model's parameters. Raises ConfigError for one that there is not.

    `fused` asks for the form that reads and writes each weight once, where the optimizer has one.
    """
    names = timm.optim.list_optimizers()
    if config.opt.lower().removeprefix("lookahead_") not in names:
        raise ConfigError(
            f"optimizer.opt is {config.opt!r}, which timm does not have.{did_you_mean(config.opt, names)}"
        )
    if config.layer_decay is not None and not hasattr(model, "group_matcher"):
        raise ConfigError(
            f"optimizer.layer_decay needs to know the layers of {type(model).__name__}, which has no group_matcher."
        )
    given: dict[str, Any] = {name: value for name in ("betas", "eps") if (value := getattr(config, name)) is not None}
    if fused and config.opt.lower() in FUSED:
        given["fused"] = True
    try:
        return create_optimizer_v2(
            model,
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            layer_decay=config.layer_decay,
            **{**given, **config.args},
        )
    except (TypeError, ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"The optimizer {config.opt!r} cannot be made: {error}") from None


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: SchedulerConfig, updates_per_epoch: int
) -> tuple[Scheduler | None, int]:
    """timm's schedule, stepped by updates, and the number of epochs with cooldown."""
    try:
        scheduler, epochs = create_scheduler_v2(
            optimizer,
            sched=config.sched,
            num_epochs=config.epochs - (config.warmup_epochs if config.warmup_prefix else 0),
            warmup_prefix=config.warmup_prefix,
            decay_epochs=config.decay_epochs,
            decay_milestones=list(config.decay_milestones),
            decay_rate=config.decay_rate,
            cooldown_epochs=config.cooldown_epochs,
            min_lr=config.min_lr,
            warmup_lr=config.warmup_lr,
            warmup_epochs=config.warmup_epochs,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"The schedule {config.sched!r} cannot be made: {error}") from None
    if isinstance(scheduler, MultiStepLRScheduler):  # of updates it would lower the rate one too early
        scheduler.decay_t = [update + 1 for update in scheduler.decay_t]
    if scheduler is None:  # a schedule scales the rates of layers; without one they are scaled here
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
    return scheduler, round(epochs)  # "wsd" gives a float


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore what the optimizer remembers; its options stay those of the configuration, which may have changed."""
    kept = {"lr", "initial_lr", "lr_scale", "weight_decay", "betas", "eps", "momentum"}
    options = [{key: group[key] for key in kept if key in group} for group in optimizer.param_groups]
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=False):
        # some of timm's, as LAMB, count their steps here from the first on
        if (group.keys() ^ saved.keys()) - kept - {"step"}:
            raise ValueError("it was trained with another optimizer.")
    before = sum(len(group["params"]) for group in state["param_groups"])
    after = sum(len(group["params"]) for group in optimizer.param_groups)
    if before != after:
        raise ValueError(f"it trained {before} tensors, this one trains {after}: is model.freeze another?")
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    for number, shape in zip(numbers, shapes, strict=True):
        remembered = state["state"].get(number, {})
        for averages in (remembered[key] for key in ("exp_avg", "momentum_buffer", "square_avg") if key in remembered):
            if averages is not None and averages.shape != shape:  # which no optimizer looks at, but writes over
                raise ValueError(f"it trained a tensor {tuple(averages.shape)}, which is {tuple(shape)} now.")
    optimizer.load_state_dict(shard_optimizer_state(optimizer, state))
    for group, now in zip(optimizer.param_groups, options, strict=True):
        group.update(now)


def _others(learner: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `learner` that are not `model`'s, which are saved apart."""
    saved = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    tensors = learner.state_dict(keep_vars=True)
    return {name: tensor.detach() for name, tensor in tensors.items() if id(tensor) not in saved}


def accumulation_steps(config: RunConfig, processes: int) -> int:
    """Batches of each process to an update. Raises ConfigError when they cannot add up to `train.global_batch_size`."""
    train, together = config.train, config.data.batch_size * processes
    if train.global_batch_size is None:
        return train.grad_accum_steps
    if train.global_batch_size % together:
        raise ConfigError(
            f"train.global_batch_size ({train.global_batch_size}) is no multiple of data.batch_size "
            f"({config.data.batch_size}) x {processes} process{'es' * (processes > 1)}."
        )
    return train.global_batch_size // together


def explain(error: BaseException) -> ZooError | None:
    """What a user can do about an error of torch's; None for one that is a bug."""
    line = first_line(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in line:
        return TrainingError(
            "There is not enough memory: lower data.batch_size (and set train.global_batch_size to what it was, which "
            f"accumulates gradients), or set train.grad_checkpointing. {line}"
        )
    if is_broken_connection(error):
        return TrainingError(f"Another process of the run is gone, or out of reach. {line}")
    return None


def _changes(saved: Any, current: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, but for those that say where and how long to run."""
    if not isinstance(saved, dict) or not isinstance(current, dict):
        return [prefix.rstrip(".")] if saved != current else []
    keys = [key for key in {**saved, **current} if not (prefix == "" and key in ("resume", "output"))]
    return [change for key in keys for change in _changes(saved.get(key), current.get(key), f"{prefix}{key}.")]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys with values that TensorBoard's table of hyper-parameters takes."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat


def _row_text(row: dict[str, Any], epochs: int, is_best: bool, speed: str) -> str:
    parts = [f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}", f"train loss {row['train_loss']:.4f}"]
    parts += [_metrics_text(row)] if any(key.startswith("val_") for key in row) else []
    if "density" in row:
        parts.append(f"density {row['density']:.1%}")
    parts.append(f"lr {row['lr']:.2e}")
    parts.append(f"{row['seconds']:.1f} s" + (f" ({speed})" if speed else ""))
    return "  ".join(parts) + ("  *" if is_best else "")


def _metrics_text(row: dict[str, Any]) -> str:
    """What was measured of the model, as far as a row of the history says."""
    return "  ".join(
        ("val " if key == "val_loss" else "") + _metric_text(key.removeprefix("val_"), value)
        for key, value in row.items()
        if key.startswith("val_")
    )


def _metric_text(name: str, value: float) -> str:
    return f"{metric_title(name)} {value:.2f}%" if is_percentage(name) else f"{metric_title(name)} {value:.4f}"
