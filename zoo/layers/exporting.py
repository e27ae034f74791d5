"""Whether a graph is being exported."""

import torch


def is_exporting() -> bool:
    """`torch.compiler.is_exporting()`, also in what `torch.compile` traces."""
    return torch.compiler.is_exporting()


# run, not traced: torch 2.11 traces it as True in compiled code, too. This is all that
# `torch.compiler.assume_constant_result` does, but it imports the compiler for that, which takes seconds.
is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]
