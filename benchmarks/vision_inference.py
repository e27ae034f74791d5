"""Inference on a CPU: ours plain, optimised and compiled, beside timm, ONNX Runtime and OpenVINO with the same weights.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive python benchmarks/vision_inference.py --batch-sizes 8 --dtypes float32

All contenders of one model, batch and dtype take turns in one process, the order turning round, and each has first
shown that it computes what the plain model does. Recorded are medians, of wall-clock time and of the process's CPU time
summed over threads, which depends little on what else runs (waiting threads sleep, in the runtimes too). Figures join
those of earlier runs in the results file, so that a long table can be made in parts; `--plot` draws it.

ONNX Runtime has no bfloat16 convolutions for CPUs; OpenVINO gets float32 weights and bfloat16 as its precision.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from record import RESULTS, command, versions, write_json
from torch import Tensor, nn

import zoo
from zoo.config import run_command
from zoo.devices import device_and_threads
from zoo.errors import ConfigError, MissingDependencyError, ZooError
from zoo.plots import new_figure, save_figure
from zoo.registry import get_entry

MODELS = ("poolformer_s12", "poolformerv2_s12", "convformer_s18", "caformer_s18", "slak_tiny")
FILE = RESULTS / "vision_inference.json"
CONTENDERS = (
    "zoo",
    "zoo channels_last",
    "zoo optimized",
    "zoo optimized, compiled",
    "timm",
    "timm channels_last",
    "timm compiled",
    "onnxruntime",
    "openvino",
)
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # of the largest logit: that all compute the same, not how exactly

Run = Callable[[], Any]


class Absent(Exception):
    """A contender that this model, dtype or machine does not have."""


@torch.no_grad()
def wake_layer_scales(model: nn.Module) -> nn.Module:
    """Layer scales of about 1, as training leaves them: at their initial 1e-6 no block could be seen in the logits."""
    for name, parameter in model.named_parameters():
        if parameter.squeeze().ndim == 1 and not name.endswith("bias") and parameter.abs().max() < 1e-3:
            parameter.uniform_(0.5, 1.5)
    return model


def ours(name: str, dtype: torch.dtype) -> nn.Module:
    """Our model as timm computes it, with random weights."""
    torch.manual_seed(0)
    model = zoo.create_model(name, pretrained=False, **get_entry(name).timm_args).eval().requires_grad_(False)
    return wake_layer_scales(model).to(dtype)


def contender(which: str, name: str, model: nn.Module, images: Tensor) -> Run:
    """A function of no arguments that computes the logits of `images`. Raises Absent."""
    side, _, how = which.partition(" ")
    if side in ("onnxruntime", "openvino"):
        return {"onnxruntime": onnx_runtime, "openvino": openvino_runtime}[side](model, images)
    if side == "timm":
        if not hasattr(timm.models, name):
            raise Absent("timm has no such model")
        theirs = timm.create_model(name).eval().requires_grad_(False)
        theirs.load_state_dict(model.state_dict())
        model = theirs.to(images.dtype)
    else:
        model = copy.deepcopy(model)
    if "optimized" in how:
        model = zoo.optimize_for_inference(model)
    if "channels_last" in how:
        model, images = (
            model.to(memory_format=torch.channels_last),
            images.contiguous(memory_format=torch.channels_last),
        )
    call = torch.compile(model, dynamic=False) if "compiled" in how else model

    def run() -> Tensor:
        with torch.inference_mode():
            return call(images)

    return run


def exported(model: nn.Module, images: Tensor, folder: str) -> str:
    """The plain model as an ONNX file, in float32."""
    path = f"{folder}/model.onnx"
    torch.onnx.export(copy.deepcopy(model).float(), (images.float(),), path, dynamo=True, verbose=False)
    return path


def onnx_runtime(model: nn.Module, images: Tensor) -> Run:
    if images.dtype != torch.float32:
        raise Absent("no bfloat16 convolutions on CPUs")
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError('ONNX Runtime is missing: pip install "backbone-zoo[bench]".') from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        session = onnxruntime.InferenceSession(
            exported(model, images, folder), options, providers=["CPUExecutionProvider"]
        )
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino_runtime(model: nn.Module, images: Tensor) -> Run:
    try:
        import openvino
    except ImportError as error:
        raise MissingDependencyError('OpenVINO is missing: pip install "backbone-zoo[bench]".') from error
    core = openvino.Core()
    settings: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if images.dtype == torch.bfloat16 else "f32",
    }
    with tempfile.TemporaryDirectory() as folder:
        compiled = core.compile_model(core.read_model(exported(model, images, folder)), "CPU", settings)
    request, array = compiled.create_infer_request(), images.float().numpy()
    return lambda: torch.from_numpy(next(iter(request.infer([array], share_inputs=True).values())))


def measure(name: str, batch_size: int, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians in milliseconds of every contender, or why it is not there."""
    kind = getattr(torch, dtype)
    model = ours(name, kind)
    size = get_entry(name).pretrained_cfg()["input_size"]
    images = torch.randn(batch_size, *size, generator=torch.Generator().manual_seed(0)).to(kind)
    with torch.inference_mode():
        expected = model(images).float()
    found: dict[str, Any] = {}
    runs: dict[str, Run] = {}
    for which in arguments.contenders:
        try:
            run = contender(which, name, model, images)
            error = ((run().float() - expected).abs().max() / expected.abs().max()).item()
        except Absent as reason:
            found[which] = {"absent": str(reason)}
            continue
        if not error < TOLERANCE[dtype]:
            raise ZooError(f"{which} computes something else than {name}: off by {error:.1e} of the largest logit.")
        found[which] = {"error": float(f"{error:.1e}")}
        runs[which] = run
    times: dict[str, list[tuple[float, float]]] = {which: [] for which in runs}
    for turn in range(arguments.warmup + arguments.repeats):
        for which in list(runs) if turn % 2 else reversed(list(runs)):
            wall, cpu = time.perf_counter(), time.process_time()
            runs[which]()
            times[which].append((time.perf_counter() - wall, time.process_time() - cpu))
    for which, pairs in times.items():
        wall_s, cpu_s = zip(*pairs[arguments.warmup :], strict=True)
        found[which] |= {
            "wall_ms": round(1000 * statistics.median(wall_s), 2),
            "wall_ms_fastest": round(1000 * min(wall_s), 2),
            "cpu_ms": round(1000 * statistics.median(cpu_s), 2),
            "cpu_ms_fastest": round(1000 * min(cpu_s), 2),
        }
    return {"contenders": found, "repeats": arguments.repeats, "input_size": list(size)}


def plot(report: dict[str, Any], path: Path) -> None:
    """Images per CPU second of every contender, one panel for each batch size and dtype."""
    groups = report["groups"]
    panels = sorted(
        {tuple(key.split("/")[1:]) for key in groups}, key=lambda panel: (panel[1] != "float32", int(panel[0]))
    )
    models = [name for name in MODELS if any(key.startswith(f"{name}/") for key in groups)]
    figure = new_figure((4 + 3.2 * len(panels), 4.5))
    for place, (batch_size, dtype) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        axes.set_title(f"batch {batch_size}, {dtype}")
        for i, which in enumerate(CONTENDERS):
            speeds = []
            for name in models:
                found = groups.get(f"{name}/{batch_size}/{dtype}", {"contenders": {}})["contenders"].get(which, {})
                speeds.append(1000 * int(batch_size) / found["cpu_ms"] if "cpu_ms" in found else 0.0)
            places = [m + (i - len(CONTENDERS) / 2) * 0.09 for m in range(len(models))]
            axes.bar(places, speeds, width=0.085, label=which)
        axes.set_xticks(range(len(models)), models, rotation=30, ha="right")
        axes.set_ylabel("images per CPU second")
    figure.axes[0].legend(fontsize=7)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--dtypes", nargs="+", choices=tuple(TOLERANCE), default=list(TOLERANCE))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2, help="turns before the clock counts")
    parser.add_argument("--results", type=Path, default=FILE)
    parser.add_argument("--plot", action="store_true", help="only draw the results file, into a PNG beside it")
    arguments = parser.parse_args()
    report = json.loads(arguments.results.read_text()) if arguments.results.is_file() else {"groups": {}}
    picture = arguments.results.with_suffix(".png")
    if arguments.plot:
        if not report["groups"]:
            raise ConfigError(f"There is nothing to draw in {arguments.results}: measure first.")
        plot(report, picture)
        print(f"Written to {picture}")
        return
    if arguments.repeats < 1 or min(arguments.batch_sizes) < 1:
        raise ConfigError("--repeats and --batch-sizes are whole numbers from 1 up.")
    report |= {
        "device": device_and_threads(torch.device("cpu")),
        "versions": versions("torch", "timm", "onnxruntime", "openvino"),
    }
    for dtype in arguments.dtypes:
        for batch_size in arguments.batch_sizes:
            for name in arguments.models:
                torch.compiler.reset()
                group = measure(name, batch_size, dtype, arguments)
                group["command"] = command()
                report["groups"][f"{name}/{batch_size}/{dtype}"] = group
                write_json(report, arguments.results)
                print(f"{name}, batch {batch_size}, {dtype}")
                for which, found in group["contenders"].items():
                    text = found.get("absent") or f"{found['cpu_ms']:8.1f} CPU-ms  {found['wall_ms']:8.1f} ms"
                    print(f"  {which:<26}{text}", flush=True)
    print(f"Written to {arguments.results}")


if __name__ == "__main__":
    sys.exit(run_command(main))
