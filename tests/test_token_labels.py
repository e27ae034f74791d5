"""Token labels: maps follow their images, the loss is its formula, boxes take labels along, runs go on exactly."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

import zoo
from tests.launcher import Launcher
from tests.test_data import make_folder
from tests.test_distributed import assert_alike
from tests.test_resume import disturbed_task
from tests.test_training import assert_same_checkpoint, configure, rows
from zoo import cli
from zoo.config import plain_flags
from zoo.data import AugmentConfig, DataConfig, eval_transform, load_split, preprocessing, training_loader
from zoo.data.token_labels import FACTS, MapFolder, token_labels
from zoo.data.transforms import LabelMaps, random_transform, to_tensor
from zoo.errors import ConfigError, DataError
from zoo.evaluation import load_model
from zoo.evaluation.token_labels import place_logits
from zoo.hub import save_pretrained
from zoo.training import Interrupted, fit, train
from zoo.training.checkpoint import read_state
from zoo.training.token_labels import TokenLabeling, draw_box

MODEL = """
model:
  name: rmt_test
  args: {depths: [1, 1], dims: [16, 32], num_heads: [2, 2], head_hidden_size: 32, decay_range: 4.0, decomposed: true,
         layer_scale_init: null, mlp_ratio: 2.0}
"""
TEACHER = f"""
{MODEL}
data: {{name: folder, path: DATA, batch_size: 8, workers: 0, input_size: [3, 32, 32]}}
augment: {{scale: [0.5, 1.0], hflip: 0.0, color_jitter: 0.0}}
optimizer: {{lr: 3.0e-3}}
scheduler: {{epochs: 8, warmup_epochs: 0.5}}
train: {{eval_interval: 8}}
output: {{tracker: null}}
"""
STUDENT = f"""
{MODEL.rstrip()[:-1]}, token_label: true, drop_path_rate: 0.1}}
data: {{name: folder, path: DATA, token_labels: MAPS, batch_size: 8, workers: 0, input_size: [3, 32, 32]}}
augment: {{scale: [0.5, 1.0], hflip: 0.5, color_jitter: 0.0, mix_token: 1.0}}
optimizer: {{lr: 3.0e-3}}
scheduler: {{epochs: 2, warmup_epochs: 0.5}}
output: {{tracker: null}}
"""


def make_digits(root: Path) -> Path:
    """`root`/{train,val}/<digit>/*.png: 120 and 40 of the digits 0 to 3."""
    digits = load_digits()
    for label in range(4):
        for number, index in enumerate(np.flatnonzero(digits.target == label)[:40]):
            folder = root / ("train" if number < 30 else "val") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(np.round(digits.images[index] * (255 / 16)).astype(np.uint8))
            picture.resize((40, 32)).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `digits`, the run `teacher` that knows them, and its `maps`, made by the command."""
    home = tmp_path_factory.mktemp("token_labels")
    make_digits(home / "digits")
    (home / "teacher.yaml").write_text(TEACHER.replace("DATA", str(home / "digits")))
    run = train(configure(home / "teacher.yaml", home / "teacher"))
    assert run.best > 75  # chance is 25
    assert token_labels_command(home / "digits", home / "maps", "--teacher", home / "teacher") == 0
    student = STUDENT.replace("DATA", str(home / "digits")).replace("MAPS", str(home / "maps"))
    (home / "student.yaml").write_text(student)
    return home


def token_labels_command(*arguments: object) -> int:
    return cli.main(["token-labels", *map(str, arguments), "--workers", "0", "--device", "cpu", "--batch-size", "16"])


def maps_of(home: Path) -> MapFolder:
    split = load_split(DataConfig(name="folder", path=str(home / "digits")), training=True)
    return MapFolder(home / "maps", split)


def whole(label_map: Tensor) -> LabelMaps:
    """One map, of which all is seen."""
    return LabelMaps(label_map[None], torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[False, False]]))


# ---------------------------------------------------------------------------------------------------------------- views


def test_a_map_is_cropped_and_flipped_as_its_image():
    """A picture of four colours, a map that says which quarter is which: every token is told its own colour."""
    colours = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0]], dtype=np.uint8)
    quarters = np.array([[0, 1], [2, 3]]).repeat(24, 0).repeat(40, 1)  # a picture of 80x48
    image = to_tensor(Image.fromarray(colours[quarters]))
    classes = torch.tensor([[0, 1], [2, 3]]).repeat_interleave(8, 0).repeat_interleave(8, 1)
    label_map = torch.stack([torch.full((1, 16, 16), 9.0), classes[None].float()])
    preprocess = {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    transform = random_transform(preprocess, AugmentConfig(hflip=0.5, vflip=0.5, color_jitter=0.0, aa=None))
    checked, flips = [], set()
    for seed in range(60):
        random.seed(seed)
        torch.manual_seed(seed)
        pixels, view = transform.pixels_and_view(image)
        assert view is not None
        flips.add(view.flips)
        maps = LabelMaps(label_map[None], torch.tensor([view.region]), torch.tensor([view.flips]))
        found = token_labels(maps, 4, (8, 8))[0]
        torch.testing.assert_close(found.sum(-1), torch.ones(8, 8))
        cells = pixels.unfold(1, 8, 8).unfold(2, 8, 8).flatten(3).float()  # (3, 8, 8, 64)
        plain = ((cells.amax(-1) - cells.amin(-1)) < 20).all(0)  # tokens of one colour
        away = (cells.mean(-1).permute(1, 2, 0)[:, :, None] - torch.from_numpy(colours).float()).abs().sum(-1)
        assert torch.equal(found.argmax(-1)[plain], away.argmin(-1)[plain]), seed
        checked.append((int(plain.sum()), len(away.argmin(-1).unique())))
    assert len(flips) == 4
    assert sum(count for count, _ in checked) > 2000
    assert sum(colours > 1 for _, colours in checked) > 20


def test_labels_are_read_where_the_token_lies():
    """Logits that rise evenly over the image: a token's is that at its middle."""
    ramp = torch.arange(16.0).expand(16, 16)  # place i is centred at (i + 0.5) / 16
    maps = LabelMaps(
        torch.stack([ramp, torch.zeros(16, 16)])[None, :, None],
        torch.tensor([[0.25, 0.1, 0.75, 0.9]]),
        torch.tensor([[False, False]]),
    )
    middles = 0.25 + (torch.arange(4) + 0.5) / 4 * 0.5
    expected = (middles * 16 - 0.5).expand(2, 4)
    found = token_labels(maps, 2, (2, 4))[0]
    torch.testing.assert_close(found[..., 0].logit(), expected, rtol=1e-3, atol=1e-3)  # the other class counts as 0
    flipped = token_labels(maps._replace(flips=torch.tensor([[True, False]])), 2, (2, 4))[0]
    assert torch.equal(flipped, found.flip(1))


def test_maps_change_no_picture(home: Path):
    """The batches are those without maps, bit for bit, whichever worker reads them; each map is its image's."""
    config = DataConfig(name="folder", path=str(home / "digits"), batch_size=8, workers=0)
    augment = AugmentConfig(aa="rand-m9-mstd0.5-inc1", reprob=0.5, remode="pixel", aug_repeats=2)
    split = load_split(config, training=True)
    preprocess = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    batches = []
    for changes in ({}, {"token_labels": str(home / "maps")}, {"token_labels": str(home / "maps"), "workers": 1}):
        options = DataConfig(**{**vars(config), **changes})
        batches.append(list(training_loader(split, options, preprocess, augment, seed=3).batches(1)))
    maps = maps_of(home)
    stored = torch.stack([maps.read(index) for index in range(len(split))])
    for plain, labelled, elsewhere in zip(*batches, strict=True):
        assert plain.label_maps is None
        for a, b, c in zip(plain[:4], labelled[:4], elsewhere[:4], strict=True):
            assert a == b == c if isinstance(a, tuple) else torch.equal(a, b) and torch.equal(a, c)
        for b, c in zip(labelled.label_maps, elsewhere.label_maps, strict=True):
            assert torch.equal(b, c)
        for label_map, label in zip(labelled.label_maps.maps, labelled.labels, strict=True):
            (number,) = (stored == label_map).flatten(1).all(1).nonzero()[:, 0]
            assert split.labels[number] == label
        assert labelled.label_maps.maps.dtype == torch.float16
        (left, top, right, bottom) = labelled.label_maps.regions.T
        assert (left >= 0).all()
        assert (left < right).all()
        assert (bottom <= 1).all()
        assert (top < bottom).all()


# ----------------------------------------------------------------------------------------------------------------- loss


class Tokens(nn.Module):
    """Gives the logits it was made with, and remembers what it was asked."""

    def __init__(self, image: Tensor, tokens: Tensor) -> None:
        super().__init__()
        self.image, self.tokens = image, tokens
        self.asked: list[Any] = []

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        return height // 16, width // 16

    def forward_tokens(self, x: Tensor, exchanged: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.asked.append(exchanged)
        return self.image, self.tokens


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_loss_is_its_formula(alpha: float):
    """By hand, in float64, for a model that is no RMT: three images of 2x3 tokens, five classes."""
    generator = torch.Generator().manual_seed(0)
    image, tokens = torch.randn(3, 5, generator=generator), torch.randn(3, 6, 5, generator=generator)
    numbers = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(3 * 6)]).view(3, 2, 3, 2)
    values = torch.rand(3, 2, 2, 3, generator=generator) * 4
    stored = torch.stack([values, numbers.permute(0, 3, 1, 2).float()], dim=1)
    maps = LabelMaps(stored, torch.tensor([[0.0, 0, 1, 1]] * 3), torch.zeros(3, 2, dtype=torch.bool))
    model, labels = Tokens(image, tokens), torch.tensor([4, 0, 2])
    soft = nn.CrossEntropyLoss()
    labelling = TokenLabeling(model, (32, 48), 5, criterion=soft, smoothing=0.1, weight=0.25, alpha=alpha)
    np.random.seed(5)
    found = labelling.loss(labelling.learner, torch.zeros(3, 3, 32, 48), labels, maps)
    np.random.seed(5)
    box = draw_box((2, 3), 1.0).numpy() if alpha else np.zeros((2, 3), dtype=bool)
    assert (model.asked[0] is None) if not alpha else np.array_equal(model.asked[0], box)
    assert not alpha or 0 < box.sum() < 6

    total = 0.0
    for i in range(3):
        other = 2 - i
        share = box.mean()
        label = np.full(5, 0.02) + 0.9 * ((1 - share) * np.eye(5)[labels[i]] + share * np.eye(5)[labels[other]])
        total -= float((label * image[i].double().log_softmax(-1).numpy()).sum()) / 3
        for row in range(2):
            for column in range(3):
                j = other if box[row, column] else i
                logits = np.zeros(5)
                logits[stored[j, 1, :, row, column].int()] = stored[j, 0, :, row, column]
                target = np.exp(logits) / np.exp(logits).sum()
                log_p = tokens[i, 3 * row + column].double().log_softmax(-1).numpy()
                total -= 0.25 * float((target * log_p).sum()) / 18
    assert found.item() == pytest.approx(total, rel=1e-5)


def test_nothing_is_drawn_where_nothing_is_mixed():
    model = Tokens(torch.zeros(2, 4), torch.zeros(2, 4, 4))
    maps = whole(torch.zeros(2, 1, 2, 2))
    maps = LabelMaps(*(tensor.repeat(2, *[1] * (tensor.ndim - 1)) for tensor in maps))
    labelling = TokenLabeling(model, (32, 32), 4, criterion=nn.CrossEntropyLoss(), alpha=1.0)
    before = np.random.get_state()[1].tolist()
    labelling.loss(labelling.learner, torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]), maps, mix=False)
    assert model.asked == [None]
    assert np.random.get_state()[1].tolist() == before


# ------------------------------------------------------------------------------------------------------------- MixToken


def tiny(**arguments: Any) -> Any:
    sizes = {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 64), "num_heads": (2, 2, 4, 4), "head_hidden_size": 32}
    return zoo.create_model("rmt_s_token_label", pretrained=False, num_classes=5, **{**sizes, **arguments}).eval()


def test_a_box_of_the_stems_map_comes_from_the_other_image():
    torch.manual_seed(0)
    model, images = tiny(), torch.randn(3, 3, 97, 128)
    assert model.token_grid(97, 128) == (4, 4)
    exchanged = torch.zeros(4, 4, dtype=torch.bool)
    exchanged[1:4, 2:3] = True
    seen: list[Tensor] = []
    model.stages[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    image, tokens = model.forward_tokens(images, exchanged)
    assert (image.shape, tokens.shape) == ((3, 5), (3, 16, 5))
    stem = model.stem(images)
    expected = stem.clone()
    assert stem.shape[2:] == (25, 32)
    expected[:, :, 8:25, 16:24] = stem.flip(0)[:, :, 8:25, 16:24]
    assert torch.equal(seen[0], expected)


def test_all_tokens_exchanged_are_the_batch_mirrored():
    torch.manual_seed(0)
    model, images = tiny(), torch.randn(4, 3, 64, 64)
    every, none = torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.bool)
    for found, expected in zip(model.forward_tokens(images, every), model.forward_tokens(images.flip(0)), strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(model.forward_tokens(images, none), model.forward_tokens(images), strict=True):
        assert torch.equal(found, expected)


def test_boxes_follow_from_numpys_random_numbers():
    np.random.seed(0)
    boxes = torch.stack([draw_box((7, 5), 1.0) for _ in range(300)])
    np.random.seed(0)
    assert torch.equal(boxes, torch.stack([draw_box((7, 5), 1.0) for _ in range(300)]))
    for box in boxes:
        down, across = box.any(1).nonzero()[:, 0], box.any(0).nonzero()[:, 0]
        if len(down):
            assert box[down[0] : down[-1] + 1, across[0] : across[-1] + 1].all()
            assert box.sum() == (down[-1] + 1 - down[0]) * (across[-1] + 1 - across[0])
    shares = boxes.float().mean((1, 2))
    assert shares.min() == 0
    assert shares.max() > 0.6
    assert shares.std() > 0.1


# ------------------------------------------------------------------------------------------------------------- training


def test_a_run_with_maps_that_the_command_made(home: Path, tmp_path: Path):
    """It learns its tokens: they tell the class of images it has not seen, and the loss falls."""
    changes = {"scheduler": {"epochs": 6}, "optimizer": {"layer_decay": 0.9}, "data": {"workers": 1}}
    run = train(configure(home / "student.yaml", tmp_path / "run", **changes))
    losses = [row["train_loss"] for row in run.history]
    assert losses[-1] < losses[0] - 0.3
    assert run.best > 60  # chance is 25
    model: Any = load_model(str(run.folder)).eval()
    split = load_split(DataConfig(name="folder", path=str(home / "digits")), training=False)
    transform = eval_transform(preprocessing(model))
    images = torch.stack([transform(split.source.open(i).convert("RGB")) for i in range(len(split))])
    with torch.no_grad():
        image, tokens = model.forward_tokens(images)
        torch.testing.assert_close(model(images), image + 0.5 * tokens.amax(1))
    right = (tokens.softmax(-1).mean(1).argmax(-1) == torch.from_numpy(split.labels)).float().mean()
    assert right > 0.5


def test_a_run_that_was_stopped_goes_on_exactly(home: Path, tmp_path: Path):
    """In the middle of an epoch, with all that draws random numbers; averaged weights, and bfloat16."""
    changes = {
        "augment": {"aug_repeats": 2, "aa": "rand-m9-mstd0.5-inc1", "reprob": 0.3, "remode": "pixel"},
        "train": {"model_ema": True, "model_ema_decay": 0.9, "amp": "bf16"},
    }
    whole = train(configure(home / "student.yaml", tmp_path / "whole", **changes))
    config = configure(home / "student.yaml", tmp_path / "broken", **changes)
    with pytest.raises(Interrupted):
        fit(*disturbed_task(config, "loss", lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert 0 < read_state(tmp_path / "broken" / "last")["progress"]["batch"] < 15
    resumed = train(dataclasses.replace(config, resume="auto"))
    assert_same_checkpoint(whole.folder / "last", resumed.folder / "last")


def test_gradients_of_several_batches(home: Path, tmp_path: Path):
    """Three batches of 8, in another layout and computed twice, learn what one of 24 does, with norms at rest."""
    norms = ["stem", "stages.1.downsample.norm", "head.norm"]
    arguments = configure(home / "student.yaml", tmp_path).model.args
    still = {
        "augment": {"mix_token": 0.0},
        "model": {"args": {**arguments, "drop_path_rate": 0.0}, "freeze": norms},
    }
    options = {"grad_accum_steps": 3, "grad_checkpointing": True, "channels_last": True}
    weights = []
    for name, size, lr, how in (("start", 24, 1e-12, {}), ("whole", 24, 0.1, {}), ("parts", 8, 0.1, options)):
        config = configure(
            home / "student.yaml",
            tmp_path / name,
            data={"batch_size": size},
            train={**how, "max_updates": 4},
            optimizer={"opt": "sgd", "lr": lr},
            scheduler={"min_lr": 0.0},
            **still,
        )
        weights.append(load_file(train(config).folder / "last" / "model.safetensors"))
    start, whole, parts = weights
    learned = max((whole[key] - start[key]).abs().max() for key in start)
    assert max((parts[key] - whole[key]).abs().max() for key in start) < 1e-3 * learned


def test_mixing_ends_with_its_epoch(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: list[int] = []

    def counted(grid: tuple[int, int], alpha: float) -> Tensor:
        drawn.append(1)
        return draw_box(grid, alpha)

    monkeypatch.setattr("zoo.training.token_labels.draw_box", counted)
    train(configure(home / "student.yaml", tmp_path / "run", augment={"mixup_off_epoch": 1}))
    assert len(drawn) == 15  # batches of the first of two epochs


@pytest.mark.slow
def test_two_processes(home: Path, tmp_path: Path, launcher: Launcher):
    """Under DDP and FSDP2, which draw the same boxes, and so learn the same."""
    for name in ("ddp", "fsdp"):
        argv = ["--config", home / "student.yaml", *plain_flags({"train": {"parallel": name, "model_ema": True}})]
        launcher.run(tmp_path, *argv, "--output.dir", tmp_path / name, processes=2)
    assert [row["updates"] for row in rows(tmp_path / "ddp")] == ["7", "14"]
    assert_alike(tmp_path / "ddp", tmp_path / "fsdp")


# ----------------------------------------------------------------------------------------------------------------- maps


def test_maps_hold_what_the_teacher_says(home: Path):
    """At their own grid: the probabilities of the classes that are kept, and the rest in equal shares."""
    maps, teacher = maps_of(home), load_model(str(home / "teacher")).eval()
    preprocess = preprocessing(teacher)
    pixels = maps.files.open(7).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    mean, std = (torch.tensor(preprocess[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        expected = place_logits(teacher, ((to_tensor(pixels) / 255 - mean) / std)[None])[0].permute(1, 2, 0)
    assert maps.shape == (2, 4, 4, 4)
    found = token_labels(whole(maps.read(7)), 4, (4, 4))[0]
    torch.testing.assert_close(found, expected.softmax(-1), rtol=0.02, atol=0.01)


def test_fewer_classes_than_there_are(home: Path, tmp_path: Path):
    assert token_labels_command(home / "digits", tmp_path / "maps", "--teacher", home / "teacher", "--topk", 2) == 0
    image = next((home / "maps" / "2").iterdir()).name
    four, two = (torch.load(folder / "maps" / "2" / image) for folder in (home, tmp_path))
    assert (four.shape, two.shape) == ((2, 4, 4, 4), (2, 2, 4, 4))
    every, some = (token_labels(whole(label_map), 4, (4, 4))[0] for label_map in (four, two))
    highest = every.topk(2)
    torch.testing.assert_close(some.gather(-1, highest.indices), highest.values, rtol=0.02, atol=2e-3)
    rest = some.scatter(-1, highest.indices, 0)
    assert ((rest > 0).sum(-1) == 2).all()
    torch.testing.assert_close(rest.amax(-1) * 2, rest.sum(-1))


@pytest.mark.parametrize("name", ["resnet10t", "swin_tiny_patch4_window7_224"])
def test_the_mean_over_places_is_what_a_linear_head_says(name: str):
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)} if "swin" in name else {}
    model = timm.create_model(name, num_classes=6, **sizes).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        found = place_logits(model, images)
        assert found.shape == (2, 6, 7, 7)
        torch.testing.assert_close(found.mean((2, 3)), model(images), rtol=1e-4, atol=1e-5)


def test_the_command_goes_on_where_it_was_interrupted(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    make_folder(tmp_path / "data" / "train", "0123", 3)
    (tmp_path / "data" / "train" / "0" / "1.png").write_bytes(b"no picture")
    ask = (tmp_path / "data", tmp_path / "maps", "--teacher", home / "teacher", "--size", 64)
    assert token_labels_command(*ask) == 0
    said = capsys.readouterr()
    assert said.out == f"11 label maps of 2x4x8x8 written: {tmp_path / 'maps'}\n"
    assert "Damaged, and without a map: " in said.err
    assert "0/1.png" in said.err
    kept, lost = tmp_path / "maps" / "1" / "0.pt", tmp_path / "maps" / "1" / "2.pt"
    moment, held = kept.stat().st_mtime_ns, torch.load(lost)
    lost.unlink()
    assert token_labels_command(*ask) == 0
    assert capsys.readouterr().out.startswith("1 label maps of 2x4x8x8 written, 10 kept: ")
    assert kept.stat().st_mtime_ns == moment
    assert torch.equal(torch.load(lost), held)
    assert json.loads((tmp_path / "maps" / "token_labels.json").read_text())["classes"] == list("0123")
    assert sorted(path.name for path in (tmp_path / "maps" / "1").iterdir()) == ["0.pt", "1.pt", "2.pt"]

    assert token_labels_command(*ask[:-2]) == 1
    assert "were made otherwise (input_size [3, 64, 64], shape [2, 4, 8, 8])" in capsys.readouterr().err
    (tmp_path / "maps" / "token_labels.json").unlink()
    assert token_labels_command(*ask) == 1
    assert "do not say how they were made: choose another folder" in capsys.readouterr().err


def test_maps_of_another_teacher_are_not_mixed_in(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Whichever images they are of: the record speaks of all maps in the folder."""
    make_folder(tmp_path / "data" / "train", "0123", 2)
    (tmp_path / "data" / "val").symlink_to(make_digits(tmp_path / "more") / "train")
    maps = tmp_path / "maps"
    assert token_labels_command(tmp_path / "data", maps, "--teacher", home / "teacher") == 0
    before = (maps / FACTS).read_text()
    changed: Any = zoo.create_model(f"local-dir:{home / 'teacher' / 'best'}")
    torch.nn.init.zeros_(changed.head.fc.bias)
    save_pretrained(changed, tmp_path / "other", labels=list("0123"))
    for extra in ((), ("--split", "val")):
        assert token_labels_command(tmp_path / "data", maps, "--teacher", tmp_path / "other", *extra) == 1
        assert "were made otherwise (teacher" in capsys.readouterr().err
    assert token_labels_command(tmp_path / "data", maps, "--teacher", home / "teacher", "--split", "val") == 1
    assert "were made otherwise (split train)" in capsys.readouterr().err
    assert (maps / FACTS).read_text() == before


def test_teachers_that_cannot_be_asked_about_places(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=4, depth=1)
    with pytest.raises(ConfigError, match=r"VisionTransformer gives no last map, .*, but \(1, 197, 192\)"):
        place_logits(vit, torch.zeros(1, 3, 224, 224))
    with pytest.raises(ConfigError, match="Tokens has no forward_features"):
        place_logits(Tokens(torch.zeros(1), torch.zeros(1)), torch.zeros(1, 3, 32, 32))
    make_folder(tmp_path / "data" / "train", "abcde", 1)
    assert token_labels_command(tmp_path / "data", tmp_path / "maps", "--teacher", home / "teacher") == 1
    assert "error: The model does not know 5 of the data's 5 classes" in capsys.readouterr().err
    for teacher in (home / "teacher", "not_a_model"):  # which is not asked for
        assert token_labels_command(tmp_path / "nowhere", tmp_path / "maps", "--teacher", teacher) == 1
        assert "error: There is no folder" in capsys.readouterr().err
    assert token_labels_command(home / "digits", tmp_path / "maps", "--teacher", home / "teacher", "--topk", 0) == 1
    assert "error: topk must be at least 1, not 0." in capsys.readouterr().err
    assert not (tmp_path / "maps").exists()


def test_images_that_would_share_a_map(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    make_folder(tmp_path / "data" / "train", "0123", 1)
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "train" / "2" / "0.jpg")
    assert token_labels_command(tmp_path / "data", tmp_path / "maps", "--teacher", home / "teacher") == 1
    assert "2/0.jpg and" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("workers", [0, 1])
def test_maps_that_are_missing_or_damaged(home: Path, tmp_path: Path, workers: int):
    """The file is named, without a traceback, though a worker met it; some come out at the start."""
    options: dict[str, Any] = {"token_labels": str(tmp_path), "batch_size": 8, "workers": workers}
    config = DataConfig(name="folder", path=str(home / "digits"), **options)
    split = load_split(config, training=True)
    preprocess = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3}

    def complaint() -> str:
        with pytest.raises(DataError) as caught:
            list(training_loader(split, config, preprocess, AugmentConfig(), seed=0).batches(0))
        assert "Traceback" not in str(caught.value)
        return str(caught.value)

    assert f"has no label map '{tmp_path}/0/" in complaint()
    good = torch.zeros(2, 2, 3, 3)
    places = [tmp_path / place.relative_to(home / "maps") for place in (home / "maps").rglob("*.pt")]
    for place in places:
        place.parent.mkdir(exist_ok=True)
        torch.save(good, place)
    victim = tmp_path / "3" / Path(split.source.name(len(split) - 1)).with_suffix(".pt").name
    for content, message in (
        (good[0], r"holds a tensor \(2, 3, 3\) of torch.float32, and no label map"),
        (good.int(), "of torch.int32, and no label map"),
        ({"labels": good}, "holds dict, and no label map"),
        (torch.zeros(2, 2, 3, 4), r"is \(2, 2, 3, 4\), others are \(2, 2, 3, 3\)"),
        (good + 4, "names a class 4, and the data has the 4 classes 0 to 3"),
        (good + 0.5, "names a class 0.5,"),
        (torch.tensor([[[[float("nan")]]], [[[0.0]]]]).expand(2, 2, 3, 3), "holds a logit that is not finite"),
        (b"half of a fi", "cannot be read"),
        (Path, "cannot be read"),
        (None, "has no label map"),
    ):
        victim.unlink(missing_ok=True)
        if isinstance(content, bytes):
            victim.write_bytes(content)
        elif content is not None:
            torch.save(content, victim)
        with pytest.raises(DataError, match=message):
            raise DataError(said := complaint())
        assert str(victim) in said
        if workers:
            return


def test_folders_of_maps(home: Path, tmp_path: Path):
    split = load_split(DataConfig(name="folder", path=str(home / "digits")), training=True)
    with pytest.raises(DataError, match=r"no folder of label maps .*nowhere.*`zoo token-labels` makes one"):
        MapFolder(tmp_path / "nowhere", split)
    (tmp_path / "token_labels.json").write_text('{"classes": ["0", "1"]}')
    with pytest.raises(DataError, match="are of other classes than the data has"):
        MapFolder(tmp_path, split)
    (tmp_path / "token_labels.json").write_text("{")
    with pytest.raises(DataError, match=r"token_labels.json' cannot be read"):
        MapFolder(tmp_path, split)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "poolformer_s12", "args": {"depths": [1, 1], "dims": [8, 16]}}}, "has no forward_tokens"),
        ({"model": {"args": {"token_label": False}}}, r"data.token_labels: Only a model with token_label=True"),
        ({"augment": {"mixup": 0.8}}, r"does not go with augment.mixup and augment.cutmix"),
        ({"augment": {"cutmix": 1.0}}, r"does not go with augment.mixup and augment.cutmix"),
        ({"augment": {"mix_token": -1.0}}, r"augment.mix_token must not be negative"),
        ({"augment": {"train_crop_mode": "src"}}, r"goes with augment.train_crop_mode rrc"),
        ({"distill": {"teacher": "poolformer_s12"}}, r"do not go with distill.teacher"),
        ({"data": {"name": "webdataset"}}, r"is for data.name folder, not webdataset"),
        ({"data": {"name": "parquet"}}, r"is for data.name folder, not parquet"),
        ({"data": {"token_labels": "null"}}, r"augment.mix_token .* data.token_labels"),
        ({"loss": {"token_weight": -0.5}}, r"loss.token_weight must not be negative"),
    ],
    ids=str,
)
def test_what_does_not_go_together(home: Path, tmp_path: Path, changes: dict[str, Any], message: str):
    recipe = home / "student.yaml"
    if "name" in changes.get("model", {}):
        recipe = tmp_path / "other.yaml"
        recipe.write_text("data:" + (home / "student.yaml").read_text().partition("\ndata:")[2])
    with pytest.raises(ConfigError, match=message):
        train(configure(recipe, tmp_path / "run", **changes))
