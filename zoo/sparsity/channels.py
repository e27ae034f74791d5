"""Channels: which stand or fall together, which are dead or nearly so, and a model without them.

Unstructured sparsity leaves some channels with few weights or none (Yin et al., "Dynamic Sparsity Is Channel-Level
Sparsity Learner" (Chase), NeurIPS 2023). Such channels are scored, retired step by step with their weights given back
to their layers, and in the end sliced out of the tensors, so that parameters, MACs and latency fall for real.

A channel is a producer's output: rows of a convolution or linear layer, what acts on it channel by channel (depthwise
kernels, batch norms, scales), and the columns of all layers that read it. Channels that a LayerNorm or GroupNorm mixes,
the input's, the classifier's and attention's cannot be removed without changing what is computed, and are left alone.
Groups are found by Torch-Pruning's dependency graph (Fang et al., "DepGraph", CVPR 2023, arXiv 2301.12900), and each is
proved before it is believed: the model without it must equal the model with its channels set to zero. That graph cannot
follow rotary positions, so those of language models are known: the hidden channels of their SwiGLUs.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.errors import ConfigError, MissingDependencyError, did_you_mean, first_line
from zoo.layers.wrappers import copied, unwrapped
from zoo.sparsity.densities import plain_name
from zoo.sparsity.masks import Masks, check_masks, masks_of
from zoo.units import shape_text

__all__ = [
    "ChannelGroup",
    "channel_counts",
    "channel_groups",
    "channel_positions",
    "dead_channels",
    "kept_widths",
    "resize",
    "retire_channels",
    "shrink",
    "slice_tensor",
    "weakest_channels",
]

_logger = logging.getLogger(__name__)

Channels = Mapping[str, Tensor | Sequence[int]]  # name of a group -> the numbers of some of its channels


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slices:
    """One dimension of one tensor, and the channel of the group that each of its elements belongs to (-1: none)."""

    tensor: str
    dim: int
    role: str  # "incoming" weights make a channel, "outgoing" ones read it, and "own" is what else it has
    channels: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChannelGroup:
    """Channels that are made, changed and read by the same layers, `size` of them."""

    name: str  # of the first layer that makes them
    size: int
    input_size: tuple[int, int, int] | None  # that the model was looked at with; None for a language model
    slices: tuple[Slices, ...]

    def __repr__(self) -> str:
        return f"ChannelGroup({self.name!r}, {self.size} channels, {len(self.slices)} tensors)"


# -------------------------------------------------------------------------------------------------------------- finding


def channel_groups(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> dict[str, ChannelGroup]:
    """The groups of channels that `model`, which is left as it is, can lose, by name and in the order of its layers.

    `input_size` is (channels, height, width), by default what the model's `pretrained_cfg` says. Runs the model a few
    times on one image. Raises MissingDependencyError without Torch-Pruning, ConfigError for a model that cannot be
    traced, or gives several tensors. Of a language model these are its SwiGLUs' hidden channels, for which it is not
    run and nothing else needed.
    """
    if hasattr(unwrapped(model), "make_cache"):
        if input_size is not None:
            raise ConfigError(f"{type(model).__name__} takes tokens: leave out input_size.")
        return _swiglu_groups(unwrapped(model))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch_pruning
    except ImportError as error:
        raise MissingDependencyError('Channels need Torch-Pruning: pip install "backbone-zoo[sparsity]".') from error
    twin = _twin(model)
    size = _input_size(unwrapped(model), input_size)
    images = torch.randn(1, *size, dtype=torch.float64, generator=_generator())
    graph = torch_pruning.DependencyGraph()
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # about parameters outside of modules, which the proof looks after
            if not isinstance(made := twin(images), Tensor):
                raise TypeError(f"it gives no tensor, but a {type(made).__name__}")
            graph.build_dependency(twin, images)
            found = graph.get_all_groups(ignored_layers=_classifiers(twin), root_module_types=(nn.Conv2d, nn.Linear))
            kinds: dict[tuple[str, ...], list[ChannelGroup]] = {}  # by what they are made of
            for item in found:
                with contextlib.suppress(IndexError):
                    if (group := _read_group(item, twin, size)) is not None:
                        kind = (type(part.dep.target.module).__name__ for part in item)
                        kinds.setdefault(tuple(kind), []).append(group)
    except Exception as error:
        reason = first_line(error)
        raise ConfigError(
            f"{type(model).__name__} cannot be traced on one image of {shape_text(images.shape[1:])}: {reason}"
        ) from error
    groups = [group for alike in kinds.values() for group in alike]
    if not _equal_without(twin, groups, images):
        groups = [group for alike in kinds.values() for group in _proved(twin, alike, images)]
    order = {name: position for position, (name, _) in enumerate(twin.named_modules())}
    return {group.name: group for group in sorted(groups, key=lambda group: order[group.name])}


def _swiglu_groups(model: nn.Module) -> dict[str, ChannelGroup]:
    """A channel of a SwiGLU is a row of both matrices before it and a column of the one that reads it."""
    from zoo.layers.decoder import SwiGLU

    groups = {}
    for name, module in model.named_modules():
        if isinstance(module, SwiGLU):
            size = module.down_proj.in_features
            parts = (("gate_proj", 0, "incoming"), ("up_proj", 0, "incoming"), ("down_proj", 1, "outgoing"))
            slices = tuple(
                Slices(tensor=f"{name}.{linear}.weight", dim=dim, role=role, channels=torch.arange(size))
                for linear, dim, role in parts
            )
            first = f"{name}.gate_proj"
            groups[first] = ChannelGroup(name=first, size=size, input_size=None, slices=slices)
    return groups


def _proved(twin: nn.Module, alike: Sequence[ChannelGroup], images: Tensor) -> list[ChannelGroup]:
    """Those of some groups of one kind that the model can lose channels of; a kind whose first cannot, cannot."""
    if _equal_without(twin, alike, images):
        return list(alike)
    proved = []
    if _equal_without(twin, alike[:1], images):
        proved = [group for group in alike if _equal_without(twin, [group], images)]
    stay = ", ".join(group.name for group in alike if group not in proved)
    _logger.info("These channels depend on others, and stay: %s.", stay)
    return proved


def _twin(model: nn.Module) -> nn.Module:
    """A copy of `model` in double precision, in evaluation, with weights among which no mistake stays hidden."""
    if any(tensor.is_meta for tensor in model.parameters()):
        raise ConfigError(f"{type(model).__name__} is on the meta device: it has no channels to look at.")
    twin = copied(unwrapped(model)).cpu().double().eval().requires_grad_(True)
    generator = _generator()
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            if not tensor.is_floating_point():
                continue
            if tensor.ndim > 1:
                tensor.normal_(std=math.prod(tensor.shape[1:]) ** -0.5, generator=generator)
            else:
                tensor.uniform_(0.5, 1.5, generator=generator)
    return twin


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _input_size(model: nn.Module, given: tuple[int, int, int] | None) -> tuple[int, int, int]:
    from zoo.profiling.resolve import check_input_size, default_input_size

    return default_input_size(model) if given is None else check_input_size(given)


def _classifiers(model: nn.Module) -> list[nn.Module]:
    """The layers whose outputs are the model's own: their channels are classes."""
    get = getattr(model, "get_classifier", None)
    heads = get() if callable(get) else [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    found: list[nn.Module] = []
    for head in heads if isinstance(heads, list | tuple) else [heads]:
        linear = [m for m in head.modules() if isinstance(m, nn.Linear | nn.Conv2d)] if head is not None else []
        found += linear[-1:]
    return found


def _read_group(found: Any, model: nn.Module, input_size: tuple[int, int, int]) -> ChannelGroup | None:
    """A group of Torch-Pruning's in our words, or None if it holds anything that mixes channels."""
    modules = {id(module): name for name, module in model.named_modules()}
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    size = len(found[0].idxs)
    slices: dict[tuple[str, int], Slices] = {}

    def add(tensor: str, dim: int, role: str, item: Any, length: int) -> None:
        channels = slices[tensor, dim].channels if (tensor, dim) in slices else torch.full((length,), -1)
        if len(item.idxs) != len(item.root_idxs) or not all(0 <= index < length for index in item.idxs):
            raise IndexError(tensor)  # reshaped on the way, beyond what Torch-Pruning follows
        channels[torch.tensor(item.idxs)] = torch.tensor(item.root_idxs)
        slices[tensor, dim] = Slices(tensor=tensor, dim=dim, role=role, channels=channels)

    first: list[str] = []
    for item in found:
        target = item.dep.target.module
        if id(target) in parameters:
            wide = [dim for dim, length in enumerate(target.shape) if length > 1]
            if len(wide) != 1:
                return None
            add(parameters[id(target)], wide[0], "own", item, target.shape[wide[0]])
            continue
        if not any(True for _ in (*target.parameters(recurse=False), *target.buffers(recurse=False))):
            continue  # an operator
        name = modules[id(target)]
        reads = found._DG.is_in_channel_pruning_fn(item.dep.handler)
        if isinstance(target, nn.Conv2d | nn.Linear):
            depthwise = isinstance(target, nn.Conv2d) and target.groups > 1
            if depthwise and not target.groups == target.in_channels == target.out_channels:
                return None
            if reads and not depthwise:
                add(f"{name}.weight", 1, "outgoing", item, target.weight.shape[1])
                continue
            add(f"{name}.weight", 0, "incoming", item, target.weight.shape[0])
            if target.bias is not None:
                add(f"{name}.bias", 0, "own", item, target.bias.shape[0])
            if not depthwise:
                first.append(name)
        elif isinstance(target, _BatchNorm):
            for key in ("weight", "bias", "running_mean", "running_var"):
                if getattr(target, key) is not None:
                    add(f"{name}.{key}", 0, "own", item, target.num_features)
        else:
            return None
    if size < 2 or not first or not any(part.role == "outgoing" for part in slices.values()):
        return None
    order = list(modules.values())
    return ChannelGroup(
        name=min(first, key=order.index), size=size, input_size=input_size, slices=tuple(slices.values())
    )


@torch.no_grad()
def _equal_without(twin: nn.Module, groups: Sequence[ChannelGroup], images: Tensor) -> bool:
    """Whether the model without some channels of `groups` computes what it does with these channels set to zero."""
    generator = _generator()
    channels = {g.name: torch.randperm(g.size, generator=generator)[: max(1, g.size // 3)] for g in groups}
    by_name = {group.name: group for group in groups}
    zeroed, smaller = copy.deepcopy(twin), copy.deepcopy(twin)
    tensors = _tensors(zeroed)
    for name, positions in channel_positions(zeroed, by_name, channels).items():
        tensors[name].masked_fill_(positions, 0)
    try:
        _slice(smaller, _touched(by_name, channels))
        expected, found = zeroed(images), smaller(images)
        return expected.shape == found.shape and bool((expected - found).norm() <= 1e-9 * expected.norm())
    except (RuntimeError, ValueError, TypeError):
        return False


# -------------------------------------------------------------------------------------------------------------- scoring


def channel_counts(groups: Mapping[str, ChannelGroup], masks: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The number of non-zero weights of every channel, incoming and outgoing, for each group.

    `masks` are of weights (or the weights themselves) by name; those without one are dense and count in full.
    """
    return {
        name: (_count(group, masks, "incoming"), _count(group, masks, "outgoing")) for name, group in groups.items()
    }


def _count(group: ChannelGroup, masks: Mapping[str, Tensor], role: str) -> Tensor:
    total = torch.zeros(group.size, dtype=torch.long)
    for part in group.slices:
        if part.role == role and part.tensor in masks:
            mask = masks[part.tensor] != 0
            others = [dim for dim in range(mask.ndim) if dim != part.dim]
            mine = part.channels >= 0
            total.index_add_(0, part.channels[mine], mask.sum(others).cpu()[mine])
    return total


def _all_masks(model: nn.Module, groups: Mapping[str, ChannelGroup], masks: Mapping[str, Tensor] | None) -> Masks:
    """A mask for every weight that makes or reads a channel: `masks`, or full; from the weights' zeros by default."""
    masks = masks_of(model) if masks is None else masks
    check_masks(model, masks)
    tensors = _tensors(model)
    names = {part.tensor for group in groups.values() for part in group.slices if part.role != "own"}
    return {
        name: masks[name] if name in masks else torch.ones(tensors[name].shape, dtype=torch.bool)
        for name in sorted(names)
    }


def dead_channels(
    model: nn.Module, groups: Mapping[str, ChannelGroup], masks: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The channels that no weight makes or no weight reads, for each group that has any.

    `masks` say which weights count; by default those that are not zero. One channel of each group always stays.
    A channel that nothing reads changes nothing when it goes; one that nothing makes is a constant, and goes with it.
    """
    dead = {}
    for name, (incoming, outgoing) in channel_counts(groups, _all_masks(model, groups, masks)).items():
        numbers = ((incoming == 0) | (outgoing == 0)).nonzero().flatten()[: groups[name].size - 1]
        if len(numbers):
            dead[name] = numbers
    return dead


def weakest_channels(
    model: nn.Module,
    groups: Mapping[str, ChannelGroup],
    share: float,
    masks: Mapping[str, Tensor] | None = None,
    *,
    multiple: int = 1,
) -> dict[str, Tensor]:
    """The `share` of all channels of each group that have the fewest weights, made or read by: Chase's candidates.

    Dead channels come first, then those with the fewest incoming and outgoing weights together, of equal ones the
    first. What stays of a group is at least one channel, and a multiple of `multiple` (8 suits CPUs, 16 GPUs) where the
    group is that large.
    Raises ConfigError unless 0 <= share < 1.
    """
    if not (isinstance(share, int | float) and 0 <= share < 1):
        raise ConfigError(f"The share of channels to remove is from 0 up to, but not, 1; it is {share!r}.")
    if type(multiple) is not int or multiple < 1:
        raise ConfigError(f"multiple must be a whole number from 1 up, not {multiple!r}.")
    chosen = {}
    for name, (incoming, outgoing) in channel_counts(groups, _all_masks(model, groups, masks)).items():
        size = groups[name].size
        stay = max(1, size - int(share * size + 1e-9))
        stay = min(size, -(-stay // multiple) * multiple)
        if stay < size:
            weights = (incoming + outgoing).masked_fill((incoming == 0) | (outgoing == 0), 0)
            chosen[name] = weights.argsort(stable=True)[: size - stay].sort().values
    return chosen


# ------------------------------------------------------------------------------------------------------------- retiring


def channel_positions(model: nn.Module, groups: Mapping[str, ChannelGroup], channels: Channels) -> dict[str, Tensor]:
    """For each parameter that these channels touch, a mask that is True at their elements. Raises ConfigError."""
    tensors = dict(_parameters(model))
    found: dict[str, Tensor] = {}
    for name, dims in _touched(groups, channels).items():
        if name not in tensors:
            continue  # a buffer
        positions = torch.zeros(tensors[name].shape, dtype=torch.bool)
        for dim, gone in dims.items():
            positions |= gone.view([-1 if i == dim else 1 for i in range(positions.ndim)])
        found[name] = positions
    return found


def retire_channels(
    model: nn.Module,
    groups: Mapping[str, ChannelGroup],
    channels: Channels,
    masks: Mapping[str, Tensor],
    *,
    retired: Channels | None = None,
    scores: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Masks:
    """New masks in which no weight makes or reads `channels`, and their weights are given back to their layers.

    As many positions as a layer loses grow in its other channels: those with the highest `scores` (such as gradients'
    magnitudes), or random ones. Where it has no room for all, it becomes dense there. `retired` are channels that went
    before and stay out. Layers without a mask get one that leaves out the channels. The masks' device is kept; the
    model is not changed: `apply_masks` does that. Raises ConfigError for channels that the groups do not have.
    """
    before = _all_masks(model, groups, masks)
    closed = channel_positions(model, groups, channels)
    shut = {name: positions.clone() for name, positions in closed.items()}
    for name, positions in channel_positions(model, groups, retired or {}).items():
        shut[name] = shut[name] | positions if name in shut else positions
    new = dict(masks)
    for name, positions in shut.items():
        if name not in before:
            continue  # biases and norms: what nothing reads need not be masked
        mask = before[name].cpu().bool()
        kept = mask & ~positions
        if name in masks:
            lost = int((mask & closed[name]).sum()) if name in closed else 0
            free = (~mask & ~positions).flatten().nonzero().flatten()
            if scores is not None and name in scores:
                best = scores[name].detach().cpu().flatten()[free].argsort(descending=True, stable=True)
            else:
                best = torch.randperm(len(free), generator=generator)
            kept.view(-1)[free[best[:lost]]] = True
        new[name] = kept.to(before[name].device)
    return new


# ------------------------------------------------------------------------------------------------------------ shrinking


def shrink(
    model: nn.Module,
    groups: Mapping[str, ChannelGroup],
    channels: Channels,
    masks: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Slice `channels` out of `model`, in place, and out of `masks`, which are returned.

    What is left computes what the model did with these channels set to zero: exactly, for channels that nothing reads.
    Parameters stay the same objects with other shapes, and lose their gradients; `slice_tensor` fits an optimizer's
    state to them. `groups` are used up: ask for them again. A shrunk model of the zoo is saved, published and opened
    again like any other. Raises ConfigError for channels that the groups do not have, or where none would be left.
    """
    model = unwrapped(model)
    touched = _touched(groups, channels)
    check_masks(model, masks or {})
    if touched:
        _slice(model, touched)
        _describe(model, next(iter(groups.values())).input_size)
    return {name: _without(mask, touched.get(name, {})) for name, mask in (masks or {}).items()}


def slice_tensor(tensor: Tensor, name: str, groups: Mapping[str, ChannelGroup], channels: Channels) -> Tensor:
    """What is left of a tensor that has the shape of `name` (its mask, momentum, average) without `channels`."""
    return _without(tensor, _touched(groups, channels).get(name, {}))


def _without(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    for dim, gone in dims.items():
        if len(gone) != tensor.shape[dim]:
            raise ConfigError(
                f"The groups are of channels that are gone, or of another model: {len(gone)} of a tensor's "
                f"{tensor.shape[dim]}. Find them anew with channel_groups."
            )
        tensor = tensor.index_select(dim, (~gone).nonzero().flatten().to(tensor.device))
    return tensor


def _touched(groups: Mapping[str, ChannelGroup], channels: Channels) -> dict[str, dict[int, Tensor]]:
    """For each tensor and dimension, which of its elements go. Raises ConfigError."""
    touched: dict[str, dict[int, Tensor]] = {}
    for name, numbers in channels.items():
        if name not in groups:
            raise ConfigError(f"There is no group of channels {name!r}.{did_you_mean(name, groups)}")
        group = groups[name]
        going = torch.as_tensor(numbers).cpu().unique()
        if going.numel() and (going.dtype == torch.bool or going.is_floating_point()):
            raise ConfigError(f"Channels of {name} are given by number, as integers, and not as {going.tolist()}.")
        going = going.long()
        if going.numel() and not 0 <= int(going[0]) <= int(going[-1]) < group.size:
            raise ConfigError(f"{name} has {group.size} channels, 0 to {group.size - 1}, and not {going.tolist()}.")
        if len(going) == group.size:
            raise ConfigError(f"{name} would lose all of its {group.size} channels: leave at least one.")
        if not going.numel():
            continue
        for part in group.slices:
            dims = touched.setdefault(part.tensor, {})
            gone = torch.isin(part.channels, going)
            dims[part.dim] = dims[part.dim] | gone if part.dim in dims else gone
    return touched


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in unwrapped(model).named_parameters(remove_duplicate=False):
        yield plain_name(name), parameter


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    buffers = {plain_name(name): buffer for name, buffer in unwrapped(model).named_buffers(remove_duplicate=False)}
    return {**buffers, **dict(_parameters(model))}


@torch.no_grad()
def _slice(model: nn.Module, touched: Mapping[str, Mapping[int, Tensor]]) -> None:
    tensors = _tensors(model)
    widths = model.__dict__.setdefault("_kept_widths", {})
    left = {name: _without(tensors[name].data, dims).contiguous() for name, dims in touched.items()}
    for name, dims in touched.items():
        tensor = tensors[name]
        tensor.data, tensor.grad = left[name], None
        before = widths.get(name, [None] * tensor.ndim)
        widths[name] = [tensor.shape[dim] if dim in dims else before[dim] for dim in range(tensor.ndim)]
    _set_widths(model, touched)


def _set_widths(model: nn.Module, names: Iterable[str]) -> None:
    """What layers say of their own widths, after the shapes of their tensors."""
    modules = {plain_name(name): module for name, module in unwrapped(model).named_modules()}
    for name in dict.fromkeys(name.rpartition(".")[0] for name in names):
        module: Any = modules[name]
        if isinstance(module, nn.Conv2d):
            module.out_channels = module.weight.shape[0]
            if module.groups > 1:  # depthwise, as no other is sliced
                module.groups = module.out_channels
            module.in_channels = module.weight.shape[1] * module.groups
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, _BatchNorm):
            module.num_features = len(module.running_mean if module.weight is None else module.weight)
    describe = getattr(model, "describe_widths", None)
    if callable(describe):
        describe()


def kept_widths(model: nn.Module) -> dict[str, Any]:
    """What sets a model that `shrink` made smaller apart from its architecture, as plain data; empty for any other.

    `tensors` holds the shapes of the tensors that became smaller, with None for dimensions that are as the architecture
    has them; `features`, `num_features` and `head_hidden_size` are what timm's contract says of widths.
    """
    widths: dict[str, list[int | None]] = model.__dict__.get("_kept_widths", {})
    tensors = _tensors(model)
    shapes = {
        name: [None if length is None else tensors[name].shape[dim] for dim, length in enumerate(shape)]
        for name, shape in widths.items()
        if name in tensors and tensors[name].ndim == len(shape)
    }
    if not shapes:
        return {}
    said = {key: getattr(model, key) for key in ("num_features", "head_hidden_size") if hasattr(model, key)}
    return {"tensors": shapes, "features": [info["num_chs"] for info in _feature_info(model)], **said}


@torch.no_grad()
def resize(model: nn.Module, widths: Mapping[str, Any]) -> None:
    """Bring a freshly built model to the widths that `kept_widths` stated of another, to load its weights. In place.

    Tensors that the model does not have, as those of a classifier that was left out, are passed over. The values of the
    others are the first ones of what was there. Raises ConfigError for widths that cannot be.
    """
    tensors = _tensors(model)
    shapes = {}
    if not isinstance(widths, Mapping) or not isinstance(widths.get("tensors"), Mapping):
        raise ConfigError("kept_widths is what zoo.sparsity.kept_widths says of a shrunk model, with its tensors.")
    features = widths.get("features", ())
    if not isinstance(features, list | tuple) or not all(type(n) is int and n > 0 for n in features):
        raise ConfigError(f"kept_widths says that the features are {features!r}, and not how wide each is.")
    for name, shape in widths["tensors"].items():
        if name not in tensors:
            continue
        whole = tensors[name].shape
        if (
            not isinstance(shape, list | tuple)
            or len(shape) != len(whole)
            or not all(n is None or (type(n) is int and 0 < n <= most) for n, most in zip(shape, whole, strict=True))
        ):
            raise ConfigError(f"{name} is {shape_text(whole)} in {type(model).__name__}, and cannot become {shape!r}.")
        shapes[name] = [most if n is None else n for n, most in zip(shape, whole, strict=True)]
    for name, shape in shapes.items():
        tensors[name].data = tensors[name].data[tuple(slice(n) for n in shape)].clone()
    model.__dict__["_kept_widths"] = {name: list(widths["tensors"][name]) for name in shapes}
    _set_widths(model, shapes)
    for info, channels in zip(_feature_info(model), features, strict=False):
        info["num_chs"] = channels
    for key in ("num_features", "head_hidden_size"):
        if key in widths and hasattr(model, key):
            setattr(model, key, widths[key])


def _feature_info(model: nn.Module) -> list[dict[str, Any]]:
    infos: Any = getattr(model, "feature_info", None) or []
    return infos if isinstance(infos, list) else getattr(infos, "info", [])


def _describe(model: nn.Module, input_size: tuple[int, int, int] | None) -> None:
    """Bring what timm's contract says of widths up to date: a forward on the meta device shows them."""
    from zoo.profiling.flops import meta_twin

    infos = _feature_info(model)
    if not infos or input_size is None or not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
        return
    twin: Any = meta_twin(model)
    seen: dict[str, Tensor] = {}
    hooks = []
    for info in infos:
        name = info["module"]

        def before(module: nn.Module, inputs: Any, name: str = name) -> None:
            seen[name] = inputs[0]

        def after(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            seen[name] = output

        layer = twin.get_submodule(name)
        is_before = info.get("hook_type") == "forward_pre"
        hooks.append(layer.register_forward_pre_hook(before) if is_before else layer.register_forward_hook(after))
    with torch.no_grad():
        features = twin.forward_features(torch.empty(1, *input_size, device="meta"))
        last = twin.forward_head(features, pre_logits=True)
    for info in infos:
        if isinstance(seen.get(info["module"]), Tensor) and seen[info["module"]].ndim == 4:
            info["num_chs"] = seen[info["module"]].shape[1]
    if features.ndim in (3, 4):
        model.num_features = features.shape[1 if features.ndim == 4 else -1]
    if last.ndim == 2 or getattr(model, "task", None) == "segmentation":
        model.head_hidden_size = last.shape[1]
