"""Generation: beside transformers on the same weights, alone and in batches, sampled, stopped, streamed, and typed."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import zoo
from tests.language import small
from tests.launcher import python
from zoo.errors import ConfigError
from zoo.generation import Decoding, Sampling, prepare

CLEAR = {"init_std": 0.3}  # weights so large that the next token is seldom the last one again
FORMS: dict[str, Any] = {
    "mobilellm_125m": {},
    "mobilellm_ls_125m": {"layer_map": (0, 0, 1, 1, 2, 2)},
    "mobilellm_r1_140m": {},
    "mobilellm_pro": {"sliding_window": 7, "global_layers": (2,)},
    "youtu_llm_2b": {"num_kv_heads": None, "q_rank": 24, "kv_rank": 16, "nope_head_dim": 8, "rope_head_dim": 4,
                     "v_head_dim": 8, "embed_init_std": 0.3},
}  # fmt: skip


@pytest.fixture(scope="module", params=FORMS)
def model(request: pytest.FixtureRequest) -> Any:
    return of_form(request.param)


def of_form(name: str) -> Any:
    torch.manual_seed(0)
    return small(name, **CLEAR, **FORMS[name])


@pytest.fixture(scope="module")
def plain() -> Any:
    return of_form("mobilellm_125m")


def some_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


def by_hand(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens, each from a forward pass over everything before it."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


# -------------------------------------------------------------------------------------------------------------- greedy


def test_greedy_tokens_are_the_most_likely_ones(model: Any) -> None:
    prompt = some_tokens(11).tolist()
    found = zoo.generate(model, prompt, max_new_tokens=24)
    assert found == by_hand(model, prompt, 24)
    assert len(set(found)) > 5


def test_a_sequence_continues_in_a_batch_as_alone(model: Any) -> None:
    prompts = [some_tokens(length, seed=length).tolist() for length in (1, 5, 19, 12)]
    alone = [zoo.generate(model, prompt, max_new_tokens=15) for prompt in prompts]
    assert zoo.generate(model, prompts, max_new_tokens=15) == alone
    assert len({tuple(tokens) for tokens in alone}) == len(alone)


def test_greedy_tokens_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    shared: dict[str, Any] = {
        **sizes,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "max_position_embeddings": 128,
    }
    shared |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "intermediate_size": 64}
    grouped = {"num_key_value_heads": 2, "head_dim": 8}

    def rope(theta: float) -> dict[str, Any]:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}

    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shared, **grouped, **rope(1e4)))
    llama4 = transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(
            **shared, **grouped, **rope(8e6), intermediate_size_mlp=64, num_local_experts=1, moe_layers=[],
            use_qk_norm=True, no_rope_layers=[1, 1, 1], attn_temperature_tuning=False, attention_chunk_size=128,
        )
    )  # fmt: skip
    youtu = transformers.YoutuForCausalLM(
        transformers.YoutuConfig(
            **shared | {"rms_norm_eps": 1e-6}, **rope(1.6e6), num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16,
            qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, rope_interleave=True,
        )
    )  # fmt: skip
    prompts = some_tokens(2, 9)
    for name, theirs in (("mobilellm_125m", llama), ("mobilellm_r1_140m", llama4), ("youtu_llm_2b", youtu)):
        ours = of_form(name)
        missing, unexpected = theirs.eval().load_state_dict(ours.state_dict(), strict=False)
        assert (set(missing), unexpected) == ({"lm_head.weight"}, [])
        theirs.tie_weights()
        wanted = theirs.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=40, do_sample=False, use_cache=True
        )[:, 9:]
        assert torch.equal(zoo.generate(ours, prompts, max_new_tokens=40), wanted), name
        assert len(set(wanted[0].tolist())) > 10


def test_bfloat16_and_the_fast_form(plain: Any) -> None:
    prompts = [some_tokens(9).tolist(), some_tokens(4).tolist()]
    fast = zoo.optimize_for_inference(plain)
    assert zoo.generate(fast, prompts, max_new_tokens=12) == zoo.generate(plain, prompts, max_new_tokens=12)
    assert zoo.generate(fast, prompts[0], max_new_tokens=12) == zoo.generate(plain, prompts[0], max_new_tokens=12)
    half = of_form("mobilellm_125m").to(torch.bfloat16)
    found = zoo.generate(half, prompts, max_new_tokens=12, temperature=1.0, top_p=0.9, seed=0)
    assert list(map(len, found)) == [12, 12]


def test_llama_cpp_gives_the_same(plain: Any) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is built for ten minutes, and not part of [dev]")
    prompts = [some_tokens(9).tolist(), some_tokens(4).tolist()]
    for chosen in ({}, {"repetition_penalty": 1.3}, {"temperature": 1.5, "top_k": 5, "seed": 0}):
        options: dict[str, Any] = {"max_new_tokens": 12, **chosen}
        assert zoo.generate(plain, prompts, engine="llama.cpp", **options) == zoo.generate(plain, prompts, **options)
    assert zoo.generate(speller("Gré, 🦊!"), ["", "G"], tokenizer="bytes", engine="llama.cpp", stop="!") == [
        "Gré, 🦊",
        "ré, 🦊",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilellm_125m", "mobilellm_pro"])
def test_compiled_steps_are_one_program_and_give_the_same(name: str) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = of_form(name)
    prompts = [some_tokens(9).tolist(), some_tokens(4).tolist()]
    for count in (20, 31):
        found = zoo.generate(model, prompts, max_new_tokens=count, compile=True)
        assert found == zoo.generate(model, prompts, max_new_tokens=count)
    assert counters["stats"]["unique_graphs"] == 1


def test_memory_is_that_of_the_length_asked_for_and_stays(plain: Any) -> None:
    steps = Decoding(plain, [[1, 2, 3], [4]], 6)
    steps.step()
    before = [tensor.data_ptr() for layer in steps._cache.layers for tensor in layer.tensors]
    assert steps._cache.max_length == 3 + 6 - 1
    while not steps.is_over:
        steps.step()
    assert [tensor.data_ptr() for layer in steps._cache.layers for tensor in layer.tensors] == before
    assert steps.count == 6


# ------------------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.0, "top_k": 5000},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 5.0, "top_p": 0.99},  # more tokens than are looked through at first
        {"temperature": 0.6, "top_p": 1e-6},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 0.9, "repetition_penalty": 1.3},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_scores_are_those_of_transformers(options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    logits = 3 * torch.randn(4, 3000, generator=torch.Generator().manual_seed(0))
    before = torch.randint(0, 3000, (4, 60), generator=torch.Generator().manual_seed(1))
    theirs = logits.clone()
    if "repetition_penalty" in options:
        theirs = transformers.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"])(before, theirs)
    theirs = transformers.TemperatureLogitsWarper(options["temperature"])(before, theirs)
    for name, warper in (("top_k", "TopK"), ("top_p", "TopP"), ("min_p", "MinP")):
        if name in options:
            theirs = getattr(transformers, f"{warper}LogitsWarper")(options[name])(before, theirs)
    seen = torch.zeros(4, 3000, dtype=torch.bool).scatter_(1, before, True)
    ours = Sampling(**options).scores(logits, seen)
    assert torch.equal(ours == -torch.inf, theirs == -torch.inf)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_draws_follow_the_probabilities(plain: Any) -> None:
    prompt = some_tokens(6).tolist()
    sampling = Sampling(temperature=1.5, top_k=4, seed=3)
    steps = Decoding(plain, [prompt] * 2000, 1, sampling)
    counts = torch.bincount(torch.tensor(steps.step()), minlength=257) / 2000
    with torch.no_grad():
        wanted = sampling.scores(plain(torch.tensor([prompt]))[:, -1])[0].softmax(-1)
    assert (counts > 0).sum() == 4
    assert (counts - wanted).abs().max() < 0.05


def test_a_seed_is_a_result(plain: Any) -> None:
    prompt = some_tokens(6).tolist()
    options: dict[str, Any] = {"max_new_tokens": 16, "temperature": 2.0}
    first, again, other = (zoo.generate(plain, prompt, seed=seed, **options) for seed in (1, 1, 2))
    assert first == again != other
    torch.manual_seed(5)
    state = torch.get_rng_state()
    zoo.generate(plain, prompt, seed=1, **options)
    assert torch.equal(torch.get_rng_state(), state)
    drawn = zoo.generate(plain, prompt, **options)
    torch.manual_seed(5)
    assert zoo.generate(plain, prompt, **options) == drawn


@pytest.mark.parametrize("temperature", [1e-7, 1e-38, 5e-324])
def test_the_smallest_temperatures_take_the_most_likely_token(plain: Any, temperature: float) -> None:
    prompt = some_tokens(6).tolist()
    assert zoo.generate(plain, prompt, temperature=temperature, max_new_tokens=8) == zoo.generate(
        plain, prompt, max_new_tokens=8
    )


def test_a_repetition_penalty_counts_prompt_and_answer_but_no_padding(plain: Any) -> None:
    prompts = [some_tokens(9).tolist(), some_tokens(3, seed=4).tolist()]
    options: dict[str, Any] = {"max_new_tokens": 20, "repetition_penalty": 1e6}
    found = zoo.generate(plain, prompts, **options)
    for prompt, tokens in zip(prompts, found, strict=True):
        assert len(set(prompt + tokens)) == len(set(prompt)) + 20
    assert found[1] == zoo.generate(plain, prompts[1], **options)


# ----------------------------------------------------------------------------------------------- what goes in comes out


def test_answers_are_as_the_prompts_are(plain: Any) -> None:
    text = zoo.generate(plain, "ab", tokenizer="bytes", max_new_tokens=8)
    ids = zoo.generate(plain, [256, 97, 98], max_new_tokens=8)
    tokenizer = zoo.create_tokenizer("bytes")
    assert text == tokenizer.decode(ids)
    assert zoo.generate(plain, ["ab", "ab"], tokenizer=tokenizer, max_new_tokens=8) == [text, text]
    assert zoo.generate(plain, ([256, 97, 98],), max_new_tokens=8) == [ids]
    one = zoo.generate(plain, torch.tensor([256, 97, 98]), max_new_tokens=8)
    assert (one.tolist(), one.dtype) == (ids, torch.long)
    assert zoo.generate(plain, torch.tensor([[256, 97, 98]], dtype=torch.int32), max_new_tokens=8).tolist() == [ids]
    of_bytes = zoo.generate(plain, [97, 98], max_new_tokens=8)
    small_numbers = zoo.generate(plain, torch.tensor([97, 98], dtype=torch.int8), max_new_tokens=8)
    assert (small_numbers.tolist(), small_numbers.dtype) == (of_bytes, torch.long)
    for numbers in (np.array([97, 98]), [np.int64(97), np.int32(98)]):
        assert zoo.generate(plain, numbers, max_new_tokens=8) == of_bytes
    assert zoo.generate(plain, [[np.int64(97), 98]], max_new_tokens=8) == [of_bytes]
    assert zoo.generate(plain, "", tokenizer="bytes", max_new_tokens=4) == tokenizer.decode(
        zoo.generate(plain, [256], max_new_tokens=4)
    )


def speller(text: str) -> Any:
    """A model that spells `text` and then the end of it, whatever the prompt: the token at each place is set by that
    before it, so `text` must not repeat a byte."""
    torch.manual_seed(0)
    model = small(depth=1, dim=512, head_dim=128, hidden_dim=32, tie_embeddings=False)
    tokens = [*text.encode(), 256]
    with torch.no_grad():
        for parameter in (*model.model.layers.parameters(), model.lm_head.weight):
            parameter.zero_()
        for before, after in zip([256, *tokens], tokens, strict=False):
            model.lm_head.weight[after] += model.model.embed_tokens.weight[before]
    return model


def test_the_end_of_text_ends_a_sequence_and_is_no_text() -> None:
    model = speller("Gré, 🦊!")
    assert zoo.generate(model, "", tokenizer="bytes", max_new_tokens=100) == "Gré, 🦊!"
    tokens = zoo.generate(model, [256], tokenizer="bytes", max_new_tokens=100)
    assert tokens == [*"Gré, 🦊!".encode(), 256]
    assert len(zoo.generate(model, [256], max_new_tokens=30)) == 30  # without a tokenizer nothing is known to end it
    run = prepare(model, ["", "Gr"], tokenizer="bytes", max_new_tokens=100)
    assert [piece.row for piece in run].count(1) == 12 - 2
    assert run.texts == ["Gré, 🦊!", "é, 🦊!"]
    assert run.ended == ["eos", "eos"]
    assert (run.prompt_tokens, run.new_tokens) == (4, 12 + 10)
    padded = zoo.generate(model, torch.tensor([[256, 256], [256, ord("G")]]), tokenizer="bytes", max_new_tokens=100)
    assert padded[1].tolist() == [*"ré, 🦊!".encode(), 256, 256]


@pytest.mark.parametrize(
    ("stop", "text", "ended"),
    [
        ("🦊", "Gré, ", "stop"),
        (", 🦊", "Gré", "stop"),
        (["none", "é"], "Gr", "stop"),
        (["🦊!", "🦊", ", "], "Gré", "stop"),
        ("Gré, 🦊?", "Gré, 🦊!", "eos"),
        ("Gr", "", "stop"),
    ],
)
def test_texts_that_stop(stop: Any, text: str, ended: str) -> None:
    run = prepare(speller("Gré, 🦊!"), [""], tokenizer="bytes", stop=stop, max_new_tokens=100)
    pieces = [piece.text for piece in run]
    assert run.texts == ["".join(pieces)] == [text]
    assert run.ended == [ended]
    assert "\ufffd" not in "".join(pieces)


def test_a_stop_text_that_only_begins_is_told_at_the_end() -> None:
    model = speller("abcd")
    assert zoo.generate(model, "", tokenizer="bytes", stop="cdx", max_new_tokens=100) == "abcd"
    for stops in ({"cd", "x"}, ("cd",), iter(["cd"])):
        assert zoo.generate(model, "", tokenizer="bytes", stop=stops, max_new_tokens=100) == "ab"
    assert zoo.generate(model, "", tokenizer="bytes", stop="cdx", max_new_tokens=3) == "abc"
    assert zoo.generate(model, [256], tokenizer="bytes", stop="bc", max_new_tokens=9) == list(b"abc")


def test_streams_are_the_answers_in_pieces(plain: Any) -> None:
    model = speller("Gré, 🦊!")
    pieces = list(zoo.generate(model, "", tokenizer="bytes", stream=True))
    assert pieces == list("Gré, 🦊!")
    assert list(zoo.generate(model, [256], tokenizer="bytes", stream=True, max_new_tokens=3)) == list(
        "Grü".encode()[:3]
    )
    both = list(zoo.generate(model, ["", "Gr"], tokenizer="bytes", stream=True))
    assert "".join(text for row, text in both if row == 1) == "é, 🦊!"
    assert "".join(text for row, text in both if row == 0) == "Gré, 🦊!"
    prompts = ["ab", "c"]
    options: dict[str, Any] = {"tokenizer": "bytes", "max_new_tokens": 40}
    whole = ["", ""]
    for row, text in zoo.generate(plain, prompts, stream=True, **options):
        whole[row] += text
    assert whole == zoo.generate(plain, prompts, **options)


def test_a_stream_leaves_gradients_as_they_were(plain: Any) -> None:
    stream = zoo.generate(plain, [1, 2], max_new_tokens=3, stream=True)
    next(stream)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        ([], {}, "nothing"),
        (3, {}, "int"),
        (["a", [1]], {"tokenizer": "bytes"}, "mixture"),
        (torch.ones(2), {}, "float32"),
        (torch.ones(1, 1, 1, dtype=torch.long), {}, r"\(1, 1, 1\)"),
        ([[1], []], {}, "prompt is empty"),
        ([257], {}, "257, and the model's tokens are 0 to 256"),
        ([[1], [2, -1]], {}, "Prompt 1 holds -1"),
        ([1] * 100, {"max_new_tokens": 29}, "ask for 28 at most"),
        ([1] * 130, {}, "less text"),
        ("text", {}, "tokenizer="),
        ([1], {"stop": "x"}, "tokenizer="),
        ([1], {"tokenizer": "bytes", "stop": ""}, "stop"),
        ([1], {"tokenizer": "bytes", "stop": None}, "stop is a text or several, none of them empty: not None"),
        ([1], {"tokenizer": "bytes", "stop": 5}, "not 5"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens"),
        ([1], {"temperature": -1.0}, "temperature"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"top_k": -1}, "top_k"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"min_p": 1.5}, "min_p"),
        ([1], {"repetition_penalty": 0}, "repetition_penalty"),
        ([1], {"seed": 0.5}, "seed"),
        ([1], {"engine": "lama.cpp"}, "Did you mean llama.cpp"),
    ],
)
def test_what_cannot_be_is_said_at_once(plain: Any, prompts: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        zoo.generate(plain, prompts, stream=True, **options)


def test_models_that_cannot_speak(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="poolformer_s12 is not a language model"):
        zoo.generate(zoo.create_model("poolformer_s12", pretrained=False, device="meta"), [1])
    zoo.data.train_tokenizer(["some words of some text"] * 9, 300).save(tmp_path)
    with pytest.raises(ConfigError, match="another model's tokenizer"):
        zoo.generate(small(), "words", tokenizer=tmp_path)
    broken = small()
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ConfigError, match="not numbers in float32"):
        zoo.generate(broken, [1])


# -------------------------------------------------------------------------------------------------------- from a folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was saved with its tokenizer, and a chat template."""
    path = zoo.save_pretrained(speller("Hi! Bye."), tmp_path_factory.mktemp("saved") / "model")
    zoo.create_tokenizer("bytes").save(path)
    return path


def test_a_folder_is_model_and_tokenizer(folder: Path) -> None:
    assert zoo.generate(folder, "") == "Hi! Bye."
    assert zoo.generate(str(folder), ["", "H"]) == ["Hi! Bye.", "i! Bye."]
    model = zoo.create_model(f"local-dir:{folder}")
    for form in (model, zoo.optimize_for_inference(model), zoo.quantize(model, "int8")):
        assert zoo.generate(form, "H") == "i! Bye."


def command(*arguments: object, given: bytes = b"") -> tuple[int, str, str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ZOO_NATIVE": "0"}
    run = python("-m", "zoo", *arguments, input=given, env=env)
    assert "Traceback" not in run.stderr
    return run.returncode, run.stdout, run.stderr


def run_here(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    from zoo import cli

    status = cli.main(list(map(str, arguments)))
    return status, *capsys.readouterr()


def test_zoo_generate_writes_text_alone_to_its_output(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, err = command("generate", "--model", folder, "-", "--stop", "B", given=b"H\n")
    assert (status, out) == (0, "i! \n")
    assert re.fullmatch(r"2 tokens of prompt in [\d.]+ s, 4 new ones at [\d.]+ tokens/s\.\n", err)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n")))
    status, out, err = run_here(capsys, "generate", "--model", folder, "-")
    assert (status, out) == (1, "")
    assert err == "error: The text is not UTF-8: byte 0 is 0xff. Convert it first.\n"


def test_zoo_generate_as_json(folder: Path, capsys: pytest.CaptureFixture) -> None:
    status, out, _ = run_here(capsys, "generate", "--model", folder, "H", "--json", "--engine", "torch")
    assert status == 0
    found = json.loads(out)
    assert (found["text"], found["tokens"], found["ended"]) == ("i! Bye.", [*b"i! Bye.", 256], "eos")
    assert (found["prompt_tokens"], found["new_tokens"], found["engine"]) == (2, 8, "torch")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["mobilellm_ls_600m"], "has no published weights"),
        (["mobilellm_125m", "--random"], "--tokenizer bytes"),
        (["mobilellm_125m", "--random", "--tokenizer", "bytes", "--checkpoint", "x"], "--random or --checkpoint"),
        (["mobilelm_125m"], "Did you mean mobilellm_125m"),
        (["poolformer_s12"], "made for vision"),
        (["mobilellm_125m", "--engine", "torch", "--quantize", "int8"], "native engine"),
        (["mobilellm_125m", "--engine", "llama.cpp", "--compile"], "llama.cpp knows neither"),
        (["mobilellm_125m", "--threads", "0"], "--threads"),
        (["mobilellm_125m", "--top-p", "2"], "top_p"),
    ],
)
def test_zoo_generate_says_what_is_wrong(arguments: list[str], says: str, capsys: pytest.CaptureFixture) -> None:
    status, out, err = run_here(capsys, "generate", "x", "--model", *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert says in err


@pytest.fixture
def chatty(folder: Path, tmp_path: Path) -> Path:
    """The model that was saved, with a chat template, after whose last token it spells."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    template = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{{ eos_token }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    return tmp_path


def test_zoo_chat_answers_line_by_line(chatty: Path) -> None:
    given = b"hello\n\nwho is there?\n/clear\nanew\n/exit\nnobody hears this\n"
    status, out, err = command("chat", "--model", chatty, "--system", "Be kind.", "--temperature", "0", given=given)
    assert (status, out, err) == (0, "Hi! Bye.\n" * 3, "")


def test_zoo_chat_remembers_what_was_said(
    chatty: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% if messages|length > 4 %}{{ raise_exception('It is: ' ~ messages|map(attribute='content')|join('|')) }}"
    )
    (chatty / "chat_template.jinja").write_text(template + "{% endif %}{{ eos_token }}")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n/clear\ntwo\nthree\nfour"))
    status, out, err = run_here(capsys, "chat", "--model", chatty, "--temperature", "0")
    assert (status, out) == (1, "Hi! Bye.\n" * 3)
    assert "It is: two|Hi! Bye.|three|Hi! Bye.|four" in err


def test_zoo_chat_needs_a_template_and_text(
    folder: Path, chatty: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, _, err = run_here(capsys, "chat", "--model", folder)
    assert status == 1
    assert "no chat template" in err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\n"), encoding="utf-8"))
    status, _, err = run_here(capsys, "chat", "--model", chatty)
    assert status == 1
    assert "byte 1 is 0xff" in err
    monkeypatch.setattr("sys.stdin", io.StringIO("a" * 200 + "\n"))
    status, _, err = run_here(capsys, "chat", "--model", chatty)
    assert status == 1
    assert "context" in err


def test_zoo_tokenizer_trains_and_encodes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("the fox and the dog and the fox\n" * 20)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": f"the dog {i}"}) + "\n" for i in range(30)))
    train = ["tokenizer", "train", "--vocab-size", 264, "--output", tmp_path / "out"]
    status, out, _ = run_here(capsys, *train, tmp_path / "a.txt")
    assert (status, out) == (0, f"{tmp_path / 'out'}: 264 tokens\n")
    written = (tmp_path / "out" / "tokenizer.json").read_bytes()
    status, _, err = run_here(capsys, *train, tmp_path / "b.jsonl", "--column", "body")
    assert status == 1
    assert "--overwrite" in err
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == written
    assert run_here(capsys, *train, tmp_path / "b.jsonl", "--column", "body", "--overwrite")[0] == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() != written
    tokenizer = zoo.create_tokenizer(tmp_path / "out")
    status, out, _ = run_here(capsys, "tokenizer", "encode", tmp_path / "out", "the dog 7")
    assert list(map(int, out.split())) == tokenizer.encode("the dog 7")
    _, out, _ = run_here(capsys, "tokenizer", "encode", "bytes", "Aü", "--json")
    assert [one["id"] for one in json.loads(out)] == [65, 0xC3, 0xBC]
    status, _, err = run_here(capsys, *train, tmp_path / "none.txt", "--overwrite")
    assert status == 1
    assert "none.txt" in err
