"""MLPs on a part of the rows at a time are the plain ones up to rounding, and step aside where they are not wanted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from timm.layers import GlobalResponseNormMlp
from timm.layers import Mlp as TimmMlp
from timm.layers.std_conv import StdConv2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.layers import products
from zoo.layers.large_kernel import depthwise_conv2d
from zoo.layers.products import FastProducts
from zoo.layers.training_mlp import training_mlp
from zoo.models.metaformer import Mlp, StarReLU


@pytest.fixture(params=["oneDNN", "MKL"])
def library(request, monkeypatch) -> None:
    """As on a processor of another maker than Intel, and as on Intel's."""
    monkeypatch.setattr(products, "_MKL_IS_FASTER", request.param == "MKL")


def make(act: type[nn.Module], bias: bool, tokens: bool, dim: int = 32, drop: float = 0.0) -> Mlp:
    torch.manual_seed(0)
    mlp = Mlp(dim, 4, act, bias, drop, tokens)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.3 * (32 / dim) ** 0.5)
    return mlp


def star(mlp: Any) -> tuple[Tensor, Tensor] | None:
    return (mlp.act.scale, mlp.act.bias) if isinstance(mlp.act, StarReLU) else None


def plain(x: Tensor, mlp: Any, scale: Tensor | None = None) -> Tensor:
    y = mlp(x)
    return y if scale is None else y * (scale if isinstance(mlp.fc1, nn.Linear) else scale[:, None, None])


def together(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Those of StarReLU's scalars, either of which may happen to be a sum that is next to nothing, as one vector."""
    scalars = [g for g in gradients if g.numel() == 1]
    return [g for g in gradients if g.numel() > 1] + ([torch.cat(scalars)] if scalars else [])


def close(found: Tensor, exact: Tensor, tolerance: float = 5e-6) -> bool:
    assert found.shape == exact.shape
    return bool((found - exact).abs().max() <= tolerance * exact.abs().max())


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("act", [nn.GELU, StarReLU])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [False, True], ids=["maps", "tokens"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(3, 32, 59, 61), (2, 724, 6, 7)], ids=["two parts", "wide"])
def test_values_and_gradients(act, bias, tokens, scaled, layout, shape):
    """10,797 rows of 128; and 84 of 2,896, fewer than scales would save, whose gradients are too large to be turned."""
    mlp = make(act, bias, tokens, dim=shape[1])
    scale = torch.rand(shape[1]).requires_grad_() if scaled else None
    x = torch.randn(shape).to(memory_format=layout)
    x = (x.permute(0, 2, 3, 1) if tokens else x).requires_grad_()
    y = training_mlp(x, mlp, star(mlp), scale)
    assert y is not None
    upstream = torch.randn_like(y)
    inputs = [x, *mlp.parameters(), *([] if scale is None else [scale])]
    found = torch.autograd.grad(y, inputs, upstream)

    exactly = mlp.double()
    exact_x, exact_scale = x.detach().double().requires_grad_(), scale
    if scale is not None:
        exact_scale = scale.detach().double().requires_grad_()
    exact_y = plain(exact_x, exactly, exact_scale)
    exact_inputs = [exact_x, *exactly.parameters(), *([] if exact_scale is None else [exact_scale])]
    exact = torch.autograd.grad(exact_y, exact_inputs, upstream.double())
    assert close(y, exact_y)
    assert all(map(close, together(found), together(exact)))


@pytest.mark.parametrize("act", [nn.GELU, StarReLU])
def test_a_gradient_can_be_differentiated_also_of_layers_that_come_again(act):
    mlp = make(act, True, False)
    x = torch.randn(2, 32, 48, 48).to(memory_format=torch.channels_last)
    found = []

    def ours(x: Tensor) -> Tensor:
        y = training_mlp(x, mlp, star(mlp))
        assert y is not None
        return y

    for layer in (ours, mlp):
        x.requires_grad_()
        scale = torch.linspace(0.5, 1.5, 32, dtype=x.dtype).view(-1, 1, 1)
        (first,) = torch.autograd.grad((scale * layer(layer(x) / 30)).square().mean(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, *mlp.parameters()]))
        mlp.double()
        x = x.detach().double()
    assert all(close(single, exact, 1e-4) for single, exact in zip(*found, strict=True))


@pytest.mark.parametrize("frozen", ["x", "fc1.weight", "fc1.bias", "act.scale", "act.bias", "fc2.weight", "fc2.bias"])
def test_what_needs_no_gradient_gets_none(frozen):
    mlp = make(StarReLU, True, False)
    inputs = {"x": torch.randn(2, 32, 48, 48), **dict(mlp.named_parameters())}
    for name, tensor in inputs.items():
        tensor.requires_grad_(name != frozen)
    found = []
    for layer in (lambda x: training_mlp(x, mlp, star(mlp)), mlp):
        for again in (False, True):
            grads = torch.autograd.grad(
                layer(inputs["x"]).square().sum(),
                [t for t in inputs.values() if t.requires_grad],
                create_graph=again,
            )
            found.append(grads)
    for grads in found[:3]:
        assert all(close(ours, exact, 1e-4) for ours, exact in zip(grads, found[3], strict=True))


def test_only_the_second_layer_learns():
    mlp, x = make(StarReLU, True, True), torch.randn(2, 48, 48, 32)
    for part in (mlp.fc1, mlp.act):
        part.requires_grad_(False)
    upstream = torch.randn(2, 48, 48, 32)
    for y in (training_mlp(x, mlp, star(mlp)), mlp(x)):
        assert y is not None
        y.backward(upstream, retain_graph=True)
        y.backward(upstream)
    weight, bias = mlp.fc2.weight.grad, mlp.fc2.bias.grad
    mlp.zero_grad()
    mlp(x).backward(upstream)
    assert weight is not None
    assert bias is not None
    assert close(weight, 4 * mlp.fc2.weight.grad)
    assert close(bias, 4 * mlp.fc2.bias.grad)
    assert mlp.fc1.weight.grad is None


@pytest.mark.parametrize("again", [False, True])
def test_biases_may_change_before_the_backward_pass(again):
    mlp, x = make(nn.GELU, True, True), torch.randn(2, 48, 48, 32).requires_grad_()
    found = []
    for layer in (lambda x: training_mlp(x, mlp), mlp):
        y = layer(x)
        with torch.no_grad():
            mlp.fc1.bias.add_(1)
        found.append(torch.autograd.grad(y.square().sum(), [x, *mlp.parameters()], create_graph=again))
        with torch.no_grad():
            mlp.fc1.bias.sub_(1)
    assert all(close(ours, exact, 1e-4) for ours, exact in zip(*found, strict=True))


@pytest.mark.parametrize("act", [nn.GELU, StarReLU])
def test_many_gradients_at_once(act):
    mlp, x = make(act, True, True), torch.randn(2, 48, 48, 32).requires_grad_()
    y = training_mlp(x, mlp, star(mlp))
    assert y is not None
    upstream = torch.randn(3, *y.shape)
    inputs = [x, *mlp.parameters()]
    found = torch.autograd.grad(y, inputs, upstream, retain_graph=True, is_grads_batched=True)
    for i in range(3):
        one = torch.autograd.grad(y, inputs, upstream[i], retain_graph=True)
        assert all(close(ours[i], exact, 1e-4) for ours, exact in zip(found, one, strict=True))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("within", [False, True])
def test_operations_are_counted(within):
    """Also of a forward pass alone, which is computed again where nobody counts."""
    mlp, x = make(nn.GELU, True, True), torch.randn(2, 48, 48, 32).requires_grad_()
    found = []
    for layer in (lambda x: training_mlp(x, mlp), mlp):
        with FlopCounterMode(display=False) as counter:
            y = layer(x) if within else checkpoint(layer, x, use_reentrant=False)
            assert y is not None
            if within:
                y.sum().backward()
        if not within:
            y.sum().backward()
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 0


def test_compiled_backward_passes():
    mlp, x = make(StarReLU, True, False), torch.randn(2, 32, 48, 48).requires_grad_()
    kernel = torch.randn(32, 1, 21, 5, requires_grad=True)
    found = []
    for compiled in (False, True):
        y = training_mlp(depthwise_conv2d(x, kernel), mlp, star(mlp))
        assert y is not None
        context: Any = contextlib.nullcontext()
        if compiled:
            context = torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True))
        with context:
            y.square().mean().backward()
        found.append([t.grad for t in (x, kernel, *mlp.parameters())])
        for t in (x, kernel, *mlp.parameters()):
            t.grad = None
    for ours, exact in zip(*found, strict=True):
        assert ours is not None
        assert close(ours, exact, 1e-4)


def test_one_hidden_map_is_kept():
    mlp, x = make(nn.GELU, True, False), torch.randn(2, 32, 64, 64).to(memory_format=torch.channels_last)
    x.requires_grad_()

    def kept(layer) -> int:
        storages = {}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = layer(x)
        assert y is not None
        return sum(storages.values())

    hidden = 4 * 4 * x.numel()
    assert kept(mlp) > 2 * hidden
    assert kept(lambda x: training_mlp(x, mlp)) < 1.5 * hidden


class Doubled(nn.Linear):
    """A layer of somebody's own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def altered() -> Iterator[tuple[str, nn.Module]]:
    for part in ("", "fc1", "act", "drop1", "norm", "fc2", "drop2"):
        mlp: Any = TimmMlp(32, 128)
        mlp.get_submodule(part).register_forward_hook(lambda module, inputs, y: 2 * y)
        yield f"a hook of {part or 'the whole'}", mlp
    yield "dropout", make(nn.GELU, True, True, drop=0.1)
    yield "tanh's GELU", make(lambda: nn.GELU(approximate="tanh"), True, True)  # type: ignore[arg-type]
    yield "ReLU", make(nn.ReLU, True, True)
    yield "double", make(nn.GELU, True, True).double()
    mlp = make(nn.GELU, True, True)
    mlp.fc1 = Doubled(32, 128)
    yield "a layer of somebody's own", mlp
    mlp = make(nn.GELU, True, True)
    torch.nn.utils.parametrizations.weight_norm(mlp.fc2)
    yield "a parametrization", mlp
    yield "a norm between", TimmMlp(32, 128, norm_layer=nn.LayerNorm)
    mlp = make(nn.GELU, True, False)
    mlp.fc1 = nn.Conv2d(32, 128, 1, groups=2)
    yield "maps: groups", mlp
    mlp = make(nn.GELU, True, False)
    mlp.fc1 = StdConv2d(32, 128, 1)
    yield "maps: timm's convolution of standardised weights", mlp
    mlp = make(nn.GELU, True, True)
    mlp.fc1.bias = nn.Parameter(mlp.fc1.bias.double())
    yield "a bias of another type", mlp
    mlp = make(nn.GELU, True, True)
    mlp.fc1 = nn.Linear(32, 64)
    yield "layers that do not fit", mlp


@pytest.mark.parametrize(("what", "mlp"), altered(), ids=lambda value: value if isinstance(value, str) else "")
def test_altered_layers_are_left_alone(what, mlp):
    x = torch.randn(2, 32, 48, 48) if what.startswith("maps") else torch.randn(2, 48, 48, 32)
    assert training_mlp(x.double() if what == "double" else x, mlp) is None


def test_what_else_it_leaves_alone():
    mlp, x = make(nn.GELU, True, True), torch.randn(2, 48, 48, 32)
    assert training_mlp(x, mlp) is not None
    assert training_mlp(x[:1, :8], mlp) is None  # soon done
    assert training_mlp(x[:0], mlp) is None
    assert training_mlp(x[..., :31], mlp) is None  # for the layer to tell
    assert training_mlp(x.to("meta"), mlp) is None
    assert training_mlp(torch.nn.Parameter(x), mlp) is None
    with torch.no_grad():
        assert training_mlp(x, mlp) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert training_mlp(x, mlp) is None
    watching = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert training_mlp(x, mlp) is None
    watching.remove()
    assert training_mlp(x, mlp) is not None

    def each(x: Tensor) -> Tensor:
        assert training_mlp(x, mlp) is None
        return x

    torch.func.vmap(each)(x)
    dropping = make(nn.GELU, True, True, drop=0.1).eval()
    assert training_mlp(x, dropping) is not None


@pytest.mark.parametrize("name", ["poolformer_s12", "slak_test"])
def test_compiled_training_has_the_plain_layers(name):
    model = zoo.create_model(name, num_classes=5, pretrained=False).train()
    images, programs = torch.randn(2, 3, 96, 96), []

    def keep(program: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        programs.append(program)
        return program.forward

    torch.compile(model, backend=keep, fullgraph=True, dynamic=True)(images)
    activations = [node for node in programs[0].graph.nodes if node.target is torch._C._nn.gelu]
    assert len(programs) == 1
    assert len(activations) == sum(isinstance(module, nn.GELU) for module in model.modules())


def test_other_mlps_are_called():
    model = zoo.create_model("slak_test", num_classes=5, pretrained=False).train()
    block = model.stages[0].blocks[0]
    dim = block.mlp.fc1.in_features
    images = torch.randn(2, 3, 96, 96)
    block.mlp = GlobalResponseNormMlp(dim, 4 * dim)
    model(images).sum().backward()
    assert block.mlp.grn.weight.grad is not None
    block.mlp = nn.Identity()
    model(images).sum().backward()


@pytest.mark.parametrize("name", ["poolformer_s12", "convformer_s18", "caformer_s18", "slak_test"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_equals_the_plain_one(name, layout, checkpointing, monkeypatch):
    torch.manual_seed(0)
    model = zoo.create_model(name, num_classes=5, drop_path_rate=0.3, pretrained=False).train().to(memory_format=layout)
    for key, parameter in model.named_parameters():
        if key.endswith(("scale", "gamma")):
            nn.init.uniform_(parameter, 0.5, 1.5)
    model.set_grad_checkpointing(checkpointing)
    images = torch.randn(4, 3, 96, 96).to(memory_format=layout)
    taken = []

    def training(x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        y = training_mlp(x, *args, **kwargs) if ours else None
        taken.append(y is not None)
        return y

    for family in ("metaformer", "slak"):
        monkeypatch.setattr(f"zoo.models.{family}.training_mlp", training)
    found = []
    for ours in (True, False):
        taken.clear()
        for context in (contextlib.nullcontext(), FastProducts()):
            if checkpointing and not isinstance(context, contextlib.nullcontext):
                continue
            model.zero_grad()
            torch.manual_seed(1)
            with context:
                loss = model(images).square().mean()
                loss.backward()
            found.append({"loss": loss.detach()} | {key: p.grad for key, p in model.named_parameters()})
        assert any(taken) == ours
    *fast, exact = found
    largest = max(grad.abs().max() for grad in exact.values())
    for grads in fast:
        for key, grad in grads.items():
            assert (grad - exact[key]).abs().max() <= 1e-3 * max(exact[key].abs().max(), 1e-3 * largest), key
