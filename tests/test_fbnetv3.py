"""FBNetV3 against its authors' code, timm's, and their figures."""

from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from tests import golden
from tests.models import each_model
from zoo.errors import CheckpointError, ConfigError
from zoo.publishing import prepare
from zoo.registry import get_entry

# the authors' network: parameters in timm's form, MACs (M) at its own size
FIGURES = {
    "fbnetv3_a": (8_598_464, 355.51),
    "fbnetv3_b": (8_598_464, 460.15),
    "fbnetv3_c": (9_973_800, 555.58),
    "fbnetv3_d": (10_306_272, 642.63),
    "fbnetv3_e": (10_772_872, 759.95),
    "fbnetv3_f": (13_896_136, 1178.86),
    "fbnetv3_g": (16_623_888, 2125.19),
}
SMALL = ("fbnetv3_a@192x256", "fbnetv3_d")


def published(name: str, **arguments: Any) -> torch.nn.Module:
    """The network that the authors' weights belong to."""
    return zoo.create_model(name, pretrained=False, **get_entry(name).find_weights("meta_in1k").args, **arguments)


@pytest.mark.parametrize(
    "file", [pytest.param(n, marks=() if n in SMALL else pytest.mark.slow) for n in golden.names("fbnetv3")]
)
def test_golden_parity(file):
    reference = golden.load("fbnetv3", file)
    model = published(file.split("@")[0]).double().eval()
    # double: the stem's bias moves into a mean, which float32 would round
    tensors = {k: v.double() if v.is_floating_point() else v for k, v in golden.state_dict(reference).items()}
    assert not zoo.load_checkpoint(model, tensors).dropped
    with torch.no_grad():
        images = golden.inputs(reference)["input"].double()
        outputs = {"stem": model.bn1(model.conv_stem(images)), "logits": model(images)}
        features, maps = outputs["stem"], []
        for stage in model.blocks[:6]:
            features = stage(features)
            maps.append(features)
        maps.pop(3)  # the authors count the fourth and fifth as one
        outputs |= {f"stage{i}": stage for i, stage in enumerate(maps, start=1)}
        outputs["features"] = features
        outputs["pooled"] = model.forward_head(model.forward_features(images), pre_logits=True)[..., None, None]
    assert reference["precision"] == "float64"
    assert max(golden.errors(reference, outputs).values()) < 1e-12


@pytest.mark.parametrize("name", each_model(list(FIGURES)))
def test_costs(name):
    params, macs = FIGURES[name]
    size = get_entry(name).find_weights("meta_in1k").input_size
    costs = zoo.profile(published(name, device="meta"), input_size=size)
    assert costs.params == params
    assert costs.macs / 1e6 == pytest.approx(macs, abs=0.005)


@pytest.mark.parametrize("name", ["fbnetv3_b", "fbnetv3_d", "fbnetv3_g"])
def test_timms_networks_are_timms(name):
    import timm

    theirs, ours = getattr(timm.models, name)().eval(), zoo.create_model(name, pretrained=False).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


def test_the_authors_padding_differs_from_timms():
    """The argument does something, and comes with the authors' weights alone."""
    reference = golden.load("fbnetv3", "fbnetv3_b")
    reference["outputs"] = {"logits": reference["outputs"]["logits"]}
    model = zoo.create_model("fbnetv3_b", pretrained=False)
    zoo.load_checkpoint(model, golden.state_dict(reference))
    with torch.no_grad():
        logits = model.eval()(golden.inputs(reference)["input"])
    assert golden.errors(reference, {"logits": logits})["logits"] > 1e-3
    assert get_entry("fbnetv3_b").find_weights("ra2_in1k").args == {}


def test_weights_of_another_variant():
    tensors = golden.state_dict(golden.load("fbnetv3", "fbnetv3_a"))
    with pytest.raises(CheckpointError):
        zoo.load_checkpoint(zoo.create_model("fbnetv3_c", pretrained=False), tensors)


# ------------------------------------------------------------------------------------------------- the authors' padding


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def metas_file(tmp_path: Path) -> Path:
    torch.save(golden.state_dict(golden.load("fbnetv3", "fbnetv3_b")), tmp_path / "metas.pth")
    return tmp_path / "metas.pth"


@pytest.mark.parametrize("task", ["vision", "segmentation"])
def test_metas_weights_keep_their_padding_when_they_are_saved(task: str, metas_file: Path, tmp_path: Path):
    torch.manual_seed(0)
    model = zoo.create_model("fbnetv3_b.meta_in1k", checkpoint_path=metas_file, task=task)
    again = zoo.create_model(f"local-dir:{zoo.save_pretrained(model, tmp_path / 'saved')}")
    torch.testing.assert_close(logits(again), logits(model))
    draft = prepare(model, tmp_path / "draft", has_rights=True).folder
    torch.testing.assert_close(logits(zoo.create_model(f"local-dir:{draft}")), logits(model))


def test_metas_weights_in_timms_network_are_warned_of(metas_file: Path, caplog: pytest.LogCaptureFixture):
    zoo.create_model("fbnetv3_b", checkpoint_path=metas_file)
    assert "trained with published_padding=((3, 1), (5, 0))" in caplog.text
    assert "create it as 'fbnetv3_b.meta_in1k'" in caplog.text
    caplog.clear()
    zoo.create_model("fbnetv3_b.meta_in1k", checkpoint_path=metas_file)
    zoo.create_model("fbnetv3_b", checkpoint_path=metas_file, published_padding=[[3, 1], [5, 0]])
    assert "create it as" not in caplog.text


def test_what_would_be_another_function_when_opened_is_not_published(tmp_path: Path):
    model: Any = zoo.create_model("fbnetv3_test", pretrained=False)
    model.blocks[3][0].conv_dw.padding = (1, 1)
    with pytest.raises(ConfigError, match=r"blocks\.3\.0\.conv_dw .*is not as the model's arguments build it"):
        prepare(model, tmp_path / "draft", license="mit")
    assert not (tmp_path / "draft").exists()
    model = zoo.create_model("fbnetv3_test", pretrained=False)
    features = model.forward_features
    model.forward_features = lambda x: 2 * features(x)
    with pytest.raises(ConfigError, match="computes something else once it is saved and opened again"):
        prepare(model, tmp_path / "draft", license="mit")
    assert not (tmp_path / "draft").exists()


def test_metas_weights_load_into_feature_maps():
    tensors = golden.state_dict(golden.load("fbnetv3", "fbnetv3_a"))
    model, whole = (zoo.create_model("fbnetv3_a", pretrained=False, features_only=some) for some in (True, False))
    for module in (model, whole):
        assert not zoo.load_checkpoint(module, tensors).fresh
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = whole.eval().forward_intermediates(images, intermediates_only=True)
        for ours, other in zip(model.eval()(images), theirs, strict=True):
            torch.testing.assert_close(ours, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": ("x",)}, r"blocks=\('x',\) cannot be read .* a stage is a sequence of lines such as"),
        ({"blocks": ()}, "cannot be read"),
        ({"published_padding": ((9, 1),)}, r"has \(9, 1\): it takes pairs of a stage, 0 to 6"),
        ({"published_padding": ((6, 1),)}, "stage 6, which has no depthwise convolution"),
        ({"global_pool": "avgg"}, r"no global_pool 'avgg'\. Did you mean avg"),
    ],
)
def test_arguments_that_cannot_be(arguments: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        zoo.create_model("fbnetv3_test", **arguments)
