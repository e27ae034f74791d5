"""`eval.py` on lists of models, sizes and features, and over several processes."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image

import zoo
from tests.launcher import Program, free_port, torchrun_environment
from tests.test_data import make_parquet
from zoo.evaluation import load_model, predict
from zoo.evaluation.config import EvaluationConfig, parse_evaluation

ROOT = Path(__file__).resolve().parents[1]
TIMM_COLUMNS = ["model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation"]


def export(folder: Path, seed: int, name: str = "poolformer_s12", labels: Any = ("cat", "dog"), **args: Any) -> Path:
    torch.manual_seed(seed)
    small: Any = {"depths": (1, 1), "dims": (8, 8), "stem_kernel_size": 3, "stem_stride": 2} | args
    model: Any = zoo.create_model(name, pretrained=False, num_classes=len(labels), **small)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}
    return zoo.save_pretrained(model, folder, labels=list(labels))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [export(root / "first", 0), export(root / "second", 1)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("data")
    make_parquet(root / "train.parquet", [0, 1] * 4, ["cat", "dog"])
    make_parquet(root / "test.parquet", [0, 1, 1, 0, 1, 1, 1], ["cat", "dog"])
    return ["--data.name", "parquet", "--data.path", str(root), "--data.workers", "0", "--device", "cpu"]


def test_a_list_goes_on_where_one_fails(eval_py: Any, models: list[Path], data: list[str], tmp_path: Path):
    out = tmp_path / "out"
    named = tmp_path / "models.txt"
    named.write_text(f"# the best first\n{models[0]}\npoolformer_s99\n\n{tmp_path}  # holds no model\n")
    status, text, errors = eval_py("--model", named, models[1], *data, "--output", out)
    assert status == 1
    assert "error: poolformer_s99: " in errors
    assert "Did you mean poolformer_s" in errors
    assert errors.splitlines()[-1].startswith("error: 2 of 4 models failed: poolformer_s99, ")
    table = pd.read_csv(out / "results.csv")
    assert list(table["model"]) == [str(path) for path in models]
    assert {path.parent.name for path in out.glob("*/results.json")} == {
        str(model).replace("/", "_").strip("_") for model in models
    }
    assert (out / "models.png").stat().st_size > 1000
    assert text.count("ECE") == 1  # the table at the end
    timm_table = pd.DataFrame([["resnet50.a1_in1k", 80.2, 19.8, 94.6, 5.4, 25.56, 224, 0.95, "bicubic"]])
    timm_table.columns = pd.Index(TIMM_COLUMNS)
    assert list(table.columns[:9]) == TIMM_COLUMNS
    joined = pd.concat([table, timm_table]).sort_values("top1")
    assert joined["top1"].dtype == joined["param_count"].dtype == float
    assert (table["top1"] + table["top1_err"]).tolist() == [100, 100]


def test_everything_of_one_model_is_saved(eval_py: Any, models: list[Path], data: list[str], tmp_path: Path):
    out, parquet = tmp_path / "out", tmp_path / "answers.parquet"
    predictions = ["--predictions", parquet, "--topk", "2", "--channels_last", "true", "--amp", "bf16"]
    status, _, errors = eval_py("--model", models[0], *data, f"--output={out}", *predictions)
    assert status == 0, errors
    assert {path.name for path in out.iterdir()} == {
        *("results.json", "results.csv", "per_class.csv", "confusion.csv", "confusion.png", "calibration.png")
    }
    results = json.loads((out / "results.json").read_text())
    command = "python eval.py --model first --data.name parquet --data.path data0 --data.workers 0 --device cpu "
    assert re.sub(r"data\d+", "data0", results["command"]).startswith(f"{command}--output=out --predictions ans")
    versions = {"backbone-zoo": zoo.__version__, "torch": torch.__version__, "timm": timm.__version__}
    assert results["versions"] == versions
    row = pd.read_csv(out / "results.csv").iloc[0]
    assert [row[name] for name in ("command", "zoo", "torch", "timm")] == [results["command"], *versions.values()]
    with open(out / "confusion.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["true class", "cat", "dog"]
    assert [list(map(int, row[1:])) for row in rows] == results["confusion"]
    per_class = pd.read_csv(out / "per_class.csv")
    assert list(per_class["images"]) == [2, 5]
    assert list(per_class["class"]) == ["cat", "dog"]

    answers = pq.read_table(parquet).to_pylist()
    assert [row["image"] for row in answers] == [f"test.parquet, row {i}" for i in range(7)]
    assert [row["label"] for row in answers] == ["cat", "dog", "dog", "cat", "dog", "dog", "dog"]
    right = [row["classes"][0] == row["label"] for row in answers]
    assert results["top1"] == pytest.approx(100 * np.mean(right))
    for row in answers:
        assert sorted(row["classes"]) == ["cat", "dog"]
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-5)


def test_predictions_are_those_of_predict(eval_py: Any, models: list[Path], tmp_path: Path):
    for number, name in enumerate(["cat", "dog", "dog"]):
        path = tmp_path / "pets" / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    (tmp_path / "pets" / "dog" / "damaged.png").write_text("no image")
    data = ["--data.path", tmp_path / "pets", "--data.workers", "0", "--device", "cpu"]
    status, text, _ = eval_py("--model", models[0], *data, "--predictions", tmp_path / "answers.parquet")
    assert (status, "Skipped 1 damaged images" in text) == (0, True)
    model = load_model(str(models[0]))
    rows = pq.read_table(tmp_path / "answers.parquet").to_pylist()
    assert len(rows) == 3
    for row in rows:
        expected = predict(model, row["image"])
        assert row["classes"] == [found.label for found in expected]
        assert row["probabilities"] == pytest.approx([found.probability for found in expected], abs=1e-5)
        assert Path(row["image"]).parent.name == row["label"]


def test_sizes(eval_py: Any, models: list[Path], data: list[str], tmp_path: Path):
    status, _, errors = eval_py("--model", models[0], *data, "--sizes", 24, 32, 40, "--output", tmp_path / "out")
    assert status == 0, errors
    table = pd.read_csv(tmp_path / "out" / "results.csv")
    assert list(table["img_size"]) == [24, 32, 40]
    assert (tmp_path / "out" / "sizes.png").stat().st_size > 1000
    assert json.loads((tmp_path / "out" / "24" / "results.json").read_text())["preprocessing"]["input_size"][-1] == 24
    own = eval_py("--model", models[0], *data, "--output", tmp_path / "own")
    assert own[0] == 0
    whole = pd.read_csv(tmp_path / "own" / "results.csv")
    assert whole["loss"][0] == table["loss"][1]


def test_a_model_of_one_size_refuses_others(eval_py: Any, data: list[str], tmp_path: Path):
    mixers = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "stem_stride": 4, "img_size": 32}
    fixed = export(tmp_path / "fixed", 0, "randformer_s12", **mixers)
    status, _, errors = eval_py("--model", fixed, *data, "--sizes", 32, 64)
    assert status == 1
    assert "runs at its own input size alone, 32x32: it has no results at 64" in errors
    assert len(errors.splitlines()) == 1


def test_features_of_a_model_with_other_classes(eval_py: Any, data: list[str], tmp_path: Path):
    other = export(tmp_path / "other", 0, labels=["one", "two", "three"])
    out = tmp_path / "out"
    features = ["--features", "knn", "linear", "--probe.knn_k", "3"]
    status, _, errors = eval_py("--model", other, *data, *features, "--output", out)
    assert status == 0, errors
    table = pd.read_csv(out / "results.csv")
    assert list(table["method"]) == ["knn", "linear"]
    assert list(table["images"]) == [7, 7]
    assert {path.parent.name for path in out.rglob("results.json")} == {"knn", "linear"}


def test_help_has_examples_that_parse(eval_py: Any, capfd: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        eval_py("--help")
    examples = re.findall(r"^  python eval.py (.*)$", capfd.readouterr().out.partition("examples:")[2], re.MULTILINE)
    assert len(examples) >= 3
    for example in examples:
        argv = shlex.split(example.replace("runs/digits ", f"{ROOT} "))  # no such run is here
        assert parse_evaluation([*argv, "--data.name", "digits"]).models


def test_digits_have_two_splits(eval_py: Any, tmp_path: Path):
    model = export(tmp_path / "model", 0, labels=list(map(str, range(10))), in_chans=1)
    flags = ["--model", model, "--data.name", "digits", "--data.workers", "0", "--device", "cpu", "--data.val_split"]
    assert "on 1437 images" in eval_py(*flags, "train")[1]
    assert "on 360 images" in eval_py(*flags, "test")[1]
    status, _, errors = eval_py(*flags, "val")
    assert (status, errors) == (1, "error: The digits have no split 'val', but train and test.\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--model", "a", "b", "--checkpoint_path", "c"],
            "checkpoint_path holds the weights of one model, and there a",
        ),
        (["--model", "a", "b", "--predictions", "p.parquet"], "predictions takes one model at one size"),
        (["--model", "a", "--predictions", "/nowhere/p.parquet"], "there is no folder '/nowhere'"),
        (
            ["--model", "a", "--label_map", "reel"],
            "There is no label map 'reel', and no file of this name. Did you mean",
        ),
        (["--model", "a", "--features", "knn", "--label_map", "v2"], "leave out label_map"),
        (["--model", "a", "--features", "svm"], "features"),
        (["--model", "a", "--sizes", "large"], "sizes"),
        (["--model", "a", "--sizes", "0"], "sizes must be whole numbers above zero, not 0"),
        (["--model", "a", "--topk", "0"], "topk must be a whole number and at least 1, not 0"),
        (["--model", "runs/none"], "There is no run or checkpoint 'runs/none'"),
        (["--model", "none.txt"], "The list of models 'none.txt' cannot be read"),
    ],
)
def test_bad_input(eval_py: Any, flags: list[str], message: str):
    status, _, errors = eval_py(*flags, "--data.name", "digits")
    assert message in errors
    assert status == 1
    assert len(errors.splitlines()) == 1


def test_streams(eval_py: Any, models: list[Path], data: list[str], tmp_path: Path):
    """Read from front to back, the data gives the same figures, the same rows and the same features."""
    found = {}
    for kind, streaming in (("table", []), ("stream", ["--data.streaming", "true"])):
        out, parquet = tmp_path / kind, tmp_path / f"{kind}.parquet"
        assert eval_py("--model", models[0], *data, *streaming, "--output", out, "--predictions", parquet)[0] == 0
        probe = ["--features", "knn", "--probe.knn_k", "3", "--output", out / "knn"]
        assert eval_py("--model", models[0], *data, *streaming, *probe)[0] == 0
        results = [json.loads((folder / "results.json").read_text()) for folder in (out, out / "knn")]
        rows = [{**row, "image": None} for row in pq.read_table(parquet).to_pylist()]
        found[kind] = rows, [(each["confusion"], each["loss"], each["ece"]) for each in results]
    assert found["table"] == found["stream"]


def test_runs_bring_their_data_unless_they_differ(tmp_path: Path):
    for name, path in (("a", "pets"), ("b", "pets"), ("c", "cars")):
        (tmp_path / name).mkdir()
        run = {"data": {"name": "folder", "path": path, "input_size": [3, 64, 64], "batch_size": 7}}
        (tmp_path / name / "config.yaml").write_text(json.dumps(run))
    a, b, c = (str(tmp_path / name) for name in "abc")
    for models in ([a], [a, b]):
        config = parse_evaluation(["--model", *models])
        assert isinstance(config, EvaluationConfig)
        assert (config.models, config.data.path, config.data.batch_size) == (models, "pets", 7)
        assert config.data.input_size is None  # the model says it itself
    with pytest.raises(zoo.ZooError, match=r"a and .*c were trained on different data: name the data"):
        parse_evaluation(["--model", a, b, c])
    assert parse_evaluation(["--model", a, c, "--data.name", "digits"]).data.name == "digits"


def test_two_processes_count_every_image_once(eval_py: Any, models: list[Path], data: list[str], tmp_path: Path):
    """Seven images over two processes: four and three."""
    flags = ["--model", models[0], *data, "--data.batch_size", "2", "--output"]
    assert eval_py(*flags, tmp_path / "one")[0] == 0
    port = free_port()
    ranks = []
    for rank in range(2):
        environment = {**os.environ, **torchrun_environment(rank, 2, port), "OMP_NUM_THREADS": "1"}
        ranks.append(Program(ROOT / "eval.py", *flags, tmp_path / "two", env=environment))
    found = [rank.finish() for rank in ranks]
    assert [rank.returncode for rank in found] == [0, 0], found
    assert found[0].stdout.count("Written to") == 1
    assert found[1].stdout == ""  # one speaks
    one, two = (json.loads((tmp_path / folder / "results.json").read_text()) for folder in ("one", "two"))
    for key in ("top1", "top5", "images", "confusion", "per_class", "skipped"):
        assert one[key] == two[key]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-9)
    assert np.array(one["calibration"]) == pytest.approx(np.array(two["calibration"]), rel=1e-9)
