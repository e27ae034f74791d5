"""Whether a graph is being exported."""

import torch


@torch.compiler.assume_constant_result  # run, not traced: torch 2.11 traces it as True in compiled code, too
def is_exporting() -> bool:
    """`torch.compiler.is_exporting()`, also in what `torch.compile` traces."""
    return torch.compiler.is_exporting()
