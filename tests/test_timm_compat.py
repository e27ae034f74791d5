"""`register_with_timm`, in processes of their own: it changes timm's registry."""

import pytest

from tests.launcher import python

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
