"""ResNet-RS: timm's network under our verbs, and its figures."""

import re

import pytest
import timm
import torch

import zoo
from zoo.config import load_config
from zoo.errors import ConfigError
from zoo.registry import get_entry
from zoo.training import TrainingConfig

# parameters, MACs (G) at the size that the weights were trained at
FIGURES = {
    "resnetrs50": (35_691_912, 2.279),
    "resnetrs101": (63_618_696, 6.012),
    "resnetrs152": (86_621_576, 15.528),
    "resnetrs200": (93_209_992, 20.093),
    "resnetrs270": (129_861_448, 26.950),
    "resnetrs350": (163_956_168, 43.494),
    "resnetrs420": (191_891_656, 63.942),
}


@pytest.mark.parametrize("name", FIGURES)
def test_costs(name):
    info = zoo.model_info(name)
    params, macs = FIGURES[name]
    assert info.params == params
    assert info.macs / 1e9 == pytest.approx(macs, abs=0.0005)
    assert info.input_size == get_entry(name).weights[0].input_size


def test_computes_what_timms_does():
    theirs, ours = timm.models.resnetrs50().eval(), zoo.create_model("resnetrs50", pretrained=False).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


def test_timms_arguments_are_ours():
    """Whatever timm's builder takes can be given at creation, and is saved with the model."""
    model = zoo.create_model("resnetrs50", pretrained=False, num_classes=7, drop_rate=0.25, layers=(1, 1, 1, 1))
    assert model.num_classes == 7
    assert model.drop_rate == 0.25
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3, model.layer4)] == [1, 1, 1, 1]
    assert model._model_args["layers"] == (1, 1, 1, 1)


def test_our_entry_under_timms_own_name():
    """Registered over timm's, the entry does not call itself."""
    registered = zoo.register_with_timm(override=True)
    assert "resnetrs50" in registered
    assert timm.create_model("resnetrs50", num_classes=3)(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_recipes_are_the_papers():
    """The same for all, but for what grows with depth: image size, dropout, RandAugment and stochastic depth."""
    grown = []
    for name in FIGURES:
        config = load_config(TrainingConfig, f"configs/vision/imagenet1k/{name}.yaml")
        assert config.model.name == name
        optimizer, schedule = config.optimizer, config.scheduler
        assert (optimizer.opt, optimizer.lr, config.train.global_batch_size) == ("momentum", 1.6, 4096)
        assert (optimizer.momentum, optimizer.weight_decay) == (0.9, 4e-5)
        assert (schedule.sched, schedule.epochs) == ("cosine", 350)
        assert (config.loss.smoothing, config.train.model_ema) == (0.1, True)
        assert config.data.input_size == zoo.model_info(name).input_size
        magnitude = re.fullmatch(r"rand-m(\d+)-n2", config.augment.aa or "")
        assert magnitude is not None
        drops = [config.model.args.get(key, 0.0) for key in ("drop_rate", "drop_path_rate")]
        grown.append((*config.data.input_size[1:], int(magnitude[1]), *drops))
    assert grown[0][-2:] == (0.25, 0.0)
    assert grown[-1][-2:] == (0.4, 0.1)
    for values in zip(*grown, strict=True):
        assert list(values) == sorted(values)


@pytest.mark.parametrize("arguments", [{"layers": (1, 1)}, {"channels": (8,) * 5}])
def test_there_are_four_stages(arguments):
    with pytest.raises(ConfigError, match=r"has four stages: .* has [25]\."):
        zoo.create_model("resnetrs_test", **arguments)
