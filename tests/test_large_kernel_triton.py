"""The GPU's large-kernel convolution: its arithmetic under Triton's interpreter, its machine code without a GPU.

Triton reads TRITON_INTERPRET when it is imported, so what runs interpreted runs in a process of its own.
"""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import ConfigError
from zoo.layers import large_kernel_triton as large
from zoo.layers.large_kernel import large_kernel_sum

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SLAK = [(51, 5), (5, 51), (5, 5)]
# relative error of a whole tensor: of float32 as TF32 and in full, of the 16-bit types
TOLERANCES = {"tf32": 1e-3, "ieee": 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def reference(x, weights, bias=None):
    y = sum(F.conv2d(x, w, None, 1, (w.shape[2] // 2, w.shape[3] // 2), groups=x.shape[1]) for w in weights)
    return y if bias is None else y + bias[:, None, None]


def error(value, expected):
    return float((value.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


def compare(shape, edges, dtype, tolerance, device="cpu", scale=1.0):
    """Outputs and all gradients against float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, *((shape[1], 1, *edge) for edge in edges), (shape[1],)]
    x, *weights, bias = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
    tensors = [(x * scale).requires_grad_(), *(w.requires_grad_() for w in weights), (bias * scale).requires_grad_()]
    y = large.depthwise_conv2d(tensors[0], tensors[1:-1], tensors[-1])
    gradient = torch.randn(shape, generator=generator).to(device, dtype)
    gradients = torch.autograd.grad(y, tensors, gradient)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = reference(exact[0], exact[1:-1], exact[-1])
    expected_gradients = torch.autograd.grad(expected, exact, gradient.double())
    assert y.dtype == dtype
    assert error(y, expected) < tolerance
    for name, value, wanted in zip(["x", *edges, "bias"], gradients, expected_gradients, strict=True):
        assert value.dtype == dtype
        assert error(value, wanted) < tolerance, name


@pytest.fixture(params=["tf32", "ieee"])
def precision(request):
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = request.param
    yield request.param
    torch.backends.cudnn.conv.fp32_precision = before


def test_a_cpu_tensor_is_refused_by_name():
    if INTERPRETED:
        pytest.skip("the interpreter takes tensors of the CPU")
    x = torch.zeros(1, 2, 8, 8)
    assert not large.is_available(x)
    with pytest.raises(ConfigError, match=r"torch.float32 on cpu: use zoo.layers.large_kernel, which falls back"):
        large.depthwise_conv2d(x, [torch.zeros(2, 1, 5, 5)])


def test_without_triton_or_in_float64_nothing_is_available(monkeypatch):
    monkeypatch.setattr(large, "_INTERPRETED", True)
    assert large.is_available(torch.zeros(1))
    assert not large.is_available(torch.zeros(1, dtype=torch.float64))
    assert not large.is_available(torch.zeros(1).expand(2**31))
    monkeypatch.setattr(large, "_INSTALLED", False)
    assert not large.is_available(torch.zeros(1))


def test_without_a_c_compiler_it_falls_back_and_says_why(monkeypatch):
    large._can_build.cache_clear()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.warns(UserWarning, match=r"Triton needs a C compiler \(gcc\)"):
        assert not large._can_build()
    monkeypatch.setenv("CC", "cc")
    large._can_build.cache_clear()
    monkeypatch.setattr(large.sysconfig, "get_path", lambda name: __file__)
    with pytest.warns(UserWarning, match=r"Triton needs Python's header files"):
        assert not large._can_build()
    large._can_build.cache_clear()


@pytest.mark.parametrize(
    ("shape", "weights", "message"),
    [
        ((1, 2, 8), [(2, 1, 3, 3)], r"takes x \(B, C, H, W\), not \(1, 2, 8\)"),
        ((1, 2, 8, 8), [(2, 1, 4, 3)], r"odd edges up to 63, not \(2, 1, 4, 3\)"),
        ((1, 2, 8, 8), [(2, 1, 65, 3)], r"odd edges up to 63, not \(2, 1, 65, 3\)"),
        ((1, 2, 8, 8), [(3, 1, 3, 3)], r"must be \(2, 1, kh, kw\)"),
        ((1, 2, 8, 8), [], "at least one kernel"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape, weights, message):
    with pytest.raises(ConfigError, match=message):
        large.depthwise_conv2d(torch.zeros(shape), [torch.zeros(w) for w in weights])


def test_a_bias_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"must be \(2,\), not \(3,\)"):
        large.depthwise_conv2d(torch.zeros(1, 2, 8, 8), [torch.zeros(2, 1, 3, 3)], torch.zeros(3))


def test_arithmetic_under_the_interpreter(pytestconfig):
    if INTERPRETED:
        pytest.skip("this is the interpreter's process")
    which = ["-m", pytestconfig.option.markexpr, f"{__file__}::TestInterpreted"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *which]
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    run = subprocess.run(command, cwd=ROOT, env={**env, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    if 'scope.set_attr(tensor, "__index__"' in run.stdout and "only 0-dimensional arrays" in run.stdout:
        pytest.skip("the interpreter of this Triton cannot loop with this NumPy: Triton 3.6 needs one before 2.4")
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert " skipped" not in run.stdout


@pytest.mark.skipif(not INTERPRETED, reason="run by test_arithmetic_under_the_interpreter")
class TestInterpreted:
    @pytest.mark.parametrize(
        ("shape", "edges"),
        [
            ((3, 1, 28, 28), [(49, 5), (5, 49), (5, 5)]),  # SLaK's branches, a batch that fills no tile
            ((2, 2, 7, 7), [(13, 5), (5, 13), (5, 5)]),  # one matrix for the whole map
            ((1, 1, 70, 17), [(51, 3), (3, 51), (3, 3)]),  # tiles and strips, a width that aligns nothing
            ((1, 1, 18, 70), [(3, 51), (5, 3), (3, 5)]),  # the same the other way, no kernel within all others
            pytest.param((1, 1, 70, 66), [(11, 9)], marks=pytest.mark.slow),  # all of these
            ((2, 2, 12, 9), [(11, 11)]),  # more lines than are unrolled
            ((2, 1, 17, 18), [(3, 9), (1, 5)]),  # a small kernel within a wide one
            ((3, 2, 14, 14), [(27, 5), (5, 27), (5, 5)]),  # one matrix, in blocks
            ((2, 2, 4, 5), [(3, 5), (3, 3)]),  # a block of fewer positions than 64
            ((2, 1, 1, 9), [(1, 7)]),  # a single row
            ((1, 1, 9, 8), [(1, 63)]),  # longer than the map
        ],
    )
    def test_float32(self, shape, edges, precision):
        compare(shape, edges, torch.float32, TOLERANCES[precision])

    @pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
    def test_matrices_are_held_for_all_images(self, dtype, monkeypatch):
        monkeypatch.setattr(large, "_slots", lambda *_: 2)  # of which each takes every second group of images
        compare((70, 1, 10, 12), [(9, 3), (3, 11), (3, 3)], dtype, TOLERANCES.get(dtype, TOLERANCES["tf32"]))

    @pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("form", [0, 2, pytest.param(3, marks=pytest.mark.slow), 4])
    def test_every_form_that_a_gpu_may_choose(self, dtype, form, monkeypatch):
        from zoo.layers import large_kernel_programs as programs

        monkeypatch.setattr(programs.band_program, "configs", [programs._CONFIGS[form]])
        compare((5, 2, 28, 20), [(49, 5), (5, 39), (5, 5)], dtype, TOLERANCES.get(dtype, TOLERANCES["tf32"]))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("size", [7, 20])
    def test_16_bits(self, dtype, size):
        compare((2, 2, size, size), [(13, 5), (5, 13), (5, 5)], dtype, TOLERANCES[dtype])

    @pytest.mark.parametrize(
        ("shape", "edge", "used"),
        [
            ((1, 2, 20, 20), 51, True),  # 39 taps of 51 meet the map
            ((1, 1, 36, 36), 71, False),  # more taps than the kernels take: plain convolutions
        ],
    )
    def test_large_kernels_come_here_cropped(self, shape, edge, used):
        """`zoo.layers.large_kernel` chooses these kernels for what they take."""
        x, *weights = (torch.randn(s) for s in (shape, (shape[1], 1, edge, 3), (shape[1], 1, 3, edge)))
        with torch.profiler.profile() as profile:
            y = large_kernel_sum(x, *weights, None)
        assert error(y, reference(x.double(), [w.double() for w in weights])) < TOLERANCES["tf32"]
        assert any(event.key == "zoo::depthwise_bands" for event in profile.key_averages()) == used

    def test_16_bits_in_strips(self):
        compare((1, 1, 68, 20), [(51, 3), (3, 19), (3, 3)], torch.bfloat16, TOLERANCES[torch.bfloat16])

    @pytest.mark.parametrize("bright", [slice(0, 37), slice(33, 34)])
    @pytest.mark.parametrize("turned", [False, True])
    def test_what_no_tap_reaches_makes_nothing_infinite(self, bright, turned, precision):
        """The scale into float16's range knows of all that is multiplied, by zeros of the matrices, too."""
        x, weight = torch.randn(1, 1, 128, 16) * 1e-3, torch.randn(1, 1, 51, 3)
        x[:, :, bright] *= 1e6
        if turned:
            x, weight = x.mT, weight.mT
        y = large.depthwise_conv2d(x, [weight])
        assert error(y, reference(x.double(), [weight.double()])) < TOLERANCES[precision]

    @pytest.mark.parametrize("size", [7, 20, pytest.param(70, marks=pytest.mark.slow)])
    def test_transposed_kernels(self, size):
        x = torch.randn(1, 2, size, 17)
        weights = [torch.randn(2, 1, 5, 9).mT, torch.randn(2, 1, 7, 3).mT, *(torch.randn(2, 1, 3, 3).mT for _ in "ab")]
        weights += [torch.randn(2, 1, 1, 3)]
        for some in (weights, weights[:1], weights[1:], weights[:3]):
            assert error(large.depthwise_conv2d(x, some), reference(x.double(), [w.double() for w in some])) < 1e-3

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    @pytest.mark.parametrize("size", [7, 20])
    def test_magnitudes_beyond_float16(self, size, scale, precision):
        """float32 is scaled into float16's range, so its own range remains."""
        x, weight = torch.randn(2, 2, size, size) * scale, torch.randn(2, 1, 13, 5)
        y = large.depthwise_conv2d(x, [weight])
        assert error(y, reference(x.double(), [weight.double()])) < TOLERANCES[precision]

    @pytest.mark.parametrize(("size", "edge"), [(7, 5), (14, 5), (20, 5), (20, 9)])
    def test_an_image_beyond_all_bounds_leaves_the_others_alone(self, size, edge):
        x, weight = torch.randn(3, 1, size, size), torch.randn(1, 1, 13, edge)
        x[0, 0, 2, 2], x[1] = float("inf"), x[1] * 1e20
        y = large.depthwise_conv2d(x, [weight])
        assert not y[0].isfinite().all()
        for image in (1, 2):
            assert error(y[image], reference(x[image : image + 1].double(), [weight.double()])[0]) < TOLERANCES["tf32"]

    @pytest.mark.parametrize("size", [7, 14, 20])
    @pytest.mark.parametrize("bits", [0x7FFFFFFF, -1])
    def test_what_a_gpu_writes_for_nan_stays_nan(self, size, bits, precision):
        """All ones: rounding must not carry into the sign. Every image has its own scale, and stays apart."""
        x, weight = torch.randn(3, 1, size, size), torch.randn(1, 1, 13, 5, requires_grad=True)
        x.view(torch.int32)[1, 0, 2, 2] = bits
        y = large.depthwise_conv2d(x, [weight])
        assert y[1].isnan().any()
        assert not y[::2].isnan().any()
        (of_weight,) = torch.autograd.grad(y[:, :, :3].nansum(), weight)
        assert of_weight.isnan().any()

    @pytest.mark.parametrize(("size", "edges"), [((7, 5), (13, 9)), ((14, 12), (51, 5)), ((12, 20), (51, 49))])
    def test_taps_that_never_touch_the_map_have_no_part(self, size, edges):
        """Of no kernel, turned or not, and whatever stands in them; their gradient is zero."""
        tall, wide = (torch.randn(2, 1, *edge) for edge in (edges, edges[::-1]))
        beyond = [torch.ones_like(w, dtype=torch.bool) for w in (tall, wide)]
        for mask in beyond:
            large.crop(mask, *size).zero_()
        tall[beyond[0]], wide[beyond[1]] = float("inf"), float("nan")
        tensors = [torch.randn(3, 2, *size, requires_grad=True), tall.requires_grad_(), wide.requires_grad_()]
        y = large.depthwise_conv2d(tensors[0], tensors[1:])
        cropped = [tensors[0].double(), *(large.crop(w, *size).double() for w in (tall, wide))]
        expected = reference(cropped[0], cropped[1:])
        gradient = torch.randn_like(y)
        assert error(y, expected) < TOLERANCES["tf32"]
        exact = torch.autograd.grad(expected, tensors, gradient.double())
        for value, wanted in zip(torch.autograd.grad(y, tensors, gradient), exact, strict=True):
            assert error(value, wanted) < TOLERANCES["tf32"]

    def test_zeros_stay_zeros(self):
        for size in (7, 14, 20):
            zeros, weight = torch.zeros(1, 2, size, size), torch.zeros(2, 1, 13, 5)
            assert not large.depthwise_conv2d(zeros, [weight + 1]).any()
            assert not large.depthwise_conv2d(zeros + 1, [weight]).any()

    def test_branches_are_summed_whichever_lies_within_which(self):
        x = torch.randn(1, 1, 9, 9)
        every = [(7, 3), (3, 7), (5, 1), (1, 3), (5, 5)]
        for edges in [*itertools.combinations(every, 2), every]:
            weights = [torch.randn(1, 1, *edge) for edge in edges]
            y = large.depthwise_conv2d(x, weights)
            assert error(y, reference(x.double(), [w.double() for w in weights])) < 1e-3, edges

    def test_operations_are_counted_as_those_of_convolutions(self):
        """By torch's counter; the small kernel's gradient is part of the tall one's, and costs nothing."""
        x, tall, wide, small = (
            torch.randn(s, requires_grad=True) for s in [(2, 3, 20, 20), *((3, 1, *e) for e in SLAK)]
        )
        tall, wide = tall[:, :, 6:45], wide[..., 6:45]
        with FlopCounterMode(display=False) as counter:
            y = large.depthwise_conv2d(x, [tall, wide, small])
        assert counter.get_total_flops() == 2 * x.numel() * (39 * 5 + 5 * 39 + 5 * 5)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == 2 * x.numel() * (2 * 39 * 5 + 2 * 5 * 39 + 5 * 5)

    def test_memory_format_is_kept(self):
        x, weight = torch.randn(2, 3, 9, 9), torch.randn(3, 1, 7, 3)
        y = large.depthwise_conv2d(x, [weight])
        assert y.is_contiguous()
        last = large.depthwise_conv2d(x.contiguous(memory_format=torch.channels_last), [weight])
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(last, y)

    def test_strided_input_and_cropped_kernel(self):
        x, weight = torch.randn(2, 3, 9, 18)[..., ::2], torch.randn(3, 1, 11, 5)[:, :, 2:9, 1:4]
        assert error(large.depthwise_conv2d(x, [weight]), reference(x.double(), [weight.double()])) < 1e-3

    @pytest.mark.parametrize("shape", [(0, 2, 9, 9), (2, 0, 9, 9)])
    def test_nothing_in_nothing_out(self, shape):
        x = torch.zeros(shape, requires_grad=True)
        weight = torch.randn(shape[1], 1, 5, 3, requires_grad=True)
        y = large.depthwise_conv2d(x, [weight])
        y.sum().backward()
        assert y.shape == shape
        assert not weight.grad.any()

    def test_autocast_computes_in_the_lower_type(self):
        x = torch.randn(1, 2, 9, 9)
        weight = torch.randn(2, 1, 7, 3, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = large.depthwise_conv2d(x, [weight])
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16
        assert weight.grad.dtype == torch.float32
        assert error(y, reference(x.double(), [weight.double()])) < TOLERANCES[torch.bfloat16]

    def test_second_derivatives(self, precision):
        inputs = [torch.randn(s, requires_grad=True) for s in ((1, 2, 9, 8), (2, 1, 5, 3), (2, 1, 3, 5))]

        def second(function, tensors):
            first = torch.autograd.grad(function(tensors[0], tensors[1:]).pow(3).sum(), tensors, create_graph=True)
            return torch.autograd.grad(sum(g.pow(2).sum() for g in first), tensors)

        exact = second(reference, [tensor.detach().double().requires_grad_() for tensor in inputs])
        for value, expected in zip(second(large.depthwise_conv2d, inputs), exact, strict=True):
            assert error(value, expected) < {"tf32": 5e-3, "ieee": 1e-5}[precision]

    def test_compiles_whole_with_gradients(self):
        weights = [torch.randn(2, 1, *edge, requires_grad=True) for edge in ((7, 3), (3, 7), (3, 3))]

        def step(x):
            return (large.depthwise_conv2d(x, weights) * 2).relu()

        x = torch.randn(2, 2, 9, 9)
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), step(x))
        plain = torch.autograd.grad(step(x).sum(), weights)
        for value, expected in zip(torch.autograd.grad(compiled(x).sum(), weights), plain, strict=True):
            torch.testing.assert_close(value, expected)

    def test_operators_are_registered_rightly(self):
        x, tall, wide = torch.randn(1, 2, 9, 9), torch.randn(2, 1, 5, 3), torch.randn(2, 1, 3, 5)
        x, tall, wide = (tensor.requires_grad_() for tensor in (x, tall, wide))
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(torch.ops.zoo.depthwise_bands, (x, tall, wide, None, None), test_utils=tests)
        torch.library.opcheck(torch.ops.zoo.depthwise_bands_weight, (x, x, 5, 3, x.dtype), test_utils=tests)


# --------------------------------------------------------------------------------------------------------------------
# Machine code: Triton brings the assembler along


@pytest.fixture
def code(monkeypatch):
    """The benchmark that assembles every program."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("large_kernel_code")


def check_machine_code(code, size, tap, dtype, products, capability, lines=5):
    from zoo.layers import large_kernel_programs as programs

    smallest = {}
    for program, tensors, constants, *options in code.programs_at(size, tap, dtype, products, lines):
        shared, ptx, cubin = code.assembled(program, tensors, constants, capability, *options)
        name = f"{program} {constants} {options}"
        assert cubin, name
        smallest[program] = min(shared, smallest.get(program, shared))
        if program is not programs.matrix_program:
            assert "mma" in ptx, name  # tensor cores, not multiply-adds
    assert (
        max(smallest.values()) <= 99 * 1024
    )  # what a block may have on the smallest of these GPUs; others are skipped


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90])
def test_every_program_compiles(code, capability):
    check_machine_code(code, 20, 27, "bf16", 0, capability, lines=3)
    check_machine_code(code, 7, 13, "fp32", 1, capability, lines=3)


@pytest.mark.slow  # each of the forms takes seconds to compile
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("dtype", "products"), [("fp32", 1), ("fp32", 3), ("bf16", 0)])
@pytest.mark.parametrize(("size", "tap"), [(56, 51), (28, 49), (14, 27), (7, 13)])
def test_every_form_of_slaks_stages_compiles(code, size, tap, dtype, products):
    check_machine_code(code, size, tap, dtype, products, 90)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_more_lines_than_shared_memory_holds_are_not_held(code):
    check_machine_code(code, 56, 51, "bf16", 0, 86, lines=7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("channels", "size", "tap"), [(124, 56, 51), (249, 28, 49), (499, 14, 47), (998, 7, 13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slaks_stages_on_a_gpu(channels, size, tap, dtype, precision):
    tolerance = TOLERANCES[precision if dtype == torch.float32 else dtype]
    tolerance = max(tolerance, 1e-5)  # tensor cores cut their sums off, where the interpreter rounds
    compare((4, channels, size, size), [(tap, 5), (5, tap), (5, 5)], dtype, tolerance, "cuda")
