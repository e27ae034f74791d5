"""What a sparse model is: the density of every layer, the costs that are left, and a picture of its masks."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import CheckpointError, ConfigError, did_you_mean
from zoo.layers.wrappers import copied, unwrapped
from zoo.plots import check_picture, new_figure, save_figure
from zoo.profiling import profile
from zoo.profiling.effective import sparse_weights
from zoo.sparsity.densities import is_depthwise, outputs_first
from zoo.sparsity.masks import MASKS, check_masks, follows_n_m
from zoo.units import humanize, shape_text

__all__ = ["SparseLayer", "SparseModel", "report"]

CONVENTION = (
    "Density: share of weights that are not zero, or that masks keep. Effective parameters: without the others. MACs: "
    "convolution, linear, matmul and attention, one fused multiply-add counts one; effective: each layer's times its "
    "density. Ordinary kernels multiply by zero as by anything else: only channels that are removed save time."
)
PICTURES = 12  # layers whose masks are drawn, unless they are chosen


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SparseLayer:
    """The weight of one convolution or linear layer."""

    name: str  # of the parameter
    shape: tuple[int, ...]
    params: int
    nonzeros: int
    macs: int  # of one input
    empty_outputs: int  # output channels without any weight
    empty_inputs: int  # input channels that no weight reads
    follows_2_4: bool  # at most two of every four weights along the inputs
    depthwise: bool  # each input channel has kernels of its own

    @property
    def density(self) -> float:
        return self.nonzeros / self.params

    @property
    def effective_macs(self) -> int:
        return round(self.macs * self.density)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SparseModel:
    """A model with zeros among its weights. MACs are those of one input."""

    name: str
    input_size: tuple[int, ...]
    params: int
    effective_params: int
    macs: int
    effective_macs: int
    layers: tuple[SparseLayer, ...]  # in the model's order; layers without zeros, too
    masks: Mapping[str, Tensor] = dataclasses.field(repr=False, compare=False)  # True where a weight counts

    @property
    def density(self) -> float:
        """Of all weights of convolutions and linear layers together."""
        return sum(layer.nonzeros for layer in self.layers) / sum(layer.params for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; without the masks."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "masks"}
        layers = [
            {**dataclasses.asdict(layer), "density": layer.density, "effective_macs": layer.effective_macs}
            for layer in self.layers
        ]
        return {**fields, "layers": layers, "density": self.density, "convention": CONVENTION}

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=indent)

    def summary(self) -> str:
        """The totals in a few lines."""
        zeros = sum(layer.nonzeros < layer.params for layer in self.layers)
        lines = [
            f"{self.name}, input {' x '.join(map(str, self.input_size))}",
            f"  density     {self.density:.2%} of the weights of {len(self.layers)} layers; {zeros} have zeros",
            f"  parameters  {self.params:,}, effective {self.effective_params:,}",
            f"  MACs        {self.macs:,}, effective {self.effective_macs:,}",
        ]
        if zeros and all(layer.follows_2_4 for layer in self.layers if layer.nonzeros < layer.params):
            lines.append("  pattern     2:4 in every layer that has zeros")
        return "\n".join(lines)

    def table(self) -> str:
        """The totals, and density, shape and costs of every layer, as text."""
        from rich import box
        from rich.console import Console
        from rich.table import Table

        console = Console(width=1000, color_system=None)  # names stay whole
        with console.capture() as capture:
            console.print(self.summary(), highlight=False)
            console.print()
            table = Table("layer", "shape", box=box.SIMPLE_HEAD, pad_edge=False)
            for heading in ("density", "params", "effective", "MACs", "effective", "empty out", "empty in"):
                table.add_column(heading, justify="right", no_wrap=True)
            for layer in self.layers:
                costs = (layer.params, layer.nonzeros, layer.macs, layer.effective_macs)
                empty = (str(count or "") for count in (layer.empty_outputs, layer.empty_inputs))
                shape = shape_text(layer.shape)
                table.add_row(
                    layer.name.removesuffix(".weight"), shape, f"{layer.density:.1%}", *map(humanize, costs), *empty
                )
            console.print(table)
            console.print(textwrap.fill(CONVENTION, 120), highlight=False)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def __str__(self) -> str:
        return self.table()

    def plot(self, path: str | Path, layers: str | Sequence[str] | None = None) -> Path:
        """Draw the density of every layer, and the masks of some, into `path` (PNG, SVG, PDF).

        A dark point is a weight that is there. Of a depthwise kernel the picture shows, for each of its taps, the share
        of channels that have it; of other layers, outputs down and inputs across, the share of taps between the two.
        `layers` are names of weights, in which `*` and `?` may stand; by default up to twelve that have zeros, evenly
        from first to last. Raises MissingDependencyError without matplotlib, ConfigError for a path that will not do,
        and for layers that are not there.
        """
        path = check_picture(path)
        chosen = self._chosen(layers)
        columns = 4
        rows = math.ceil(len(chosen) / columns)
        bars = max(2.4, 0.13 * len(self.layers) + 0.8)
        heights = [bars, 2.9 * rows] if rows else [bars]
        figure = new_figure((13, sum(heights)))
        upper, *lower = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        axes = upper.add_subplot()
        names = [layer.name.removesuffix(".weight") for layer in self.layers]
        drawn = axes.barh(names, [100 * layer.density for layer in self.layers], color="C0", height=0.75)
        labels = [f"{layer.density:.1%} of {humanize(layer.params)}" for layer in self.layers]
        axes.bar_label(drawn, labels, padding=3, fontsize=6)
        axes.set_xlim(0, 118)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel("density (% of weights that are not zero)")
        axes.tick_params(axis="y", labelsize=6)
        axes.margins(y=0.005)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        if lower:
            panels = lower[0].subplots(rows, columns, squeeze=False).flat
            for panel in panels[len(chosen) :]:
                panel.set_axis_off()
            for panel, layer in zip(panels, chosen, strict=False):
                mask = self.masks[layer.name]
                height, width = _image(mask, layer.depthwise, most=max(mask.shape)).shape
                shown = panel.imshow(
                    _image(mask, layer.depthwise),
                    cmap="Blues",
                    vmin=0,
                    vmax=1,
                    aspect="auto",
                    interpolation="nearest",
                    extent=(0, width, height, 0),
                )
                panel.set_title(f"{_end(layer.name.removesuffix('.weight'))}\n{layer.density:.1%}", fontsize=7)
                panel.tick_params(labelsize=5)
            lower[0].colorbar(shown, ax=lower[0].axes, shrink=0.6, label="share of weights that are there")
        figure.suptitle(
            f"{self.name}: density {self.density:.1%}, "
            f"parameters {humanize(self.params)} (effective {humanize(self.effective_params)}), "
            f"MACs {humanize(self.macs)} (effective {humanize(self.effective_macs)})"
        )
        return save_figure(figure, path)

    def _chosen(self, layers: str | Sequence[str] | None) -> list[SparseLayer]:
        if layers is None:
            sparse = [layer for layer in self.layers if layer.nonzeros < layer.params]
            step = max(1, (len(sparse) - 1) / (PICTURES - 1)) if len(sparse) > 1 else 1
            return [sparse[round(i * step)] for i in range(min(PICTURES, len(sparse)))]
        names = [layer.name for layer in self.layers]
        found: dict[str, None] = {}
        for pattern in [layers] if isinstance(layers, str) else layers:
            matching = [n for n in names if fnmatch.fnmatchcase(n, pattern) or n.startswith(f"{pattern}.")]
            if not matching:
                parts = {name.rsplit(".", count)[0] for name in names for count in range(name.count(".") + 1)}
                raise ConfigError(f"{self.name} has no weight called {pattern!r}.{did_you_mean(pattern, parts)}")
            found |= dict.fromkeys(matching)
        return [layer for layer in self.layers if layer.name in found]


def report(
    model: nn.Module,
    input_size: tuple[int, int, int] | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
) -> SparseModel:
    """Count the zeros among the weights of `model`, layer by layer, and the costs that are left without them.

    `input_size` is (channels, height, width), by default what the model's `pretrained_cfg` says. Weights that `masks`
    are of count as these say: a weight that has just appeared is zero, and kept. Raises ConfigError for a model without
    weights that can be sparse, or on the meta device, CheckpointError for masks of another model or of other weights,
    and what `zoo.profile` raises.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"report() takes a module with weights, not {type(model).__name__}.")
    if getattr(model, "quantization", None) is not None:
        raise ConfigError("A quantised model has no weights to count zeros in: give the one that it was made from.")
    if masks:
        model = copied(model)
        with torch.no_grad():
            for name, parameter in check_masks(model, masks).items():
                mask = masks[name].to(parameter.device, torch.bool)
                if beyond := int(parameter.masked_fill(mask, 0).count_nonzero()):
                    raise CheckpointError(
                        f"The masks are not of these weights: {name} has {beyond} that its mask leaves out and that "
                        f"are not zero. Remove {MASKS}, or give the masks of this checkpoint."
                    )
                parameter.copy_(mask)  # as weights of one, none of which is zero by chance
    costs = profile(model, input_size=input_size)
    model = unwrapped(model)
    weights = sparse_weights(model)
    if not weights:
        raise ConfigError(f"{costs.name} has no weights of convolutions or linear layers.")
    if costs.effective is None:
        raise ConfigError(f"{costs.name} is on the meta device: it has no weights to look at.")
    macs = {module.name: module.weight_macs for module in costs.modules}
    layers, found, seen = [], {}, set()
    for name, weight in weights.items():
        if id(weight) in seen:  # shared, and counted with the first
            continue
        seen.add(id(weight))
        key = f"{name}.weight" if name else "weight"
        mask = found[key] = (weight.detach() != 0).cpu()
        layer = model.get_submodule(name)
        depthwise = is_depthwise(layer) and mask.shape[1] == 1
        pairs = _pairs(mask, layer)
        layers.append(
            SparseLayer(
                name=key,
                shape=tuple(mask.shape),
                params=mask.numel(),
                nonzeros=int(mask.count_nonzero()),
                macs=sum(macs[other] for other, w in weights.items() if w is weight),
                empty_outputs=int((~pairs.any(2)).sum()),
                empty_inputs=0 if depthwise else int((~pairs.any(1)).sum()),
                follows_2_4=follows_n_m(outputs_first(mask, layer), 2, 4) and not depthwise,
                depthwise=depthwise,
            )
        )
    return SparseModel(
        name=costs.name,
        input_size=costs.input_size,
        params=costs.params,
        effective_params=costs.effective.params,
        macs=costs.macs,
        effective_macs=costs.effective.macs,
        layers=tuple(layers),
        masks=found,
    )


def _pairs(mask: Tensor, layer: nn.Module) -> Tensor:
    """Which outputs have a weight for which inputs, (groups, outputs of one, inputs of one)."""
    pairs = mask.flatten(2).any(2) if mask.ndim > 2 else mask
    pairs = pairs.unflatten(0, (getattr(layer, "groups", 1), -1))
    return pairs.transpose(1, 2) if getattr(layer, "transposed", False) else pairs


def _image(mask: Tensor, depthwise: bool, most: int = 160) -> Tensor:
    """A mask as a picture of at most `most` points a side: the share of weights that each point stands for."""
    picture = mask.float()
    if depthwise:
        picture = picture.mean((0, 1)).reshape(-1, mask.shape[-1])
    elif mask.ndim > 2:
        picture = picture.flatten(2).mean(2)
    height, width = picture.shape
    return nn.functional.adaptive_avg_pool2d(picture[None], (min(most, height), min(most, width)))[0]


def _end(name: str, most: int = 38) -> str:
    return name if len(name) <= most else f"...{name[-most + 3 :]}"
