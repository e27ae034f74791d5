"""Runs that are killed, stopped, or starved go on as if nothing had been: real processes, real signals."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.launcher import Launcher
from tests.test_training import EVERYTHING, SMALL, assert_goes_on_exactly, assert_same_checkpoint, configure, rows
from zoo.config import plain_flags
from zoo.errors import CheckpointError, DataError, ZooError
from zoo.training import ImageClassification, Interrupted, TrainingConfig, TrainingError, fit, train
from zoo.training.checkpoint import find_checkpoint, read_state
from zoo.training.loop import make_accelerator


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def flags(recipe: Path, **changes: Any) -> list[str]:
    return ["--config", str(recipe), *plain_flags(changes)]


def progress(run: Path) -> dict[str, Any]:
    return read_state(run / "last")["progress"]


# ------------------------------------------------------------------------------------------------------------ kill -9


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_many_times(launcher: Launcher, recipe: Path, tmp_path: Path, times: int):
    """kill -9 at random moments: no checkpoint that was once whole is lost, and the end is an unbroken run's."""
    epochs = 8 if times > 3 else 3
    changes = {**EVERYTHING, "data": {"workers": 1, "batch_size": 32}, "scheduler": {"epochs": epochs}}
    changes["train"] = {**changes["train"], "save_interval_updates": 3}
    argv = flags(recipe, **changes)
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    moments = random.Random(0)
    updates = kills = 0
    while kills < times:
        job = launcher.start(tmp_path, *argv, "--output.dir", broken, "--resume", "auto", pause=0.01)
        if moments.random() < 0.8:  # let it come further; else it dies wherever it is: in its start, or in saving
            while job.is_running() and (not broken.exists() or saved_updates(broken) <= updates):
                time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.25))
        updates = max(updates, saved_updates(broken))
        assert job.is_running(), job.text()
        job.kill(signal.SIGKILL)
        assert job.wait() == [-signal.SIGKILL], job.text()
        kills += 1
        if updates:
            checkpoint = find_checkpoint("auto", broken)
            assert checkpoint is not None
            assert read_state(checkpoint)["progress"]["updates"] >= updates
            assert (checkpoint / "model.safetensors").is_file()
    assert updates > times
    for output in (broken, whole):
        launcher.run(tmp_path, *argv, "--output.dir", output, "--resume", "auto")
    assert_same_checkpoint(broken / "last", whole / "last")
    assert rows(broken) == rows(whole)
    assert not [path.name for path in broken.iterdir() if path.name.startswith(".")]


def saved_updates(run: Path) -> int:
    """Of the checkpoint that lies there now, without a helping hand; 0 while there is none."""
    try:
        return progress(run)["updates"]
    except (ZooError, FileNotFoundError):
        return 0


# ------------------------------------------------------------------------------------------------------------- signals


def test_a_run_that_is_asked_to_stop_saves_itself(launcher: Launcher, recipe: Path, tmp_path: Path):
    """In the middle of an epoch, with all that draws random numbers or keeps state; its end is an unbroken run's."""
    changes = {**EVERYTHING, "data": {"workers": 2, "batch_size": 32}, "scheduler": {"epochs": 2}}
    changes["train"] = {**changes["train"], "save_interval_updates": 5}
    argv = flags(recipe, **changes)
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    for number in (signal.SIGTERM, signal.SIGINT):
        before = saved_updates(broken)
        job = launcher.start(tmp_path, *argv, "--output.dir", broken, "--resume", "auto", pause=0.1)
        while saved_updates(broken) == before:
            assert job.is_running(), job.text()
            time.sleep(0.01)
        job.kill(number)
        assert job.wait() == [128 + number], job.text()
        assert f"Stopped by {number.name} and saved in {broken / 'last'}. Go on with --resume auto." in job.text()
        assert "Traceback" not in job.text()
        assert 0 < progress(broken)["batch"] < 44
    for output in (broken, whole):
        said = launcher.run(tmp_path, *argv, "--output.dir", output, "--resume", "auto")
        assert "Traceback" not in said
    assert_same_checkpoint(broken / "last", whole / "last")
    assert_same_checkpoint(broken / "best", whole / "best")
    assert rows(broken) == rows(whole)


class Disturbed(ImageClassification):
    """The task, with something that happens once at one of its methods."""

    def disturb(self, method: str, happening: Callable[[], object]) -> None:
        original = getattr(self, method)

        def disturbed(*args: Any) -> Any:
            setattr(self, method, original)
            happening()
            return original(*args)

        setattr(self, method, disturbed)


def disturbed_task(config: TrainingConfig, method: str, happening: Callable[[], object]) -> Any:
    accelerator = make_accelerator(config.train, config.output)
    task = Disturbed(config, accelerator)
    task.disturb(method, happening)
    return task, config, accelerator


def signal_and_wait() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def test_a_signal_ends_an_evaluation_at_once(recipe: Path, tmp_path: Path):
    whole = train(configure(recipe, tmp_path / "whole"))
    config = configure(recipe, tmp_path / "run")
    with pytest.raises(Interrupted, match="Stopped by SIGTERM and saved"):
        fit(*disturbed_task(config, "evaluate", signal_and_wait))
    assert progress(tmp_path / "run")["updates"] == whole.history[0]["updates"]
    resumed = train(dataclasses.replace(config, resume="auto"))
    assert resumed.history[0]["val_loss"] == whole.history[0]["val_loss"]
    assert_same_checkpoint(whole.folder / "last", resumed.folder / "last")


def test_a_signal_while_the_data_is_being_opened(recipe: Path, tmp_path: Path):
    config = configure(recipe, tmp_path / "run", data={"workers": 1})
    with pytest.raises(Interrupted):
        fit(*disturbed_task(config, "batches", lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert progress(tmp_path / "run")["updates"] == 1


def test_a_second_signal_acts_at_once(recipe: Path, tmp_path: Path):
    def signal_twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    child = os.fork()
    if child == 0:  # pragma: no cover
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        fit(*disturbed_task(configure(recipe, tmp_path / "run"), "loss", signal_twice))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert not (tmp_path / "run" / "last").exists()


# ------------------------------------------------------------------------------------------------- when things run out


def test_a_full_disk(launcher: Launcher, recipe: Path, tmp_path: Path):
    """No file may become larger than a checkpoint is: a message, and the checkpoint before stays and can be resumed."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    larger = {"args": {"dims": [32, 64]}}  # than the picture of the curves
    argv = flags(recipe, scheduler={"epochs": 2}, data={"batch_size": 700}, model=larger)
    launcher.run(tmp_path, *argv, "--output.dir", whole)
    launcher.run(tmp_path, *argv, "--output.dir", run, "--train.max_updates", 2)
    before = {path.name: path.read_bytes() for path in (run / "last").iterdir()}
    weights, state = len(before["model.safetensors"]), len(before["state.pt"])
    for size in (weights // 2, (weights + state) // 2):  # too small for the weights; for the state alone
        job = launcher.start(tmp_path, *argv, "--output.dir", run, "--resume", "auto", max_file_size=size)
        assert job.wait() == [1], job.text()
        last_line = job.text().splitlines()[-1]
        assert last_line.startswith(f"error: The checkpoint '{run / 'last'}' cannot be written: ")
        assert last_line.endswith("The one before it stays.")
        assert "Traceback" not in job.text()
        assert {path.name: path.read_bytes() for path in (run / "last").iterdir()} == before
        assert not [path.name for path in run.iterdir() if path.name.startswith(".")]
    launcher.run(tmp_path, *argv, "--output.dir", run, "--resume", "auto")
    assert_same_checkpoint(run / "last", whole / "last")


def test_a_worker_that_is_killed_ends_the_run_with_a_message(launcher: Launcher, recipe: Path, tmp_path: Path):
    argv = flags(recipe, data={"workers": 1, "batch_size": 16}, scheduler={"epochs": 50})
    job = launcher.start(tmp_path, *argv, "--output.dir", tmp_path / "run")
    job.wait_for(tmp_path / "run" / "history.csv")
    children = Path(f"/proc/{job.pids[0]}/task/{job.pids[0]}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert job.wait() == [1], job.text()
    last_line = job.text().splitlines()[-1]
    told = "error: A process that loads data died, perhaps for want of memory: lower data.workers"
    assert last_line.startswith(told), job.text()
    assert "Traceback" not in job.text()
    assert (tmp_path / "run" / "last" / "state.pt").is_file()


def fail_with(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def test_errors_of_torch_that_a_user_can_mend(recipe: Path, tmp_path: Path):
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")
    config = configure(recipe, tmp_path / "run", resume="auto")
    with pytest.raises(TrainingError, match=r"not enough memory: lower data.batch_size .* 2\.00 GiB\.$"):
        fit(*disturbed_task(config, "loss", fail_with(memory)))
    for bug in "a bug", "Caught RuntimeError in DataLoader worker process 0.\n...":  # a user's transform, say
        with pytest.raises(RuntimeError) as caught:  # what nobody can explain is not explained away
            fit(*disturbed_task(config, "loss", fail_with(RuntimeError(bug))))
        assert str(caught.value) == bug
        assert not isinstance(caught.value, ZooError)


def test_data_that_ends_early(recipe: Path, tmp_path: Path):
    config = configure(recipe, tmp_path / "run")
    accelerator = make_accelerator(config.train, config.output)
    task: Any = ImageClassification(config, accelerator)
    task.batches = lambda epoch, start: iter(())
    with pytest.raises(DataError, match="ended 11 updates before the end of the epoch"):
        fit(task, config, accelerator)


def test_a_run_that_goes_on_freezes_what_it_froze(recipe: Path, tmp_path: Path):
    run = train(configure(recipe, tmp_path / "run", train={"max_updates": 11}))
    other = configure(recipe, run.folder, model={"freeze": ["stem"]}, resume="auto")
    with pytest.raises(CheckpointError, match=r"it trained \d+ tensors, this one trains \d+: is model.freeze another"):
        train(other)


def test_weights_that_are_not_finite_are_not_saved(recipe: Path, tmp_path: Path):
    """The loss before an update may be finite, and the weights after it not."""
    good = train(configure(recipe, tmp_path / "run", train={"max_updates": 11}))
    before = {path.name: path.read_bytes() for path in (good.folder / "last").iterdir()}
    other = configure(recipe, good.folder, optimizer={"opt": "sgd"}, resume="auto")
    with pytest.raises(CheckpointError, match="does not fit this configuration: it was trained with another optimizer"):
        train(other)
    wild = {"optimizer": {"lr": 1e38}, "train": {"save_interval_updates": 1}, "scheduler": {"sched": "none"}}
    with pytest.raises(TrainingError, match=r"weights are no longer finite \(epoch 2, update 12\).*last good"):
        train(configure(recipe, good.folder, **wild, resume="auto"))
    assert {path.name: path.read_bytes() for path in (good.folder / "last").iterdir()} == before


# -------------------------------------------------------------------------------------------------- what may be changed


def test_options_of_the_optimizer_are_those_of_the_configuration(recipe: Path, tmp_path: Path):
    first = train(configure(recipe, tmp_path / "run", scheduler={"sched": "none"}, train={"max_updates": 11}))
    assert first.history[0]["lr"] == 3e-3
    changes: dict[str, Any] = {"optimizer": {"lr": 1e-4, "weight_decay": 0.2}, "scheduler": {"sched": "none"}}
    second = train(configure(recipe, tmp_path / "run", **changes, resume="auto"))
    assert second.history[1]["lr"] == 1e-4
    groups = read_state(second.folder / "last")["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.2}


@pytest.mark.parametrize(("before", "after"), [(128, 256), pytest.param(256, 128, marks=pytest.mark.slow)])
def test_the_schedule_keeps_its_place_when_batches_change_their_size(
    recipe: Path, tmp_path: Path, before: int, after: int
):
    """Half as many updates to an epoch from now on, or twice as many: the later epochs' rates are the same."""
    data: list[Any] = [{"batch_size": before}, {"batch_size": after}]
    per_epoch = 1437 // before
    run = tmp_path / "run"
    train(configure(recipe, run, data=data[0], train={"max_updates": per_epoch + 2, "eval_interval": 9}))
    broken = train(configure(recipe, run, data=data[1], scheduler={"epochs": 4}, resume="auto"))
    whole = train(configure(recipe, tmp_path / "whole", data=data[1], scheduler={"epochs": 4}))
    assert [row["lr"] for row in broken.history[2:]] == [row["lr"] for row in whole.history[2:]]


@pytest.mark.slow  # five runs
def test_averaging_may_begin_and_end_on_the_way(recipe: Path, tmp_path: Path):
    """Weights that are learned are never mistaken for their average."""
    averaged = {"model_ema": True, "model_ema_decay": 0.9999}
    train(configure(recipe, tmp_path / "whole"))
    train(configure(recipe, tmp_path / "run", train={"max_updates": 11, **averaged}))
    train(configure(recipe, tmp_path / "run", resume="auto"))
    learned = [safetensors.torch.load_file(tmp_path / run / "last" / "model.safetensors") for run in ("whole", "run")]
    assert all(torch.equal(tensor, learned[1][name]) for name, tensor in learned[0].items())

    train(configure(recipe, tmp_path / "other", train={"max_updates": 11}))
    train(configure(recipe, tmp_path / "other", train=averaged, resume="auto"))
    beside_average = read_state(tmp_path / "other" / "last")["learner"]
    assert beside_average.keys() == learned[0].keys()
    assert all(torch.equal(tensor, beside_average[name]) for name, tensor in learned[0].items())


class Learner(torch.nn.Module):
    """A model with a part that only training needs."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.extra = model, torch.nn.Linear(10, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.extra(self.model(images))


@pytest.mark.parametrize("averaged", [False, True])
def test_what_only_training_needs_is_kept_beside_the_model(recipe: Path, tmp_path: Path, averaged: bool):
    def learn(output: Path, **changes: Any) -> Path:
        changes["train"] = {"model_ema": averaged, "model_ema_decay": 0.9, **changes.get("train", {})}
        config = configure(recipe, output, data={"batch_size": 256}, **changes)
        accelerator = make_accelerator(config.train, config.output)
        task = ImageClassification(config, accelerator)
        task.learner = Learner(task.model)
        return fit(task, config, accelerator).folder / "last"

    whole = learn(tmp_path / "whole")
    learn(tmp_path / "parts", train={"max_updates": 5})
    parts = learn(tmp_path / "parts", resume="auto")
    assert_same_checkpoint(whole, parts)
    names = safetensors.torch.load_file(parts / "model.safetensors").keys()
    assert not [name for name in names if "extra" in name]
    assert {"extra.weight", "extra.bias"} <= read_state(parts)["learner"].keys()
    assert len(read_state(parts)["learner"]) == 2 + (len(names) if averaged else 0)
    assert len(read_state(parts)["optimizer"]["state"]) == 2 + len(names)


@pytest.mark.slow  # float16 on a CPU takes long
def test_the_loss_scale_goes_on(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """fp16 itself needs a GPU; its scaler does not, whose scale doubles on the way after every fourth update."""

    def with_scaler(*args: Any) -> Any:
        accelerator = make_accelerator(*args)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100, growth_interval=4)
        return accelerator

    monkeypatch.setattr("zoo.training.image_classification.make_accelerator", with_scaler)
    changes = {**EVERYTHING, "train": {**EVERYTHING["train"], "grad_accum_steps": 1}}
    assert_goes_on_exactly(recipe, tmp_path, **changes)
    scaler = read_state(tmp_path / "whole" / "last")["scaler"]
    assert scaler["scale"] == 2.0**108  # 33 updates
    assert scaler["_growth_tracker"] == 1


@pytest.mark.parametrize("opt", ["lamb", "adan"])
def test_optimizers_that_count_their_steps_as_an_option_go_on(recipe: Path, tmp_path: Path, opt: str):
    """timm's have no such option before their first step."""
    assert_goes_on_exactly(recipe, tmp_path, optimizer={"opt": opt}, train={"max_updates": 13})
    assert int(read_state(tmp_path / "parts" / "last")["optimizer"]["param_groups"][0]["step"]) == 13


def test_a_checkpoint_of_another_version(recipe: Path, tmp_path: Path):
    run = train(configure(recipe, tmp_path / "run", train={"max_updates": 1}))
    state = read_state(run.folder / "last")
    del state["processes"]
    torch.save(state, run.folder / "last" / "state.pt")
    with pytest.raises(ZooError, match=r"state\.pt is of another version: it lacks processes\."):
        train(configure(recipe, tmp_path / "run", resume="auto"))
