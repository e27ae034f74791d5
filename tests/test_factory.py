"""`create_model`: names, tags, arguments, and building without waste."""

import shutil

import pytest
import torch
from torch import nn

import zoo
from zoo.errors import CheckpointError, ConfigError, UnknownModelError
from zoo.layers.init import materialize, on_meta
from zoo.registry import _entries

TINY = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}


@pytest.fixture
def registry():
    """Forget what a test registers."""
    before = dict(_entries)
    yield
    _entries.clear()
    _entries.update(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(path, state dict) of a tiny PoolFormer."""
    state = zoo.create_model("poolformer_s12", pretrained=False, **TINY).state_dict()
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save(state, path)
    return path, state


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(UnknownModelError, match=r"poolformer_s13.*Did you mean.*poolformer_s12"):
        zoo.create_model("poolformer_s13")
    with pytest.raises(UnknownModelError, match=r"no weights tagged 'sail_in1'\. Did you mean sail_in1k"):
        zoo.create_model("poolformer_s12.sail_in1")
    with pytest.raises(UnknownModelError, match="There are: sail_in1k"):
        zoo.create_model("poolformer_s12", pretrained="mine")
    with pytest.raises(ConfigError, match="A model name is a string"):
        zoo.create_model(12)
    with pytest.raises(ConfigError, match="which weights"):
        zoo.create_model("caformer_s18.sail_in1k", pretrained="sail_in22k")


def test_places_that_are_written_otherwise(tmp_path, monkeypatch, checkpoint):
    monkeypatch.chdir(tmp_path)
    zoo.save_pretrained(zoo.create_model("poolformer_s12", **TINY), tmp_path / "mine")
    for name, message in (
        ("mine", r"no model called 'mine'\. For the model in that folder, write local-dir:mine"),
        ("./mine", r"no model called './mine'\. For the model in that folder, write local-dir:./mine"),
        (" hf-hub:me/r", "Write hf-hub:me/r"),
        ("Local-Dir:mine", "Write local-dir:mine"),
        ("local-dir:miin", r"no folder 'miin'\. Did you mean mine\?"),
        ("local-dir:", "names no folder"),
    ):
        with pytest.raises((UnknownModelError, CheckpointError), match=message):
            zoo.create_model(name)
    shutil.copy(checkpoint[0], tmp_path / "stray.pth")
    model = zoo.create_model("poolformer_s12", checkpoint_path="", **TINY)  # timm's default: none
    assert not hasattr(model, "load_report")
    with pytest.raises(CheckpointError, match="The name of a checkpoint is empty"):
        zoo.load_checkpoint(model, "")


def test_arguments_of_timms_networks_are_checked():
    for arguments, message in (
        ({"drop_path_rate": -1}, "drop_path_rate must be a number from 0"),
        ({"drop_rate": 7}, "drop_rate must be a number from 0"),
        ({"features_only": True, "output_stride": 16}, r"cannot be built with output_stride=16, .*: AssertionError"),
    ):
        with pytest.raises(ConfigError, match=message):
            zoo.create_model("vovnet_test", **arguments)


@pytest.mark.parametrize("name", ["caformer_test", "pfnet_test", "snnet_test", "sret_test"])
def test_the_size_that_a_model_is_made_for_is_its_input_size(name, tmp_path):
    model = zoo.create_model(name, img_size=(96, 64), in_chans=1)
    folder = zoo.save_pretrained(model, tmp_path / "saved")
    for made in (model, zoo.create_model(f"local-dir:{folder}")):
        assert tuple(made.pretrained_cfg["input_size"][1:]) == (96, 64)
        assert zoo.profile(made).input_size == (1, 96, 64)


def test_a_tag_sets_classes_and_preprocessing():
    model = zoo.create_model("caformer_s18.sail_in22k", pretrained=False, device="meta")
    assert model.num_classes == 21841
    large = zoo.create_model("caformer_s18.sail_in1k_384", pretrained=False, device="meta")
    assert large.pretrained_cfg["input_size"] == (3, 384, 384)
    assert large.pretrained_cfg["pool_size"] == (12, 12)
    assert zoo.create_model("caformer_s18.sail_in22k", pretrained=False, device="meta", num_classes=4).num_classes == 4


def test_none_is_a_value():
    model = zoo.create_model("poolformer_s12", pretrained=False, layer_scale_init=None, **TINY)
    assert not any("layer_scale" in key for key in model.state_dict())


def test_no_weights_on_the_meta_device():
    with pytest.raises(ConfigError, match="meta device has no memory"):
        zoo.create_model("poolformer_s12", pretrained=True, device="meta")


def test_arguments_are_kept_for_export():
    model = zoo.create_model("poolformer_s12", pretrained=False, num_classes=3, token_mixers=nn.Identity, **TINY)
    # a class cannot be written down; the head, which timm has otherwise, always is
    assert model._model_args == {**TINY, "num_classes": 3, "head_norm_first": True}


def test_published_arguments_are_those_of_the_weights():
    info = zoo.model_info("poolformer_s12")
    assert info.weights[0].tag == "sail_in1k"
    assert zoo.create_model("poolformer_s12", pretrained=False).head.norm_first


def test_checkpoint_path(checkpoint):
    path, state = checkpoint
    model = zoo.create_model("poolformer_s12", checkpoint_path=path, **TINY)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not model.load_report.dropped
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    wide = zoo.create_model("poolformer_s12", checkpoint_path=path, dtype=torch.float64, **TINY)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}


def test_another_head_and_stem_keep_the_rest(checkpoint):
    path, state = checkpoint
    torch.manual_seed(0)
    model = zoo.create_model("poolformer_s12", checkpoint_path=path, num_classes=6, in_chans=1, **TINY)
    assert set(model.load_report.dropped) == {"head.fc.weight", "head.fc.bias"}
    assert "1000 classes" in str(model.load_report)
    assert model.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.3)  # initialised as published
    assert not model.head.fc.bias.any()
    assert torch.equal(model.stages[3].blocks[0].mlp.fc2.weight, state["stages.3.blocks.0.mlp.fc2.weight"])
    torch.testing.assert_close(model.stem.conv.weight, state["stem.conv.weight"].sum(1, keepdim=True))


def test_features_with_weights(checkpoint):
    path, _ = checkpoint
    whole = zoo.create_model("poolformer_s12", checkpoint_path=path, **TINY).eval()
    for feature_cls in ("list", "getter"):
        maps = zoo.create_model(
            "poolformer_s12",
            checkpoint_path=path,
            features_only=True,
            out_indices=(0, 3),
            feature_cls=feature_cls,
            **TINY,
        ).eval()
        images = torch.randn(1, 3, 64, 64)
        for ours, expected in zip(
            maps(images), whole.forward_intermediates(images, indices=[0, 3], intermediates_only=True), strict=True
        ):
            torch.testing.assert_close(ours, expected)


def test_weights_that_do_not_fit(checkpoint):
    path, _ = checkpoint
    with pytest.raises(CheckpointError, match=r"(?s)does not fit poolformer_s12.*misshapen"):
        zoo.create_model("poolformer_s12", checkpoint_path=path, depths=(1, 1, 1, 1), dims=(8, 16, 24, 48))
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        zoo.create_model("poolformer_s12", checkpoint_path=path.with_name("gone.pth"))


def test_nothing_is_initialised_that_weights_overwrite(checkpoint, monkeypatch):
    """With weights no random number is drawn, and without them each tensor is drawn once."""
    path, _ = checkpoint
    drawn = []
    real = nn.init.normal_
    monkeypatch.setattr(
        nn.init, "normal_", lambda tensor, *a, **k: drawn.append(tensor.device) or real(tensor, *a, **k)
    )
    zoo.create_model("poolformer_s12", checkpoint_path=path, **TINY)
    assert not [device for device in drawn if device.type != "meta"]
    model = zoo.create_model("poolformer_s12", pretrained=False, **TINY)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) or getattr(m, "kernel_size", None) == (1, 1)]
    assert len([device for device in drawn if device.type != "meta"]) == len(linear)


class Plain(nn.Module):
    """A user's model that knows nothing of the meta device: its buffer is made in the constructor alone."""

    def __init__(self, num_classes: int = 10, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.fc = nn.Linear(width, num_classes)
        self.register_buffer("offset", torch.arange(width).float(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).mean((2, 3)) + self.offset)


@pytest.mark.usefixtures("registry")
def test_a_users_own_model(tmp_path):
    zoo.register(name="plain_net", args={"width": 6}, classifier="fc", first_conv="conv")(Plain)
    model = zoo.create_model("plain_net", num_classes=3)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 3)
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    again = zoo.create_model("plain_net", num_classes=3, checkpoint_path=tmp_path / "plain.pt")
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(again(images), model(images))
    assert torch.equal(again.offset, torch.arange(6).float())
    with pytest.raises(ConfigError, match=r"no argument 'widht'\. Did you mean width"):
        zoo.create_model("plain_net", widht=3)
    with pytest.raises(ConfigError, match="feature_info"):
        zoo.create_model("plain_net", features_only=True)
    assert zoo.model_info("plain_net").params == 3 * 9 * 6 + 6 + 6 * 10 + 10


class Tied(nn.Module):
    """Two layers that share a weight, and a module with a part that checkpoints leave out."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.fc = Shifted(4, num_classes)

    def init_module(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            nn.init.constant_(parameter, 0.25)
        if isinstance(module, Shifted):
            nn.init.constant_(module.get_buffer("shift"), 7.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.second(self.first(x)))


class Shifted(nn.Linear):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("shift", torch.zeros(1), persistent=False)


@pytest.mark.usefixtures("registry")
def test_shared_tensors_stay_shared_and_loaded_ones_stay_loaded(tmp_path):
    zoo.register(name="tied_net")(Tied)
    model = zoo.create_model("tied_net")
    assert model.first.weight is model.second.weight
    assert (model.first.weight == 0.25).all()
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    state["second.weight"] = state["first.weight"]
    torch.save(state, tmp_path / "tied.pt")
    again = zoo.create_model("tied_net", checkpoint_path=tmp_path / "tied.pt")
    assert again.first.weight is again.second.weight
    assert torch.equal(again.fc.weight, state["fc.weight"])
    assert again.fc.shift.item() == 7.0


@pytest.mark.parametrize("options", [{"features_only": True}, {"out_indices": (1,)}, {"feature_cls": "list"}], ids=str)
def test_language_models_have_no_feature_maps(options):
    with pytest.raises(ConfigError, match="smollm_135m is a language model, which has no feature maps"):
        zoo.create_model("smollm_135m", device="meta", **options)
    for argument in ("num_classes", "in_chans"):
        with pytest.raises(ConfigError, match=f"smollm_135m has no argument '{argument}'"):
            zoo.create_model("smollm_135m", device="meta", **{argument: 3})
    with pytest.raises(ConfigError, match="smollm_135m is made for language"):
        zoo.create_model("smollm_135m", device="meta", task="vision")


def test_tensors_are_allocated_as_they_lie_unless_places_are_shared():
    class Model(nn.Module):
        one: torch.Tensor
        gaps: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last))
            self.register_buffer("one", torch.ones(1).expand(5))
            self.register_buffer("gaps", torch.zeros(6, 6)[:, ::2])

        def init_module(self, module: nn.Module) -> None:
            for tensor in (self.weight, self.one, self.gaps):
                nn.init.uniform_(tensor)

    with on_meta():
        model = Model()
    materialize(model)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.one.is_contiguous()
    assert model.gaps.untyped_storage().nbytes() == 18 * 4
