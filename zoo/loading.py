"""From what a user names to a model with weights: a name, a run, a folder, a repository, one of timm's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from zoo.errors import ConfigError, DownloadError, did_you_mean
from zoo.factory import create_model
from zoo.files import checkpoint_folder
from zoo.hub import load_config
from zoo.registry import PLACES, get_entry, list_models, misspelt_place, split_name

__all__ = [
    "check_is_whole",
    "create_timm_model",
    "holds_timm_model",
    "load_model",
    "looks_like_path",
    "model_task",
    "names_weights",
    "of_run",
    "resolve_path",
]


def load_model(source: str, checkpoint_path: str | None = None, **model_args: Any) -> nn.Module:
    """A model with weights, from whatever names one.

    `source`: a name in the zoo with the tag of its weights or without (then its default weights, or `checkpoint_path`),
    `timm/name`, `hf-hub:owner/name`, the folder of a run (its best checkpoint), or a folder in the Hub's layout.
    Raises ConfigError for a folder that is neither, and what `zoo.create_model` raises.
    """
    if source.startswith("timm/"):
        return create_timm_model(
            source, pretrained=checkpoint_path is None, checkpoint_path=checkpoint_path or "", **model_args
        )
    source = resolve_path(source)
    if holds_timm_model(source):
        return create_timm_model(
            source, pretrained=checkpoint_path is None, checkpoint_path=checkpoint_path or "", **model_args
        )
    tagged_or_hub = "." in source or ":" in source
    return create_model(
        source,
        pretrained=None if tagged_or_hub or checkpoint_path else True,
        checkpoint_path=checkpoint_path,
        **model_args,
    )


def check_is_whole(model: nn.Module) -> None:
    """Raise ConfigError for a model that `load_model` made of weights with another classifier, or with none: its own
    would be random."""
    report: Any = getattr(model, "load_report", None)
    fresh = [name for name in report.fresh if not name.endswith("num_batches_tracked")] if report is not None else []
    if fresh:
        cfg: Any = getattr(model, "pretrained_cfg", {})
        raise ConfigError(
            f"{report.source} has no {fresh[0]} for the {cfg.get('num_classes')} classes of {cfg.get('architecture')}, "
            "which would be random: open the folder of a run or a model as it is, whose config.json tells its classes."
        )


def resolve_path(source: str) -> str:
    """`source`, or, where that is a path to a run or a model, `local-dir:` and the folder where its weights lie.

    Raises ConfigError for a path at which there is neither.
    """
    if not source:
        raise ConfigError("The name of a model is empty.")
    if advice := misspelt_place(source):
        raise ConfigError(f"There is no model called {source!r}.{advice}")
    path = Path(source).expanduser()
    if path.exists() and not source.startswith(PLACES):
        folder = checkpoint_folder(path)
        if folder is not None:
            return f"local-dir:{folder}"
        if path.is_file():
            raise ConfigError(
                f"{source} has no config.json beside it that says what model it is: name the model, and give this file "
                "as checkpoint_path (--checkpoint)."
            )
        raise ConfigError(f"{source} is neither the folder of a run nor one with config.json and model.safetensors.")
    if looks_like_path(source):
        near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise ConfigError(f"There is no run or checkpoint {source!r}.{near}")
    return source


def of_run(path: str, prefix: str = "") -> str:
    """`path`, or, where that is the folder of a run or a model, where its weights lie."""
    folder = Path(path.removeprefix("local-dir:")).expanduser()
    found = checkpoint_folder(folder) if folder.is_dir() else None
    return path if found is None else f"{prefix}{found}"


def names_weights(name: str, pretrained: bool | None = None) -> bool:
    """Whether a run of the model `name` starts from the weights of that name: as `pretrained` says, or else where the
    name has a tag or is a place."""
    name = of_run(name, "local-dir:")
    return (":" in name or "." in name) if pretrained is None else pretrained


def model_task(source: str) -> str:
    """What `load_model(source)` is made for, "vision", "segmentation" or "language", without building it.

    Raises what `load_model` raises for a name that does not exist.
    """
    if source.startswith("timm/"):
        return "vision"
    source = resolve_path(source)
    if holds_timm_model(source):
        return "vision"
    if source.startswith(PLACES):
        architecture, args, _ = load_config(source)
        return args.get("task") or get_entry(architecture).task
    return get_entry(split_name(source)[0]).task


def holds_timm_model(source: str) -> bool:
    """Whether a model of timm's that the zoo lacks lies at this place, as a run of `timm/name` leaves it."""
    if not source.startswith(PLACES) or (architecture := load_config(source)[0]) in list_models():
        return False
    import timm

    return timm.is_model(architecture)


def looks_like_path(source: str) -> bool:
    """Whether the name of a model can only be meant for a path: no other has slashes, save timm's and Hub ids."""
    return "/" in source and not source.startswith(("timm/", *PLACES))


def create_timm_model(name: str, **args: Any) -> nn.Module:
    """timm's own model, for a name such as `timm/poolformer_s12`, or what lies at a place in the Hub's layout.

    Raises ConfigError for what timm does not take, CheckpointError for a file that holds no weights, DownloadError for
    weights that cannot be had.
    """
    import timm

    from zoo.compat.timm import timms_own
    from zoo.data.streaming import reason

    name = name.removeprefix("timm/")
    called = name if name.startswith(PLACES) else f"timm/{name}"
    if args.get("checkpoint_path"):
        from zoo.weights import locate, read_state_dict

        args["checkpoint_path"] = str(locate(args["checkpoint_path"]))
        read_state_dict(args["checkpoint_path"])  # says what is wrong with it, as timm does not
    try:
        with timms_own(name):
            model = timm.create_model(name, **args)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, SafetensorError) as error:
        raise ConfigError(f"timm does not make {called!r}: {error}") from None
    except OSError as error:
        if args.get("checkpoint_path"):
            raise
        raise DownloadError(
            f"The weights of {called!r} cannot be had: {reason(error).rstrip('.')}. Give a file of your own as "
            "checkpoint_path (--checkpoint), or try again later."
        ) from error
    cfg = model.pretrained_cfg
    model.pretrained_cfg = model.default_cfg = cfg if isinstance(cfg, dict) else cfg.to_dict()
    return model
