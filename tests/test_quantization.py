"""Language models in 8 and 4 bits: how exact they are, and that every verb takes them."""

from __future__ import annotations

import json

import pytest
import torch

import zoo
from tests.language import small
from tests.test_fast_decoder import Adapter, error, randomised, reduced
from zoo.cli import main
from zoo.errors import ConfigError
from zoo.layers import native_step
from zoo.layers.quantized import QuantizedEmbedding, QuantizedLinear

BITS = {"int8": 8, "int4": 4}


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize(("bits", "steps"), [(8, 127), (4, 7)])
def test_weights_are_rounded_to_the_nearest_of_their_group(bits, steps, group_size):
    torch.manual_seed(0)
    weight = torch.randn(40, 128)
    weight[3] = 0
    linear = QuantizedLinear(weight, bits, group_size)
    off = (linear.dequantize() - weight).unflatten(1, (-1, group_size)).abs()
    scale = weight.unflatten(1, (-1, group_size)).abs().amax(-1, keepdim=True) / steps
    plain = (weight.unflatten(1, (-1, group_size)) / scale.clamp(min=1e-9)).round() * scale
    assert bool((linear.dequantize()[3] == 0).all())
    assert off.square().sum() <= 1.001 * (plain - weight.unflatten(1, (-1, group_size))).square().sum()
    if bits == 8:
        assert bool((off <= 0.51 * scale).all())
    bytes_each = (linear.packed.nbytes + linear.scales.nbytes) / (48 * 128)  # rows are filled up to 48
    assert bytes_each == bits / 8 + 2 / group_size


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [5, 16, 33])
def test_without_memory_the_form_is_the_same(rows, bits, group_size):
    weight = torch.randn(rows, 128)
    buffers, empty = (dict(QuantizedLinear(w, bits, group_size).named_buffers()) for w in (weight, weight.to("meta")))
    assert buffers.keys() == empty.keys()
    for name, buffer in buffers.items():
        assert empty[name].is_meta
        assert empty[name].dtype == buffer.dtype
        assert empty[name].size() == buffer.size()
        assert empty[name].stride() == buffer.stride()


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_are_those_of_the_matrix(bits):
    torch.manual_seed(0)
    embedding = QuantizedEmbedding(torch.randn(37, 64), bits, 32)
    tokens = torch.randint(0, 37, (2, 5))
    assert torch.equal(embedding(tokens), embedding.dequantize()[tokens])


@pytest.mark.parametrize("name", ["mobilellm_125m", "mobilellm_ls_125m", "mobilellm_pro", "youtu_llm_2b"])
@pytest.mark.parametrize("to", list(BITS))
@torch.inference_mode()
def test_with_and_without_the_library(to, name, monkeypatch):
    model = reduced(name)
    quantized = zoo.quantize(model, to)
    tokens = torch.randint(0, 257, (1, 16))
    targets = tokens.roll(-1, 1)
    whole = quantized(tokens)
    cache = quantized.make_cache(1, 16, dtype=torch.float32)
    steps = [quantized(tokens[:, place : place + 1], cache=cache) for place in range(16)]
    assert error(torch.cat(steps, 1), whole) < 0.02  # other sums round a few activations to the next number
    assert error(quantized(tokens, targets), model(tokens, targets)) < (0.001 if to == "int8" else 0.02)
    monkeypatch.setenv("ZOO_NATIVE", "0")
    assert error(quantized(tokens), whole) < 0.05  # activations are not rounded here
    assert error(quantized(tokens), model(tokens)) < (0.03 if to == "int8" else 0.5)


def check_use(quantized, model, tmp_path):
    """Near the model, all at once and token by token, and the same when saved and opened, as which it returns."""
    tokens = torch.randint(0, 257, (1, 12))
    cache = quantized.make_cache(1, 12, dtype=torch.float32)
    steps = [quantized(tokens[:, place : place + 1], cache=cache) for place in range(12)]
    assert error(torch.cat(steps, 1), quantized(tokens)) < 0.02
    assert error(quantized(tokens), model(tokens)) < 0.03
    again = zoo.create_model(f"local-dir:{zoo.save_pretrained(quantized, tmp_path / 'model')}")
    assert torch.equal(again(tokens), quantized(tokens))
    return again


@torch.inference_mode()
def test_matrices_that_groups_do_not_fit_keep_their_precision(tmp_path):
    model = small(dim=72, hidden_dim=160)
    quantized = zoo.quantize(model)
    layer = quantized.model.layers[0]
    assert [isinstance(part, QuantizedLinear) for part in (layer.gate_up, layer.down)] == [False, True]
    check_use(quantized, model, tmp_path)


@pytest.mark.parametrize("to", list(BITS))
@pytest.mark.parametrize(
    "widths",
    [
        pytest.param((32, 96, 64), id="whole groups", marks=pytest.mark.slow),
        pytest.param((40, 93, 1), id="others"),
        pytest.param(45, id="all alike"),
    ],
)
@torch.inference_mode()
def test_hidden_channels_that_fill_no_group_are_filled_up(widths, to, tmp_path):
    model = small(hidden_dim=widths)
    quantized = zoo.quantize(model, to)
    full = zoo.quantize(small(hidden_dim=96), to)
    sizes = [sum(tensor.nbytes for tensor in form.state_dict().values()) for form in (quantized, full)]
    assert sizes[0] < sizes[1]
    for layer, width in zip(quantized.model.layers, model.config.hidden_dims, strict=True):
        assert isinstance(layer.down, QuantizedLinear)
        assert not layer.down.dequantize()[:, width:].any()
    if to == "int8":
        again = check_use(quantized, model, tmp_path)
        assert again.config == model.config
        assert quantized._native is not None or native_step.library() is None  # whatever the widths, by the library
    assert zoo.profile(quantized).params == zoo.profile(model).params
    assert zoo.profile(quantized).effective is None
    with pytest.raises(ConfigError, match="A quantised model has no weights to count zeros in: give the one"):
        zoo.sparsity.report(quantized)


@pytest.mark.parametrize("to", list(BITS))
@torch.inference_mode()
def test_saved_opened_and_used(to, tmp_path):
    model = randomised("mobilellm_r1_140m")
    quantized = zoo.quantize(model, to)
    folder = zoo.save_pretrained(quantized, tmp_path / "model", tokenizer=zoo.create_tokenizer("bytes"))
    plain = zoo.save_pretrained(model, tmp_path / "plain")
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, plain)]
    assert sizes[0] < sizes[1] * (0.4 if to == "int8" else 0.25)
    opened = zoo.create_model(f"local-dir:{folder}")
    tokens = torch.randint(0, 257, (2, 16))
    assert torch.equal(opened(tokens), quantized(tokens))
    assert opened.quantization == quantized.quantization
    assert zoo.generate(opened, "ab", tokenizer="bytes", max_new_tokens=8) == zoo.generate(
        quantized, "ab", tokenizer="bytes", max_new_tokens=8
    )
    narrow = zoo.create_model(f"local-dir:{folder}", dtype=torch.bfloat16)
    assert narrow(tokens).dtype == torch.bfloat16
    assert narrow.model.layers[0].down.scales.dtype == torch.float16


def test_command_states_the_perplexity_before_and_after(tmp_path, capsys):
    torch.manual_seed(0)
    zoo.save_pretrained(small(), tmp_path / "model", tokenizer=zoo.create_tokenizer("bytes"))
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike; each unhappy family is unhappy in its own way. " * 4)
    arguments = ["quantize", str(tmp_path / "model"), str(tmp_path / "small"), "--to", "int4", "--text", str(text)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    written = json.loads((tmp_path / "small" / "config.json").read_text())["zoo"]["quantization"]
    from zoo.evaluation.language import perplexity

    tokenizer = zoo.create_tokenizer(str(tmp_path / "small"))
    for form, key in ((tmp_path / "model", "before"), (tmp_path / "small", "after")):
        opened = zoo.create_model(f"local-dir:{form}").eval()
        assert written["perplexity"][key] == pytest.approx(perplexity(opened, text.read_text(), tokenizer).perplexity)
        assert f"{written['perplexity'][key]:.4f}" in said
    assert written["perplexity"]["before"] != written["perplexity"]["after"]
    assert main(arguments) == 1  # the folder is not empty
    assert "not empty" in capsys.readouterr().err


def test_the_source_is_not_written_over(tmp_path, capsys):
    """Its weights cannot be had back from 8 bits."""
    best = tmp_path / "run" / "best"
    best.parent.mkdir()
    for folder in (best, tmp_path / "model"):
        zoo.save_pretrained(small(), folder, tokenizer=zoo.create_tokenizer("bytes"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "link").symlink_to(best)
    for source, out in (
        (tmp_path / "model", tmp_path / "model"),
        (best.parent, best.parent),
        (best.parent, best),
        (best / "model.safetensors", tmp_path / "link"),
        (f"local-dir:{best}", best),
    ):
        assert main(["quantize", str(source), str(out), "--overwrite"]) == 1
        assert "holds the model that is quantised, which would be lost" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


@torch.inference_mode()
def test_what_cannot_be(tmp_path):
    model = small()
    quantized = zoo.quantize(model)
    with pytest.raises(ConfigError, match="no gradients"):
        quantized.train()
    with pytest.raises(ConfigError, match="quantised already"):
        zoo.quantize(quantized)
    with pytest.raises(ConfigError, match="fast already"):
        zoo.quantize(zoo.optimize_for_inference(model))
    with pytest.raises(ConfigError, match="Did you mean int8"):
        zoo.quantize(model, "int88")
    with pytest.raises(ConfigError, match="multiple of 32"):
        zoo.quantize(model, group_size=48)
    with pytest.raises(ConfigError, match="32 and 64 wide"):
        zoo.quantize(model, group_size=128)
    with pytest.raises(ConfigError, match="language model"):
        zoo.quantize(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="leave out dtype"):
        zoo.save_pretrained(quantized, tmp_path / "model", dtype=torch.float16)


def test_adapters_and_hooks_are_refused():
    model = small()
    mlp = model.model.layers[1].mlp
    plain, mlp.up_proj = mlp.up_proj, Adapter(mlp.up_proj)
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.up_proj \(Adapter\).*merge adapters"):
        zoo.quantize(model)
    mlp.up_proj = plain
    hook = mlp.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp \(SwiGLU\).*remove hooks"):
        zoo.quantize(model)
    hook.remove()
    zoo.quantize(model)
