"""Models as folders in the Hub's layout: `config.json` and `model.safetensors`, as timm writes and reads them.

A language model's folder is what transformers writes and reads, where a class there computes it from the same tensors:
`config.json` then holds that class's configuration and, beside it, what `create_model` needs.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import zoo
from zoo.errors import CheckpointError, ConfigError, UnknownModelError, did_you_mean
from zoo.files import check_folder, checkpoint_folder, checkpoint_places, fresh_folder, put_in_place, whole_file
from zoo.layers.fast_form import is_alike
from zoo.layers.folding import check_plain
from zoo.registry import HUB_PREFIXES, get_entry
from zoo.sparsity.channels import kept_widths
from zoo.sparsity.masks import MASKS, load_masks
from zoo.weights import (
    DEFAULT_FILES,
    fetch_from_hub,
    origin_metadata,
    read_json,
    split_hub_id,
    unwrap,
    write_safetensors,
)

__all__ = ["describe", "load_config", "save_pretrained", "tokenizer_beside"]

CONFIG = "config.json"
WEIGHTS = DEFAULT_FILES[0]
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")  # that timm knows
CROP_MODES = ("center", "squash", "border")
OWN_TYPE = "zoo"  # the `model_type` of what no class of transformers computes: its tokenizers look for one


# --------------------------------------------------------------------------------------------------------------- saving


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    labels: Sequence[str] | None = None,
    tokenizer: Any = None,
    note: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model that `create_model` made to a folder that `create_model("local-dir:...")`, ours and timm's, opens.

    The folder of a language model opens in transformers, too, where a stock class computes it from the same tensors
    (MobileLLM, SmolLM, MobileLLM-R1, Youtu-LLM; shared layers and windows take `zoo.export`).

    The folder is written whole or not at all, and read back and compared before this returns.

    Args:
        model: any model of the zoo, trained or not.
        folder: new or empty; its parent must exist.
        labels: the names of the classes, in order.
        tokenizer: of a language model, from `create_tokenizer`, or what names one: its files are written beside the
            weights, with a `generation_config.json`.
        note: what there is to say about the weights, kept in `config.json`.
        dtype: what floating-point tensors are saved as, such as torch.float16; by default what they are.
        overwrite: replace the model in a folder that is not empty; other files in it stay, but for masks that
            these weights do not follow.

    Returns the folder. Raises ConfigError for a model, labels or folder that will not do, also for a model that was
    changed so that its description builds another, or that has hooks, adapters or parametrizations; CheckpointError.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype is a floating-point torch.dtype such as torch.float16, not {dtype!r}.")
    if tokenizer is not None:
        from zoo.data.tokenizers import Tokenizer, create_tokenizer

        if not isinstance(tokenizer, Tokenizer):
            tokenizer = create_tokenizer(tokenizer)
    config = describe(model, labels=labels, tokenizer=tokenizer, note=note, dtype=dtype)
    folder = Path(folder).expanduser().absolute()
    check_folder(folder, overwrite)
    fresh = fresh_folder(folder)
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir()
        tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in model.state_dict().items()}
        origin = origin_metadata(config["architecture"], config["pretrained_cfg"])
        write_safetensors(tensors, fresh / WEIGHTS, origin)
        with whole_file(fresh / CONFIG) as file:
            file.write(json.dumps(config, indent=2).encode() + b"\n")
        if tokenizer is not None:
            from zoo.exporting.transformers import write_tokenizer

            write_tokenizer(tokenizer, fresh)
        _compare(tensors, fresh / WEIGHTS)
        if _is_entry(config["architecture"]):
            _check_opens(fresh, model, unwrap(tensors, "The model"))
        put_in_place(fresh, folder)
        _remove_masks_of_others(folder / MASKS, tensors)
    except OSError as error:
        raise CheckpointError(
            f"Cannot write {str(folder)!r}: {error.strerror or error}. Nothing was left behind."
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _remove_masks_of_others(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Of the weights that were there before, where these are not zero where masks say so."""
    if not path.is_file():
        return
    try:
        fit = all(
            name in tensors and tensors[name].shape == mask.shape and not tensors[name].cpu()[~mask].any()
            for name, mask in load_masks(path).items()
        )
    except CheckpointError:
        fit = False
    if not fit:
        path.unlink()


def describe(
    model: nn.Module,
    *,
    labels: Sequence[str] | None = None,
    tokenizer: Any = None,
    note: str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """What `config.json` says of a model and of the weights it holds, as `save_pretrained` writes it."""
    if is_language_model(model):
        return _language_config(model, labels, tokenizer, note, dtype)
    if tokenizer is not None:
        raise ConfigError("A tokenizer goes with a language model, and this is none.")
    return _config_of(model, labels, note)


def _config_of(model: nn.Module, labels: Sequence[str] | None, note: str | None) -> dict[str, Any]:
    """timm's description of a model and of the weights it holds."""
    from timm.models._hub import save_config_for_hf

    from zoo.exporting.layout import check_whole

    if not isinstance(model, nn.Module):
        raise ConfigError(f"save_pretrained takes a torch.nn.Module, not {type(model).__name__}.")
    check_whole(model, "save_pretrained")
    cfg: Any = model.pretrained_cfg
    extra: dict[str, Any] = {}
    if labels is not None:
        names = [str(label) for label in labels]
        if len(names) != model.num_classes or len(set(names)) != len(names):
            raise ConfigError(
                f"The model has {model.num_classes} classes: give as many labels, all different, not {len(names)} "
                f"({len(set(names))} different)."
            )
        extra["label_names"] = names
    if note is not None:
        extra["note"] = str(note)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / CONFIG
        try:
            save_config_for_hf(model, str(path), model_config=extra)
        except ValueError as error:
            raise ConfigError(f"The model cannot be described in a {CONFIG}: {error}") from error
        config = read_json(path)
    if cfg.get("tag") and not hasattr(model, "load_report") and _is_entry(cfg["architecture"]):
        # the description is of published weights, which this model never had
        for key in ("tag", "license"):
            config["pretrained_cfg"].pop(key, None)
    saved_args = config.get("model_args", {})
    args = _known_args(cfg["architecture"], saved_args)
    built_in = _timm_args(cfg["architecture"])
    # the number of classes stands above already, and transformers would hand it to timm twice
    config["model_args"] = {key: value for key, value in args.items() if key not in {*built_in, "num_classes"}}
    if "task" in saved_args:  # a backbone with a head that its entry does not know
        args = saved_args
    config["zoo"] = {"version": zoo.__version__, "model_args": args}
    if widths := kept_widths(model):
        if not _is_entry(cfg["architecture"]):
            raise ConfigError(
                f"timm's {cfg['architecture']} without some channels cannot be opened again: keep it whole."
            )
        config["zoo"]["kept_widths"] = widths
    return config


def is_language_model(model: nn.Module) -> bool:
    from zoo.layers.decoder import Decoder

    return isinstance(model, Decoder)


def _language_config(
    model: Any, labels: Sequence[str] | None, tokenizer: Any, note: str | None, dtype: torch.dtype | None
) -> dict[str, Any]:
    """What `config.json` says of a decoder: transformers' own keys where it computes this model, and ours."""
    from zoo.data.tokenizers import check_fits
    from zoo.exporting.layout import decoder_of
    from zoo.exporting.transformers import is_stock, transformers_config

    quantization = getattr(model, "quantization", None)
    if quantization is None:
        decoder_of(model, "save_pretrained")
    elif dtype is not None:
        raise ConfigError(f"The model's weights are {quantization.to}: leave out dtype.")
    cfg = getattr(model, "pretrained_cfg", None)
    if not cfg or "architecture" not in cfg:
        raise ConfigError("save_pretrained takes a whole model that create_model made, whose architecture has a name.")
    if labels is not None:
        raise ConfigError("A language model has no classes: leave out labels.")
    if tokenizer is not None:
        check_fits(tokenizer, model)
    config: dict[str, Any] = {}
    if quantization is None and is_stock(model.config):
        stack = model.model  # whose norms may be in float32 where the rest is not
        dtype = dtype or getattr(stack.embed_tokens, "weight", stack.norm.weight).dtype
        config = transformers_config(model.config, dtype=dtype, tokenizer=tokenizer)
    elif tokenizer is not None:
        config = {"model_type": OWN_TYPE}
    described = {key: cfg[key] for key in ("tag", "license", "origin_url") if cfg.get(key)}
    if cfg.get("tag") and not hasattr(model, "load_report"):  # of published weights, which this model never had
        described = {key: value for key, value in described.items() if key == "origin_url"}
    args = _known_args(cfg["architecture"], model._model_args)
    config |= {"architecture": cfg["architecture"], "model_args": args, "pretrained_cfg": described}
    if note is not None:
        config["note"] = str(note)
    ours = {"version": zoo.__version__, "model_args": args}
    if quantization is not None:
        ours["quantization"] = dataclasses.asdict(quantization)
    return config | {"zoo": ours}


def _is_entry(architecture: str) -> bool:
    try:
        get_entry(architecture)
    except UnknownModelError:
        return False
    return True


def _timm_args(architecture: str) -> Mapping[str, Any]:
    """Arguments of ours that timm's class of the same name has built in, with the values that it builds in."""
    try:
        return get_entry(architecture).timm_args
    except UnknownModelError:
        return {}


def _known_args(architecture: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """`args` without those, such as `global_pool`, that timm adds to every model and this one does not take."""
    try:
        parameters = inspect.signature(get_entry(architecture).build).parameters
    except UnknownModelError:  # one of timm's
        return dict(args)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(args)
    return {key: value for key, value in args.items() if key in parameters}


def _compare(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Hold what was written to what was meant, bit for bit."""
    written = safetensors.torch.load_file(path)

    def bits(tensor: Tensor) -> Tensor:  # NaNs differ from themselves, their bits do not
        return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)

    if written.keys() != tensors.keys() or not all(torch.equal(bits(written[k]), bits(t)) for k, t in tensors.items()):
        raise CheckpointError(
            f"What was written for {str(path.parent)!r} does not read back as the model: the disk may be failing."
        )


def _check_opens(folder: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Hold the model that the description builds to the one that was described, whose `tensors` were written."""
    from zoo.factory import create_model

    built = create_model(f"local-dir:{folder}", pretrained=False, device="meta")
    again = built.state_dict()
    differ = sorted(k for k in again.keys() | tensors.keys() if k not in again or k not in tensors)
    differ += sorted(k for k in again.keys() & tensors.keys() if again[k].shape != tensors[k].shape)
    if differ:
        raise ConfigError(
            f"The model is not as its arguments build it ({len(differ)} tensors differ, the first is {differ[0]}): "
            "parts were cut off or exchanged, and nothing could open it again. Save its state_dict() with torch.save."
        )
    if is_language_model(model) and built.config != model.config:
        raise ConfigError(
            "The model's config is not what its arguments build, and would be lost: create the model with the "
            "arguments that make it so, and load these weights."
        )
    check_plain(model, "A saved model", like=built)
    name = _changed_part(model, built)
    if name is not None:
        raise ConfigError(
            f"{name} ({type(model.get_submodule(name)).__name__}) is not as the model's arguments build it, and what "
            "opens it again would compute something else. Save its state_dict() with torch.save."
        )


def _changed_part(model: nn.Module, built: nn.Module) -> str | None:
    """The name of a part that is of another kind than in `built`, or has other settings."""
    from zoo.layers.decoder import Decoder

    if not isinstance(model, type(built)):  # timm's own of the same name, whose weights these are
        return None
    if isinstance(built, Decoder):
        return model.changed_part() if type(built) is Decoder else None  # type: ignore[operator]
    parts = dict(built.named_modules())
    names = (name for name, part in model.named_modules() if name and not is_alike(part, parts.get(name)))
    return next(names, None)


# -------------------------------------------------------------------------------------------------------------- reading


def load_config(
    source: str,
    *,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    refresh: bool = False,
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """`(architecture, model_args, pretrained_cfg)` from the `config.json` of a repository or folder.

    `source` is `"hf-hub:owner/name@revision"` or `"local-dir:path"`. The `pretrained_cfg` describes the weights that
    lie there: their classes, input channels, preprocessing. Where timm wrote it and computes otherwise than the authors
    (`Entry.timm_args`), the arguments are those of timm's computation. Raises CheckpointError, DownloadError.
    """
    origin: dict[str, Any] = {"url": None, "file": None, "hf_hub_id": None, "hf_hub_filename": None}
    if source.startswith(HUB_PREFIXES):
        repo, revision = split_hub_id(source)
        path = fetch_from_hub(repo, (CONFIG,), revision=revision, cache_dir=cache_dir, token=token, refresh=refresh)
        origin |= {"source": "hf-hub", "hf_hub_id": source.split(":", 1)[1]}
    else:
        place = source.removeprefix("local-dir:")
        folder = Path(place).expanduser()
        if not place:
            raise CheckpointError("local-dir: names no folder: write it behind the colon.")
        if not folder.is_dir():
            beside = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
            raise CheckpointError(f"There is no folder {str(folder)!r}.{did_you_mean(folder.name, beside)}")
        path = folder / CONFIG
        if not path.is_file():
            found = checkpoint_folder(folder)
            advice = "name the architecture, and give the folder as checkpoint_path="
            if found is not None:
                advice = f"it is a run, whose model is local-dir:{found}"
            raise CheckpointError(f"The folder {str(folder)!r} has no {CONFIG}: {advice}.")
        origin |= {"source": "local-dir", "file": str(folder)}
    return _parse_config(read_json(path), source, origin)


def tokenizer_beside(path: str | Path) -> Any:
    """The tokenizer that was saved with a checkpoint (its folder, a file in it, or a run's); None where there is none.

    Raises CheckpointError for one that is damaged, MissingDependencyError.
    """
    from zoo.data.tokenizers import VOCABULARIES, create_tokenizer

    path = Path(os.fspath(path).removeprefix("local-dir:")).expanduser()
    if any((place / name).is_file() for place in checkpoint_places(path) for name in VOCABULARIES):
        return create_tokenizer(path if path.is_dir() else path.parent)
    return None


def _parse_config(
    config: dict[str, Any], source: str, origin: Mapping[str, Any]
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    # early timm repositories keep everything in one flat object
    saved = config.get("pretrained_cfg", {k: v for k, v in config.items() if k not in ("architecture", "num_features")})
    args = config.get("model_args") or {}
    architecture = config.get("architecture")
    if architecture is None and "model_type" in config:
        return _parse_transformers(config, source, origin)
    if not isinstance(architecture, str) or not isinstance(saved, dict) or not isinstance(args, dict):
        raise CheckpointError(f"The {CONFIG} of {source} names no architecture: it was not written by timm or the zoo.")
    ours = config.get("zoo")
    if isinstance(ours, dict) and isinstance(ours.get("model_args"), dict):
        args = args | ours["model_args"]
        if isinstance(ours.get("kept_widths"), dict):
            args = args | {"kept_widths": ours["kept_widths"]}
        if isinstance(ours.get("quantization"), dict):
            args = args | {"quantization": ours["quantization"]}
        if config.get("model_type", OWN_TYPE) != OWN_TYPE:
            args = args | _changed_by_transformers(config, architecture, args, source)
    elif not _is_published(architecture, origin["hf_hub_id"]):  # trained with timm, and so as timm computes
        args = dict(_timm_args(architecture)) | args
    cfg = {key: _tuple(value) for key, value in saved.items()} | dict(origin)
    if "labels" in cfg:
        cfg["label_names"] = cfg.pop("labels")
    cfg |= {key: config[key] for key in ("num_classes", "label_names", "label_descriptions") if key in config}
    _check_description(cfg, source)
    if cfg.get("input_size") is None:  # then the architecture's
        cfg.pop("input_size", None)
    if args.get("in_chans") is not None:
        cfg["input_size"] = (args["in_chans"], *cfg.get("input_size", (3, 224, 224))[1:])
    return architecture, {key: _tuple(value) for key, value in args.items()}, cfg


def _check_description(cfg: Mapping[str, Any], source: str) -> None:
    """Raises CheckpointError for a preprocessing that cannot be, as of a file that was edited by hand."""
    for key in ("input_size", "test_input_size", "pool_size"):
        size = cfg.get(key)
        if size is not None and not (
            isinstance(size, tuple)
            and len(size) == 2 + (key != "pool_size")
            and all(type(n) is int and n > 0 for n in size)
        ):
            raise CheckpointError(f"The {CONFIG} of {source} says {key} is {size!r}, which is no size.")
    for key in ("mean", "std"):
        values = cfg.get(key)
        numbers = isinstance(values, tuple) and values and all(isinstance(v, int | float) for v in values)
        if values is not None and not (numbers and (key == "mean" or min(values) > 0)):
            above = " above zero" if key == "std" else ""
            raise CheckpointError(
                f"The {CONFIG} of {source} says {key} is {values!r}, and not a number{above} for each channel."
            )
    for key, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
        if (word := cfg.get(key)) and word not in known:
            raise CheckpointError(
                f"The {CONFIG} of {source} says {key} is {word!r}.{did_you_mean(str(word), known)} "
                f"It may be {', '.join(known)}."
            )
    names = cfg.get("label_names")
    if names is not None and not isinstance(names, list | tuple | Mapping):
        raise CheckpointError(f"The {CONFIG} of {source} says label_names is {names!r}, and not a name for each class.")
    for key in ("crop_pct", "test_crop_pct"):
        share = cfg.get(key)
        if share is not None and not (isinstance(share, int | float) and share > 0):
            raise CheckpointError(f"The {CONFIG} of {source} says {key} is {share!r}, and not a number above zero.")


def _changed_by_transformers(
    config: dict[str, Any], architecture: str, args: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Arguments that are others since a model which we saved was opened and saved by transformers."""
    from zoo.exporting.transformers import is_stock, transformers_config
    from zoo.layers.decoder import DecoderConfig, build_decoder

    fields = [field.name for field in dataclasses.fields(DecoderConfig)]
    if not _is_entry(architecture) or get_entry(architecture).build is not build_decoder or args.keys() - set(fields):
        return {}
    saved = DecoderConfig(**{**get_entry(architecture).args, **{key: _tuple(value) for key, value in args.items()}})
    if not is_stock(saved):
        return {}
    before, now = (
        DecoderConfig(**{**get_entry(name).args, **found})
        for name, found in (
            _transformers_args(described, source)
            for described in (transformers_config(saved, dtype=torch.float32), config)
        )
    )
    changed = {name: getattr(now, name) for name in fields if getattr(now, name) != getattr(before, name)}
    return changed | ({"layer_map": None, "hidden_dim": now.hidden_dim} if "depth" in changed else {})


def _parse_transformers(
    config: dict[str, Any], source: str, origin: Mapping[str, Any]
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """What `_parse_config` gives, of a language model that transformers saved."""
    architecture, args = _transformers_args(config, source)
    cfg = dict(origin)
    repo = str(origin["hf_hub_id"]).partition("@")[0]
    for weights in get_entry(architecture).weights:
        if weights.hub_id == repo:
            cfg |= {"tag": weights.tag, "license": weights.license}
    return architecture, args, cfg


def _transformers_args(config: dict[str, Any], source: str) -> tuple[str, dict[str, Any]]:
    """The entry and the arguments for a model that transformers describes. Raises CheckpointError."""
    from zoo.exporting.transformers import MODEL_TYPES, decoder_args

    try:
        found = decoder_args(config, source)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"The {CONFIG} of {source} is no whole configuration: it lacks {error}.") from error
    if found is None:
        raise CheckpointError(
            f"The {CONFIG} of {source} is of a {config['model_type']!r} model, which the zoo does not have: of "
            f"transformers' it opens {', '.join(MODEL_TYPES)}."
        )
    return found


def _is_published(architecture: str, repo: str | None) -> bool:
    """Whether a repository holds the authors' weights, which timm keeps but did not train."""
    try:
        weights = get_entry(architecture).weights
    except UnknownModelError:
        return False
    return repo is not None and repo.partition("@")[0] in {w.hub_id for w in weights}


def _tuple(value: Any) -> Any:
    """JSON has no tuples, and the facts and arguments of models are tuples."""
    return tuple(map(_tuple, value)) if isinstance(value, list) else value
