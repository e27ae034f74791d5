"""`register_with_timm`, in processes of their own, as it changes timm's registry; and timm's own models here."""

import re

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants

import zoo
from tests.launcher import python
from zoo.cli import main
from zoo.errors import CheckpointError, ConfigError
from zoo.loading import load_model, model_task
from zoo.publishing import publish

PRELUDE = """
import timm, torch, zoo
from zoo.models.metaformer import MetaFormer
"""


def run(code: str) -> str:
    done = python("-c", PRELUDE + code)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def test_without_override_timm_keeps_its_own():
    run("""
added = zoo.register_with_timm()
assert "identityformer_s12" in added and "randformer_m48" in added and "poolformer_s12" not in added, added
assert not isinstance(timm.create_model("poolformer_s12"), MetaFormer)
model = timm.create_model("identityformer_s12", num_classes=7, depths=(1, 1, 1, 1))
assert isinstance(model, MetaFormer)
assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)
assert model.pretrained_cfg["hf_hub_id"] == "sail/dl"
assert model.pretrained_cfg["hf_hub_filename"] == "identityformer/identityformer_s12.pth"
assert timm.create_model("randformer_s12", img_size=64)(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
assert timm.list_models("randformer*") == zoo.list_models("randformer*")
""")


def test_override_puts_ours_everywhere():
    run("""
theirs = timm.create_model("poolformerv2_s12").eval()
assert zoo.register_with_timm(override=True) == zoo.list_models(task="vision")
ours = timm.create_model("poolformerv2_s12").eval()
assert isinstance(ours, MetaFormer) and not isinstance(theirs, MetaFormer)
ours.load_state_dict(theirs.state_dict())
images = torch.randn(2, 3, 96, 96)
torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)

for tag in ("sail_in1k_384", "sail_in22k"):
    cfg = timm.create_model(f"caformer_s18.{tag}", device="meta").pretrained_cfg
    assert cfg["tag"] == tag and cfg["hf_hub_id"] == f"timm/caformer_s18.{tag}", cfg
assert timm.create_model("caformer_s18.sail_in22k", device="meta").num_classes == 21841
assert "convformer_b36.sail_in22k_ft_in1k_384" in timm.list_pretrained("convformer_b36*")

for feature_cls in ("list", "getter", "dict", "hook"):
    model = timm.create_model("poolformer_s12", depths=(1, 1, 1, 1), features_only=True, feature_cls=feature_cls)
    maps = model(images)
    maps = maps.values() if feature_cls == "dict" else maps
    assert [m.shape[1] for m in maps] == [64, 128, 320, 512]
model = timm.create_model("poolformer_s12", features_only=True, out_indices=(1, 2))
assert model.feature_info.reduction() == [8, 16]
assert timm.create_model("poolformer_s12", dtype=torch.bfloat16).stem.conv.weight.dtype == torch.bfloat16
""")


def test_timm_loads_a_local_file_into_our_model(tmp_path):
    run(f"""
zoo.register_with_timm(override=True)
model = timm.create_model("poolformer_s12", depths=(1, 1, 1, 1))
torch.save(model.state_dict(), {str(tmp_path / "weights.pth")!r})
overlay = dict(file={str(tmp_path / "weights.pth")!r})
again = timm.create_model(
    "poolformer_s12", depths=(1, 1, 1, 1), pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10, in_chans=1
)
assert torch.equal(again.stages[1].blocks[0].mlp.fc1.weight, model.stages[1].blocks[0].mlp.fc1.weight)
torch.testing.assert_close(again.stem.conv.weight, model.stem.conv.weight.sum(1, keepdim=True))
assert again(torch.randn(1, 1, 64, 64)).shape == (1, 10)
""")


@pytest.mark.parametrize("authors", [True, False])
def test_saved_folders_open_the_same_in_timm(tmp_path, authors):
    """With the zoo's models in timm's registry, the authors' PoolFormer head and timm's both come back."""
    run(f"""
zoo.register_with_timm(override=True)
args = dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), stem_kernel_size=3, head_norm_first={authors})
model = zoo.create_model("poolformer_s12", num_classes=5, **args).eval()
for parameter in model.head.norm.parameters():
    torch.nn.init.normal_(parameter)
source = "local-dir:" + str(zoo.save_pretrained(model, {str(tmp_path / "saved")!r}))
images = torch.randn(2, 3, 64, 64)
torch.testing.assert_close(timm.create_model(source, pretrained=True).eval()(images), model(images))
torch.testing.assert_close(zoo.create_model(source).eval()(images), model(images))

from timm.models._hub import save_for_hf
again = timm.create_model(source, pretrained=True).eval()
for number, saved in enumerate((model, again)):  # timm's own way of saving keeps the head as well
    folder = {str(tmp_path)!r} + f"/timm{{number}}"
    save_for_hf(saved, folder, safe_serialization=True)
    for create in (zoo.create_model, timm.create_model):
        found = create(f"local-dir:{{folder}}", pretrained=True).eval()
        torch.testing.assert_close(found(images), model(images))
""")


def test_a_users_model_goes_to_timm_too():
    run("""
@zoo.register
class tiny_net(torch.nn.Sequential):
    def __init__(self, num_classes=10):
        super().__init__(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
                         torch.nn.Linear(4, num_classes))

assert "tiny_net" in zoo.register_with_timm()
assert timm.create_model("tiny_net", num_classes=6)(torch.randn(1, 3, 8, 8)).shape == (1, 6)
assert "tiny_net" in zoo.register_with_timm(), "again, after a first call"
""")


@pytest.mark.parametrize("name", [pytest.param("convformer_s18", marks=pytest.mark.slow), "caformer_s18"])
def test_logits_equal_timms_with_timms_epsilon(name):
    run(f"""
theirs = timm.create_model({name!r}, num_classes=11).eval()
ours = zoo.create_model({name!r}, num_classes=11, mlp_head_eps=1e-6).eval()
ours.load_state_dict(theirs.state_dict())
images = torch.randn(1, 3, 64, 64)
torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
""")


def test_timms_own_stay_timms_by_their_full_name():
    run("""
from zoo.loading import create_timm_model
from zoo.profiling.resolve import build
cfg = timm.models.get_pretrained_cfg("poolformer_s12").to_dict()
zoo.register_with_timm(override=True)
zoo.register_with_timm(override=True)
for model in (build("timm/poolformer_s12"), create_timm_model("timm/poolformer_s12", num_classes=3)):
    assert type(model).__module__.startswith("timm."), type(model)
assert create_timm_model("timm/poolformer_s12").pretrained_cfg["hf_hub_id"] == cfg["hf_hub_id"]
assert isinstance(timm.create_model("poolformer_s12"), MetaFormer), "and ours are back in their place"
""")


def test_published_weights_are_those_of_the_tag(tmp_path):
    """Files of one name, averaged weights beside the last, a zip archive, arguments that belong to the weights."""
    run(f"""
import functools, http.server, threading, zipfile
from pathlib import Path

site = Path({str(tmp_path / "site")!r})
for tag in "abc":
    (site / tag).mkdir(parents=True)

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{{server.server_port}}/"
facts = dict(license="mit", num_classes=2, input_size=(3, 8, 8))
W = zoo.registry.Weights
weights = (
    W(tag="one", url=url + "a/model.pth", **facts),
    W(tag="two", url=url + "b/model.pth", use_ema=False, args=dict(scale=3.0), **facts),
    W(tag="three", url=url + "c/model.zip", filename="in/model.pth", **facts),
)

@zoo.register(weights=weights, input_size=(3, 8, 8), classifier="head")
class flat_net(torch.nn.Module):
    def __init__(self, num_classes=2, in_chans=3, scale=1.0):
        super().__init__()
        self.num_classes, self.num_features, self.scale = num_classes, in_chans * 64, scale
        self.head = torch.nn.Linear(self.num_features, num_classes)

    def forward(self, x):
        return self.head(x.flatten(1)) * self.scale

def state(value):
    return {{"module.head.weight": torch.full((2, 192), value), "module.head.bias": torch.zeros(2)}}

torch.save({{"net": state(1.0)}}, site / "a/model.pth")
torch.save({{"state_dict": state(2.0), "state_dict_ema": state(9.0)}}, site / "b/model.pth")
torch.save(state(4.0), site / "c/model.pth")
with zipfile.ZipFile(site / "c/model.zip", "w") as archive:
    archive.write(site / "c/model.pth", "in/model.pth")
    archive.write(site / "a/model.pth", "other.pth")

zoo.register_with_timm()
images = torch.full((1, 3, 8, 8), 1 / 192)
for tag, wanted in (("one", 1.0), ("two", 6.0), ("three", 4.0)):
    cache = {str(tmp_path / "cache")!r}
    for create in (zoo.create_model, timm.create_model):
        model = create(f"flat_net.{{tag}}", pretrained=True, cache_dir=cache)
        torch.testing.assert_close(model(images), torch.full((1, 2), wanted))
        assert "state_dict" not in model.pretrained_cfg
    again = zoo.create_model("local-dir:" + str(zoo.save_pretrained(model, {str(tmp_path)!r} + f"/{{tag}}")))
    assert torch.equal(again(images), model(images))
model = timm.create_model("flat_net.one", pretrained=True, cache_dir=cache, num_classes=5)
assert model(images).shape == (1, 5)
overlay = dict(file=str(site / "c/model.pth"))  # one's own, in the place of those
model = timm.create_model("flat_net.two", pretrained=True, pretrained_cfg_overlay=overlay)
torch.testing.assert_close(model(images), torch.full((1, 2), 12.0))
server.shutdown()
""")


def test_sizes_for_evaluation_are_timms():
    run("""
names = ("ese_vovnet19b_dw", "fbnetv3_b", "resnetrs50")
keys = ("test_input_size", "test_crop_pct")
theirs = [[timm.models.get_pretrained_cfg(name).to_dict().get(key) for key in keys] for name in names]
assert any(cfg[0] for cfg in theirs)
assert [[zoo.create_model(name, device="meta").pretrained_cfg.get(key) for key in keys] for name in names] == theirs
zoo.register_with_timm(override=True)
assert [[timm.models.get_pretrained_cfg(name).to_dict().get(key) for key in keys] for name in names] == theirs
""")


def test_a_published_model_of_timms_opens_by_its_place(hub, tmp_path, monkeypatch):
    """As its card says it, by every command."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    model = timm.create_model("resnet18", num_classes=3)
    folder = zoo.save_pretrained(model, tmp_path / "saved")
    publish(folder, "me/theirs", license="mit")
    found = load_model("hf-hub:me/theirs").eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(found(images), model.eval()(images))
    assert zoo.profile("hf-hub:me/theirs").params == sum(p.numel() for p in model.parameters())
    assert model_task("hf-hub:me/theirs") == "vision"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.safetensors", lambda whole: whole[: len(whole) // 2], "it was cut short or changed"),
        ("empty.safetensors", lambda whole: b"", "is empty"),
        ("list.pth", lambda whole: None, "holds a list and no state dict"),
        ("nowhere.pth", None, "There is no checkpoint .*nowhere.pth"),
    ],
)
def test_what_is_no_checkpoint_of_timms_models(name, content, message, tmp_path, capsys):
    path = tmp_path / name
    if content is not None:
        model = timm.create_model("resnet18")
        whole = safetensors.torch.save(model.state_dict())
        found = content(whole)
        torch.save([1, 2], path) if found is None else path.write_bytes(found)
    with pytest.raises(CheckpointError, match=message):
        load_model("timm/resnet18", str(path))
    assert main(["export", "timm/resnet18", str(tmp_path / "out"), "--to", "onnx", "--checkpoint", str(path)]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_damaged_folder_of_timms_model(tmp_path):
    folder = zoo.save_pretrained(timm.create_model("resnet18"), tmp_path / "saved")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"timm does not make 'local-dir:.*saved'"):
        load_model(str(folder))


def test_saved_models_that_timm_has_open_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = zoo.create_model("ese_vovnet19b_dw", num_classes=3).eval()
    with torch.no_grad():
        model.head.fc.weight.normal_()
    folder = zoo.save_pretrained(model, tmp_path / "saved", labels=["cat", "dog", "hen"])
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(theirs(images).logits, model(images))
    assert theirs.config.id2label == {0: "cat", 1: "dog", 2: "hen"}
