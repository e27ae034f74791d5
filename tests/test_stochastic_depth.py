"""Stochastic depth that leaves out what it drops equals timm's, which multiplies it by zero."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

import zoo
from zoo.layers.stochastic_depth import stochastic_add
from zoo.models import metaformer
from zoo.models.metaformer import MetaFormerBlock

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def gradients(y: Tensor, x: Tensor, branch: nn.Module) -> list[Tensor]:
    weights = list(branch.parameters())
    return list(torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), [x, *weights]))


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_branch(rate, scaled, layout):
    torch.manual_seed(0)
    branch, drop_path = nn.Conv2d(8, 8, 3, padding=1), DropPath(rate, scaled)
    sizes = []
    branch.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    for seed in range(8):
        x = torch.randn(10, 8, 6, 5).to(memory_format=layout).requires_grad_()
        torch.manual_seed(seed)
        expected = x + drop_path(branch(x))
        next_number = torch.rand(())
        torch.manual_seed(seed)
        found = stochastic_add(x, x, branch, drop_path)
        assert torch.rand(()) == next_number
        torch.testing.assert_close(found, expected)
        assert found.is_contiguous(memory_format=layout)
        for ours, exact in zip(gradients(found, x, branch), gradients(expected, x, branch), strict=True):
            torch.testing.assert_close(ours, exact)
    assert (min(sizes) < 10) == (rate in (0.3, 0.9))  # one of ten is dropped, or more


def test_what_has_no_rate_or_is_watched_is_called():
    x, branch = torch.randn(4, 3), nn.Linear(3, 3)
    calls = []
    drop_path = DropPath(0.5)
    drop_path.register_forward_hook(lambda *_: calls.append(1))
    stochastic_add(x, x, branch, drop_path)
    assert calls
    for none in (nn.Identity(), DropPath(0.0), DropPath(0.9).eval()):
        assert torch.equal(stochastic_add(x, x, branch, none), x + branch(x))


@pytest.mark.parametrize("name", ["poolformer_s12", "poolformerv2_s12", "caformer_test"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_on_a_cpu_equals_the_plain_one(name, layout, checkpointing, monkeypatch):
    """The forms for training: samples left out, scales held by weights."""
    torch.manual_seed(0)
    model = zoo.create_model(name, num_classes=5, drop_path_rate=0.4, pretrained=False).double().train()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("scale"):
                parameter.uniform_(0.5, 1.5)
    model.set_grad_checkpointing(checkpointing)
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64).to(memory_format=layout)
    found = []
    for ours in (True, False):
        if not ours:
            monkeypatch.setattr("zoo.models.metaformer.trains_eagerly", lambda *_: False)
        model.zero_grad()
        torch.manual_seed(1)
        loss = model(images).square().mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    largest = max(grad.abs().max() for grad in found[1])
    for fast, plain in zip(*found, strict=True):
        assert (fast - plain).abs().max() <= 1e-9 * largest


def test_layers_that_are_watched_or_replaced_are_called():
    model = zoo.create_model("poolformer_s12", depths=(1, 1, 1, 1), num_classes=5, pretrained=False).train()
    block = model.stages[0].blocks[0]
    calls = []
    for module in (block.norm1, block.mlp, block.layer_scale2):
        module.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    narrow = model.stages[1].blocks[0].mlp
    narrow.fc2 = nn.Sequential(nn.Conv2d(narrow.fc2.in_channels, 4, 1), nn.Conv2d(4, narrow.fc2.out_channels, 1))
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert calls == ["GroupNorm", "Mlp", "Scale"]
    assert all(p.grad is not None for p in narrow.parameters())


def doubled(module):
    module.forward = lambda x: 2 * x


class Twice(DropPath):
    def forward(self, x):
        return 2 * super().forward(x)


class OfTheBatch(nn.Module):
    """A mixer that is no module of torch's, timm's or the zoo's, and makes a sample depend on the others."""

    def __init__(self, dim):
        super().__init__()

    def forward(self, x):
        return x - x.mean(0, keepdim=True)


def each_block(change):
    def apply(model):
        for block in model.modules():
            if type(block) is MetaFormerBlock:
                change(block)

    return apply


CHANGES = {
    "batch norm": each_block(lambda b: setattr(b, "norm1", nn.BatchNorm2d(b.norm1.num_channels))),
    "groups of the norm": each_block(lambda b: setattr(b.norm1, "num_groups", 4)),
    "forward of the norm": each_block(lambda b: doubled(b.norm1)),
    "what is pooled": each_block(
        lambda b: setattr(b.token_mixer, "pool", nn.Sequential(b.token_mixer.pool, nn.Tanh()))
    ),
    "padding that counts": each_block(lambda b: setattr(b.token_mixer, "pool", nn.AvgPool2d(3, 1, 1))),
    "hook on the mixer": each_block(lambda b: b.token_mixer.register_forward_hook(lambda m, i, o: o.clamp(-0.5, 0.5))),
    "another drop path": each_block(lambda b: setattr(b, "drop_path1", Twice(0.5))),
    "forward of the drop path": each_block(lambda b: doubled(b.drop_path2)),
    "scale": each_block(lambda b: setattr(b, "layer_scale1", nn.Tanh())),
    "forward of the scale": each_block(lambda b: doubled(b.layer_scale2)),
    "hook on the scale": each_block(lambda b: b.layer_scale1.register_forward_hook(lambda m, i, o: o + 1)),
}


@pytest.mark.parametrize("what", [*CHANGES, "a mixer of one's own"])
def test_what_was_exchanged_trains_as_it_stands(what, monkeypatch):
    """Drawing the same random numbers, the model's own forward and the one for training agree."""
    torch.manual_seed(0)
    small = {"depths": (1, 1, 1, 1), "dims": (16, 32, 32, 32), "drop_path_rate": 0.5, "layer_scale_init": 0.7}
    mixers = {} if what in CHANGES else {"token_mixers": OfTheBatch}
    model = zoo.create_model("poolformer_s12", num_classes=10, **small, **mixers)
    if what in CHANGES:
        CHANGES[what](model)
    plain, images = copy.deepcopy(model), torch.randn(8, 3, 64, 64)
    torch.manual_seed(1)
    found = model.train()(images)
    monkeypatch.setattr(metaformer, "trains_eagerly", lambda *_: False)
    torch.manual_seed(1)
    expected = plain.train()(images)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_each_sample_may_draw_for_itself_under_vmap():
    model = zoo.create_model("caformer_test", num_classes=3, drop_path_rate=0.5).train()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="different")(
        parameters, torch.randn(3, 3, 64, 64)
    )
    assert all(len(gradient) == 3 for gradient in found.values())
