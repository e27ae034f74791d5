"""The demo: a short form that goes through every step, and (slow) the whole, to the accuracy that it promises."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from tests.launcher import python
from zoo.demo import LANGUAGE_RECIPE, LEAST_TOP1, MOST_BITS, RECIPE, DemoError, demo, demo_language


def test_every_step_of_the_demo_in_short(tmp_path: Path, capsys: pytest.CaptureFixture):
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["model"]["args"] |= {"depths": [1, 1], "dims": [16, 32]}
    recipe["scheduler"]["epochs"] = 3
    short = tmp_path / "short.yaml"
    short.write_text(yaml.safe_dump(recipe))
    with pytest.raises(DemoError, match=r"below the 101% that this demo is to reach"):
        demo(tmp_path / "out", short, least_top1=101)
    text = capsys.readouterr().out
    for call in ("zoo.create_model", "timm.create_model"):
        assert f'{call}("local-dir:{tmp_path / "out" / "export"}", pretrained=True): the same logits' in text
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    history = (tmp_path / "out" / "run" / "history.csv").read_text().splitlines()
    assert len(history) == 4
    assert f"{results['top1']}" in history[-1]
    for made in ("digit.png", "confusion.png", "run/curves.png", "export/config.json", "export/model.safetensors"):
        assert (tmp_path / "out" / made).is_file()
        assert made.split("/")[0] in text


def test_every_step_of_the_language_demo_in_short(tmp_path: Path, capsys: pytest.CaptureFixture):
    recipe = yaml.safe_load(LANGUAGE_RECIPE.read_text())
    recipe["model"]["args"] |= {"depth": 2, "dim": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    recipe["model"]["args"] |= {"hidden_dim": 48, "context_length": 260}
    recipe["data"] |= {"tokens_per_epoch": 10_000, "val_tokens": 1000, "cache_dir": str(tmp_path / "cache")}
    recipe["scheduler"]["epochs"] = 2
    short = tmp_path / "short.yaml"
    short.write_text(yaml.safe_dump(recipe))
    with pytest.raises(DemoError, match=r"above the 0\.1 that this demo is to reach"):
        demo_language(tmp_path / "out", short, most_bits=0.1)
    text = capsys.readouterr().out
    checkpoint = tmp_path / "out" / "language" / "best"
    assert f'zoo.create_model("local-dir:{checkpoint}", pretrained=True), "The "' in text
    assert "\nThe " in text
    assert "bits a byte of other topics" in text
    for made in ("best/config.json", "best/model.safetensors", "best/tokenizer.json", "curves.png", "samples.md"):
        assert (tmp_path / "out" / "language" / made).is_file()


def test_an_output_that_cannot_be_written():
    done = python("-m", "zoo.demo", "--output", "/dev/null/demo")
    assert done.returncode == 1
    assert done.stderr == "error: Cannot write to the folder '/dev/null/demo': Not a directory.\n"


@pytest.mark.slow
def test_the_demo_reaches_its_accuracy(tmp_path: Path):
    done = python("-m", "zoo.demo", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "results.json").read_text())["top1"] >= LEAST_TOP1
    with open(tmp_path / "language" / "history.csv", newline="") as file:
        assert min(float(row["val_bits_per_byte"]) for row in csv.DictReader(file)) <= MOST_BITS
