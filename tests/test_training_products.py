"""Training's products by oneDNN or MKL are PyTorch's up to rounding, and step aside where they are not wanted."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zoo
from zoo.layers import products
from zoo.layers.products import FastProducts
from zoo.layers.training_mlp import training_mlp
from zoo.models.metaformer import StarReLU

SHAPES = [(64, 256, 24), (256, 64, 24), (64, 256, 56), (320, 1280, 14), (1280, 320, 14), (512, 2048, 7), (96, 40, 33)]


@pytest.fixture(params=["oneDNN", "MKL"])
def library(request, monkeypatch) -> str:
    """As on a processor of another maker than Intel, and as on Intel's."""
    monkeypatch.setattr(products, "_MKL_IS_FASTER", request.param == "MKL")
    return request.param


@pytest.fixture
def onednn(monkeypatch) -> None:
    monkeypatch.setattr(products, "_MKL_IS_FASTER", False)


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_onednn(y: Tensor) -> bool:
    """Whether `FastProducts` made `y`, or the map that `y` is a view of."""
    made_by = y.grad_fn
    while made_by is not None and made_by.name().startswith(("View", "Unflatten", "Permute")):
        made_by = made_by.next_functions[0][0]
    assert made_by is not None
    return "_Linear" in made_by.name()


def by_mkl(y: Tensor) -> bool:
    """Whether a convolution became a linear layer, whose output is turned round."""
    assert y.grad_fn is not None
    return "Permute" in y.grad_fn.name()


def gradients(function, *tensors: Tensor, upstream: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    y.backward(upstream)
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, exact in zip(found, expected, strict=True):
        assert ours.shape == exact.shape
        assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize(("ins", "outs", "side"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_pointwise_convolutions(ins, outs, side, bias, library):
    x = tensor(2, ins, side, side).to(memory_format=torch.channels_last)
    tensors = [x, tensor(outs, ins, 1, 1, seed=1), *([tensor(outs, seed=2)] if bias else [])]
    upstream = tensor(2, outs, side, side, seed=3).to(memory_format=torch.channels_last)
    with FastProducts():
        found = gradients(F.conv2d, *tensors, upstream=upstream)
        y = F.conv2d(*(t.requires_grad_() for t in tensors))
    assert by_mkl(y) if library == "MKL" else by_onednn(y)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert_close(found, gradients(F.conv2d, *(t.double() for t in tensors), upstream=upstream.double()))


@pytest.mark.parametrize(("ins", "outs", "side"), SHAPES)
def test_linear_layers(ins, outs, side, library):
    layer = nn.Linear(ins, outs)
    for x in (tensor(2, side * side, ins), tensor(side * side, ins), tensor(ins, 2 * side * side).t()):
        parameters = layer.weight.detach(), layer.bias.detach()
        upstream = torch.ones(()).expand(*x.shape[:-1], outs)  # no memory of its own, as from a sum
        with FastProducts():
            found = gradients(F.linear, x, *parameters, upstream=upstream)
            assert by_onednn(layer(x)) == (library == "oneDNN")
        exact = gradients(F.linear, x.double(), *(p.double() for p in parameters), upstream=upstream.double())
        assert_close(found, exact)


@pytest.mark.usefixtures("onednn")
def test_weights_that_need_no_gradient_get_none_and_gradients_can_be_differentiated():
    layer, x = nn.Linear(256, 256), tensor(64, 256).requires_grad_()
    layer.bias.requires_grad_(False)
    with FastProducts():
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        first.square().sum().backward()
    assert layer.bias.grad is None
    found = layer.weight.grad
    layer.weight.grad = None
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    first.square().sum().backward()
    torch.testing.assert_close(found, layer.weight.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("layer", [nn.Linear(256, 256), nn.Sequential(nn.Linear(256, 256), StarReLU())])
def test_many_gradients_at_once(layer):
    x, upstream = tensor(64, 256).requires_grad_(), tensor(3, 64, 256, seed=1)
    with FastProducts():
        y = layer(x)
    inputs = [x, *layer.parameters()]
    found = torch.autograd.grad(y, inputs, upstream, retain_graph=True, is_grads_batched=True)
    for i in range(3):
        one = torch.autograd.grad(y, inputs, upstream[i], retain_graph=True)
        for ours, exact in zip(found, one, strict=True):
            torch.testing.assert_close(ours[i], exact, rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("onednn")
def test_what_it_leaves_alone():
    image, wide = tensor(2, 256, 16, 16).to(memory_format=torch.channels_last), nn.Conv2d(256, 256, 1)
    rows, layer = tensor(64, 256), nn.Linear(256, 256)
    with FastProducts():
        assert by_onednn(wide(image))
        assert not by_onednn(wide(image.contiguous()))  # planes, one for each channel
        assert not by_onednn(
            wide(image.repeat(8, 1, 1, 1).to(memory_format=torch.channels_last))
        )  # PyTorch's is oneDNN's then
        assert not by_onednn(nn.Conv2d(256, 256, 3)(image))
        assert not by_onednn(nn.Conv2d(256, 256, 1, stride=2)(image))
        assert not by_onednn(nn.Conv2d(256, 256, 1, padding=1)(image))
        assert not by_onednn(nn.Conv2d(256, 256, 1, groups=2)(image))
        assert by_onednn(layer(rows))
        assert not by_onednn(layer(rows[:2]))  # soon done
        torch.testing.assert_close(F.linear(rows, layer.weight[0]), rows @ layer.weight[0])  # a vector is a weight, too
        assert not by_onednn(layer.double()(rows.double()))
        with torch.autocast("cpu", torch.bfloat16):
            assert not by_onednn(layer.float()(rows))
        with torch.no_grad():
            assert layer(rows).grad_fn is None
    assert not by_onednn(layer(rows))


def test_transformed_and_impossible_layers_are_pytorchs(onednn):
    layer, rows = nn.Linear(256, 256), tensor(64, 256)
    with FastProducts():
        tangent = torch.func.jvp(layer, (rows,), (rows,))[1]
        each = torch.func.vmap(layer)(rows)
        of_rows = torch.func.vmap(torch.func.grad(lambda row: layer(row).square().sum()))(rows)
        assert nn.Linear(0, 8)(torch.ones(2, 0)).shape == (2, 8)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            layer(tensor(64, 128))
    torch.testing.assert_close(tangent, rows @ layer.weight.t())
    torch.testing.assert_close(each, layer(rows))
    torch.testing.assert_close(of_rows, 2 * layer(rows) @ layer.weight)


def test_a_weight_may_change_before_the_backward_pass_where_only_it_learns(onednn):
    layer, rows = nn.Linear(256, 256), tensor(64, 256)
    with FastProducts():
        y = layer(rows)
    with torch.no_grad():
        layer.weight.mul_(2)
    y.sum().backward()
    torch.testing.assert_close(layer.weight.grad, rows.sum(0).expand(256, 256))


def test_outputs_may_be_written_over(library):
    rows, image = tensor(64, 256), tensor(2, 256, 16, 16).to(memory_format=torch.channels_last)
    for layer, x in ((nn.Linear(256, 256), rows), (nn.Linear(256, 256), rows[None]), (nn.Conv2d(256, 256, 1), image)):
        net = nn.Sequential(layer, nn.ReLU(inplace=True))
        with FastProducts():
            found = net(x)
        found.sum().backward()
        ours = layer.weight.grad
        layer.weight.grad = None
        expected = net(x)
        expected.sum().backward()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours, layer.weight.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 48, 1, 2), nn.Conv2d(8, 16, 1, (4, 2), bias=False)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_strided_kernels_whose_gradient_would_end_the_process(layer, layout):
    layer.to(memory_format=torch.channels_last)
    x = tensor(2, layer.in_channels, 131, 128).contiguous(memory_format=layout)
    exact = copy.deepcopy(layer).double()
    expected = exact(x.double())
    for _ in range(12):
        layer.zero_grad()
        with FastProducts():
            found = layer(x)
        found.square().mean().backward()
    expected.square().mean().backward()
    assert_close([found, *(p.grad for p in layer.parameters())], [expected, *(p.grad for p in exact.parameters())])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.usefixtures("onednn")
def test_checkpointed_layers_run_again_outside(reentrant):
    first, last = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)), nn.Linear(256, 256)
    x = tensor(64, 256).requires_grad_()
    found = []
    for context in (FastProducts(), contextlib.nullcontext()):
        first.zero_grad()
        with context:
            y = last(checkpoint(first, x, use_reentrant=reentrant))
        assert by_onednn(y) == isinstance(context, FastProducts)
        y.square().sum().backward()
        found.append([p.grad for p in first.parameters()])
    assert_close(*found)


def test_of_any_number_of_images_where_mkl_is_faster(monkeypatch):
    monkeypatch.setattr(products, "_MKL_IS_FASTER", True)
    image, wide = tensor(16, 256, 16, 16).to(memory_format=torch.channels_last), nn.Conv2d(256, 256, 1)
    with FastProducts():
        assert by_mkl(wide(image))
        assert not by_mkl(wide(image.contiguous()))
        assert not by_mkl(nn.Conv2d(256, 256, 1, groups=2)(image))


@pytest.mark.parametrize("name", ["poolformer_s12", "caformer_s18", "emo_test", "sret_test"])
def test_a_model_gets_the_same_gradients(name, library):
    model = zoo.create_model(name, pretrained=False, num_classes=10).train().to(memory_format=torch.channels_last)
    images = tensor(2, 3, 64, 64).to(memory_format=torch.channels_last)
    found = []
    for context in (FastProducts(), contextlib.nullcontext()):
        model.zero_grad()
        torch.manual_seed(0)
        with context:
            model(images).square().mean().backward()
        found.append({key: p.grad.clone() for key, p in model.named_parameters()})
    ours, plain = found
    largest = max(grad.abs().max() for grad in plain.values())
    for key, grad in plain.items():
        assert (ours[key] - grad).abs().max() <= 1e-3 * max(grad.abs().max(), 1e-2 * largest), key


@pytest.mark.parametrize("bias", [torch.randn(2048)[::2], torch.randn(1).expand(1024)], ids=["strided", "expanded"])
def test_biases_of_any_strides(bias):
    """oneDNN reads them side by side."""
    layer, mlp = nn.Linear(1024, 1024), Mlp(1024, 1024)
    for linear in (layer, mlp.fc1, mlp.fc2):
        linear.bias = nn.Parameter(bias)
    x = torch.randn(256, 1024, requires_grad=True)
    for module in (layer, lambda x: training_mlp(x, mlp)):
        with FastProducts():
            found = module(x)
        expected = layer(x) if module is layer else mlp(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
