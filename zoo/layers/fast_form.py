"""What the parts of models that bring their fast form along have in common."""

# annotations must be types, not text: fx writes them into the code that it generates

import functools
from typing import Any

from torch import nn

Kinds = tuple[tuple[str, type], ...]


class HasFastForm(nn.Module):
    """A part whose class has a `fast_form(self) -> nn.Module | None`: the same function at inference, in less work.

    It remembers of what kinds of modules its constructor made it. Where others took their places,
    `zoo.optimize_for_inference` leaves it as it is, and need not ask what they compute; so it does for None.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        build = cls.__init__

        @functools.wraps(build)
        def build_and_remember(self: Any, *args: Any, **options: Any) -> None:
            build(self, *args, **options)
            self.__dict__["_made_of"] = _kinds(self)

        cls.__init__ = build_and_remember  # type: ignore[method-assign]


def is_as_made(module: nn.Module) -> bool:
    """Whether a `HasFastForm` is made of what its constructor made it of; True for other modules."""
    return not isinstance(module, HasFastForm) or module.__dict__.get("_made_of") == _kinds(module)


def _kinds(module: nn.Module) -> Kinds:
    parts = module.named_modules(remove_duplicate=False)
    # the same at inference, and what training on several GPUs leaves
    kinds = ((name, nn.BatchNorm2d if type(part) is nn.SyncBatchNorm else type(part)) for name, part in parts if name)
    return tuple(kinds)
