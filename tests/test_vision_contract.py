"""timm's contract, held by every registered vision model: a new entry is covered by being registered.

These are the checks of timm's own model suite (forward, backward, default configuration, classifier, features,
intermediates, tracing, FX) and those of ours (export, compile, precision, layout, layer decay, meta device).
"""

import contextlib
import copy
import inspect
import math
import sys

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from timm.models import group_parameters
from timm.models._features_fx import FeatureGraphNet
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import zoo
from tests.models import SIZE, create, each_vision_model, set_to_random
from zoo.errors import ConfigError
from zoo.registry import get_entry

few_models = pytest.mark.parametrize("name", each_vision_model(few=True))
models = pytest.mark.parametrize("name", each_vision_model())


def images(batch: int = 1, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def each(names: str | tuple[str, ...]) -> tuple[str, ...]:
    """A model may have several classifiers, and several stems."""
    return (names,) if isinstance(names, str) else names


@models
def test_forward_and_gradient_checkpointing(name):
    model = create(name).eval()
    with torch.no_grad():
        outputs = model(images(2))
    assert outputs.shape == (2, model.num_classes or model.head_hidden_size)
    assert outputs.isfinite().all()
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(model(images(2)), outputs, rtol=1e-4, atol=1e-5)


@models
def test_backward_reaches_every_parameter(name):
    model = create(name, num_classes=42).train()
    for path in range(getattr(model, "num_stitches", 1)):
        if path:
            model.set_stitch(path)
        outputs = model(images(2))
        assert outputs.shape == (2, 42)
        outputs.mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@models
def test_default_configuration(name):
    """pretrained_cfg tells the truth about the model; checked without memory, on the meta device, at its own size."""
    model = zoo.create_model(name, pretrained=False, device="meta").eval()
    cfg = model.default_cfg
    assert cfg is model.pretrained_cfg
    assert cfg["architecture"] == name
    assert model.num_classes == cfg["num_classes"]
    batch = torch.empty(1, *cfg["input_size"], device="meta")

    features = model.forward_features(batch)
    maps = features.ndim == 4
    order = (0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else tuple(range(features.ndim))
    tokens = 0 if maps else model.num_prefix_tokens + math.prod(cfg["pool_size"])
    expected = (1, model.num_features, *cfg["pool_size"]) if maps else (1, tokens, model.num_features)
    assert features.permute(order).shape == expected
    logits = model.forward_head(features)
    pre_logits = model.forward_head(features, pre_logits=True)
    assert logits.shape == (1, model.num_classes or model.head_hidden_size)
    assert pre_logits.shape == (1, model.head_hidden_size)

    keys = model.state_dict().keys()
    for place in ("classifier", "first_conv") if model.num_classes else ("first_conv",):
        assert all(f"{p}.weight" in keys for p in each(cfg[place])), place
    for stem in each(cfg["first_conv"]):
        assert model.get_submodule(stem).weight.shape[1] == cfg["input_size"][0]
    for classifier in each(cfg["classifier"]) if model.num_classes else ():
        assert model.get_submodule(classifier).weight.shape[0] == cfg["num_classes"]

    model.reset_classifier(0)
    assert model(batch).shape == pre_logits.shape
    model.reset_classifier(0, "")
    unpooled = (1, model.head_hidden_size, *cfg["pool_size"]) if maps else features.shape
    assert model(batch).permute(order).shape == unpooled
    model = zoo.create_model(name, pretrained=False, device="meta", num_classes=0).eval()
    assert model(batch).shape == pre_logits.shape
    model = zoo.create_model(name, pretrained=False, device="meta", num_classes=0, global_pool="").eval()
    assert model(batch).permute(order).shape == unpooled


def test_every_family_has_a_tiny_model():
    tiny = {info.family for info in zoo.search(task="vision", max_params=1_500_000) if info.name.endswith("_test")}
    assert tiny == {info.family for info in zoo.search(task="vision")}


@pytest.mark.parametrize("name", zoo.list_models("*_test", task="vision"))
def test_a_few_steps_of_training_lower_the_loss(name):
    torch.manual_seed(0)
    stochastic = "drop_path_rate" in inspect.signature(get_entry(name).build).parameters
    model = create(name, num_classes=4, **({"drop_path_rate": 0.05} if stochastic else {})).train()
    model.set_grad_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    labels = torch.arange(16) % 4
    losses: list[float] = []
    while len(losses) < 20 and not (losses and losses[-1] < 0.7 * losses[0]):
        loss = torch.nn.functional.cross_entropy(model(images(16)), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", zoo.list_models("*_test", task="vision"))
def test_saved_as_it_is_now(name, tmp_path):
    """Other arguments, then another head: what is saved opens as that, and what would not is refused at once."""
    sized = "img_size" in inspect.signature(get_entry(name).build).parameters
    model = zoo.create_model(name, in_chans=1, num_classes=5, **({"img_size": 96} if sized else {})).eval()
    pools = [pool for pool in ("max", "avg") if pool != getattr(model, "global_pool", "avg")]
    model.reset_classifier(4, pools[0])
    again = zoo.create_model(f"local-dir:{zoo.save_pretrained(model, tmp_path / 'model')}").eval()
    with torch.no_grad():
        batch = torch.randn(2, 1, 96, 96, generator=torch.Generator().manual_seed(0))
        assert torch.equal(again(batch), model(batch))
    wrapped = zoo.create_model(f"local-dir:{tmp_path / 'model'}", features_only=True, out_indices=2)
    assert wrapped.feature_info.channels() == [info["num_chs"] for info in model.feature_info[-2:]]

    model.prune_intermediate_layers([0])
    with pytest.raises(ConfigError, match="parts were cut off or exchanged, and nothing could open it again"):
        zoo.save_pretrained(model, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize("name", zoo.list_models("*_test", task="vision"))
@torch.no_grad()
@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm])
def test_saved_with_what_training_alone_uses(name, convert, tmp_path):
    """Rates, momenta and norms over several GPUs are no part of the function."""
    rates = {}
    for rate in ("drop_rate", "drop_path_rate", "drop_block_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate"):
        with contextlib.suppress(ConfigError):
            create(name, device="meta", **{rate: 0.1})
            rates[rate] = 0.1
    assert rates
    model = set_to_random(create(name, **rates)).eval()
    expected = model(images())
    if convert is convert_sync_batchnorm or not any(isinstance(part, BatchNormAct2d) for part in model.modules()):
        model = convert(model)  # torch's own loses the activations of timm's batch norms
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.01
    again = zoo.create_model(f"local-dir:{zoo.save_pretrained(model, tmp_path / 'model')}").eval()
    torch.testing.assert_close(again(images()), expected)


@models
def test_classifier_reset(name):
    model = create(name, num_classes=5).eval()
    before = model(images())
    old = model.get_classifier()
    model.reset_classifier(9)
    assert model.num_classes == 9
    assert model.get_classifier() is not old
    assert model(images()).shape == (1, 9)
    assert model(images()).isfinite().all()
    assert not model.get_classifier().training
    model.reset_classifier(9, "max")
    assert not torch.equal(model(images()), before)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), torch.nn.Identity)
    wide = create(name, dtype=torch.float64)
    wide.reset_classifier(3)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}


@models
@pytest.mark.parametrize("channels", [1, 4])
def test_in_chans(name, channels):
    assert create(name, in_chans=channels).eval()(images(channels=channels)).shape[0] == 1


@models
@pytest.mark.parametrize("feature_cls", ["list", "getter"])
def test_features(name, feature_cls):
    if feature_cls != getattr(create(name, device="meta"), "default_feature_cls", feature_cls):
        pytest.skip(f"{name} has no modules whose outputs are maps")
    model = create(name, features_only=True, feature_cls=feature_cls).eval()
    info = model.feature_info
    maps = model(images())
    assert len(info.channels()) == len(maps)
    for channels, reduction, found in zip(info.channels(), info.reduction(), maps, strict=True):
        side = math.ceil(SIZE / reduction)
        assert found.shape[:2] == (1, channels)
        assert found.shape[2] == found.shape[3]
        # a strided convolution that is padded less loses a row, and what does not divide
        assert SIZE // reduction - 1 <= found.shape[2] <= side
        assert found.isfinite().all()
    last = create(name, features_only=True, feature_cls=feature_cls, out_indices=(0, len(maps) - 1)).eval()(images())
    assert [m.shape for m in last] == [maps[0].shape, maps[-1].shape]


@models
def test_intermediates(name):
    model = create(name).eval()
    expected = model.forward_features(images())
    final, maps = model.forward_intermediates(images())
    assert len(maps) == len(model.feature_info)
    assert torch.equal(final, expected)
    if maps[-1].shape == expected.shape:  # else tokens, or a neck or a last convolution that belongs to no stage
        assert torch.equal(maps[-1], expected)
    listed = create(name, features_only=True)
    listed.load_state_dict({key: _listed(model)[key.removeprefix("model.")] for key in listed.state_dict()})
    for ours, theirs in zip(maps, listed.eval()(images()), strict=True):
        torch.testing.assert_close(ours, theirs)
    for indices, count in ((1, 1), (2, 2), ([0], 1), ([0, 2], 2)):
        some = model.forward_intermediates(images(), indices=indices, stop_early=True, intermediates_only=True)
        assert len(some) == count
    assert torch.equal(some[1], maps[2])
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(model.forward_intermediates(images())[0], expected, rtol=1e-4, atol=1e-5)


def _listed(model):
    """State of `model` under its own names and those of timm's list wrapper: `stages.0.x` becomes `stages_0.x`."""
    state = model.state_dict()
    return state | {key.replace(".", "_", 1): tensor for key, tensor in state.items()}


@models
def test_prune_intermediate_layers(name):
    model = create(name).eval()
    maps = model.forward_intermediates(images(), intermediates_only=True)
    count = sum(p.numel() for p in model.parameters())
    kept = model.prune_intermediate_layers([0, 1])
    assert kept == [0, 1]
    assert sum(p.numel() for p in model.parameters()) < count
    assert model.num_features == maps[1].shape[1]
    pruned = model.forward_intermediates(images(), indices=kept, intermediates_only=True)
    assert torch.equal(pruned[1], maps[1])


@few_models
def test_torchscript(name):
    model = create(name).eval()
    with torch.no_grad():
        expected = model(images(2))
        torch.testing.assert_close(torch.jit.trace(model, images(1))(images(2)), expected)
        torch.testing.assert_close(torch.jit.script(model)(images(2)), expected)


@few_models
def test_fx(name):
    """FX features are bit-equal, train, and survive scripting, as timm's suite asks."""
    model = create(name).eval()
    with torch.no_grad():
        expected = model(images())
        nodes, eval_nodes = get_graph_node_names(model)
        graph = create_feature_extractor(model, train_return_nodes=[nodes[-1]], eval_return_nodes=[eval_nodes[-1]])
        (found,) = graph.eval()(images()).values()
        assert torch.equal(found, expected)
        assert torch.equal(torch.jit.script(torch.fx.symbolic_trace(model))(images()), expected)
    graph.train()
    (found,) = graph(images(2)).values()
    found.mean().backward()
    assert all(p.grad is not None for p in graph.parameters())
    maps = create(name, features_only=True, feature_cls="fx", out_indices=(0, 1))
    assert isinstance(maps, FeatureGraphNet)
    assert len(maps(images())) == 2


@few_models
def test_export_with_dynamic_batch(name):
    model = create(name).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (images(2),), dynamic_shapes=({0: batch},)).module()
    for size in (1, 3):
        torch.testing.assert_close(exported(images(size)), model(images(size)), rtol=1e-4, atol=1e-5)


@few_models
def test_compile_without_graph_breaks(name):
    model = create(name).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images(2)), model(images(2)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@models
def test_compile_to_machine_code(name):
    model = create(name).eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model)(images(2)), model(images(2)), rtol=1e-3, atol=1e-4)


@models
def test_precision_layout_and_device(name):
    model = create(name, dtype=torch.float64).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    with torch.no_grad():
        expected = model(images().double())
        single = copy.deepcopy(model).float()
        torch.testing.assert_close(single(images()).double(), expected, rtol=1e-3, atol=1e-4)
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        torch.testing.assert_close(last(images().double().to(memory_format=torch.channels_last)), expected)
        half = single.to(torch.bfloat16)
        found = half(images().bfloat16())
        assert found.dtype == torch.bfloat16
        assert (found.double() - expected).abs().max() < 0.1 * expected.abs().max()
    on_meta = create(name, device="meta")
    assert all(t.is_meta for t in on_meta.state_dict().values())


@models
def test_seed_decides_the_initial_weights(name):
    torch.manual_seed(1)
    first = create(name).state_dict()
    torch.manual_seed(1)
    second = create(name).state_dict()
    torch.manual_seed(2)
    third = create(name).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], third[k]) for k in first)
    assert all(t.isfinite().all() for t in first.values())


@models
def test_layer_groups(name):
    """Every parameter is in one group, the groups run from the stem to the head, and blocks keep together."""
    model = zoo.create_model(name, pretrained=False, device="meta")
    parameters = sorted(key for key, _ in model.named_parameters())
    first_convs = {f"{stem}.weight" for stem in each(model.default_cfg["first_conv"])}
    classifiers = {f"{classifier}.weight" for classifier in each(model.default_cfg["classifier"])}
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=False)
        assert sorted(key for group in groups.values() for key in group) == parameters
        order = sorted(groups)
        assert first_convs <= set(groups[order[0]])
        assert not model.num_classes or classifiers <= set(groups[order[-1]])
        assert not model.num_classes or len(groups[order[-1]]) <= 8, "the head is a group of its own"
        assert len(groups) >= len(model.feature_info)


@models
def test_layer_decay_optimizer(name):
    from timm.optim import create_optimizer_v2

    model = zoo.create_model(name, pretrained=False, device="meta")
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.9)
    named = dict(model.named_parameters())
    undecayed = {named[key] for key in getattr(model, "no_weight_decay", set)() if key in named}
    scales = sorted({group["lr_scale"] for group in optimizer.param_groups})
    assert scales[-1] == 1.0
    assert len(scales) > len(model.feature_info)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert (group["weight_decay"] == 0) == (parameter.ndim <= 1 or parameter in undecayed)


@models
def test_timm_layout_and_configuration_where_timm_has_the_model(name):
    builder = getattr(timm.models, name, None)  # timm's own, whatever its registry holds by now
    if builder is None:
        pytest.skip(f"timm has no {name}")
    with torch.device("meta"):
        theirs = builder().state_dict()
    ours = zoo.create_model(name, pretrained=False, device="meta").state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}

    configs = sys.modules[builder.__module__].default_cfgs[name].cfgs
    published = [tag for tag, config in configs.items() if config.hf_hub_id]
    assert [w.tag for w in get_entry(name).weights][: len(published)] == published
    for tag in published:
        config = configs[tag]
        expected = {**config.to_dict(), "hf_hub_id": f"timm/{name}.{tag}"}
        found = get_entry(name).pretrained_cfg(tag)
        for key in ("hf_hub_id", "num_classes", "input_size", "pool_size", "crop_pct", "crop_mode", "interpolation"):
            assert found[key] == expected[key], key
        for key in ("mean", "std", "first_conv", "classifier", "license", "fixed_input_size"):
            assert found[key] == expected[key], key
