"""VoVNet against its authors' code, and its figures."""

import pytest
import timm
import torch

import zoo
from tests import golden
from tests.models import each_model
from zoo.config import load_config
from zoo.errors import CheckpointError, ConfigError, DownloadError
from zoo.registry import get_entry
from zoo.training import TrainingConfig

SMALL = ("ese_vovnet19b_slim_dw@192x256", "ese_vovnet19b_dw", "vovnet27_slim")
# parameters, MACs (G) at 224x224; two digits are timm's table, which counts activations, too
FIGURES = {
    "vovnet39a": (22_600_296, 7.0722),
    "vovnet57a": (36_640_296, 8.9301),
    "ese_vovnet19b_slim_dw": (1_897_752, 0.3981),
    "ese_vovnet19b_slim": (3_166_136, 1.6802),
    "ese_vovnet19b_dw": (6_543_080, 1.3335),
    "ese_vovnet39b": (24_568_936, 7.07),
    "ese_vovnet57b": (38_608_936, 8.94),
    "ese_vovnet99b": (63_199_272, 16.50),
    "eca_vovnet39b": (22_600_316, 7.0722),
    "vovnetv2_19": (11_205_416, 4.1219),
    "vovnetv2_39": (26_209_128, 7.0758),
    "vovnetv2_57": (42_479_912, 8.9360),
    "vovnetv2_99": (70_548_520, 16.4956),
    "vovnet27_slim": (3_525_736, 2.1767),
}


@pytest.mark.parametrize(
    "file", [pytest.param(n, marks=() if n in SMALL else pytest.mark.slow) for n in golden.names("vovnet")]
)
def test_golden_parity(file):
    reference = golden.load("vovnet", file)
    classifies = "logits" in reference["outputs"]
    model = zoo.create_model(file.split("@")[0], pretrained=False, **({} if classifies else {"num_classes": 0}))
    assert not zoo.load_checkpoint(model, golden.state_dict(reference)).dropped
    model.double().eval()
    with torch.no_grad():
        images = golden.inputs(reference)["input"].double()
        features, maps = model.forward_intermediates(images)
        outputs = {"stem": model.stem(images), "features": features, "logits": model.forward_head(features)}
        outputs |= {f"stage{i}": stage for i, stage in enumerate(maps[1:], start=1)}
    assert reference["precision"] == "float64"
    assert max(golden.errors(reference, outputs).values()) < 1e-9


def test_frozen_batch_norms_have_no_counters():
    """detectron2's batch norms, which the published files have, count no batches."""
    tensors = golden.state_dict(golden.load("vovnet", "ese_vovnet19b_slim_dw"))
    frozen = {key: tensor for key, tensor in tensors.items() if not key.endswith("num_batches_tracked")}
    assert len(frozen) < len(tensors)
    model = zoo.create_model("ese_vovnet19b_slim_dw", pretrained=False, num_classes=0)
    assert not zoo.load_checkpoint(model, frozen).dropped


@pytest.mark.parametrize("name", each_model(list(FIGURES)))
def test_costs(name):
    params, macs = FIGURES[name]
    costs = zoo.profile(zoo.create_model(name, pretrained=False, device="meta"), input_size=(3, 224, 224))
    assert costs.params == params
    assert costs.macs / 1e9 == pytest.approx(macs, abs=0.00005 if round(macs, 2) != macs else 0.015)


def test_timms_forms_are_not_the_published_ones():
    """Same parameters in V1, other functions: the identity mapping is what differs."""
    torch.manual_seed(0)
    ours, timms = (zoo.create_model(name, pretrained=False).eval() for name in ("vovnet39", "vovnet39a"))
    timms.load_state_dict(ours.state_dict())
    with torch.no_grad():
        images = torch.randn(1, 3, 64, 64)
        assert not torch.allclose(ours(images), timms(images), rtol=1e-2)
    assert [w.tag for w in get_entry("vovnet39").weights] == ["stigma0617_in1k"]
    assert [w.tag for w in get_entry("ese_vovnet39b").weights] == ["ra_in1k"]


@pytest.mark.parametrize("name", ["vovnet27_slim", "vovnet39", "vovnet57"])
def test_recipes_are_the_authors(name):
    config = load_config(TrainingConfig, f"configs/vision/imagenet1k/{name}.yaml")
    assert (config.model.name, config.model.args) == (name, {})
    optimizer, schedule = config.optimizer, config.scheduler
    assert (optimizer.opt, optimizer.lr, config.train.global_batch_size) == ("momentum", 0.1, 256)
    assert (optimizer.momentum, optimizer.weight_decay) == (0.9, 1e-4)
    assert (schedule.sched, schedule.epochs, schedule.warmup_epochs) == ("step", 90, 0)
    assert (schedule.decay_epochs, schedule.decay_rate) == (30, 0.1)
    assert (config.augment.aa, config.augment.mixup, config.augment.reprob, config.loss.smoothing) == (None, 0, 0, 0)
    assert config.data.input_size == (3, 224, 224)


def test_a_misspelt_argument_is_told_the_nearest():
    with pytest.raises(ConfigError, match=r"no argument 'stem_ch'\. Did you mean stem_chs"):
        zoo.create_model("vovnet_test", stem_ch=[1])


def test_a_file_without_a_classifier_says_what_to_do(tmp_path):
    torch.save(golden.state_dict(golden.load("vovnet", "ese_vovnet19b_slim_dw")), tmp_path / "theirs.pth")
    with pytest.raises(CheckpointError, match="holds no classifier: build the model with num_classes=0"):
        zoo.create_model("ese_vovnet19b_slim_dw", checkpoint_path=tmp_path / "theirs.pth")
    zoo.create_model("ese_vovnet19b_slim_dw", checkpoint_path=tmp_path / "theirs.pth", num_classes=0)
    tagged = zoo.create_model("ese_vovnet19b_slim_dw.youngwanlee_in1k", checkpoint_path=tmp_path / "theirs.pth")
    assert tagged.num_classes == 0
    assert tagged.pretrained_cfg["license"] == "cc-by-nc-4.0"


@pytest.mark.parametrize("kind", ["ese_vovnet19b_slim_dw", "ese_vovnet19b_slim", "ese_vovnet19b_dw"])
def test_backbones_without_a_classifier_leave_the_model_its_own(kind):
    (theirs,) = (w for w in get_entry(kind).weights if w.tag == "youngwanlee_in1k")
    assert (theirs.num_classes, theirs.license, theirs.top1) == (0, "cc-by-nc-4.0", None)
    for model in (zoo.create_model(kind, pretrained=False, device="meta"), zoo.create_model(kind, num_classes=3)):
        assert model.num_classes == model.head.fc.out_features != 0


@pytest.mark.parametrize("size", [19, 39, 57, 99])
def test_the_backbones_of_v2_lie_with_their_authors(size):
    (theirs,) = get_entry(f"vovnetv2_{size}").weights
    assert f"vovnet{size}_ese_detectron2.pth" in theirs.note
    with pytest.raises(DownloadError, match=r"by hand, from https://github.com/youngwanLEE.*checkpoint_path="):
        zoo.create_model(f"vovnetv2_{size}", pretrained=True)
    zoo.register_with_timm()
    with torch.device("meta"):
        assert timm.create_model(f"vovnetv2_{size}").num_classes == 1000


@pytest.mark.parametrize(("name", "top1"), [("vovnet39", 76.77), ("vovnet57", 77.73)])
def test_the_authors_claims_are_known(name, top1):
    assert zoo.model_info(name).top1 == top1
    with pytest.raises(DownloadError, match=r"by hand, from https://github.com/stigma0617.*checkpoint_path="):
        zoo.create_model(name, pretrained=True)
