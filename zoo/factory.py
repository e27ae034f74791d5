"""`create_model`: from a name to an entry, from the entry to a module, from the module to its weights."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.devices import find_device
from zoo.errors import CheckpointError, ConfigError, UnknownModelError, ZooError, did_you_mean
from zoo.layers.arguments import image_sides
from zoo.layers.init import has_meta, materialize, on_meta
from zoo.registry import PLACES, Entry, Weights, get_entry, split_name

__all__ = ["build_module", "create_model", "feature_config"]

FEATURE_CLASSES = ("list", "dict", "getter", "hook", "fx")

_logger = logging.getLogger(__name__)


def create_model(
    name: str,
    pretrained: bool | str | None = None,
    *,
    task: str | None = None,
    checkpoint_path: str | Path | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | int | None = None,
    feature_cls: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    strict: bool = True,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    refresh: bool = False,
    **model_args: Any,
) -> nn.Module:
    """Create a model by name, with or without weights.

    Args:
        name: `"poolformer_s12"`, with the tag of its weights (`"poolformer_s12.sail_in1k"`), pinned to a commit
            (`"poolformer_s12.sail_in1k@<commit>"`), or a repository or folder in the Hub's layout
            (`"hf-hub:owner/name@revision"`, `"local-dir:path"`).
        pretrained: True or a tag loads published weights; False never does. By default they are loaded when `name`
            says which: by a tag or by a repository.
        task: "segmentation" puts FFNet's head on the feature maps of any vision model: logits of every fourth pixel (of
            the finest map's stride), `num_classes` (19) of them; `up_head`, `seg_head` ("A", "B", "C", from large to
            small) and `upsample` ("nearest", "bilinear") are its arguments. Weights are those of the backbone. By
            default a model does what it was published for.
        checkpoint_path: load these weights instead: a file, a folder, or `hf-hub:owner/name@revision`. Of averaged
            and last weights in one file it takes those that were evaluated of the published ones: of those with the tag
            in `name`, else of all where they agree, else the averaged ones. `load_checkpoint` takes what it is told.
        num_classes: width of the classifier, 0 for none. Another width than the weights have leaves it freshly
            initialised.
        in_chans: input channels; the first convolution of the weights is adapted.
        features_only: return a module that gives the maps of the stages in `out_indices` (all by default).
        out_indices: numbers of stages, from the end if negative; a single number n means the last n.
        feature_cls: which of timm's feature wrappers ("list", "getter", "hook", "fx", "dict").
        device: where the model goes; on "meta" it has neither weights nor memory.
        dtype: of its parameters and buffers.
        strict: whether missing, unexpected and misshapen tensors in the weights are an error.
        cache_dir: where downloads are kept (the Hub's cache by default).
        token: for private and gated repositories (the one of `hf auth login` by default).
        refresh: ask the network whether cached weights are still current.
        **model_args: any argument of the architecture, e.g. `depths=(1, 1, 2, 1)`. `kept_widths`, which every
            architecture takes, builds it as `zoo.sparsity.shrink` left another (`zoo.sparsity.kept_widths`).

    Raises:
        UnknownModelError: no model or no weights of that name; names the nearest.
        ConfigError: an argument that the model does not have, or a value that cannot be.
        CheckpointError, DownloadError: weights that do not fit, cannot be read or cannot be had.
    """
    if device is not None:
        device = find_device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype is a floating-point torch.dtype such as torch.bfloat16, not {dtype!r}.")
    entry, weights, source, cfg, saved_args = _resolve(
        name, pretrained, checkpoint_path or None, cache_dir=cache_dir, token=token, refresh=refresh
    )
    is_meta = device is not None and device.type == "meta"
    if is_meta and source is not None:
        if pretrained or checkpoint_path:
            raise ConfigError("A model on the meta device has no memory to load weights into: choose another device.")
        source = None

    args = {**saved_args, **model_args}
    task = args.pop("task", None) if task is None else task
    if task is not None and task != entry.task:
        if (task, entry.task) != ("segmentation", "vision"):
            possible = {entry.task, "segmentation"} if entry.task == "vision" else {entry.task}
            hint = did_you_mean(str(task), possible) or " Leave out task=."
            raise ConfigError(f"{entry.name} is made for {entry.task}: it cannot be had for {task!r}.{hint}")
        if features_only:
            raise ConfigError('features_only=True gives maps, and task="segmentation" logits: ask for one of them.')
        is_whole = saved_args.get("task") == task  # saved with its head, which the weights then have, too
        given = {**saved_args, **model_args, "task": task}
        of_whole = is_whole or _are_of_segmentation(given.get("kept_widths"))  # the head included
        kept_widths = given.pop("kept_widths", None) if of_whole else None
        chosen = {
            "num_classes": num_classes,
            "in_chans": in_chans,
            "out_indices": out_indices,
            "feature_cls": feature_cls,
        }
        given |= {key: value for key, value in chosen.items() if value is not None}
        if model_args.get("img_size") is not None:
            cfg = {**cfg, "input_size": (cfg["input_size"][0], *image_sides(model_args["img_size"]))}
        model = _segmentation_model(
            entry.name if is_whole else name,
            False if is_whole else pretrained,
            given,
            cfg,
            checkpoint_path=None if is_whole else checkpoint_path,
            device=device,
            dtype=dtype,
            strict=strict,
            cache_dir=cache_dir,
            token=token,
            refresh=refresh,
        )
        if kept_widths is not None:
            from zoo.sparsity.channels import resize

            resize(model, kept_widths)
        if is_whole and source is not None:
            from zoo.weights import load_checkpoint

            load_checkpoint(model, source, strict=strict, cache_dir=cache_dir, token=token, refresh=refresh)
        return model
    if entry.task == "language" and (features_only or out_indices is not None or feature_cls is not None):
        raise ConfigError(f"{entry.name} is a language model, which has no feature maps: leave out features_only=True.")
    if features_only:
        num_classes = 0 if "num_classes" in _parameters(entry.build) else None
    chosen = {"num_classes": num_classes, "in_chans": in_chans}
    args |= {key: value for key, value in chosen.items() if value is not None}
    given = dict(args)
    if weights is not None:
        args = {**weights.args, **args}
    if entry.task != "language":
        for key, default in (("num_classes", cfg["num_classes"]), ("in_chans", cfg["input_size"][0])):
            if key in _parameters(entry.build):
                args.setdefault(key, default)
    if entry.fixed_input_size:
        args.setdefault("img_size", tuple(cfg["input_size"][1:]))
    for key, least in (("num_classes", 0), ("in_chans", 1)):
        if key in args and not (type(args[key]) is int and args[key] >= least):
            raise ConfigError(f"{key} must be a whole number from {least} up, not {args[key]!r}.")

    def finish(model: nn.Module) -> None:  # what weights.load_checkpoint and timm's tools look at
        theirs = {} if weights is None else weights.args  # without which the weights compute something else
        plain = {k: v for k, v in {**theirs, **given, **entry.unlike_timm(args)}.items() if _is_plain(v)}
        if "kept_widths" in args and entry.task == "language":
            plain["hidden_dim"] = model.config.hidden_dim  # type: ignore[union-attr]
        model.__dict__.update(pretrained_cfg=cfg, default_cfg=cfg, _model_args=plain)

    if source is None:
        model = build_module(entry, args, device=device, dtype=dtype)
        finish(model)
    else:
        from zoo.weights import ORIGIN_KEYS

        # a tag says which weights a file of one's own holds, too; without one, all that are published are asked
        use_ema = weights.use_ema if weights is not None and (isinstance(source, tuple) or cfg["tag"]) else None
        model = _build_with_weights(
            entry,
            args,
            source,
            finish,
            any(cfg.get(key) for key in ORIGIN_KEYS),
            device,
            dtype,
            strict,
            use_ema,
            cache_dir,
            token,
            refresh,
        )
    if entry.task == "language":
        return model
    cfg = model.__dict__["pretrained_cfg"]  # which loading has added to
    if model_args.get("img_size") is not None:  # a saved one's is what its description says
        cfg = {**cfg, "input_size": (cfg["input_size"][0], *image_sides(model_args["img_size"]))}
        model.__dict__.update(pretrained_cfg=cfg, default_cfg=cfg)
    return _as_timm_model(model, entry, cfg, args.get("img_size"), features_only, out_indices, feature_cls)


def _segmentation_model(
    name: str, pretrained: bool | str | None, given: dict[str, Any], cfg: dict[str, Any], **options: Any
) -> nn.Module:
    """FFNet's head on the feature maps of a vision model; `given` is what the user asked for, to be saved with it."""
    from zoo.layers.segmentation import SegmentationModel

    parts = ("num_classes", "up_head", "seg_head", "upsample", "drop_rate")
    args = {key: value for key, value in given.items() if key not in (*parts, "task")}
    if args.get("feature_cls") in ("dict", "fx"):
        raise ConfigError(
            f"FFNet's head takes the maps that getter, list and hook give, and not feature_cls={args['feature_cls']!r}."
        )
    args.setdefault("feature_cls", "getter")  # asks the model itself, whatever its parts are called
    backbone: Any = create_model(name, pretrained, features_only=True, **options, **args)
    meta = contextlib.nullcontext() if options["device"] is None else torch.device(options["device"])
    with meta:
        model = SegmentationModel(backbone, **{key: given[key] for key in parts if key in given})
    model.to(device=options["device"], dtype=options["dtype"])
    if given.get("kept_widths"):
        model.take_widths(given["kept_widths"]["tensors"])
    from zoo.weights import ORIGIN_KEYS, module_names

    convs = tuple(model.name_here(name) for name in module_names(backbone.pretrained_cfg.get("first_conv")))
    whose = {key: backbone.pretrained_cfg.get(key) for key in ORIGIN_KEYS}
    cfg = {**cfg, **{key: value for key, value in whose.items() if value}}
    own: dict[str, Any] = {
        "num_classes": model.num_classes,
        "first_conv": convs[0] if len(convs) == 1 else convs,
        "classifier": "head.conv2",
    }
    if given.get("in_chans") is not None:
        own["input_size"] = (given["in_chans"], *cfg["input_size"][1:])
    model.__dict__.update(pretrained_cfg={**cfg, **own}, default_cfg={**cfg, **own})
    given = {**{key: value for key, value in backbone._model_args.items() if key not in parts}, **given}
    model.__dict__["_model_args"] = {key: value for key, value in given.items() if _is_plain(value)}
    if "load_report" in backbone.__dict__:
        model.__dict__["load_report"] = backbone.__dict__["load_report"]
    return model


def _are_of_segmentation(widths: Any) -> bool:
    """Whether `kept_widths` are those of a network with FFNet's head, and not of its backbone."""
    tensors = widths.get("tensors") if isinstance(widths, Mapping) else None
    return isinstance(tensors, Mapping) and any(str(key).startswith(("backbone.", "neck.")) for key in tensors)


def _resolve(
    name: str,
    pretrained: bool | str | None,
    checkpoint_path: str | Path | None,
    **where: Any,
) -> tuple[Entry, Weights | None, Any, dict[str, Any], dict[str, Any]]:
    """(entry, weights entry, source for load_checkpoint or None, pretrained_cfg, saved model arguments)."""
    if isinstance(pretrained, str) and isinstance(name, str) and ":" in name:
        raise ConfigError(f"pretrained={pretrained!r} names a tag, but {name!r} is one checkpoint: leave it out.")
    if isinstance(name, str) and name.startswith(PLACES):
        from zoo.hub import load_config

        architecture, saved_args, saved_cfg = load_config(name, **where)
        try:
            entry = get_entry(architecture)
        except UnknownModelError as error:
            raise UnknownModelError(f"{name} holds a {architecture!r}. {error}") from None
        from zoo.weights import of_own_weights

        cfg = {**of_own_weights(entry.pretrained_cfg()), **saved_cfg, "architecture": entry.name}
        wanted = pretrained is None or pretrained
        if checkpoint_path is not None:
            return entry, None, checkpoint_path, of_own_weights(cfg), saved_args
        return entry, None, name if wanted else None, cfg, saved_args

    _, tag, revision = split_name(name)
    entry = get_entry(name)
    if isinstance(pretrained, str):
        if tag is not None and tag != pretrained:
            raise ConfigError(f"The name says {tag!r} and pretrained says {pretrained!r}: which weights?")
        tag = pretrained
    wanted = pretrained or (pretrained is None and (tag is not None or revision is not None))
    weights = entry.find_weights(tag) if wanted or tag is not None else (entry.weights or (None,))[0]
    cfg = entry.pretrained_cfg(tag)
    if checkpoint_path is not None:
        from zoo.weights import of_own_weights

        return entry, weights, checkpoint_path, cfg if tag is not None else of_own_weights(cfg), {}
    return entry, weights, (weights, revision) if wanted else None, cfg, {}


def _parameters(build: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(build).parameters


def _is_plain(value: Any) -> bool:
    """Whether a model argument can be written to config.json."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def _check_args(entry: Entry, args: Mapping[str, Any]) -> None:
    parameters = _parameters(entry.build)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in args:
        if key not in parameters:
            raise ConfigError(f"{entry.name} has no argument {key!r}.{did_you_mean(key, parameters)}")


def build_module(
    entry: Entry,
    args: Mapping[str, Any],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The module of `entry` with `args` over its own, initialised as published. Raises ConfigError."""
    model = _build_on_meta(entry, args, dtype)
    is_meta = device is not None and torch.device(device).type == "meta"
    if not is_meta and hasattr(model, "init_module"):
        return materialize(model, device)
    if is_meta:
        return model
    return _call(entry, args).to(device=device, dtype=dtype)


def _build_on_meta(entry: Entry, args: Mapping[str, Any], dtype: torch.dtype | None) -> nn.Module:
    try:
        with on_meta():
            model = _call(entry, args)
        return model if dtype is None else model.to(dtype=dtype)
    except (RuntimeError, NotImplementedError):  # a constructor that reads values, as `torch.linspace(...).tolist()`
        return _call(entry, args).to(device="meta", dtype=dtype)


def _call(entry: Entry, args: Mapping[str, Any]) -> nn.Module:
    args = {**entry.args, **args}
    kept_widths, quantization = args.pop("kept_widths", None), args.pop("quantization", None)
    _check_args(entry, args)
    try:
        model = entry.build(**args)
    except (TypeError, ValueError, LookupError, AssertionError) as error:
        if isinstance(error, ZooError) or args == dict(entry.args):
            raise
        given = ", ".join(f"{key}={value!r}" for key, value in args.items() if entry.args.get(key) != value)
        reason = repr(error) if isinstance(error, LookupError) or not str(error) else error
        raise ConfigError(f"{entry.name} cannot be built with {given}: {reason}") from error
    if kept_widths is not None:
        from zoo.sparsity.channels import resize

        resize(model, kept_widths)
    if quantization is not None:
        if entry.task != "language":
            raise CheckpointError(
                f"{entry.name} is no language model, and only those are quantised: its config.json is wrong."
            )
        from zoo.layers.fast_decoder import FastDecoder, Quantization

        return FastDecoder(model, Quantization(**quantization))  # type: ignore[arg-type]
    return model


def _build_with_weights(
    entry: Entry,
    args: Mapping[str, Any],
    source: Any,
    finish: Callable[[nn.Module], None],
    is_described: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    strict: bool,
    use_ema: bool | None,
    cache_dir: str | Path | None,
    token: str | None,
    refresh: bool,
) -> nn.Module:
    """Build on the meta device and assign, so that nothing is initialised only to be written over."""
    from zoo.weights import fetch, load_checkpoint

    where: dict[str, Any] = {"cache_dir": cache_dir, "token": token, "refresh": refresh}
    if isinstance(source, tuple):
        source = fetch(source[0], revision=source[1], **where)
    model = _build_on_meta(entry, args, dtype)
    finish(model)
    how: dict[str, Any] = {"strict": strict, "use_ema": use_ema, "convert": entry.convert, **where}
    report = load_checkpoint(model, source, **how)
    if has_meta(model):
        if hasattr(model, "init_module"):
            materialize(model, "cpu")
        else:  # what the weights left out only the constructor can initialise
            model = _call(entry, args).to(dtype=dtype)
            finish(model)
            report = load_checkpoint(model, source, **how)
    if is_described:  # by name, which says more than the file itself does
        finish(model)
    unasked = report.dropped and args.get("num_classes") != 0
    _logger.log(logging.WARNING if unasked else logging.INFO, "%s: %s", entry.name, report)
    model.__dict__["load_report"] = report
    return model if device is None else model.to(device=device)


def feature_config(model: Any) -> dict[str, Any]:
    """How timm gets at feature maps: by listing the modules one after the other, unless the model names another way."""
    if hasattr(model, "default_feature_cls"):
        return {"feature_cls": model.default_feature_cls}
    stages = getattr(model, "feature_info", None) or ()
    return {"flatten_sequential": any("." in stage["module"] for stage in stages)}


def _as_timm_model(
    model: nn.Module,
    entry: Entry,
    cfg: dict[str, Any],
    img_size: Any,
    features_only: bool,
    out_indices: Sequence[int] | int | None,
    feature_cls: str | None,
) -> nn.Module:
    """Hand the module to timm, which attaches what its tools look for and wraps it for features."""
    from timm.models import build_model_with_cfg

    options: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    if not features_only:
        if out_indices is not None:
            raise ConfigError("out_indices goes with features_only=True.")
    else:
        if isinstance(feature_cls, str) and feature_cls not in FEATURE_CLASSES:
            near = did_you_mean(feature_cls, FEATURE_CLASSES)
            raise ConfigError(
                f"There is no feature_cls {feature_cls!r}.{near} There are: {', '.join(FEATURE_CLASSES)}."
            )
        stages = getattr(model, "feature_info", None)
        if not stages:
            raise ConfigError(
                f"{entry.name} describes no feature maps: it needs a `feature_info`, as timm's models have."
            )
        if type(out_indices) is int and 0 < out_indices <= len(stages):  # the last ones, as timm takes it
            out_indices = range(len(stages) - out_indices, len(stages))
        if isinstance(out_indices, str | int) or not all(isinstance(i, int) for i in out_indices or ()):
            raise ConfigError(
                f"out_indices is a sequence of whole numbers such as (1, 2, 3), or how many of the {len(stages)} maps "
                f"to give, from the last, not {out_indices!r}."
            )
        out_indices = tuple(range(len(stages))) if out_indices is None else tuple(out_indices)
        bad = [i for i in out_indices if not -len(stages) <= i < len(stages)]
        if bad or not out_indices:
            raise ConfigError(
                f"{entry.name} has {len(stages)} feature maps, 0 to {len(stages) - 1}: out_indices={out_indices}."
            )
        options |= {"features_only": True, "out_indices": tuple(i % len(stages) for i in out_indices)}
        if feature_cls is not None:
            options["feature_cls"] = feature_cls
    model_args = model._model_args
    try:
        wrapped = build_model_with_cfg(
            lambda **_: model, entry.name, False, pretrained_cfg=cfg, feature_cfg=feature_config(model), **options
        )
    except AssertionError as error:
        raise ConfigError(
            f"feature_cls={feature_cls!r} takes {entry.name} apart, and finds no feature maps: {error}. Choose "
            "getter or hook."
        ) from None
    wrapped._model_args = model_args
    if "load_report" in model.__dict__:
        wrapped.__dict__["load_report"] = model.__dict__["load_report"]
    return wrapped
