"""`zoo predict` and class-activation maps: a map's mass lies where the class is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import zoo
from tests.known import Known, known_cfg
from zoo.cli import main
from zoo.errors import ConfigError, ZooError
from zoo.evaluation import class_activation_map


class Colours(nn.Module):
    """Class 0 is redness, class 1 is greenness, class 2 is nothing; each pooled over cells of 4 x 4 pixels."""

    def __init__(self, nhwc: bool = False) -> None:
        super().__init__()
        self.num_classes = 3
        self.stages = nn.Conv2d(3, 2, 4, stride=4, bias=False)
        self.fc = nn.Linear(2, 3, bias=False)
        with torch.no_grad():
            self.stages.weight.zero_()[0, 0] = self.stages.weight[1, 1] = 1 / 16
            self.fc.weight.copy_(torch.tensor([[10.0, -10], [-10, 10], [0, 0]]))
        self.feature_info = [{"num_chs": 2, "reduction": 4, "module": "stages"}]
        self.pretrained_cfg = known_cfg("colours", 32, ["red", "green", "nothing"])

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.stages(images).mean((2, 3)))


def half_red_half_green(size: int = 32) -> Image.Image:
    pixels = np.zeros((size, size, 3), np.uint8)
    pixels[: size // 2, : size // 2, 0] = 255  # red: top left
    pixels[size // 2 :, size // 2 :, 1] = 200  # green: bottom right
    return Image.fromarray(pixels)


def test_the_map_lies_where_the_class_is():
    model = Colours()
    red = class_activation_map(model, half_red_half_green())
    assert (red.shape, red.dtype) == ((32, 32), np.float32)
    assert (red.min(), red.max()) == (0, 1)
    assert red[:16, :16].sum() > 0.85 * red.sum()
    green = class_activation_map(model, half_red_half_green(), 1)
    assert green[16:, 16:].sum() > 0.85 * green.sum()
    assert not class_activation_map(model, half_red_half_green(), 2).any()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.stages._forward_hooks


def test_pooling_and_a_linear_head_make_it_the_exact_map():
    """Where logits are linear in pooled features, Grad-CAM is the CAM of Zhou et al. (arXiv 1512.04150)."""
    torch.manual_seed(0)
    model = Colours()
    nn.init.normal_(model.stages.weight)
    nn.init.normal_(model.fc.weight)
    image = half_red_half_green()
    images = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        cam = torch.einsum("c,chw->hw", model.fc.weight[1], model.stages(images)[0]).relu()
        expected = F.interpolate((cam / cam.max())[None, None], size=(32, 32), mode="bilinear", align_corners=False)
    assert class_activation_map(model, image, 1) == pytest.approx(expected[0, 0].numpy(), abs=1e-5)


SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "maps": ("caformer_s18", {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)}),
    "tokens, class token": ("timm/vit_tiny_patch16_224", {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 64}),
    "maps, channels last": (
        "timm/swin_tiny_patch4_window7_224",
        {"depths": (1, 1), "embed_dim": 24, "num_heads": (1, 2), "img_size": 56},
    ),
    "maps of a residual net": ("timm/resnet18", {"layers": (1, 1, 1, 1)}),
}


@pytest.mark.parametrize("kind", SMALL)
def test_maps_of_every_kind_of_network(kind: str):
    name, args = SMALL[kind]
    torch.manual_seed(0)
    create = timm.create_model if name.startswith("timm/") else zoo.create_model
    model: Any = create(name.removeprefix("timm/"), pretrained=False, num_classes=4, **args)
    for module in model.modules():  # a fresh head's weights are too even to tell anything
        if isinstance(module, nn.Linear) and module.out_features == 4:
            nn.init.normal_(module.weight)
    size = args.get("img_size", 64)
    model.pretrained_cfg = {**_plain(model.pretrained_cfg), "input_size": (3, size, size), "num_classes": 4}
    model.train()
    maps = [class_activation_map(model, half_red_half_green(90), index) for index in range(4)]
    assert all(found.shape == (size, size) for found in maps)
    assert all(np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1 for found in maps)
    assert sum(found.std() > 0.05 for found in maps) >= 2  # they say something, and not the same of all classes
    assert model.training
    twice = class_activation_map(model, half_red_half_green(90), 0)
    assert np.array_equal(twice, maps[0])


def _plain(cfg: Any) -> dict[str, Any]:
    return dict(cfg) if isinstance(cfg, dict) else cfg.to_dict()


def test_maps_that_cannot_be_drawn():
    with pytest.raises(ConfigError, match=r"Known has no feature_info"):
        class_activation_map(Known(np.zeros((1, 2), np.float32)), half_red_half_green())
    with pytest.raises(ConfigError, match=r"index must be a class from 0 to 2, not 3"):
        class_activation_map(Colours(), half_red_half_green(), 3)


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    args: Any = {"depths": (1, 1), "dims": (8, 8), "stem_kernel_size": 3, "stem_stride": 2}
    model = zoo.create_model("poolformer_s12", pretrained=False, num_classes=3, **args)
    folder = tmp_path_factory.mktemp("model")
    return str(zoo.save_pretrained(model, folder / "exported", labels=["cat", "dog, hound", "owl"]))


@pytest.fixture
def image(tmp_path: Path) -> str:
    half_red_half_green(64).save(tmp_path / "half.png")
    return str(tmp_path / "half.png")


def test_classes_with_names_and_probabilities(exported: str, image: str, capsys: Any):
    assert main(["predict", image, "--model", exported, "--topk", "2", "--json", "--device", "cpu"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    expected = zoo.predict(zoo.create_model(f"local-dir:{exported}"), image, topk=2)
    assert answer["image"] == image
    assert [found["label"] for found in answer["predictions"]] == [found.label for found in expected]
    assert [found["probability"] for found in answer["predictions"]] == pytest.approx([p.probability for p in expected])
    assert main(["predict", image, "--model", exported]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert (first, len(lines)) == (image, 3)
    assert f"{expected[0].probability:.2%}" in lines[0]
    assert expected[0].label in lines[0]


def test_one_bad_image_does_not_stop_the_others(exported: str, image: str, tmp_path: Path, capsys: Any):
    (tmp_path / "text.png").write_text("text")
    images = [image, str(tmp_path / "text.png"), str(tmp_path / "none.png"), image]
    assert main(["predict", *images, "--model", exported, "--json"]) == 1
    out, errors = capsys.readouterr()
    assert [answer["image"] for answer in json.loads(out)] == [image, image]
    assert "text.png' cannot be read as an image" in errors
    assert "There is no image" in errors
    assert "2 of 4 images cannot be read" in errors


def test_greyscale_of_16_bits_is_what_8_bits_are(exported: str, tmp_path: Path, capsys: Any):
    grey = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) // 16
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray(grey * 257).save(tmp_path / "16.png")
    Image.fromarray(grey * 257).save(tmp_path / "16.tif")
    Image.fromarray(grey / np.float32(255)).save(tmp_path / "float.tif")
    names = [str(tmp_path / name) for name in ("8.png", "16.png", "16.tif", "float.tif")]
    assert main(["predict", *names, "--model", exported, "--json"]) == 1
    out, errors = capsys.readouterr()
    of_8_bits, *of_16_bits = json.loads(out)
    assert [answer["predictions"] for answer in of_16_bits] == [of_8_bits["predictions"]] * 2
    assert "float.tif' cannot be read as an image: its pixels have 32 bits (mode F)" in errors


def test_a_folder_for_an_image(exported: str, tmp_path: Path, capsys: Any):
    assert main(["predict", str(tmp_path), "--model", exported]) == 1
    assert f"is a folder: name the images in it, as {tmp_path}/*.jpg" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["predict", "export"])
def test_a_classifier_that_the_weights_lack(command: str, image: str, tmp_path: Path, capsys: Any):
    """It would be random, and answer at random."""
    path = tmp_path / "ten.pth"
    torch.save(zoo.create_model("slak_test", num_classes=10).state_dict(), path)
    arguments = {
        "predict": [image, "--model", "slak_test"],
        "export": ["slak_test", str(tmp_path / "out"), "--to", "onnx"],
    }[command]
    assert main([command, *arguments, "--checkpoint", str(path)]) == 1
    captured = capsys.readouterr()
    assert "ten.pth has no head.fc.weight for the 1000 classes of slak_test, which would be random" in captured.err
    assert (captured.out, (tmp_path / "out").exists()) == ("", False)


def test_a_model_whose_outputs_are_not_finite(exported: str, image: str):
    model = zoo.create_model(f"local-dir:{exported}")
    next(model.parameters()).data.fill_(float("nan"))
    with pytest.raises(ZooError, match="outputs are not finite"):
        zoo.predict(model, image)


def test_drawing_activation_maps(exported: str, image: str, tmp_path: Path, capsys: Any):
    assert main(["predict", image, "--model", exported, "--cam", str(tmp_path / "cam.png"), "--class", "Hound"]) == 0
    assert f"Class-activation map: {tmp_path / 'cam.png'}" in capsys.readouterr().err
    with Image.open(tmp_path / "cam.png") as picture:
        assert (picture.mode, min(picture.size) >= 224) == ("RGB", True)
    other = tmp_path / "other" / "half.png"
    other.parent.mkdir()
    half_red_half_green(48).save(other)
    folder = tmp_path / "maps"
    assert main(["predict", image, str(other), "--model", exported, "--cam-dir", str(folder), "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert [answer["cam"] for answer in answers] == [str(folder / "half.png"), str(folder / "half_2.png")]
    assert all(Path(answer["cam"]).is_file() for answer in answers)


def test_activation_maps_are_not_written_over_images(exported: str, image: str, tmp_path: Path, capsys: Any):
    folder = tmp_path / "photos"
    folder.mkdir()
    photos = [folder / "a.png", folder / "b.png"]
    for photo in photos:
        photo.write_bytes(Path(image).read_bytes())
    (tmp_path / "link.png").symlink_to(photos[0])
    for arguments in (
        [*map(str, photos), "--cam-dir", str(folder)],
        [str(photos[0]), "--cam", str(tmp_path / "link.png")],
    ):
        assert main(["predict", *arguments, "--model", exported]) == 1
        assert "would be written over an image: choose another place" in capsys.readouterr().err
    assert all(photo.read_bytes() == Path(image).read_bytes() for photo in photos)
    assert sorted(folder.iterdir()) == photos


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--cam", "cam.png", "--class", "cow"], 1, "The model has no class 'cow'. Did you mean owl?"),
        (["--cam", "cam.png", "--class", "3"], 1, "number from 0 to 2"),
        (["--cam", "cam.xyz"], 1, "give it one of the endings .png, .jpg, .webp"),
        (["--cam", "/nowhere/cam.png"], 1, "there is no folder '/nowhere'"),
        (["--topk", "0"], 1, "topk must be a whole number and at least 1, not 0"),
        (["--device", "abacus"], 1, "There is no device 'abacus'"),
        (["--class", "cat"], 2, "--class is the class of an activation map"),
        (["--cam", "a.png", "--cam-dir", "b"], 2, "--cam draws one image"),
    ],
)
def test_bad_input(exported: str, image: str, arguments: list[str], status: int, message: str, capsys: Any):
    try:
        found = main(["predict", image, "--model", exported, *arguments])
    except SystemExit as stopped:
        found = int(stopped.code or 0)
    errors = capsys.readouterr().err
    assert message in errors
    assert found == status
    assert "Traceback" not in errors
