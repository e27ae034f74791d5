"""Large depthwise convolutions: F.conv2d's sums and derivatives, whichever way computes them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from tests.launcher import ROOT, Program
from zoo.errors import ConfigError
from zoo.layers import large_kernel
from zoo.layers.large_kernel import depthwise_conv2d, large_kernel_sum
from zoo.layers.observers import is_exporting

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-13}

# (batch, channels, height, width, kernel height, kernel width)
SHAPES = {
    "tall": (2, 20, 14, 14, 27, 5),
    "wide": (2, 20, 14, 14, 5, 27),
    "above the map": (2, 3, 9, 12, 31, 5),
    "one row": (1, 5, 1, 9, 3, 7),
    "1xN": (1, 4, 8, 8, 1, 7),
    "M < N": (2, 4, 10, 8, 3, 17),
    "even map, whole kernel": (2, 3, 20, 18, 17, 17),
    "whole, above the map": (1, 4, 7, 5, 13, 13),
    "13 wide": (2, 4, 12, 14, 5, 13),
    "11 wide": (1, 3, 6, 6, 11, 11),
    "one channel": (2, 1, 6, 7, 11, 3),
    "by FFT": (2, 3, 56, 48, 31, 31),
    "empty batch": (0, 4, 8, 8, 5, 5),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def operands(shape, dtype=torch.float32, memory_format=torch.contiguous_format):
    batch, channels, height, width, rows, columns = shape
    torch.manual_seed(0)
    x = torch.randn(batch, channels, height, width, dtype=dtype).contiguous(memory_format=memory_format)
    weight = torch.randn(channels, 1, rows, columns, dtype=dtype)
    bias = torch.randn(channels, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (x, weight, bias)]


def reference(x, weight, bias=None):
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(x, weight, bias, padding=padding, groups=len(weight))


def error(found, expected):
    """Relative to the largest number expected."""
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@shapes
def test_the_sums_and_the_gradients_are_conv2ds(shape, dtype, memory_format):
    given = operands(shape, dtype, memory_format)
    grad = torch.randn_like(given[0])
    found = depthwise_conv2d(*given)
    found_grads = torch.autograd.grad(found, given, grad)
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    expected = reference(*exact)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())

    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=memory_format)
    for got, wanted in zip((found, *found_grads), (expected, *expected_grads), strict=True):
        assert got.shape == wanted.shape
        if got.numel() > 0 and shape[0] > 0:
            assert error(got, wanted) < TOLERANCES[dtype]
    assert all(not got.any() for got in found_grads[1:]) or shape[0] > 0
    with torch.no_grad():
        assert torch.equal(depthwise_conv2d(*given), found)  # other code runs when nothing is recorded


@pytest.mark.parametrize("shape", [(2, 3, 5, 6, 7, 3), (1, 2, 4, 3, 1, 5), (2, 2, 3, 4, 9, 9)], ids=str)
def test_derivatives_of_first_and_second_order(shape):
    given = operands(shape, torch.float64)
    assert torch.autograd.gradcheck(depthwise_conv2d, given)
    assert torch.autograd.gradgradcheck(depthwise_conv2d, given)


def test_the_fast_weight_gradient_and_the_fft_have_second_derivatives_too():
    for shape in (SHAPES["wide"], SHAPES["by FFT"]):
        grads = []
        for convolve, dtype in ((depthwise_conv2d, torch.float32), (reference, torch.float64)):
            x, weight, bias = (tensor.detach().to(dtype).requires_grad_() for tensor in operands(shape))
            first = torch.autograd.grad(convolve(x, weight, bias).square().sum(), weight, create_graph=True)[0]
            grads.append(torch.autograd.grad(first.square().sum(), (x, weight)))
        assert all(error(found, expected) < 1e-5 for found, expected in zip(*grads, strict=True))


def test_forward_mode_and_function_transforms():
    x, weight, bias = (tensor.detach() for tensor in operands(SHAPES["M < N"]))

    def loss(convolve):
        return lambda weight: convolve(x, weight, bias).square().sum()

    for transform in (torch.func.grad, lambda f: lambda w: torch.func.jvp(f, (w,), (w,))[1]):
        found, expected = (transform(loss(convolve))(weight) for convolve in (depthwise_conv2d, reference))
        torch.testing.assert_close(found, expected)
    weight.requires_grad_()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        tangent = torch.autograd.forward_ad.unpack_dual(depthwise_conv2d(dual, weight)).tangent
    torch.testing.assert_close(tangent, reference(x, weight))
    many = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.func.vmap(depthwise_conv2d, (0, None))(many, weight)[1], reference(2 * x, weight))
    weight.requires_grad_(False)
    jvp = torch.compile(lambda x: torch.func.jvp(lambda x: depthwise_conv2d(x, weight), (x,), (x,))[1], backend="eager")
    torch.testing.assert_close(jvp(x), reference(x, weight))


@pytest.mark.parametrize("stride", ["transposed", "strided", "expanded"])
def test_any_strides(stride):
    x = {
        "transposed": torch.randn(2, 20, 12, 14).mT,
        "strided": torch.randn(2, 14, 24, 40)[:, :, ::2, ::2].permute(0, 3, 1, 2),
        "expanded": torch.randn(2, 1, 14, 12).expand(2, 20, 14, 12),
    }[stride].detach()
    _, weight, bias = operands(SHAPES["wide"])
    x.requires_grad_()
    assert error(depthwise_conv2d(x, weight, bias), reference(x.double(), weight.double(), bias.double())) < 1e-5
    depthwise_conv2d(x, weight, bias).sum().backward()  # whose gradient is an expanded one
    assert error(bias.grad, torch.full((20,), 2.0 * x.shape[2] * x.shape[3], dtype=torch.float64)) < 1e-6


class ConvolutionStrides(TorchDispatchMode):
    """Notes in which layout every convolution gives its result."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.found.append(out.stride())
        return out


def test_a_single_image_is_convolved_in_its_layout_whatever_its_batch_stride():
    """Compiled code gives it 0, which PyTorch would take for NCHW, where oneDNN is slow for wide kernels."""
    x = torch.randn(12, 14, 20).as_strided((1, 20, 12, 14), (0, 1, 280, 20))
    weight = torch.randn(20, 1, 3, 15)
    with torch.no_grad(), ConvolutionStrides() as strides:
        y = depthwise_conv2d(x, weight)
    assert strides.found == [(3360, 1, 280, 20)]
    torch.testing.assert_close(y, reference(x, weight), rtol=1e-4, atol=1e-4)


FEW_CHANNELS = """
import torch
from tests.test_large_kernel import error, operands, reference
from zoo.layers.large_kernel import depthwise_conv2d

torch.set_num_threads(1)
for shape in ((2, 16, 5, 40, 3, 11), (1, 16, 5, 40, 3, 13), (2, 2, 5, 40, 5, 15), (1, 8, 5, 56, 5, 51)):
    given = operands(shape, torch.bfloat16, torch.channels_last)
    found = depthwise_conv2d(*given)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert error(found, reference(*(tensor.double() for tensor in given))) < 3e-2
    found.sum().backward()
    with torch.no_grad():
        assert torch.equal(depthwise_conv2d(*given), found)
"""


def test_wide_kernels_of_few_channels_come_to_an_end():
    """In bfloat16 and channels_last, where oneDNN's own never does on some processors."""
    done = Program("-c", FEW_CHANNELS, cwd=ROOT).finish(timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("size", [3, 7, 14, 28])
def test_sum_of_branches(size, memory_format):
    torch.manual_seed(0)
    x = torch.randn(2, 6, size, size).contiguous(memory_format=memory_format).requires_grad_()
    tall, wide, small = (torch.randn(6, 1, *edges, requires_grad=True) for edges in ((27, 5), (5, 27), (5, 5)))
    bias = torch.randn(6, requires_grad=True)
    for branches in ((tall, wide, small), (tall, wide, None), (None, wide, small), (None, None, small)):
        given = [x, *(branch for branch in branches if branch is not None), bias]
        found = large_kernel_sum(x, *branches, bias)
        exact = [tensor.detach().double().requires_grad_() for tensor in given]
        expected = sum(reference(exact[0], weight) for weight in exact[1:-1]) + exact[-1][:, None, None]
        assert error(found, expected) < 1e-5
        grads = zip(
            torch.autograd.grad(found.square().sum(), given),
            torch.autograd.grad(expected.square().sum(), exact),
            strict=True,
        )
        assert all(error(got, wanted) < 1e-5 for got, wanted in grads)
        with torch.no_grad():
            assert error(large_kernel_sum(x, *branches, bias), expected) < 1e-5


@pytest.mark.parametrize(
    ("edges", "bias", "message"),
    [
        ((3, 1, 4, 5), None, "odd, not 4x5"),
        ((2, 1, 5, 5), None, r"not \(1, 3, 8, 8\) and \(2, 1, 5, 5\)"),
        ((3, 3, 5, 5), None, r"weight \(C, 1, kh, kw\)"),
        ((3, 1, 5, 5), (4,), "3 channels take a bias"),
    ],
)
def test_what_does_not_fit(edges, bias, message):
    with pytest.raises(ConfigError, match=message):
        depthwise_conv2d(torch.randn(1, 3, 8, 8), torch.randn(edges), None if bias is None else torch.randn(bias))


def test_what_does_not_fit_on_the_meta_device():
    with pytest.raises(ConfigError, match="odd, not 4x5"):
        depthwise_conv2d(torch.randn(1, 3, 8, 8, device="meta"), torch.randn(3, 1, 4, 5, device="meta"))
    with pytest.raises(ConfigError, match="one dtype"):
        depthwise_conv2d(torch.randn(1, 3, 8, 8, device="meta"), torch.randn(3, 1, 5, 5, device="meta").half())


@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("wrong", range(3))
def test_dtypes_are_mixed_by_autocast_alone(size, wrong):
    tensors = [torch.randn(1, 3, size, size), torch.randn(3, 1, 31, 5), torch.randn(3)]
    expected = depthwise_conv2d(*tensors)
    tensors[wrong] = tensors[wrong].bfloat16()
    with pytest.raises(ConfigError, match="one dtype outside of autocast, not bfloat16 and float32"):
        depthwise_conv2d(*tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(depthwise_conv2d(*tensors).float(), expected, rtol=0.1, atol=0.5)


def test_an_image_without_its_batch():
    with pytest.raises(ConfigError, match=r"x \(B, C, H, W\) .*, not \(2, 8\)"):
        depthwise_conv2d(torch.randn(2, 8), torch.randn(2, 1, 5, 5))
    with pytest.raises(ConfigError, match=r"x \(B, C, H, W\) .*, not \(2, 8, 8\)"):
        large_kernel_sum(torch.randn(2, 8, 8), torch.randn(2, 1, 5, 3), torch.randn(2, 1, 3, 5), None)


def test_a_sum_of_nothing():
    with pytest.raises(ConfigError, match="at least one"):
        large_kernel_sum(torch.randn(1, 3, 8, 8), None, None, None)


def test_autocast_lowers_what_conv2d_would():
    x, weight, bias = operands(SHAPES["tall"])
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise_conv2d(x, weight, bias)
        assert y.dtype == reference(x, weight, bias).dtype == torch.bfloat16
        assert depthwise_conv2d(x.double(), weight.double()).dtype == torch.float64
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    reference(*exact).sum().backward()
    assert error(weight.grad, exact[1].grad) < 2e-2


# ---------------------------------------------------------------------------------------------- compilers and exporters


class Block(nn.Module):
    """A sum of branches as inference has it, and branches one by one as training has them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tall, self.wide, self.small = (
            nn.Parameter(torch.randn(4, 1, *edges)) for edges in ((27, 5), (5, 27), (5, 5))
        )
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x):
        y = large_kernel_sum(x, self.tall, self.wide, self.small, self.bias)
        return F.gelu(depthwise_conv2d(F.relu(y), self.wide)) * x


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())
def test_compiled_whole_without_recompiling_for_batches(memory_format):
    torch._dynamo.reset()
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=False)
    x = torch.randn(2, 4, 12, 10).contiguous(memory_format=memory_format)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))
    x.requires_grad_()
    inputs = [x, *block.parameters()]
    found = torch.autograd.grad(compiled(x).square().sum(), inputs)
    expected = torch.autograd.grad(block(x).square().sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())
def test_compiled_to_the_same_convolutions(memory_format):
    """Not to those that exported programs hold, whose sums are the same and whose gradients are slow."""
    torch._dynamo.reset()
    block = Block()
    x = torch.randn(2, 4, 12, 10).contiguous(memory_format=memory_format)
    with torch.no_grad():
        assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=False)(x), block(x))


def test_compiled_code_is_told_from_exported_programs():
    class Sign(nn.Module):
        def forward(self, x):
            return x if is_exporting() else -x

    torch._dynamo.reset()
    model, x = Sign(), torch.ones(3)
    for strict in (False, True):
        assert torch.equal(torch.export.export(model, (x,), strict=strict).module()(x), x)
        assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), -x)
    assert torch.equal(model(x), -x)


@shapes
def test_a_backward_pass_in_autocast_keeps_the_type_of_the_forward(shape):
    inputs = operands(shape)
    found = []
    for convolve in (depthwise_conv2d, reference):
        y = convolve(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(torch.autograd.grad(y, inputs, torch.ones_like(y)))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())
@shapes
def test_what_it_returns_may_be_written_over(shape, memory_format):
    x, weight, bias = operands(shape, memory_format=memory_format)
    y = depthwise_conv2d(x, weight, bias)
    expected = y.detach() * 2
    y.mul_(2).sum().backward()
    assert torch.equal(y, expected)
    assert x.grad is not None


@shapes
def test_many_gradients_at_once(shape):
    x, weight, bias = operands(shape)
    y = depthwise_conv2d(x, weight, bias)
    upstream = torch.randn(3, *y.shape)
    found = torch.autograd.grad(y, (x, weight, bias), upstream, retain_graph=True, is_grads_batched=True)
    for i in range(3):
        one = torch.autograd.grad(y, (x, weight, bias), upstream[i], retain_graph=True)
        for ours, exact in zip(found, one, strict=True):
            torch.testing.assert_close(ours[i], exact)


def test_operators_keep_their_promises_to_the_compiler():
    """torch's own checks: fake outputs have the real shapes and strides, autograd is registered as it should be."""
    for memory_format in FORMATS.values():
        x, weight, bias = operands((2, 3, 8, 7, 9, 3), memory_format=memory_format)
        torch.library.opcheck(torch.ops.zoo.depthwise_conv2d.default, (x, weight, bias))
        torch.library.opcheck(torch.ops.zoo.depthwise_conv2d_weight_grad.default, (x, x.detach(), 9, 3))


def test_exported_programs_hold_plain_convolutions():
    block, x = Block().eval(), torch.randn(2, 4, 12, 10)
    batch, height = torch.export.Dim("batch", min=1, max=16), torch.export.Dim("height", min=2, max=64)
    fixed = torch.export.export(block, (x,))
    free = torch.export.export(block, (x,), dynamic_shapes=({0: batch, 2: height},))
    strict = torch.export.export(block, (x,), dynamic_shapes=({0: batch, 2: height},), strict=True)
    for program in (fixed, free, strict):
        called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert sum("conv2d" in name for name in called) == 4
        assert not any("zoo" in name for name in called)
        torch.testing.assert_close(program.module()(x), block(x), rtol=1e-4, atol=1e-4)
    for program in (free, strict):
        other = torch.randn(3, 4, 40, 10)
        torch.testing.assert_close(program.module()(other), block(other), rtol=1e-4, atol=1e-4)
    kernels = {tuple(node.meta["val"].shape[2:]) for node in fixed.graph.nodes if "slice" in str(node.target)}
    assert (23, 5) in kernels  # 12 rows use 23 of 27 taps, and sizes are fixed


def test_onnx_has_conv_nodes(tmp_path):
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    block, x = Block().eval(), torch.randn(2, 4, 12, 10)
    torch.onnx.export(block, (x,), tmp_path / "block.onnx", dynamo=True, verbose=False)
    graph = onnx.load(tmp_path / "block.onnx").graph
    assert [node.op_type for node in graph.node].count("Conv") == 4
    assert not any(node.domain for node in graph.node)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_and_fx_compute_the_same_bits():
    block, x = Block().eval(), torch.randn(2, 4, 12, 10)
    with torch.no_grad():
        expected = block(x)
        graph = torch.fx.symbolic_trace(large_kernel_sum_of, concrete_args={"weights": None})
        assert torch.equal(graph(x, None), large_kernel_sum_of(x, None))
        assert torch.equal(torch.jit.script(depthwise_conv2d)(x, block.wide, None), depthwise_conv2d(x, block.wide))
        found = torch.jit.script(large_kernel_sum)(x, block.tall, block.wide, block.small, block.bias)
        assert torch.equal(found, large_kernel_sum(x, block.tall, block.wide, block.small, block.bias))
        traced = torch.jit.trace(block, x)
        torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-4)
        larger = torch.randn(1, 4, 33, 40)
        torch.testing.assert_close(traced(larger), block(larger), rtol=1e-4, atol=1e-4)


def large_kernel_sum_of(x, weights):
    weight = torch.ones(4, 1, 5, 3)
    return large_kernel.depthwise_conv2d(x, weight)


def test_costs_are_those_of_the_whole_kernels():
    """A profile counts every tap, as the papers do, wherever it would be cut off."""
    costs = zoo.profile(Block(), input_size=(4, 12, 10))
    taps = 27 * 5 + 5 * 27 + 5 * 5 + 5 * 27
    assert costs.macs == 4 * 12 * 10 * taps


def test_complex_maps_are_convolved_where_an_fft_would_win():
    x, weight = torch.randn(1, 2, 56, 56, dtype=torch.complex64), torch.randn(2, 1, 51, 51, dtype=torch.complex64)
    torch.testing.assert_close(depthwise_conv2d(x, weight), torch.conv2d(x, weight, padding=25, groups=2))


def test_complex_maps_and_kernels_learn_as_conv2d_has_it():
    x, weight, grad = (
        torch.randn(shape, dtype=torch.complex128) for shape in [(2, 3, 9, 8), (3, 1, 7, 5), (2, 3, 9, 8)]
    )
    x.requires_grad_()
    weight.requires_grad_()
    found = torch.autograd.grad(depthwise_conv2d(x, weight), (x, weight), grad)
    expected = torch.autograd.grad(torch.conv2d(x, weight, padding=(3, 2), groups=3), (x, weight), grad)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scripted", [False, True])
def test_whole_numbers_stay_exact_where_an_fft_would_win(scripted):
    x, weight = torch.randint(-9, 9, (1, 2, 56, 56)), torch.randint(-9, 9, (2, 1, 51, 51))
    convolve = torch.jit.script(depthwise_conv2d) if scripted else depthwise_conv2d
    assert torch.equal(convolve(x, weight), torch.conv2d(x, weight, padding=25, groups=2))
