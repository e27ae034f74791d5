"""Weights whose authors allow no passing on, or none for every use: known for theirs by whatever way they came here."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from tests import golden
from zoo.data import DataConfig
from zoo.errors import ConfigError
from zoo.publishing import prepare
from zoo.training import TrainingConfig, train
from zoo.training.config import ModelConfig, OutputConfig, SchedulerConfig, TrainConfig
from zoo.weights import convert_checkpoint

# model, golden file, and what stops the publication under another licence
THEIRS = [
    ("emo_1m", "emo/emo_1m", r"come from emo_1m\.zhangzjn_in1k, whose authors state no licence"),
    ("rmt_t", "rmt/rmt_t@1121layers", r"come from rmt_t\.in1k, whose authors state no licence"),
    ("resnet50_max", "pfnet/resnet50_max", "whose authors state no licence"),
    ("eupe_vitt16", "eupe/eupe_vitt16", r"licence is fair-noncommercial-research-license: .* given out as mit"),
]


def theirs(file: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A file as its authors publish it, and the arguments of its model."""
    reference = golden.load(*file.split("/"))
    path = folder / "theirs.pth"
    torch.save(golden.state_dict(reference), path)
    return path, reference.get("overrides", {})


def by_checkpoint_path(name: str, path: Path, args: dict[str, Any]) -> Any:
    return zoo.create_model(name, checkpoint_path=path, **args)


def by_load_checkpoint(name: str, path: Path, args: dict[str, Any]) -> Any:
    model = zoo.create_model(name, pretrained=False, **args)
    zoo.load_checkpoint(model, path)
    return model


def saved(name: str, path: Path, args: dict[str, Any]) -> Any:
    return zoo.save_pretrained(by_checkpoint_path(name, path, args), path.parent / "saved")


def saved_and_loaded_by_path(name: str, path: Path, args: dict[str, Any]) -> Any:
    return zoo.create_model(name, checkpoint_path=saved(name, path, args), **args)


def saved_and_moved(name: str, path: Path, args: dict[str, Any]) -> Any:
    moved = shutil.copy(saved(name, path, args) / "model.safetensors", path.parent / "moved.safetensors")
    return zoo.create_model(name, checkpoint_path=moved, **args)


def converted(name: str, path: Path, args: dict[str, Any]) -> Any:
    if args:  # which `zoo convert` has no way to be told
        zoo.save_pretrained(zoo.create_model(name, pretrained=False, **args), path.parent / "described")
        path = Path(shutil.move(path, path.parent / "described"))
    out = path.parent / "converted.safetensors"
    convert_checkpoint(path, out, None if args else name)
    return zoo.create_model(name, checkpoint_path=out, **args)


@pytest.mark.parametrize(
    "route",
    [by_checkpoint_path, by_load_checkpoint, saved, saved_and_loaded_by_path, saved_and_moved, converted],
)
@pytest.mark.parametrize(("name", "file", "message"), THEIRS)
def test_the_authors_weights_are_asked_for(
    name: str, file: str, message: str, route: Callable[..., Any], tmp_path: Path
):
    source = route(name, *theirs(file, tmp_path))
    with pytest.raises(ConfigError, match=message):
        prepare(source, tmp_path / "draft", license="mit")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("rmt_t", "emo_1m") else ()) for name, *_ in THEIRS]
)
def test_weights_of_ones_own_are_not_asked_for(name: str, tmp_path: Path):
    model = zoo.create_model(name, pretrained=False)
    folder = zoo.save_pretrained(model, tmp_path / "own")
    moved = shutil.copy(folder / "model.safetensors", tmp_path / "moved.safetensors")
    assert prepare(zoo.create_model(name, checkpoint_path=moved), tmp_path / "draft", license="mit").files


def test_nor_by_any_other_way(tmp_path: Path):
    name = "rmt_t"
    args: dict[str, Any] = {"depths": (1, 1, 2, 1)}
    model = zoo.create_model(name, pretrained=False, **args)
    folder = zoo.save_pretrained(model, tmp_path / "own")
    again = zoo.create_model(name, pretrained=False, **args)
    zoo.load_checkpoint(again, folder)
    sources: list[Any] = [model, folder, again, zoo.create_model(f"local-dir:{folder}")]
    sources.append(zoo.create_model(name, checkpoint_path=folder, **args))
    for number, source in enumerate(sources):
        assert prepare(source, tmp_path / f"draft{number}", license="mit").files


def test_a_bare_file_of_unknown_origin_is_asked_for_where_it_may_be_theirs(tmp_path: Path):
    model = zoo.create_model("emo_1m", pretrained=False)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    loaded = zoo.create_model("emo_1m", checkpoint_path=tmp_path / "bare.pth")
    sources: list[tuple[Any, dict[str, Any]]] = [(loaded, {}), (tmp_path / "bare.pth", {"model": "emo_1m"})]
    for source, options in sources:
        with pytest.raises(ConfigError, match=r"Nothing says whose weights these are, and those of emo_1m"):
            prepare(source, tmp_path / "draft", license="mit", **options)
    card = prepare(loaded, tmp_path / "draft", license="mit", has_rights=True).card
    assert "zhangzjn" not in card.split("## Licence")[0]
    # where published weights are free, nothing is asked
    torch.save(zoo.create_model("poolformer_s12", pretrained=False).state_dict(), tmp_path / "free.pth")
    assert prepare(tmp_path / "free.pth", tmp_path / "free", model="poolformer_s12", license="mit").files


def test_ones_own_weights_take_the_place_of_published_ones(tmp_path: Path):
    path, _ = theirs("emo/emo_1m", tmp_path)
    model = by_checkpoint_path("emo_1m", path, {})
    own = zoo.save_pretrained(zoo.create_model("emo_1m", pretrained=False), tmp_path / "own")
    zoo.load_checkpoint(model, own)
    assert prepare(model, tmp_path / "draft", license="mit").files


def test_a_segmentation_model_knows_whose_backbone_it_has(tmp_path: Path):
    path, _ = theirs("emo/emo_1m", tmp_path)
    model = zoo.create_model("emo_1m", task="segmentation", checkpoint_path=path, num_classes=3)
    with pytest.raises(ConfigError, match="whose authors state no licence"):
        prepare(model, tmp_path / "draft", license="mit")


def small_run(folder: Path, **model: Any) -> Path:
    config = TrainingConfig(
        model=ModelConfig(name="emo_1m", **model),
        data=DataConfig(name="digits", batch_size=16, workers=0, input_size=(3, 32, 32)),
        scheduler=SchedulerConfig(epochs=1, warmup_epochs=0),
        train=TrainConfig(device="cpu", max_updates=2),
        output=OutputConfig(dir=str(folder), tracker=None),
    )
    train(config)
    return folder


def test_a_run_that_began_with_the_authors_weights_is_asked_for(tmp_path: Path):
    path, _ = theirs("emo/emo_1m", tmp_path)
    run = small_run(tmp_path / "tuned", checkpoint_path=str(path))
    path.unlink()
    copied = Path(shutil.copytree(run / "last", tmp_path / "copied"))
    for source in (run, copied):
        with pytest.raises(ConfigError, match=r"come from emo_1m\.zhangzjn_in1k, whose authors state no licence"):
            prepare(source, tmp_path / "draft", license="mit")
    draft = prepare(run, tmp_path / "draft", license="mit", has_rights=True)
    assert "fine-tuned from `emo_1m.zhangzjn_in1k`" in draft.card
    served: nn.Module = zoo.create_model(f"local-dir:{draft.folder}")  # whoever has leave passes it on under a licence
    assert "emo_1m.zhangzjn_in1k" in prepare(served, tmp_path / "again").card


@pytest.mark.parametrize("license", ["mit", None])
def test_what_a_dry_run_left_is_asked_for_as_its_run_is(tmp_path: Path, license: str | None):
    """However its rights were sworn to when it was made: nobody is bound by another's word."""
    path, _ = theirs("emo/emo_1m", tmp_path)
    run = small_run(tmp_path / "tuned", checkpoint_path=str(path))
    draft = prepare(run, tmp_path / "draft", license=license, has_rights=True)
    for given in (None, "mit"):
        with pytest.raises(ConfigError, match=r"come from emo_1m\.zhangzjn_in1k, whose authors state no licence"):
            prepare(draft.folder, tmp_path / "again", license=given)
    assert prepare(draft.folder, tmp_path / "again", has_rights=True).card == draft.card


def test_the_licence_of_what_may_be_theirs_is_not_claimed_for_ones_own(tmp_path: Path):
    torch.save(zoo.create_model("emo_1m", pretrained=False).state_dict(), tmp_path / "bare.pth")
    draft = prepare(tmp_path / "bare.pth", tmp_path / "draft", model="emo_1m", has_rights=True)
    assert "No licence is stated" in " ".join(draft.remarks)
    with pytest.raises(ConfigError, match="Nothing says whose weights these are"):
        prepare(draft.folder, tmp_path / "again")
    assert prepare(draft.folder, tmp_path / "again", has_rights=True).card == draft.card


def test_a_run_from_nothing_is_not_asked_for(tmp_path: Path):
    run = small_run(tmp_path / "own")
    assert prepare(run, tmp_path / "draft", license="mit").files
    again = zoo.create_model("emo_1m", checkpoint_path=run / "last", num_classes=10)
    assert prepare(again, tmp_path / "again", license="mit").files


def test_a_licence_that_asks_for_a_copy_gets_it(tmp_path: Path):
    path, _ = theirs("eupe/eupe_vitt16", tmp_path)
    model = by_checkpoint_path("eupe_vitt16", path, {})
    with pytest.raises(ConfigError, match=r"asks that a copy of it goes along .* --license-file FILE\. It lies beside"):
        prepare(model, tmp_path / "draft")
    for text, message in ((None, "cannot be read"), ("\n", "is empty")):
        if text is not None:
            (tmp_path / "AGREEMENT").write_text(text)
        with pytest.raises(ConfigError, match=message):
            prepare(model, tmp_path / "draft", license_file=tmp_path / "AGREEMENT")
    (tmp_path / "AGREEMENT").write_text("You may.")
    draft = prepare(model, tmp_path / "draft", license_file=tmp_path / "AGREEMENT")
    assert (draft.folder / "LICENSE").read_text() == "You may."
    assert "LICENSE" in draft.files
    again = prepare(draft.folder, tmp_path / "again")  # where it lies already
    assert (again.folder / "LICENSE").read_text() == "You may."
    assert again.card == draft.card


def test_what_a_file_says_of_its_origin_leaves_its_bytes_the_same(tmp_path: Path):
    model = zoo.create_model("rmt_t", pretrained=False, depths=(1, 1, 1, 1))
    folders = [zoo.save_pretrained(model, tmp_path / str(number)) for number in range(6)]
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1
