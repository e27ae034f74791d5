"""`engine="llama.cpp"`: the same text as torch, from the exported model."""

from __future__ import annotations

import sys

import pytest
import torch

import zoo
from tests.test_fast_decoder import randomised
from zoo.errors import ConfigError, MissingDependencyError

PROMPTS = [[1, 2, 3, 4, 5], [7, 8], [9] * 30]


@pytest.fixture
def engine():
    for package in ("llama_cpp", "gguf"):
        pytest.importorskip(package, reason="llama-cpp-python takes ten minutes to build")
    return "llama.cpp"


@pytest.mark.parametrize("name", ["mobilellm_125m", "mobilellm_r1_140m", "mobilellm_ls_125m"])
def test_continues_as_torch_does(name, engine):
    model = randomised(name)
    for options in ({}, {"temperature": 1.0, "top_k": 20, "repetition_penalty": 1.2, "seed": 3}):
        wanted = zoo.generate(model, PROMPTS, max_new_tokens=24, **options)
        assert zoo.generate(model, PROMPTS, max_new_tokens=24, engine=engine, **options) == wanted
    text = zoo.generate(model, "ab", tokenizer="bytes", max_new_tokens=12)
    assert zoo.generate(model, "ab", tokenizer="bytes", max_new_tokens=12, engine=engine) == text


def test_weights_that_change_are_exported_again(engine):
    model = randomised("mobilellm_125m")
    before = zoo.generate(model, [1, 2, 3], max_new_tokens=16, engine=engine)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
    wanted = zoo.generate(model, [1, 2, 3], max_new_tokens=16)
    assert wanted != before
    assert zoo.generate(model, [1, 2, 3], max_new_tokens=16, engine=engine) == wanted


def test_what_cannot_be(engine, tmp_path):
    from zoo.generation.llama_cpp import LlamaCppModel

    with pytest.raises(ConfigError, match="the model that it was made from"):
        zoo.generate(zoo.quantize(randomised("mobilellm_125m")), [1], max_new_tokens=2, engine=engine)
    with pytest.raises(ConfigError, match="windows"):
        zoo.generate(randomised("mobilellm_pro"), [1], max_new_tokens=2, engine=engine)
    with pytest.raises(ConfigError, match="There is no GGUF file"):
        LlamaCppModel(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(ConfigError, match="cannot read"):
        LlamaCppModel(tmp_path / "model.gguf")


def test_without_the_package(monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingDependencyError, match=r"backbone-zoo\[llama-cpp\]"):
        zoo.generate(randomised("mobilellm_125m"), [1], max_new_tokens=2, engine="llama.cpp")
