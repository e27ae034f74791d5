"""The decoder's step in C++: as PyTorch's in every storage, compiled once, and done without where it must be."""

from __future__ import annotations

import copy
import itertools
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import zoo
from tests.test_fast_decoder import error, randomised
from zoo.errors import ConfigError
from zoo.layers import native_step
from zoo.layers.quantized import QuantizedLinear

pytestmark = pytest.mark.skipif(native_step.library() is None, reason="there is no C++ compiler on this machine")


def steps(model, tokens, **cache):
    """Logits token by token, after four at once."""
    memory = model.make_cache(1, tokens.shape[1], **cache)
    parts = [model(tokens[:, :4], cache=memory)]
    parts += [model(tokens[:, place : place + 1], cache=memory) for place in range(4, tokens.shape[1])]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mobilellm_125m", "mobilellm_r1_140m"])
@torch.inference_mode()
def test_sixteen_bits_equal_the_same_weights_in_float32(name, weights):
    narrow = zoo.optimize_for_inference(randomised(name)).to(weights)
    wide = copy.deepcopy(narrow).float()
    tokens = torch.randint(0, 257, (1, 16))
    caches = [form.make_cache(1, 16, dtype=torch.float32) for form in (narrow, wide)]
    for place in range(16):  # from the first token on: PyTorch would round activations to 16 bits
        got, wanted = (
            form(tokens[:, place : place + 1], cache=cache) for form, cache in zip((narrow, wide), caches, strict=True)
        )
        rounding = 2.0**-8 if weights == torch.bfloat16 else 2.0**-11  # of the logits that are handed out
        assert error(got, wanted) < rounding


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_keys_and_values_in_any_dtype(kept, monkeypatch):
    fast = zoo.optimize_for_inference(randomised("mobilellm_pro"))
    tokens = torch.randint(0, 257, (1, 16))
    found = steps(fast, tokens, dtype=kept)
    monkeypatch.setenv("ZOO_NATIVE", "0")
    assert error(found, steps(fast, tokens, dtype=kept)) < 1e-5


@pytest.mark.parametrize("to", ["int8", "int4"])
@pytest.mark.parametrize("count", [1, 3, 4, 8, 13])
@pytest.mark.parametrize("shape", [(48, 64), (257, 96)])
@torch.inference_mode()
def test_products_of_whole_numbers_are_exact(to, count, shape):
    """Activations that 8 bits hold exactly give what float64 gives of the same weights."""
    torch.manual_seed(0)
    linear = QuantizedLinear(torch.randn(shape), 8 if to == "int8" else 4, 32)
    x = torch.randint(-127, 128, (count, shape[1])).float()
    x[:, ::32] = 127  # so that each group's scale is 1
    assert error(linear(x), x.double() @ linear.dequantize(torch.float64).T) < 1e-6


@torch.inference_mode()
def test_a_form_that_moves_or_takes_other_weights_is_read_anew():
    fast = zoo.optimize_for_inference(randomised("mobilellm_125m"))
    tokens = torch.randint(0, 257, (1, 8))
    before = steps(fast, tokens)
    other = {key: value * 1.5 if "down" in key else value for key, value in fast.state_dict().items()}
    copied = copy.deepcopy(fast)
    copied.load_state_dict(other, assign=True)
    assert error(steps(copied, tokens), copied(tokens)[:, 3:]) < 1e-5
    assert error(steps(copied, tokens), before) > 1e-3
    assert error(steps(fast, tokens), before) == 0
    assert error(steps(fast.bfloat16(), tokens), before) < 0.1


@pytest.mark.parametrize("to", [None, "int8", "int4"])
@torch.inference_mode()
def test_who_counts_operations_sees_a_steps_products(to):
    model = randomised("mobilellm_125m")
    form = zoo.optimize_for_inference(model) if to is None else zoo.quantize(model, to)
    tokens = torch.randint(0, 257, (1, 9))
    flops = []
    for counted in (model, form):
        cache = counted.make_cache(1, 9)
        counted(tokens[:, :8], cache=cache)
        with FlopCounterMode(display=False) as counter:
            counted(tokens[:, 8:], cache=cache)
        flops.append(counter.get_total_flops())
    assert 0 < flops[0] <= flops[1] < 1.02 * flops[0]  # rows that fill up a quantised matrix are multiplied, too


def other_data(fast, down):
    down.weight.data = 1.5 * down.weight.data


def other_parameter(fast, down):
    down.weight = torch.nn.Parameter(1.5 * down.weight, requires_grad=False)


def assigned(fast, down):
    down.load_state_dict({"weight": 1.5 * down.weight}, assign=True)


def other_layer(fast, down):
    fast.model.layers[0] = copy.deepcopy(fast.model.layers[0])
    fast.model.layers[0].down.weight.mul_(1.5)


def other_class(fast, down):
    linear = torch.nn.Linear(down.in_features, down.out_features, bias=False)
    linear.weight = torch.nn.Parameter(1.5 * down.weight, requires_grad=False)
    fast.model.layers[0].down = linear


def hooked(fast, down):
    down.register_forward_hook(lambda module, inputs, output: 1.5 * output)


def narrow_norm(fast, down):
    fast.bfloat16()
    steps(fast, torch.arange(8)[None])
    fast.model.norm.weight.mul_(1.5)


@pytest.mark.parametrize(
    "change", [other_data, other_parameter, assigned, other_layer, other_class, hooked, narrow_norm]
)
@torch.inference_mode()
def test_what_is_changed_between_sequences_is_noticed(change):
    fast = zoo.optimize_for_inference(randomised("mobilellm_125m"))
    tokens = torch.randint(0, 257, (1, 8))
    before = steps(fast, tokens)
    change(fast, fast.model.layers[0].down)
    wanted = fast(tokens)[:, 3:]
    assert error(wanted, before) > 1e-3
    precision = 0.03 if change is narrow_norm else 1e-5  # PyTorch rounds activations to 16 bits
    assert error(steps(fast, tokens), wanted) < precision


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64, torch.device("meta")], ids=str)
def test_the_default_dtype_and_device_change_no_text(default):
    model = randomised("mobilellm_125m")
    forms = zoo.optimize_for_inference(model), zoo.quantize(model)
    wanted = [zoo.generate(form, [5, 6, 7], max_new_tokens=8) for form in (model, forms[1])]
    device = default if isinstance(default, torch.device) else torch.device("cpu")
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default if isinstance(default, torch.dtype) else before)
        with device:
            found = [zoo.generate(form, [5, 6, 7], max_new_tokens=8) for form in forms]
    finally:
        torch.set_default_dtype(before)
    assert found == wanted


@torch.inference_mode()
def test_bad_input_is_refused_before_it_is_read():
    fast = zoo.optimize_for_inference(randomised("mobilellm_125m"))
    cache = fast.make_cache(1, 4)
    fast(torch.arange(3)[None], cache=cache)
    with pytest.raises(ConfigError, match="outside the vocabulary"):
        fast(torch.tensor([[-1]]), cache=cache)
    fast(torch.tensor([[3]]), cache=cache)
    with pytest.raises(ConfigError, match="room for 4 tokens"):
        fast(torch.tensor([[4]]), cache=cache)


@torch.inference_mode()
def test_any_number_of_threads_gives_the_same():
    fast = zoo.optimize_for_inference(randomised("mobilellm_125m"))
    tokens = torch.randint(0, 257, (1, 12))
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(steps(fast, tokens))
    finally:
        torch.set_num_threads(threads)
    assert max(error(other, found[0]) for other in found[1:]) < 1e-6


def test_compiled_once_for_several_processes_at_a_time(tmp_path):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", "from zoo.layers import native_step; print(native_step.library() is not None)"],
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        for _ in range(2)
    ]
    assert [process.communicate(timeout=300)[0].strip() for process in started] == ["True", "True"]
    assert [path.suffix for path in (tmp_path / "backbone-zoo" / "native").iterdir()] == [".so"]


def test_without_a_compiler_pytorch_does_it(tmp_path, monkeypatch, caplog):
    fast = zoo.optimize_for_inference(randomised("mobilellm_125m"))
    tokens = torch.randint(0, 257, (1, 8))
    native_step._library.cache_clear()
    try:
        with torch.inference_mode(), monkeypatch.context() as patch:
            patch.setenv("PATH", str(tmp_path))
            patch.delenv("CXX", raising=False)
            found = steps(fast, tokens)
            steps(fast, tokens)
        assert fast._native is None
        assert caplog.text.count("no C++ compiler is installed") == 1
    finally:
        native_step._library.cache_clear()
    with torch.inference_mode():
        assert error(found, steps(fast, tokens)) < 1e-5
    assert fast._native is not None


def test_a_compiler_that_fails_is_told_once(tmp_path, monkeypatch, caplog):
    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "what is this" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native_step._library.cache_clear()
    try:
        assert native_step.library() is None
        assert "could not compile native_step.cpp: what is this" in caplog.text
        assert list((tmp_path / "cache" / "backbone-zoo" / "native").iterdir()) == []  # nothing half-written
    finally:
        native_step._library.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["-mno-avx512f", "-mno-avx512vnni", "-mno-avx"])
def test_the_forms_for_other_processors(flag, tmp_path, monkeypatch):
    """What this processor leaves out of its instructions, others lack."""
    if platform.machine() != "x86_64":
        pytest.skip("these are flags for x86-64")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native_step, "FLAGS", (*native_step.FLAGS, flag))
    native_step._library.cache_clear()
    try:
        assert native_step.library() is not None
        fast = zoo.optimize_for_inference(randomised("mobilellm_pro"))
        tokens = torch.randint(0, 257, (1, 20))
        with torch.inference_mode():
            assert error(steps(fast, tokens), fast(tokens)[:, 3:]) < 1e-5
            for bits, shape in itertools.product((8, 4), ((257, 96), (48, 64))):
                linear = QuantizedLinear(torch.randn(shape), bits, 32)
                x = torch.randint(-127, 128, (9, shape[1])).float()
                x[:, ::32] = 127
                assert error(linear(x), x.double() @ linear.dequantize(torch.float64).T) < 1e-6
    finally:
        native_step._library.cache_clear()
