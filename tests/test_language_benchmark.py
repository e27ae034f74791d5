"""Benchmarks of language models: what is measured, side by side, and what is refused. No timing is asserted."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

import zoo
from tests.language import small
from zoo.cli import main
from zoo.errors import ConfigError
from zoo.profiling import LanguageBenchmarkResult, benchmark_table, language_speed

SHORT = {"tokens": 12, "new_tokens": 3, "memory": False}


@pytest.fixture
def saved(tmp_path):
    """Names of two small models, in the folders that they are saved in."""
    names = []
    for name in ("mobilellm_ls_125m", "mobilellm_pro"):
        zoo.save_pretrained(small(name, layer_map=None, hidden_dim=96), tmp_path / name)
        names.append(f"local-dir:{tmp_path / name}")
    return names


def test_prefill_and_decode_of_every_name_at_every_batch_size(saved):
    results = zoo.benchmark(saved, batch_sizes=(1, 2), repeats=2, **SHORT)
    assert [(result.batch_size, result.name) for result in results] == [(b, name) for b in (1, 2) for name in saved]
    for result in results:
        assert isinstance(result, LanguageBenchmarkResult)
        assert (result.tokens, result.new_tokens, result.repeats, result.warmup) == (12, 3, 2, 1)
        assert 0 < result.latency_p10_ms <= result.latency_ms <= result.latency_p90_ms
        assert math.isclose(result.throughput, 1000 * result.batch_size / result.latency_ms)
        assert math.isclose(result.prefill_throughput, 12000 * result.batch_size / result.prefill_ms)
    facts = json.loads(results[0].to_json())
    assert facts["tokens"] == 12
    assert "input_size" not in facts
    table = benchmark_table(results, width=300)
    for words in ("prefill tokens/s", "decode tokens/s", saved[0], "12 tokens and 3 new ones", "1.00x"):
        assert words in table


def test_models_take_turns_at_the_same_prompts(saved, monkeypatch):
    seen = []
    write = language_speed.LanguageSubject.write

    def watched(subject, prompts):
        seen.append((subject.name, prompts))
        return write(subject, prompts)

    monkeypatch.setattr(language_speed.LanguageSubject, "write", watched)
    zoo.benchmark(saved, repeats=3, **SHORT)
    one, two = saved
    assert [name for name, _ in seen] == [one, two, one, two, two, one, one, two]
    assert all(torch.equal(prompts, seen[0][1]) for _, prompts in seen)


def test_what_is_timed_is_greedy_decoding(saved):
    model = small("mobilellm_pro", hidden_dim=96)
    settings = zoo.profiling.measure.Settings(
        device=torch.device("cpu"), dtype=torch.float32, channels_last=False, compile=False, mode="inference"
    )
    subject = language_speed.prepare_language("here", model, (12, 3), settings)
    prompts = subject.images(2)
    calls = []
    model.register_forward_pre_hook(lambda _module, args: calls.append(args[0].clone()))
    for _ in range(2):  # the second begins as the first did
        seconds, steps = subject.write(prompts)
        assert seconds > 0
        assert len(steps) == 3
    tokens = prompts
    for fed, again in zip(calls[1:4], calls[5:], strict=True):
        best = model.forward(tokens)[:, -1:].argmax(-1)
        assert torch.equal(fed, best)
        assert torch.equal(again, best)
        tokens = torch.cat((tokens, best), 1)


@pytest.mark.parametrize("form", [{"optimize": True}, {"quantize": "int8"}, {"dtype": "bfloat16"}], ids=str)
def test_other_forms_are_measured(saved, form):
    (result,) = zoo.benchmark(saved[1], repeats=1, **SHORT, **form)
    assert isinstance(result, LanguageBenchmarkResult)
    assert (result.optimize, result.quantize) == (form.get("optimize", False), form.get("quantize"))
    assert result.dtype == form.get("dtype", "float32")


@pytest.mark.slow
def test_compiled_steps_are_measured(saved):
    (result,) = zoo.benchmark(saved[0], repeats=1, compile=True, **SHORT)
    assert result.compile


def test_the_command_and_peak_memory_in_a_process_of_its_own(tmp_path, capsys):
    model = small(dim=256, hidden_dim=1024, vocab_size=20000, context_length=64)
    zoo.save_pretrained(model, tmp_path / "saved")
    command = ["benchmark", f"local-dir:{tmp_path / 'saved'}", "--tokens", "4", "--repeats", "1"]
    assert main([*command, "--new-tokens", "1", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert (result["name"], result["tokens"], result["new_tokens"]) == (command[1], 4, 1)
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert weights < result["peak_memory"] < 3 * weights
    assert main([*command, "--new-tokens", "61"]) == 1
    assert "4 tokens and 61 new ones are more than the context" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "arguments", "message"),
    [
        (["smollm_135m", "poolformer_s12"], {}, "Models of language and of images have no measure in common"),
        ("smollm_135m", {"mode": "train"}, "Language models take tokens= and new_tokens=, for inference"),
        ("smollm_135m", {"input_size": (3, 8, 8)}, "leave out input_size="),
        ("smollm_135m", {"tokens": 0}, "tokens must be a whole number from 1 up, not 0"),
        ("smollm_135m", {"new_tokens": -1}, "new_tokens must be"),
        ("smollm_135m", {"quantize": "int8", "optimize": True}, "A quantised model is its fast form"),
        ("poolformer_s12", {"tokens": 5}, "tokens=, new_tokens= and quantize= are for language models"),
        ("poolformer_s12", {"quantize": "int8"}, "are for language models: leave them out"),
    ],
)
def test_settings_that_make_no_sense(names, arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        zoo.benchmark(names, memory=False, **arguments)
