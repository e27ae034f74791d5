"""`zoo.export`: a folder in another program's format, written whole or not at all, and held to the model first."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.data.tokenizers import Tokenizer, check_fits, create_tokenizer
from zoo.errors import CheckpointError, ConfigError, did_you_mean
from zoo.exporting.gguf import GGUF_DTYPES, rounded, write_gguf
from zoo.exporting.layout import check_whole, decoder_of
from zoo.exporting.onnx import MODEL, decoder_feeds, empty_past, image_size, write_onnx
from zoo.exporting.transformers import write_json, write_tokenizer, write_transformers
from zoo.files import check_folder, fresh_folder, put_in_place
from zoo.layers.decoder import Decoder
from zoo.layers.wrappers import copied
from zoo.units import shape_text

__all__ = ["FORMATS", "Export", "Format", "check_input", "export"]

Format = Literal["transformers", "gguf", "onnx"]
FORMATS = ("transformers", "gguf", "onnx")
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
ALIASES = {"float32": "f32", "float16": "f16", "fp16": "f16", "fp32": "f32", "bfloat16": "bf16", "float64": "f32"}
TOLERANCE = {"transformers": 1e-4, "gguf": 1e-3, "onnx": 1e-4}  # of the largest logit, where nothing is rounded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """What was written: a folder, its files and their sizes in bytes, and how it was held to the model.

    `max_error` is the largest difference of a logit between that program and the model with its weights rounded as they
    were written, relative to the largest logit; `rounding_error` is that between the model so rounded and as it is; and
    `same_top` is the share of places where the program's first choice is that of the model as it is. All are None where
    the program is not installed.
    """

    folder: Path
    files: Mapping[str, int]
    check: str
    max_error: float | None = None
    rounding_error: float | None = None
    same_top: float | None = None


def export(
    model: nn.Module,
    folder: str | Path,
    *,
    to: Format,
    tokenizer: Tokenizer | str | None = None,
    dtype: str | torch.dtype | None = None,
    input_size: tuple[int, int, int] | None = None,
    overwrite: bool = False,
) -> Export:
    """Write a model as another program reads it.

    - `"transformers"`: a language model's folder for `AutoModelForCausalLM`, as the stock class that computes it.
    - `"gguf"`: a language model's file for llama.cpp, `ARCHITECTURE-DTYPE.gguf`.
    - `"onnx"`: any model's graph for ONNX Runtime, `model.onnx`, with `config.json`.

    What was written is opened by that program, where it is installed, and its logits compared with the model's before
    the folder appears. Shared layers are written once for each time that they run.

    Args:
        model: as `create_model` makes it.
        folder: new or empty; its parent must exist.
        to: the format.
        tokenizer: of a language model, or the name of one for `create_tokenizer`.
        dtype: of the weights: "f32", "f16" or "bf16" (also as torch writes them), for GGUF "q8_0" and "q4_0" too. By
            default what they are.
        input_size: (channels, height, width) of the images that an ONNX graph takes; by default the model's own.
        overwrite: write into a folder that is not empty; files of other names in it stay.

    Raises ConfigError for a model that the format has no place for, an option or folder that will not do;
    CheckpointError where the written model gives other logits; MissingDependencyError.
    """
    if to not in FORMATS:
        raise ConfigError(
            f"There is no format {to!r}.{did_you_mean(str(to), FORMATS)} There are: {', '.join(FORMATS)}."
        )
    if not isinstance(model, nn.Module):
        raise ConfigError(f"export takes a torch.nn.Module as create_model makes it, not {type(model).__name__}.")
    is_language = hasattr(model, "make_cache")
    if is_language:
        decoder_of(model, f"An export to {to}")
    elif to != "onnx":
        raise ConfigError(f"{to} is for language models: other models are exported to onnx.")
    elif tokenizer is not None:
        raise ConfigError("A tokenizer goes with a language model, and this is none.")
    if not is_language:
        check_whole(model, f"An export to {to}")
        input_size = image_size(model, input_size)
    elif input_size is not None:
        raise ConfigError(
            "input_size= (--input-size) is of images, and a language model takes tokens of any number: leave it out."
        )
    name = _dtype(model, to, dtype)
    if isinstance(tokenizer, str):
        tokenizer = create_tokenizer(tokenizer)
    if tokenizer is not None:
        check_fits(tokenizer, model)
    folder = Path(folder).expanduser().absolute()
    check_folder(folder, overwrite)
    fresh = fresh_folder(folder)
    shutil.rmtree(fresh, ignore_errors=True)
    modes = {module: module.training for module in model.modules()}
    try:
        fresh.mkdir()
        model.eval()
        if to == "transformers":
            write_transformers(model, fresh, tokenizer=tokenizer, dtype=DTYPES[name])
            answer = _by_transformers(fresh, model)
        elif to == "gguf":
            architecture = str((getattr(model, "pretrained_cfg", None) or {}).get("architecture", "decoder"))
            path = write_gguf(model, fresh / f"{architecture}-{name}.gguf", tokenizer=tokenizer, dtype=name)
            answer = _by_llama_cpp(path, model)
        else:
            _write_onnx(model, fresh, tokenizer, DTYPES[name], input_size)
            answer = _by_onnxruntime(fresh / MODEL, model, DTYPES[name], input_size)
        found = _compare(answer, model, to, name, input_size)
        put_in_place(fresh, folder)
    except OSError as error:
        raise CheckpointError(
            f"Cannot write {str(folder)!r}: {error.strerror or error}. Nothing was left behind."
        ) from error
    finally:
        for module, mode in modes.items():  # frozen parts may stay in evaluation while others train
            module.training = mode
        shutil.rmtree(fresh, ignore_errors=True)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    return Export(folder=folder, files=files, **found)


def _dtype(model: nn.Module, to: str, dtype: str | torch.dtype | None) -> str:
    """The dtype's name in GGUF's way. Raises ConfigError for one that the format does not have."""
    if dtype is None:
        dtype = next(model.parameters()).dtype
    text = str(dtype).removeprefix("torch.").lower()
    name = ALIASES.get(text, text)
    known = tuple(GGUF_DTYPES) if to == "gguf" else tuple(DTYPES)
    if name not in known:
        raise ConfigError(f"{to} has no dtype {text!r}.{did_you_mean(text, known)} It has {', '.join(known)}.")
    return name


def _write_onnx(
    model: nn.Module,
    folder: Path,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype,
    input_size: tuple[int, int, int] | None,
) -> None:
    from zoo.hub import CONFIG, describe

    config = describe(model, tokenizer=tokenizer, dtype=dtype)
    if input_size is not None:
        config["pretrained_cfg"]["input_size"] = input_size
        _check_runs(model, input_size)
    write_onnx(model, folder, dtype=dtype, input_size=input_size)
    if isinstance(model, Decoder):
        write_tokenizer(tokenizer, folder)
    write_json(folder / CONFIG, config)


def _check_runs(model: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Raise ConfigError with the model's reason where it takes no images of this size: torch's exporter buries it."""
    images = check_input(model, input_size)
    twin = copied(model).to("cpu", torch.float32)
    try:
        with torch.inference_mode():
            twin(images)
    except Exception as error:  # models have reasons of their own kinds
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        size = shape_text(input_size)
        raise ConfigError(f"{type(model).__name__} cannot run on images of {size}: {reason.strip()}") from error


# ------------------------------------------------------------------------------------------------------------- checking


def check_input(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Tensor:
    """The same two inputs for whoever asks: (2, S) tokens, or (2, C, H, W) images."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, Decoder):
        length = min(model.config.context_length, 48)
        return torch.randint(model.config.vocab_size, (2, length), generator=generator, device="cpu")
    size = image_size(model, input_size)
    return torch.randn(2, *size, generator=generator, dtype=torch.float32, device="cpu")


# the program with its version, and its logits; or why there are none
Answer = tuple[str, list[Tensor]] | str


def _compare(
    answer: Answer, model: nn.Module, to: str, dtype: str, input_size: tuple[int, int, int] | None
) -> dict[str, Any]:
    """Hold a program's logits to the model's, with its weights rounded as they were written."""
    if isinstance(answer, str):
        return {"check": f"Not checked, as {answer}."}
    program, theirs = answer
    inputs = check_input(model, input_size)
    with torch.inference_mode():
        wanted = copy.deepcopy(model).to("cpu", torch.float32)(inputs)
        alike = rounded(model, dtype) if to == "gguf" else copy.deepcopy(model).to("cpu", DTYPES[dtype]).float()
        ours = alike(inputs)
    scale = ours.abs().max()
    error = max(float((logits - ours).abs().max() / scale) for logits in theirs)
    rounding = float((ours - wanted).abs().max() / scale)
    same = min(float((logits.argmax(-1) == wanted.argmax(-1)).float().mean()) for logits in theirs)
    what = f"logits of {'x'.join(map(str, inputs.shape))} {'tokens' if inputs.ndim == 2 else 'numbers'}"
    if (to == "transformers" or dtype == "f32") and not error <= TOLERANCE[to]:
        raise CheckpointError(
            f"{program} gives other {what} than the model: they differ by {error:.1e} of the largest. Nothing was "
            "written."
        )
    stepwise = ", at once and step by step," if inputs.ndim == 2 else ""
    cost = f" from those of the model rounded alike, which rounding changes by {rounding:.1e}" if rounding else ""
    return {
        "check": f"Checked with {program}: {what}{stepwise} differ by {error:.1e} of the largest at most{cost}. The "
        f"first choice is the same in {100 * same:.4g}% of places.",
        "max_error": error,
        "rounding_error": rounding,
        "same_top": same,
    }


def _version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def _by_transformers(folder: Path, model: Any) -> Answer:
    try:
        from transformers import AutoModelForCausalLM, logging
    except ImportError:
        return "transformers is not installed"
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    finally:
        if shows_progress:
            logging.enable_progress_bar()
    tokens = check_input(model)
    with torch.inference_mode():
        once = theirs(tokens).logits
        steps, past = [], None
        for part in _parts(tokens):
            out = theirs(part, past_key_values=past, use_cache=True)
            steps.append(out.logits)
            past = out.past_key_values
    return _version("transformers"), [once, torch.cat(steps, 1)]


def _parts(tokens: Tensor) -> list[Tensor]:
    """Half of the tokens, then one by one."""
    half = max(1, tokens.shape[1] // 2)
    return [tokens[:, :half], *tokens[:, half:].split(1, 1)] if tokens.shape[1] > half else [tokens]


def _by_llama_cpp(path: Path, model: Any) -> Answer:
    try:
        import llama_cpp
    except ImportError:
        return "llama-cpp-python is not installed"
    from zoo.generation.llama_cpp import be_quiet

    be_quiet(llama_cpp)
    tokens = check_input(model)
    length = tokens.shape[1]
    kept = llama_cpp.GGML_TYPE_F32  # of keys and values, which it would round to 16 bits
    theirs = llama_cpp.Llama(
        str(path),
        n_ctx=length,
        n_threads=torch.get_num_threads(),
        logits_all=True,
        verbose=False,
        type_k=kept,
        type_v=kept,
    )
    try:
        found = []
        for row, parts in zip(tokens.tolist(), ([length], [1] * length), strict=True):
            theirs.reset()
            for part in torch.tensor(row).split(parts):
                theirs.eval(part.tolist())
            found.append(torch.from_numpy(theirs.scores[:length].copy()))
    finally:
        theirs.close()
    return _version("llama-cpp-python"), [torch.stack(found)]


def _by_onnxruntime(path: Path, model: Any, dtype: torch.dtype, input_size: tuple[int, int, int] | None) -> Answer:
    try:
        import onnxruntime
    except ImportError:
        return "onnxruntime is not installed"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of the runtime's own kinds
        if dtype == torch.float32:
            raise CheckpointError(f"ONNX Runtime does not open the graph: {error}. Nothing was written.") from error
        return f"ONNX Runtime does not compute this model in {str(dtype).removeprefix('torch.')} on a processor"
    inputs = check_input(model, input_size)
    if not isinstance(model, Decoder):
        images = inputs.to(dtype).numpy()
        return _version("onnxruntime"), [torch.from_numpy(session.run(None, {"pixel_values": images})[0]).float()]
    found = []
    for parts in ([inputs], _parts(inputs)):
        past = empty_past(model, len(inputs), dtype)
        logits = []
        for part in parts:
            here, *past = session.run(None, decoder_feeds(part.numpy(), past))
            logits.append(torch.from_numpy(here).float())
        found.append(torch.cat(logits, 1))
    return _version("onnxruntime"), found
