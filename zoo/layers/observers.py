"""Who besides the caller wants something of a computation: an exporter its graph, or a transform its derivatives."""

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def is_exporting() -> bool:
    """`torch.compiler.is_exporting()`, also in what `torch.compile` traces."""
    return torch.compiler.is_exporting()


def is_transformed() -> bool:
    """Within `torch.func` or forward-mode differentiation, of which operators made for speed know nothing."""
    return torch._C._functorch.maybe_current_level() is not None or torch.autograd.forward_ad._current_level >= 0


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) in that memory format, but under `torch.func.vmap`, which cannot tell it."""
    return x if is_transformed() else x.contiguous(memory_format=torch.channels_last)


def is_observed() -> bool:
    """Whether a mode sees each operator, as `FlopCounterMode` and `FakeTensorMode` do, which know PyTorch's alone."""
    return not torch.compiler.is_compiling() and is_in_torch_dispatch_mode()


def is_saved_by_hooks() -> bool:
    """Whether hooks save what the backward pass needs: checkpointing's, which compute it again, or anybody's."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def is_batched(grad: torch.Tensor) -> bool:
    """Whether a gradient stands for many, as with `torch.autograd.grad(..., is_grads_batched=True)`."""
    if torch.compiler.is_compiling():
        return False
    return is_transformed() or torch._C._functorch.is_legacy_batchedtensor(grad)


# run, not traced: torch 2.11 traces the first as True in compiled code, too. This is all that
# `torch.compiler.assume_constant_result` does, but it imports the compiler for that, which takes seconds.
for asked in (is_exporting, is_transformed):
    asked._dynamo_marked_constant = True  # type: ignore[attr-defined]
