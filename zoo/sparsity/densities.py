"""Which weights of a model can be sparse, and how dense each of them is to be."""

from __future__ import annotations

import fnmatch
import heapq
import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from zoo.errors import ConfigError, did_you_mean, some
from zoo.layers.wrappers import unwrapped

__all__ = ["RULES", "apportion", "counts", "densities", "er", "erk", "layers_left_out", "sparse_parameters", "uniform"]

Shapes = Mapping[str, Sequence[int]]
STANDARDISED = ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")  # timm's


# --------------------------------------------------------------------------------------------------------------- layers


def sparse_parameters(model: nn.Module, layers: str | Sequence[str] = "all") -> dict[str, nn.Parameter]:
    """The weights of `model` that `layers` chooses for sparsity, by name; a shared weight once.

    Args:
        model: what data-parallel and compiled wrappers add to its names is left off.
        layers: "all" (weights of convolutions and linear layers, classifier included), "decomposed" (of them the
            depthwise kernels that are taller than wide or wider than tall, as SLaK's large ones), or patterns: names
            of modules or parameters in which `*` and `?` may stand; a module stands for all below it.

    Biases, norms, scales and tables are never sparse, nor are `layers_left_out`. Raises ConfigError for a pattern that
    matches nothing, and where there is no such weight.
    """
    modules = {plain_name(name): module for name, module in unwrapped(model).named_modules()}
    parameters = {plain_name(name): parameter for name, parameter in unwrapped(model).named_parameters()}
    tables = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    able = {name: p for name, p in parameters.items() if _can_be_sparse(name, modules) and id(p) not in tables}
    what = type(model).__name__
    if isinstance(layers, Sequence) and len(layers) == 1 and layers[0] in ("all", "decomposed"):
        layers = layers[0]
    if layers == "all":
        if not able:
            raise ConfigError(f"{what} has no weights of convolutions or linear layers to make sparse.")
        return able
    if layers == "decomposed":
        chosen = {
            name: p
            for name, p in able.items()
            if is_depthwise(modules[name.rpartition(".")[0]]) and p.ndim == 4 and p.shape[2] != p.shape[3]
        }
        if not chosen:
            raise ConfigError(
                f"{what} has no decomposed kernels (depthwise and not square, as SLaK's): choose its layers by name, "
                "or all."
            )
        return chosen
    patterns = [layers] if isinstance(layers, str) else layers
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"layers is all, decomposed, or names of layers, and not {layers!r}.")
    # what is shared has several names, any of which may be meant
    places = [plain_name(name) for name, _ in unwrapped(model).named_modules(remove_duplicate=False)]
    every = {plain_name(name): p for name, p in unwrapped(model).named_parameters(remove_duplicate=False)}
    names: dict[str, None] = {}
    for pattern in patterns:
        found = [name for name in (*places, *every) if name and fnmatch.fnmatchcase(name, pattern)]
        if not found:
            if pattern in ("all", "decomposed"):
                raise ConfigError(f"layers {pattern!r} stands alone, and not in a list with others.")
            known = [name for name in ("all", "decomposed", *modules, *able) if name]
            near = did_you_mean(pattern, known) or f" There are: {some(able, 6)}."
            raise ConfigError(f"Nothing in {what} is called {pattern!r}, so it cannot be made sparse.{near}")
        meant = {id(p) for name, p in every.items() if any(name == top or name.startswith(f"{top}.") for top in found)}
        below = [name for name, parameter in able.items() if id(parameter) in meant]
        if not below:
            raise ConfigError(
                f"{pattern!r} matches {some(found, 6)} in {what}, which holds no convolution or linear layer with a "
                "weight of its own."
            )
        names |= dict.fromkeys(below)
    if not names:
        raise ConfigError(f"layers chooses nothing in {what}: say all, decomposed, or names of layers.")
    return {name: able[name] for name in able if name in names}


def plain_name(name: str) -> str:
    """A name in an unwrapped model without what torch.compile adds to it for parts that were compiled alone."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def layers_left_out(model: nn.Module) -> list[str]:
    """Layers that multiply by weights and stay dense.

    Convolutions and linear layers that make the weight they use of others, whose zeros it would not have (timm's with
    weight standardisation, those with weight norm); torch's attention and recurrent layers, which hold several in one.
    """
    return [
        plain_name(name)
        for name, module in unwrapped(model).named_modules()
        if isinstance(module, nn.RNNBase)
        or (isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None)
        or (has_weight(module) and not _has_own_weight(module))
    ]


def has_weight(module: nn.Module | None) -> bool:
    """Whether it is a convolution or linear layer: no other multiplies by what is called its weight."""
    return isinstance(module, nn.Linear | _ConvNd)


def is_depthwise(module: nn.Module) -> bool:
    """Whether it is a convolution of each channel by itself, of several."""
    return isinstance(module, _ConvNd) and module.groups == module.in_channels > 1


def outputs_first(tensor: Tensor, module: nn.Module | None) -> Tensor:
    """A weight or mask with outputs before inputs, as all have it but transposed convolutions: a view."""
    return tensor.transpose(0, 1) if isinstance(module, _ConvNd) and module.transposed else tensor


def _has_own_weight(module: nn.Module) -> bool:
    return type(module).__name__ not in STANDARDISED and "weight" in {**module._parameters, **module._buffers}


def _can_be_sparse(name: str, modules: Mapping[str, nn.Module]) -> bool:
    owner = modules.get(name.rpartition(".")[0])
    return name.rpartition(".")[2] == "weight" and owner is not None and has_weight(owner) and _has_own_weight(owner)


# ------------------------------------------------------------------------------------------------------------ densities
# A density is the share of a weight's elements that may be non-zero: 1 - sparsity.


def uniform(shapes: Shapes, density: float) -> dict[str, float]:
    """The same density for every layer."""
    return dict.fromkeys(shapes, _checked(density))


def er(shapes: Shapes, density: float) -> dict[str, float]:
    """Erdos-Renyi: the density of a layer goes with (inputs + outputs) / (inputs * outputs).

    Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity Inspired by
    Network Science", 2018, arXiv 1707.04780, equation 1. The kernel's size does not count: see `erk`.
    """
    return _proportional({name: shape[:2] for name, shape in shapes.items()}, shapes, density)


def erk(shapes: Shapes, density: float) -> dict[str, float]:
    """Erdos-Renyi kernel: the density of a layer goes with the sum of its dimensions over their product.

    Evci et al., "Rigging the Lottery", ICML 2020, arXiv 1911.11134, section 3. Layers whose share would exceed 1 are
    dense, and the others share what is left, so that `density` of all weights remain.
    """
    return _proportional(shapes, shapes, density)


def _proportional(dimensions: Shapes, shapes: Shapes, density: float) -> dict[str, float]:
    density = _checked(density)
    for name, shape in shapes.items():
        if not shape or not all(size > 0 for size in shape):
            raise ConfigError(f"{name} has no weights to make sparse: its shape is {tuple(shape)}.")
    raw = {name: sum(shape) / math.prod(shape) for name, shape in dimensions.items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while len(dense) < len(shapes):
        rest = [name for name in shapes if name not in dense]
        budget = density * sum(sizes[name] for name in rest) - (1 - density) * sum(sizes[name] for name in dense)
        epsilon = budget / sum(raw[name] * sizes[name] for name in rest)
        most = max(raw[name] for name in rest)
        if epsilon * most <= 1:
            return {name: 1.0 if name in dense else epsilon * raw[name] for name in shapes}
        dense.update(name for name in rest if raw[name] == most)
    return dict.fromkeys(shapes, 1.0)


RULES = {"uniform": uniform, "er": er, "erk": erk}


def densities(shapes: Shapes, density: float, rule: str = "erk") -> dict[str, float]:
    """The density of every layer by a rule of `RULES`. Raises ConfigError for an unknown one."""
    if rule not in RULES:
        raise ConfigError(
            f"There is no density rule {rule!r}.{did_you_mean(rule, RULES)} There are: {', '.join(RULES)}."
        )
    return RULES[rule](shapes, density)


def counts(shapes: Shapes, layer_densities: Mapping[str, float]) -> dict[str, int]:
    """How many weights of each layer are non-zero, in whole numbers whose sum is the nearest to the densities'.

    Every layer is within one weight of its own density: the largest remainders are rounded up. Raises ConfigError for
    densities that are none.
    """
    for name in shapes:
        density = layer_densities.get(name)
        if not (isinstance(density, int | float) and 0 <= density <= 1 + 1e-9):
            raise ConfigError(f"The density of {name} must be from 0 to 1, not {density!r}.")
    exact = {name: layer_densities[name] * math.prod(shape) for name, shape in shapes.items()}
    whole = {name: math.floor(share + 1e-9) for name, share in exact.items()}
    left = round(sum(exact.values())) - sum(whole.values())
    by_remainder = sorted(exact, key=lambda name: whole[name] - exact[name])
    for name in by_remainder[: max(left, 0)]:
        whole[name] += 1
    return whole


def apportion(total: int, weights: Mapping[str, int]) -> dict[str, int]:
    """Whole shares of `total` in proportion to `weights`, of which none becomes smaller when `total` grows.

    Webster's method: each place goes to whoever's share, with half a place more, is the smallest against its weight.
    With the largest remainders of `counts` a share would shrink now and then.
    """
    weighty = [name for name, weight in weights.items() if weight > 0]
    # what everybody has at this point of the order is not more than the total: rounding adds a half each at most
    scale = max(total - len(weighty) / 2, 0) / max(sum(weights.values()), 1)
    shares = {name: math.floor(scale * weight + 0.5) for name, weight in weights.items()}
    turns = [((shares[name] + 0.5) / weights[name], place, name) for place, name in enumerate(weighty)]
    heapq.heapify(turns)
    for _ in range(total - sum(shares.values()) if turns else 0):
        _, place, name = turns[0]
        shares[name] += 1
        heapq.heapreplace(turns, ((shares[name] + 0.5) / weights[name], place, name))
    return shares


def _checked(density: float) -> float:
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise ConfigError(f"A density is a number above 0 and up to 1 (1 - sparsity), not {density!r}.")
    return float(density)
