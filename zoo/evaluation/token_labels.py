"""Label maps for training with token labels: what a teacher sees at every place of every training image.

As Yun et al. 2021, "Re-labeling ImageNet", arXiv 2101.05022, make them: the teacher's classifier reads each place of
its last map by itself, instead of the pooled map. `zoo.data.token_labels` says what the files hold.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from zoo.data import DataConfig, load_split, preprocessing
from zoo.data.sources import ImageFiles, ImageSource
from zoo.data.streaming import reason
from zoo.data.token_labels import FACTS, map_place, read_facts
from zoo.errors import ConfigError, DataError
from zoo.evaluation.image_classification import Amp, Setting, num_classes
from zoo.evaluation.targets import class_outputs
from zoo.files import make_folder, whole_file

__all__ = ["LabelMapsMade", "make_token_labels", "place_logits"]

EXACT_IN_HALF = 2048  # whole numbers up to this one


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelMapsMade:
    """A folder of label maps: those written now and those kept, the shape of each, and images that cannot be read."""

    folder: Path
    written: int
    kept: int
    shape: tuple[int, ...]
    skipped: tuple[str, ...]


def make_token_labels(
    teacher: nn.Module,
    data: str | Path,
    folder: str | Path,
    *,
    name: str | None = None,
    split: str = "train",
    size: int | None = None,
    topk: int = 5,
    batch_size: int = 32,
    workers: int | None = None,
    device: str | torch.device | None = None,
    amp: Amp = "no",
    console: Console | None = None,
) -> LabelMapsMade:
    """Write what `teacher` sees at each place of the images in `data`/`split`/<class> into `folder`, a file for each.

    An image is resized whole to `size` x `size` (by default the teacher's own input size). The `topk` highest logits of
    each place are kept, over the mean of the others: 0 for each of those is then what the teacher says. Classes are
    matched by name, and numbered as in `data`. Maps that are there already are kept, so that an interrupted call can be
    repeated. `name` is what the record in `folder` calls the teacher; a `console` shows the progress.

    Raises ConfigError for a teacher whose classifier does not read single places and a folder that holds maps made
    otherwise, DataError for data that is missing or of other classes.
    """
    num_classes(teacher)
    if topk < 1:
        raise ConfigError(f"topk must be at least 1, not {topk}.")
    if size is not None and size < 1:
        raise ConfigError(f"size must be at least 1, not {size}.")
    config = DataConfig(name="folder", path=str(data), train_split=split, batch_size=batch_size)
    config = config if workers is None else dataclasses.replace(config, workers=workers)
    images = load_split(config, training=True)
    files = cast(ImageFiles, images.source)
    columns = torch.from_numpy(class_outputs(images, teacher))
    preprocess = preprocessing(teacher) | {"crop_pct": 1.0, "crop_mode": "squash"}
    if size is not None:
        preprocess["input_size"] = (preprocess["input_size"][0], size, size)
    setting = Setting(teacher, config, device, amp, channels_last=False)
    columns = columns.to(setting.device)
    kept = min(topk, len(images.classes))
    shape = (2, kept, *_places(teacher, preprocess["input_size"], setting))

    places = [map_place(files, index) for index in range(len(images))]
    _check_places(files, places)
    root = make_folder(folder)
    facts = {
        "teacher": name or str(cast(Any, teacher).pretrained_cfg.get("architecture", type(teacher).__name__)),
        "teacher_weights": _fingerprint(teacher),
        "split": split,
        "input_size": list(preprocess["input_size"]),
        "shape": list(shape),
        "amp": amp,
        "classes": list(images.classes),
    }
    missing = [index for index, place in enumerate(places) if not (root / place).is_file()]
    _check_facts(root, facts, empty=next(root.rglob("*.pt"), None) is None)
    with whole_file(root / FACTS) as file:
        file.write(json.dumps(facts, indent=2).encode())
    for parent in {place.parent for place in places}:
        (root / parent).mkdir(parents=True, exist_ok=True)

    dtype = torch.float16 if len(images.classes) <= EXACT_IN_HALF else torch.float32
    pending = dataclasses.replace(images, source=_Chosen(files, missing), labels=images.labels[missing])
    written = 0

    def take(logits: Tensor, numbers: Tensor) -> None:
        nonlocal written
        maps = _highest(logits.float()[:, columns], kept).to(dtype).cpu()
        for label_map, number in zip(maps, numbers.tolist(), strict=True):
            if not label_map[0].isfinite().all():
                precision = "" if amp == "no" else f", perhaps for want of precision (amp {amp})"
                raise DataError(f"The teacher's logits of {pending.source.name(number)} are not finite{precision}.")
            with whole_file(root / places[missing[number]]) as file:
                torch.save(label_map.clone(), file)  # or the whole batch's memory would go along
        written += len(maps)
        bar.update(row, completed=len(places) - len(missing) + written + len(setting.damage.names))

    columns_of_bar = (TextColumn("label maps"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = console is not None and console.is_terminal
    with Progress(*columns_of_bar, console=console, transient=True, disable=not shown) as bar:
        row = bar.add_task("", total=len(places), completed=len(places) - len(missing))
        if missing:
            setting.over(setting.loader(pending, preprocess), take, lambda batch: place_logits(teacher, batch))
    return LabelMapsMade(
        folder=root,
        written=written,
        kept=len(places) - len(missing),
        shape=shape,
        skipped=tuple(setting.damage.names),
    )


def place_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits of each place of the model's last map, (B, num_classes, h, w), as if the map were that place alone.

    Where the head is a mean over the places and a linear classifier, their mean is what the model gives. Raises
    ConfigError for a model without a last map, or whose head takes no map of one place.
    """
    for method in ("forward_features", "forward_head"):
        if not hasattr(model, method):
            raise ConfigError(f"{type(model).__name__} has no {method}: its classifier cannot be asked about places.")
    parts = cast(Any, model)
    features = parts.forward_features(images)
    if not isinstance(features, Tensor) or features.ndim != 4:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ConfigError(
            f"{type(model).__name__} gives no last map, (B, C, H, W), but {shape}: it cannot be asked about places. "
            "Take a teacher that pools a map, such as a convolutional network."
        )
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    if not channels_last:
        features = features.permute(0, 2, 3, 1)
    batch, height, width, channels = features.shape
    single = (1, 1, channels) if channels_last else (channels, 1, 1)
    try:
        logits = parts.forward_head(features.reshape(batch * height * width, *single))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        raise ConfigError(
            f"The head of {type(model).__name__} takes no map of a single place: {reason(error)}"
        ) from None
    if not isinstance(logits, Tensor) or logits.shape != (batch * height * width, parts.num_classes):
        raise ConfigError(f"The head of {type(model).__name__} does not classify a map of a single place.")
    return logits.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _places(teacher: nn.Module, input_size: Sequence[int], setting: Setting) -> tuple[int, int]:
    """Rows and columns of the teacher's last map, by a look at it. Raises ConfigError where there is none."""
    training = teacher.training
    try:
        with torch.inference_mode(), setting.autocast():
            logits = place_logits(teacher.eval(), torch.zeros(1, *input_size, device=setting.device))
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError) as error:  # of networks for one size alone, or for larger images
        raise ConfigError(
            f"{type(teacher).__name__} takes no images of {input_size[1]}x{input_size[2]}: {reason(error)}"
        ) from None
    finally:
        teacher.train(training)
    return logits.shape[2], logits.shape[3]


def _highest(logits: Tensor, k: int) -> Tensor:
    """(B, C, h, w) -> (B, 2, k, h, w): logits over the mean of the rest, so that the rest's may count as 0; numbers.

    The softmax over them and zeros gives the k highest classes the probabilities that `logits` give them.
    """
    values, numbers = logits.topk(k, dim=1)
    rest = logits.shape[1] - k
    if rest:
        others = logits.scatter(1, numbers, -math.inf)
        values = values - (others.logsumexp(1, keepdim=True) - math.log(rest))
    return torch.stack([values, numbers.to(values)], dim=1)


def _fingerprint(model: nn.Module) -> str:
    """A few letters that tell its weights from others."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def _check_places(files: ImageFiles, places: Sequence[Path]) -> None:
    """Raise DataError where two images would have one map."""
    first: dict[Path, int] = {}
    for index, place in enumerate(places):
        if first.setdefault(place, index) != index:
            raise DataError(
                f"{files.name(first[place])} and {files.name(index)} differ in their ending alone, and so would have "
                "one label map: rename one of them."
            )


def _check_facts(root: Path, facts: dict[str, Any], empty: bool) -> None:
    """Raise ConfigError where `root` holds maps that were made otherwise."""
    found = read_facts(root)
    if empty or found == facts:
        return
    how = "do not say how they were made"
    if found is not None:
        changed = [key for key in facts if found.get(key) != facts[key]]
        shown = (
            "classes" if changed == ["classes"] else ", ".join(f"{k} {found.get(k)}" for k in changed if k != "classes")
        )
        how = f"were made otherwise ({shown})"
    raise ConfigError(f"The label maps in {str(root)!r} {how}: choose another folder, or ask for the same.")


class _Chosen:
    """Some of the images of a source, by their numbers."""

    def __init__(self, source: ImageSource, numbers: Sequence[int]) -> None:
        self.source, self.numbers = source, numbers

    def open(self, index: int) -> Image.Image:
        return self.source.open(self.numbers[index])

    def name(self, index: int) -> str:
        return self.source.name(self.numbers[index])

    def check(self) -> None:
        self.source.check()
