"""`profile`: what a model costs, counted without running it. The conventions are stated in `zoo.profiling.flops`."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError, first_line
from zoo.layers.wrappers import unwrapped
from zoo.loading import load_model, resolve_path
from zoo.plots import check_picture, new_figure, save_figure
from zoo.profiling.effective import ZEROS, Effective, check_sparsity, effective_costs
from zoo.profiling.flops import Trace, meta_twin
from zoo.profiling.resolve import build, check_channels, check_count, check_input_size, default_input_size
from zoo.registry import list_models
from zoo.units import humanize, shape_text

CONVENTION = (
    "MACs: convolution, linear, matmul and attention, one fused multiply-add counts one. "
    "fvcore total: MACs and norms, adaptive pooling, resampling. "
    "Activations: output elements of the operators that have MACs. "
    "Effective: without the zeros in weights of convolutions and linear layers; MACs in proportion, layer by layer."
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModuleCost:
    """The cost of one module. `own_*` is the share that none of its submodules has.

    A tensor that appears more than once below a module counts once in `params`; a module that runs more than once
    counts its MACs every time.
    """

    name: str  # "" is the model itself
    type: str
    calls: int
    params: int
    own_params: int
    macs: int
    own_macs: int
    fvcore_total: int
    own_fvcore_total: int
    activations: int
    own_activations: int
    weight_macs: int  # `own_macs`, and those of products with its `weight` that others do, as where it is never called

    @property
    def depth(self) -> int:
        """0 for the model itself, 1 for its children, and so on."""
        return self.name.count(".") + 1 if self.name else 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OperatorCost:
    """The cost of all calls of one operator."""

    name: str
    calls: int
    macs: int
    fvcore_total: int
    activations: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What one forward in eval mode costs. MACs, fvcore total and activations are those of the whole batch."""

    name: str
    input_size: tuple[int, ...]
    batch_size: int
    params: int  # frozen ones included; a shared tensor counts once
    trainable_params: int
    frozen_params: int  # without gradient, and buffers that their module lists as `frozen_weights`
    macs: int
    fvcore_total: int
    activations: int
    weight_bytes: Mapping[str, int]  # of the parameters, by dtype
    operators: tuple[OperatorCost, ...]  # the costliest first
    modules: tuple[ModuleCost, ...]  # in the order of `named_modules`
    unknown_operators: Mapping[str, int]  # operators without a handler, and how often they ran
    uncalled_modules: tuple[str, ...]  # with weights, yet never called: unused, or used (and counted) by one above them
    traced_on: str  # "meta", or "cpu" for a model that looks at the values of its tensors
    effective: Effective | None = None  # costs without zeros; None where the weights are not known

    @property
    def complete(self) -> bool:
        """Whether every operator that ran is one that we know how to count."""
        return not self.unknown_operators

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**dataclasses.asdict(self), "convention": CONVENTION}

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=indent)

    def summary(self) -> str:
        """The totals in a few lines."""
        share = ""
        if self.frozen_params:
            share = f" ({self.trainable_params:,} trainable, {self.frozen_params:,} frozen)"
        weights = ", ".join(f"{humanize(size)}B {dtype}" for dtype, size in self.weight_bytes.items())
        lines = [
            f"{self.name}, input {self.batch_size} x {' x '.join(map(str, self.input_size))}",
            f"  parameters    {self.params:,}{share}",
            f"  weights       {weights or 'none'}",
            f"  MACs          {self.macs:,} ({humanize(self.macs)})",
            f"  fvcore total  {self.fvcore_total:,} ({humanize(self.fvcore_total)})",
            f"  activations   {self.activations:,} ({humanize(self.activations)})",
        ]
        if self.effective and (self.effective.density < 1 or self.effective.rule != ZEROS):
            lines.append(f"  effective     {self.effective}")
        if self.unknown_operators:
            listed = ", ".join(f"{name} ({count}x)" for name, count in self.unknown_operators.items())
            lines.append(f"  NOT COUNTED   operators without a handler: {listed}")
        else:
            lines.append("  coverage      every operator that ran is accounted for")
        if self.uncalled_modules:
            lines.append(f"  never called  {', '.join(self.uncalled_modules)}")
        return "\n".join(lines)

    def table(self, depth: int = 2, width: int = 120) -> str:
        """The totals, the cost of every module down to `depth`, and of every operator, as text.

        Each row holds what lies below it too. Modules that have neither parameters nor MACs are left out.
        Raises ConfigError for a negative depth.
        """
        from rich import box
        from rich.console import Console
        from rich.table import Table

        check_count("depth", depth, least=0)
        console = Console(width=width, color_system=None)
        with console.capture() as capture:
            console.print(self.summary(), highlight=False)
            console.print()
            table = Table("module", "type", box=box.SIMPLE_HEAD, pad_edge=False)
            for heading in ("params", "%", "MACs", "%", "activations", "%"):
                table.add_column(heading, justify="right", no_wrap=True)
            for module in self.modules:
                if module.depth > depth or not (module.params or module.macs or module.activations):
                    continue
                label = "  " * module.depth + (module.name.rpartition(".")[2] or self.name)
                row = [label, module.type]
                for part, whole in (
                    (module.params, self.params),
                    (module.macs, self.macs),
                    (module.activations, self.activations),
                ):
                    row += [humanize(part), f"{part / whole:.1%}" if whole else "-"]
                table.add_row(*row)
            console.print(table)
            table = Table("operator", box=box.SIMPLE_HEAD, pad_edge=False)
            for heading in ("calls", "MACs", "fvcore total", "activations"):
                table.add_column(heading, justify="right", no_wrap=True)
            for operator in self.operators:
                costs = (operator.macs, operator.fvcore_total, operator.activations)
                table.add_row(operator.name, str(operator.calls), *map(humanize, costs))
            console.print(table)
            console.print(CONVENTION, highlight=False)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def __str__(self) -> str:
        return self.table(depth=1)

    def plot(self, path: str | Path, depth: int = 2) -> Path:
        """Draw where MACs, parameters and activations lie, module by module at `depth`, into `path` (PNG, SVG, PDF).

        What a module above that depth computes itself has a bar of its own, so that the bars add up to the whole.
        Raises MissingDependencyError without matplotlib, ConfigError for a path or depth that cannot be.
        """
        check_count("depth", depth)
        path = check_picture(path)
        bars = self._bars(depth)
        if not bars:
            raise ConfigError(f"{self.name} has neither parameters nor MACs: there is nothing to draw.")
        figure = new_figure((12, 1.6 + 0.28 * len(bars)))
        panels = figure.subplots(1, 3, sharey=True)
        totals = (("MACs", self.macs), ("parameters", self.params), ("activations", self.activations))
        for panel, (title, total), column in zip(
            panels, totals, zip(*(costs for _, costs in bars), strict=True), strict=True
        ):
            shares = [100 * cost / max(total, 1) for cost in column]
            drawn = panel.barh([name for name, _ in bars], shares, color="C0", height=0.7)
            labels = [
                f"{humanize(cost)}  {share:.1f}%" if cost else "" for cost, share in zip(column, shares, strict=True)
            ]
            panel.bar_label(drawn, labels, padding=3, fontsize=8)
            panel.set_title(f"{title}: {humanize(total)}")
            panel.set_xlim(0, max(shares) * 1.45 or 1)
            panel.set_xlabel("% of the model")
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].invert_yaxis()
        size = shape_text(self.input_size)
        figure.suptitle(f"{self.name}, batch {self.batch_size} of {size}. One fused multiply-add counts one MAC.")
        return save_figure(figure, path)

    def _bars(self, depth: int) -> list[tuple[str, tuple[int, int, int]]]:
        """(label, (MACs, parameters, activations)) of the modules at `depth`, and of what those above do themselves."""
        bars = []
        for module in self.modules:
            if module.depth == depth:
                bars.append((module.name, (module.macs, module.params, module.activations)))
            elif module.depth < depth:
                label = module.name or self.name
                bars.append((label, (module.own_macs, module.own_params, module.own_activations)))
        return [bar for bar in bars if any(bar[1])]


def profile(
    model: nn.Module | str,
    input_size: tuple[int, int, int] | None = None,
    batch_size: int = 1,
    *,
    checkpoint_path: str | Path | None = None,
    tokens: int | None = None,
    sparsity: float | None = None,
    sparsity_rule: str | None = None,
) -> Profile:
    """Count what `model` costs in eval mode, without running it: its forward is traced on the meta device.

    Of a language model it is a `zoo.profiling.LanguageProfile`: the costs of one more token, and of the prompt.

    Args:
        model: a module, which is left as it is, or a name: the zoo's models first, then timm's (`"timm/NAME"` is
            always timm's). A model by name is built without memory for its weights; the folder of a run or a model
            is loaded, so that `effective` counts its zeros.
        input_size: (channels, height, width) of one image; by default what the model's `pretrained_cfg` says.
        batch_size: images at a time; MACs and activations grow with it.
        tokens: of a language model: length of the prompt, and how many tokens one more sees, itself among them (128).
        checkpoint_path: for a name: the weights whose zeros `effective` counts, as `zoo.create_model` takes them.
        sparsity: share of the weights that `effective` takes to be zero, instead of counting them.
        sparsity_rule: how that is spread over the layers: "uniform", "er" or "erk" (`zoo.sparsity`); by default
            "uniform".

    A model whose forward looks at the values of its tensors cannot run on the meta device; it is traced on the CPU.

    Raises:
        UnknownModelError: no model of that name; names the nearest.
        ConfigError: a size that makes no sense, or that the model does not take; says why.
        CheckpointError, DownloadError: a checkpoint that does not fit or cannot be read.
    """
    check_count("batch_size", batch_size)
    if sparsity_rule is not None and sparsity is None:
        raise ConfigError(
            "sparsity_rule= (--sparsity-rule) says how zeros are spread over the layers: say with sparsity= "
            "(--sparsity) how many."
        )
    sparsity_rule = sparsity_rule or "uniform"
    check_sparsity(sparsity, sparsity_rule)
    if checkpoint_path is not None and sparsity is not None:
        raise ConfigError("sparsity= states what checkpoint_path= holds: give one of the two.")
    if checkpoint_path is not None and not isinstance(model, str):
        raise ConfigError("checkpoint_path= goes with the name of a model: a module has its weights already.")
    if input_size is not None:
        input_size = check_input_size(input_size)
    if isinstance(model, str):
        name = model
        is_path = model not in list_models() and resolve_path(model) != model
        has_weights = is_path or checkpoint_path is not None
        path = None if checkpoint_path is None else str(checkpoint_path)
        original = load_model(model, path) if has_weights else build(model, "meta")
        model = original if has_weights else model
    elif isinstance(model, nn.Module):
        original = unwrapped(model)
        name = _name_of(original)
    else:
        raise ConfigError(f"profile() takes a module or the name of a model, not {type(model).__name__}.")
    if any(nn.parameter.is_lazy(tensor) for tensor in original.parameters()):
        raise ConfigError(f"{name} has lazy layers, whose weights have no shape yet: run it once, then profile it.")
    if any(isinstance(module, torch.jit.ScriptModule) for module in original.modules()):
        raise ConfigError(
            f"{name} has scripted modules, which cannot be looked into: profile the model they came from."
        )
    if hasattr(original, "make_cache"):
        if input_size is not None:
            raise ConfigError(f"{name} takes tokens and not images: say how many with tokens=, not input_size=.")
        from zoo.profiling.language import profile_language

        return profile_language(original, name, tokens, batch_size, sparsity, sparsity_rule)
    if tokens is not None:
        raise ConfigError(f"{name} takes images and not tokens: leave out tokens=.")
    size = default_input_size(original) if input_size is None else input_size
    check_channels(original, size, name)

    trace, traced_on = _trace(model, original, (batch_size, *size), name)
    return Profile(
        name=name,
        input_size=size,
        batch_size=batch_size,
        traced_on=traced_on,
        **costs_of(original, trace, sparsity, sparsity_rule),
    )


def costs_of(original: nn.Module, trace: Trace, sparsity: float | None, sparsity_rule: str) -> dict[str, Any]:
    """The fields of a `Profile` that come of a trace of `original`, or of its copy, and of its weights."""
    weights = _weights(original)
    total: Counter[str] = Counter()
    for (_, quantity), count in trace.counts[""].items():
        total[quantity] += count
    trainable = sum(t.numel() for t in weights if t.requires_grad)
    params = sum(t.numel() for t in weights)
    weight_bytes: Counter[str] = Counter()
    for tensor in weights:
        weight_bytes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.element_size()
    modules = tuple(_modules(original, trace))
    return {
        "params": params,
        "trainable_params": trainable,
        "frozen_params": params - trainable,
        "macs": total["macs"],
        "fvcore_total": total["fvcore_total"],
        "activations": total["activations"],
        "weight_bytes": dict(weight_bytes),
        "operators": _operators(trace),
        "modules": modules,
        "unknown_operators": dict(trace.unknown),
        "uncalled_modules": tuple(_uncalled(original, trace)),
        "effective": effective_costs(original, modules, sparsity, sparsity_rule),
    }


def _name_of(model: nn.Module) -> str:
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    return cfg.get("architecture") or type(model).__name__


def _trace(given: nn.Module | str, original: nn.Module, shape: tuple[int, ...], name: str) -> tuple[Trace, str]:
    """The trace of a copy on the meta device, or on the CPU where the model needs values; and which it was."""
    dtype = next((t.dtype for t in original.parameters() if t.is_floating_point()), torch.float32)
    images = torch.empty(shape, dtype=dtype, device="meta")
    try:  # a model that was built for this needs no copy
        return Trace(original.eval() if isinstance(given, str) else meta_twin(original), (images,)), "meta"
    except Exception as error:
        failure = error
    try:
        with torch.no_grad(), torch.device("meta"):  # untraced, for what the model itself has to say
            (build(given, "meta").eval() if isinstance(given, str) else meta_twin(original))(images)
    except Exception as error:
        failure = error
        needs_values = isinstance(error, NotImplementedError) or bool(re.search(r"\bmeta\b", str(error), re.IGNORECASE))
    else:
        needs_values = True
    if needs_values:
        copied = build(given, "cpu") if isinstance(given, str) else copy.deepcopy(original)
        if not any(t.is_meta for t in (*copied.parameters(), *copied.buffers())):
            try:
                return Trace(copied.cpu().eval(), (torch.zeros(shape, dtype=dtype),)), "cpu"
            except Exception as error:
                failure = error
    reason = first_line(failure)
    channels = shape_text(shape[1:])
    raise ConfigError(f"{name} cannot run on a batch of {shape[0]} at {channels}: {reason}") from failure


def _frozen_buffers(module: nn.Module) -> list[Tensor]:
    """The buffers of `module` itself that are weights which never learn."""
    buffers = (module._buffers.get(name) for name in getattr(module, "frozen_weights", ()))
    return [buffer for buffer in buffers if buffer is not None]


def _weights(module: nn.Module) -> list[Tensor]:
    """Parameters and frozen weights of `module` and all below it, each once."""
    tensors: dict[int, Tensor] = {id(p): p for p in module.parameters()}
    tensors.update((id(b), b) for below in module.modules() for b in _frozen_buffers(below))
    return list(tensors.values())


def _operators(trace: Trace) -> tuple[OperatorCost, ...]:
    counts = trace.counts[""]
    operators = [
        OperatorCost(
            name=name,
            calls=counts[name, "calls"],
            macs=counts[name, "macs"],
            fvcore_total=counts[name, "fvcore_total"],
            activations=counts[name, "activations"],
        )
        for name in {name for name, _ in counts}
    ]
    return tuple(sorted(operators, key=lambda o: (-o.macs, -o.fvcore_total, o.name)))


def _modules(model: nn.Module, trace: Trace) -> Iterator[ModuleCost]:
    below = {}  # module name -> its totals
    names = dict(model.named_modules())
    for name, module in names.items():
        totals = Counter({"params": sum(t.numel() for t in _weights(module))})
        for (_, quantity), count in trace.counts[name].items():
            totals[quantity] += count
        below[name] = totals
    own = {name: Counter(totals) for name, totals in below.items()}
    for name in names:
        if name:
            own[name.rpartition(".")[0]].subtract(below[name])
    lent = _lent(names, own, trace)
    for name, module in names.items():
        own_params = {id(t): t.numel() for t in module._parameters.values() if t is not None}
        own_params.update((id(b), b.numel()) for b in _frozen_buffers(module))
        yield ModuleCost(
            name=name,
            type=type(module).__name__,
            calls=trace.calls[name],
            params=below[name]["params"],
            own_params=sum(own_params.values()),
            macs=below[name]["macs"],
            own_macs=own[name]["macs"],
            fvcore_total=below[name]["fvcore_total"],
            own_fvcore_total=own[name]["fvcore_total"],
            activations=below[name]["activations"],
            own_activations=own[name]["activations"],
            weight_macs=own[name]["macs"] + lent.get(name, 0),
        )


def _lent(modules: Mapping[str, nn.Module], own: Mapping[str, Counter[str]], trace: Trace) -> dict[str, int]:
    """The MACs of products with a module's `weight` that are done elsewhere, as where it is never called."""
    holders: dict[int, list[str]] = {}
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None:
            holders.setdefault(id(weight), []).append(name)
    lent = {}
    for names in holders.values():
        elsewhere = trace.weight_macs[f"{names[0]}.weight".lstrip(".")] - sum(own[name]["macs"] for name in names)
        lent[next((name for name in names if not trace.calls[name]), names[0])] = max(elsewhere, 0)
    return lent


def _uncalled(model: nn.Module, trace: Trace) -> Iterator[str]:
    """Names of the outermost modules that hold weights and of which nothing ran; mere containers are passed over."""
    containers = {nn.ModuleList.forward, nn.ModuleDict.forward, nn.Module.forward}
    ran = {""}  # modules that ran, and those above them
    for name, calls in trace.calls.items():
        if calls:
            ran.update(name[:end] for end, letter in enumerate(name) if letter == ".")
            ran.add(name)
    silent: set[str] = set()
    for name, module in model.named_modules():
        inside = any(name[:end] in silent for end, letter in enumerate(name) if letter == ".")
        if name not in ran and not inside and type(module).forward not in containers and _weights(module):
            silent.add(name)
            yield name
