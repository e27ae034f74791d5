"""Evaluation: figures against figures worked out by hand, classes by name, and predictions from a checkpoint alone."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import zoo
from tests.known import Known, known_cfg, known_folder, random_logits, softmax
from tests.test_data import make_parquet
from zoo.data import DataConfig, EvaluationLoader
from zoo.errors import ConfigError, DataError, ZooError
from zoo.evaluation import evaluate, load_model, predict
from zoo.evaluation.targets import class_names

ROOT = Path(__file__).resolve().parents[1]


class Shade(nn.Module):
    """Tells `num_classes` shades of grey apart: the logit of class c is highest at brightness c / (num_classes - 1)."""

    def __init__(self, num_classes: int, label_names: list[str] | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.centres = nn.Parameter(torch.linspace(0, 1, num_classes))
        self.pretrained_cfg = known_cfg("shade", 8, label_names)

    def forward(self, images: Tensor) -> Tensor:
        return -20 * (images.mean((1, 2, 3))[:, None] - self.centres).abs()


def shades(folder: Path, classes: list[str], images: list[tuple[str, int]]) -> DataConfig:
    """A folder with a grey image for each (class, brightness from 0 to 255)."""
    for name in classes:
        (folder / "val" / name).mkdir(parents=True)
    for number, (name, brightness) in enumerate(images):
        Image.new("RGB", (8, 8), (brightness,) * 3).save(folder / "val" / name / f"{number}.png")
    return DataConfig(name="folder", path=str(folder), batch_size=2, workers=0)


def test_figures_worked_out_by_hand(tmp_path: Path):
    # three shades with centres 0, 0.5 and 1: brightness 0.2 is nearest to the first, 0.6 to the second
    data = shades(tmp_path, ["0", "1", "2"], [("0", 0), ("0", 51), ("1", 153), ("1", 255), ("2", 255)])
    model = Shade(3).train()
    results = evaluate(model, data)
    assert results.confusion.tolist() == [[2, 0, 0], [0, 1, 1], [0, 0, 1]]
    assert results.top1 == pytest.approx(100 * 4 / 5)
    assert results.top5 is None
    assert results.per_class == {"0": 100.0, "1": 50.0, "2": 100.0}
    brightness, truth = np.array([0, 0.2, 0.6, 1, 1])[:, None], [0, 0, 1, 1, 2]
    logits = -20 * np.abs(brightness - np.array([0, 0.5, 1]))
    losses = np.log(np.exp(logits).sum(1)) - logits[range(5), truth]
    assert results.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert (results.images, results.skipped, model.training) == (5, (), True)
    assert (results.images_per_second > 0, (results.model_images_per_second or 0) > 0) == (True, True)

    saved = json.loads((results.save(tmp_path / "out") / "results.json").read_text())
    assert saved["confusion"] == [[2, 0, 0], [0, 1, 1], [0, 0, 1]]
    assert saved["top1"] == results.top1
    assert saved["preprocessing"]["input_size"] == [3, 8, 8]
    with Image.open(tmp_path / "out" / "confusion.png") as picture:
        assert picture.width > 400
    assert "top-1 80.00%, loss" in str(results)


def test_a_process_that_loads_data_dies(tmp_path: Path):
    """torch's error comes at any line, here in the model; of one that dies in the middle of a batch, before that."""
    data = shades(tmp_path, ["0", "1", "2"], [("0", 0), ("0", 51), ("1", 153), ("1", 255), ("2", 255)])

    class Fatal(Shade):
        def forward(self, images: Tensor) -> Tensor:
            for child in multiprocessing.active_children():
                child.kill()
            time.sleep(10)  # the signal of the death ends it
            return super().forward(images)

    message = r"^A process that loads data died, perhaps for want of memory: lower data\.workers or data\.batch_size\. "
    with pytest.raises(DataError, match=message + "DataLoader worker .* is killed by signal: Killed"):
        evaluate(Fatal(3), dataclasses.replace(data, workers=1))

    class Lost:
        def __init__(self, error: Exception, workers: int) -> None:
            self.error, self.num_workers = error, workers

        def __iter__(self) -> Iterator[Any]:
            raise self.error
            yield

    def load(error: Exception, workers: int) -> None:
        lost: dict[str, Any] = {"loader": Lost(error, workers), "check": None, "prepare": None}
        list(EvaluationLoader(**lost))

    for error, told in (ConnectionResetError(104, "Connection reset by peer"), "Connection reset"), (EOFError(), "EOF"):
        with pytest.raises(DataError, match=message + f".*{told}"):
            load(error, 1)
    # of the data: nothing died
    with pytest.raises(OSError, match=r"^Caught OSError in DataLoader worker process 0$"):
        load(OSError("Caught OSError in DataLoader worker process 0"), 1)
    with pytest.raises(OSError, match=r"^it is gone$"):
        load(OSError("it is gone"), 0)


def test_calibration_and_standard_error(tmp_path: Path):
    logits = random_logits(60, 7)
    truth = np.random.default_rng(1).integers(0, 7, 60)
    data = known_folder(tmp_path, [f"{label}/{i}.png" for i, label in enumerate(truth)], batch_size=7)
    results = evaluate(Known(logits), data)
    shares = softmax(logits)
    confidence, right = shares.max(1), logits.argmax(1) == truth
    error = 0.0
    for low in range(15):  # Guo et al.'s formula, bin by bin
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
        assert results.calibration[low] == pytest.approx([inside.sum(), right[inside].sum(), confidence[inside].sum()])
    assert results.ece == pytest.approx(100 * error, rel=1e-6)
    assert results.ece > 1
    assert results.top1_stderr == pytest.approx(100 * right.std() / np.sqrt(60))
    assert results.top1 == pytest.approx(100 * right.mean())


def test_per_class_table(tmp_path: Path):
    data = shades(tmp_path, ["0", "1", "2"], [("0", 0), ("0", 51), ("1", 153), ("1", 255), ("1", 250)])
    results = evaluate(Shade(3), data)
    assert results.per_class_rows() == [
        {"class": "0", "images": 2, "top1": 100.0, "most_confused_with": None, "times": 0},
        {"class": "1", "images": 3, "top1": pytest.approx(100 / 3), "most_confused_with": "2", "times": 2},
        {"class": "2", "images": 0, "top1": None, "most_confused_with": None, "times": 0},
    ]


def test_top5_needs_more_than_five_classes(tmp_path: Path):
    names = [str(i) for i in range(6)]
    # brightness 0 is farthest from the sixth centre: "5" misses the top five there, "4" is the fifth of them
    results = evaluate(Shade(6), shades(tmp_path, names, [("0", 0), ("4", 0), ("5", 0)]))
    assert results.top5 == pytest.approx(100 * 2 / 3)
    assert results.per_class["1"] is None
    assert "no images of 3 of the 6 classes: 1, 2, 3" in str(results)


def test_a_damaged_image_is_left_out_of_the_figures(tmp_path: Path):
    data = shades(tmp_path, ["0", "1"], [("0", 0), ("1", 255)])
    (tmp_path / "val" / "1" / "broken.png").write_bytes(b"nothing")
    results = evaluate(Shade(2), data)
    assert (results.top1, results.images) == (100.0, 2)
    assert len(results.skipped) == 1
    assert "broken.png" in results.skipped[0]
    strict = DataConfig(name="folder", path=str(tmp_path), workers=0, strict=True)
    with pytest.raises(DataError, match=r"A damaged image: .*broken\.png"):
        evaluate(Shade(2), strict)
    for path in (tmp_path / "val").rglob("*.png"):
        path.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"None of the images can be read\. The first: .*val/0/0\.png: cannot identify"):
        evaluate(Shade(2), data)


def test_classes_are_matched_by_name_where_the_model_knows_them(tmp_path: Path):
    data = shades(tmp_path, ["black", "white"], [("black", 0), ("white", 255)])
    assert evaluate(Shade(3, ["black", "grey", "white"]), data).per_class == {"black": 100, "grey": None, "white": 100}
    assert evaluate(Shade(2), data).top1 == 100
    assert evaluate(Shade(2, ["white", "black"]), data).top1 == 0  # by name, not by number
    with pytest.raises(DataError, match="The data has 2 classes and the model 3"):
        evaluate(Shade(3), data)
    with pytest.raises(DataError, match=r"does not know 1 of the data's 2 classes: 'white', and the data lacks 2 of"):
        evaluate(Shade(3, ["black", "grey", "red"]), data)


def test_the_order_of_folders_says_nothing_to_a_model_that_knows_other_names(tmp_path: Path):
    folders = shades(tmp_path / "folders", ["ant", "zebra"], [("ant", 0), ("zebra", 255)])
    with pytest.raises(DataError, match=r"classes: 'ant', 'zebra', and .* lacks 2 of its own: 'a', 'b'\. .*Rename"):
        evaluate(Shade(2, ["a", "b"]), folders)
    make_parquet(tmp_path / "words" / "test.parquet", ["ant", "zebra"])
    with pytest.raises(DataError, match="does not know 2 of the data's 2 classes"):
        evaluate(Shade(2, ["a", "b"]), DataConfig(name="parquet", path=str(tmp_path / "words"), workers=0))
    make_parquet(tmp_path / "table" / "test.parquet", [0, 1], ["zebra", "ant"])  # numbered by whoever made it
    table = DataConfig(name="parquet", path=str(tmp_path / "table"), workers=0)
    assert list(evaluate(Shade(2, ["a", "b"]), table).per_class) == ["zebra", "ant"]
    with pytest.raises(DataError, match="does not know 1 of the data's 2 classes: 'zebra'"):
        evaluate(Shade(2, ["ant", "b"]), table)  # which has it as its second


def test_folders_called_by_numbers(tmp_path: Path):
    names = [str(i) for i in range(11)]
    data = shades(tmp_path, names, [(name, round(25.5 * i)) for i, name in enumerate(names)])
    results = evaluate(Shade(11), data)
    assert (list(results.per_class), results.top1) == (names, 100)  # 10 is the last, not the third
    with pytest.raises(DataError, match="does not know 11 of the data's 11 classes"):
        evaluate(Shade(11, [f"grey {name}" for name in names]), data)


def imagenet(**changes: Any) -> Shade:
    model = Shade(1000)
    model.pretrained_cfg |= {"architecture": "poolformer_s12", "tag": "sail_in1k", "num_classes": 1000, **changes}
    return model


def test_imagenet_folders(tmp_path: Path):
    last_two = ["n13133613", "n15075141"]
    synsets = evaluate(imagenet(), shades(tmp_path / "synsets", last_two, [("n15075141", 255)]))
    assert (synsets.per_class["n15075141"], synsets.images, len(synsets.per_class)) == (100, 1, 1000)
    numbers = evaluate(imagenet(), shades(tmp_path / "numbers", [str(i) for i in range(1000)], [("999", 255)]))
    assert (numbers.per_class["999"], numbers.images) == (100, 1)
    with pytest.raises(DataError, match="does not know 2 of the data's 2 classes: 'ant', 'zebra'"):
        evaluate(imagenet(), shades(tmp_path / "words", ["ant", "zebra"], [("ant", 0)]))


def test_a_thousand_classes_are_imagenets_only_where_the_weights_are():
    assert class_names(imagenet())[0] == "n01440764"
    assert class_names(imagenet(architecture="resnet50", tag="a1_in1k"))[0] == "n01440764"
    assert class_names(imagenet(tag="")) is None
    assert class_names(imagenet(architecture="resnet50", tag="own")) is None
    assert class_names(imagenet(num_classes=21841)) is None
    assert class_names(Shade(1000)) is None
    assert predict(Shade(1000), Image.new("RGB", (8, 8)))[0].label == "0"


def test_what_cannot_be_evaluated(tmp_path: Path):
    data = shades(tmp_path, ["0", "1"], [("0", 0), ("1", 255)])
    damaged = Shade(2)
    damaged.centres.data.fill_(float("nan"))
    with pytest.raises(ZooError, match="outputs are not finite"):
        evaluate(damaged, data)
    headless = zoo.create_model("poolformer_s12", pretrained=False, num_classes=0, depths=(1,), dims=(8,))
    with pytest.raises(ConfigError, match="no classifier"):
        evaluate(headless, data)
    with pytest.raises(ConfigError, match="There is no device 'abacus'"):
        evaluate(Shade(2), data, device="abacus")
    wrong: Any = "fp8"
    with pytest.raises(ConfigError, match="amp must be one of no, bf16, fp16, not 'fp8'"):
        evaluate(Shade(2), data, amp=wrong)
    wrong = {"name": "digits"}
    with pytest.raises(ConfigError, match=r"data must be a zoo\.data\.DataConfig, not dict"):
        evaluate(Shade(2), wrong)
    with pytest.raises(ConfigError, match="Linear has no pretrained_cfg"):
        evaluate(nn.Linear(2, 2), data)


# --------------------------------------------------------------------------------------------------------- prediction


def test_predicting_one_image(tmp_path: Path):
    path = tmp_path / "grey.png"
    Image.new("L", (30, 20), 140).save(path)
    first, second = predict(Shade(3, ["black", "grey", "white"]), path, topk=2)
    assert (first.label, first.index, second.label) == ("grey", 1, "white")
    assert 0 < second.probability < first.probability < 1
    assert predict(Shade(3), Image.new("RGB", (8, 8)))[0].label == "0"
    assert len(predict(Shade(3), path)) == 3
    with pytest.raises(DataError, match="There is no image"):
        predict(Shade(3), tmp_path / "none.png")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(DataError, match="cannot be read as an image"):
        predict(Shade(3), tmp_path / "text.png")
    with pytest.raises(ConfigError, match="topk must be a whole number and at least 1, not 0"):
        predict(Shade(3), path, topk=0)
    wrong: Any = "3"
    with pytest.raises(ConfigError, match="topk must be a whole number and at least 1, not '3'"):
        predict(Shade(3), path, topk=wrong)
    wrong = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ConfigError, match="image must be a path or a PIL image, not ndarray"):
        predict(Shade(3), wrong)
    with pytest.raises(ConfigError, match="Linear has no pretrained_cfg"):
        predict(nn.Linear(2, 2), path)
    headless = zoo.create_model("poolformer_s12", pretrained=False, num_classes=0, depths=(1,), dims=(8,))
    with pytest.raises(ConfigError, match="no classifier"):
        predict(headless, path)


def test_imagenet_classes_have_names():
    model: Any = zoo.create_model("poolformer_s12", pretrained=False, depths=(1, 1), dims=(8, 8))
    with torch.no_grad():
        model.head.fc.bias[281] = 100
    assert predict(model, Image.new("RGB", (64, 64)))[0].label.startswith("tabby")


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = zoo.create_model(
        "poolformer_s12", pretrained=False, num_classes=2, depths=(1, 1), dims=(8, 8), stem_kernel_size=3, stem_stride=2
    )
    return zoo.save_pretrained(model, tmp_path / "exported", labels=["cat", "dog"])


def test_eval_takes_folders_files_and_names(eval_py: Any, exported: Path, tmp_path: Path):
    make_parquet(tmp_path / "data" / "test.parquet", [0, 1, 1], ["cat", "dog"])
    data = ["--data.name", "parquet", "--data.path", tmp_path / "data", "--data.input_size", "[3, 32, 32]"]
    weights = exported / "model.safetensors"
    found = set()
    for source in (["--model", exported], ["--model", f"local-dir:{exported}"], ["--model", weights]):
        status, text, errors = eval_py(*source, *data, "--data.workers", "0", "--output", tmp_path / "out")
        assert status == 0, errors
        found.add(json.loads((tmp_path / "out" / "results.json").read_text())["loss"])
    assert len(found) == 1
    assert "Written to" in text
    opened: Any = load_model(str(exported))
    assert list(opened.pretrained_cfg["label_names"]) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--model"], 2, "--model needs a value"),
        (["--modle", "x"], 2, "There is no option --modle. Did you mean --model?"),
        (["--gpu", "0"], 2, "There is no option --gpu.\n"),
        (["--data.name", "digits"], 1, "required: model"),
        (["--model", "poolformer_s99", "--data.name", "digits"], 1, "Did you mean poolformer_s"),
        (["--model", "poolformer_s99"], 1, "Did you mean poolformer_s"),
        (["--model", "/dev", "--data.name", "digits"], 1, "/dev is neither the folder of a run nor one with"),
        (["--model", __file__, "--data.name", "digits"], 1, "has no config.json beside it"),
        (["--model", "timm/poolformer_s99", "--data.name", "digits"], 1, "timm does not make 'timm/poolformer_s99'"),
        (["--model", "EXPORTED", "--data.name", "digits"], 1, "The data has 10 classes and the model 2"),
        (["--model", "EXPORTED", "--data.name", "folder", "--data.path", "/nowhere"], 1, "There is no folder"),
    ],
)
def test_bad_input(eval_py: Any, exported: Path, flags: list[str], status: int, message: str):
    found, _, errors = eval_py(*[str(exported) if flag == "EXPORTED" else flag for flag in flags])
    assert message in errors
    assert found == status
    assert "Traceback" not in errors
    assert len(errors.splitlines()) == 1


def test_a_classifier_that_the_weights_lack(eval_py: Any, exported: Path):
    """It would be random; features are measured without."""
    path = exported / "config.json"
    config = json.loads(path.read_text())
    config["num_classes"] = config["zoo"]["model_args"]["num_classes"] = 10
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "label_names"}))
    flags = ["--model", exported, "--data.name", "digits", "--data.workers", "0", "--data.input_size", "[3, 32, 32]"]
    status, _, errors = eval_py(*flags)
    assert (status, errors.count("\n")) == (1, 1)
    assert "for the 10 classes of" in errors
    assert eval_py(*flags, "--features", "knn")[0] == 0


def test_results_that_cannot_be_written(eval_py: Any, exported: Path, tmp_path: Path):
    make_parquet(tmp_path / "data" / "test.parquet", [0, 1, 1], ["cat", "dog"])
    data = ["--data.name", "parquet", "--data.path", tmp_path / "data", "--data.workers", "0"]
    status, _, errors = eval_py("--model", exported, *data, "--output", "/dev/null/out")
    assert status == 1
    assert "Cannot write to the folder '/dev/null/out'" in errors
