"""Labels for the tokens of an image, from a map of labels that a teacher made of the whole image beforehand.

Jiang et al. 2021, "All Tokens Matter: Token Labeling for Training Better Vision Transformers", arXiv 2104.10858, with
the maps of Yun et al. 2021, "Re-labeling ImageNet", arXiv 2101.05022. `zoo token-labels` makes them.

A folder of maps holds `<class>/<image>.pt` for each `train/<class>/<image>.jpg`: a tensor (2, k, H, W) of floating
point, written by `torch.save`. Of each place of a grid over the whole image, [0] holds the k highest logits and [1] the
numbers of their classes, in the order of the data's classes. The logits of all other classes count as 0. All maps of a
folder have one shape. `token_labels.json`, if it is there, says how they were made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import roi_align

from zoo.data.sources import ImageFiles, ImageSplit
from zoo.data.streaming import reason
from zoo.data.transforms import LabelMaps
from zoo.errors import DataError

__all__ = ["FACTS", "MapFolder", "map_place", "read_facts", "token_labels"]

FACTS = "token_labels.json"
MAX_WITHOUT = 100  # images in a row that may lack a map, because they are damaged


class MapFolder:
    """The label maps of a split's images.

    Raises DataError where there is no such folder, its classes are not the split's, or its maps are damaged or missing.
    """

    def __init__(self, folder: str | Path, split: ImageSplit) -> None:
        assert isinstance(split.source, ImageFiles)
        self.root = Path(folder).expanduser()
        self.files, self.num_classes = split.source, len(split.classes)
        if not self.root.is_dir():
            raise DataError(
                f"There is no folder of label maps {str(self.root)!r} (data.token_labels): "
                "`zoo token-labels` makes one."
            )
        facts = read_facts(self.root)
        if facts is not None and facts.get("classes") != list(split.classes):
            raise DataError(f"The label maps in {str(self.root)!r} are of other classes than the data has.")
        self.shape: torch.Size | None = None
        first = range(min(len(split), MAX_WITHOUT))
        self.shape = self.read(next((i for i in first if (self.root / map_place(self.files, i)).exists()), 0)).shape

    def read(self, index: int) -> Tensor:
        """The map of image number `index`, (2, k, H, W). Raises DataError where it is missing or damaged."""
        path = self.root / map_place(self.files, index)
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise DataError(
                f"{self.files.name(index)} has no label map {str(path)!r}: `zoo token-labels` makes those that are "
                "missing."
            ) from None
        except Exception as error:  # of damaged bytes unpickling raises almost anything
            raise DataError(
                f"The label map {str(path)!r} cannot be read. Remove it, and `zoo token-labels` makes it anew. "
                f"{reason(error)}"
            ) from None
        if not (
            isinstance(found, Tensor)
            and found.ndim == 4
            and len(found) == 2
            and found.numel()
            and found.is_floating_point()
        ):
            what = (
                f"a tensor {tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            )
            raise DataError(f"{str(path)!r} holds {what}, and no label map, a tensor (2, k, H, W) of floating point.")
        if self.shape is not None and found.shape != self.shape:
            raise DataError(f"The label map {str(path)!r} is {tuple(found.shape)}, others are {tuple(self.shape)}.")
        values, numbers = found
        if not values.isfinite().all():
            raise DataError(f"The label map {str(path)!r} holds a logit that is not finite.")
        outside = numbers[~((numbers >= 0) & (numbers < self.num_classes) & (numbers == numbers.round()))]
        if len(outside):
            raise DataError(
                f"The label map {str(path)!r} names a class {outside[0].item():g}, and the data has the "
                f"{self.num_classes} classes 0 to {self.num_classes - 1}."
            )
        return found


def map_place(files: ImageFiles, index: int) -> Path:
    """Where in a folder of maps that of image number `index` lies."""
    return files.place(index).with_suffix(".pt")


def read_facts(folder: Path) -> dict[str, Any] | None:
    """How the maps of a folder were made; None where nothing says so. Raises DataError."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{str(folder / FACTS)!r} cannot be read: {reason(error)}") from None
    if not isinstance(facts, dict):
        raise DataError(f"{str(folder / FACTS)!r} must hold one JSON object.")
    return facts


def token_labels(maps: LabelMaps, num_classes: int, grid: tuple[int, int]) -> Tensor:
    """What each token of a grid (h, w) over the shown part of an image is: (B, h, w, num_classes), which add up to 1.

    The logits of the shown region are averaged for each token (RoIAlign), flipped as the image is, and turned into
    probabilities by a softmax over the classes, as in ReLabel. On the device of `maps`.
    """
    values, numbers = maps.maps.unbind(1)
    batch, _, height, width = values.shape
    logits = torch.zeros(batch, num_classes, height, width, device=values.device)
    logits.scatter_(1, numbers.long(), values.float())
    boxes = maps.regions * torch.tensor([width, height, width, height], device=values.device)
    boxes = torch.cat([torch.arange(batch, device=values.device)[:, None], boxes], dim=1)
    pooled = roi_align(logits, boxes, output_size=grid, aligned=True)
    for axis, flipped in ((-1, maps.flips[:, 0]), (-2, maps.flips[:, 1])):
        pooled = torch.where(flipped[:, None, None, None], pooled.flip(axis), pooled)
    return pooled.softmax(1).permute(0, 2, 3, 1)
