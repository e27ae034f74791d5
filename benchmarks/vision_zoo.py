"""Every vision model of the zoo: what it reaches by its authors' word, against how fast it is here.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive python benchmarks/vision_zoo.py --missing

Measured are the plain model, its fast form (`zoo.optimize_for_inference`) and, where timm has that architecture,
timm's, all with random weights: they take turns, the order turning round. Recorded are medians, of wall-clock time and
of the process's CPU time summed over threads, which depends little on what else runs, and the peak memory of the fast
form in a process of its own. Figures join those of earlier runs in the results file, so that the long table can be made
in parts (`--missing` leaves out what is there already); `--plot` draws it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from record import RESULTS, command, versions, write_json
from rich.progress import track

import zoo
from zoo.config import run_command
from zoo.devices import device_and_threads
from zoo.errors import ConfigError
from zoo.plots import new_figure, save_figure
from zoo.profiling.measure import Settings, Subject, peak_memory
from zoo.registry import ModelInfo, get_entry

FILE = RESULTS / "vision_zoo.json"
LARGEST = 60_000_000  # parameters
SAME = {"resnet50_pf": "resnet50"}  # timm's names of models that neither share a name nor weights with it
FAST, PLAIN, TIMM = "fast", "plain", "timm"
CPU: dict[str, Any] = {
    "device": torch.device("cpu"),
    "dtype": torch.float32,
    "channels_last": False,
    "compile": False,
    "mode": "inference",
}
FORMS = {PLAIN: Settings(**CPU), FAST: Settings(**CPU, optimize=True)}


def models(patterns: list[str], families: list[str]) -> list[ModelInfo]:
    """Image classifiers of the zoo up to `LARGEST`, by family; a SN-Net runs the first of its networks."""
    found = zoo.search(task="vision", max_params=LARGEST)
    names = set(zoo.list_models(patterns)) if patterns else {info.name for info in found}
    kept = [info for info in found if info.name in names and (not families or info.family in families)]
    if not kept:
        raise ConfigError("No vision model of the zoo up to 60M parameters matches.")
    return sorted(kept, key=lambda info: (info.family, info.params, info.name))


def in_timm(name: str) -> str | None:
    """timm's name of the same architecture; None where timm has none."""
    hub_ids = [weights.hub_id or "" for weights in get_entry(name).weights]
    names = [id.removeprefix("timm/").partition(".")[0] for id in hub_ids if id.startswith("timm/")]
    return next((known for known in (name, *names, SAME.get(name, "")) if timm.is_model(known)), None)


def contenders(info: ModelInfo) -> dict[str, Subject]:
    """The same architecture, ready to run."""
    subjects = {which: settings.prepare(info.name, None) for which, settings in FORMS.items()}
    if theirs := in_timm(info.name):
        subjects[TIMM] = FORMS[PLAIN].prepare(f"timm/{theirs}", subjects[PLAIN].input_size)
    return subjects


def measure(info: ModelInfo, batch_size: int, repeats: int, warmup: int) -> dict[str, Any]:
    """Medians, in milliseconds for the batch, of every contender."""
    subjects = contenders(info)
    images = {which: subject.images(batch_size) for which, subject in subjects.items()}
    times: dict[str, list[tuple[float, float]]] = {which: [] for which in subjects}
    for turn in range(warmup + repeats):
        for which in list(subjects) if turn % 2 else reversed(list(subjects)):
            wall, cpu = time.perf_counter(), time.process_time()
            subjects[which].step(images[which])
            times[which].append((time.perf_counter() - wall, time.process_time() - cpu))
    found = {}
    for which, pairs in times.items():
        wall_s, cpu_s = zip(*pairs[warmup:], strict=True)
        found[which] = {
            "wall_ms": round(1000 * statistics.median(wall_s), 3),
            "cpu_ms": round(1000 * statistics.median(cpu_s), 3),
            "cpu_ms_fastest": round(1000 * min(cpu_s), 3),
        }
    return found


def row(
    info: ModelInfo, batch_sizes: list[int], known: dict[str, dict[str, Any]], arguments: argparse.Namespace
) -> dict[str, Any]:
    """All that is measured of one model, beside what the index says of it; of batches `known`, what they lack."""
    batches = {size: dict(batch) for size, batch in known.items()}
    for batch_size in batch_sizes:
        batch = batches.setdefault(str(batch_size), {})
        if not (arguments.missing and "times" in batch):
            timed = measure(info, batch_size, arguments.repeats, arguments.warmup)
            throughput = {which: round(1000 * batch_size / found["wall_ms"], 2) for which, found in timed.items()}
            batch |= {"times": timed, "throughput": throughput, "repeats": arguments.repeats}
    unmeasured = [n for n in batch_sizes if not (arguments.missing and batches[str(n)].get("peak_memory"))]
    if arguments.memory and unmeasured:
        subject = FORMS[FAST].prepare(info.name, None)
        for batch_size in unmeasured:
            batches[str(batch_size)]["peak_memory"] = peak_memory(subject, batch_size)
    return {
        "family": info.family,
        "params": info.params,
        "macs": info.macs,
        "input_size": list(info.input_size),
        "top1": info.top1,
        "batches": dict(sorted(batches.items(), key=lambda item: int(item[0]))),
    }


@contextlib.contextmanager
def _figure(path: Path) -> Iterator[Any]:
    figure = new_figure((14, 6))
    yield figure
    save_figure(figure, path)


def plot(rows: dict[str, dict[str, Any]], path: Path) -> bool:
    """Accuracy as claimed against images per CPU second of the fast form, one panel for each batch size.

    Whether there is a picture: not where no accuracy is claimed.
    """
    rated = {name: row for name, row in rows.items() if row["top1"] is not None}
    if not rated:
        return False
    families = sorted({row["family"] for row in rated.values()})
    sizes = sorted({size for row in rated.values() for size in row["batches"]}, key=int)
    with _figure(path) as figure:
        panels = figure.subplots(1, len(sizes), squeeze=False)[0]
        for axes, size in zip(panels, sizes, strict=True):
            for i, family in enumerate(families):
                points = [
                    (1000 * int(size) / row["batches"][size]["times"][FAST]["cpu_ms"], row["top1"])
                    for row in rated.values()
                    if row["family"] == family and size in row["batches"]
                ]
                if points:
                    style = {"color": f"C{i % 10}", "marker": "os^Dv"[i // 10 % 5], "s": 22}
                    axes.scatter(*zip(*points, strict=True), label=family, **style)
            axes.set_xscale("log")
            axes.set_xlabel("images per CPU second, fast form")
            axes.set_ylabel("ImageNet-1k top-1, claimed (%)")
            axes.set_title(f"batch {size}")
            axes.grid(alpha=0.3)
        panels[-1].legend(fontsize=8)
    return True


def summary(rows: dict[str, dict[str, Any]]) -> str:
    """Where the fast form is slower than timm's model or than the plain one, in CPU time, and how much it wins."""
    lines = []
    for other in (TIMM, PLAIN):
        ratios = {
            f"{name} at batch {size}": batch["times"][other]["cpu_ms"] / batch["times"][FAST]["cpu_ms"]
            for name, row in rows.items()
            for size, batch in row["batches"].items()
            if other in batch["times"]
        }
        if ratios:
            middle = statistics.median(ratios.values())
            lines.append(f"{other} takes {middle:.2f} times as long as the fast form (median of {len(ratios)}).")
            lines += [f"  {ratio:.2f}: {name}" for name, ratio in sorted(ratios.items(), key=lambda r: r[1])[:10]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="of names, such as 'emo*'; default: all")
    parser.add_argument("--families", nargs="+", default=[])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="turns before the clock counts")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out peak memory")
    parser.add_argument("--missing", action="store_true", help="only what the results file does not have")
    parser.add_argument("--results", type=Path, default=FILE)
    parser.add_argument("--plot", action="store_true", help="only draw the results file, into a PNG beside it")
    arguments = parser.parse_args()
    report = json.loads(arguments.results.read_text()) if arguments.results.is_file() else {"models": {}}
    picture = arguments.results.with_suffix(".png")
    if not arguments.plot:
        if arguments.repeats < 1 or arguments.warmup < 0 or min(arguments.batch_sizes) < 1:
            raise ConfigError("--repeats and --batch-sizes are whole numbers from 1 up, --warmup from 0.")
        report |= {
            "device": device_and_threads(torch.device("cpu")),
            "versions": versions("torch", "timm"),
            "command": command(),
        }
        wanted = models(arguments.patterns, arguments.families)
        for info in track(wanted, description="Measuring", transient=True):
            known = report["models"].get(info.name, {}).get("batches", {})
            report["models"][info.name] = row(info, arguments.batch_sizes, known, arguments)
            write_json(report, arguments.results)
    if not report["models"]:
        raise ConfigError(f"There is nothing in {arguments.results}: measure first.")
    drawn = plot(report["models"], picture)
    print(summary(report["models"]))
    print(f"Written to {arguments.results}" + (f" and {picture}" if drawn else ""))


if __name__ == "__main__":
    sys.exit(run_command(main))
