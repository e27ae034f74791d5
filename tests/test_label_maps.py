"""Label maps: accuracies against those worked out from known logits and the lists that timm brings."""

from __future__ import annotations

import json
import os
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest

import zoo
from tests.known import Known, known_folder, random_logits, softmax
from zoo.data import DataConfig
from zoo.errors import ConfigError, DataError
from zoo.evaluation import evaluate

ROOT = Path(__file__).resolve().parents[1]


def info(name: str) -> str:
    data = pkgutil.get_data("timm.data", f"_info/{name}")
    assert data
    return data.decode()


SYNSETS = info("imagenet_synsets.txt").split()


@pytest.mark.parametrize(
    ("label_map", "wnids"),
    [
        ("a", info("imagenet_a_synsets.txt").split()),
        ("r", info("imagenet_r_synsets.txt").split()),
        ("mini", info("mini_imagenet_synsets.txt").split()),
        ("sketch", SYNSETS),
        ("imagenet", SYNSETS),
    ],
)
def test_folders_of_wordnet_ids(tmp_path: Path, label_map: str, wnids: list[str]):
    shown = [wnids[-1], wnids[0], wnids[40], wnids[40], wnids[7], wnids[99]]  # some classes, in no order
    data = known_folder(tmp_path, [f"{wnid}/{i}.png" for i, wnid in enumerate(shown)])
    logits = random_logits(6, 1000)
    asked = [SYNSETS.index(wnid) for wnid in wnids]
    for image, favourite in ((0, wnids[-1]), (2, wnids[40]), (3, wnids[40])):
        logits[image, SYNSETS.index(favourite)] = 30
    outside = next((i for i in range(1000) if i not in asked), None)
    if outside is not None:
        logits[0, outside] = 99  # the best of all, but not asked
    within = logits[:, asked]
    answers = [wnids.index(wnid) for wnid in shown]

    results = evaluate(Known(logits), data, label_map=label_map)
    assert results.top1 == pytest.approx(100 * np.mean(within.argmax(1) == answers))
    assert results.top1 >= 50
    fifth = np.sort(within)[:, -5]
    assert results.top5 == pytest.approx(100 * np.mean(within[range(6), answers] >= fifth))
    assert results.loss == pytest.approx(-np.log(softmax(within)[range(6), answers]).mean(), rel=1e-6)
    assert tuple(results.per_class) == tuple(wnids)
    assert results.per_class[wnids[40]] == 100
    assert (results.images, results.label_map) == (6, label_map)


def test_a_model_that_numbers_its_classes_otherwise(tmp_path: Path):
    wnids = info("imagenet_a_synsets.txt").split()
    names = wnids[::-1]  # trained on these 200 classes alone, in an order of its own
    logits = random_logits(3, 200)
    logits[0, names.index(wnids[5])] = logits[1, names.index(wnids[5])] = 30
    data = known_folder(tmp_path, [f"{wnids[5]}/a.png", f"{wnids[6]}/b.png", f"{wnids[5]}/c.png"])
    results = evaluate(Known(logits, names), data, label_map="a")
    expected = np.array(names)[logits.argmax(1)] == [wnids[5], wnids[6], wnids[5]]
    assert results.top1 == pytest.approx(100 * expected.mean())
    with pytest.raises(DataError, match=r"for models of ImageNet-1k's 1000 classes, and this one has 200"):
        evaluate(Known(logits), data, label_map="a")


def test_folders_that_are_numbers_are_not_in_the_order_of_text(tmp_path: Path):
    numbers = [0, 1, 2, 10, 100, 999, 11, 20]
    data = known_folder(tmp_path, [f"{number}/{i}.jpeg" for i, number in enumerate(numbers)])
    logits = random_logits(8, 1000)
    right = [True, True, True, True, False, True, True, False]
    for image, number in enumerate(numbers):
        logits[image, number if right[image] else 500] = 40
    results = evaluate(Known(logits), data, label_map="v2")
    assert results.top1 == pytest.approx(100 * 6 / 8)
    assert results.per_class[SYNSETS[10]] == 100
    assert results.per_class[SYNSETS[100]] == 0
    assert results.per_class[SYNSETS[3]] is None
    (tmp_path / "1000").mkdir()
    with pytest.raises(DataError, match=r"ImageNet-V2 are called 0 to 999, and 1 of the data's are not: '1000'"):
        evaluate(Known(logits), data, label_map="v2")


def test_reassessed_labels(tmp_path: Path):
    real = json.loads(info("imagenet_real_labels.json"))
    by_count = {count: next(i for i, labels in enumerate(real) if len(labels) == count) for count in (0, 1, 2, 3)}
    chosen = [by_count[0], by_count[1], by_count[2], by_count[2], by_count[3], 49_999]
    # the folders say other classes than the reassessed labels do: the names of the files decide
    files = [f"n0144076{i}/ILSVRC2012_val_{number + 1:08d}.JPEG" for i, number in enumerate(chosen)]
    data = known_folder(tmp_path, files)
    logits = random_logits(6, 1000)
    logits[1, real[chosen[1]][0]] = 30
    logits[2, real[chosen[2]][0]] = 30
    logits[3, real[chosen[3]][1]] = 30  # the second right answer is as right as the first
    logits[4, [i for i in range(1000) if i not in real[chosen[4]]][:4]] = 20
    logits[4, real[chosen[4]][2]] = 19  # among the five best
    results = evaluate(Known(logits), data, label_map="real")

    judged = [i for i in range(6) if real[chosen[i]]]
    best = logits.argmax(1)
    top5 = np.argsort(-logits)[:, :5]
    assert (results.images, results.unlabelled) == (len(judged), 6 - len(judged))
    assert results.unlabelled >= 1
    assert results.top1 == pytest.approx(100 * np.mean([best[i] in real[chosen[i]] for i in judged]))
    assert results.top5 == pytest.approx(100 * np.mean([bool(set(top5[i]) & set(real[chosen[i]])) for i in judged]))
    shares = softmax(logits)
    losses = [-np.log(shares[i, real[chosen[i]]].sum()) for i in judged]
    assert results.loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert f"{results.unlabelled} images have no right answer" in str(results)
    known_folder(tmp_path, ["n01440764/cat.JPEG"])
    with pytest.raises(DataError, match=r"ILSVRC2012_val_00000001\.JPEG, and '.*cat\.JPEG' has none"):
        evaluate(Known(logits), data, label_map="real")


@pytest.mark.parametrize(
    ("file", "text", "per_class"),
    [
        ("map.txt", "black\ngrey\nwhite\n", {"noir": 100, "gris": 0, "blanc": 100}),
        ("map.json", '{"black": "noir", "grey": "blanc", "white": 2}', {"noir": 100, "gris": None, "blanc": 100}),
    ],
)
def test_a_file_says_which_class_is_which(tmp_path: Path, file: str, text: str, per_class: dict):
    (tmp_path / file).write_text(text)
    data = known_folder(tmp_path / "data", ["black/1.png", "grey/2.png", "white/3.png"])
    model = Known(np.array([[9, 0, 0], [0, 0, 9], [0, 0, 9]]), ["noir", "gris", "blanc"])
    assert evaluate(model, data, label_map=str(tmp_path / file)).per_class == per_class


def test_maps_that_do_not_fit(tmp_path: Path):
    data = known_folder(tmp_path / "data", ["black/1.png", "white/2.png"])
    model = Known(np.array([[9, 0], [0, 9]]), ["noir", "blanc"])
    with pytest.raises(ConfigError, match=r"no label map 'skech', and no file of this name\. Did you mean sketch\?"):
        evaluate(model, data, label_map="skech")
    with pytest.raises(DataError, match=r"2 of the data's 2 classes are not ImageNet-R's, .* n01443537: 'black', 'whi"):
        evaluate(model, data, label_map="r")
    for text, message in (
        ('{"black": "noir"}', "lacks 1 of the data's 2 classes: 'white'"),
        ('{"black": "noir", "white": "blanch"}', r"the model has not: 'blanch'\. Did you mean blanc\?"),
        ('{"black": "noir", "white": 2}', "the model has not: 2"),
        ('["black", "white"]', "must hold one object"),
        ('{"black"', "cannot be read"),
    ):
        (tmp_path / "map.json").write_text(text)
        with pytest.raises((ConfigError, DataError), match=message):
            evaluate(model, data, label_map=str(tmp_path / "map.json"))


def test_photographs_of_imagenet():
    folder = Path(os.environ.get("ZOO_DATA", ROOT.parent / "shared" / "data")) / "imagenet_sample"
    if not folder.is_dir():
        pytest.skip("no photographs: set ZOO_DATA to a folder that holds imagenet_sample/val/<wnid>")
    model = zoo.create_model("poolformer_s12", pretrained=False, depths=(1, 1), dims=(8, 8), stem_stride=16)
    data = DataConfig(name="folder", path=str(folder), batch_size=25, workers=0, input_size=(3, 64, 64))
    results = evaluate(model, data, label_map="imagenet")
    wnids = [path.name for path in (folder / "val").iterdir()]
    rated = [name for name, top1 in results.per_class.items() if top1 is not None]
    assert (results.images, results.skipped) == (len(wnids), ())
    assert rated == sorted(wnids)
    assert re.search(r"no images of 750 of the 1000 classes", str(results))
