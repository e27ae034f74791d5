"""The zoo's vision models under timm's own `create_model`, `list_models` and tools."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
from timm.models import (
    PretrainedCfg,
    _registry,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from zoo.factory import build_module, feature_config
from zoo.hub import load_config
from zoo.registry import Entry, Weights, get_entry, list_models
from zoo.weights import StateDict, fetch, read_state_dict, unwrap

__all__: list[str] = []  # timm's register_model adds the names it registers
default_cfgs: dict[str, Any] = {}  # where timm's register_model looks for a function's weights
_Registered = tuple[Callable[..., nn.Module], dict[str, Any]]  # a function, and its weights by full name
_timms: dict[str, _Registered] = {}  # what ours have taken the place of


def register_with_timm(override: bool = False) -> list[str]:
    """Put every vision model of the zoo into timm's registry, and return the names that were put there.

    Names that timm has stay timm's unless `override`. Afterwards `timm.create_model(name)` builds the zoo's model, with
    timm's ways of loading weights, but that `pretrained=True` fetches what `zoo.create_model` does. Calling it again
    adds what was registered with the zoo meanwhile.
    """
    registered = []
    for name in list_models(task="vision"):
        owner = timm.is_model(name) and timm.model_entrypoint(name).__module__
        if owner and owner != __name__ and not override:
            continue
        _register(get_entry(name))
        registered.append(name)
    return registered


def _register(entry: Entry) -> None:
    tags = [weights.tag for weights in entry.weights]
    configs = {f"{entry.name}.{tag}": entry.pretrained_cfg(tag) for tag in tags}
    default, first = entry.pretrained_cfg(), next(iter(configs.values()), None)
    if first is None or default["num_classes"] != first["num_classes"]:  # those weights lack the model's classifier
        configs = {entry.name: default, **configs}
    for config in configs.values():
        config.pop("tag")  # timm takes it from the name
    default_cfgs.update(generate_default_cfgs(configs))
    if timm.is_model(entry.name) and timm.model_entrypoint(entry.name).__module__ != __name__:
        _timms[entry.name] = _registered(entry.name)
    entrypoint = _entrypoint(entry)
    globals()[entry.name] = entrypoint
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f"Overwriting {entry.name} in registry")
        register_model(entrypoint)


@contextlib.contextmanager
def timms_own(name: str) -> Iterator[None]:
    """Let timm build its own model of that name, though the zoo's may have taken its place in timm's registry."""
    name = name.partition(".")[0]
    if name not in _timms:
        yield
        return
    ours = _registered(name)
    _put_back(name, _timms[name])
    try:
        yield
    finally:
        _put_back(name, ours)


def _registered(name: str) -> _Registered:
    weights = _registry._model_pretrained_cfgs
    mine = {key: cfg for key, cfg in weights.items() if key == name or key.startswith(f"{name}.")}
    return timm.model_entrypoint(name), mine


def _put_back(name: str, registered: _Registered) -> None:
    weights = _registry._model_pretrained_cfgs
    for key in _registered(name)[1]:
        del weights[key]
    _registry._model_entrypoints[name], mine = registered
    weights.update(mine)


def _saved_args(cfg: Any) -> dict[str, Any]:
    """Model arguments of a repository or folder that timm has resolved, with those that timm does not know."""
    source = cfg.get("source") if isinstance(cfg, dict) else None
    if source == "hf-hub":
        return load_config(f"hf-hub:{cfg['hf_hub_id']}")[1]
    return load_config(f"local-dir:{cfg['file']}")[1] if source == "local-dir" else {}


def _weights_of(entry: Entry, cfg: PretrainedCfg) -> Weights | None:
    """The published weights that timm's description means: the default ones where it has no tag."""
    if cfg.source in ("hf-hub", "local-dir"):  # somebody's own
        return None
    return next((weights for weights in entry.weights if weights.tag == (cfg.tag or entry.weights[0].tag)), None)


def _has_published_source(entry: Entry, weights: Weights, cfg: PretrainedCfg) -> bool:
    """Whether timm would load the published file, and not one that the user names."""
    theirs = entry.pretrained_cfg(weights.tag)
    sources = ("state_dict", "file", "hf_hub_id", "hf_hub_filename", "url")
    return all((getattr(cfg, key) or None) == theirs.get(key) for key in sources)


def _entrypoint(entry: Entry) -> Callable[..., nn.Module]:
    parameters = inspect.signature(entry.build).parameters

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        cfg = resolve_pretrained_cfg(entry.name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        weights = _weights_of(entry, cfg)
        theirs = {} if weights is None else weights.args  # without which the weights compute something else
        if pretrained and weights is not None and _has_published_source(entry, weights, cfg):
            # not by timm, which keeps files under the last part of their URL, whosever they are
            tensors = read_state_dict(fetch(weights, cache_dir=kwargs.get("cache_dir")), use_ema=weights.use_ema)
            overlay = kwargs.get("pretrained_cfg_overlay") or {}
            kwargs["pretrained_cfg_overlay"] = {**overlay, "state_dict": tensors}

        def build(
            *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **args: Any
        ) -> nn.Module:
            args = {k: v for k, v in args.items() if k in parameters or k in kwargs}  # timm adds num_classes, in_chans
            model = build_module(entry, args, device=device, dtype=dtype)
            # timm adds what it was given, and saves all of it
            model.__dict__["_model_args"] = {**theirs, **entry.unlike_timm(args)}
            return model

        def convert(loaded: StateDict, model: Any) -> StateDict:
            model.pretrained_cfg.pop("state_dict", None)  # timm describes the model by it, and copies it for features
            tensors = unwrap(loaded, f"The checkpoint for {entry.name}", weights is None or weights.use_ema)
            return tensors if entry.convert is None else entry.convert(tensors, model)

        kwargs = {**theirs, **_saved_args(kwargs.get("pretrained_cfg")), **kwargs}
        if kwargs.get("features_only"):
            args = {k: v for k, v in kwargs.items() if k in parameters}
            model: Any = build_module(entry, args, device="meta")
            kwargs.setdefault("out_indices", tuple(range(len(model.feature_info))))
            kwargs["feature_cfg"] = feature_config(model)
        return build_model_with_cfg(
            build,
            entry.name,
            pretrained,
            pretrained_filter_fn=convert,
            **kwargs,
        )

    create.__name__ = create.__qualname__ = entry.name
    create.__module__ = __name__
    create.__doc__ = f"{entry.name}: {entry.compact}" if entry.compact else entry.name
    return create
