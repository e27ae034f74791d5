"""`optimize_for_inference`: every registered model computes the same, faster; what it folds and what it leaves."""

import copy
import types

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import zoo
from tests.models import SIZE, create, each_vision_model
from zoo.errors import ConfigError
from zoo.layers.convnext import FastConvNeXtStage
from zoo.layers.folding import batch_norm_affine, fold_affine, fold_batch_norm, fold_scale
from zoo.layers.packed import PackedConv2d, PackedLinear
from zoo.models.metaformer import StarReLU
from zoo.models.simplenet import Layer
from zoo.registry import get_entry

models = pytest.mark.parametrize("name", each_vision_model())
few_models = pytest.mark.parametrize("name", each_vision_model(few=True))


@torch.no_grad()
def randomize(model, seed=0):
    """Weights as unlike their initial values as trained ones: nothing that is folded may be 1 or 0."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor):
        return torch.rand(tensor.shape, generator=generator).to(tensor) * 2 - 1

    for key, parameter in model.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim else 1
        if max(parameter.shape, default=1) == parameter.numel():  # a vector, of whatever shape: norm, scale or bias
            shift = key.rpartition(".")[2].startswith("bias")
            parameter.copy_(0.1 * uniform(parameter) if shift else 1 + 0.5 * uniform(parameter))
        else:
            parameter.copy_(uniform(parameter) * (3 / fan_in) ** 0.5)
    for key, buffer in model.named_buffers():
        if key.endswith("running_mean"):
            buffer.copy_(0.1 * uniform(buffer))
        elif key.endswith("running_var"):
            buffer.copy_(1 + 0.5 * uniform(buffer))
    return model.eval()


def images(size=SIZE, batch=2):
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def close(found, expected):
    """Within 1e-5 of the largest value."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@models
@torch.no_grad()
def test_equals_the_model(name):
    model = randomize(create(name))
    state = copy.deepcopy(model.state_dict())
    fast = zoo.optimize_for_inference(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()), "the model was changed"
    assert not fast.training
    assert not any(parameter.requires_grad for parameter in fast.parameters())

    sizes = [SIZE] if get_entry(name).fixed_input_size else [SIZE, (96, 64)]
    for size in sizes:
        batch = images(size)
        untouched = batch.clone()
        close(fast(batch), model(batch))
        assert torch.equal(batch, untouched), "the input was written over"
        close(fast(batch), model(batch))  # and again: nothing of the first call is kept
    batch = images()
    final, maps = fast.forward_intermediates(batch)
    expected_final, expected_maps = model.forward_intermediates(batch)
    close(final, expected_final)
    for found, expected in zip(maps, expected_maps, strict=True):
        close(found, expected)
    close(fast.forward_features(batch), expected_final)
    close(fast.forward_head(final), model.forward_head(expected_final))
    close(fast.forward_head(final, pre_logits=True), model.forward_head(expected_final, pre_logits=True))
    close(fast.to(memory_format=torch.channels_last)(batch), model(batch))
    if not name.startswith(("eupe_test", "eupe_vit")):  # timm's transformers take no empty batch
        assert fast(batch[:0]).shape == model(batch[:0]).shape


@models
@torch.no_grad()
def test_who_watches_operators_sees_pytorchs(name):
    """`FlopCounterMode` finds the model's products, but for kernels that were merged; fake tensors pass through."""
    model = create(name).eval()
    fast = zoo.optimize_for_inference(model)
    batch = images()
    fast(batch)  # what is packed stays packed
    flops = []
    for module in (model, fast):
        with FlopCounterMode(display=False) as counter:
            module(batch)
        flops.append(counter.get_total_flops())
    assert 0.97 * flops[0] <= flops[1] <= flops[0]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert fast(mode.from_tensor(batch)).shape == model(mode.from_tensor(batch)).shape


@models
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
def test_vmap_over_images(name):
    model = randomize(create(name))
    fast = zoo.optimize_for_inference(model)
    close(torch.func.vmap(lambda image: fast(image[None])[0])(images()), model(images()))


@few_models
@torch.no_grad()
def test_compiles_and_exports(name):
    model = randomize(create(name))
    fast = zoo.optimize_for_inference(model)
    expected = model(images())
    close(torch.compile(fast, backend="aot_eager", fullgraph=True)(images()), expected)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(fast, (images(),), dynamic_shapes=({0: batch},)).module()
    close(exported(images()), expected)
    close(exported(images(batch=3)), model(images(batch=3)))


@models
@torch.no_grad()
def test_features(name):
    """In timm's wrappers, which take the model apart ("list"), hold it ("getter") or hook into it ("hook")."""
    kinds = ["getter", "hook"] if name.startswith(("eupe_vit", "snnet")) else ["list", "getter", "hook"]
    feature_cls = kinds[zoo.list_models(task="vision").index(name) % len(kinds)]
    model = randomize(create(name, features_only=True, feature_cls=feature_cls))
    for found, expected in zip(zoo.optimize_for_inference(model)(images()), model(images()), strict=True):
        close(found, expected)


@pytest.mark.parametrize("name", ["poolformer_s12", "poolformerv2_s12", "randformer_s12"])
def test_computes_in_lower_precision_under_autocast(name):
    """In place, and where gradients flow."""
    model = randomize(create(name))
    fast = zoo.optimize_for_inference(model)
    with torch.no_grad():
        expected = model(images())
    for needs_gradients in (False, True):
        batch = images().requires_grad_(needs_gradients)
        with torch.autocast("cpu", torch.bfloat16):
            found = fast(batch)
        assert found.dtype == torch.bfloat16
        assert (found - expected).abs().max() <= 3e-2 * expected.abs().max()


@pytest.mark.slow
@models
@torch.no_grad()
def test_compiles_to_machine_code(name):
    model = randomize(create(name))
    close(torch.compile(zoo.optimize_for_inference(model))(images()), model(images()))


@pytest.mark.parametrize(
    ("name", "options", "stages"),
    [
        ("convnext_tiny", {}, 4),
        ("convnext_tiny", {"ls_init_value": None, "stem_type": "overlap", "output_stride": 16}, 4),
        ("convnext_tiny", {"conv_mlp": True}, 0),
        ("convnext_tiny", {"act_layer": "silu"}, 0),
        ("convnextv2_tiny", {}, 0),
    ],
    ids=str,
)
@torch.no_grad()
def test_timms_convnexts(name, options, stages):
    model = timm.create_model(name, depths=(1, 2, 1, 1), dims=(8, 16, 24, 32), num_classes=5, **options).eval()
    fast = zoo.optimize_for_inference(randomize(model))
    assert sum(isinstance(module, FastConvNeXtStage) for module in fast.modules()) == stages
    close(fast(images()), model(images()))
    for found, expected in zip(
        fast.forward_intermediates(images())[1], model.forward_intermediates(images())[1], strict=True
    ):
        close(found, expected)


@torch.no_grad()
def test_maps_before_a_norm_are_as_they_were():
    """timm's GhostNet hands out what its first convolution gives, before the batch norm."""
    model = randomize(timm.create_model("ghostnet_050", num_classes=5).eval())
    fast = zoo.optimize_for_inference(model)
    close(fast(images()), model(images()))
    for found, expected in zip(
        fast.forward_intermediates(images())[1], model.forward_intermediates(images())[1], strict=True
    ):
        close(found, expected)
    norms = [sum(isinstance(module, nn.BatchNorm2d) for module in form.modules()) for form in (fast, model)]
    assert norms[0] == 1 < norms[1]


@torch.no_grad()
def test_a_forward_of_one_module_is_not_taken_for_that_of_its_class():
    model = randomize(nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)}).eval())

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = model["conv"], model["norm"]

        def forward(self, x):
            return self.norm(self.conv(x))

    normed = Normed().eval()
    close(zoo.optimize_for_inference(normed)(images()), normed(images()))
    normed.forward = types.MethodType(lambda self, x: self.conv(x), normed)
    close(zoo.optimize_for_inference(normed)(images()), normed.conv(images()))


@pytest.mark.parametrize("name", ["slak_test", "caformer_test", "eupe_convnext_tiny"])
@torch.no_grad()
def test_parts_that_are_watched_stay(name):
    model = create(name)
    seen = []
    model.stages[1].blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    fast = zoo.optimize_for_inference(model)
    assert type(fast.stages[1]) is type(model.stages[1])
    assert type(fast.stages[2]) is not type(model.stages[2])
    fast(images())
    assert len(seen) == 1


def adapted(layer):
    """`layer` as a class of its own, which adds to what it computes."""

    class Adapted(type(layer)):
        def forward(self, x):
            return super().forward(x) + 0.5

    layer.__class__ = Adapted


def negated(layer):
    plain = layer.forward
    layer.forward = lambda x: -plain(x)


def doubled(layer):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(layer, "weight", Double())


@pytest.mark.parametrize(
    ("name", "layer", "change"),
    [
        ("rmt_test", "stages.0.blocks.0.retention.q_proj", adapted),
        ("rmt_test", "stages.0.blocks.0.pos.conv", doubled),
        ("sret_test", "stages.0.blocks.0.shared.mlp.fc2", adapted),
        ("emo2_test", "stages.1.blocks.0.proj", negated),
        ("caformer_test", "stages.3.blocks.0.mlp.fc1", adapted),
        ("simplenet_test", "stages.0.blocks.0.bn", adapted),
    ],
)
@torch.no_grad()
def test_layers_that_were_changed_stay(name, layer, change):
    model = randomize(create(name))
    before = model(images())
    change(model.get_submodule(layer))
    assert (model(images()) - before).abs().max() > 1e-3 * before.abs().max()
    close(zoo.optimize_for_inference(model)(images()), model(images()))


def replace(model, kind, make):
    """Put `make(part)` in the place of every part of a kind."""
    for parent in list(model.modules()):
        for name, part in list(parent._modules.items()):
            if type(part) is kind:
                parent._modules[name] = make(part)


def leaky(kind):
    return lambda model: replace(model, kind, lambda part: nn.LeakyReLU(0.3))


def norms_of_batches(model):
    replace(model, nn.BatchNorm2d, lambda part: nn.BatchNorm2d(part.num_features, track_running_stats=False))


def norms_without_affine(model):
    replace(model, nn.BatchNorm2d, lambda part: nn.BatchNorm2d(part.num_features, affine=False).eval())


def norms_of_several_gpus(model):
    timm.layers.convert_sync_batchnorm(model)


def low_rank(model):
    def make(part):
        return nn.Sequential(nn.Linear(part.in_features, 4), nn.Linear(4, part.out_features))

    for block in model.stages[1].blocks:
        block.mlp.fc1 = make(block.mlp.fc1)


def first_block_dropped(model):
    model.stages[0].blocks[0] = nn.Identity()


def layer_appended(model):
    width = model.feature_info[2]["num_chs"]
    model.stages[2].blocks.append(nn.Conv2d(width, width, 3, padding=1))


def another_downsampling(model):
    width = model.feature_info[0]["num_chs"]
    model.stages[0].downsample = nn.Conv2d(width, width, 3, padding=1)


def dense_kernels(model):
    for block in model.stages[0].blocks:
        width = block.ffn.dwconv.conv.in_channels
        block.ffn.dwconv.conv = nn.Conv2d(width, width, 3, padding=1)


def head_with_activation(model):
    model.head.norm = timm.layers.BatchNormAct2d(model.head.norm.num_features)


def padding_that_counts(model):
    replace(model, nn.AvgPool2d, lambda part: nn.AvgPool2d(3, 1, 1))


def groups_of_norms(model):
    for part in model.modules():
        if isinstance(part, nn.GroupNorm):
            part.num_groups = 4


def shared_mlps(model):
    projections = model.stages[0].blocks[0].projections
    projections[1].mlp = projections[0].mlp


EXCHANGES = {
    "slak_test": [
        leaky(nn.GELU),
        lambda model: replace(model, nn.GELU, lambda part: nn.GELU("tanh")),
        lambda model: replace(model, nn.LayerNorm, lambda part: nn.RMSNorm(part.normalized_shape)),
        norms_of_batches,
        norms_without_affine,
        norms_of_several_gpus,
        low_rank,
        first_block_dropped,
        layer_appended,
        another_downsampling,
    ],
    "emo_test": [leaky(nn.SiLU), leaky(nn.ReLU), norms_of_batches, norms_without_affine, norms_of_several_gpus],
    "emo2_test": [leaky(nn.SiLU), leaky(nn.GELU), norms_of_batches, norms_of_several_gpus],
    "simplenet_test": [leaky(nn.ReLU), norms_of_batches, norms_without_affine, norms_of_several_gpus],
    "caformer_test": [leaky(StarReLU), first_block_dropped],
    "poolformer_s12": [first_block_dropped, padding_that_counts, groups_of_norms],
    "rmt_test": [leaky(nn.GELU), norms_of_batches, norms_of_several_gpus, dense_kernels, head_with_activation],
    "sret_test": [leaky(nn.GELU), leaky(nn.ReLU), shared_mlps],
    "vovnet_test": [leaky(nn.ReLU), norms_of_several_gpus],
}


@pytest.mark.parametrize(
    ("name", "change"), [(name, change) for name, changes in EXCHANGES.items() for change in changes]
)
@torch.no_grad()
def test_parts_that_were_exchanged_compute_as_they_do(name, change):
    model = randomize(create(name))
    change(model)
    randomize(model, seed=1)
    close(zoo.optimize_for_inference(model)(images()), model(images()))


@pytest.mark.parametrize(
    "change",
    [
        lambda stage: setattr(stage.blocks[0].mlp, "drop1", nn.Tanh()),
        lambda stage: setattr(stage.blocks[0].mlp, "drop2", nn.Tanh()),
        lambda stage: setattr(stage.blocks[0], "drop_path", nn.Tanh()),
        lambda stage: setattr(stage.blocks[0].mlp, "fc1", nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 64))),
        lambda stage: stage.blocks.append(nn.ReLU()),
        lambda stage: setattr(stage, "blocks", nn.Sequential()),
    ],
)
@torch.no_grad()
def test_parts_of_timms_convnext_that_were_exchanged(change):
    model = timm.create_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(16, 16, 16, 16))
    change(model.stages[0])
    randomize(model)
    close(zoo.optimize_for_inference(model)(images()), model(images()))


@torch.no_grad()
def test_what_a_subclass_builds_of_other_parts():
    class Leaky(Layer):
        def __init__(self, *args):
            super().__init__(*args)
            self.act = nn.LeakyReLU(0.3)

    model = randomize(Leaky(3, 8, 3, 1, 0.0))
    close(zoo.optimize_for_inference(model)(images()), model(images()))


@torch.no_grad()
def test_hooks_that_take_options_stay():
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
    model[0].register_forward_hook(lambda module, args, options, output: 2 * output, with_kwargs=True)
    model[0].register_forward_pre_hook(lambda module, args, options: ((args[0] + 1,), options), with_kwargs=True)
    x = torch.randn(1, 64, 8, 8)
    close(zoo.optimize_for_inference(model)(x), model(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@torch.no_grad()
def test_weights_that_hooks_compute_stay():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(512, 512)), nn.ReLU())
    x = torch.randn(3, 512)
    close(zoo.optimize_for_inference(model, inplace=True)(x), model(x))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layer", [lambda: nn.Linear(512, 512), lambda: nn.Conv2d(64, 64, 3, padding=1)])
def test_weights_that_change_in_inference_mode(layer, inplace):
    with torch.inference_mode():
        model = nn.Sequential(layer())
        fast = zoo.optimize_for_inference(model, inplace=inplace)
        x = torch.randn(2, 64, 8, 8) if isinstance(model[0], nn.Conv2d) else torch.randn(2, 512)
        before = fast(x)
        fast.load_state_dict({key: 2 * value for key, value in fast.state_dict().items()})
        close(fast(x), 2 * before)
        for parameter in fast.parameters():
            parameter.mul_(2)
        close(fast(x), 4 * before)


def test_weights_of_a_model_that_is_optimized_in_inference_mode_count_their_changes():
    """Without, they would be packed at every call."""
    model = create("caformer_test")
    with torch.inference_mode():
        fast = zoo.optimize_for_inference(model, inplace=True)
        assert not any(tensor.is_inference() for tensor in (*fast.parameters(), *fast.buffers()))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_scripted_parts_are_told():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    for scripted in (torch.jit.script(model), nn.Sequential(model, torch.jit.script(nn.ReLU()))):
        with pytest.raises(ConfigError, match=r"before torch\.jit\.script or trace"):
            zoo.optimize_for_inference(scripted)


@torch.no_grad()
def test_batch_norms_that_do_more_than_timms_stay():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8)).eval()
    x = torch.randn(2, 3, 8, 8)
    assert len(list(zoo.optimize_for_inference(plain).modules())) == 3
    dropped, hooked, synced = (copy.deepcopy(plain) for _ in range(3))
    dropped[1].drop = nn.Tanh()
    hooked[1].drop.register_forward_hook(lambda module, inputs, outputs: -outputs)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(synced)  # which does not call the activation
    for model in (dropped, hooked, synced, convert_sync_batchnorm(copy.deepcopy(plain))):
        close(zoo.optimize_for_inference(model)(x), model(x))


@pytest.mark.parametrize("bias", [torch.randn(1024)[::2], torch.randn(1).expand(512)], ids=["strided", "expanded"])
@torch.no_grad()
def test_biases_of_any_strides(bias):
    for layer, x in ((nn.Linear(512, 512), torch.randn(3, 512)), (nn.Conv2d(64, 512, 3), torch.randn(2, 64, 8, 8))):
        layer.bias = nn.Parameter(bias)
        expected = layer(x)
        close(zoo.optimize_for_inference(nn.Sequential(layer), inplace=True)(x), expected)


@few_models
@torch.no_grad()
def test_a_fast_form_of_a_fast_form(name):
    fast = zoo.optimize_for_inference(randomize(create(name)))
    close(zoo.optimize_for_inference(fast)(images()), fast(images()))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_layers_that_torch_quantised_stay():
    model = torch.ao.quantization.quantize_dynamic(zoo.create_model("caformer_test").eval(), {nn.Linear})
    images = torch.randn(1, 3, 64, 64)
    fast = zoo.optimize_for_inference(model)
    with torch.no_grad():
        torch.testing.assert_close(fast(images), model(images))


def test_a_fast_form_knows_the_modules_of_its_own_package():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return 2 * self.fc(x)

        def fast_form(self):
            return nn.Sequential(fold_scale(self.fc, torch.tensor(2.0)))

    model = nn.Sequential(Twice())
    fast = zoo.optimize_for_inference(model)
    assert type(fast[0]) is nn.Sequential
    close(fast(torch.ones(1, 4)), model(torch.ones(1, 4)))


# ---------------------------------------------------------------------------------------------------------- batch norms


def norms(model):
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_035", "tiny_vit_5m_224"])
@torch.no_grad()
def test_batch_norms_of_timms_models(name):
    """Of any model: those behind a convolution, with what timm's norm does besides."""
    model = randomize(timm.create_model(name))
    fast = zoo.optimize_for_inference(model)
    size = model.default_cfg["input_size"][1] if model.default_cfg.get("fixed_input_size") else SIZE
    close(fast(images(size)), model(images(size)))
    assert norms(model) > 10
    assert norms(fast) < norms(model) / 10
    assert zoo.optimize_for_inference(model, inplace=True) is model
    assert norms(model) == norms(fast)


class Odd(nn.Module):
    """Convolutions and batch norms that look alike but must stay apart."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, track_running_stats=kind != "no statistics")

    def forward(self, x, skip=None):
        y = self.conv(x)
        if skip is not None:
            y = y + skip
        if self.kind == "branching" and x.sum() > 0:
            return y
        match self.kind:
            case "used twice":
                return self.norm(y) + y
            case "called twice":
                return self.norm(self.conv(y)) + self.norm(y)
            case "weight read":
                return self.norm(y) * self.conv.weight.sum()
            case "other order":
                return self.conv(self.norm(x))
        return self.norm(y)


@pytest.mark.parametrize(
    "kind", ["used twice", "called twice", "weight read", "other order", "no statistics", "branching"]
)
@torch.no_grad()
def test_batch_norms_that_cannot_be_folded_stay(kind):
    model = randomize(Odd(kind))
    fast = zoo.optimize_for_inference(model)
    assert norms(fast) == 1
    batch = torch.randn(2, 4, 8, 8)
    close(fast(batch), model(batch))


@torch.no_grad()
def test_an_optional_argument_keeps_its_meaning():
    model = randomize(Odd("plain"))
    fast = zoo.optimize_for_inference(model)
    assert norms(fast) == 0
    close(fast(torch.ones(1, 4, 8, 8)), model(torch.ones(1, 4, 8, 8)))


@torch.no_grad()
def test_an_option_that_is_switched_keeps_its_meaning():
    class Optional(Odd):
        def forward(self, x, normed=True):
            y = self.conv(x)
            return self.norm(y) if normed else y

    model = randomize(Optional("plain"))
    fast = zoo.optimize_for_inference(model)
    for normed in (True, False):
        close(fast(torch.ones(1, 4, 8, 8), normed=normed), model(torch.ones(1, 4, 8, 8), normed=normed))


@pytest.mark.parametrize("name", ["poolformer_s12", "poolformerv2_s12", "slak_test", "timm resnet18"])
def test_forward_mode_and_function_transforms(name):
    """Packed weights know no derivatives but the plain layers' do."""
    if name.startswith("poolformer"):
        nhwc = torch.randn(1, 4, 3, 3).to(memory_format=torch.channels_last)
        try:
            torch.func.jvp(nn.GroupNorm(1, 4), (nhwc,), (nhwc,))
        except RuntimeError as error:  # torch 2.11
            pytest.skip(f"this PyTorch has no derivatives of group norms in channels_last: {error}")
    model = timm.create_model(name[5:]) if name.startswith("timm") else zoo.create_model(name, pretrained=False)
    fast = zoo.optimize_for_inference(randomize(model))
    model.requires_grad_(False)
    batch, tangent = images(), images().flip(0)
    fast(batch)  # with packed weights, which must not be taken again
    found, expected = (torch.func.jvp(module, (batch,), (tangent,)) for module in (fast, model))
    assert expected[1].abs().max() > 0
    for ours, plain in zip(found, expected, strict=True):
        assert (ours - plain).abs().max() <= 1e-4 * plain.abs().max()


def test_a_wrong_width_is_told_by_pytorch():
    fast = zoo.optimize_for_inference(nn.Sequential(nn.Linear(512, 512)))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fast(torch.ones(2, 256))
    fast = zoo.optimize_for_inference(nn.Sequential(nn.Conv2d(64, 64, 3)))
    with pytest.raises(RuntimeError, match="64 channels"):
        fast(torch.ones(2, 32, 8, 8))


def test_a_pruned_model_is_told_how_to_become_plain():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    prune.l1_unstructured(model[0], "weight", 0.5)
    for _ in range(2):  # a forward without gradients leaves a weight that could be copied
        with pytest.raises(
            ConfigError, match=r"Sequential has no weights of its own: .* whose remove\(module, 'weight'\)"
        ):
            zoo.optimize_for_inference(model)
        with torch.no_grad():
            model(images())
    prune.remove(model[0], "weight")
    close(zoo.optimize_for_inference(model)(images()), model(images()).detach())


@pytest.mark.parametrize("name", zoo.list_models("*_test", task="vision"))
@torch.no_grad()
def test_a_fast_forms_state_is_all_of_it(name):
    model, other = (randomize(create(name), seed) for seed in (0, 1))
    fast = zoo.optimize_for_inference(other)
    fast.load_state_dict(zoo.optimize_for_inference(model).state_dict())
    close(fast(images()), model(images()))


@pytest.mark.parametrize("name", ["poolformer_s12", "caformer_test", "slak_test"])
@torch.no_grad()
def test_a_fast_forms_hooks_are_called_and_what_they_return_is_taken(name):
    model = randomize(zoo.create_model(name, pretrained=False, num_classes=8, depths=(2, 2, 2, 2)))
    fast = zoo.optimize_for_inference(model)
    seen = []
    for module in (model, fast):
        module.stages[2].blocks[0].register_forward_hook(lambda module, args, output: -output)
    for layer in (part for key, part in fast.named_modules() if key.endswith(("fc2", "proj", "pwconv2"))):
        layer.register_forward_hook(lambda module, args, output: seen.append(module) or 2 * output)
    for layer in (part for key, part in model.named_modules() if key.endswith(("fc2", "proj", "pwconv2"))):
        layer.register_forward_hook(lambda module, args, output: 2 * output)
    batch = images(batch=3)
    close(fast(batch), model(batch))
    assert len(set(seen)) >= 8


@pytest.mark.parametrize("name", ["poolformer_s12", "caformer_test", "slak_test", "eupe_convnext_tiny"])
def test_a_fast_form_whose_stages_alone_learn(name):
    """No map is written over that the backward pass needs."""
    fast = zoo.optimize_for_inference(randomize(create(name)))
    expected = fast(images())
    fast.stages.requires_grad_(True)
    logits = fast(images())
    close(logits.detach(), expected)
    logits.square().sum().backward()
    found = [parameter.grad.clone() for parameter in fast.stages.parameters()]
    fast.zero_grad()
    fast.requires_grad_(True)(images()).square().sum().backward()  # nothing is written over
    for ours, plain in zip(found, (parameter.grad for parameter in fast.stages.parameters()), strict=True):
        assert (ours - plain).abs().max() <= 1e-4 * plain.abs().max()


@pytest.mark.parametrize("layer", [nn.Linear(512, 512), nn.Conv2d(64, 64, 3, padding=1)], ids=["linear", "conv"])
def test_packed_layers_whose_bias_alone_learns(layer):
    fast = zoo.optimize_for_inference(nn.Sequential(layer))
    x = torch.randn(2, 512) if isinstance(layer, nn.Linear) else torch.randn(2, 64, 8, 8)
    assert not fast(x).requires_grad
    fast[0].bias.requires_grad_(True)
    fast(x).sum().backward()
    torch.testing.assert_close(fast[0].bias.grad, torch.full_like(fast[0].bias, x[:, 0].numel()))


@torch.no_grad()
def test_layers_shared_between_parts_stay():
    conv = nn.Conv2d(4, 4, 1)
    model = randomize(nn.Sequential(nn.Sequential(conv, nn.BatchNorm2d(4)), nn.Sequential(conv, nn.BatchNorm2d(4))))
    fast = zoo.optimize_for_inference(model)
    assert norms(fast) == 2
    close(fast(torch.ones(1, 4, 2, 2)), model(torch.ones(1, 4, 2, 2)))


class Rectified(nn.Module):
    """Convolution, batch norm, ReLU; what else the parts are used for is `kind`."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(64, 64, 3, padding=1)
        self.norm = nn.BatchNorm2d(64)
        self.act = nn.ReLU()

    def forward(self, x):
        y = self.norm(self.conv(x))
        match self.kind:
            case "used twice":
                return self.act(y) + y
            case "called twice":
                return self.act(y) - self.act(x)
        return self.act(y)


@pytest.mark.parametrize("kind", ["alone", "used twice", "called twice", "hooked", "hooked before"])
@torch.no_grad()
def test_relu_is_joined_to_the_convolution_that_feeds_it_alone(kind):
    model = randomize(Rectified(kind))
    seen = []
    if kind == "hooked":
        model.act.register_forward_hook(lambda module, args, output: seen.append(args[0].clone()))
    if kind == "hooked before":
        model.act.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    fast = zoo.optimize_for_inference(model)
    assert isinstance(fast.conv, PackedConv2d)
    assert isinstance(fast.act, nn.Identity if kind == "alone" else nn.ReLU)
    batch = torch.randn(2, 64, 8, 8)
    close(fast(batch), model(batch))
    if kind.startswith("hooked"):
        close(seen[0], seen[1])


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@torch.no_grad()
def test_gelu_is_joined_to_the_linear_layer_before_it(approximate):
    model = randomize(nn.Sequential(nn.Linear(256, 512), nn.GELU(approximate), nn.Linear(512, 8)))
    fast = zoo.optimize_for_inference(model)
    assert [type(part) for part in fast] == [
        PackedLinear,
        nn.Identity if approximate == "none" else nn.GELU,
        nn.Linear,  # small: a packed one would take longer to call
    ]
    for shape in ((2, 256), (2, 5, 256), (0, 256), (256,)):
        tokens = torch.randn(shape)
        torch.testing.assert_close(fast(tokens), model(tokens), rtol=1e-5, atol=1e-5)
    close(torch.compile(fast)(torch.ones(3, 256)), model(torch.ones(3, 256)))


# -------------------------------------------------------------------------------------------------------------- folding


@pytest.mark.parametrize("groups", [1, 2, 4])
@torch.no_grad()
def test_folding_convolutions(groups):
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups, dtype=torch.float64)
    norm = randomize(nn.BatchNorm2d(8, dtype=torch.float64))
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(fold_batch_norm(conv, norm)(x), norm(conv(x)))
    scale = torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(fold_scale(conv, scale)(x), scale.view(-1, 1, 1) * conv(x))
    scale = torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(fold_affine(conv, scale)(x), conv(x * scale.view(-1, 1, 1)))
    with pytest.raises(ValueError, match="borders"):
        fold_affine(conv, scale, torch.randn(4))
    unpadded = nn.Conv2d(4, 8, 3, groups=groups, bias=False, dtype=torch.float64)
    before = randomize(nn.BatchNorm2d(4, dtype=torch.float64))
    torch.testing.assert_close(fold_affine(unpadded, *batch_norm_affine(before))(x), unpadded(before(x)))
    with pytest.raises(ValueError, match="running statistics"):
        fold_batch_norm(conv, nn.BatchNorm2d(8, track_running_stats=False))


@torch.no_grad()
def test_folding_linear_layers():
    linear = nn.Linear(4, 6, dtype=torch.float64)
    norm = randomize(nn.LayerNorm(4, dtype=torch.float64))
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    plain = nn.functional.layer_norm(x, (4,))
    torch.testing.assert_close(fold_affine(linear, norm.weight, norm.bias)(plain), linear(norm(x)))
    torch.testing.assert_close(fold_scale(linear, torch.tensor(3.0))(x), 3 * linear(x))


# ------------------------------------------------------------------------------------------------------------ bad input


def test_what_cannot_be_optimized():
    with pytest.raises(ConfigError, match=r"takes a torch\.nn\.Module"):
        zoo.optimize_for_inference("poolformer_s12")
    with pytest.raises(ConfigError, match="meta device"):
        zoo.optimize_for_inference(zoo.create_model("poolformer_s12", pretrained=False, device="meta"))


def test_an_optimised_model_is_not_saved_as_its_original(tmp_path):
    fast = zoo.optimize_for_inference(create("poolformer_s12"), inplace=True)
    with pytest.raises(ConfigError, match="that it was made from"):
        zoo.save_pretrained(fast, tmp_path / "model")


def test_benchmark_measures_fast_forms():
    """The flag reaches the result, and is refused where it makes no sense."""
    options = {"input_size": (3, SIZE, SIZE), "repeats": 1, "warmup": 0, "memory": False}
    (result,) = zoo.benchmark("poolformer_s12", optimize=True, **options)
    assert result.optimize
    assert result.latency_ms > 0
    with pytest.raises(ConfigError, match="for inference"):
        zoo.benchmark("poolformer_s12", optimize=True, mode="train", **options)


@torch.no_grad()
def test_packed_weights_follow_the_weights():
    """Weights changed in place, moved to another dtype, or asked for gradients."""
    conv = nn.Conv2d(4, 8, 3, padding=1)
    packed = PackedConv2d(copy.deepcopy(conv).requires_grad_(False), "gelu")
    x = torch.randn(2, 4, 9, 9)

    def expected():
        return nn.functional.gelu(nn.functional.conv2d(x, packed.weight, packed.bias, padding=1))

    close(packed(x), expected())
    packed.weight.mul_(2)
    close(packed(x), expected())
    other = copy.deepcopy(packed)
    other.weight.mul_(2)
    close(packed(x), expected())
    wide = packed.double()
    close(wide(x.double()), nn.functional.gelu(nn.functional.conv2d(x.double(), wide.weight, wide.bias, padding=1)))
    with torch.enable_grad():
        images_with_gradients = x.double().requires_grad_()
        packed(images_with_gradients).sum().backward()
    assert images_with_gradients.grad is not None


@torch.no_grad()
def test_packed_weights_follow_other_data():
    """Also where it lies at an address that the weight had before."""
    packed = PackedLinear(nn.Linear(256, 512)).requires_grad_(False)
    x = torch.randn(4, 256)
    for _ in range(40):
        close(packed(x), nn.functional.linear(x, packed.weight, packed.bias))
        other = packed.weight.neg()
        packed.weight.data = torch.empty(0)
        packed.weight.data = other.clone()


@torch.no_grad()
def test_packed_weights_suit_every_shape(capfd):
    """oneDNN wants another layout of a weight for other maps: none is to change it at every call."""
    conv = PackedConv2d(nn.Conv2d(512, 2048, 1)).requires_grad_(False)
    shapes = [(1, 512, 7, 7), (1, 512, 10, 10), (2, 512, 28, 28), (3, 512, 7, 7)]
    batches = [torch.randn(shape).to(memory_format=torch.channels_last) for shape in shapes]
    for x in batches:
        conv(x)
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        for x in batches:
            conv(x)
    calls = [line for line in capfd.readouterr().out.splitlines() if ",exec," in line]
    assert sum(",convolution," in line for line in calls) == len(shapes)
    assert not [line for line in calls if ",reorder," in line]


@pytest.mark.parametrize(("kernel", "groups"), [(3, 16), (1, 1), (3, 1)])
@torch.no_grad()
def test_a_single_image_stays_in_channels_last_whatever_its_batch_stride(kernel, groups):
    """Compiled code gives it 0, from which PyTorch cannot tell the layout."""
    conv = nn.Conv2d(16, 16, kernel, padding=kernel // 2, groups=groups)
    image = torch.randn(8, 8, 16).as_strided((1, 16, 8, 8), (0, 1, 128, 16))
    out = zoo.optimize_for_inference(nn.Sequential(conv))(image)
    assert out.stride() == (1024, 1, 128, 16)
    torch.testing.assert_close(out, conv(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act", ["none", "gelu"])
@pytest.mark.parametrize("size", [(7, 7), (1, 1), (3, 11), (9, 9)])
@torch.no_grad()
def test_a_batch_of_small_maps(size, act):
    """Taken as one image where weights are many; in whatever memory layout they come."""
    conv = PackedConv2d(nn.Conv2d(512, 1024, 1), act).requires_grad_(False)
    x, y = torch.randn(3, 512, *size), torch.randn(3, 1024, *size)
    expected = nn.functional.conv2d(x, conv.weight, conv.bias)
    expected = expected if act == "none" else nn.functional.gelu(expected)
    torch.compiler.reset()  # all cases share this code, which would be compiled for some of them alone
    compiled = torch.compile(lambda x, y: (conv(x), conv.add_to(y, x)), backend="aot_eager", fullgraph=True)
    for layout in (torch.contiguous_format, torch.channels_last):
        mine = x.to(memory_format=layout)
        close(conv(mine), expected)
        for found, wanted in zip(compiled(mine, y), (expected, y + expected), strict=True):
            close(found, wanted)
        total = y.clone(memory_format=layout)
        close(conv.add_to(total, mine), y + expected)


def image_gradient(model, dtype=torch.float32):
    batch = images().to(dtype).requires_grad_()
    model(batch)[:, 0].sum().backward()
    return batch.grad


@pytest.mark.parametrize("name", ["poolformerv2_s12", "caformer_s18"])
def test_gradients_with_respect_to_images(name):
    """As saliency and attacks want them, of the fast form as of the model."""
    model = randomize(create(name))
    close(image_gradient(zoo.optimize_for_inference(model)), image_gradient(model))


@models
def test_gradients_with_respect_to_images_of_every_model(name):
    """In float64, where rounding moves no pixel across the kink of a ReLU."""
    model = randomize(create(name)).double()
    fast = zoo.optimize_for_inference(model)
    found, expected = (image_gradient(one, torch.float64) for one in (fast, model))
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
