"""FBNetV3 against its authors' code, timm's, and their figures."""

from typing import Any

import pytest
import torch

import zoo
from tests import golden
from zoo.errors import CheckpointError
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


@pytest.mark.parametrize("name", FIGURES)
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
