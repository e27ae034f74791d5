"""What creating a model costs, here and in timm: CPU time and peak memory, without weights and with a file of them.

    python benchmarks/create_model.py

Every trial is a process of its own, forked after the imports, so that none finds memory that another has warmed; the
kinds of trial take turns. Reported are medians. CPU time is user plus system time of the creation alone; peak
memory is how far it raises the resident set, with the pages of a mapped checkpoint counted in.

The zoo maps a safetensors file instead of copying it, so its pages are read when the weights are first used; the trials
"with weights, read once" use every weight before the clock stops.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from record import RESULTS, command, versions, write_json

import zoo
from zoo.config import run_command
from zoo.devices import device_name

MODELS = ("poolformer_s12", "caformer_s18", "poolformer_m48")
FILE = RESULTS / "create_model.json"
KINDS = ("with weights", "with weights, read once", "without weights")
TARGETS = {"with weights": 3.0, "without weights": 1.0}  # timm's CPU time over ours, at least


def resident(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at their highest."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def trial(create: Callable[[], Any], results: Any) -> None:
    before = resident("VmRSS:")
    started = time.process_time()
    model = create()
    seconds = time.process_time() - started
    results.put((seconds, resident("VmHWM:") - before, sum(p.numel() for p in model.parameters())))


def give_back_memory() -> None:
    """What earlier work freed goes back to the system, so that every trial pays for its own."""
    gc.collect()
    gc.freeze()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def read_once(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.sum()
    return model


def creators(name: str, folder: Path) -> dict[str, Callable[[], Any]]:
    path = folder / f"{name}.safetensors"
    safetensors.torch.save_file(timm.create_model(name).state_dict(), path)
    return {
        "zoo, with weights": lambda: zoo.create_model(name, checkpoint_path=path),
        "timm, with weights": lambda: timm.create_model(name, checkpoint_path=str(path)),
        "zoo, with weights, read once": lambda: read_once(zoo.create_model(name, checkpoint_path=path)),
        "timm, with weights, read once": lambda: read_once(timm.create_model(name, checkpoint_path=str(path))),
        "zoo, without weights": lambda: zoo.create_model(name),
        "timm, without weights": lambda: timm.create_model(name),
    }


def measure(name: str, trials: int) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        kinds = creators(name, Path(folder))
        for create in kinds.values():  # imports on first use, and the checkpoint into the page cache
            create()
        give_back_memory()
        found: dict[str, list[tuple[float, int, int]]] = {kind: [] for kind in kinds}
        for _ in range(trials):
            for kind, create in kinds.items():
                results = context.SimpleQueue()
                process = context.Process(target=trial, args=(create, results))
                process.start()
                process.join()
                if process.exitcode:
                    raise SystemExit(f"A trial of {name} ({kind}) failed.")
                found[kind].append(results.get())
    row: dict[str, Any] = {"model": name, "params": found["zoo, with weights"][0][2]}
    for kind, samples in found.items():
        cpu, memory = [s[0] for s in samples], [s[1] for s in samples]
        row[kind] = {
            "cpu_seconds": statistics.median(cpu),
            "cpu_seconds_quartiles": statistics.quantiles(cpu, n=4)[::2],
            "peak_bytes": int(statistics.median(memory)),
        }
    for what in KINDS:
        ours, theirs = row[f"zoo, {what}"], row[f"timm, {what}"]
        row[f"timm / zoo, {what}"] = {key: theirs[key] / ours[key] for key in ("cpu_seconds", "peak_bytes")}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'model':16}{'created':>25}{'zoo CPU':>11}{'timm CPU':>11}{'ratio':>7}"
        f"{'zoo peak':>11}{'timm peak':>11}{'ratio':>7}"
    ]
    for row in rows:
        for what in KINDS:
            ours, theirs, ratio = row[f"zoo, {what}"], row[f"timm, {what}"], row[f"timm / zoo, {what}"]
            cpu = "".join(f"{side['cpu_seconds'] * 1e3:>8.1f} ms" for side in (ours, theirs))
            peak = "".join(f"{side['peak_bytes'] / 2**20:>7.0f} MiB" for side in (ours, theirs))
            lines.append(
                f"{row['model']:16}{what:>25}{cpu}{ratio['cpu_seconds']:>7.2f}{peak}{ratio['peak_bytes']:>7.2f}"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--trials", type=int, default=7, help="of each kind and model")
    parser.add_argument("--output", type=Path, default=FILE)
    args = parser.parse_args()
    if args.trials < 2:
        parser.error("--trials must be 2 or more: medians and spread come from several.")
    for name in args.models:
        zoo.model_info(name)
        if not timm.is_model(name):
            parser.error(f"timm has no {name!r} to compare with.")
    torch.set_num_threads(1)  # threads do not survive a fork, and CPU time is the question
    rows = [measure(name, args.trials) for name in args.models]
    print(table(rows))
    record = {
        "what": "CPU time (user + system) and peak resident memory of creating a model; medians over forked trials",
        "command": command(),
        "date": datetime.date.today().isoformat(),
        "trials": args.trials,
        "versions": {**versions("timm", "torch"), "python": platform.python_version()},
        "machine": {
            "system": platform.platform(),
            "processor": device_name(torch.device("cpu")),
            "cores": os.cpu_count(),
        },
        "targets, timm's CPU time over ours": TARGETS,
        "results": rows,
    }
    write_json(record, args.output)
    missed = [
        f"{row['model']} {what}"
        for row in rows
        for what, least in TARGETS.items()
        if row[f"timm / zoo, {what}"]["cpu_seconds"] < least
    ]
    print(f"Missed: {', '.join(missed)}." if missed else "Every target is met.")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(run_command(main))
