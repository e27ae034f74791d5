"""Stochastic depth that leaves out what it drops equals timm's, which multiplies it by zero."""

from __future__ import annotations

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

import zoo
from zoo.layers.stochastic_depth import stochastic_add

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
