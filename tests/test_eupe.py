"""EUPE's encoders against their authors' code, and their figures."""

import pytest
import timm
import torch

import zoo
from tests import golden
from tests.models import each_model
from zoo.errors import ConfigError
from zoo.models.eupe import LICENSE, encode
from zoo.registry import get_entry

SMALL = ("eupe_vitt16@192x256", "eupe_convnext_tiny@192x256")
# parameters without a classifier, and what fvcore counts in the authors' code at 224x224
FIGURES = {
    "eupe_vitt16": (5_489_664, 1_100_716_992),
    "eupe_vits16": (21_596_160, 4_335_417_216),
    "eupe_vitb16": (85_659_648, 17_206_767_360),
    "eupe_convnext_tiny": (27_820_128, 4_465_680_384),
    "eupe_convnext_small": (49_454_688, 8_700_635_136),
    "eupe_convnext_base": (87_566_464, 15_377_293_312),
}


@pytest.mark.parametrize(
    "file", [pytest.param(n, marks=() if n in SMALL else pytest.mark.slow) for n in golden.names("eupe")]
)
def test_golden_parity(file):
    """The published code rounds rotary positions to float32 in double precision too: 1e-6 is what can be asked."""
    reference = golden.load("eupe", file)
    model = zoo.create_model(file.split("@")[0], pretrained=False)
    assert not zoo.load_checkpoint(model, golden.state_dict(reference)).dropped
    model.double().eval()
    with torch.no_grad():
        images = golden.inputs(reference)["input"].double()
        tokens = encode(model, images)
        outputs = {"logits": model(images), "cls": tokens.class_token, "storage": tokens.storage}
        outputs |= {"patch": tokens.patches, "features": model.forward_features(images)}
        if "vit" in file:
            maps = model.forward_intermediates(images, return_prefix_tokens=True, norm=True, intermediates_only=True)
            for i, (patches, prefix) in enumerate(maps):
                outputs |= {f"layer{i}_patch_nchw": patches, f"layer{i}_cls": prefix[:, 0]}
            ((patches, prefix),) = model.forward_intermediates(
                images, indices=1, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
            )
            outputs["prenorm"] = torch.cat((prefix, patches), dim=1)
        else:
            final, maps = model.forward_intermediates(images)
            outputs |= {f"stage{i}": stage for i, stage in enumerate(maps, start=1)}
            outputs["prenorm"] = final.flatten(2).transpose(1, 2)
            outputs["layer2_cls"] = maps[2].mean((2, 3))
            outputs["layer3_patch_nchw"] = model.head.norm(maps[3])
    assert reference["precision"] == "float64"
    assert max(golden.errors(reference, outputs).values()) < 1e-6


@pytest.mark.parametrize("name", each_model(list(FIGURES)))
def test_costs(name):
    """Exact: fvcore leaves out attention's two products, and counts those norms that the authors do not write out."""
    params, fvcore = FIGURES[name]
    model = zoo.create_model(name, pretrained=False, device="meta")
    costs = zoo.profile(model, input_size=(3, 224, 224))
    assert costs.params == params
    if "vit" in name:
        tokens = 1 + 4 + 14 * 14
        assert costs.fvcore_total == fvcore + 2 * tokens**2 * model.embed_dim * len(model.blocks)
        return
    sides = (56, 28, 14, 7)
    dims = [info["num_chs"] for info in model.feature_info]
    normed = sum(len(stage.blocks) * dim * side**2 for stage, dim, side in zip(model.stages, dims, sides, strict=True))
    assert costs.macs == fvcore - 5 * (normed + dims[-1] * (7**2 + 1))  # five operations to an element


@pytest.mark.parametrize("name", FIGURES)
def test_weights_are_offered_with_their_licence(name):
    weights = get_entry(name).weights
    assert [w.tag for w in weights] == ["eupe_lvd1689m", "meta_lvd1689m"]
    assert {w.license for w in weights} == {LICENSE}
    assert all("oncommercial" in str(w.note) for w in weights)


def test_images_are_prepared_as_whoever_published_the_weights_says():
    found = {}
    for tag in ("eupe_lvd1689m", "meta_lvd1689m"):
        model = zoo.create_model(f"eupe_vits16.{tag}", pretrained=False, device="meta")
        config = timm.data.resolve_model_data_config(model)
        found[tag] = config["input_size"], config["crop_mode"], config["interpolation"], config["crop_pct"]
    assert found["eupe_lvd1689m"] == ((3, 256, 256), "center", "bicubic", 1.0)
    assert found["meta_lvd1689m"] == ((3, 256, 256), "squash", "bilinear", 1.0)


def test_dense_features_by_name():
    """Maps of chosen blocks, other sizes, and a fresh classifier."""
    images = torch.randn(2, 3, 64, 96)
    model = zoo.create_model("eupe_vitt16", pretrained=False, features_only=True, out_indices=(2, 11)).eval()
    assert [m.shape for m in model(images)] == [(2, 192, 4, 6), (2, 192, 4, 6)]
    model = zoo.create_model("eupe_convnext_tiny", pretrained=False, features_only=True).eval()
    assert [m.shape[1:] for m in model(images)] == [(96, 16, 24), (192, 8, 12), (384, 4, 6), (768, 2, 3)]
    assert zoo.create_model("eupe_vitt16", pretrained=False, num_classes=7)(images).shape == (2, 7)
    assert zoo.create_model("eupe_vitt16", pretrained=False)(images).shape == (2, 192)
    with pytest.raises(ConfigError, match="'list' takes eupe_vitt16 apart"):
        zoo.create_model("eupe_vitt16", pretrained=False, features_only=True, feature_cls="list")


def test_a_saved_size_is_opened_again(tmp_path):
    """Images are prepared at the size that a model was trained at, and at another where that is asked for."""
    model = zoo.create_model("eupe_test", pretrained=False, num_classes=3)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 48)}
    place = f"local-dir:{zoo.save_pretrained(model, tmp_path / 'saved')}"
    again = zoo.create_model(place)
    assert timm.data.resolve_model_data_config(again)["input_size"] == (3, 32, 48)
    folder = zoo.save_pretrained(again, tmp_path / "again")
    assert zoo.create_model(f"local-dir:{folder}").pretrained_cfg["input_size"] == (3, 32, 48)
    assert zoo.create_model(place, img_size=64).pretrained_cfg["input_size"] == (3, 64, 64)


def test_heads_of_the_distillation_are_left_out():
    for name, prefix in (("eupe_vitt16", "projectors.0.weight"), ("eupe_convnext_tiny", "projectors.0.weight")):
        tensors = golden.state_dict(golden.load("eupe", f"{name}@192x256")) | {prefix: torch.zeros(3, 3)}
        assert not zoo.load_checkpoint(zoo.create_model(name, pretrained=False), tensors).dropped


def test_what_is_left_over_of_a_patch_is_left_out():
    """As the authors' convolution does it; the ConvNeXts' stem, too."""
    model = zoo.create_model("eupe_test", pretrained=False).eval()
    images = torch.randn(1, 3, 79, 65, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(images), model(images[..., :64, :64]))
        (features,) = model.forward_intermediates(images, indices=1, intermediates_only=True)
    assert features.shape[-2:] == (4, 4)


def test_a_misspelt_argument_is_told_the_nearest():
    with pytest.raises(ConfigError, match=r"no argument 'embed_dims'\. Did you mean embed_dim\?"):
        zoo.create_model("eupe_test", embed_dims=3)
