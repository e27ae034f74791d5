"""Several processes learn what one does, end together, and go on exactly: real processes on the CPU, over gloo."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.launcher import Launcher, free_port
from tests.test_data import make_folder
from tests.test_resume import saved_updates
from tests.test_training import SMALL, assert_same_checkpoint, configure, rows
from zoo.config import plain_flags
from zoo.errors import ConfigError
from zoo.sparsity import load_masks
from zoo.training import train
from zoo.training.checkpoint import read_state

ROOT = Path(__file__).resolve().parents[1]
# all that must be alike: the average, accumulation, clipping, decay by layer, a schedule
COMMON: dict[str, Any] = {
    "train": {"model_ema": True, "model_ema_decay": 0.9, "global_batch_size": 256},
    "optimizer": {"clip_grad": 0.5, "layer_decay": 0.8},
    "scheduler": {"epochs": 2},
    "augment": {"aa": "rand-m9-mstd0.5-inc1", "reprob": 0.3, "remode": "pixel"},
}
ONE, TWO = {"data": {"batch_size": 128}}, {"data": {"batch_size": 64}}  # either way two batches to an update
FSDP = {**TWO, "train": {**COMMON["train"], "parallel": "fsdp"}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "small.yaml").write_text(SMALL)
    return folder


@pytest.fixture(scope="module")
def runs(launcher: Launcher, home: Path) -> dict[str, Path]:
    """The same training by one process, two under DDP, and two under FSDP2."""
    for name, changes, processes in (("one", ONE, 1), ("ddp", TWO, 2), ("fsdp", FSDP, 2)):
        launcher.run(home, *flags(home, **changes), "--output.dir", home / name, processes=processes)
    return {name: home / name for name in ("one", "ddp", "fsdp")}


def flags(home: Path, **changes: Any) -> list[str]:
    return ["--config", str(home / "small.yaml"), *plain_flags(COMMON | changes)]


def assert_alike(left: Path, right: Path) -> None:
    """The history and the weights of two runs, but for the order in which numbers were added up."""
    for a, b in zip(rows(left), rows(right), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-5), key
    weights = [safetensors.torch.load_file(run / "last" / "model.safetensors") for run in (left, right)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(runs: dict[str, Path], name: str):
    assert [row["updates"] for row in rows(runs["one"])] == ["5", "10"]
    assert_alike(runs["one"], runs[name])


def test_sharded_checkpoints_are_like_others(runs: dict[str, Path]):
    """Whole tensors of the same names, shapes and types."""

    def describe(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return type(value), value.shape, value.dtype
        if isinstance(value, dict):
            return {key: describe(item) for key, item in value.items()}
        return type(value)

    states = [read_state(runs[name] / "last") for name in ("one", "fsdp")]
    for part in ("optimizer", "learner"):
        assert describe(states[0][part]) == describe(states[1][part])
    assert len(states[0]["optimizer"]["state"]) == len(states[0]["learner"]) > 10


@pytest.mark.parametrize(("name", "changes"), [("ddp", TWO), ("fsdp", FSDP)])
def test_going_on_is_exact(launcher: Launcher, home: Path, runs: dict[str, Path], name: str, changes: dict):
    """One of two processes is told to stop in the middle of an epoch: both do. The end is an unbroken run's."""
    output = home / f"broken_{name}"
    argv = [*flags(home, **changes), "--output.dir", output, "--resume", "auto"]
    job = launcher.start(home, *argv, "--train.save_interval_updates", "1", processes=2, pause=0.2)
    job.wait_for(output / "last" / "state.pt")
    job.kill(signal.SIGTERM, rank=1)
    assert job.wait() == [128 + signal.SIGTERM] * 2, job.text()
    assert "Traceback" not in job.text()
    assert 0 < read_state(output / "last")["progress"]["updates"] < 10
    said = launcher.run(home, *argv, processes=2)
    assert "Resumed" in said
    assert_same_checkpoint(output / "last", runs[name] / "last")
    assert_same_checkpoint(output / "best", runs[name] / "best")
    assert rows(output) == rows(runs[name])


def test_going_on_with_another_number_of_processes(launcher: Launcher, home: Path, runs: dict[str, Path]):
    """From one to two that share the model, and back to one, stopping in the middle of the epoch each time."""
    output = home / "changing"
    for changes, processes in ((ONE, 1), (FSDP, 2)):
        argv = [*flags(home, **changes), "--output.dir", output, "--resume", "auto"]
        job = launcher.start(home, *argv, "--train.save_interval_updates", "1", processes=processes, pause=0.2)
        before = saved_updates(output)
        while saved_updates(output) == before:
            assert job.is_running(), job.text()
            time.sleep(0.01)
        job.kill(signal.SIGTERM)
        assert job.wait() == [128 + signal.SIGTERM] * processes, job.text()
    assert saved_updates(output) < 10
    said = launcher.run(home, *flags(home, **ONE), "--output.dir", output, "--resume", "auto")
    assert "The run went on with 2 processes, and goes on with 1: random numbers differ." in said
    assert_alike(output, runs["one"])


@pytest.mark.slow  # seven processes, where test_sparse_training.py has its own two
def test_sparse_training(launcher: Launcher, home: Path):
    """Two processes find the masks that one does: SNIP and growth see all images. Killed, they go on exactly."""
    sparsity = {"method": "rigl", "density": 0.3, "update_interval": 2, "distribution": "snip", "stop": 1.0}
    sparse = {"sparsity": {**sparsity, "optimizer_state": "compact"}}
    for name, changes, processes in (("sparse_one", ONE, 1), ("sparse_two", TWO, 2)):
        launcher.run(home, *flags(home, **changes, **sparse), "--output.dir", home / name, processes=processes)
    one, two = (load_masks(home / name / "last" / "masks.safetensors") for name in ("sparse_one", "sparse_two"))
    same = sum(int((mask == two[name]).sum()) for name, mask in one.items())
    assert same > 0.98 * sum(mask.numel() for mask in one.values())  # but for scores that are as good as equal
    assert [row["density"] for row in rows(home / "sparse_one")] == [
        row["density"] for row in rows(home / "sparse_two")
    ]

    output = home / "sparse_killed"
    argv = [*flags(home, **TWO, **sparse), "--output.dir", output, "--resume", "auto"]
    job = launcher.start(home, *argv, "--train.save_interval_updates", "1", processes=2, pause=0.2)
    while saved_updates(output) < 6:  # after masks have moved, in the middle of an epoch
        assert job.is_running(), job.text()
        time.sleep(0.01)
    for rank in (0, 1):
        job.kill(signal.SIGKILL, rank)
    job.wait()
    assert saved_updates(output) < 10
    launcher.run(home, *argv, processes=2)
    assert_same_checkpoint(output / "last", home / "sparse_two" / "last")


@pytest.mark.slow  # test_eval_command counts with two processes, too
def test_evaluation_counts_every_image_once(launcher: Launcher, home: Path, tmp_path: Path):
    """Nine images over two processes, in batches of two: five and four, and each meets a damaged one."""
    make_folder(tmp_path / "data" / "train", "ab", 8)
    make_folder(tmp_path / "data" / "val", "a", 6)
    make_folder(tmp_path / "data" / "val", "b", 3)
    for damaged in ("0.png", "1.png"):  # with two processes, one for each
        (tmp_path / "data" / "val" / "a" / damaged).write_bytes(b"damaged")
    found = {}
    for parallel, processes in (("ddp", 1), ("ddp", 2), ("fsdp", 2)):
        changes = {
            "data": {"name": "folder", "path": str(tmp_path / "data"), "batch_size": 4 // processes},
            "train": {"parallel": parallel, "max_updates": 1},
        }
        output = tmp_path / f"{parallel}{processes}"
        said = launcher.run(tmp_path, *flags(home, **changes), "--output.dir", output, processes=processes)
        assert "Skipped 2 damaged images:" in said
        found[parallel, processes] = rows(output)[0]
    expected = found.pop(("ddp", 1))
    assert (float(expected["val_top1"]) * 7 / 100) % 1 == pytest.approx(0, abs=1e-6)
    for row in found.values():
        assert row["val_top1"] == expected["val_top1"]
        assert float(row["val_loss"]) == pytest.approx(float(expected["val_loss"]), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- torchrun


def torchrun(*argv: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen(
        [*command, str(ROOT / "train.py"), *map(str, argv)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.slow  # test_resume kills runs of one process
def test_a_killed_process_ends_the_run_and_the_run_goes_on(launcher: Launcher, home: Path, runs: dict[str, Path]):
    """kill -9 of one of torchrun's two: the other says so and ends, and so does torchrun."""
    output = home / "killed"
    argv = [*flags(home, **TWO), "--output.dir", output, "--resume", "auto"]
    longer = ["--train.save_interval_updates", 2, "--scheduler.epochs", 200, "--train.eval_interval", 200]
    process = torchrun(*argv, *longer)
    while not (output / "last" / "state.pt").exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.01)
    for pid in children(process.pid):
        if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            os.kill(pid, signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == 1
    assert re.search(r"^error: Another process of the run is gone, or out of reach\.", said, re.MULTILINE), said
    assert "Signal 9 (SIGKILL)" in said
    assert "zoo/training" not in said  # torchrun's own traceback is all there is
    state = read_state(output / "last")["progress"]
    assert state["updates"] > 0
    said = launcher.run(home, *argv, *longer, "--train.max_updates", state["updates"] + 1, processes=2)
    assert "Resumed" in said
    assert read_state(output / "last")["progress"]["updates"] == state["updates"] + 1


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():  # torchrun forks in a thread of its own
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


@pytest.mark.slow  # as two processes do, by another way of starting them
def test_two_machines_learn_what_one_does(home: Path, runs: dict[str, Path]):
    """`accelerate launch` on each of two machines, here both on loopback: what one process learns, written once."""
    output, port = home / "machines", free_port()
    machines = []
    for rank in range(2):
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", 2]
        launch += ["--num_processes", 2, "--machine_rank", rank, "--main_process_ip", "127.0.0.1"]
        argv = [*launch, "--main_process_port", port, ROOT / "train.py", *flags(home, **TWO), "--output.dir", output]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        machines.append(subprocess.Popen(list(map(str, argv)), env=environment, stderr=subprocess.PIPE, text=True))
    for machine in machines:
        _, said = machine.communicate()
        assert machine.returncode == 0, said
    assert_alike(runs["one"], output)


# ---------------------------------------------------------------------------------------------------------- bad input


def test_a_process_that_cannot_reach_the_others(launcher: Launcher, home: Path, tmp_path: Path):
    """It does not wait for ever, nor begins alone: both end when one meets an error that is its own."""
    argv = flags(home, data={"batch_size": 96})
    job = launcher.start(tmp_path, *argv, "--output.dir", tmp_path / "run", processes=2)
    assert job.wait() == [1, 1], job.text()
    assert "train.global_batch_size (256) is no multiple of data.batch_size (96) x 2 processes." in job.text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"global_batch_size": 200},
            r"global_batch_size \(200\) is no multiple of data.batch_size \(128\) x 1 process\.",
        ),
        ({"global_batch_size": 256, "grad_accum_steps": 2}, "follows from train.global_batch_size: set one of the two"),
        ({"grad_accum_steps": 12}, "holds 11 batches for each process, and one update takes 12"),
        ({"parallel": "fsdp", "amp": "fp16"}, "fsdp does not go with train.amp fp16"),
        ({"amp": "fp16"}, "train.amp fp16 scales losses, which is for GPUs: on a CPU take bf16 or no"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_what_does_not_go_together(home: Path, tmp_path: Path, changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        train(configure(home / "small.yaml", tmp_path / "run", train=changes))


def test_settings_of_accelerate_that_would_be_lost(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"accelerate is set to use FSDP: .* set train\.parallel to fsdp"):
        train(configure(home / "small.yaml", tmp_path / "run"))
