"""Perplexity and bits per byte: in Python and by `eval.py`."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from tests.language import random_model, small
from zoo.data.text import TextDataConfig
from zoo.errors import DataError
from zoo.evaluation import perplexity
from zoo.evaluation.config import LanguageEvaluationConfig, parse_evaluation
from zoo.evaluation.language import windows
from zoo.evaluation.language_results import LanguageResults, TaskScore

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 9, "Füchse", "", "a", "Zwölf Boxkämpfer jagen Viktor. " * 4]
BYTES = zoo.create_tokenizer("bytes")


class NoBos:
    """Bytes without a token that begins a text."""

    name, vocab_size, bos_id, eos_id, adds_bos = "plain bytes", 256, None, None, False

    def encode(self, text: str, *, bos: bool = False, special: bool = True) -> list[int]:
        assert not bos
        return list(text.encode())

    def decode(self, ids: Any) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model()


@torch.no_grad()
def direct(model: Any, ids: list[int], context: int, stride: int) -> float:
    """The sum of -log p, window by window, from logits in float64."""
    nats, done = 0.0, 1
    for begin in range(0, len(ids), stride):
        if done == len(ids):
            break
        end = min(begin + context, len(ids) - 1)
        output = model(torch.tensor([ids[begin:end]]))
        log_p = getattr(output, "logits", output)[0].double().log_softmax(-1)
        for place in range(done, end + 1):
            nats -= log_p[place - begin - 1, ids[place]].item()
        done = end + 1
    return nats


@pytest.mark.parametrize(("count", "context", "stride"), [(1, 8, 4), (8, 8, 4), (9, 8, 8), (100, 7, 3), (100, 7, 1)])
def test_every_place_is_predicted_once(count: int, context: int, stride: int):
    predicted: list[int] = []
    for begin, end, scored in windows(count, context, stride):
        assert 0 < end - begin <= context
        assert begin == 0 or end - scored - begin >= context - stride
        predicted += range(end - scored, end)
    assert predicted == list(range(count))


@pytest.mark.parametrize(("context", "stride"), [(None, None), (32, 32), (32, 5), (1, 1)])
def test_documents_one_by_one(model: Any, context: int | None, stride: int | None):
    found = perplexity(model, TEXTS, BYTES, context=context, stride=stride, batch_size=3, per_document=True)
    assert (found.context, found.stride) == (context or 128, stride or 64)
    kept = [text for text in TEXTS if text]
    costs = [direct(model, BYTES.encode(text, bos=True), found.context, found.stride) for text in kept]
    assert found.nats == pytest.approx(sum(costs), rel=1e-6)
    assert found.per_document is not None
    assert [each.nats for each in found.per_document] == pytest.approx(costs, rel=1e-5)
    sizes = [len(text.encode()) for text in kept]
    assert [each.bytes for each in found.per_document] == [each.tokens for each in found.per_document] == sizes
    assert (found.documents, found.bytes, found.tokens) == (len(kept), sum(sizes), sum(sizes))
    assert found.perplexity == pytest.approx(math.exp(sum(costs) / sum(sizes)), rel=1e-6)
    assert [found.bits_per_byte, found.bits_per_token] == pytest.approx([math.log2(found.perplexity)] * 2)


def test_joined_texts_are_one(model: Any):
    found = perplexity(model, TEXTS, BYTES, joined=True)
    assert found.documents == 1
    assert found.nats == pytest.approx(perplexity(model, "\n\n".join(TEXTS), BYTES).nats, rel=1e-12)
    assert found.nats != pytest.approx(perplexity(model, TEXTS, BYTES).nats, rel=1e-4)


def test_without_bos_the_first_token_does_not_count(model: Any):
    tokenizer: Any = NoBos()
    found = perplexity(model, [TEXTS[0], "ab"], tokenizer)
    assert found.tokens == found.bytes == len(TEXTS[0]) - 1 + 1
    assert found.nats == pytest.approx(
        direct(model, list(TEXTS[0].encode()), 128, 64) + direct(model, list(b"ab"), 128, 64), rel=1e-6
    )
    with pytest.raises(zoo.ZooError, match="no token to predict: the text is one token long"):
        perplexity(model, "a", tokenizer)


def test_token_numbers_are_documents(model: Any):
    ids = [BYTES.encode(text) for text in TEXTS if text]
    found, texts = perplexity(model, ids, BYTES), perplexity(model, TEXTS, BYTES)
    assert (found.nats, found.tokens, found.bytes) == (texts.nats, texts.tokens, texts.bytes)


def test_reading_ends_behind_enough_tokens(model: Any):
    assert perplexity(model, TEXTS, BYTES, max_tokens=len(TEXTS[0]) + 1).documents == 2


@pytest.mark.parametrize("form", ["fast", "int8", "bf16", "mobilellm_pro", "youtu_llm_2b", "mobilellm_ls_125m"])
def test_other_forms_and_models(model: Any, form: str):
    wanted, given, amp = model, model, "no"
    if form == "fast":
        given = zoo.optimize_for_inference(model)
    elif form == "int8":
        given = wanted = zoo.quantize(model, "int8")
    elif form == "bf16":
        amp = "bf16"
    elif form == "mobilellm_pro":
        given = wanted = random_model(form, sliding_window=16, global_layers=(1,))
    elif form == "youtu_llm_2b":
        heads = {"num_kv_heads": None, "q_rank": 16, "kv_rank": 8, "nope_head_dim": 8, "rope_head_dim": 4}
        given = wanted = random_model(form, **heads, v_head_dim=8)
    else:
        given = wanted = random_model(form, layer_map=(0, 0, 1, 1, 2, 2))
    found = perplexity(given, TEXTS[0], BYTES, context=64, stride=32, amp=amp)  # type: ignore[arg-type]
    close = 0.02 if amp == "bf16" else 1e-4
    assert found.nats == pytest.approx(direct(wanted, BYTES.encode(TEXTS[0], bos=True), 64, 32), rel=close)


def test_transformers_says_the_same(model: Any):
    """The same weights in transformers' own class: a direct computation there, and ours on it, and ours on ours."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict({**model.state_dict(), "lm_head.weight": model.head_weight})
    ours = perplexity(model, TEXTS[0], BYTES, context=64, stride=16)
    on_theirs = perplexity(theirs, TEXTS[0], BYTES, context=64, stride=16)
    assert on_theirs.nats == pytest.approx(ours.nats, rel=1e-6)
    assert direct(theirs, BYTES.encode(TEXTS[0], bos=True), 64, 16) == pytest.approx(ours.nats, rel=1e-6)


def test_the_model_is_left_as_it_was(model: Any):
    model.train()
    perplexity(model, "abc", BYTES)
    assert model.training
    assert all(p.requires_grad and not p.is_inference() for p in model.parameters())
    model.eval()


def test_evaluate_is_one_verb(model: Any, tmp_path: Path):
    (tmp_path / "text.txt").write_text(TEXTS[0])
    results = zoo.evaluate(model, TEXTS[0], tokenizer="bytes", context=32)
    of_file = zoo.evaluate(
        model, TextDataConfig(path=str(tmp_path / "text.txt"), batch_size=2), tokenizer=BYTES, context=32
    )
    assert results.loss == pytest.approx(of_file.loss, rel=1e-6)
    assert (results.model, of_file.data, of_file.batch_size) == ("mobilellm_125m", str(tmp_path / "text.txt"), 2)
    plain = results.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["params"] == sum(p.numel() for p in model.parameters())
    assert "perplexity" in str(results)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: perplexity(m, "", BYTES), "no text to evaluate: all of it is empty"),
        (lambda m: perplexity(m, [], BYTES), "no text to evaluate"),
        (lambda m: perplexity(m, [b"bytes"], BYTES), "not bytes"),
        (lambda m: perplexity(m, "\ud800", BYTES), "half of a surrogate pair"),
        (lambda m: perplexity(m, "a", BYTES, context=129), "context must be from 1 to 128, the model's own, not 129"),
        (lambda m: perplexity(m, "a", BYTES, context=8, stride=9), "stride must be from 1 to the context, 8, not 9"),
        (lambda m: perplexity(m, "a", BYTES, batch_size=0), "batch_size must be a whole number from 1 up, not 0"),
        (lambda m: perplexity(m, [[1, 2], "a"], BYTES, joined=True), "Only texts can be joined"),
        (lambda m: perplexity(small(vocab_size=100), "a", BYTES), "257 tokens and the model 100"),
        (lambda m: perplexity(torch.nn.Linear(2, 2), "a", BYTES), "Linear is no language model"),
        (lambda m: zoo.evaluate(m, tokenizer=BYTES), "nothing to evaluate on"),
        (lambda m: zoo.evaluate(m, "a"), "came without a tokenizer: say with tokenizer= which"),
        (lambda m: zoo.evaluate(m, __file__, tokenizer=BYTES), r"the name of a file.*TextDataConfig\(path='.*\.py'\)"),
        (lambda m: zoo.evaluate(m, zoo.data.DataConfig(name="digits"), tokenizer=BYTES), "not on DataConfig"),
    ],
)
def test_bad_arguments(model: Any, call: Any, message: str):
    with pytest.raises(zoo.ZooError, match=message):
        call(model)


def test_a_models_own_tokenizer_is_taken(model: Any, tmp_path: Path):
    zoo.save_pretrained(model, tmp_path / "lm", tokenizer=BYTES)
    found = zoo.evaluate(zoo.create_model(f"local-dir:{tmp_path / 'lm'}"), "abc")
    assert found.tokenizer == zoo.create_tokenizer(tmp_path / "lm").name
    assert found.text is not None
    assert found.text.bytes == 3


def test_unknown_precision(model: Any):
    wrong: Any = "fp8"
    with pytest.raises(zoo.ZooError, match="amp must be one of no, bf16, fp16, not 'fp8'"):
        perplexity(model, "a", BYTES, amp=wrong)


def test_damaged_weights_have_no_perplexity():
    broken = small()
    broken.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(zoo.ZooError, match="no finite loss"):
        perplexity(broken, "abc", BYTES)


# -------------------------------------------------------------------------------------------------------------- eval.py


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    """A saved model with its tokenizer."""
    path = zoo.save_pretrained(model, tmp_path_factory.mktemp("models") / "small")
    BYTES.save(path)
    return path


def test_a_folder_is_evaluated_and_saved(eval_py: Any, folder: Path, tmp_path: Path):
    rows = [{"body": text} for text in TEXTS if text]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    flags = ["--data.path", tmp_path / "texts.jsonl", "--data.column", "body", "--device", "cpu"]
    status, text, errors = eval_py("--model", folder, *flags, "--per_document", "true", "--output", out)
    assert status == 0, errors
    assert {path.name for path in out.iterdir()} == {"results.json", "results.csv", "documents.csv"}
    results = json.loads((out / "results.json").read_text())
    wanted = perplexity(zoo.create_model(f"local-dir:{folder}"), TEXTS, BYTES)
    assert results["perplexity"] == pytest.approx(wanted.perplexity, rel=1e-6)
    assert results["bits_per_byte"] == pytest.approx(wanted.bits_per_byte, rel=1e-6)
    assert (results["tokens"], results["bytes"], results["documents"]) == (wanted.tokens, wanted.bytes, 4)
    assert re.match(r"python eval.py --model small --data.path texts.jsonl --data.column body", results["command"])
    assert results["versions"] == {"backbone-zoo": zoo.__version__, "torch": torch.__version__}
    assert f"perplexity {wanted.perplexity:.4g}" in text
    with open(out / "results.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["bits_per_byte"]) == pytest.approx(wanted.bits_per_byte, abs=1e-6)
    with open(out / "documents.csv", newline="") as file:
        assert [int(row["bytes"]) for row in csv.DictReader(file)] == [len(text.encode()) for text in TEXTS if text]


def test_a_run_brings_its_texts(eval_py: Any, folder: Path, tmp_path: Path):
    """Its best checkpoint, and the evaluation split that its configuration names."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "best").symlink_to(folder, target_is_directory=True)
    (tmp_path / "train.txt").write_text("not this")
    (tmp_path / "validation.txt").write_text(TEXTS[0])
    data = {"name": "files", "path": str(tmp_path), "sequence_length": 32, "batch_size": 5, "val_tokens": 1000}
    (run / "config.yaml").write_text(json.dumps({"task": "language", "data": data}))
    config = parse_evaluation(["--model", str(run)])
    assert isinstance(config, LanguageEvaluationConfig)
    assert (config.data.batch_size, config.data.val_tokens) == (5, 1000)
    status, _, errors = eval_py("--model", run, "--output", run / "evaluation", "--device", "cpu")
    assert status == 0, errors
    results = json.loads((run / "evaluation" / "results.json").read_text())
    assert (results["bytes"], results["context"], results["batch_size"]) == (len(TEXTS[0]), 32, 5)


def test_weights_in_half_precision(eval_py: Any, folder: Path, model: Any, tmp_path: Path):
    flags = ["--data.name", "pydoc", "--data.val_tokens", 500, "--dtype", "bfloat16", "--output", tmp_path / "out"]
    status, _, errors = eval_py("--model", folder, *flags, "--device", "cpu")
    assert status == 0, errors
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    own = zoo.evaluate(model, TextDataConfig(name="pydoc", val_tokens=500), tokenizer=BYTES)
    assert (results["weights"], own.weights) == ("bfloat16", "float32")
    assert results["loss"] != own.loss
    assert results["loss"] == pytest.approx(own.loss, rel=0.02)


def test_several_models_stand_in_one_table(eval_py: Any, folder: Path, tmp_path: Path):
    (tmp_path / "text.txt").write_text(TEXTS[0])
    flags = ["--data.path", tmp_path / "text.txt", "--tokenizer", "bytes", "--output", tmp_path / "out"]
    status, text, errors = eval_py("--model", folder, "mobilellm_125n", f"{folder}/.", *flags, "--device", "cpu")
    assert status == 1
    assert "error: mobilellm_125n: " in errors
    assert "Did you mean mobilellm_1" in errors
    assert "bits/byte" in text
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        assert len({row["perplexity"] for row in csv.DictReader(file)}) == 1


def test_damaged_documents_are_listed(eval_py: Any, folder: Path, tmp_path: Path):
    (tmp_path / "texts.jsonl").write_bytes(b'{"text": "good"}\n{"text": \n{"text": "\xff"}\n')
    flags = ["--model", folder, "--data.path", tmp_path / "texts.jsonl", "--device", "cpu"]
    status, text, _ = eval_py(*flags)
    assert status == 0
    assert "Skipped 2 damaged documents" in text
    assert "document 1 is not JSON" in text
    status, _, errors = eval_py(*flags, "--data.strict", "true")
    assert (status, len(errors.splitlines())) == (1, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "There is nothing to evaluate on: name texts (--data.path), --tasks or a --suite."),
        (["--data.path", "nowhere.txt"], "There are no texts at 'nowhere.txt'"),
        (["--data.path", "{tmp}/latin.txt", "--data.strict", "true"], "is not UTF-8 text: byte 2 is 0xfc"),
        (["--data.path", "{tmp}/latin.txt"], "There is no text to evaluate"),
        (["--data.path", "{tmp}/latin.txt"], "latin.txt is not UTF-8 text: byte 2 is 0xfc"),
        (["--data.path", "{tmp}/empty.txt"], "There is no text to evaluate"),
        (["--data.name", "pydoc", "--context", "1000"], "context must be from 1 to 128"),
        (["--data.name", "pydoc", "--tokenizer", "byte"], "There is no tokenizer 'byte'"),
        (["--data.name", "pydoc", "--strid", "3"], "There is no option --strid. Did you mean --stride?"),
    ],
)
def test_bad_input(eval_py: Any, folder: Path, tmp_path: Path, flags: list[str], message: str):
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1").replace(b"f", b"fo"))
    (tmp_path / "empty.txt").write_text("")
    status, _, errors = eval_py("--model", folder, *(flag.replace("{tmp}", str(tmp_path)) for flag in flags))
    assert message in errors
    assert status == (2 if "--strid" in flags else 1)
    assert len(errors.splitlines()) == 1


def test_options_of_the_other_kind(eval_py: Any, folder: Path):
    status, _, errors = eval_py("--model", "poolformer_s12", "--data.name", "digits", "--suite", "zero_shot")
    assert (status, errors) == (2, "error: --suite is for language models, and poolformer_s12 is none.\n")
    status, _, errors = eval_py("--model", folder, "poolformer_s12", "--data.name", "pydoc")
    assert (status, errors) == (
        1,
        f"error: {folder} is a language model and poolformer_s12 an image classifier: evaluate them by two commands.\n",
    )
    with pytest.raises(zoo.ZooError, match="takes tokens, not images: it is a language model"):
        zoo.evaluation.image_classification.evaluate(small(), zoo.data.DataConfig(name="digits"))


def test_help_of_language_models_has_examples_that_parse(eval_py: Any, folder: Path, capfd: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        eval_py("--model", folder, "--help")
    text = capfd.readouterr().out.partition("examples:")[2]
    examples = re.findall(r"^  python eval.py (.*)$", re.sub(r"\n {6}", " ", text), re.MULTILINE)
    assert len(examples) >= 4
    for example in examples:
        argv = example.replace("runs/books", str(folder)).split()
        fallback = [] if {"--data.path", "--tasks", "--suite"} & set(argv) else ["--data.name", "pydoc"]
        assert parse_evaluation([*argv, *fallback]).models


def test_mean_accuracy_needs_one_of_each_task():
    def score(task: str, metric: str, value: float) -> TaskScore:
        return TaskScore(task=task, metric=metric, value=value, stderr=0.01, samples=100, num_fewshot=0, version="1")

    def results(*scores: TaskScore) -> LanguageResults:
        return LanguageResults(model="m", tokenizer="bytes", params=1, tasks=scores, suite="zero_shot", batch_size=1)

    two = results(score("a", "acc", 0.25), score("a", "acc_norm", 0.9), score("b", "acc", 0.5))
    assert two.mean_accuracy == 0.375
    assert "m: zero_shot, mean accuracy 37.50%" in str(two)
    assert "  b  acc       0.5000 +- 0.0100  (zero-shot, 100 samples)" in str(two)
    assert results(score("a", "acc", 0.25)).mean_accuracy is None
    assert results(score("a", "acc", 0.25), score("b", "exact_match", 0.5)).mean_accuracy is None


@pytest.mark.parametrize("number", [257, 2**40, -1])
def test_tokens_outside_the_vocabulary(model: Any, number: int):
    """Also where they would only be predicted, behind all others."""
    with pytest.raises(DataError, match=rf"hold token {number}, and the model's vocabulary has 257"):
        zoo.evaluate(model, [[1, 2, number]], tokenizer="bytes")


def test_a_context_or_batch_of_nothing(model: Any):
    for what in ("context", "batch_size"):
        with pytest.raises(zoo.ZooError, match=f"{what} must be .* not 0"):
            zoo.evaluate(model, ["text"], tokenizer="bytes", **{what: 0})
