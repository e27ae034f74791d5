"""The one training loop. What is particular about images or text is a `Task`'s; this file knows neither.

A run's folder holds `config.yaml`, `history.csv` (a row for each epoch), `curves.png`, and the checkpoints `last` and
`best`. A run that is stopped by Ctrl-C or SIGTERM saves itself, and `resume` goes on as if it had not been stopped.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import itertools
import math
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import timm.optim
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import ProjectConfiguration, gather_object, set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from zoo.config import to_plain, to_yaml
from zoo.errors import CheckpointError, ConfigError, MissingDependencyError, ZooError, did_you_mean
from zoo.evaluation.image_classification import make_folder
from zoo.files import whole_file
from zoo.training.checkpoint import (
    STATE,
    find_checkpoint,
    read_state,
    recover,
    rng_state,
    set_rng_state,
    write_checkpoint,
)
from zoo.training.config import OptimizerConfig, OutputConfig, SchedulerConfig, TrainConfig
from zoo.training.plots import plot_curves

__all__ = ["Interrupted", "Run", "RunConfig", "Task", "TrainingError", "fit", "make_accelerator"]

READ_LOSS_EVERY = 20  # updates; reading it waits for the accelerator


class TrainingError(ZooError, RuntimeError):
    """Training that cannot go on."""


class Interrupted(ZooError):
    """A run that was asked to stop, and has saved itself. `exit_status` is the shell's for the signal."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class RunConfig(Protocol):
    """What the loop reads of a run's configuration, whatever the task adds to it."""

    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def scheduler(self) -> SchedulerConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def output(self) -> OutputConfig: ...
    @property
    def resume(self) -> str | None: ...


class Task(Protocol):
    """What is learned, from which data, and how well: everything that the loop does not know.

    `metric` names the entry of `evaluate`'s answer, the higher the better, that decides which checkpoint is best.
    """

    model: nn.Module
    metric: str
    batches_per_epoch: int

    def batches(self, epoch: int, start: int) -> Iterator[Any]:
        """This process's batches of an epoch, from the `start`-th on; the same whenever they are asked for."""

    def loss(self, model: nn.Module, batch: Any, epoch: int) -> Tensor:
        """The mean loss over `batch`, a scalar on the accelerator."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """`loss`, `metric` and what else is worth a column, over the whole evaluation data."""

    def save(self, folder: Path) -> object:
        """Make `folder` with the task's model in the Hub's layout."""

    def describe_data_problems(self) -> str:
        """What was wrong with the data, for the end of a run; empty when nothing was."""


@dataclasses.dataclass
class RunState:
    """How far a run is. `loss_sum` and `seconds` are of the current epoch."""

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
    """The devices and the precision of a run, its seeds set. Raises ConfigError for what the machine cannot do."""
    if output.tracker == "tensorboard":
        try:
            import tensorboard  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError(
                'output.tracker needs tensorboard: pip install "backbone-zoo[train]", or set output.tracker to null.'
            ) from error
    _forget_accelerator()
    try:
        accelerator = Accelerator(
            mixed_precision=train.amp,
            cpu=train.device == "cpu",
            log_with=output.tracker,
            project_config=ProjectConfiguration(project_dir=output.dir),
        )
    except (ValueError, ImportError) as error:
        raise ConfigError(f"train.amp is {train.amp!r}, which this device cannot do: {error}") from None
    set_seed(train.seed, device_specific=True)
    return accelerator


def _forget_accelerator() -> None:
    """accelerate keeps the first run's precision for the life of the process; a second run may want another."""
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    GradientState._reset_state()


def prepare_folder(config: RunConfig) -> Path:
    """The run's folder, made if need be. Raises ConfigError when it holds a run that is not being resumed."""
    folder = make_folder(config.output.dir)
    recover(folder / "last")
    goes_on = config.resume is not None and (
        config.resume == "auto"
        or Path(config.resume).expanduser().resolve() in (folder.resolve(), *_checkpoints(folder))
    )
    if not goes_on and any(path.exists() for path in (*_checkpoints(folder), folder / "history.csv")):
        raise ConfigError(
            f"{str(folder)!r} holds a run already. Go on with it (--resume auto), or choose another --output.dir."
        )
    return folder


def _checkpoints(folder: Path) -> tuple[Path, Path]:
    return folder.resolve() / "last", folder.resolve() / "best"


def fit(task: Task, config: RunConfig, accelerator: Accelerator, console: Console | None = None) -> Run:
    """Train `task.model`, evaluate it after each epoch, and keep the last and the best checkpoint.

    Raises TrainingError when the loss is no longer finite, Interrupted when stopped by a signal (after saving),
    ConfigError, CheckpointError and DataError for what they say.
    """
    return _Loop(task, config, accelerator, console or Console(stderr=True)).run()


class _Loop:
    def __init__(self, task: Task, config: RunConfig, accelerator: Accelerator, console: Console) -> None:
        self.task, self.config, self.accelerator, self.console = task, config, accelerator, console
        self.folder = prepare_folder(config)
        self.progress = RunState()
        train = config.train
        self.updates_per_epoch = math.ceil(task.batches_per_epoch / train.grad_accum_steps)

        self.raw_model = task.model.to(accelerator.device)
        if train.channels_last:
            self.raw_model.to(memory_format=torch.channels_last)
        if train.grad_checkpointing:
            if not hasattr(self.raw_model, "set_grad_checkpointing"):
                raise ConfigError(f"train.grad_checkpointing: {type(self.raw_model).__name__} cannot do that.")
            self.raw_model.set_grad_checkpointing(True)  # type: ignore[operator]
        self.ema = (
            ModelEmaV3(self.raw_model, decay=train.model_ema_decay, use_warmup=train.model_ema_warmup)
            if train.model_ema
            else None
        )
        optimizer = make_optimizer(self.raw_model, config.optimizer)
        self.scheduler, self.epochs = make_scheduler(optimizer, config.scheduler, self.updates_per_epoch)
        forward = torch.compile(self.raw_model) if train.torchcompile else self.raw_model
        self.model, self.optimizer = accelerator.prepare(forward, optimizer)
        self.signal: signal.Signals | None = None

    # ----------------------------------------------------------------------------------------------------------- epochs

    def run(self) -> Run:
        self._resume()
        self._write_config()
        if self.scheduler is not None:
            self.scheduler.step_update(self.progress.updates)
        if self.config.output.tracker:
            self.accelerator.init_trackers("tensorboard", config=_flat(to_plain(self.config)))
        started = time.perf_counter()
        with self._stop_on_signals():
            while not self._is_done():
                self._train_epoch()
                self._finish_epoch()
        self.accelerator.end_training()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        problems = self.task.describe_data_problems()
        if problems:
            self._say(problems)
        progress = self.progress
        if progress.best_epoch:
            best = f"Best {self.task.metric} {progress.best:.2f}% in epoch {progress.best_epoch}"
            self._say(f"{best}: {self.folder / 'best'}. Last: {self.folder / 'last'}.")
        return Run(
            folder=self.folder,
            history=progress.history,
            metric=self.task.metric,
            best=progress.best,
            best_epoch=progress.best_epoch,
            seconds=time.perf_counter() - started,
        )

    def _is_done(self) -> bool:
        limit = self.config.train.max_updates
        return self.progress.epoch >= self.epochs or (limit is not None and self.progress.updates >= limit)

    def _train_epoch(self) -> None:
        progress, train = self.progress, self.config.train
        self.raw_model.train()
        limit = math.inf if train.max_updates is None else train.max_updates
        started = time.perf_counter() - progress.seconds
        loss_sum = self._zero()
        batches = self.task.batches(progress.epoch, progress.batch)
        with self._bar() as advance:
            while group := list(itertools.islice(batches, train.grad_accum_steps)):
                loss_sum += self._update(group)
                progress.batch += len(group)
                progress.updates += 1
                stop = self._stop_requested()
                if progress.updates % READ_LOSS_EVERY == 0 or stop:
                    loss_sum = self._read_loss(loss_sum)
                    advance(f"loss {progress.loss_sum / progress.batch:.3f}")
                else:
                    advance(None)
                progress.seconds = time.perf_counter() - started
                if stop:
                    self._save_and_stop()
                if progress.updates >= limit:
                    break
        self._read_loss(loss_sum)

    def _update(self, group: list[Any]) -> Tensor:
        """One optimizer step over the batches of `group`; the sum of their losses."""
        progress, total = self.progress, self._zero()
        for i, batch in enumerate(group):
            is_last = i == len(group) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    loss = self.task.loss(self.model, batch, progress.epoch)
                self.accelerator.backward(loss / len(group))
            total += loss.detach().to(total)
        self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.raw_model, step=progress.updates + 1)
        if self.scheduler is not None:
            self.scheduler.step_update(progress.updates + 1)
        return total

    def _zero(self) -> Tensor:
        """To sum losses in: double precision, so that the sum does not depend on where a run was interrupted."""
        device = self.accelerator.device
        return torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)

    def _clip(self) -> None:
        bound, mode = self.config.optimizer.clip_grad, self.config.optimizer.clip_mode
        if bound is None:
            return
        self.accelerator.unscale_gradients()
        dispatch_clip_grad(self.raw_model.parameters(), bound, mode=mode)

    def _read_loss(self, loss_sum: Tensor) -> Tensor:
        """Add `loss_sum` to the epoch's, mean over processes, and return zero to go on with."""
        value = float(self.accelerator.reduce(loss_sum, reduction="mean"))
        if not math.isfinite(value):
            raise TrainingError(
                f"The loss is no longer finite (epoch {self.progress.epoch + 1}, update {self.progress.updates}). "
                "Lower optimizer.lr, lengthen the warm-up or set optimizer.clip_grad."
                + (f" The last good checkpoint is {self.folder / 'last'}." if (self.folder / "last").exists() else "")
            )
        self.progress.loss_sum += value
        return torch.zeros_like(loss_sum)

    def _finish_epoch(self) -> None:
        progress, task = self.progress, self.task
        batches = progress.batch
        row: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "updates": progress.updates,
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "train_loss": progress.loss_sum / batches,
            "seconds": round(progress.seconds, 3),
        }
        progress.epoch += 1
        progress.batch, progress.loss_sum, progress.seconds = 0, 0.0, 0.0
        is_best = False
        if self._is_done() or progress.epoch % self.config.train.eval_interval == 0:
            try:
                metrics = task.evaluate(self.model if self.ema is None else self.ema.module)
            except ZooError:  # what was learned does not depend on what it is evaluated on
                progress.history.append(row)
                self._save("last")
                raise
            row |= {f"val_{name}": value for name, value in metrics.items()}
            is_best = metrics[task.metric] > progress.best
            if is_best:
                progress.best, progress.best_epoch = metrics[task.metric], progress.epoch
        progress.history.append(row)
        self._save("last", *(["best"] if is_best else []))
        self._write_history()
        if self.config.output.tracker:
            self.accelerator.log({k: v for k, v in row.items() if k != "updates"}, step=progress.updates)
        self._say(_row_text(row, self.epochs, is_best))

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def _save(self, *names: str) -> None:
        """Write the named checkpoints. They hold the averaged weights where there are such."""
        accelerator = self.accelerator
        generators = gather_object([rng_state()]) if accelerator.num_processes > 1 else [rng_state()]
        if accelerator.is_main_process:
            state = {
                "progress": dataclasses.asdict(self.progress),
                "optimizer": self.optimizer.state_dict(),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                "model": None if self.ema is None else self.raw_model.state_dict(),
                "rng": generators,
                "config": to_plain(self.config),
            }
            for name in names:
                write_checkpoint(self.folder / name, self._save_weights, state)
        accelerator.wait_for_everyone()

    def _save_weights(self, folder: Path) -> None:
        if self.ema is None:
            self.task.save(folder)
            return
        trained, self.task.model = self.task.model, self.ema.module
        try:
            self.task.save(folder)
        finally:
            self.task.model = trained

    def _resume(self) -> None:
        if self.config.resume is None:
            return
        checkpoint = find_checkpoint(self.config.resume, self.folder)
        if checkpoint is None:
            return
        state = read_state(checkpoint)
        saved_config = state["config"]
        changed = _changes(saved_config, to_plain(self.config))
        if changed:
            self._say(f"Going on with another configuration than the run began with: {', '.join(changed)}.")
        from zoo.weights import load_checkpoint

        try:
            if self.ema is None:
                load_checkpoint(self.raw_model, checkpoint)
            else:
                load_checkpoint(self.ema.module, checkpoint)
                self.raw_model.load_state_dict(state["model"] or self.ema.module.state_dict())
            self.optimizer.load_state_dict(state["optimizer"])
        except (ValueError, RuntimeError, KeyError) as error:
            if isinstance(error, ZooError):
                raise
            raise CheckpointError(f"{checkpoint} does not fit this configuration: {error}") from None
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = RunState(**state["progress"])
        if len(state["rng"]) == self.accelerator.num_processes:
            set_rng_state(state["rng"][self.accelerator.process_index])
        where = f"epoch {self.progress.epoch + 1}" + (
            f", batch {self.progress.batch + 1}" if self.progress.batch else ""
        )
        self._bring_best(checkpoint)
        self._write_history()
        self._say(f"Resumed {checkpoint} at {where} of {self.epochs} epochs.")

    def _bring_best(self, checkpoint: Path) -> None:
        """A run that goes on in another folder takes its best checkpoint along: nothing later need be better."""
        best = checkpoint.parent / "best"
        elsewhere = checkpoint.resolve() not in _checkpoints(self.folder)
        if elsewhere and (best / STATE).is_file() and self.accelerator.is_main_process:
            state = read_state(best)
            write_checkpoint(self.folder / "best", lambda fresh: shutil.copytree(best, fresh), state)

    def _save_and_stop(self) -> None:
        self._save("last")
        self.accelerator.end_training()
        by = self.signal or signal.SIGTERM
        raise Interrupted(
            f"Stopped by {by.name} and saved in {self.folder / 'last'}. Go on with --resume auto.", 128 + by.value
        )

    # ---------------------------------------------------------------------------------------------------------- signals

    @contextlib.contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM asks the loop to stop after its update; a second acts at once."""
        before: dict[int, Any] = {}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def ask(number: int, frame: object) -> None:
            self.signal = signal.Signals(number)
            restore()

        with contextlib.suppress(ValueError):  # signals belong to the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, ask)
        try:
            yield
        finally:
            restore()

    def _stop_requested(self) -> bool:
        asked = self.signal is not None
        if self.accelerator.num_processes == 1:
            return asked
        return bool(self.accelerator.reduce(torch.tensor(float(asked), device=self.accelerator.device)))

    # ----------------------------------------------------------------------------------------------------------- output

    def _write_config(self) -> None:
        if self.accelerator.is_main_process:
            with whole_file(self.folder / "config.yaml") as file:
                file.write(to_yaml(self.config).encode())

    def _write_history(self) -> None:
        """Written anew each time: a row more, or none, but never half a row."""
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
        plot_curves({self.folder.name: rows}, self.task.metric, self.folder.name, self.folder / "curves.png")

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
            steps = self.task.batches_per_epoch
            title = f"epoch {self.progress.epoch + 1}/{self.epochs}"
            row = bar.add_task(title, total=steps, completed=self.progress.batch, loss="")

            def advance(loss: str | None) -> None:
                fields: dict[str, Any] = {} if loss is None else {"loss": loss}
                bar.update(row, completed=self.progress.batch, **fields)

            yield advance


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """timm's optimizer of that name over the model's parameters. Raises ConfigError for one that there is not."""
    names = timm.optim.list_optimizers()
    if config.opt.lower() not in names:
        raise ConfigError(
            f"optimizer.opt is {config.opt!r}, which timm does not have.{did_you_mean(config.opt, names)}"
        )
    if config.layer_decay is not None and not hasattr(model, "group_matcher"):
        raise ConfigError(
            f"optimizer.layer_decay needs to know the layers of {type(model).__name__}, which has no group_matcher."
        )
    given = {name: value for name in ("betas", "eps") if (value := getattr(config, name)) is not None}
    try:
        return create_optimizer_v2(
            model,
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            layer_decay=config.layer_decay,
            **given,
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
            num_epochs=config.epochs,
            decay_epochs=config.decay_epochs,
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
    return scheduler, epochs


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


def _row_text(row: dict[str, Any], epochs: int, is_best: bool) -> str:
    parts = [f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}", f"train loss {row['train_loss']:.4f}"]
    for key, value in row.items():
        if key.startswith("val_"):
            percent = key.startswith("val_top")
            parts.append(
                f"{key.removeprefix('val_')} {value:.2f}%" if percent else f"{key.replace('_', ' ')} {value:.4f}"
            )
    parts.append(f"lr {row['lr']:.2e}")
    parts.append(f"{row['seconds']:.1f} s")
    return "  ".join(parts) + ("  *" if is_best else "")
