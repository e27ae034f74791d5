"""Publishing, to a Hub on loopback over real HTTP: whole or not at all, read back, with a card that claims nothing."""

from __future__ import annotations

import copy
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from huggingface_hub import ModelCard, constants
from torch import nn

import zoo
from tests.hub_stub import Hub, Reply, corrupt, drop, status
from tests.launcher import python
from tests.sparse_runs import make_sparse
from zoo import cli
from zoo.data import DataConfig
from zoo.devices import device_name
from zoo.errors import CheckpointError, ConfigError, DownloadError, PublishError
from zoo.evaluation import evaluate
from zoo.model_card import without_paths
from zoo.models.metaformer import MetaFormer
from zoo.publishing import Draft, model_card, prepare, publish
from zoo.training import TrainingConfig, train
from zoo.training.config import ModelConfig, OutputConfig, SchedulerConfig, TrainConfig
from zoo.units import humanize

ROOT = Path(__file__).resolve().parents[1]
SMALL: dict[str, Any] = {"depths": (1, 1), "dims": (8, 16), "stem_kernel_size": 3, "stem_stride": 2}
TINY: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
DIGITS = DataConfig(name="digits", batch_size=128, workers=0, input_size=(1, 16, 16), mean=(0.3,), std=(0.38,))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an evaluation, as `train.py` and `eval.py --output RUN/evaluation` leave them."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    config = TrainingConfig(
        model=ModelConfig(args={**SMALL, "layer_scale_init": 0.1}),
        data=DIGITS,
        scheduler=SchedulerConfig(epochs=2, warmup_epochs=0.5),
        train=TrainConfig(device="cpu"),
        output=OutputConfig(dir=str(folder), tracker=None),
    )
    train(config)
    model = zoo.create_model(f"local-dir:{folder / 'best'}")
    evaluate(model, DIGITS, name=str(folder)).save(folder / "evaluation")
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "digits"))


@pytest.fixture
def model() -> nn.Module:
    """A small model whose every tensor is random."""
    torch.manual_seed(0)
    model = zoo.create_model("poolformer_s12", num_classes=3, pretrained=False, **SMALL)
    for tensor in model.state_dict().values():
        tensor.normal_(std=0.1)
    return model


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were to be slept, and are not."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def files_of(hub: Hub, name: str, ref: str = "main") -> dict[str, bytes]:
    return hub.repos[name].commits[hub.repos[name].refs[ref]]


def card_of(hub: Hub, name: str) -> Any:
    return ModelCard(files_of(hub, name)["README.md"].decode(), ignore_metadata_errors=False)


def metadata(card: str) -> Any:
    return ModelCard(card, ignore_metadata_errors=False).data


def logits(model: nn.Module) -> torch.Tensor:
    images = torch.randn(2, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(1))  # type: ignore
    with torch.inference_mode():
        return model.eval()(images)


def command(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# ------------------------------------------------------------------------------------------------------ what goes where


def test_a_run_is_published_in_one_commit_and_opens(hub: Hub, run: Path, tmp_path: Path):
    found = publish(run, "me/digits", license="apache-2.0", note="Trained on a toaster.")
    repo = hub.repos["me/digits"]
    assert repo.messages == ["", "Publish poolformer_s12"]  # the Hub's own first commit, and ours
    files = files_of(hub, "me/digits")
    assert set(found.files) == set(files) - {".gitattributes"}
    assert set(found.files) == {
        *("README.md", "config.json", "model.safetensors"),
        *("training_config.yaml", "environment.json", "history.csv", "curves.png", "results.json"),
    }
    assert "command" in (run / "environment.json").read_text()
    assert b"command" not in files["environment.json"]
    assert found.commit == repo.refs["main"]
    assert found.url == f"{hub.url}/me/digits"
    assert files["model.safetensors"] == (run / "best" / "model.safetensors").read_bytes()
    assert files["history.csv"] == (run / "history.csv").read_bytes()
    served = zoo.create_model("hf-hub:me/digits", cache_dir=tmp_path / "cache")
    ours = zoo.create_model(f"local-dir:{run / 'best'}")
    assert torch.equal(logits(served), logits(ours))
    assert list(served.pretrained_cfg["label_names"]) == list(map(str, range(10)))  # type: ignore[index]
    assert served.pretrained_cfg["license"] == "apache-2.0"  # type: ignore[index]


def test_the_card_holds_what_was_measured_and_nothing_else(hub: Hub, run: Path):
    publish(run, "me/digits", license="apache-2.0", note="Trained on a toaster.")
    card = card_of(hub, "me/digits")
    results = json.loads((run / "evaluation" / "results.json").read_text())
    data = card.data
    assert data.library_name == "backbone-zoo"  # timm does not build these depths
    assert data.license == "apache-2.0"
    assert data.pipeline_tag == "image-classification"
    assert {"zoo", "metaformer"} <= set(data.tags)
    assert "timm" not in data.tags
    assert data.base_model is None
    measured = {result.metric_name: result for result in data.eval_results}
    assert measured["Top-1 accuracy, %"].metric_value == round(results["top1"], 4)
    assert measured["Top-1 accuracy, %"].dataset_name == "scikit-learn digits"
    assert measured["Top-1 accuracy, %"].dataset_split == "test"
    assert measured["Top-1 accuracy, %"].source_url.endswith("/me/digits/blob/main/results.json")
    profile = zoo.profile(zoo.create_model(f"local-dir:{run / 'best'}"))
    for text in (
        f"| parameters | {profile.params:,} |",
        "multiply-accumulates",
        'zoo.create_model("hf-hub:me/digits")',
        "zoo.register_with_timm(override=True)",
        "| `scheduler.epochs` | `2` |",
        "![Loss and accuracy by epoch](curves.png)",
        "python eval.py --model hf-hub:me/digits --data.name digits",
        "Trained on a toaster.",
        f"Trained on {device_name(torch.device('cpu'))} with backbone-zoo {zoo.__version__}, torch {torch.__version__}",
        "they flatter it a little",
        "eprint = {2111.11418}",
        "- These weights: apache-2.0.",
    ):
        assert text in card.text
    assert "`optimizer.opt`" not in card.text  # the default


def test_without_an_evaluation_the_run_speaks_for_itself_and_a_checkpoint_says_that_nothing_was_measured(
    run: Path, tmp_path: Path
):
    shutil.rmtree(run / "evaluation")
    rows = [line.split(",") for line in (run / "history.csv").read_text().splitlines()]
    best = max(float(row[rows[0].index("val_top1")]) for row in rows[1:])
    (top1,) = [r for r in metadata(model_card(run)).eval_results if r.metric_name == "Top-1 accuracy, %"]
    assert top1.metric_value == round(best, 4)
    assert top1.source_url is None  # nobody said where it will be
    # a run that was stopped in the middle of an epoch: its last row is of other weights than its last checkpoint
    state = torch.load(run / "last" / "state.pt", weights_only=True)
    assert metadata(model_card(run / "last")).eval_results
    torch.save({**state, "progress": {**state["progress"], "batch": 3}}, run / "last" / "state.pt")
    card = model_card(run / "last")
    assert metadata(card).eval_results is None
    assert "These weights come without measured results." in card
    bare = shutil.copytree(run / "best", tmp_path / "bare")
    card = model_card(bare)
    assert "These weights come without measured results." in card
    assert "## Training" not in card


def test_a_sparse_run_says_so_and_brings_its_masks(run: Path, tmp_path: Path):
    dense = prepare(run, tmp_path / "dense")
    assert "sparse" not in metadata(dense.card).tags
    assert "effective" not in dense.card
    found = make_sparse(run)

    draft = prepare(run, tmp_path / "sparse")
    assert "sparse" in metadata(draft.card).tags
    assert f"| density | {found.density:.2%} of " in draft.card
    assert f"| effective parameters | {found.effective_params:,} |" in draft.card
    assert f"| parameters | {found.params:,} |" in draft.card
    assert "](masks.png)" in draft.card
    for name, place in (("sparsity.json", run), ("masks.png", run), ("masks.safetensors", run / "best")):
        assert (draft.folder / name).read_bytes() == (place / name).read_bytes()
    again = prepare(draft.folder, tmp_path / "again")  # as anyone's checkpoint
    assert {"sparsity.json", "masks.png", "masks.safetensors"} <= again.files.keys()

    zoo.sparsity.save_masks({name: ~mask for name, mask in found.masks.items()}, run / "last" / "masks.safetensors")
    other = prepare(run, tmp_path / "other")  # what is reported is of the last masks, and not of the best
    assert "masks.safetensors" in other.files
    assert not {"sparsity.json", "masks.png"} & other.files.keys()
    assert any("of other masks than this checkpoint's" in remark for remark in other.remarks)
    assert "](masks.png)" not in other.card


def test_nothing_private_is_published(run: Path, tmp_path: Path):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= {"name": "folder", "path": "/home/jane doe/data/pets"}
    config["output"] |= {"note": "see /home/jane/notes.txt"}
    config["model"] |= {"checkpoint_path": "~/first/best"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    results = json.loads((run / "evaluation" / "results.json").read_text())
    results |= {"model": "/home/jane/runs/digits", "data": "/home/jane doe/data/pets", "skipped": ["/home/jane/a.jpg"]}
    (run / "evaluation" / "results.json").write_text(json.dumps(results))
    draft = prepare(run, tmp_path / "draft")
    assert {"training_config.yaml", "results.json"} <= set(draft.files)
    for name in draft.files:
        content = (draft.folder / name).read_bytes()
        for secret in (b"jane", str(tmp_path).encode(), b"/home"):
            assert secret not in content, name
    published = yaml.safe_load((draft.folder / "training_config.yaml").read_text())
    assert published["data"]["path"] == "pets"
    assert "fine-tuned from `best`" in draft.card


@pytest.mark.parametrize(
    ("value", "clean"),
    [
        ("/data/imagenet", "imagenet"),
        ("/home/Jane Doe/pets/", "pets"),
        ("~jane/pets", "pets"),
        ("../data/cifar10", "cifar10"),
        ("C:\\Users\\jane\\pets", "pets"),
        ("local-dir:/home/jane/run/best", "local-dir:best"),
        ("see /home/jane/notes.txt, and more", "see notes.txt, and more"),
        ("/data/train-{0000..1023}.tar", "train-{0000..1023}.tar"),
        ("https://jane:secret@host/data/a.tar", "https://host/data/a.tar"),
        ("https://host/a.tar?signature=secret", "https://host/a.tar"),
        ("hf-hub:owner/name@v1", "hf-hub:owner/name@v1"),
        ("timm/resnet18.a1_in1k", "timm/resnet18.a1_in1k"),
        ("owner/data", "owner/data"),
        ("top-1/top-5", "top-1/top-5"),
        ("rand-m9-mstd0.5", "rand-m9-mstd0.5"),
        ([1, {"path": "/a/b"}], [1, {"path": "b"}]),
        (None, None),
    ],
)
def test_local_paths_are_cut_to_their_last_part(value: Any, clean: Any):
    assert without_paths(value) == clean


def test_the_card_states_how_it_was_measured(run: Path):
    """By which labels, of which split, at which size, with which command: and how to do that again."""
    path = run / "evaluation" / "results.json"
    results = json.loads(path.read_text())
    card = model_card(run)
    assert f"with `eval.py`, backbone-zoo {zoo.__version__}, torch {torch.__version__}, timm " in card
    assert "The command was" not in card  # for it was none
    preprocess = {**results["preprocessing"], "input_size": [1, 24, 24]}
    command = "python eval.py --model '/home/jane doe/digits' --data.val_split=train --output /home/jane/out"
    how = {"label_map": "/home/jane/my map.json", "split": "train", "amp": "bf16", "command": command}
    path.write_text(json.dumps({**results, **how, "preprocessing": preprocess}))
    card = model_card(run, repo_id="me/digits")
    assert "\npython eval.py --model digits --data.val_split=train --output out\n" in card
    assert (
        "\npython eval.py --model hf-hub:me/digits --data.name digits --data.val_split train --label_map 'my map.json' "
        "--data.input_size '[1, 24, 24]' --amp bf16\n" in card
    )
    for measured in metadata(card).eval_results:
        assert measured.dataset_name == "scikit-learn digits, label map my map.json"
        assert measured.dataset_split == "train"
    assert "flatter it" not in card  # another split than the one that chose the epoch
    assert "jane" not in card
    path.write_text(json.dumps({**results, "label_map": "a", "per_class": {"n01498041": 1.0}}))
    assert "label map a" in model_card(run)  # a part of the classes


def test_halved_weights_bear_no_figures_of_others(run: Path, tmp_path: Path):
    card = model_card(run, half=True)
    assert metadata(card).eval_results is None
    assert "before they were halved" in card
    draft = prepare(run, tmp_path / "half", half=True)
    assert "halving changed the weights" in " ".join(draft.remarks)
    card = model_card(draft.folder, half=True, results=run / "evaluation")  # halving again changes nothing
    assert metadata(card).eval_results
    assert "before they were halved" not in card


def contents(draft: Draft) -> dict[str, bytes]:
    return {name: (draft.folder / name).read_bytes() for name in draft.files}


@pytest.mark.parametrize("checkpoint", ["", "last", "stopped"])
@pytest.mark.parametrize("kind", ["plain", "half", "sparse", "tuned", "own base"])
def test_what_a_dry_run_leaves_is_what_a_publish_of_it_sends(run: Path, tmp_path: Path, kind: str, checkpoint: str):
    options: dict[str, Any] = {"license": "cc-by-4.0", "note": "Of a toaster.", "dataset": "me/digits"}
    config = yaml.safe_load((run / "config.yaml").read_text())
    if kind == "tuned":
        config["model"]["pretrained"] = True
    if kind == "own base":
        config["model"]["checkpoint_path"] = "/home/jane/first/best"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    if kind == "sparse":
        make_sparse(run)
        os.utime(run / "evaluation" / "results.json")
    if checkpoint == "stopped":  # in the middle of an epoch: nothing was measured of its last checkpoint
        state = torch.load(run / "last" / "state.pt", weights_only=True)
        torch.save({**state, "progress": {**state["progress"], "batch": 3}}, run / "last" / "state.pt")
    (tmp_path / "TERMS").write_text("You may.")
    source = run / "last" if checkpoint else run
    draft = prepare(source, tmp_path / "draft", half=kind == "half", license_file=tmp_path / "TERMS", **options)
    assert ("results.json" in draft.files) == (checkpoint == "")
    assert {"history.csv", "curves.png", "environment.json", "training_config.yaml", "LICENSE"} <= draft.files.keys()
    moved = Path(shutil.copytree(draft.folder, tmp_path / "moved", copy_function=shutil.copy))
    os.utime(moved / "config.json")  # in whatever order they came there
    again = prepare(moved, tmp_path / "again")
    assert contents(again) == contents(draft)
    assert again.remarks == draft.remarks


def test_what_was_edited_in_a_draft_by_hand(run: Path, tmp_path: Path):
    folder = prepare(run, tmp_path / "draft", license="mit").folder
    config = json.loads((folder / "config.json").read_text())
    base = {"name": 5, "hub_id": None, "url": 5, "license": None, "trained": 1}
    config["zoo"]["card"] |= {"dataset": ["a"], "base": base}
    (folder / "config.json").write_text(json.dumps(config))
    results = json.loads((folder / "results.json").read_text())
    edited = results | {"command": "python eval.py --model /home/jane/it's", "preprocessing": [1]}
    (folder / "results.json").write_text(json.dumps(edited))
    card = model_card(folder)
    assert "eval.py --model it's" in card
    assert "jane" not in card
    (folder / "history.csv").write_text("epoch,val_top1\n1,2,3\n")
    with pytest.raises(ConfigError, match=r"history\.csv is not the history of a run"):
        prepare(folder, tmp_path / "again")
    # the classifier of other classes would be random
    config["num_classes"] = config["zoo"]["model_args"]["num_classes"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"for the 7 classes of .*, which would be random"):
        prepare(folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_the_command_publishes_what_a_dry_run_left(
    hub: Hub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = str(tmp_path / "draft")
    assert command("publish", str(run), "me/digits", "--license", "mit", "--dry-run", folder, capsys=capsys)[0] == 0
    code, _, error = command("publish", folder, "me/digits", capsys=capsys)
    assert (code, "No licence" in error) == (0, False)
    left = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    assert {name: body for name, body in files_of(hub, "me/digits").items() if name != ".gitattributes"} == left
    assert metadata(left["README.md"].decode()).eval_results


def test_other_weights_have_no_record_of_the_run_whose_files_lie_there(run: Path, model: nn.Module, tmp_path: Path):
    folder = prepare(run, tmp_path / "draft", license="mit").folder
    zoo.save_pretrained(model, folder, overwrite=True)
    os.utime(folder / "results.json", (0, 0))
    draft = prepare(folder, tmp_path / "again")
    assert set(draft.files) == {"README.md", "config.json", "model.safetensors"}
    assert "## Training" not in draft.card
    assert metadata(draft.card).license is None


def test_ones_own_weights_keep_the_licence_that_is_stated(model: nn.Module, tmp_path: Path):
    folder = zoo.save_pretrained(model, tmp_path / "saved")
    assert metadata(model_card(folder)).license is None  # though published weights of the architecture have one
    assert metadata(model_card(model)).license is None
    config = json.loads((folder / "config.json").read_text())
    for stated, kept in (("cc-by-4.0", "cc-by-4.0"), ("Apache 2", None)):
        config["pretrained_cfg"]["license"] = stated
        (folder / "config.json").write_text(json.dumps(config))
        for source in (folder, zoo.create_model(f"local-dir:{folder}")):
            assert metadata(model_card(source)).license == kept
            assert metadata(model_card(source, license="mit")).license == "mit"


def test_a_halved_model_that_is_published_later_stays_halved(run: Path, tmp_path: Path):
    half = prepare(run, tmp_path / "half", half=True, license="mit")
    for said in (False, True):
        draft = prepare(half.folder, tmp_path / f"again {said}", half=said)
        assert contents(draft) == contents(half)
        assert "float16, halved after training" in draft.card
        assert "before they were halved, and not of these" in draft.card
        assert any("halving changed the weights" in remark for remark in draft.remarks)
    # as the remark advises; the data lies where it lay
    evaluate(zoo.create_model(f"local-dir:{half.folder}"), DIGITS, name=str(half.folder)).save(tmp_path / "measured")
    measured = prepare(half.folder, tmp_path / "measured half", half=True, results=tmp_path / "measured")
    assert metadata(measured.card).eval_results[0].dataset_name == "scikit-learn digits"
    assert "before they were halved" not in measured.card
    assert "## Training" in measured.card
    assert not measured.remarks
    assert contents(prepare(measured.folder, tmp_path / "and again")) == contents(measured)
    # or in place
    shutil.copy(tmp_path / "measured" / "results.json", half.folder)
    assert contents(prepare(half.folder, tmp_path / "in place")) == contents(measured)


def test_results_of_a_draft_are_of_the_data_that_the_run_was_trained_on(run: Path, tmp_path: Path):
    """Which is published without its path, and so compared without."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= {"name": "folder", "path": "/home/jane doe/pets", "val_split": "val"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    path = run / "evaluation" / "results.json"
    how = {"data": "/home/jane doe/pets", "command": "python eval.py --model run --data.path '/home/jane doe/pets'"}
    path.write_text(json.dumps(json.loads(path.read_text()) | how | {"split": "val"}))
    draft = prepare(run, tmp_path / "draft")
    assert "they flatter it a little" in draft.card
    assert contents(prepare(draft.folder, tmp_path / "again")) == contents(draft)
    assert prepare(draft.folder, tmp_path / "given", results=path).card == draft.card
    assert b"jane" not in b"".join(contents(draft).values())


def test_no_figures_are_missed_where_there_are_none(model: nn.Module, tmp_path: Path):
    assert prepare(model, tmp_path / "half", half=True, license="mit").remarks == ()


def test_a_licences_text_goes_with_a_licence(model: nn.Module, tmp_path: Path):
    (tmp_path / "TERMS").write_text("You may.")
    with pytest.raises(ConfigError, match=r"--license-file.* none is known .* with --license, as other"):
        prepare(model, tmp_path / "draft", license_file=tmp_path / "TERMS")
    assert not (tmp_path / "draft").exists()
    assert "LICENSE" in prepare(model, tmp_path / "draft", license_file=tmp_path / "TERMS", license="other").files


def test_the_card_of_a_stitched_network_says_which_one_its_costs_are_of():
    for chosen in (0, 3):
        model = zoo.create_model("snnet_test", num_classes=3, stitch=chosen)
        costs = zoo.profiling.stitch_costs(model)
        card = model_card(model, license="mit")
        all_macs = [cost.macs for cost in costs]
        assert f"| {len(costs)}, of {humanize(min(all_macs))} to {humanize(max(all_macs))} MACs" in card
        assert f"network {chosen} that computes: {costs[chosen].path} |" in card
        assert f"| MACs | {humanize(costs[chosen].macs)} for one input of 3x64x64, of network {chosen} |" in card
        assert f"| parameters | {zoo.profile(model).params:,} of all networks together |" in card
    alone: Any = model
    card = model_card(alone.extract(3), license="mit")
    assert "| networks |" not in card
    assert "of network" not in card


def test_weights_in_half_precision(hub: Hub, model: nn.Module, tmp_path: Path):
    whole = publish(model, "me/whole", license="mit").files["model.safetensors"]
    half = publish(model, "me/half", license="mit", half=True).files["model.safetensors"]
    assert half < 0.6 * whole
    tensors = safetensors.torch.load(files_of(hub, "me/half")["model.safetensors"])
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert "float16, halved after training" in card_of(hub, "me/half").text
    served = zoo.create_model("hf-hub:me/half", cache_dir=tmp_path)
    assert next(served.parameters()).dtype == torch.float32
    torch.testing.assert_close(logits(served), logits(model), rtol=2e-2, atol=2e-2)
    with torch.no_grad():
        next(model.parameters()).fill_(1e6)
    with pytest.raises(ConfigError, match="float16 does not hold these weights; leave out --half"):
        publish(model, "me/half", half=True)


def test_an_option_that_there_is_not(model: nn.Module):
    with pytest.raises(TypeError, match=r"^publish\(\) got .* 'licence'\. Did you mean license"):
        publish(model, "me/model", licence="mit")
    with pytest.raises(TypeError, match=r"^publish\(\) got .* 'folder'"):
        publish(model, "me/model", folder="draft")


def test_a_broken_model_is_not_published(hub: Hub, model: nn.Module):
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ConfigError, match="not finite"):
        publish(model, "me/broken")
    assert hub.requests == []


def test_what_is_there_stays_or_is_said_to_be_replaced(hub: Hub, model: nn.Module):
    hub.repo("me/net", {"README.md": b"old", "LICENSE": b"mine", "config.json": b"{}"})
    before = hub.repos["me/net"].refs["main"]
    found = publish(model, "me/net", license="mit", commit_message="Anew")
    assert found.replaced == ("README.md", "config.json")
    assert publish(model, "me/net", license="cc-by-4.0").replaced == ("README.md", "config.json")  # not the weights
    assert found.kept == ("LICENSE",)
    assert files_of(hub, "me/net")["LICENSE"] == b"mine"
    assert hub.repos["me/net"].commits[before]["README.md"] == b"old"
    assert hub.repos["me/net"].messages[-2:] == ["Anew", "Publish poolformer_s12"]


def test_publishing_the_same_again_makes_no_commit_and_checks_again(hub: Hub, run: Path):
    first = publish(run, "me/digits", license="mit")
    hub.requests.clear()
    again = publish(run, "me/digits", license="mit")
    assert (first.changed, again.changed) == (True, False)
    assert again.commit == first.commit
    assert len(hub.repos["me/digits"].commits) == 2
    asked = [path for method, path, *_ in hub.requests if method == "GET"]
    assert f"/me/digits/resolve/{first.commit}/model.safetensors" in asked


def test_a_pull_request(hub: Hub, model: nn.Module, monkeypatch: pytest.MonkeyPatch):
    hub.repo("them/net", {"README.md": b"old"})
    monkeypatch.setenv("HF_TOKEN", Hub.READER)  # who may not write may propose
    found = publish(model, "them/net", license="mit", create_pr=True)
    assert found.url == found.pull_request == f"{hub.url}/them/net/discussions/1"
    assert files_of(hub, "them/net") == {"README.md": b"old"}
    assert "model.safetensors" in files_of(hub, "them/net", "refs/pr/1")


def test_private_and_gated_repositories(hub: Hub, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    publish(model, "me/secret", license="mit", private=True)
    assert hub.repos["me/secret"].private
    hub.repo("me/gated", {}, gated=True)
    publish(model, "me/gated", license="mit")
    for name in ("me/secret", "me/gated"):
        served = zoo.create_model(f"hf-hub:{name}", cache_dir=tmp_path / "member", token=Hub.TOKEN)
        assert torch.equal(logits(served), logits(model))
        with pytest.raises(DownloadError, match=r"private|gated"):
            zoo.create_model(f"hf-hub:{name}", cache_dir=tmp_path / "other", token=Hub.OUTSIDER)
    hub.repo("me/public", {"README.md": b"old"})
    with pytest.raises(PublishError, match=r"exists and is public, and --private was asked for. Nothing was published"):
        publish(model, "me/public", private=True)
    assert files_of(hub, "me/public") == {"README.md": b"old"}
    monkeypatch.setenv("HF_TOKEN", Hub.OUTSIDER)
    with pytest.raises(PublishError, match=r"may not do that to me/secret .*Nothing was published\."):
        publish(model, "me/secret")


def test_a_server_without_large_files_works_with_xet_too(hub: Hub, model: nn.Module, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr("tests.hub_stub.SMALL", ("",))  # every name ends so: all files go into the commit itself
    assert publish(model, "me/net", license="mit").changed
    assert "model.safetensors" in files_of(hub, "me/net")


# -------------------------------------------------------------------------------------------------- rights and origins


def pretend(folder: Path, architecture: str, tag: str) -> Path:
    """A checkpoint that says it is the authors' weights."""
    zoo.save_pretrained(zoo.create_model(architecture, pretrained=False, num_classes=3, **TINY), folder)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"tag": tag}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_weights_without_a_licence_need_a_word(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = pretend(tmp_path / "identity", "identityformer_s12", "sail_in1k")
    code, _, error = command("publish", str(folder), "me/identity", capsys=capsys)
    assert code == 1
    assert "identityformer_s12.sail_in1k, whose authors state no licence" in error
    assert "--i-have-the-rights" in error
    assert hub.requests == []
    assert command("publish", str(folder), "me/identity", "--i-have-the-rights", capsys=capsys)[0] == 0
    data = card_of(hub, "me/identity").data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "unstated")


def test_noncommercial_weights_stay_so(model: nn.Module, tmp_path: Path):
    folder = zoo.save_pretrained(model, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"license": "cc-by-nc-4.0", "origin_url": "https://huggingface.co/them/theirs"}
    (folder / "config.json").write_text(json.dumps(config))
    for source in (folder, zoo.create_model(f"local-dir:{folder}")):
        assert metadata(model_card(source)).license == "cc-by-nc-4.0"
        with pytest.raises(ConfigError, match=r"them/theirs, whose licence is cc-by-nc-4.0: .* be given out as mit"):
            model_card(source, license="mit")
        assert metadata(model_card(source, license="mit", has_rights=True)).license == "mit"


def test_a_fine_tuned_model_names_its_base_and_keeps_its_licence(hub: Hub, run: Path, tmp_path: Path):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["pretrained"] = True
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    publish(run, "me/tuned")
    data = card_of(hub, "me/tuned").data.to_dict()
    assert data["base_model"] == "timm/poolformer_s12.sail_in1k"
    assert data["base_model_relation"] == "finetune"
    assert data["license"] == "apache-2.0"
    # what is trained further, and saved by hand, still knows where it came from, and does not say that it is that
    served = zoo.create_model("hf-hub:me/tuned", cache_dir=tmp_path)
    assert not served.pretrained_cfg.get("tag")  # type: ignore[union-attr, operator]
    folder = zoo.save_pretrained(served, tmp_path / "further")
    assert metadata(model_card(folder)).base_model == "timm/poolformer_s12.sail_in1k"
    # and so does a run that began with the repository
    config["model"] |= {"name": "hf-hub:me/tuned", "pretrained": None}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert metadata(model_card(run)).base_model == "me/tuned"


def test_a_model_trained_from_scratch_is_nobodys_fine_tune(run: Path, tmp_path: Path):
    model = zoo.create_model("identityformer_s12", pretrained=False, **TINY)
    data = metadata(model_card(model))  # whose published weights have no licence
    assert (data.base_model, data.license) == (None, None)
    folder = zoo.save_pretrained(model, tmp_path / "saved")
    assert "tag" not in json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    own = zoo.create_model("poolformer_s12", checkpoint_path=run / "best", num_classes=10, in_chans=1, **SMALL)
    assert not own.pretrained_cfg["tag"]  # type: ignore[index]
    assert "hf_hub_id" not in own.pretrained_cfg  # type: ignore[operator]


def test_a_bare_file_of_weights_is_published_as_wide_as_it_is(hub: Hub, tmp_path: Path):
    torch.manual_seed(0)
    model = zoo.create_model("poolformer_s12", pretrained=False, num_classes=5, in_chans=1)
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": model.state_dict()}, path)
    with pytest.raises(ConfigError, match="name the architecture with --model"):
        publish(path, "me/bare")
    publish(path, "me/bare", model="poolformer_s12", license="mit")
    served = zoo.create_model("hf-hub:me/bare", cache_dir=tmp_path / "cache")
    assert torch.equal(logits(served), logits_of(model, served))
    with pytest.raises(ConfigError, match="leave out --model"):
        publish(zoo.save_pretrained(model, tmp_path / "saved"), "me/bare", model="poolformer_s12")


def test_a_file_in_the_authors_layout_is_theirs(tmp_path: Path):
    from tests.test_weights import published

    model = zoo.create_model("identityformer_s12", pretrained=False)
    torch.save(published(model.state_dict()), tmp_path / "identityformer_s12.pth")
    with pytest.raises(ConfigError, match="whose authors state no licence"):
        model_card(tmp_path / "identityformer_s12.pth", model="identityformer_s12")


def test_a_checkpoint_in_several_files_opens_and_is_published_as_one(hub: Hub, model: nn.Module, tmp_path: Path):
    folder = zoo.save_pretrained(model, tmp_path / "saved")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {key: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, key in enumerate(tensors)}
    for name in set(names.values()):
        part = {key: tensor for key, tensor in tensors.items() if names[key] == name}
        safetensors.torch.save_file(part, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert torch.equal(logits(zoo.create_model(f"local-dir:{folder}")), logits(model))
    hub.repo("them/parts", {path.name: path.read_bytes() for path in folder.iterdir()})
    assert torch.equal(logits(zoo.create_model("hf-hub:them/parts", cache_dir=tmp_path / "cache")), logits(model))
    assert "model.safetensors" in publish(folder, "me/whole", license="mit").files
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names model-00002-of-00002.safetensors, which is not beside it"):
        model_card(folder)


# ------------------------------------------------------------------------------------------------------------- troubles


@pytest.mark.parametrize("name", ["digits", "a/b/c", "me/", "/x", "me/di gits", "me/-x", "me/x.git", ""])
def test_names_that_cannot_be(hub: Hub, run: Path, name: str):
    with pytest.raises(ConfigError, match="cannot name a repository: it should read OWNER/NAME"):
        publish(run, name)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", "You are not logged in"),
        ("hf_nonsense", r"does not accept your token \(HTTP 401\)"),
        (Hub.READER, r"may not do that to me/new \(HTTP 403\) \(You don't have the rights to create"),
    ],
)
def test_tokens_that_do_not_do(hub: Hub, model: nn.Module, monkeypatch: pytest.MonkeyPatch, token: str, message: str):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    with pytest.raises(PublishError, match=rf"{message}.*Nothing was published\.$"):
        publish(model, "me/new")
    assert hub.repos == {}


def test_sources_that_are_none(run: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"There is no run or checkpoint '.*/digit'. Did you mean digits\?"):
        model_card(tmp_path / "digit")
    with pytest.raises(ConfigError, match=r"Write local-dir:.*/digits\.$"):
        model_card(f"Local-Dir:{tmp_path}/digits")
    with pytest.raises(ConfigError, match="neither the folder of a run"):
        model_card(tmp_path)
    shutil.rmtree(run / "best")
    assert metadata(model_card(run)).eval_results  # of its last
    shutil.rmtree(run / "last")
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        model_card(run)
    with pytest.raises(ConfigError, match="has no pretrained_cfg"):
        model_card(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"reads like apache-2\.0"):
        model_card(run, license="Apache 2")


def test_results_of_something_else(run: Path, tmp_path: Path):
    path = run / "evaluation" / "results.json"
    results = json.loads(path.read_text())
    path.write_text(json.dumps({**results, "per_class": {"a": 1.0}}))
    with pytest.raises(ConfigError, match="is of a model with 1 classes, and this one has 10"):
        model_card(run)
    path.write_text(json.dumps({**results, "method": "knn"}))
    with pytest.raises(ConfigError, match="of the features by knn"):
        model_card(run)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="no top1"):
        model_card(run)
    path.write_text(json.dumps(results))
    assert "`results.json` holds every figure" in model_card(run)
    assert "`history.csv` holds every epoch" in model_card(run / "last")  # the evaluation is of the best
    os.utime(path, (0, 0))
    draft = prepare(run, tmp_path / "draft")  # and of one that was there before
    assert "results.json" not in draft.files
    assert "is older than the checkpoint" in draft.remarks[0]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "results.json").write_text(json.dumps({**results, "data": "/data/other_digits"}))
    card: Any = ModelCard(model_card(run, results=elsewhere))
    assert card.data.eval_results[0].dataset_name == "other_digits"
    assert "chosen by its accuracy on the evaluation split of the training data" in card.text


def test_the_hub_checks_the_card_before_anything_is_sent(hub: Hub, model: nn.Module):
    with pytest.raises(
        PublishError, match=r'refuses the card.s metadata: "license" must be one of .*Nothing was published'
    ):
        publish(model, "me/net", license="apache-9.0")
    assert hub.large == {}


@pytest.mark.parametrize("where", [r"^/lfs/", r"/commit/main$"])
def test_an_upload_that_breaks_leaves_nothing_and_can_be_repeated(
    hub: Hub, model: nn.Module, naps: list[float], where: str
):
    hub.fault("PUT|POST", where, drop, unheard=True)
    with pytest.raises(PublishError, match=r"broke .*Nothing was published; the repository me/net was made and is em"):
        publish(model, "me/net", license="mit")
    assert set(files_of(hub, "me/net")) == {".gitattributes"}
    hub.faults.clear()
    publish(model, "me/net", license="mit")
    assert len(hub.repos["me/net"].commits) == 2


@pytest.mark.parametrize(
    ("code", "message"),
    [
        *((code, rf"storage refuses a file \(HTTP {code}\): publish again") for code in (401, 403, 404, 409)),
        (429, r"asked too often \(HTTP 429\): publish again later\."),
        (500, r"has trouble \(HTTP 500\): publish again later\."),
    ],
)
def test_a_storage_that_refuses_is_told_as_such(hub: Hub, model: nn.Module, naps: list[float], code: int, message: str):
    hub.fault("PUT", "^/lfs/", status(code), unheard=True)
    with pytest.raises(PublishError, match=rf"{message}.*Nothing was published; the repository me/net was made"):
        publish(model, "me/net", license="mit")
    hub.faults.clear()
    assert publish(model, "me/net", license="mit").changed


def test_an_answer_that_is_lost_after_the_commit(hub: Hub, model: nn.Module):
    hub.fault("POST", r"/commit/main$", drop, times=1)
    with pytest.raises(PublishError, match=r"broke .*main branch has another commit now") as raised:
        publish(model, "me/net", license="mit")
    assert hub.repos["me/net"].refs["main"][:12] in str(raised.value)
    assert not publish(model, "me/net", license="mit").changed  # all is there, and is proved to be


def test_someone_else_commits_in_between(hub: Hub, model: nn.Module):
    hub.repo("me/net", {"README.md": b"old"})

    def commit(reply: Reply) -> None:
        hub.repos["me/net"].commit({"README.md": b"theirs"})

    hub.fault("POST", "/preupload/", commit, times=1)
    with pytest.raises(PublishError, match=r"Someone else changed me/net .*publish again.*has another commit now"):
        publish(model, "me/net", license="mit")
    assert files_of(hub, "me/net") == {"README.md": b"theirs"}


@pytest.mark.parametrize("where", ["/api/models/me/net$", "/repos/create", "/preupload/", "/validate-yaml", "/commit/"])
def test_a_rate_limit_is_waited_for(hub: Hub, model: nn.Module, naps: list[float], where: str):
    said: list[str] = []
    hub.fault("GET|POST", where, status(429, Retry_After="7"), times=2, unheard=True)
    assert publish(model, "me/net", license="mit", say=said.append).changed
    assert sum(nap in (7, 8) for nap in naps) == 2  # the client adds a second of its own where it retries itself
    if where != "/preupload/":
        assert said == ["The Hub is asked too often (HTTP 429): trying again in 7 s."] * 2
    assert len(hub.repos["me/net"].commits) == 2


def test_a_rate_limit_that_is_too_long_is_an_error(hub: Hub, model: nn.Module, naps: list[float]):
    hub.fault("POST", "/commit/", status(429, RateLimit='"api";r=0;t=3600'), unheard=True)
    with pytest.raises(PublishError, match=r"asked too often \(HTTP 429\).*Nothing was published"):
        publish(model, "me/net", license="mit")
    assert naps == []


def test_a_hub_in_trouble(hub: Hub, model: nn.Module, naps: list[float]):
    said: list[str] = []
    hub.fault("POST", "/repos/create", status(503), times=2, unheard=True)
    publish(model, "me/net", license="mit", say=said.append)
    assert len(said) == 2
    hub.fault("POST", "/commit/", status(500), unheard=True)
    with pytest.raises(PublishError, match=r"has trouble \(HTTP 500\): publish again later. Nothing was published\.$"):
        publish(model, "me/net", license="apache-2.0")
    hub.fault("GET", "/api/models/me/net", status(502))
    with pytest.raises(PublishError, match=r"has trouble \(HTTP 502\)"):
        publish(model, "me/net", license="apache-2.0")
    assert len(hub.repos["me/net"].commits) == 2


@pytest.mark.parametrize(("name", "message"), [("README.md", "README.md differs"), ("model.safetensors", "SHA-256")])
def test_altered_bytes_are_found(hub: Hub, model: nn.Module, name: str, message: str):
    hub.fault("GET", f"/resolve/.*/{name}", corrupt)
    with pytest.raises(PublishError, match=rf"commit [0-9a-f]{{12}} of me/net .*{message}.*revert the commit"):
        publish(model, "me/net", license="mit")
    hub.faults.clear()
    assert not publish(model, "me/net", license="mit").changed


def test_a_disk_that_fills_up_while_reading_back(hub: Hub, model: nn.Module):
    def fill(reply: Reply) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, unlimited))

    before, unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    hub.fault("HEAD", "/resolve/.*/model.safetensors", fill)
    try:
        with pytest.raises(PublishError, match=r"The files went up, but .* is not proved .* does not fit on the disk"):
            publish(model, "me/net", license="mit")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, unlimited))
    assert "model.safetensors" in files_of(hub, "me/net")


def test_offline(hub: Hub, model: nn.Module, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    from huggingface_hub.utils import close_session

    close_session()  # the client reads the setting when it opens its session
    try:
        with pytest.raises(PublishError, match="Offline mode"):
            publish(model, "me/net")
    finally:
        monkeypatch.undo()
        close_session()


# ------------------------------------------------------------------------------------------------------ the model's own


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_models_publish_and_open_themselves(hub: Hub, model: nn.Module, tmp_path: Path):
    assert isinstance(model, MetaFormer)
    found = model.push_to_hub("me/net", license="mit", commit_message="By itself")
    assert hub.repos["me/net"].messages[-1] == "By itself"
    for source, revision in (("me/net", found.commit), ("hf-hub:me/net", None)):
        served = MetaFormer.from_pretrained(source, revision=revision, cache_dir=tmp_path / "cache")
        assert torch.equal(logits(served), logits(model))
    folder = model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(MetaFormer.from_pretrained(folder)), logits(model))
    assert torch.equal(logits(MetaFormer.from_pretrained(str(folder))), logits(model))

    with pytest.raises(ConfigError, match="A folder has no revisions"):
        MetaFormer.from_pretrained(folder, revision="v1")

    class Other(zoo.ZooModelHubMixin, nn.Module):
        pass

    with pytest.raises(ConfigError, match="holds a MetaFormer, not a Other"):
        Other.from_pretrained(folder)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.jit.script(model.eval())):
        assert torch.equal(logits_of(same, model), logits(model))


def logits_of(model: Any, like: nn.Module) -> torch.Tensor:
    model.eval().pretrained_cfg = like.pretrained_cfg
    return logits(model)


def test_publishing_leaves_the_model_as_it_was(hub: Hub, model: nn.Module):
    before = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    model.train()
    publish(model, "me/net", license="mit")
    assert model.pretrained_cfg == before
    assert model.training


# ----------------------------------------------------------------------------------------------------------- commands


def test_a_dry_run_shows_everything_and_asks_nobody(
    hub: Hub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    code, output, error = command("publish", str(run), "me/digits", "--dry-run", "--license", "mit", capsys=capsys)
    assert code == 0
    assert "model.safetensors" in output
    assert "\nlibrary_name: backbone-zoo\n" in output
    assert "Nothing was published: this was a dry run." in error
    folder = tmp_path / "draft"
    assert command("publish", str(run), "me/digits", "--dry-run", str(folder), capsys=capsys)[0] == 0
    assert (folder / "README.md").read_text().startswith("---\n")
    assert torch.equal(
        logits(zoo.create_model(f"local-dir:{folder}")), logits(zoo.create_model(f"local-dir:{run / 'best'}"))
    )
    assert hub.requests == []
    code, _, error = command("publish", str(run), "me/digits", "--dry-run", str(folder), capsys=capsys)
    assert (code, "is not empty: choose another" in error) == (1, True)


def test_the_card_of_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, output, _ = command("card", str(run), "--license", "mit", capsys=capsys)
    assert code == 0
    assert metadata(output).license == "mit"
    assert command("card", str(run), "--output", str(tmp_path / "card.md"), capsys=capsys)[0] == 0
    assert "## Evaluation" in (tmp_path / "card.md").read_text()
    code, _, error = command("card", "metaformr", capsys=capsys)
    assert code == 1
    assert "Did you mean metaformer?" in error


@pytest.mark.parametrize("given", [["--license", "mit"], ["--half"], ["--i-have-the-rights"], ["--results", "there"]])
def test_the_card_of_a_family_takes_nothing_that_is_of_a_checkpoint(
    given: list[str], capsys: pytest.CaptureFixture[str]
):
    code, output, error = command("card", "metaformer", *given, capsys=capsys)
    assert (code, output) == (1, "")
    assert f"{given[0]} goes with the card of a run or checkpoint: leave it out" in error


def environment(hub: Hub, home: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": Hub.TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }


def test_published_by_one_process_opens_in_another_that_knows_only_timm(tmp_path: Path):
    torch.manual_seed(0)
    model = zoo.create_model("poolformerv2_s12", pretrained=False, num_classes=4)
    folder = zoo.save_pretrained(model, tmp_path / "saved", labels=["a", "b", "c", "d"])
    with Hub() as hub:
        env = environment(hub, tmp_path / "home")
        done = python("-m", "zoo", "publish", folder, "me/net", "--license", "mit", env=env)
        assert done.returncode == 0, done.stderr
        assert f"Published and read back: {hub.url}/me/net (commit " in done.stdout
        data = card_of(hub, "me/net").data
        assert data.library_name == "timm"
        assert "timm" in data.tags
        torch.save(logits(model), tmp_path / "logits.pt")
        opening = f"""
import sys, timm, torch
model = timm.create_model("hf-hub:me/net", pretrained=True).eval()
images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
with torch.inference_mode():
    torch.testing.assert_close(model(images), torch.load({str(tmp_path / "logits.pt")!r}), rtol=1e-4, atol=1e-4)
assert model.pretrained_cfg["label_names"] == ["a", "b", "c", "d"]
assert "zoo" not in sys.modules
"""
        opened = python("-c", opening, cwd=tmp_path, env=env)
        assert opened.returncode == 0, opened.stderr


def test_ctrl_c_in_the_middle_of_an_upload(run: Path, tmp_path: Path):
    reached, go_on = threading.Event(), threading.Event()

    def hold(reply: Reply) -> None:
        reached.set()
        go_on.wait(60)
        drop(reply)

    with Hub() as hub:
        hub.fault("PUT", "^/lfs/", hold, times=1, unheard=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "zoo", "publish", str(run), "me/digits", "--license", "mit"],
            env=environment(hub, tmp_path / "home"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=restore_interrupt,
        )
        assert reached.wait(120)
        process.send_signal(signal.SIGINT)
        release = threading.Timer(1.0, go_on.set)  # the stub answers one request at a time
        release.start()
        _, error = process.communicate(timeout=120)
        assert process.returncode == 130
        assert "Traceback" not in error
        assert "Nothing was published; the repository me/digits was made and is empty." in error
        assert set(files_of(hub, "me/digits")) == {".gitattributes"}


def restore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
