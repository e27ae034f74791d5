"""What the parts of models that bring their fast form along have in common."""

# annotations must be types, not text: fx writes them into the code that it generates

import functools
from typing import Any

import torch
from torch import Tensor, nn

# on which forms depend, and which no type tells
SETTINGS = (
    *("kernel_size", "stride", "padding", "dilation", "padding_mode"),
    *("num_groups", "count_include_pad", "ceil_mode", "divisor_override", "approximate"),
)


class HasFastForm(nn.Module):
    """A part that computes the same in less work: at inference, by its class's `fast_form(self) -> nn.Module | None`,
    or in training, by its own `forward`.

    It remembers what the constructor made it of. Where other modules took their places, or other settings, it is
    computed as it stands (`is_as_made`), and a form need not ask what they do; so it is where `fast_form` gives None.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        build, knows = cls.__init__, bool({"fast_form", "forward"} & cls.__dict__.keys())

        @functools.wraps(build)
        def build_and_remember(self: Any, *args: Any, **options: Any) -> None:
            build(self, *args, **options)
            if knows or "_made_of" not in self.__dict__:  # what a subclass exchanges, its base's forms do not know
                self.__dict__["_made_of"] = _parts(self)

        cls.__init__ = build_and_remember  # type: ignore[method-assign]


class HasNumbers(nn.Module):
    """A part of a fast form with weights that operators take as numbers; they are in its state dict all the same."""

    numbers: tuple[float, ...]

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.numbers, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.numbers = tuple(state.flatten().tolist())


def is_as_made(module: nn.Module) -> bool:
    """Whether a `HasFastForm` is made of what its constructor made it of; True for other modules."""
    return not isinstance(module, HasFastForm) or module.__dict__.get("_made_of") == _parts(module)


def is_alike(part: nn.Module, other: nn.Module | None) -> bool:
    """Whether two modules without their parts compute the same at inference from the same weights."""
    from timm.layers import DropBlock2d, DropPath  # language models start without timm

    nothing = (nn.Identity, nn.Dropout, nn.Dropout2d, DropBlock2d, DropPath)
    if isinstance(part, nothing) and (other is None or isinstance(other, nothing)):  # timm writes None at a rate of 0
        return True
    if other is None:
        return False
    return _facts(part) == _facts(other) and part.__dict__.get("eps") == other.__dict__.get("eps")


def _parts(module: nn.Module) -> list[tuple[Any, ...]]:
    return [(name, *_facts(part)) for name, part in module.named_modules(remove_duplicate=False) if name]


def _facts(part: nn.Module) -> tuple[Any, ...]:
    stated = part.__dict__
    groups = "depthwise" if stated.get("groups") == stated.get("in_channels") else stated.get("groups")
    absent = [name for name, parameter in part._parameters.items() if parameter is None]
    return _kind(part), groups, absent, [stated[name] for name in SETTINGS if name in stated]


def _kind(part: nn.Module) -> type[nn.Module]:
    if not isinstance(part, nn.SyncBatchNorm):
        return type(part)
    from timm.layers import BatchNormAct2d, SyncBatchNormAct

    # the same at inference, and what training on several GPUs leaves
    return {nn.SyncBatchNorm: nn.BatchNorm2d, SyncBatchNormAct: BatchNormAct2d}.get(type(part), type(part))
