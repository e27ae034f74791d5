"""Training: recipes run, runs go on exactly where they stopped, and what a user gets wrong is said clearly."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from rich.console import Console

import zoo
from tests.launcher import python
from tests.test_data import make_folder
from zoo.config import load_config, parse_config, run_command, to_yaml
from zoo.errors import CheckpointError, ConfigError, DataError, MissingDependencyError
from zoo.layers.wrappers import to_channels_last
from zoo.training import ImageClassification, TrainingConfig, TrainingError, fit, train
from zoo.training.checkpoint import write_checkpoint
from zoo.training.config import OptimizerConfig, SchedulerConfig
from zoo.training.loop import make_accelerator, make_optimizer, make_scheduler
from zoo.training.plots import plot_curves

ROOT = Path(__file__).resolve().parents[1]
SMALL = """
model:
  name: poolformer_s12
  args: {depths: [1, 1], dims: [8, 16], stem_kernel_size: 3, stem_stride: 2, layer_scale_init: 0.1}
data: {name: digits, batch_size: 128, workers: 0, input_size: [1, 16, 16], mean: [0.3], std: [0.38]}
augment: {scale: [0.8, 1.0], hflip: 0.0, color_jitter: 0.0}
optimizer: {lr: 3.0e-3}
scheduler: {epochs: 2, warmup_epochs: 0.5}
output: {tracker: null}
"""
# everything that draws random numbers or keeps state
EVERYTHING: dict[str, Any] = {
    "model": {"args": {"drop_path_rate": 0.3, "drop_rate": 0.2}},
    "augment": {"aa": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "cutmix": 1.0, "reprob": 0.3, "remode": "pixel"},
    "train": {"model_ema": True, "model_ema_decay": 0.9, "grad_accum_steps": 2},
    "optimizer": {"clip_grad": 1.0},
    "scheduler": {"epochs": 3},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def configure(recipe: Path, folder: Path, **changes: Any) -> TrainingConfig:
    changes["output"] = {"dir": str(folder), **changes.get("output", {})}
    return load_config(TrainingConfig, recipe, **changes)


def rows(run: Path) -> list[dict[str, str]]:
    with open(run / "history.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def flatten(state: Any, prefix: str = "") -> dict[str, Any]:
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else None
    if items is None:
        return {prefix: state}
    return {key: leaf for name, value in items for key, leaf in flatten(value, f"{prefix}.{name}").items()}


def assert_goes_on_exactly(recipe: Path, folder: Path, **changes: Any) -> None:
    """A run `folder`/parts, stopped after 11 updates and gone on with, ends as the unbroken one in `folder`/whole."""
    train(configure(recipe, folder / "whole", **changes))
    first = {**changes, "train": {**changes["train"], "max_updates": 11}}
    train(configure(recipe, folder / "parts", **first))
    train(configure(recipe, folder / "parts", **changes, resume="auto"))
    assert_same_checkpoint(folder / "whole" / "last", folder / "parts" / "last")


def assert_same_checkpoint(left: Path, right: Path) -> None:
    """Weights, averaged weights, masks, optimizer, random numbers and history, bit for bit."""
    weights = [safetensors.torch.load_file(folder / "model.safetensors") for folder in (left, right)]
    assert weights[0].keys() == weights[1].keys()
    states = [torch.load(folder / "state.pt", weights_only=True) for folder in (left, right)]
    for state, tensors, folder in zip(states, weights, (left, right), strict=True):
        state["weights"] = tensors
        masks = folder / "masks.safetensors"
        state["masks"] = safetensors.torch.load_file(masks) if masks.exists() else None
        del state["config"]
        for row in state["progress"]["history"]:
            del row["seconds"]
    a, b = flatten(states[0]), flatten(states[1])
    assert a.keys() == b.keys()
    for key, value in a.items():
        same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]
        assert same, key


# ----------------------------------------------------------------------------------------------------------- a run


def test_a_run_from_the_command_line(recipe: Path, tmp_path: Path):
    """train.py leaves a whole run, eval.py finds in it what training found, and its checkpoint opens by itself."""
    output = tmp_path / "run"
    flags = ["--config", recipe, "--output.dir", output, "--output.tracker", "tensorboard", "--data.workers", 2]
    done = python(ROOT / "train.py", *flags)
    assert done.returncode == 0, done.stderr
    assert f": {output / 'best'}. Last: {output / 'last'}." in done.stderr
    history = rows(output)
    assert [row["epoch"] for row in history] == ["1", "2"]
    assert float(history[1]["train_loss"]) < float(history[0]["train_loss"])
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((output / "tensorboard").rglob("events.out.tfevents.*"))
    written = load_config(TrainingConfig, output / "config.yaml")
    assert written.data.workers == 2
    assert written.optimizer.lr == 3e-3
    saved_config = torch.load(output / "last" / "state.pt", weights_only=True)["config"]
    assert to_yaml(written) == (output / "config.yaml").read_text()
    assert saved_config["optimizer"]["lr"] == 3e-3
    assert not [path for path in output.iterdir() if path.name.startswith(".")]

    model: Any = zoo.create_model(f"local-dir:{output / 'last'}", pretrained=True)
    cfg = model.pretrained_cfg
    assert (tuple(cfg["input_size"]), list(cfg["mean"]), list(cfg["std"])) == ((1, 16, 16), [0.3], [0.38])
    assert list(cfg["label_names"]) == list("0123456789")

    best = max(history, key=lambda row: float(row["val_top1"]))
    done = python(ROOT / "eval.py", "--model", output)
    assert done.returncode == 0, done.stderr
    assert f"top-1 {float(best['val_top1']):.2f}%, top-5 {float(best['val_top5']):.2f}%" in done.stdout


def test_timms_own_model(recipe: Path, tmp_path: Path):
    changes = {"name": "timm/resnet10t", "args": {"in_chans": 1}}
    text = recipe.read_text().replace(recipe.read_text().split("data:")[0], "")
    recipe.write_text(text)
    run = train(configure(recipe, tmp_path / "run", model=changes, train={"max_updates": 1}))
    assert run.history[0]["updates"] == 1
    with pytest.raises(ConfigError, match="timm does not make 'timm/resnet10x'"):
        train(configure(recipe, tmp_path / "other", model={"name": "timm/resnet10x"}))


def test_ours_learns_step_for_step_what_timms_does(recipe: Path, tmp_path: Path):
    """From the same weights, with the same order of norm and pooling, the losses differ by rounding alone.

    By plain SGD: Adam divides by the gradient's size, and so makes as much of rounding as of what is to be learned.
    """
    theirs = timm.create_model("poolformer_s12", num_classes=10, in_chans=1)
    safetensors.torch.save_model(theirs, str(tmp_path / "start.safetensors"))
    found = {}
    for name, args in (("poolformer_s12", {"head_norm_first": False}), ("timm/poolformer_s12", {})):
        config = configure(
            recipe,
            tmp_path / name,
            model={"name": name, "checkpoint_path": str(tmp_path / "start.safetensors"), "args": args},
            data={"batch_size": 32},
            optimizer={"opt": "sgd", "lr": 0.02},
            scheduler={"epochs": 1},
            train={"max_updates": 7},
        )
        found[name] = train(dataclasses.replace(config, model=dataclasses.replace(config.model, args=args))).history
    for ours, timms in zip(*found.values(), strict=True):
        for key in ("train_loss", "val_loss"):
            assert ours[key] == pytest.approx(timms[key], rel=1e-3), key


def test_fine_tuning_takes_weights_and_another_head(recipe: Path, tmp_path: Path):
    first = train(configure(recipe, tmp_path / "first", train={"max_updates": 3}))
    make_folder(tmp_path / "data" / "train", "abc", 2)
    make_folder(tmp_path / "data" / "val", "abc", 1)
    tuned = train(
        configure(
            recipe,
            tmp_path / "tuned",
            model={"checkpoint_path": str(first.folder / "last")},
            data={"name": "folder", "path": str(tmp_path / "data"), "batch_size": 2},
            optimizer={"lr": 1e-12, "weight_decay": 0},
            scheduler={"warmup_lr": 0, "min_lr": 0},
            train={"max_updates": 1},
        )
    )
    before, after = (safetensors.torch.load_file(run.folder / "last" / "model.safetensors") for run in (first, tuned))
    assert after["head.fc.weight"].shape == (3, 16)
    torch.testing.assert_close(after["stem.conv.weight"], before["stem.conv.weight"], rtol=0, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------- resuming


def test_resuming_equals_never_having_stopped(recipe: Path, tmp_path: Path):
    """Stopped after an epoch, and in the middle of one, with all that draws random numbers or keeps state."""
    whole = train(configure(recipe, tmp_path / "whole", **EVERYTHING))
    per_epoch = whole.history[0]["updates"]
    assert per_epoch == 5  # 1437 images, 11 batches of 128, two to an update; the last is left

    parts = {**EVERYTHING, "train": {**EVERYTHING["train"], "max_updates": per_epoch}}
    train(configure(recipe, tmp_path / "parts", **parts))
    assert len(rows(tmp_path / "parts")) == 1
    resumed = train(configure(recipe, tmp_path / "parts", **EVERYTHING, resume="auto"))
    assert len(resumed.history) == 3
    assert_same_checkpoint(tmp_path / "whole" / "last", tmp_path / "parts" / "last")
    assert_same_checkpoint(tmp_path / "whole" / "best", tmp_path / "parts" / "best")
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")


def test_nothing_to_resume(recipe: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="nothing to resume in"):
        train(configure(recipe, tmp_path / "run", resume=str(tmp_path)))
    run = train(configure(recipe, tmp_path / "run", resume="auto", train={"max_updates": 1}))  # starts afresh
    (run.folder / "last" / "state.pt").write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read"):
        train(configure(recipe, tmp_path / "run", resume="auto"))


def test_a_run_is_not_written_over(recipe: Path, tmp_path: Path):
    config = configure(recipe, tmp_path / "run", train={"max_updates": 1})
    run = train(config)
    before = (run.folder / "last" / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="holds a run already"):
        train(config)
    assert (run.folder / "last" / "model.safetensors").read_bytes() == before


def test_going_on_in_another_folder(recipe: Path, tmp_path: Path):
    first = train(configure(recipe, tmp_path / "first"))
    other = train(configure(recipe, tmp_path / "other", train={"max_updates": 1}))
    with pytest.raises(ConfigError, match="holds a run already"):
        train(configure(recipe, other.folder, resume=str(first.folder)))
    again = train(configure(recipe, tmp_path / "third", resume=str(first.folder)))  # is at its end, so nothing is done
    assert again.history == first.history
    assert (again.best, again.best_checkpoint) == (first.best, tmp_path / "third" / "best")
    assert_same_checkpoint(first.best_checkpoint, again.best_checkpoint)


def test_a_run_with_other_classes_or_channels_is_not_gone_on_with(recipe: Path, tmp_path: Path):
    for folder, classes in {"first": "ab", "renamed": "ac", "more": "abc"}.items():
        for split in ("train", "val"):
            make_folder(tmp_path / folder / split, classes, 4)

    def go(folder: str, **changes: Any) -> None:
        data = {"name": "folder", "path": str(tmp_path / folder), "batch_size": 4, "mean": None, "std": None}
        train(configure(recipe, tmp_path / "run", data=data | changes.pop("data", {}), **changes))

    go("first")
    before = (tmp_path / "run" / "last" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"learned 2 classes, and the data have 2, not the same .*: b, c\. Begin"):
        go("renamed", resume="auto", scheduler={"epochs": 3})
    with pytest.raises(CheckpointError, match=r"learned 2 classes, and the data have 3, not the same .*: c\. Begin"):
        go("more", resume="auto", scheduler={"epochs": 3})
    with pytest.raises(CheckpointError, match=r"last is of another model: .*stem"):
        go("first", resume="auto", scheduler={"epochs": 3}, data={"input_size": [3, 16, 16]})
    assert (tmp_path / "run" / "last" / "model.safetensors").read_bytes() == before


def test_a_run_whose_state_is_gone_is_not_begun_anew(recipe: Path, tmp_path: Path):
    config = configure(recipe, tmp_path / "run", train={"max_updates": 1})
    last = train(config).folder / "last"
    content = (last / "state.pt").read_bytes()
    for damaged in (b"", content[:20], content[:-200], b"no state"):
        (last / "state.pt").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"state\.pt cannot be read: .+$"):
            train(dataclasses.replace(config, resume="auto"))
    (last / "state.pt").unlink()
    weights = (last / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"holds a run already, which cannot be resumed: .*last has no state\.pt"):
        train(dataclasses.replace(config, resume="auto"))
    assert (last / "model.safetensors").read_bytes() == weights


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(recipe: Path, tmp_path: Path):
    config = configure(recipe, tmp_path / "run", train={"max_updates": 1}, resume="auto")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    assert len(train(config).history) == 1


# ------------------------------------------------------------------------------------------------------ surroundings


def test_a_run_records_what_it_was_made_with(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A row for each start, wherever the run goes on, with the command as it was typed but for whose paths they are."""
    typed = "/home/alice/zoo/train.py --config configs/small.yaml --output.dir=~alice/run --data.path /mnt/bob/it"
    monkeypatch.setattr(sys, "argv", typed.split())
    train(configure(recipe, tmp_path / "run", train={"max_updates": 2}))
    train(configure(recipe, tmp_path / "run", train={"max_updates": 12}, resume="auto"))
    train(configure(recipe, tmp_path / "other", resume=str(tmp_path / "run")))
    text = (tmp_path / "other" / "environment.json").read_text()
    rows = json.loads(text)
    assert [row["updates"] for row in rows] == [0, 2, 12]
    assert rows[:2] == json.loads((tmp_path / "run" / "environment.json").read_text())
    assert rows[0]["command"] == "train.py --config configs/small.yaml --output.dir=run --data.path it"
    versions = {"zoo": zoo.__version__, "torch": torch.__version__, "timm": timm.__version__}
    assert versions.items() <= rows[0].items()
    assert rows[0]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (rows[0]["processes"], list(rows[0]["devices"].values())) == (1, [1])
    assert rows[0]["date"] <= rows[1]["date"] <= rows[2]["date"]
    assert not {"alice", "bob", str(tmp_path), socket.gethostname()} & set(re.split(r"[\s/\"=]", text))


# ----------------------------------------------------------------------------------------------- when things go wrong


def test_a_loss_that_is_not_finite(recipe: Path, tmp_path: Path):
    run = train(configure(recipe, tmp_path / "run", scheduler={"epochs": 1}))
    before = {path.name: path.read_bytes() for path in (run.folder / "last").iterdir()}
    wild = configure(recipe, tmp_path / "run", scheduler={"epochs": 3}, optimizer={"lr": 1e30}, resume="auto")
    with pytest.raises(TrainingError, match=r"no longer finite \(epoch 2, .*last good checkpoint"):
        train(wild)
    assert {path.name: path.read_bytes() for path in (run.folder / "last").iterdir()} == before
    assert len(rows(run.folder)) == 1


def test_damaged_images_do_not_end_a_run_unless_asked(recipe: Path, tmp_path: Path):
    for split in ("train", "val"):
        make_folder(tmp_path / "data" / split, "ab", 4)
        (tmp_path / "data" / split / "a" / "2.png").write_bytes(b"damaged")
    data = {"name": "folder", "path": str(tmp_path / "data"), "batch_size": 4}
    said = io.StringIO()
    run = train(configure(recipe, tmp_path / "run", data=data), Console(file=said, width=200))
    assert len(run.history) == 2
    assert "Skipped 2 damaged images:" in said.getvalue()
    assert f"{tmp_path / 'data' / 'train' / 'a' / '2.png'}: cannot identify image file" in said.getvalue()
    with pytest.raises(DataError, match=r"A damaged image: .*2\.png"):
        train(configure(recipe, tmp_path / "strict", data={**data, "strict": True}))


def test_data_that_vanishes_ends_a_run_with_a_message(recipe: Path, tmp_path: Path):
    for split in ("train", "val"):
        make_folder(tmp_path / "data" / split, "ab", 4)
    data = {"name": "folder", "path": str(tmp_path / "data"), "batch_size": 4}
    run = train(configure(recipe, tmp_path / "run", data=data, scheduler={"epochs": 1}))
    before = (run.folder / "last" / "model.safetensors").read_bytes()
    going_on = configure(recipe, tmp_path / "run", data=data, scheduler={"epochs": 2}, resume="auto")
    accelerator = make_accelerator(going_on.train, going_on.output)
    task = ImageClassification(going_on, accelerator)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(DataError, match=r"The images are gone: there is no folder .*train"):
        fit(task, going_on, accelerator)
    assert (run.folder / "last" / "model.safetensors").read_bytes() == before


def save_text(text: str, fail: bool = False) -> Any:
    def save(folder: Path) -> None:
        folder.mkdir()
        (folder / "model.txt").write_text(text)
        if fail:
            raise OSError(28, "No space left on device")

    return save


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path):
    folder = tmp_path / "last"
    write_checkpoint(folder, save_text("first"), {"step": 1})
    with pytest.raises(ConfigError, match=r"No space left on device.*The one before it stays"):
        write_checkpoint(folder, save_text("second", fail=True), {"step": 2})
    assert (folder / "model.txt").read_text() == "first"
    assert torch.load(folder / "state.pt", weights_only=True) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
    write_checkpoint(folder, save_text("third"), {"step": 3})
    assert (folder / "model.txt").read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


@pytest.mark.parametrize("step", ["os.replace", "shutil.rmtree", "torch.save", "os.fsync"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_process_killed_while_it_saves_loses_no_checkpoint(tmp_path: Path, step: str, call: int):
    """The process is killed at the n-th call of each operation that saving consists of."""
    folder = tmp_path / "last"
    write_checkpoint(folder, save_text("old"), {"step": 1})
    child = os.fork()
    if child == 0:  # pragma: no cover
        module_name, name = step.split(".")
        module = {"os": os, "shutil": shutil, "torch": torch}[module_name]
        original, calls = getattr(module, name), [0]

        def dying(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(module, name, dying)
        write_checkpoint(folder, save_text("new"), {"step": 2})
        os._exit(0)
    os.waitpid(child, 0)
    from zoo.training.checkpoint import find_checkpoint

    assert find_checkpoint("auto", tmp_path) == folder
    text, state = (folder / "model.txt").read_text(), torch.load(folder / "state.pt", weights_only=True)
    assert (text, state) in (("old", {"step": 1}), ("new", {"step": 2}))
    write_checkpoint(folder, save_text("after"), {"step": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


@pytest.fixture
def train_py(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Any:
    monkeypatch.syspath_prepend(ROOT)
    import train as script

    def run(*argv: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
        status = run_command(script.main)
        return status, capfd.readouterr().err

    return run


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--optimizer.lrr", "1"], 2, "There is no option --optimizer.lrr. Did you mean --optimizer.lr?"),
        (["--lr", "1"], 2, "There is no option --lr. Did you mean --optimizer.lr?"),
        (["--optimizer.lr"], 2, "--optimizer.lr needs a value"),
        (["oops.yaml"], 2, "'oops.yaml' stands alone"),
        (["--model", "poolformer_s12"], 2, "--model takes a YAML file. Single values have names of their own"),
        (["--optimizer.lr", "fast"], 1, "optimizer.lr: Expected a float. Got value: fast"),
        (["--optimizer.lr", "-1"], 1, "optimizer.lr must be above zero, not -1.0"),
        (["--optimizer.opt", "adamv"], 1, "optimizer.opt is 'adamv', which timm does not have. Did you mean adam"),
        (["--scheduler.epochs", "0"], 1, "scheduler.epochs must be above zero"),
        (["--scheduler.warmup_epochs", "9"], 1, "longer than epochs"),
        (["--data.batch_size", "0"], 1, "data.batch_size must be at least 1"),
        (["--data.batch_size", "5000"], 1, "1437 training images do not fill one batch"),
        (["--data.name", "digts"], 1, "data.name: Expected one of 'digits', 'folder', 'parquet', 'hub'"),
        (["--sparsity.method", "rigll"], 1, "'chase'. Got: rigll. Did you mean rigl?"),
        (["--train.parallel", "fsdpp"], 1, "Expected one of 'ddp', 'fsdp'. Got value: fsdpp. Did you mean fsdp?"),
        (["--data.name", "folder", "--data.path", "/nowhere"], 1, "There is no folder '/nowhere'"),
        (["--data.batch_size", "7", "--augment.mixup", "0.2"], 1, "must be even"),
        (["--augment.hflip", "2"], 1, "augment.hflip is a probability"),
        (["--augment.aa", "rnd-m9"], 1, "augment.aa is 'rnd-m9'"),
        (["--loss.smoothing", "1"], 1, "loss.smoothing must be from 0"),
        (
            ["--model.name", "poolformer_s13"],
            1,
            "There is no model called 'poolformer_s13'. Did you mean poolformer_s",
        ),
        (["--model.args.dephts", "[1]"], 1, "has no argument 'dephts'. Did you mean depths?"),
        (["--model.args.num_classes", "3"], 1, "model.args.num_classes is 3, but the data has 10 classes"),
        (["--model.checkpoint_path", "/nowhere.pth"], 1, "/nowhere.pth"),
        (["--data.input_size", "[1, 2]"], 1, "data.input_size: Expected a list with 3 elements"),
        (["--model.freeze", "stem"], 1, "model.freeze: Expected a list in brackets, such as [a, b]. Got value: stem."),
        (["--scheduler.epochs", "1.5"], 1, "scheduler.epochs: Expected a whole number. Got value: 1.5."),
        (["--train.seed", "4294967296"], 1, "train.seed must be from 0 to 2147483647"),
        (["--scheduler.min_lr", "0.1"], 1, "scheduler.min_lr (0.1) is above optimizer.lr (0.003): the rate would rise"),
        (["--train.grad_accum_steps", "0"], 1, "train.grad_accum_steps must be above zero"),
        (["--output.dir", "/dev/null/run"], 1, "Cannot write to the folder '/dev/null/run'"),
        (["--resume", "/nowhere"], 1, "There is no run '/nowhere' to resume."),
        (["--resume", "autoo"], 1, "There is no run 'autoo' to resume. Did you mean auto?"),
        (["--config="], 2, "--config needs a value"),
        (["--resume", "/tmpp"], 1, "Did you mean tmp?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(train_py: Any, recipe: Path, tmp_path: Path, flags: Sequence[str], status: int, message: str):
    output = [] if "--output.dir" in flags else ["--output.dir", tmp_path / "run"]
    found, errors = train_py("--config", recipe, *output, *flags)
    assert message in errors
    assert found == status
    assert errors.startswith("error: ")
    assert "Traceback" not in errors
    assert len(errors.splitlines()) == 1


def test_classes_without_images_are_named(train_py: Any, recipe: Path, tmp_path: Path):
    for split in ("train", "val"):
        make_folder(tmp_path / "data" / split, "ab", 4)
        (tmp_path / "data" / split / "empty").mkdir()
        make_folder(tmp_path / "data" / split, [".ipynb_checkpoints"], 1)  # Jupyter's, and no class
    flags = ["--data.name", "folder", "--data.path", tmp_path / "data", "--data.batch_size", "4"]
    status, errors = train_py("--config", recipe, *flags, "--output.dir", tmp_path / "run", "--train.max_updates", "1")
    assert status == 0
    assert "No training images of 1 of 3 classes: empty." in errors


def test_without_arguments(train_py: Any):
    status, errors = train_py()
    assert status == 1
    assert errors == "error: data.name is 'folder': say where it lies with data.path.\n"


def test_a_run_survives_evaluation_data_that_cannot_be_read(train_py: Any, recipe: Path, tmp_path: Path):
    """What an epoch learned is saved before its evaluation fails."""
    for split, broken in (("train", False), ("val", True)):
        for label in ("a", "b"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for i in range(8):
                Image.new("L", (16, 16), 16 * i).save(folder / f"{i}.png")
                if broken:
                    (folder / f"{i}.png").write_bytes(b"not a picture")
    run = tmp_path / "run"
    flags = ["--data.name", "folder", "--data.path", tmp_path / "data", "--data.batch_size", "4"]
    status, errors = train_py("--config", recipe, *flags, "--output.dir", run, "--scheduler.epochs", "2")
    assert status == 1
    assert "None of the images can be read" in errors
    assert (run / "last" / "state.pt").is_file()


def test_a_tracker_that_is_not_installed(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"output\.tracker needs wandb: pip install wandb, or set"):
        train(configure(recipe, tmp_path / "run", output={"tracker": "wandb"}))


def test_what_is_no_configuration():
    wrong: Any = 3
    with pytest.raises(ConfigError, match=r"^train\(\) takes a TrainingConfig, .*, not 3:"):
        train(wrong)


def test_bad_configurations(train_py: Any, tmp_path: Path):
    def complaint(text: str) -> str:
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        status, errors = train_py("--config", path)
        assert status == 1
        assert errors.count("\n") == 1
        return errors

    assert "there is no key optimiser. Did you mean optimizer?" in complaint("optimiser: {lr: 1}\n")
    assert "no key optimizer.learning. " in complaint("optimizer: {learning: 1}\ndata: {name: digits}\n") + " "
    assert "no key optimizer.lrr. Did you mean optimizer.lr?" in complaint("optimizer: {lrr: 1}\n")
    assert "no key lr. Did you mean optimizer.lr?" in complaint("lr: 1\n")
    assert "is not YAML" in complaint("data: [\n")
    assert "must hold names and values" in complaint("- just\n- a list\n")
    assert "optimizer in " in complaint("optimizer: 3\n")
    status, errors = train_py("--config", tmp_path / "bat.yaml")
    assert status == 1
    assert f"Did you mean {tmp_path / 'bad.yaml'}?" in errors


def test_errors_of_a_real_process():
    """The two kinds of exit status, and not a word of Python."""
    for flags, status in ((["--optimizer.lrr", "1"], 2), (["--data.name", "folder"], 1)):
        done = python(ROOT / "train.py", *flags)
        assert done.returncode == status
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr


# --------------------------------------------------------------------------------------------------------- schedules

PEAK, LOW, START = 1.0, 0.1, 0.01
SHAPES: dict[str, Any] = {  # of 8 epochs after 2 of warm-up: the learning rate `t` epochs after the beginning
    "cosine": lambda t: LOW + (PEAK - LOW) * (1 + math.cos(math.pi * t / 10)) / 2,
    "constant": lambda t: PEAK,
    "wsd": lambda t: PEAK if t <= 6 else LOW + (PEAK - LOW) * (1 - math.sqrt((t - 6) / 4)),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("cooldown", [0, 2])
def test_schedules(name: str, cooldown: int):
    """Warm-up, shape and cooldown, update by update: five to an epoch."""
    settings = {"warmup_epochs": 2, "warmup_lr": START, "min_lr": LOW, "cooldown_epochs": cooldown, "decay_epochs": 4}
    config = SchedulerConfig(sched=name, epochs=10, **settings)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler, epochs = make_scheduler(optimizer, config, updates_per_epoch=5)
    assert scheduler is not None
    assert epochs == (10 if name == "constant" else 10 + cooldown)
    for update in range(5 * epochs):
        scheduler.step_update(update)
        t = update / 5
        expected = START + (PEAK - START) * t / 2 if t < 2 else SHAPES[name](t) if t < 10 else SHAPES[name](10)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected), t


@pytest.mark.parametrize("warmup", [0.3, 2])
@pytest.mark.parametrize("cooldown", [0, 2])
@pytest.mark.parametrize("name", ["cosine", "constant", "wsd"])
def test_shapes_that_begin_after_the_warm_up(name: str, cooldown: int, warmup: float):
    """The whole shape fits between the warm-up and the last epoch, and the run is as long as without."""
    settings = {"warmup_epochs": warmup, "warmup_lr": START, "min_lr": LOW, "cooldown_epochs": cooldown}
    config = SchedulerConfig(sched=name, epochs=10, warmup_prefix=True, decay_epochs=4, **settings)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler, epochs = make_scheduler(optimizer, config, updates_per_epoch=10)
    assert scheduler is not None
    assert epochs == (10 if name == "constant" else 10 + cooldown)
    rates = []
    for update in range(10 * epochs + 1):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(START)
    assert rates[round(10 * warmup)] == pytest.approx(PEAK)
    if name == "cosine":
        assert rates[round(5 * (warmup + 10))] == pytest.approx((PEAK + LOW) / 2, rel=0.02)
    if name != "constant":
        assert rates[-1] == pytest.approx(LOW)


def test_a_warm_up_of_the_whole_schedule_leaves_nothing_to_begin_after_it():
    with pytest.raises(ConfigError, match="leaves nothing after a warm-up of all 10 epochs"):
        SchedulerConfig(epochs=10, warmup_epochs=10, warmup_prefix=True)


def test_the_learning_rate_column_follows_the_schedule(recipe: Path, tmp_path: Path):
    """Its column holds the rate that each epoch ended with; a run with cooldown is so much longer."""
    scheduler = {"sched": "wsd", "epochs": 5, "warmup_epochs": 1, "decay_epochs": 2, "min_lr": 1e-5}
    config = configure(
        recipe, tmp_path / "run", data={"batch_size": 700}, scheduler={**scheduler, "cooldown_epochs": 1}
    )
    rates = [row["lr"] for row in train(config).history]
    halfway = 1e-5 + (3e-3 - 1e-5) * (1 - math.sqrt(1 / 2))
    assert rates == pytest.approx([3e-3, 3e-3, 3e-3, halfway, 1e-5, 1e-5])


# -------------------------------------------------------------------------------------------------------- optimizers


def test_one_dimensional_tensors_are_not_decayed_and_layers_learn_by_depth():
    model = zoo.create_model("poolformer_s12", pretrained=False, depths=(1, 1), dims=(8, 16))
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.1, layer_decay=0.5))
    scale = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0), names[parameter]
            scale[names[parameter]] = group["lr_scale"]
    assert len(scale) == len(names)
    stages = [f"stages.{i}.blocks.0.mlp.fc1.weight" for i in range(2)]
    order = ["stem.conv.weight", *stages, "head.fc.weight"]
    assert [scale[name] for name in order] == [0.125, 0.25, 0.5, 1]


def test_layer_decay_asks_for_layers():
    with pytest.raises(ConfigError, match="Linear, which has no group_matcher"):
        make_optimizer(torch.nn.Linear(2, 2), OptimizerConfig(layer_decay=0.5))


def test_layer_decay_does_not_raise_the_learning_rate():
    with pytest.raises(ConfigError, match=r"optimizer\.layer_decay must be above 0 and at most 1 .* it is 2"):
        OptimizerConfig(layer_decay=2)


def test_a_configuration_survives_its_own_yaml(recipe: Path, tmp_path: Path):
    config = configure(recipe, tmp_path / "run", **EVERYTHING)
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(config))
    assert to_yaml(load_config(TrainingConfig, path)) == to_yaml(config)
    flags = ["--config", str(path), "--model.args.depths", "[2, 1]", "--optimizer.lr=0.5"]
    changed = parse_config(TrainingConfig, flags, prog="train.py", description="")
    assert changed.model.args["depths"] == [2, 1]
    assert changed.model.args["dims"] == [8, 16]
    assert changed.optimizer.lr == 0.5
    flags = ["--optimizer.lr", "0.5", "--config", str(path), "--model.args.depths=[2, 1]"]
    assert parse_config(TrainingConfig, flags, prog="train.py", description="") == changed  # wherever they stand
    with pytest.raises(dataclasses.FrozenInstanceError):
        changed.resume = "auto"  # type: ignore[misc]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("runs", [1, 2, 14])
def test_curves_of_many_runs_have_room(runs: int, tmp_path: Path):
    """matplotlib warns where legends leave none."""
    rows = [{"epoch": e, "train_loss": 2 / e, "val_loss": 1 / e, "val_top1": 10.0 * e} for e in (1, 2)]
    path = plot_curves({f"run {number}": rows for number in range(runs)}, "top1", "Runs", tmp_path / "curves.png")
    with Image.open(path) as picture:
        assert picture.width == 150 * (14 if runs == 14 else 11)


@pytest.mark.parametrize(
    ("name", "size", "train_options", "message"),
    [
        ("selecsls42", 32, {"grad_checkpointing": True}, "train.grad_checkpointing: SelecSls cannot do that"),
        ("maxvit_rmlp_pico_rw_256", 100, {}, r"MaxxVit takes no images of 3x100x100 \(data.input_size\): height"),
    ],
)
def test_what_models_of_timm_cannot_do(recipe: Path, tmp_path: Path, name: str, size: int, train_options: Any, message):
    recipe.write_text("\n".join(line for line in SMALL.splitlines() if "args:" not in line))
    model = {"name": f"timm/{name}"}
    data = {"input_size": [3, size, size], "batch_size": 2, "mean": None, "std": None}
    with pytest.raises(ConfigError, match=message):
        train(configure(recipe, tmp_path / "run", model=model, data=data, train={"max_updates": 1, **train_options}))


def test_channels_last_is_for_weights_of_four_dimensions():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv3d(3, 4, 3), torch.nn.Linear(2, 2))
    to_channels_last(model)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[1].weight.is_contiguous()
