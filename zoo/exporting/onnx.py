"""ONNX graphs, for ONNX Runtime and what else runs them.

A language model's graph is one step of generation over a memory that goes in and comes out, with the names that
transformers' exporters have given it: `input_ids`, `attention_mask`, `position_ids` and `past_key_values.0.key` ... in,
`logits` and `present.0.key` ... out. A layer that sees a window alone is handed all of the past, and masks it.

A vision model's takes `pixel_values` and gives `logits`. Sizes of batch, text and past are free; that of images is not.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.errors import ConfigError, MissingDependencyError
from zoo.exporting.layout import decoder_of
from zoo.layers.decoder import Decoder, Visible
from zoo.layers.wrappers import copied

__all__ = ["MODEL", "decoder_feeds", "empty_past", "image_size", "write_onnx"]

MODEL = "model.onnx"


class Past:
    """What one layer remembers, in place of a cache that is written in place: handed in, and handed out longer."""

    def __init__(self, past: tuple[Tensor, ...]) -> None:
        self.tensors = past

    def update(self, new: tuple[Tensor, ...], cache: Any) -> tuple[Tensor, ...]:
        self.tensors = tuple(torch.cat(pair, 2) for pair in zip(self.tensors, new, strict=True))
        return self.tensors


class DecoderStep(nn.Module):
    """`forward(input_ids, attention_mask, position_ids, past)` -> (logits, present), all memory as one flat list."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.decoder = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """(B, S), (B, P + S), (B, S) and (B, heads, P, width) each -> (B, S, vocab_size), (B, heads, P + S, width)."""
        model, config = self.decoder, self.decoder.config
        x = model.model.embed_tokens(input_ids)
        wide = torch.promote_types(x.dtype, torch.float32)  # as in forward_features
        rotation = model.model.rotary(position_ids, wide if config.rope_interleaved else x.dtype)
        length = attention_mask.shape[1]
        order = torch.arange(length, device=x.device)
        new = torch.arange(length - input_ids.shape[1], length, device=x.device)  # torch 2.11 knows no slice's length
        distance = new[:, None] - order
        causal = (distance >= 0) & attention_mask.bool()[:, None]
        present: list[Tensor] = []
        visible: dict[int | None, Visible] = {}
        for i, stored in enumerate(config.executed):
            window = config.window(i)
            if window not in visible:
                mask = causal if window is None else causal & (distance < window)
                mask = mask | (distance == 0)  # padding sees itself: a row that sees nothing has no softmax
                visible[window] = Visible(mask[:, None], is_causal=False)
            memory: Any = Past((past[2 * i], past[2 * i + 1]))
            x = model.model.layers[stored](x, rotation, visible[window], memory, memory)
            present += memory.tensors
        return model.forward_head(model.model.norm(x)), present


def image_size(model: nn.Module, given: Any = None) -> tuple[int, int, int]:
    """(channels, height, width) of a graph's images: as given, else of the `img_size` that the model was made with.

    Raises ConfigError for a size that cannot be, or a model that does not say.
    """
    from zoo.profiling.resolve import check_channels, check_input_size, default_input_size

    if given is not None:
        size = check_input_size(given)
        check_channels(model, size, type(model).__name__)
        return size
    channels, *sides = default_input_size(model)
    made_for = (getattr(model, "_model_args", None) or {}).get("img_size", sides)
    height, width = (made_for, made_for) if isinstance(made_for, int) else made_for
    return channels, height, width


def write_onnx(
    model: nn.Module,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> Path:
    """Write `model.onnx`, and what does not fit in it beside it, into `folder`, which exists.

    Args:
        model: a language model, or a vision model with its `pretrained_cfg`.
        dtype: of weights and computation; by default what they are.
        input_size: (channels, height, width) of a vision model's images, fixed in the graph; by default its own.

    Raises ConfigError for a model that torch cannot export, MissingDependencyError without onnx and onnxscript.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError('ONNX needs onnx and onnxscript: pip install "backbone-zoo[export]".') from error
    model = copied(model).to("cpu", dtype).eval().requires_grad_(False)
    if isinstance(model, Decoder):
        decoder_of(model, "ONNX")
        graph: nn.Module = DecoderStep(model)
        options = _decoder_options(model)
    else:
        graph, options = model, _vision_options(model, image_size(model, input_size))
    try:
        with _quiet(), torch.inference_mode():
            program = torch.onnx.export(graph, **options, dynamo=True, verbose=False, optimize=True)
    except Exception as error:  # the exporter raises whatever its many parts do
        raise ConfigError(f"torch cannot export this model to ONNX: {_reason(error)}") from error
    assert program is not None
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    program.save(folder / MODEL, external_data=size > 1 << 30)  # a file holds 2 GiB at most
    return folder / MODEL


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch logs and prints: of an error the exception says all, and the rest it then does itself."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _reason(error: Exception) -> str:
    """What went wrong, in one line, without the exporter's advice before and after it."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    told = re.sub(r"^\s*<class '[^']*'>:", "", text.partition("## Exception summary")[2] or text)
    return next((line.strip() for line in told.splitlines() if line.strip()), type(error).__name__)


def _decoder_options(model: Decoder) -> dict[str, Any]:
    layers = len(model.config.executed)
    past = 5
    whole: dict[str, Any] = {"dtype": torch.long, "device": "cpu"}
    tokens, positions = torch.zeros(2, 3, **whole), torch.arange(past, past + 3, **whole).expand(2, 3)
    dtype = model.model.norm.weight.dtype
    memory = [
        torch.zeros(2, heads, past, width, dtype=dtype, device="cpu")
        for _ in range(layers)
        for heads, width in model.config.cache_shape
    ]
    batch, length, remembered = (torch.export.Dim(name) for name in ("batch", "sequence", "past_sequence"))
    names = [f"{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
    free: Any = torch.export.Dim.DYNAMIC
    return {
        "args": (tokens, torch.ones(2, past + 3, **whole), positions, memory),
        "input_names": [
            *("input_ids", "attention_mask", "position_ids"),
            *(f"past_key_values.{name}" for name in names),
        ],
        "output_names": ["logits", *(f"present.{name}" for name in names)],
        "dynamic_shapes": (
            {0: batch, 1: length},
            {0: batch, 1: free},
            {0: batch, 1: length},
            [{0: batch, 2: remembered}] * len(memory),
        ),
    }


def _vision_options(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, Any]:
    return {
        "args": (torch.zeros(2, *input_size, dtype=next(model.parameters()).dtype, device="cpu"),),
        "input_names": ["pixel_values"],
        "output_names": ["logits"],
        "dynamic_shapes": ({0: torch.export.Dim("batch")},),
    }


def empty_past(model: Decoder, batch_size: int, dtype: torch.dtype = torch.float32) -> list[np.ndarray]:
    """What a language model's graph remembers before the first token: one array for each `past_key_values` input."""
    return [
        torch.zeros(batch_size, heads, 0, width, dtype=dtype, device="cpu").numpy()
        for _ in model.config.executed
        for heads, width in model.config.cache_shape
    ]


def decoder_feeds(tokens: np.ndarray, past: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs of a language model's graph for (B, S) more tokens without padding, after `past`."""
    start, (batch_size, count) = past[0].shape[2], tokens.shape
    place = np.arange(start, start + count)
    names = (f"past_key_values.{i // 2}.{('key', 'value')[i % 2]}" for i in range(len(past)))
    return {
        "input_ids": tokens,
        "attention_mask": np.ones((batch_size, start + count), np.int64),
        "position_ids": np.tile(place, (batch_size, 1)),
        **dict(zip(names, past, strict=True)),
    }
