"""Which outputs of a model are asked, and what counts as right for each image: by names, or by a label map."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import ImageNetInfo, RealLabelsImagenet
from torch import nn

from zoo.data import ImageSplit, align_classes
from zoo.errors import ConfigError, DataError, UnknownModelError, did_you_mean
from zoo.registry import get_entry

__all__ = ["LABEL_MAPS", "Targets", "check_label_map", "class_names", "class_outputs", "find_targets", "fit_classes"]


@dataclasses.dataclass(frozen=True)
class Targets:
    """The right answers of a split.

    `labels` is (N, K), indices into `classes`: up to K right answers for each image, filled up with -1; an image
    without any is left out. `outputs` are the model's outputs that stand for `classes`, None for all of them in order.
    """

    classes: tuple[str, ...]
    labels: np.ndarray
    outputs: np.ndarray | None = None


def find_targets(split: ImageSplit, model: nn.Module, label_map: str | None = None) -> Targets:
    """What `label_map` says of the images of `split`; without one, classes are matched as `fit_classes` does.

    `label_map` is one of LABEL_MAPS or a file. Raises DataError where it does not fit the data or the model, and
    ConfigError where it is neither.
    """
    if label_map is None:
        split, names = fit_classes(split, model)
        return Targets(names, split.labels[:, None])
    check_label_map(label_map)
    return LABEL_MAPS[label_map](split, model) if label_map in LABEL_MAPS else _mapped_by_file(split, model, label_map)


def check_label_map(label_map: str) -> None:
    """Raises ConfigError for a label map that is neither one of LABEL_MAPS nor a file."""
    if label_map not in LABEL_MAPS and not Path(label_map).expanduser().is_file():
        raise ConfigError(
            f"There is no label map {label_map!r}, and no file of this name.{did_you_mean(label_map, LABEL_MAPS)} "
            f"There are {', '.join(LABEL_MAPS)}; or name a file."
        )


# ------------------------------------------------------------------------------------------------------ ImageNet's kin


def _imagenet(split: ImageSplit, model: nn.Module) -> Targets:
    """Folders called by WordNet ids, in the order of ImageNet-1k; ImageNet-Sketch (arXiv 1905.13549) is such a one."""
    return _by_synset(split, model, tuple(ImageNetInfo().label_names()), "ImageNet-1k")


def _imagenet_v2(split: ImageSplit, model: nn.Module) -> Targets:
    """ImageNet-V2 (arXiv 1902.10811): folders 0 to 999 are numbers of classes, whatever their order as text."""
    synsets = tuple(ImageNetInfo().label_names())
    wrong = [name for name in split.classes if not (name.isascii() and name.isdigit() and int(name) < len(synsets))]
    if wrong:
        raise DataError(
            f"The classes of ImageNet-V2 are called 0 to 999, and {len(wrong)} of the data's are not: {_first(wrong)}."
        )
    numbers = np.array([int(name) for name in split.classes])
    return Targets(synsets, _renumbered(split, numbers), _imagenet_outputs(model, synsets))


def _imagenet_a(split: ImageSplit, model: nn.Module) -> Targets:
    """ImageNet-A (arXiv 1907.07174): 200 classes of ImageNet-1k; the other 800 outputs are not asked."""
    return _by_synset(split, model, _subset("imagenet_a"), "ImageNet-A")


def _imagenet_r(split: ImageSplit, model: nn.Module) -> Targets:
    """ImageNet-R (arXiv 2006.16241): 200 classes of ImageNet-1k; the other 800 outputs are not asked."""
    return _by_synset(split, model, _subset("imagenet_r"), "ImageNet-R")


def _mini_imagenet(split: ImageSplit, model: nn.Module) -> Targets:
    """mini-ImageNet (arXiv 1606.04080): 100 classes of ImageNet-1k; the other 900 outputs are not asked."""
    return _by_synset(split, model, _subset("mini_imagenet"), "mini-ImageNet")


def _imagenet_real(split: ImageSplit, model: nn.Module) -> Targets:
    """Reassessed labels of ImageNet's 50,000 validation images (arXiv 2006.07159): none, one or several for each.

    Images are known by their names, such as ILSVRC2012_val_00000001.JPEG, wherever they lie.
    """
    synsets = tuple(ImageNetInfo().label_names())
    answers = list(RealLabelsImagenet(range(50_000)).real_labels.values())
    labels = np.full((len(split), max(map(len, answers))), -1)
    for index in range(len(split)):
        name = split.source.name(index)
        found = re.search(r"ILSVRC2012_val_(\d{8})", Path(name).name)
        if found is None or not 1 <= int(found[1]) <= len(answers):
            raise DataError(
                f"The label map real knows images by names such as ILSVRC2012_val_00000001.JPEG, and {name!r} has none."
            )
        right = answers[int(found[1]) - 1]
        labels[index, : len(right)] = right
    return Targets(synsets, labels, _imagenet_outputs(model, synsets))


LABEL_MAPS: Mapping[str, Callable[[ImageSplit, nn.Module], Targets]] = {
    "imagenet": _imagenet,
    "real": _imagenet_real,
    "v2": _imagenet_v2,
    "a": _imagenet_a,
    "r": _imagenet_r,
    "sketch": _imagenet,
    "mini": _mini_imagenet,
}


def _subset(name: str) -> tuple[str, ...]:
    """The WordNet ids of a part of ImageNet-1k, as timm lists them."""
    indices = resources.files("timm.data").joinpath(f"_info/{name}_indices.txt").read_text().split()
    synsets = ImageNetInfo().label_names()
    return tuple(synsets[int(index)] for index in indices)


def _by_synset(split: ImageSplit, model: nn.Module, synsets: tuple[str, ...], what: str) -> Targets:
    unknown = [name for name in split.classes if name not in synsets]
    if unknown:
        raise DataError(
            f"{len(unknown)} of the data's {len(split.classes)} classes are not {what}'s, which are called by WordNet "
            f"ids such as {synsets[0]}: {_first(unknown)}."
        )
    return Targets(synsets, align_classes(split, synsets).labels[:, None], _imagenet_outputs(model, synsets))


def _imagenet_outputs(model: nn.Module, synsets: Sequence[str]) -> np.ndarray | None:
    """Which outputs stand for `synsets`: by name where the model's classes are called so, else as ImageNet-1k's."""
    names = label_names(model)
    if names is None or not set(synsets) <= set(names):
        names = tuple(ImageNetInfo().label_names())
        if model.num_classes != len(names):
            raise DataError(
                f"This label map is for models of ImageNet-1k's 1000 classes, and this one has {model.num_classes}."
            )
    position = {name: index for index, name in enumerate(names)}
    outputs = np.array([position[synset] for synset in synsets])
    return None if np.array_equal(outputs, np.arange(len(names))) else outputs


# --------------------------------------------------------------------------------------------------------------- files


def _mapped_by_file(split: ImageSplit, model: nn.Module, path: str) -> Targets:
    """A map from the data's classes to the model's.

    A text file has, line by line, what the data call the model's classes (timm's class maps are such); a JSON file is
    an object from the data's names to the model's names or numbers, and may give several of the data one answer.
    """
    num_classes: int = model.num_classes  # type: ignore[assignment]
    names = class_names(model) or tuple(map(str, range(num_classes)))
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        if path.lower().endswith(".json"):
            given = json.loads(text)
        else:
            given = {name.strip(): number for number, name in enumerate(text.splitlines())}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"The label map {path!r} cannot be read: {error}") from None
    if not isinstance(given, dict):
        raise ConfigError(f"The label map {path!r} must hold one object, from the data's classes to the model's.")
    lacking = [name for name in split.classes if name not in given]
    if lacking:
        raise DataError(
            f"The label map {path!r} lacks {len(lacking)} of the data's {len(split.classes)} classes: "
            f"{_first(lacking)}.{did_you_mean(lacking[0], given)}"
        )
    numbers = np.array([_class_number(given[name], names, path) for name in split.classes])
    return Targets(names, _renumbered(split, numbers))


def _renumbered(split: ImageSplit, numbers: np.ndarray) -> np.ndarray:
    """(N, 1) labels, of which -1 stands for none, as a stream's samples may have."""
    return np.where(split.labels < 0, -1, numbers[split.labels])[:, None]


def _class_number(value: Any, names: Sequence[str], path: str) -> int:
    if type(value) is int and 0 <= value < len(names):
        return value
    if value in names:
        return names.index(value)
    near = did_you_mean(value, names) if isinstance(value, str) else ""
    raise DataError(f"The label map {path!r} names a class that the model has not: {value!r}.{near}")


# -------------------------------------------------------------------------------------------------------------- by name


def fit_classes(split: ImageSplit, model: nn.Module) -> tuple[ImageSplit, tuple[str, ...]]:
    """`split` with labels as the model numbers its classes, and the classes' names.

    Matched by name where the model knows all the split's names (a split may hold some of the classes only), else by
    number, which takes equally many classes. Classes that are called 0, 1, 2, ... say their numbers themselves. Where
    the split's numbers are only the alphabetical order of its names, or it has some of the model's names at other
    numbers, they say nothing to a model that knows other names. Raises DataError for what does not fit.
    """
    num_classes: int = model.num_classes  # type: ignore[assignment]
    names = class_names(model)
    if names is not None and set(split.classes) <= set(names):
        return align_classes(split, names), names
    numbered = all(name.isascii() and name.isdigit() for name in split.classes)
    if numbered and sorted(map(int, split.classes)) == list(range(num_classes)) and label_names(model) is None:
        by_number = tuple(sorted(split.classes, key=int))  # not as text, where 10 comes before 2
        return align_classes(split, by_number), by_number
    # numbers that say nothing: the alphabetical order of folders, or another order of some of the model's own names
    reordered = names is not None and any(n in names and names.index(n) != i for i, n in enumerate(split.classes))
    if names is not None and (split.alphabetical or reordered):
        unknown = [name for name in split.classes if name not in names]
        unmatched = [name for name in names if name not in split.classes]
        lacking = f", and the data lacks {len(unmatched)} of its own: {_first(unmatched)}" if unmatched else ""
        raise DataError(
            f"The model does not know {len(unknown)} of the data's {len(split.classes)} classes: {_first(unknown)}"
            f"{lacking}.{did_you_mean(unknown[0], names)} Rename the data's classes to the model's names, or "
            "evaluate on the classes that it was trained on."
        )
    if len(split.classes) == num_classes:
        return split, split.classes
    raise DataError(
        f"The data has {len(split.classes)} classes and the model {num_classes}, and their names do not tell which is "
        f"which: the data's begin with {', '.join(map(repr, split.classes[:3]))}."
    )


def class_outputs(split: ImageSplit, model: nn.Module) -> np.ndarray:
    """The model's number of each class of `split`, (C,), matched as `fit_classes` does. Raises DataError."""
    one_each = ImageSplit(split.source, np.arange(len(split.classes)), split.classes, split.alphabetical)
    return fit_classes(one_each, model)[0].labels


def _first(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")


def class_names(model: nn.Module) -> tuple[str, ...] | None:
    """Names of the model's classes as its weights state them; WordNet ids for ImageNet-1k; None where unknown."""
    return label_names(model) or (tuple(ImageNetInfo().label_names()) if _knows_imagenet(model) else None)


def label_names(model: nn.Module) -> tuple[str, ...] | None:
    names = model.pretrained_cfg.get("label_names")  # type: ignore[union-attr,operator]
    num_classes = model.num_classes
    if isinstance(names, Mapping):  # index to name, as a Hub config may hold it
        names = [names.get(str(i), names.get(i)) for i in range(num_classes)]  # type: ignore[arg-type]
    if names and len(names) == num_classes and None not in names:
        return tuple(map(str, names))
    return None


def _knows_imagenet(model: nn.Module) -> bool:
    """Whether `pretrained_cfg` names a published checkpoint of ImageNet-1k, and the model has its classes."""
    cfg: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    tag = cfg.get("tag") or ""
    if not (model.num_classes == cfg.get("num_classes") == 1000 and tag):
        return False
    try:
        return get_entry(str(cfg.get("architecture"))).find_weights(tag).dataset == "imagenet-1k"
    except UnknownModelError:  # timm's own, whose tags say what they were trained on last
        return "in1k" in tag.split("_")
