"""Large depthwise kernels: ours and F.conv2d, at the shapes of SLaK's stages, beside the limits of the machine.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive python benchmarks/large_kernel.py

Operators: the tall, wide and small kernels of a block ("decomposed"), and the whole kernel that they stand for
("whole"), in both memory formats; the forward as inference has it, with the branches summed, and forward and backward
as training has it, with an output of each branch. Models: slak_tiny at 224x224, with F.conv2d in both memory formats
("plain"; in NCHW the large kernels meet contiguous maps, as in the authors' code), with our operator, and as
`zoo.optimize_for_inference` makes it; a training step is forward, loss, backward and AdamW, and of "ours" it is as
`train.py` takes it on a CPU, within `zoo.layers.products.FastProducts` ("ours_kernels_alone": without, and without
`zoo.layers.training_mlp`). On a GPU PyTorch's side is cuDNN's, with the fastest of its algorithms
(`torch.backends.cudnn.benchmark`), or what PyTorch prefers to it, as for large depthwise kernels in NCHW its own, and
models run under autocast to `--dtype`.

All that is compared takes turns in one process. Figures are medians: `ms` of the wall clock, and on a CPU `cpu_ms` of
CPU time over all threads, which depends less on what else runs; ratios are of `cpu_ms` there. On a GPU `ms` is the time
between two events, and operators are replayed from CUDA graphs, each time after its cache was emptied: what Python
takes to launch them is left out, of ours as of cuDNN's. `limit_ms` is the larger of arithmetic (taps that meet a pixel,
not the padding, two operations each) over the fastest matrix product measured here (on a GPU of 16 bits, since tensor
cores do this work, whatever the maps are) and traffic (every map read or written once by each of forward, input and
weight gradient) over the fastest copy; an FFT, which whole kernels get on large maps, needs less arithmetic than that.
`share_of_bandwidth` is the traffic's time over ours.

`error` is what each side is off from float64, of the largest value, the worst of output and gradients, for a few
images: on a GPU ours rounds float32 to TF32 where PyTorch lets cuDNN do so, and F.conv2d may not; `--ieee` forbids it.
What fails, or computes something else, is told and left out of the picture; the others are measured.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import RESULTS, command, versions, write_json
from timm.layers import Mlp
from torch import Tensor, nn
from vision_inference import wake_layer_scales

import zoo
from zoo.config import run_command
from zoo.devices import device_and_threads
from zoo.errors import ZooError
from zoo.layers.large_kernel import depthwise_conv2d, large_kernel_sum
from zoo.layers.products import FastProducts
from zoo.models.slak import DepthwiseConv2d
from zoo.plots import check_picture, new_figure, save_figure

FILE = RESULTS / "large_kernel.json"
TOLERANCE = 1e-4  # of the largest logit, between the forms of slak_tiny, without TF32
TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 3e-3}  # of operators; float32 may be TF32
STAGES = ((124, 56), (249, 28), (499, 14), (998, 7))  # channels and side of slak_tiny's maps at 224x224
KERNELS = {"k51": (51, 49, 47, 13), "k31": (31, 29, 27, 13), "k61": (61, 59, 57, 13)}
SMALL = 5
FORMS = ("decomposed", "whole")
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
REPLAYS = 8  # of an operator in a CUDA graph, or one where it takes longer than this
SLOW = 20.0  # ms
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Step = Callable[[], object]


class Clock:
    """Medians of what takes turns."""

    def __init__(self, device: torch.device, seconds: float, turns: int) -> None:
        self.device, self.seconds, self.turns = device, seconds, turns
        self.on_gpu = device.type == "cuda"
        self.flush = torch.zeros(32 * 2**20 if self.on_gpu else 0, device=device)  # 128 MiB, more than caches hold

    def measure(self, step: Step) -> tuple[float, float]:
        """Milliseconds of the wall clock (on a GPU: between events) and of CPU time."""
        if self.on_gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step()
            end.record()
            end.synchronize()
            return start.elapsed_time(end), 0.0
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        return 1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - cpu)

    def captured(self, step: Step) -> tuple[Step, int]:
        """A CUDA graph, and how often it fills the GPU's cache with other things, by reading them, and does `step`."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # compiles, and chooses among forms
            replays = 1 if self.measure(step)[0] > SLOW else REPLAYS
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(replays):
                self.flush.sum()
                step()
        return graph.replay, replays

    def compare(self, steps: dict[str, Step], capture: bool = False) -> tuple[dict[str, dict[str, float]], dict]:
        """Each once to warm up, then in turns, at least `turns` times and until `seconds` are over; and what failed.

        With `capture`, on a GPU: as CUDA graphs, less the time of one that only empties the cache.
        """
        capture = capture and self.on_gpu
        failed: dict[str, str] = {}
        replays = dict.fromkeys(steps, 1)
        if capture:
            steps = {**steps, "nothing": lambda: None}
        for name, step in list(steps.items()):
            try:
                if capture:
                    steps[name], replays[name] = self.captured(step)
                steps[name]()
            except Exception as error:
                failed[name] = tell_failure(name, error)
                del steps[name]
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        start, turns = time.perf_counter(), 0
        while turns < self.turns or (time.perf_counter() - start < self.seconds and turns < 500):
            for name, step in steps.items():
                times[name].append(self.measure(step))
            turns += 1
        medians = {name: statistics.median(wall for wall, _ in pairs) / replays[name] for name, pairs in times.items()}
        if capture:
            nothing = medians.pop("nothing")
            medians = {name: ms - nothing for name, ms in medians.items()}
            if medians and not min(medians.values()) > 0:
                raise ZooError("Too short to be told from emptying the cache: take a larger --batch-size.")
        found = {name: {"ms": round(ms, 5 if self.on_gpu else 3)} for name, ms in medians.items()}
        if not self.on_gpu:
            for name in found:
                found[name]["cpu_ms"] = round(statistics.median(cpu for _, cpu in times[name]), 3)
        return found, failed

    def peaks(self, dtype: torch.dtype) -> dict[str, float]:
        """The machine's best here: operations of a matrix product, bytes read and written by a copy, each second."""
        side = 8192 if self.on_gpu else 2048
        factor = torch.float16 if self.on_gpu and dtype == torch.float32 else dtype
        matrix = torch.randn(side, side, device=self.device).to(factor)
        source = torch.empty((1024 if self.on_gpu else 256) * 2**20, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        steps: dict[str, Step] = {"product": lambda: matrix @ matrix, "copy": lambda: target.copy_(source)}
        fastest = {name: min(self.measure(step)[0] for _ in range(10)) for name, step in steps.items()}
        return {
            "gflops": round(2e-6 * side**3 / fastest["product"], 1),
            "gb_per_s": round(2e-6 * source.numel() / fastest["copy"], 1),
        }


def cost(found: dict[str, float]) -> float:
    return found.get("cpu_ms", found["ms"])


def meetings(side: int, taps: int) -> int:
    """How often a tap of a kernel meets a pixel along one axis."""
    return sum(max(0, side - abs(offset)) for offset in range(-(taps // 2), taps // 2 + 1))


def conv2d(x: Tensor, weight: Tensor) -> Tensor:
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(x, weight, padding=padding, groups=len(weight))


def compare_operators(
    clock: Clock, arguments: argparse.Namespace, dtype: torch.dtype, peaks: dict
) -> Iterator[dict[str, Any]]:
    """A row for each kernel, with `failed` for what went wrong."""
    for form in arguments.forms:
        for kernels in arguments.kernels:
            for stage, ((channels, side), edge) in enumerate(zip(STAGES, KERNELS[kernels], strict=True), start=1):
                edges = [(edge, SMALL), (SMALL, edge), (SMALL, SMALL)] if form == "decomposed" else [(edge, edge)]
                shape = (arguments.batch_size, channels, side, side)
                row = {"form": form, "kernels": kernels, "stage": stage, "shape": shape, "edges": edges}
                label = f"{form:<10} {kernels} stage {stage}"
                try:
                    tolerance = 1e-5 if arguments.ieee else TOLERANCES[arguments.dtype]
                    row["error"] = errors(clock.device, shape, edges, dtype, tolerance)
                    compare_operator(clock, shape, edges, dtype, peaks, row)
                except Exception as error:  # what went before is kept, and what follows may do
                    row["failed"] = tell_failure(label, error)
                else:
                    speedups = (f"{name} {row[name]['speedup']}" for name in ("forward", "forward_backward"))
                    print(f"{label}: " + "; ".join(speedups), flush=True)
                yield row


def tell_failure(label: str, error: Exception) -> str:
    message = str(error).strip().split("\n")[0]
    failure = message if isinstance(error, ZooError) else f"{type(error).__name__}: {message}"
    print(f"{label}: failed: {failure}", file=sys.stderr, flush=True)
    return failure


def errors(
    device: torch.device, shape: tuple[int, ...], edges: list[tuple[int, int]], dtype: torch.dtype, tolerance: float
) -> dict[str, float]:
    """How far ours and F.conv2d are off from float64, some images of `shape`: of output, or of a gradient, the largest.

    Raises ZooError where ours is further off than its type explains.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=device, generator=generator).to(dtype)

    images = min(shape[0], 16 if device.type == "cuda" else 2)
    x, grad = draw(images, *shape[1:]), draw(images, *shape[1:])
    weights = [draw(shape[1], 1, *edge) for edge in edges]

    def results(convolve: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (x, *weights)]
        outputs = [convolve(leaves[0], weight) for weight in leaves[1:]]
        return [*outputs, *torch.autograd.grad(outputs, leaves, [grad.to(dtype)] * len(outputs))]

    exact = results(conv2d, torch.float64)
    found = {}
    for name, convolve in (("ours", depthwise_conv2d), ("conv2d", conv2d)):
        pairs = zip(results(convolve, dtype), exact, strict=True)
        found[name] = max(((ours.double() - true).abs().max() / true.abs().max()).item() for ours, true in pairs)
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        from zoo.layers import large_kernel_programs as programs

        for program in (programs.band_program, programs.weight_program):
            program.cache.clear()  # a form is chosen anew for the whole batch
    if not found["ours"] < tolerance:
        raise ZooError(f"Ours is off by {found['ours']:.1e} of the largest value, more than the type explains.")
    return {name: float(f"{error:.2g}") for name, error in found.items()}


def compare_operator(
    clock: Clock,
    shape: tuple[int, ...],
    edges: list[tuple[int, int]],
    dtype: torch.dtype,
    peaks: dict,
    row: dict[str, Any],
) -> None:
    """Put into `row` forward, and forward and backward, of ours and F.conv2d in both formats, and the machine's limit.

    Raises ZooError at the end where ours failed.
    """
    torch.manual_seed(0)
    device = clock.device
    weights = [torch.randn(shape[1], 1, *edge, device=device, dtype=dtype, requires_grad=True) for edge in edges]
    frozen = [weight.detach() for weight in weights]
    forward: dict[str, Step] = {}
    both: dict[str, Step] = {}
    for name, memory_format in FORMATS.items():
        x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=memory_format)
        grad = torch.randn_like(x)
        leaf = x.clone().requires_grad_()
        tall, wide, small = frozen if len(frozen) == 3 else (frozen[0], None, None)

        def ours(x: Tensor = x, tall: Any = tall, wide: Any = wide, small: Any = small) -> object:
            return large_kernel_sum(x, tall, wide, small)

        def theirs(x: Tensor = x) -> object:
            total = conv2d(x, frozen[0])
            for weight in frozen[1:]:
                total = total + conv2d(x, weight)
            return total

        def training(convolve: Callable[..., Tensor], leaf: Tensor = leaf, grad: Tensor = grad) -> object:
            outputs = [convolve(leaf, weight) for weight in weights]
            return torch.autograd.grad(outputs, [leaf, *weights], [grad] * len(outputs))

        forward[f"ours_{name}"], forward[f"conv2d_{name}"] = ours, theirs
        both[f"ours_{name}"] = functools.partial(training, depthwise_conv2d)
        both[f"conv2d_{name}"] = functools.partial(training, conv2d)

    ours_failed: list[str] = []
    operations = 2 * shape[0] * shape[1] * sum(meetings(shape[2], h) * meetings(shape[3], w) for h, w in edges)
    map_bytes = torch.Size(shape).numel() * dtype.itemsize
    for name, steps, passes, maps in (
        ("forward", forward, 1, 2),
        ("forward_backward", both, 3, (1 + len(edges)) + (len(edges) + 1) + (1 + len(edges))),
    ):
        with torch.set_grad_enabled(name != "forward"):
            times, failed = clock.compare(steps, capture=True)
        ours_failed += [f"{name}, {side}: {text}" for side, text in failed.items() if side.startswith("ours")]
        arithmetic, traffic = passes * operations / peaks["gflops"] / 1e6, maps * map_bytes / peaks["gb_per_s"] / 1e6
        row[name] = {
            **times,
            "arithmetic_ms": round(arithmetic, 4),
            "traffic_ms": round(traffic, 4),
            "limit_ms": round(max(arithmetic, traffic), 4),
            "limited_by": "arithmetic" if arithmetic > traffic else "traffic",
            "share_of_bandwidth": {
                f: round(traffic / cost(times[f"ours_{f}"]), 3) for f in FORMATS if f"ours_{f}" in times
            },
            "speedup": {
                f: round(cost(times[f"conv2d_{f}"]) / cost(times[f"ours_{f}"]), 2)
                for f in FORMATS
                if {f"conv2d_{f}", f"ours_{f}"} <= times.keys()
            },
        }
        if failed:
            row[name]["failed"] = failed
    if ours_failed:
        raise ZooError("; ".join(ours_failed))


# --------------------------------------------------------------------------------------------------------------- models


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    settings: list[Any] = [torch.backends.cudnn.conv, torch.backends.cuda.matmul]  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


class NchwConv2d(nn.Conv2d):
    """A convolution of contiguous maps."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous())


def with_convolutions(model: nn.Module, kind: type[nn.Conv2d]) -> nn.Module:
    """A copy of `model` with PyTorch's convolution for ours, and its layers called one by one."""
    model = with_plain_mlps(model)
    for module in model.modules():
        if isinstance(module, DepthwiseConv2d):
            module.__class__ = kind  # type: ignore[assignment]
    return model


def with_plain_mlps(model: nn.Module) -> nn.Module:
    """A copy of `model` whose MLPs are not worked on in parts: a hook that does nothing keeps them as they are."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Mlp):
            module.register_forward_hook(lambda *_: None)
    return model


def compare_models(
    clock: Clock, batch_size: int, training: bool, skip: list[str], dtype: torch.dtype
) -> dict[str, Any]:
    torch.manual_seed(0)
    model = wake_layer_scales(zoo.create_model("slak_tiny", pretrained=False)).to(clock.device).train(training)
    models = {
        "plain_nchw": with_convolutions(model, NchwConv2d),
        "plain_channels_last": with_convolutions(model, nn.Conv2d).to(memory_format=torch.channels_last),
        "ours": model,
    }
    if not training:
        models["ours_optimized"] = zoo.optimize_for_inference(model)
    elif not clock.on_gpu:
        models["ours_kernels_alone"] = with_plain_mlps(model)
    models = {name: model for name, model in models.items() if name not in skip}
    images = torch.randn(batch_size, 3, 224, 224, device=clock.device)
    labels = torch.randint(1000, (batch_size,), device=clock.device)
    lowered = dtype if clock.on_gpu and dtype != torch.float32 else None

    def autocast() -> torch.autocast:
        return torch.autocast(clock.device.type, lowered, enabled=lowered is not None)

    def infer(name: str, exactly: bool = False) -> Tensor:
        x = images.contiguous(memory_format=torch.channels_last) if name == "plain_channels_last" else images
        with torch.inference_mode(), contextlib.nullcontext() if exactly else autocast():
            return models[name](x)

    optimizers = {}
    if training:
        optimizers = {name: torch.optim.AdamW(model.parameters(), 1e-6, fused=True) for name, model in models.items()}

    def train(name: str) -> object:
        x = images.contiguous(memory_format=torch.channels_last) if name == "plain_channels_last" else images
        with FastProducts() if name == "ours" and not clock.on_gpu else contextlib.nullcontext():
            with autocast():
                loss = F.cross_entropy(models[name](x), labels)
            loss.backward()
        optimizers[name].step()
        return optimizers[name].zero_grad()

    step = train if training else infer
    if not training:
        with without_tf32():
            expected, *others = (infer(name, exactly=True) for name in models)
        for name, found in zip(list(models)[1:], others, strict=True):
            error = ((found - expected).abs().max() / expected.abs().max()).item()
            if not error < TOLERANCE:
                raise ZooError(
                    f"{name} computes something else than the plain model: off by {error:.1e} of the largest."
                )
    times, failed = clock.compare({name: functools.partial(step, name) for name in models})
    if failed:
        raise ZooError("; ".join(f"{name}: {message}" for name, message in failed.items()))
    best = "ours" if training else "ours_optimized"
    speedup = {name: round(cost(times[name]) / cost(times[best]), 2) for name in models if name != best}
    return {**times, "speedup_of": best, "speedup": speedup}


# -------------------------------------------------------------------------------------------------------------- picture


def plot(report: dict[str, Any], path: Path) -> None:
    """Milliseconds of every operator beside the limit, and of the models."""
    rows = [row for row in report["operators"] if "failed" not in row]
    names = ["conv2d_nchw", "conv2d_channels_last", "ours_nchw", "ours_channels_last"]
    colors = ["0.75", "0.5", "C0", "C2"]
    figure = new_figure((13, 11))
    top, middle, bottom = figure.subplots(3, 1)  # decomposed kernels, labelled by the tall one, then whole ones
    for axes, what in ((top, "forward"), (middle, "forward_backward")):
        for i, (name, color) in enumerate(zip(names, colors, strict=True)):
            places = [place + 0.2 * (i - 1.5) for place in range(len(rows))]
            heights = [row[what].get(name, {}).get("ms", 0) for row in rows]
            axes.bar(places, heights, 0.2, color=color, label=name.replace("_", " "))
        for place, row in enumerate(rows):
            axes.hlines(row[what]["limit_ms"], place - 0.42, place + 0.42, color="C3", label=None if place else "limit")
        axes.set_yscale("log")
        axes.set_ylabel(f"{what.replace('_', ' and ')} (ms)")
        edges = ["x".join(str(edge) for edge in row["edges"][0]) for row in rows]
        labels = [f"{edge}\nstage {row['stage']}" for edge, row in zip(edges, rows, strict=True)]
        axes.set_xticks(range(len(rows)), labels, fontsize=7)
        axes.set_axisbelow(True)
        axes.grid(True, axis="y", color="0.9")
    title = f"{report['device']}, {report['settings']['dtype']}, batch {report['settings']['batch_size']}"
    top.legend(ncols=5, frameon=False, fontsize=8)
    top.set_title(f"Large depthwise kernels: {title}")
    shades = {"plain_nchw": "0.75", "plain_channels_last": "0.5", "ours": "C0", "ours_optimized": "C2"}
    shades |= {"ours_kernels_alone": "C9"}
    entries = [
        (f"{kind.replace('_', ' ')}, batch {batch}: {name.replace('_', ' ')}", found[name]["ms"], name)
        for kind, batches in report.get("models", {}).items()
        for batch, found in batches.items()
        for name in shades
        if name in found and "failed" not in found
    ]
    bottom.barh(
        [label for label, _, _ in entries], [ms for _, ms, _ in entries], color=[shades[n] for *_, n in entries]
    )
    bottom.invert_yaxis()
    bottom.set_xscale("log" if entries else "linear")
    bottom.tick_params(axis="y", labelsize=7)
    bottom.set_xlabel("slak_tiny at 224x224 (ms)")
    save_figure(figure, path)


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the operators, on a GPU of all")
    parser.add_argument("--ieee", action="store_true", help="on a GPU: all 24 bits of float32, in place of TF32")
    parser.add_argument("--batch-size", type=int, help="of the operators; 64 on a GPU, 2 on a CPU")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on each comparison, at least")
    parser.add_argument("--turns", type=int, default=3, help="that each side takes, at least")
    parser.add_argument("--only", choices=("operators", "models"), help="measure one part, keep the other's figures")
    parser.add_argument("--model-batches", nargs="+", type=int, help="64 on a GPU, 1 and 8 on a CPU")
    parser.add_argument("--mode", choices=("inference", "training_step"), help="measure the models in one mode")
    parser.add_argument("--skip", nargs="+", default=[], metavar="MODEL", help="models to leave out")
    parser.add_argument("--results", type=Path, default=FILE)
    arguments = parser.parse_args()
    device = torch.device("cuda" if gpu and arguments.device == "auto" else "cpu")
    key = "cpu" if device.type == "cpu" else f"gpu_{arguments.dtype}{'_ieee' * arguments.ieee}"
    picture = arguments.results.with_suffix(".png")
    picture = check_picture(picture if key == "cpu" else picture.with_stem(f"{picture.stem}_{key}"))
    arguments.batch_size = arguments.batch_size or (64 if device.type == "cuda" else 2)
    arguments.model_batches = arguments.model_batches or ([64] if device.type == "cuda" else [1, 8])
    torch.backends.cudnn.benchmark = True
    clock, dtype = Clock(device, arguments.seconds, arguments.turns), DTYPES[arguments.dtype]

    everything = json.loads(arguments.results.read_text()) if arguments.results.is_file() else {}
    report = everything.setdefault(key, {})
    report["commands"] = report.get("commands", {})
    report["device"] = device_and_threads(device)
    report["versions"] = versions("torch", *(("triton",) if device.type == "cuda" else ()))
    failures = 0

    def save() -> None:
        write_json(everything, arguments.results)

    with without_tf32() if arguments.ieee else contextlib.nullcontext():
        if arguments.only != "models":
            report["commands"]["operators"] = command()
            report["settings"] = {"batch_size": arguments.batch_size, "dtype": arguments.dtype}
            report["peaks"] = clock.peaks(dtype)
            report["operators"] = []
            for row in compare_operators(clock, arguments, dtype, report["peaks"]):
                report["operators"].append(row)
                failures += "failed" in row
                save()
        if arguments.only != "operators":
            for mode in (arguments.mode,) if arguments.mode else ("inference", "training_step"):
                for batch_size in arguments.model_batches:
                    label = f"slak_tiny {mode}, batch {batch_size}"
                    try:
                        found = compare_models(clock, batch_size, mode == "training_step", arguments.skip, dtype)
                        print(f"{label}: {found['speedup_of']} against {found['speedup']}", flush=True)
                    except Exception as error:
                        found = {"failed": tell_failure(label, error)}
                        failures += 1
                    modes = report.setdefault("models", {}).setdefault(mode, {})
                    modes[str(batch_size)] = {**found, "command": command()}
                    save()
    if "operators" in report:
        plot(report, picture)
    print(f"Written to {arguments.results}")
    if failures:
        raise ZooError(f"{failures} of the comparisons failed, as said above and under 'failed' in the results.")


if __name__ == "__main__":
    sys.exit(run_command(main))
