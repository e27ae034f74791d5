"""What each stitch of an SN-Net costs: a table and a plot, from one profile of each anchor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from zoo.errors import ConfigError
from zoo.plots import check_picture, new_figure, save_figure
from zoo.profiling.report import profile
from zoo.profiling.resolve import build, check_input_size, default_input_size
from zoo.units import humanize

if TYPE_CHECKING:
    from zoo.models.snnet import SNNet, Stitch

__all__ = ["StitchCost", "StitchCosts", "stitch_costs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StitchCost:
    """One stitch. MACs are for a batch of 1; one fused multiply-add counts one.

    `params` follows the authors' rule: of an anchor alone all; of a stitched path those of its patch embedding, blocks,
    stitching layers, and of the last anchor's patch mergings, norm and head.
    """

    stitch: int
    path: str
    params: int
    macs: int  # of convolution, linear layers and attention
    fvcore_total: int  # and of norms


@dataclass(frozen=True, slots=True, kw_only=True)
class StitchCosts:
    """The costs of every stitch, in the order of their numbers."""

    input_size: tuple[int, int, int]
    stitches: tuple[StitchCost, ...]

    def __iter__(self) -> Iterator[StitchCost]:
        return iter(self.stitches)

    def __getitem__(self, stitch: int) -> StitchCost:
        return self.stitches[stitch]

    def __len__(self) -> int:
        return len(self.stitches)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def table(self) -> str:
        """One line for each stitch."""
        width = max(len(cost.path) for cost in self)
        lines = [f"{'stitch':>6}  {'path':<{width}}  {'params':>8}  {'MACs':>8}  {'fvcore':>8}"]
        for cost in self:
            numbers = (cost.params, cost.macs, cost.fvcore_total)
            lines.append(f"{cost.stitch:>6}  {cost.path:<{width}}  " + "  ".join(f"{humanize(n):>8}" for n in numbers))
        return "\n".join(lines)

    def plot(self, path: str | Path, top1: Sequence[float] | None = None) -> Path:
        """Draw every stitch by its MACs into `path` (PNG, SVG or PDF), against its parameters or, if given, `top1` (%).

        Raises MissingDependencyError without matplotlib, ConfigError for a path that cannot be, or accuracies that are
        not one for each stitch.
        """
        if top1 is not None and len(top1) != len(self):
            raise ConfigError(f"There are {len(self)} stitches, but {len(top1)} accuracies.")
        path = check_picture(path)
        heights = [cost.params / 1e6 for cost in self] if top1 is None else list(top1)
        figure = new_figure((8, 5))
        axes = figure.add_subplot()
        for label, colour, size, stitched in (("stitches", "C0", 18, True), ("anchors alone", "C3", 60, False)):
            chosen = [cost for cost in self if (" > " in cost.path) == stitched]
            axes.scatter(
                [cost.macs / 1e9 for cost in chosen],
                [heights[cost.stitch] for cost in chosen],
                s=size,
                color=colour,
                marker="o" if stitched else "*",
                label=f"{label} ({len(chosen)})",
            )
        axes.set_xlabel("MACs (G, one fused multiply-add counts one)")
        axes.set_ylabel("parameters of the path (M)" if top1 is None else "top-1 (%)")
        axes.grid(True, color="0.92")
        axes.set_axisbelow(True)
        axes.legend(frameon=False)
        return save_figure(figure, path)


def stitch_costs(model: nn.Module | str, input_size: tuple[int, int, int] | None = None) -> StitchCosts:
    """The costs of every stitch of `model` at `input_size` (channels, height, width; by default the model's own).

    `model` is an SN-Net or its name; nothing is allocated for one that is named.
    Raises ConfigError for a model without stitches or of one path alone, and what `zoo.profile` raises.
    """
    model = build(model, device="meta") if isinstance(model, str) else model
    if not hasattr(model, "stitches"):
        raise ConfigError(f"{type(model).__name__} has no stitches: stitch_costs takes an SN-Net.")
    model = cast("SNNet", model)
    if not model.has_whole_anchors:
        raise ConfigError("This model holds one path alone: zoo.profile counts it, stitch_costs takes the whole.")
    input_size = default_input_size(model) if input_size is None else check_input_size(input_size)
    costs: dict[nn.Module, tuple[int, int, int]] = {}  # of a part: parameters, MACs, fvcore total
    for anchor in model.anchors:
        parts = dict(anchor.named_modules())
        for module in profile(anchor, input_size).modules:
            costs[parts[module.name]] = (module.params, module.macs, module.fvcore_total)
    found = (_cost(model, number, stitch, costs, input_size) for number, stitch in enumerate(model.stitches))
    return StitchCosts(input_size=input_size, stitches=tuple(found))


def _cost(
    model: SNNet,
    number: int,
    stitch: Stitch,
    costs: dict[nn.Module, tuple[int, int, int]],
    input_size: tuple[int, int, int],
) -> StitchCost:
    front: Any = model.anchors[stitch.anchors[0]]
    end: Any = model.anchors[stitch.anchors[-1]]
    path = f"anchor {stitch.anchors[0]}"
    for (last, first), anchor in zip(stitch.cuts, stitch.anchors[1:], strict=True):
        place = "block" if stitch.stage is None else f"stage {stitch.stage} block"
        path += f" to {place} {last} > anchor {anchor} from block {first}"
    if not stitch.cuts:
        params, macs, total = costs[end]
        return StitchCost(stitch=number, path=path, params=params, macs=macs, fvcore_total=total)
    side = model.reduction(f"anchors.0.layers.{stitch.stage}")
    tokens = prod(-(-length // side) for length in input_size[1:]) + getattr(front, "num_prefix_tokens", 0)
    params, macs, total = costs[front.patch_embed]
    params += costs[end.norm][0]
    if model.end_norm:
        total += costs[end.norm][2]
    behind = False
    for part in [*model.steps(stitch), end.head]:
        if part in costs:
            own = costs[part]
            if not behind and not hasattr(part, "mlp"):
                own = (0, *own[1:])  # the rule leaves out how the first anchor merges patches
        else:  # a stitching layer
            weight: Any = part.transform.weight
            own = (weight.numel() + weight.shape[0], tokens * weight.numel(), tokens * weight.numel())
            behind = True
        params, macs, total = params + own[0], macs + own[1], total + own[2]
    return StitchCost(stitch=number, path=path, params=params, macs=macs, fvcore_total=total)
