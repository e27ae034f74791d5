"""The registry: what models there are, and every fact about them. Imports no torch.

A model file registers one `Entry` per variant. The facts that need arithmetic (parameters, MACs) are computed once and
kept in `index.json`, which `python -m zoo.index` writes; listing, searching and reading facts use that file alone.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import importlib
import inspect
import json
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from zoo.errors import ConfigError, UnknownModelError, ZooError, check_keywords, did_you_mean
from zoo.files import checkpoint_folder

if TYPE_CHECKING:
    import torch
    from torch import nn

    StateDict = dict[str, torch.Tensor]

__all__ = [
    "Entry",
    "LanguageFacts",
    "ModelInfo",
    "Paper",
    "Reported",
    "Weights",
    "list_models",
    "model_info",
    "pareto",
    "register",
    "search",
]

INDEX_PATH = Path(__file__).with_name("index.json")
HUB_PREFIXES = ("hf-hub:", "hf_hub:")  # of a repository: timm writes it with a hyphen, and reads both
PLACES = (*HUB_PREFIXES, "local-dir:")  # what stands before a place, in what names a model with its weights
TASKS = ("vision", "segmentation", "language")  # "vision" is image classification

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """Where an architecture was published."""

    title: str
    authors: str
    venue: str
    arxiv: str  # identifier, e.g. "2111.11418"

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """The costs that the authors state, in their own rounding, and where they state them."""

    params: float
    macs: float | None = None
    input_size: tuple[int, int, int] = (3, 224, 224)  # that the MACs are for
    source: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """One published checkpoint: where it lies, what may be done with it, and what its authors claim for it.

    Exactly one of `hub_id`, `url` and `page` is set. `filename` is the file in the Hub repository (None: the first of
    `model.safetensors`, `pytorch_model.bin` that is there) or, where `url` is a zip archive, in that. `page` is where a
    person fetches what no program can, a shared folder or the like.
    """

    tag: str
    license: str
    hub_id: str | None = None
    filename: str | None = None
    revision: str | None = None
    url: str | None = None
    page: str | None = None
    sha256: str | None = None
    dataset: str = "imagenet-1k"
    pretrained_on: str | None = None  # an earlier training stage, e.g. "imagenet-22k"
    top1: float | None = None  # percent, on the data set's validation split
    top5: float | None = None
    miou: float | None = None  # of segmentation, percent, likewise
    accuracy_source: str | None = None
    num_classes: int = 1000
    input_size: tuple[int, int, int] = (3, 224, 224)
    pool_size: tuple[int, int] | None = None  # of the last map, where that is not input_size / 32, rounded up
    crop_pct: float = 0.875
    crop_mode: Literal["center", "squash"] = "center"  # timm's; "squash" does not keep the shape of the image
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    test_input_size: tuple[int, int, int] | None = None  # where a larger one than in training was evaluated, too
    test_crop_pct: float | None = None  # at that size
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # model arguments it was trained with
    gated: bool = False  # the Hub asks for consent to terms before it gives the files
    use_ema: bool = True  # of a file that holds averaged weights and the last ones: which were evaluated
    note: str | None = None

    @property
    def source(self) -> str:
        if self.url or self.page:
            return self.url or str(self.page)
        return f"hf-hub:{self.hub_id}" + (f"@{self.revision}" if self.revision else "")

    @property
    def origin_url(self) -> str:
        """The address of the place where they were published."""
        return f"https://huggingface.co/{self.hub_id}" if self.hub_id else self.source


UNSTATED = "unstated"  # the licence of what its authors published without one


def is_restricted(license: str | None) -> bool:
    """Whether weights under `license` may not be passed on, or not for every use: none is stated, or noncommercial."""
    return license == UNSTATED or re.search(r"(^|-)nc(-|$)|non-?commercial", license or "") is not None


# fields of Weights that say nothing of a language model
OF_IMAGES = (
    *("top1", "top5", "miou", "num_classes", "input_size", "pool_size", "crop_pct", "crop_mode"),
    *("interpolation", "mean", "std", "test_input_size", "test_crop_pct", "use_ema"),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One architecture variant: how to build it and where it comes from.

    `build(**args, num_classes=..., in_chans=...)` returns the module; every argument can be overridden at creation.
    `convert(state_dict, model)` turns any published checkpoint layout into the model's own.
    """

    name: str
    build: Callable[..., nn.Module]
    family: str
    task: Literal["vision", "segmentation", "language"] = "vision"
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    paper: Paper | None = None
    compact: str = ""  # what makes it compact, in one sentence
    code_license: str = ""
    code_url: str = ""
    reported: Reported | None = None
    weights: tuple[Weights, ...] = ()
    convert: Callable[[StateDict, nn.Module], StateDict] | None = None
    arguments_of: Callable[[StateDict], dict[str, Any]] | None = None  # reads them from the shapes of a checkpoint
    input_size: tuple[int, int, int] = (3, 224, 224)
    pool_size: tuple[int, int] | None = None  # of the last map, where it is not input_size / 32, rounded up
    fixed_input_size: bool = False  # the module takes `img_size` and runs at that size alone
    first_conv: str | tuple[str, ...] = ""  # module names, as in timm's pretrained_cfg
    classifier: str | tuple[str, ...] = ""
    note: str = ""  # e.g. why our figures differ from the reported ones
    # parts of names of published files that fit and yet are of another network, and why they are
    outdated_files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # values of arguments that timm's class of the same name does not have but builds in
    timm_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    module: str = ""  # that registered it; register() fills it in

    def find_weights(self, tag: str | None = None) -> Weights:
        """The weights called `tag`; the first, which is the default, without one."""
        return _find_weights(self.name, self.weights, tag)

    @property
    def is_restricted(self) -> bool:
        """Whether there is no set of published weights that may be passed on for every use."""
        return bool(self.weights) and all(is_restricted(weights.license) for weights in self.weights)

    def default(self, argument: str, otherwise: Any) -> Any:
        """The value that `argument` of the architecture has where none is given."""
        parameter = inspect.signature(self.build).parameters.get(argument)
        if argument in self.args:
            return self.args[argument]
        return otherwise if parameter is None or parameter.default is parameter.empty else parameter.default

    def unlike_timm(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """The values that the arguments in `timm_args` have in a model made with `args`: to be saved with it."""
        return {key: args.get(key, self.default(key, value)) for key, value in self.timm_args.items()}

    def pretrained_cfg(self, tag: str | None = None) -> dict[str, Any]:
        """timm's description of weights and preprocessing: a plain dict that `timm.models.PretrainedCfg` takes.

        That of a language model says whose weights they are, and nothing of images.
        """
        if tag is not None or self.weights:
            weights = self.find_weights(tag)
        else:
            classes = self.default("num_classes", 1000)
            weights = Weights(tag="", license="", input_size=self.input_size, num_classes=classes)
        cfg: dict[str, Any] = {"architecture": self.name, "tag": weights.tag}
        if self.task != "language":
            size = weights.input_size
            own_pool = self.pool_size if size == self.input_size else None
            cfg |= {
                "num_classes": self.args.get("num_classes", weights.num_classes)
                if tag is None
                else weights.num_classes,
                "input_size": size,
                "pool_size": weights.pool_size or own_pool or tuple(-(-side // 32) for side in size[1:]),
                "crop_pct": weights.crop_pct,
                "crop_mode": weights.crop_mode,
                "interpolation": weights.interpolation,
                "mean": weights.mean,
                "std": weights.std,
                "fixed_input_size": self.fixed_input_size,
                "first_conv": self.first_conv,
                "classifier": self.classifier,
            }
            for key in ("test_input_size", "test_crop_pct"):
                if getattr(weights, key) is not None:
                    cfg[key] = getattr(weights, key)
        if weights.license:
            cfg["license"] = weights.license
        if weights.hub_id:
            cfg["hf_hub_id"] = weights.hub_id + (f"@{weights.revision}" if weights.revision else "")
            if weights.filename:
                cfg["hf_hub_filename"] = weights.filename
        if weights.url:
            cfg["url"] = weights.url
        return cfg


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LanguageFacts:
    """Sizes of a language model, and what a token costs beside `ModelInfo.macs`. A layer that runs twice counts twice.

    `prefill_macs`: linear layers for a token of a prompt, without the head, which its last token alone needs.
    `attention_macs`: what each remembered token adds to one at decode; `prefill_attention_macs`: to one of a prompt,
    which is another number where attention at decode is computed in the memory's own, latent space.
    """

    context_length: int  # tokens
    vocab_size: int
    stored_layers: int
    executed_layers: int
    prefill_macs: int
    attention_macs: int
    prefill_attention_macs: int
    kv_elements: int  # numbers remembered of a token
    windowed_kv_elements: int = 0  # of them, those that are forgotten `sliding_window` tokens later
    sliding_window: int | None = None

    @property
    def kv_bytes(self) -> int:
        """Bytes remembered of a token, at 2 a number."""
        return 2 * self.kv_elements


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What is known of a model without building it. Costs are for one input of `input_size`, batch 1.

    `macs`: multiply-accumulates of convolution, linear, matmul and attention (one fused multiply-add counts one).
    `fvcore_total`: what fvcore counts, which adds norms. `activations`: output elements of those same operators, not
    of norms. `params` holds frozen weights too; `trainable_params` does not.

    A language model has `language`, and `macs` are those of its linear layers and head for one generated token; it has
    no input size, fvcore total and activations, which depend on the length of the text: `zoo.profile` counts those.
    """

    name: str
    family: str
    task: str
    module: str
    input_size: tuple[int, ...] = ()
    params: int
    trainable_params: int
    macs: int
    fvcore_total: int | None = None
    activations: int | None = None
    language: LanguageFacts | None = None
    paper: Paper | None = None
    compact: str = ""
    code_license: str = ""
    code_url: str = ""
    reported: Reported | None = None
    weights: tuple[Weights, ...] = ()
    note: str = ""

    @property
    def top1(self) -> float | None:
        """The best ImageNet-1k top-1, in percent, that is claimed for any of its weights at `input_size`.

        Weights for another input size do not count: what they reach, they reach at other costs than those given here.
        """
        return self._best_claim("top1", "imagenet-1k")

    @property
    def miou(self) -> float | None:
        """The best Cityscapes mIoU, in percent, that is claimed for any of its weights at `input_size`."""
        return self._best_claim("miou", "cityscapes")

    def _best_claim(self, figure: str, dataset: str) -> float | None:
        rated = [w for w in self.weights if w.dataset == dataset and w.input_size == self.input_size]
        return max((claim for w in rated if (claim := getattr(w, figure)) is not None), default=None)

    @property
    def kv_bytes(self) -> int | None:
        """Bytes that a language model remembers of a token, at 2 a number; None of other models."""
        return None if self.language is None else self.language.kv_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: without what means nothing for a model of its task."""
        facts = dataclasses.asdict(self)
        if self.task != "language":
            del facts["language"]
            return facts
        for key in ("input_size", "fvcore_total", "activations"):
            del facts[key]
        if facts["reported"]:
            del facts["reported"]["input_size"]
        facts["weights"] = tuple({k: v for k, v in w.items() if k not in OF_IMAGES} for w in facts["weights"])
        return facts

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> ModelInfo:
        fields = dict(facts)
        fields["input_size"] = tuple(fields.get("input_size", ()))
        if fields.get("language"):
            fields["language"] = LanguageFacts(**fields["language"])
        if fields.get("paper"):
            fields["paper"] = Paper(**fields["paper"])
        if fields.get("reported"):
            fields["reported"] = Reported(**_tuples(fields["reported"]))
        unsaid = {"dataset": ""} if fields["task"] == "language" else {}
        fields["weights"] = tuple(Weights(**{**unsaid, **_tuples(w)}) for w in fields.get("weights", ()))
        return cls(**fields)


def _find_weights(name: str, weights: tuple[Weights, ...], tag: str | None) -> Weights:
    if not weights:
        raise UnknownModelError(
            f"{name} has no published weights. Load your own with checkpoint_path= (--checkpoint), or, in Python, "
            "leave out pretrained=True."
        )
    if tag is None:
        return weights[0]
    tags = [w.tag for w in weights]
    if tag not in tags:
        raise UnknownModelError(
            f"{name} has no weights tagged {tag!r}.{did_you_mean(tag, tags)} There are: {', '.join(tags)}."
        )
    return weights[tags.index(tag)]


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


# ---------------------------------------------------------------------------------------------------------- registering

_entries: dict[str, Entry] = {}  # what this process has registered: model files that were imported, and a user's own
_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")

Builder = TypeVar("Builder", bound=Callable[..., Any])


@overload
def register(target: Entry, /, *, replace: bool = False) -> Entry: ...
@overload
def register(target: Builder, /) -> Builder: ...
@overload
def register(*, replace: bool = False, **fields: Any) -> Callable[[Builder], Builder]: ...
def register(target: Any = None, /, *, replace: bool = False, **fields: Any) -> Any:
    """Give a model every verb of the zoo.

    Takes an `Entry`, or decorates a class or function that builds the module; the fields of `Entry` are keywords:

        @zoo.register
        def my_net(num_classes=1000, in_chans=3): ...

        @zoo.register(name="my_net_large", family="mine", args={"width": 96})
        class MyNet(nn.Module): ...

    Raises ConfigError for a name that is taken (unless `replace`), or that is not lower-case letters, digits and `_`.
    A model registered again by its own module (a notebook cell that is run twice) takes its own place.
    """
    module = sys._getframe(1).f_globals.get("__name__", "__main__")
    if isinstance(target, Entry):
        return _add(dataclasses.replace(target, module=module), replace)
    if target is not None and not callable(target):
        raise ConfigError(f"register() takes an Entry, a class or a function, not {type(target).__name__}.")

    def decorate(build: Builder) -> Builder:
        name = fields.get("name") or getattr(build, "__name__", None)
        known = {field.name for field in dataclasses.fields(Entry)} - {"build", "module"}
        for key in fields:
            if key not in known:
                raise ConfigError(f"register() has no field {key!r}.{did_you_mean(key, known)}")
        _add(Entry(**{"family": name, **fields, "name": name, "build": build, "module": module}), replace)
        return build

    return decorate if target is None else decorate(target)


def _add(entry: Entry, replace: bool) -> Entry:
    if not isinstance(entry.name, str) or not _NAME.fullmatch(entry.name):
        raise ConfigError(
            f"{entry.name!r} cannot name a model: use lower-case letters, digits and underscores, as in 'my_net_s12'."
        )
    if entry.task not in TASKS:
        raise ConfigError(f"{entry.name}: task is {entry.task!r}, but must be one of {', '.join(TASKS)}.")
    facts = _index().get(entry.name)
    if facts and facts.module == entry.module and not replace and not _is_builtin(entry.name):
        return _entries[entry.name]  # a user's model took this name before the file of the shipped one was imported
    # a model file that is imported again (or reloaded) registers itself anew; anyone else must ask
    taken_by = _entries[entry.name].module if entry.name in _entries else facts.module if facts else None
    if taken_by is not None and taken_by != entry.module and not replace:
        raise ConfigError(
            f"A model called {entry.name!r} is registered already, by {taken_by}. "
            "Choose another name, or pass replace=True."
        )
    _entries[entry.name] = entry
    _measured_info.cache_clear()
    return entry


@functools.cache
def _index() -> dict[str, ModelInfo]:
    """The generated facts of the models that come with the package."""
    if not INDEX_PATH.exists():  # only while it is generated for the first time
        return {}
    models = json.loads(INDEX_PATH.read_text(encoding="utf-8"))["models"]
    return {facts["name"]: ModelInfo.from_dict(facts) for facts in models}


def _is_builtin(name: str) -> bool:
    """Whether the index speaks for `name`: not where a user has put a model of their own in its place."""
    return name in _index() and (name not in _entries or _entries[name].module == _index()[name].module)


# -------------------------------------------------------------------------------------------------------------- finding


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]


def _all_names() -> list[str]:
    return sorted(_index().keys() | _entries.keys(), key=_natural)


def split_name(name: str) -> tuple[str, str | None, str | None]:
    """`"poolformer_s12.sail_in1k@abc"` -> `("poolformer_s12", "sail_in1k", "abc")`."""
    if not isinstance(name, str):
        raise ConfigError(f"A model name is a string such as 'poolformer_s12', not {type(name).__name__}.")
    name, _, revision = name.partition("@")
    name, _, tag = name.partition(".")
    return name, tag or None, revision or None


def get_entry(name: str) -> Entry:
    """The entry called `name` (a tag or revision behind it is passed over); imports its model file if need be.

    Raises UnknownModelError with the closest names.
    """
    base, _, _ = split_name(name)
    if base not in _entries and base in _index():
        importlib.import_module(_index()[base].module)
    if base not in _entries:
        if any(mark in name for mark in "/\\:") or Path(name).is_dir():
            raise UnknownModelError(f"There is no model called {name!r}.{_meant_by_path(name)}")
        raise UnknownModelError(f"There is no model called {base!r}.{did_you_mean(base, _all_names())}")
    return _entries[base]


def _meant_by_path(name: str) -> str:
    if name.startswith("timm/"):
        return f" timm.create_model({name[5:]!r}) makes timm's; zoo.loading.load_model takes both."
    if advice := misspelt_place(name):
        return advice
    if name.startswith(PLACES):
        return " That names weights, and this asks for an architecture: zoo profile and zoo card take weights."
    if not name.strip():
        return ""
    if Path(name).expanduser().is_dir():
        if checkpoint_folder(Path(name).expanduser()) is None:
            return " That folder is neither one of a run with a checkpoint nor one with config.json and its weights."
        return f" For the model in that folder, write local-dir:{name}, as create_model and zoo profile take it."
    return f" For a folder, write local-dir:{name}; for a repository on the Hub, hf-hub:{name}."


def misspelt_place(name: str) -> str:
    """What to write for a name such as `Local-Dir:...`, with a space before it or other cases; empty for others."""
    written = name.strip()
    place, _, rest = written.partition(":")
    is_meant = f"{place.lower()}:" in PLACES and (written != name or not written.startswith(PLACES))
    return f" Write {place.lower()}:{rest}." if is_meant else ""


def model_info(name: str) -> ModelInfo:
    """Every fact about a model: paper, costs, licences, weights.

    A name with a tag keeps those weights alone. A model of the user's own is built on the meta device and measured at
    the first call. Raises UnknownModelError with the closest names.
    """
    base, tag, _ = split_name(name)
    info = _index()[base] if _is_builtin(base) else _measured_info(get_entry(base).name)
    if tag is not None:
        info = dataclasses.replace(info, weights=(_find_weights(base, info.weights, tag),))
    return info


@functools.cache
def _measured_info(name: str) -> ModelInfo:
    from zoo.index import measure

    return measure(_entries[name])


def list_models(
    pattern: str | Sequence[str] = "",
    *,
    task: str | None = None,
    family: str | None = None,
    pretrained: bool = False,
) -> list[str]:
    """Names of the models, in natural order.

    `pattern` is a shell-style wildcard, or several; plain text without a wildcard matches anywhere in a name; case
    does not matter. With `pretrained`, names carry their tag, one for each published checkpoint
    (`poolformer_s12.sail_in1k`), and a pattern may match with the tag or without. Raises ConfigError for a task or
    family that does not exist.
    """
    _check_choice("task", task, TASKS)
    given = [pattern] if isinstance(pattern, str) else pattern
    if not isinstance(given, list | tuple) or not all(isinstance(p, str) for p in given):
        raise ConfigError(f"A pattern is a string such as 'poolformer*', or a list of such strings, not {pattern!r}.")
    patterns = [p.lower() if any(c in p for c in "*?[") else f"*{p.lower()}*" for p in given if p] or ["*"]
    names = []
    families = set()
    for name in _all_names():
        facts: ModelInfo | Entry = _index()[name] if _is_builtin(name) else _entries[name]
        families.add(facts.family)
        if (task and facts.task != task) or (family and facts.family != family):
            continue
        bare_match = _matches(name, patterns)
        if pretrained:
            tagged = [f"{name}.{w.tag}" for w in facts.weights]
            names += [t for t in tagged if bare_match or _matches(t.lower(), patterns)]
        elif bare_match:
            names.append(name)
    _check_choice("family", family, families)
    return names


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_choice(what: str, value: str | None, choices: Any) -> None:
    if value is not None and value not in choices:
        raise ConfigError(
            f"There is no {what} {value!r}.{did_you_mean(str(value), choices)} There are: {', '.join(sorted(choices))}."
        )


SORT_KEYS = ("name", "params", "macs", "activations", "kv_bytes", "top1", "miou")


def search(
    *,
    task: str | None = None,
    family: str | None = None,
    max_params: float | None = None,
    max_macs: float | None = None,
    min_top1: float | None = None,
    license: str | None = None,
    sort: str = "params",
) -> list[ModelInfo]:
    """Models within a budget, as `ModelInfo`, smallest first, those without a figure last.

    `sort="top1"`, and `"miou"` of segmentation networks, put the best first.
    `max_macs` holds at each model's own input size, and for one token of a language model. `min_top1` (percent) asks
    for claimed ImageNet-1k accuracy, so models without such a claim drop out. `license` must be that of the code and
    of at least one checkpoint, if there are any; wildcards work (`"apache*"`), case does not matter.
    """
    _check_choice("sort key", sort, SORT_KEYS)
    if license is not None and not isinstance(license, str):
        raise ConfigError(f"license is a name or wildcard such as 'apache*', not {license!r}.")
    for what, value in (("max_params", max_params), ("max_macs", max_macs), ("min_top1", min_top1)):
        if value is not None and not (isinstance(value, int | float) and value > 0):
            raise ConfigError(f"{what} must be a number above zero, not {value!r}.")

    def fits(info: ModelInfo) -> bool:
        return (
            (max_params is None or info.params <= max_params)
            and (max_macs is None or info.macs <= max_macs)
            and (min_top1 is None or (info.top1 or 0) >= min_top1)
            and (license is None or _licensed(info, license))
        )

    infos = filter(None, map(_info_or_warning, list_models(task=task, family=family)))
    found = [info for info in infos if fits(info)]
    if sort == "name":
        return found
    if PARETO_AXES[sort]:
        return sorted(found, key=lambda info: -(getattr(info, sort) or 0))
    return sorted(found, key=lambda info: (getattr(info, sort) is None, getattr(info, sort) or 0))


def _info_or_warning(name: str) -> ModelInfo | None:
    """The facts of `name`, or None with a warning: a user's model that cannot be built is no reason to find nothing."""
    try:
        return model_info(name)
    except ZooError as error:
        warnings.warn(f"{name} is left out: {error}", stacklevel=4)
        return None


def _licensed(info: ModelInfo, pattern: str) -> bool:
    def matches(text: str) -> bool:
        return fnmatch.fnmatchcase(text.lower(), pattern.lower())

    return matches(info.code_license) and (not info.weights or any(matches(w.license) for w in info.weights))


PARETO_AXES = {
    **dict.fromkeys(("params", "macs", "activations", "fvcore_total", "kv_bytes"), False),
    **dict.fromkeys(("top1", "miou"), True),
}


def accuracy_axis(task: str | None) -> str:
    """The accuracy by which models of `task` are compared where none is named."""
    return "miou" if task == "segmentation" else "top1"


def pareto(x: str = "macs", y: str | None = None, **filters: Any) -> list[ModelInfo]:
    """The models that no other beats on both axes, sorted by `x`; `filters` are those of `search`.

    Costs (`params`, `macs`, `activations`, `fvcore_total`, `kv_bytes`) count as better when smaller, accuracies
    (`top1`, `miou`) when larger. `y` is `miou` with `task="segmentation"` and else `top1`, if not given. A model
    without the figure of an axis is left out.
    """
    check_keywords("pareto", filters, inspect.signature(search).parameters)
    if y is None:
        y = accuracy_axis(filters.get("task"))
    for axis in (x, y):
        _check_choice("axis", axis, PARETO_AXES)
    if x == y:
        raise ConfigError(f"pareto() needs two different axes, not {x!r} twice.")

    def cost(info: ModelInfo, axis: str) -> float:
        return -getattr(info, axis) if PARETO_AXES[axis] else getattr(info, axis)

    rated = [info for info in search(**filters) if all(getattr(info, axis) is not None for axis in (x, y))]
    front: list[ModelInfo] = []
    for info in sorted(rated, key=lambda info: (cost(info, x), cost(info, y))):
        ties = front and cost(info, x) == cost(front[-1], x) and cost(info, y) == cost(front[-1], y)
        if not front or ties or cost(info, y) < cost(front[-1], y):
            front.append(info)
    return front
