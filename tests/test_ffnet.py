"""FFNet against its authors' code, what it costs, and FFNet's head on other backbones."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from tests import golden
from tests.models import series
from zoo.config import load_config
from zoo.errors import CheckpointError, ConfigError
from zoo.layers.segmentation import SegmentationModel
from zoo.models.ffnet import GAUSSIAN, FFNet, FFNetSegmentation
from zoo.registry import get_entry
from zoo.training import TrainingConfig

# parameters, those of the backbone, and GMACs (conv and linear) at the model's own input size
COSTS = {
    "ffnet86s_dbbb_mobile": (26_607_347, 25_399_200, "104.42"),
    "ffnet78s_dbbb_mobile": (27_491_059, 26_282_912, "96.04"),
    "ffnet54s_dbbb_mobile": (18_044_659, 16_836_512, "75.69"),
    "ffnet40s_dbbb_mobile": (13_911_283, 12_703_136, "62.37"),
    "ffnet150s_bbb_mobile": (48_006_259, 46_798_112, "157.93"),
    "ffnet86s_bbb_mobile": (26_603_123, 25_394_976, "102.13"),
    "ffnet78s_bbb_mobile": (27_486_835, 26_278_688, "93.75"),
    "ffnet54s_bbb_mobile": (18_040_435, 16_832_288, "73.41"),
    "ffnet40s_bbb_mobile": (13_907_059, 12_698_912, "60.08"),
    "ffnet150s_bcc_mobile": (47_347_859, 46_798_112, "143.77"),
    "ffnet86s_bcc_mobile": (25_944_723, 25_394_976, "87.97"),
    "ffnet78s_bcc_mobile": (26_828_435, 26_278_688, "79.59"),
    "ffnet54s_bcc_mobile": (17_382_035, 16_832_288, "59.25"),
    "ffnet40s_bcc_mobile": (13_248_659, 12_698_912, "45.92"),
    "ffnet122ns_cbb_mobile": (32_815_891, 31_640_512, "65.12"),
    "ffnet74ns_cbb_mobile": (23_956_243, 22_780_864, "50.62"),
    "ffnet46ns_cbb_mobile": (13_181_203, 12_005_824, "42.17"),
    "ffnet122ns_ccc_mobile": (32_165_683, 31_640_512, "50.96"),
    "ffnet74ns_ccc_mobile": (23_306_035, 22_780_864, "36.47"),
    "ffnet46ns_ccc_mobile": (12_530_995, 12_005_824, "28.01"),
    "ffnet150_aaa": (98_843_475, 94_842_944, "1045.19"),
    "ffnet134_aaa": (98_251_603, 94_251_072, "967.88"),
    "ffnet101_aaa": (47_545_171, 42_500_160, "664.01"),
    "ffnet86_aaa": (53_987_155, 49_986_624, "735.95"),
    "ffnet56_aaa": (33_624_915, 29_624_384, "590.99"),
    "ffnet50_aaa": (28_553_043, 23_508_032, "508.85"),
    "ffnet34_aaa": (25_285_203, 21_284_672, "484.69"),
    "ffnet150_abb": (96_108_435, 94_842_944, "820.02"),
    "ffnet86_abb": (51_252_115, 49_986_624, "510.78"),
    "ffnet56_abb": (30_889_875, 29_624_384, "365.83"),
    "ffnet34_abb": (22_550_163, 21_284_672, "259.53"),
    "ffnet150s_bbb": (48_006_259, 46_798_112, "631.70"),
    "ffnet86s_bbb": (26_603_123, 25_394_976, "408.53"),
    "ffnet122n_cbb": (51_393_555, 50_193_600, "367.55"),
    "ffnet74n_cbb": (37_148_179, 35_948_224, "263.66"),
    "ffnet46n_cbb": (20_214_035, 19_014_080, "207.49"),
    "ffnet150_daaa": (98_847_699, 94_847_168, "265.13"),
    "ffnet134_daaa": (98_255_827, 94_255_296, "245.80"),
    "ffnet101_daaa": (47_545_171, 42_500_160, "170.10"),
    "ffnet86_daaa": (53_991_379, 49_990_848, "187.82"),
    "ffnet56_daaa": (33_629_139, 29_628_608, "151.58"),
    "ffnet50_daaa": (28_553_043, 23_508_032, "131.32"),
    "ffnet34_daaa": (25_289_427, 21_288_896, "125.01"),
    "ffnet18_daaa": (15_181_267, 11_180_736, "105.68"),
    "ffnet150_daac": (97_069_779, 94_847_168, "206.91"),
    "ffnet86_daac": (52_213_459, 49_990_848, "129.60"),
    "ffnet34_daac": (23_511_507, 21_288_896, "66.79"),
    "ffnet18_daac": (13_403_347, 11_180_736, "47.46"),
    "ffnet150s_dbbb": (48_010_483, 46_802_336, "160.21"),
    "ffnet86s_dbbb": (26_607_347, 25_399_200, "104.42"),
    "ffnet150s_bbx_mobile": (58_918_088, 46_798_112, "13.944"),
    "ffnet86s_bbx_mobile": (37_514_952, 25_394_976, "8.604"),
    "ffnet78s_bbx_mobile": (38_398_664, 26_278_688, "7.802"),
    "ffnet54s_bbx_mobile": (28_952_264, 16_832_288, "5.855"),
    "ffnet40s_bbx_mobile": (24_818_888, 12_698_912, "4.580"),
    "ffnet122ns_cbx_mobile": (43_727_720, 31_640_512, "5.061"),
    "ffnet74ns_cbx_mobile": (34_868_072, 22_780_864, "3.674"),
    "ffnet46ns_cbx_mobile": (24_093_032, 12_005_824, "2.865"),
    "ffnet122n_cbx": (62_305_384, 50_193_600, "7.623"),
    "ffnet74n_cbx": (48_060_008, 35_948_224, "5.138"),
    "ffnet46n_cbx": (31_125_864, 19_014_080, "3.794"),
    "ffnet150_aax": (108_255_400, 94_842_944, "18.612"),
    "ffnet134_aax": (107_663_528, 94_251_072, "16.762"),
    "ffnet101_aax": (56_957_096, 42_500_160, "9.492"),
    "ffnet86_aax": (63_399_080, 49_986_624, "11.213"),
    "ffnet56_aax": (43_036_840, 29_624_384, "7.745"),
    "ffnet50_aax": (37_964_968, 23_508_032, "5.780"),
    "ffnet34_aax": (34_697_128, 21_284_672, "5.202"),
    "ffnet18_aax": (24_588_968, 11_176_512, "3.352"),
    "ffnet150s_bbx": (58_918_088, 46_798_112, "13.944"),
    "ffnet86s_bbx": (37_514_952, 25_394_976, "8.604"),
}


def tiny(name: str = "ffnet40s_bbb_mobile", **arguments: Any) -> Any:
    """A small model that computes as the one called `name` does."""
    sizes: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    if get_entry(name).args["stem"] == "wide":
        sizes = {"depths": (1, 1, 1), "dims": (16, 24, 32)}
    return zoo.create_model(name, pretrained=False, **{**sizes, **arguments})


# -------------------------------------------------------------------------------------------------------------- goldens

QUICK = {
    "ffnet18_daac",
    "ffnet40s_bbb_mobile_pre_down",
    "ffnet40s_bbx_mobile",
    "ffnet40s_dbbb_mobile",
    "ffnet46n_cbb",
    "ffnet46ns_ccc_mobile",
}
SHARP = {  # with those above, every backbone of up to 60M parameters and every head
    "ffnet18_aax",
    "ffnet34_abb",
    "ffnet50_daaa",
    "ffnet54s_bbx_mobile",
    "ffnet56_daaa",
    "ffnet74n_cbb",
    "ffnet74ns_cbx_mobile",
    "ffnet78s_bcc_mobile",
    "ffnet86_daac",
    "ffnet86s_dbbb",
    "ffnet101_daaa",
    "ffnet122ns_cbb_mobile",
    "ffnet150s_bbb_mobile",
}
OTHERS = [name for name in golden.names("ffnet") if name not in QUICK | SHARP]


def assert_computes_as_published(file: str) -> None:
    reference = golden.load("ffnet", file)
    model: Any = zoo.create_model(file.split("@")[0], pretrained=False)
    published = golden.state_dict(reference)
    report = zoo.load_checkpoint(model, published)
    assert not report.dropped
    assert not report.fresh
    counted = [key for key in published if key.endswith("num_batches_tracked")]
    assert report.loaded == len(published) - ("smoothing.weight" in published and "pre_down" not in file)
    assert counted
    model.double().eval()
    with torch.no_grad():
        images = golden.inputs(reference)["input"].double()
        maps = model.forward_maps(images)
        outputs = {f"stage{i}": x for i, x in enumerate(maps, start=1)}
        outputs |= dict(zip(("up4", "up8", "up16", "up32"), model.neck.up(maps), strict=True))
        features, intermediates = model.forward_intermediates(images)
        outputs |= {"features": features, "logits": model(images), "smoothed": model.smoothing(images)}
    assert all(torch.equal(a, b) for a, b in zip(maps, intermediates, strict=True))
    assert reference["precision"] == "float64"
    assert max(golden.errors(reference, outputs).values()) < 1e-9
    assert sum(p.numel() for p in model.parameters()) == reference["parameters"]


@pytest.mark.parametrize(
    "file", [*sorted(QUICK), *(pytest.param(file, marks=pytest.mark.slow) for file in sorted(SHARP))]
)
def test_golden_parity(file):
    assert_computes_as_published(file)


@pytest.mark.slow  # three minutes
@pytest.mark.parametrize("file", OTHERS)
def test_every_other_published_form(file):
    assert_computes_as_published(file)


# ---------------------------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize("name", COSTS)
def test_costs_are_those_of_the_authors_code(name):
    params, _, gmacs = COSTS[name]
    info = zoo.model_info(name)
    assert info.params == info.trainable_params == params
    assert f"{info.macs / 1e9:.{len(gmacs.partition('.')[2])}f}" == gmacs


def test_parameters_of_the_backbones():
    for name, (_, expected, _) in COSTS.items():
        model = zoo.create_model(name, pretrained=False, device="meta", features_only=True)
        assert sum(p.numel() for p in model.parameters()) == expected, name


def test_smoothing_halves_the_image_and_not_the_model():
    for name in zoo.list_models("ffnet*_pre_down"):
        whole, halved = zoo.model_info(name), zoo.model_info(name.removesuffix("_pre_down"))
        assert whole.trainable_params == halved.params
        assert whole.params == halved.params + 3 * 25  # the filter, which is not trained
        assert (whole.input_size, halved.input_size) == ((3, 1024, 2048), (3, 512, 1024))
        assert whole.macs == pytest.approx(halved.macs, rel=0.01)


def test_every_published_form_is_there():
    names = set(zoo.list_models(family="ffnet"))
    names -= {"ffnet_test", "ffnet_test_segmentation"}
    assert len(names) == 87
    assert {name for name in names if not name.endswith("_pre_down")} == set(COSTS)
    assert {file.split("@")[0] for file in golden.names("ffnet")} <= names
    assert {name for name in names if re.search(r"_\w\wx", name)} == set(zoo.list_models("ffnet?*_*x*", task="vision"))


def test_weights_are_the_files_that_the_authors_name():
    for file in golden.names("ffnet"):
        member = re.search(r"pretrained file (\S+)", golden.load("ffnet", file)["notes"])
        assert member is not None
        (weights,) = get_entry(file.split("@")[0]).weights
        assert weights.filename == member[1]
        assert weights.url == (
            f"https://github.com/Qualcomm-AI-research/FFNet/releases/download/models/{member[1].partition('/')[0]}.zip"
        )
        assert (weights.miou is None) or weights.dataset == "cityscapes"


# --------------------------------------------------------------------------------------------------------- segmentation


@pytest.mark.parametrize(
    ("name", "stride"),
    [("ffnet40s_bbb_mobile", 4), ("ffnet40s_dbbb_mobile", 8), ("ffnet46n_cbb", 4), ("ffnet50_daaa", 8)],
)
def test_logits_at_the_published_stride(name, stride):
    dims = {"dims": (16, 24, 32, 48)} if name == "ffnet50_daaa" else {}
    model = tiny(name, num_classes=5, **dims).eval()
    assert model.output_stride == stride
    for height, width in ((64, 96), (65, 33)):
        found = model(torch.randn(2, 3, height, width))
        assert found.shape == (2, 5, -(-height // stride), -(-width // stride))
    maps = tiny(name, features_only=True, **dims).eval()(torch.randn(1, 3, 64, 64))
    assert [64 // x.shape[-1] for x in maps] == [stride * 2**i for i in range(4)]
    grey = tiny(name, in_chans=1, num_classes=0, **dims).eval()
    assert grey(torch.randn(1, 1, 64, 64)).shape == (1, model.head.hidden, 64 // stride, 64 // stride)


def test_the_gaussian_of_pre_down():
    """Taps of scipy's filter of deviation 0.7, whose seventh and first fold onto the ends of five; half the size."""
    taps = torch.exp(-0.5 * (torch.arange(-3, 4, dtype=torch.float64) / 0.7) ** 2)
    taps /= taps.sum()
    folded = torch.stack([taps[1] + taps[0], taps[2], taps[3], taps[4], taps[5] + taps[6]])
    torch.testing.assert_close(torch.tensor(GAUSSIAN, dtype=torch.float64), folded, rtol=1e-5, atol=1e-8)
    model = tiny("ffnet40s_bbb_mobile_pre_down", in_chans=2)
    assert model.smoothing.weight.shape == (2, 1, 5, 5)
    torch.testing.assert_close(model.smoothing.weight[1, 0], torch.outer(folded, folded).float(), rtol=1e-5, atol=1e-8)
    assert model.smoothing(torch.randn(1, 2, 1024, 2048)).shape == (1, 2, 511, 1022)
    assert "smoothing.weight" not in dict(model.named_parameters())


def test_images_that_are_too_small_for_the_gaussian():
    model = tiny("ffnet40s_bbb_mobile_pre_down", num_classes=2).eval()
    assert model(torch.randn(1, 3, 3, 5)).isfinite().all()
    for height, width in ((2, 5), (3, 4)):
        with pytest.raises(ConfigError, match=rf"too small: a map of {height}x{width} .* images from 3x5 up"):
            model(torch.randn(1, 3, height, width))


def test_one_file_serves_with_smoothing_and_without():
    torch.manual_seed(0)
    smooth = tiny("ffnet40s_bbb_mobile_pre_down").eval()
    plain = tiny().eval()
    report = zoo.load_checkpoint(plain, smooth.state_dict())
    assert not report.dropped
    image = torch.randn(1, 3, 128, 128)
    torch.testing.assert_close(plain(smooth.smoothing(image)), smooth(image))
    grey = tiny("ffnet40s_bbb_mobile_pre_down", in_chans=1)
    report = zoo.load_checkpoint(grey, smooth.state_dict())
    assert report.adapted == ("stem.conv0.weight",)
    features = tiny("ffnet40s_bbb_mobile_pre_down", features_only=True).eval()
    zoo.load_checkpoint(features, smooth.state_dict())
    torch.testing.assert_close(features(image), smooth.forward_intermediates(image, intermediates_only=True))


def test_torchvision_weights_fit_the_plain_backbones():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    theirs = resnet18().eval()
    model = zoo.create_model("ffnet18_aax", pretrained=False).eval()
    with pytest.raises(CheckpointError, match=r"neck\."):
        zoo.load_checkpoint(model, theirs.state_dict())
    zoo.load_checkpoint(model, theirs.state_dict(), strict=False)
    image = torch.randn(1, 3, 64, 64)
    expected = theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image)))))
    torch.testing.assert_close(model.forward_maps(image)[0], expected)


def test_a_segmentation_model_keeps_its_contract():
    torch.manual_seed(0)
    model = tiny(num_classes=4).eval()
    image = torch.randn(2, 3, 64, 64)
    features = model.forward_features(image)
    assert features.shape == (2, model.num_features, 16, 16)
    assert torch.equal(model.forward_head(features), model(image))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size, 16, 16)
    model.reset_classifier(7)
    assert model.get_classifier().out_channels == model(image).shape[1] == model.num_classes == 7
    expected = model(image)
    fast = zoo.optimize_for_inference(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert (fast(image) - expected).abs().max() <= 1e-5 * expected.abs().max()
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(model(image), expected)
    model.set_grad_checkpointing(False)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(image), expected)
        batch = torch.export.Dim("batch", min=1, max=8)
        exported = torch.export.export(model, (image,), dynamic_shapes=({0: batch},)).module()
        torch.testing.assert_close(exported(image[:1]), expected[:1])
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(image), expected)
    maps = model.forward_intermediates(image, intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert torch.equal(model(image), maps[1])


def test_saved_and_opened_again(tmp_path):
    torch.manual_seed(0)
    model = tiny(num_classes=4).eval()
    image = torch.randn(1, 3, 64, 64)
    opened = zoo.create_model(f"local-dir:{zoo.save_pretrained(model, tmp_path / 'model')}").eval()
    assert isinstance(opened, FFNetSegmentation)
    torch.testing.assert_close(opened(image), model(image))


def test_a_few_steps_of_training_lower_the_loss():
    torch.manual_seed(0)
    model = zoo.create_model("ffnet_test_segmentation", num_classes=3)
    assert sum(p.numel() for p in model.parameters()) < 1.5e6
    images = torch.randn(2, 3, 32, 32)
    labels = images.mean(dim=1)[:, ::4, ::4].sign().long() + 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# --------------------------------------------------------------------------------------------- the head elsewhere

SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}


def test_any_backbone_carries_the_head(tmp_path):
    torch.manual_seed(0)
    image = torch.randn(2, 3, 64, 96)
    model = zoo.create_model("poolformerv2_s12", task="segmentation", pretrained=False, num_classes=5, **SMALL).eval()
    assert (model.output_stride, model.num_classes) == (4, 5)
    assert model(image).shape == (2, 5, 16, 24)
    assert model.forward_features(image).shape == (2, 288, 16, 24)
    assert torch.equal(model.forward_head(model.forward_features(image)), model(image))
    for parameter in model.neck.parameters():
        assert parameter.std() < 0.02 or parameter.ndim == 1
    folder = zoo.save_pretrained(model, tmp_path / "model")
    opened = zoo.create_model(f"local-dir:{folder}").eval()
    torch.testing.assert_close(opened(image), model(image))
    model.reset_classifier(2)
    assert model(image).shape == (2, 2, 16, 24)
    fast = zoo.optimize_for_inference(model)
    torch.testing.assert_close(fast(image), model(image), rtol=1e-4, atol=1e-5)
    model.train()(image).mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_weights_of_the_backbone_are_taken(tmp_path):
    torch.manual_seed(0)
    classifier = zoo.create_model("poolformerv2_s12", pretrained=False, **SMALL)
    torch.save(classifier.state_dict(), tmp_path / "weights.pth")
    model = zoo.create_model(
        "poolformerv2_s12",
        task="segmentation",
        checkpoint_path=tmp_path / "weights.pth",
        up_head="C",
        seg_head="A",
        **SMALL,
    )
    assert torch.equal(model.backbone.model.stem.conv.weight, classifier.stem.conv.weight)
    assert (model.head.hidden, model.neck.num_features) == (512, 176)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 19, 16, 16)


def quick_backbones() -> list:
    """The smallest of each series of a family of the registry."""
    smallest: dict[str, str] = {}
    for info in zoo.search(task="vision", sort="params"):
        smallest.setdefault(info.family, info.name)
    return sorted(smallest.values())


@pytest.mark.parametrize(
    ("strides", "taken"),
    [
        ((4, 8, 16, 32), (0, 1, 2, 3)),
        ((2, 4, 8, 16, 32), (1, 2, 3, 4)),
        ((4, 8, 8, 16, 16, 32), (0, 2, 4, 5)),  # the last map of each stride
        ((16,) * 12, (8, 9, 10, 11)),
        ((8, 16, 32), (0, 1, 2, 2)),
        ((16,), (0, 0, 0, 0)),
    ],
)
def test_which_maps_the_head_takes(strides, taken):
    class Maps(nn.Module):
        feature_info = SimpleNamespace(
            channels=lambda: [4 + i for i in range(len(strides))],
            reduction=lambda: list(strides),
            module_name=lambda: [f"stages.{i}" for i in range(len(strides))],
        )

        def forward(self, x):
            return [x.new_zeros(1, 4 + i, 64 // s, 64 // s) for i, s in enumerate(strides)]

    model = SegmentationModel(Maps(), num_classes=2, up_head="C", seg_head="C").eval()
    assert model.take == taken
    assert model.output_stride == strides[taken[0]]
    side = 64 // model.output_stride
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 2, side, side)


@pytest.mark.parametrize("name", quick_backbones())
def test_backbones_of_every_family(name):
    """Without memory: every family's smallest, with the head, gives logits as fine as its finest map in use."""
    entry = get_entry(name)
    if entry.fixed_input_size:
        pytest.skip(f"{name} takes one input size")
    model = zoo.create_model(name, task="segmentation", pretrained=False, device="meta")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    found = model(torch.empty(1, 3, 224, 224, device="meta"))
    assert found.shape[:2] == (1, 19)
    assert abs(found.shape[-1] - 224 / model.output_stride) <= 1  # without padding, a stem gives one less


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("ffnet40s_bbb_mobile", {"depths": (1, 1)}, "depths has 2 stages and dims has 4"),
        ("ffnet40s_bbb_mobile", {"stem": "wide"}, "FFNet has 3 stages: depths names 4"),
        ("ffnet40s_bbb_mobile", {"up_head": "D"}, "up_head 'D' is unknown"),
        ("ffnet40s_bbb_mobile", {"seg_head": "b"}, "Choose one of 'A', 'B', 'C'"),
        ("ffnet40s_bbb_mobile", {"upsample": "linear"}, "Did you mean bilinear"),
        ("ffnet40s_bbb_mobile", {"block": "bottle"}, "block 'bottle' is unknown"),
        ("ffnet40s_bbb_mobile", {"num_classes": -1}, "num_classes must be a whole number from 0"),
        ("ffnet40s_bbb_mobile", {"task": "vision"}, "made for segmentation: it cannot be had for 'vision'"),
        ("ffnet40s_bbx_mobile", {"global_pool": ""}, "use it with num_classes=0"),
        ("poolformer_s12", {"task": "segmentatoin"}, "Did you mean segmentation"),
        ("mobilellm_125m", {"task": "segmentation"}, r"made for language: .* 'segmentation'\. Leave out task=\.$"),
        ("poolformer_s12", {"task": "segmentation", "features_only": True}, "ask for one of them"),
        ("poolformer_s12", {"task": "segmentation", "up_head": "E"}, "up_head 'E' is unknown"),
        ("poolformer_s12", {"task": "segmentation", "seg_heads": "A"}, "no argument 'seg_heads'"),
    ],
)
def test_bad_arguments(name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        zoo.create_model(name, pretrained=False, **arguments)


def test_series_of_names():
    assert [series(name) for name in ("ffnet40s_bbx_mobile", "emo2_1m", "poolformerv2_s12")] == [
        "ffnet",
        "emo2",
        "poolformerv2",
    ]


def test_initialisation_is_the_authors():
    torch.manual_seed(0)
    model = FFNet(depths=(1, 1, 1, 1))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.15)
            assert module.bias is None or (module.bias == 1e-4).all()
    assert model.head.fc.weight.abs().max() <= 1000**-0.5
    assert not model.head.fc.bias.any()


@pytest.mark.parametrize("name", [*zoo.list_models("ffnet?*x", task="vision"), *zoo.list_models("ffnet*x_mobile")])
def test_recipes_are_the_authors(name):
    """timm's RMSprop, 0.048 for 2 * 384 images, which is 0.064 for 1024; the largest on ten GPUs in place of eight."""
    config = load_config(TrainingConfig, f"configs/vision/imagenet1k/{name}.yaml")
    batch = 128 * (10 if name.startswith("ffnet150") else 8)
    assert (config.model.name, config.model.args) == (name, {"drop_rate": 0.2})
    assert config.train.global_batch_size == batch
    optimizer = config.optimizer
    assert (optimizer.opt, optimizer.lr) == ("rmsproptf", pytest.approx(0.048 / (2 * 384) * batch))
    assert (optimizer.eps, optimizer.weight_decay) == (1e-3, 4e-5)
    schedule = config.scheduler
    assert (schedule.sched, schedule.epochs, schedule.warmup_lr) == ("step", 150, 1e-6)
    assert (schedule.decay_epochs, schedule.decay_rate) == (2, 0.93)
    augment = config.augment
    assert (augment.aa, augment.reprob, augment.remode) == ("rand-m9-mstd0.5", 0.3, "pixel")
    assert (augment.mixup, augment.cutmix) == (0, 0)
    assert config.train.model_ema
    assert config.data.input_size == (3, 224, 224)
