"""Asking a classifier about a single image: which classes it sees, and where."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor, nn

from zoo.data import UNREADABLE, eval_transform, preprocessing, to_channels
from zoo.devices import choose_device
from zoo.errors import ConfigError, DataError, MissingDependencyError, ZooError, did_you_mean
from zoo.evaluation.image_classification import num_classes
from zoo.evaluation.metrics import NOT_FINITE
from zoo.evaluation.predictions import check_topk
from zoo.evaluation.targets import class_names
from zoo.files import check_writable, make_folder, whole_file
from zoo.loading import check_is_whole, load_model

__all__ = ["Prediction", "class_activation_map", "class_labels", "draw_activation_map", "find_class", "predict"]

LEAST_PICTURE_SIDE = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """One class that a model sees in an image."""

    label: str
    index: int
    probability: float


@torch.inference_mode()
def predict(model: nn.Module, image: str | Path | Image.Image, topk: int = 5) -> list[Prediction]:
    """The `topk` most probable classes of an image (a path or a PIL image), most probable first.

    The image is prepared as the model's `pretrained_cfg` says. Raises DataError for a file that is no image, and
    ConfigError for a model that is no image classifier and for arguments that make no sense, ZooError for a model whose
    outputs are not finite.
    """
    num_classes(model)
    check_topk(topk)
    tensor = _prepare(model, image)
    with _evaluating(model):
        probabilities = model(tensor).float().softmax(-1)[0]
    if not probabilities.isfinite().all():
        raise ZooError(NOT_FINITE)
    labels = class_labels(model)
    best = probabilities.topk(min(topk, len(probabilities)))
    return [
        Prediction(label=labels[index], index=index, probability=probability)
        for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def class_labels(model: nn.Module) -> tuple[str, ...]:
    """What to call the model's classes: ImageNet's in words, others by the names that the model knows, or by number."""
    names = class_names(model)
    if names is None:
        return tuple(map(str, range(num_classes(model))))
    imagenet = ImageNetInfo()
    return tuple(imagenet.label_descriptions()) if names == tuple(imagenet.label_names()) else names


def find_class(model: nn.Module, text: str) -> int:
    """The index of the class that `text` names: its name, a WordNet id, one of ImageNet's words for it, or its number.

    Raises ConfigError for a class that the model has not.
    """
    labels, names = class_labels(model), class_names(model) or ()
    for options in (names, labels):
        if text in options:
            return options.index(text)
    if text.isascii() and text.isdigit() and int(text) < len(labels):
        return int(text)
    words = {word.strip().lower(): index for index in reversed(range(len(labels))) for word in labels[index].split(",")}
    if text.lower() in words:
        return words[text.lower()]
    raise ConfigError(
        f"The model has no class {text!r}.{did_you_mean(text, words)} Name one, or give its number from 0 to "
        f"{len(labels) - 1}."
    )


def predict_files(
    images: Sequence[str],
    source: str,
    *,
    checkpoint_path: str | None = None,
    topk: int = 5,
    device: str = "auto",
    cam: str | None = None,
    cam_dir: str | None = None,
    class_name: str | None = None,
    report_error: Callable[[DataError], None],
) -> Iterator[tuple[str, list[Prediction], Path | None]]:
    """Each image file with what the model called `source` sees in it, and its activation map's picture, as they come.

    A file that is no image goes to `report_error`, and the others go on. Raises as `load_model`, `predict` and
    `class_activation_map` do.
    """
    check_topk(topk)
    pictures: list[Path | None] = [None] * len(images)
    if cam is not None:
        pictures = [check_picture_path(cam)]
    elif cam_dir is not None:
        pictures = _picture_names(images, make_folder(cam_dir))
    _check_not_inputs(pictures, images)
    model = load_model(source, checkpoint_path)
    check_is_whole(model)
    model.to(choose_device(model, device))
    index = None if class_name is None else find_class(model, class_name)
    for image, picture in zip(images, pictures, strict=True):
        try:
            predictions = predict(model, image, topk)
        except DataError as error:
            report_error(error)
            continue
        if picture is not None:
            activation = class_activation_map(model, image, index)
            save_picture(draw_activation_map(model, image, activation), picture)
        yield image, predictions, picture


def _picture_names(images: Sequence[str], folder: Path) -> list[Path | None]:
    """`folder/<stem>.png` for each; of several that are called alike, the later get a number."""
    taken: set[str] = set()
    names: list[Path | None] = []
    for image in images:
        stem = Path(image).stem
        name, number = stem, 2
        while name in taken:
            name, number = f"{stem}_{number}", number + 1
        taken.add(name)
        names.append(folder / f"{name}.png")
    return names


def _check_not_inputs(pictures: Sequence[Path | None], images: Sequence[str]) -> None:
    """Raise ConfigError where a map would be written over one of the images, under whatever name."""
    for image in filter(os.path.exists, images):
        for picture in pictures:
            if picture is not None and picture.exists() and picture.samefile(image):
                raise ConfigError(
                    f"The activation map {str(picture)!r} would be written over an image: choose another place."
                )


# ------------------------------------------------------------------------------------------------------ activation maps


def class_activation_map(model: nn.Module, image: str | Path | Image.Image, index: int | None = None) -> np.ndarray:
    """Where in an image a model sees the class `index`, by default the most probable one: (H, W) float32, 0 to 1.

    Grad-CAM (Selvaraju et al., arXiv 1610.02391): the maps of the last stage, each weighted with the mean gradient of
    the class's logit, added up, what is negative left out, and the greatest scaled to 1; all 0 where nothing speaks
    for the class. The last stage is the last of the model's `feature_info` on whose maps the logit depends: where a
    class token is read, that is a block before the last. H and W are those of the model's input, which is the part of
    the image that evaluation's centre crop keeps.

    Raises ConfigError for a model without `feature_info` and a class that it has not, and as `predict` does.
    """
    classes = num_classes(model)
    if index is not None and not (type(index) is int and 0 <= index < classes):
        raise ConfigError(f"index must be a class from 0 to {classes - 1}, not {index!r}.")
    stages = _stages(model)
    tensor = _prepare(model, image)
    outputs: dict[str, Any] = {}
    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: outputs.update({name: output}))
        for name, module, _ in stages
    ]
    try:
        with _evaluating(model), torch.inference_mode(False), torch.enable_grad():
            logits = model(tensor.clone().requires_grad_())[0].float()
            score = logits[int(logits.argmax()) if index is None else index]
            seen = [(outputs[name], info) for name, _, info in stages if isinstance(outputs.get(name), Tensor)]
            if not seen:
                raise ConfigError(f"No stage of {type(model).__name__} gives a feature map: none can be drawn.")
            for features, info in reversed(seen):
                (gradient,) = torch.autograd.grad(
                    score, features, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                maps = _as_maps(model, features.detach(), info, tensor.shape[-2:])
                gradients = _as_maps(model, gradient, info, tensor.shape[-2:])
                if gradients.any():
                    break
    finally:
        for hook in hooks:
            hook.remove()
    weights = gradients.mean((1, 2), keepdim=True)
    activation = (weights * maps).sum(0).relu()
    activation = activation / activation.max().clamp(min=torch.finfo(torch.float32).tiny)
    size = tuple(tensor.shape[-2:])
    return F.interpolate(activation[None, None], size=size, mode="bilinear", align_corners=False)[0, 0].cpu().numpy()


def draw_activation_map(model: nn.Module, image: str | Path | Image.Image, activation: np.ndarray) -> Image.Image:
    """The part of an image that the model saw, with its activation map over it. Raises as `predict` does."""
    try:
        from matplotlib import colormaps
    except ImportError as error:
        raise MissingDependencyError('Pictures need matplotlib: pip install "backbone-zoo[train]".') from error
    preprocess = preprocessing(model)
    mean, std = (torch.tensor(preprocess[key])[:, None, None] for key in ("mean", "std"))
    pixels = (_prepare(model, image)[0].cpu().float() * std + mean).clamp(0, 1)
    seen = pixels.expand(3, -1, -1).permute(1, 2, 0).numpy()
    heat = colormaps["plasma"](activation)[:, :, :3]
    share = 0.65 * activation[:, :, None]  # what does not count stays as it is
    drawn = Image.fromarray(np.round(255 * (seen * (1 - share) + heat * share)).astype(np.uint8))
    factor = -(-LEAST_PICTURE_SIDE // min(drawn.size))
    return drawn.resize((drawn.width * factor, drawn.height * factor), Image.Resampling.NEAREST)


def save_picture(picture: Image.Image, path: str | Path) -> Path:
    """Write `picture` to `path`, whole or not at all, in the format of its ending. Raises ConfigError."""
    path = check_picture_path(path)
    with whole_file(path) as file:
        picture.save(file, format=Image.registered_extensions()[path.suffix.lower()])
    return path


def check_picture_path(path: str | Path) -> Path:
    """`path`, for a picture that Pillow writes. To ask before long work. Raises ConfigError."""
    path = check_writable(path)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ConfigError(f"Cannot draw into {str(path)!r}: give it one of the endings .png, .jpg, .webp.")
    return path


def _stages(model: nn.Module) -> list[tuple[str, nn.Module, dict[str, Any]]]:
    """Name, module and facts of each stage that `feature_info` lists, in order."""
    listed: Any = getattr(model, "feature_info", None) or ()
    modules = dict(model.named_modules())
    stages = [(info["module"], modules[info["module"]], info) for info in listed if info.get("module") in modules]
    if not stages:
        raise ConfigError(
            f"{type(model).__name__} has no feature_info that names its stages: no activation map can be drawn."
        )
    return stages


def _as_maps(model: nn.Module, features: Tensor, info: dict[str, Any], size: Sequence[int]) -> Tensor:
    """One image's features of a stage, (1, C, H, W), (1, H, W, C) or (1, N, C), as float maps (C, H, W)."""
    features = features[0].float()
    if features.ndim == 3:
        channels = info["num_chs"]
        first, last = features.shape[0] == channels, features.shape[-1] == channels
        ambiguous_but_last = first and last and getattr(model, "output_fmt", "NCHW") == "NHWC"
        return features.permute(2, 0, 1) if ambiguous_but_last or not first else features
    tokens = features[getattr(model, "num_prefix_tokens", 0) :]  # (N, C)
    height = round((len(tokens) * size[0] / size[1]) ** 0.5)
    if height * (len(tokens) // height) != len(tokens):
        raise ConfigError(f"{len(tokens)} tokens of {type(model).__name__} do not fill a grid: no map can be drawn.")
    return tokens.T.reshape(-1, height, len(tokens) // height)


# --------------------------------------------------------------------------------------------------------------- images


def _prepare(model: nn.Module, image: str | Path | Image.Image) -> Tensor:
    """An image as the model takes it, (1, C, H, W), on its device. Raises DataError and ConfigError."""
    if not isinstance(image, str | os.PathLike | Image.Image):
        raise ConfigError(
            f"image must be a path or a PIL image, not {type(image).__name__}: "
            "PIL.Image.fromarray makes an image of an array."
        )
    preprocess = preprocessing(model)
    try:
        with contextlib.nullcontext(image) if isinstance(image, Image.Image) else Image.open(image) as file:
            converted = to_channels(file, preprocess["input_size"][0])
    except FileNotFoundError:
        raise DataError(f"There is no image {str(image)!r}.") from None
    except IsADirectoryError:
        raise DataError(f"{str(image)!r} is a folder: name the images in it, as {image}/*.jpg.") from None
    except UNREADABLE as error:
        name = "The image" if isinstance(image, Image.Image) else repr(str(image))
        raise DataError(f"{name} cannot be read as an image: {error}") from None
    return eval_transform(preprocess)(converted)[None].to(next(model.parameters()))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
