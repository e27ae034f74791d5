"""Language models are trained by the one loop: they learn, go on exactly, are shared by processes and taught."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import zoo
from tests.language import SMALL as SMALL_ARGS
from tests.language import small
from tests.launcher import Launcher
from tests.test_text_data import write_jsonl
from tests.test_training import assert_same_checkpoint, rows
from zoo.config import load_config, plain_flags, read_yaml, run_command, to_yaml
from zoo.data.tokenizers import create_tokenizer, train_tokenizer
from zoo.errors import CheckpointError, ConfigError, DataError
from zoo.layers import products
from zoo.layers.token_loss import mean_token_loss
from zoo.training import Interrupted, LanguageModeling, LanguageTrainingConfig, parse_training_config, train
from zoo.training.checkpoint import read_state
from zoo.training.language_distillation import distillation_loss
from zoo.training.language_modeling import training_flops_per_token

ROOT = Path(__file__).resolve().parents[1]
RECIPE = f"""
task: language
model:
  name: mobilellm_125m
  args: {json.dumps({**SMALL_ARGS, "depth": 2, "context_length": 64})}
data: {{batch_size: 4, sequence_length: 32}}
optimizer: {{opt: adamw, lr: 3.0e-3, betas: [0.9, 0.95], clip_grad: 1.0}}
scheduler: {{epochs: 2, warmup_epochs: 0.2}}
train: {{device: cpu, peak_flops: 1.0e+9}}
output: {{tracker: null}}
"""
TEXTS = [f"The {thing} of {place} is {colour}.\n" * 4 for thing in ("sea", "sand") for place in ("Rome", "Oslo", "Bern")
         for colour in ("red", "blue", "grey", "green")]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    write_jsonl(folder / "train.jsonl", TEXTS)
    write_jsonl(folder / "val.jsonl", TEXTS[::7])
    (folder / "small.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(autouse=True)
def without_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than these runs; one test looks at it."""
    if "from_the_command_line" not in request.node.name:
        monkeypatch.setattr("zoo.training.loop.plot_curves", lambda *_, **__: None)


def data_of(home: Path) -> dict[str, Any]:
    return {"path": f"{home}/{{train,val}}.jsonl", "cache_dir": str(home / "cache")}


def merged(changes: dict[str, Any], section: str, values: dict[str, Any]) -> dict[str, Any]:
    return {**changes, section: {**values, **changes.get(section, {})}}


def configure(home: Path, output: Path, **changes: Any) -> LanguageTrainingConfig:
    changes = merged(merged(changes, "data", data_of(home)), "output", {"dir": str(output)})
    return load_config(LanguageTrainingConfig, home / "small.yaml", **changes)


# --------------------------------------------------------------------------------------------------------------- a run


def test_a_run_from_the_command_line(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: Any):
    monkeypatch.syspath_prepend(ROOT)
    import train as script

    flags = plain_flags({"data": data_of(home), "output": {"dir": str(tmp_path / "run")}, "scheduler": {"epochs": 2}})
    prompts = '--sample.prompts=["The ", "The sea of "]'
    argv = ["train.py", "--config", str(home / "small.yaml"), *flags, prompts, "--sample.max_new_tokens=8"]
    monkeypatch.setattr(sys, "argv", argv)
    assert run_command(script.main) == 0
    said = capsys.readouterr().err
    assert "parameters without the embedding" not in said
    assert re.search(r"[\d,]+ parameters, [\d,]+ without the embedding; [\d,]+ tokens to an epoch", said)
    assert re.search(r"MFU counts [\d.]+ MFLOP to a token.* of 1 GFLOP/s, stated", said)
    assert re.search(r"epoch 2/2  train loss [\d.]+  val loss [\d.]+  perplexity [\d.]+  bits per byte [\d.]+", said)
    assert re.search(r"[\d,]+ tokens/s, MFU \d+%", said)
    assert re.search(r"Best bits per byte \d\.\d{4} in epoch 2", said)
    run = tmp_path / "run"
    history = rows(run)
    losses = [float(row["val_loss"]) for row in history]
    assert losses[-1] < losses[0] < math.log(257)
    for row in history:
        assert math.isclose(math.exp(float(row["val_loss"])), float(row["val_perplexity"]))
    samples = (run / "samples.md").read_text()
    assert re.findall(r"## Epoch (\d)", samples) == ["1", "2"]
    assert samples.count("> **The sea of **") == 2
    assert (run / "curves.png").is_file()
    assert f"bits per byte {float(history[-1]['val_bits_per_byte']):.4f}" in samples
    # what is saved opens as any model does, and says what its tokenizer is
    model: Any = zoo.create_model(f"local-dir:{run / 'best'}", pretrained=True)
    tokenizer = create_tokenizer(run)
    assert tokenizer.vocab_size == model.config.vocab_size == 257
    tokens = torch.tensor([[256, *"".join(TEXTS[::7][:1]).encode(), 256]])[:, :33]
    assert model(tokens[:, :-1], targets=tokens[:, 1:]).item() < math.log(257)
    assert isinstance(zoo.generate(model, "The ", tokenizer=tokenizer, max_new_tokens=4), str)


def test_evaluation_is_the_mean_over_every_token(home: Path, tmp_path: Path):
    config = configure(home, tmp_path / "run", train={"max_updates": 1}, scheduler={"epochs": 1})
    last = train(config).history[-1]
    model: Any = zoo.create_model(f"local-dir:{tmp_path / 'run' / 'last'}", pretrained=True).eval()
    stream = torch.tensor([token for text in TEXTS[::7] for token in (256, *text.encode())] + [256])
    total = 0.0
    with torch.no_grad():
        for place in range(0, len(stream) - 1, 32):
            part = stream[place : place + 33]
            logits = model(part[None, :-1])[0]
            total += F.cross_entropy(logits.double(), part[1:], reduction="sum").item()
    assert last["val_loss"] == pytest.approx(total / (len(stream) - 1), rel=1e-6)
    text_bytes = sum(len(text.encode()) for text in TEXTS[::7])
    assert last["val_bits_per_byte"] == pytest.approx(total / math.log(2) / text_bytes, rel=1e-6)


def test_flops_of_a_token():
    """By hand: 2 for each multiplication and sum of the forward pass, and twice that for the backward pass."""
    model = small(depth=2, layer_map=(0, 0, 1))
    attention, mlp = 32 * (32 + 16 + 16 + 32), 3 * 32 * 64
    scores = 4 * 64 * (8 + 8)  # heads, tokens seen, widths of keys and values
    assert training_flops_per_token(model, 64) == 6 * (3 * (attention + mlp + scores) + 257 * 32)
    windowed = small(sliding_window=16, global_layers=(0,))
    assert training_flops_per_token(windowed, 64) == 6 * (3 * (attention + mlp) + scores * (1 + 2 * 16 / 64) + 257 * 32)


# -------------------------------------------------------------------------------------------------------- going on

EVERYTHING: dict[str, Any] = {
    "train": {"model_ema": True, "model_ema_decay": 0.9, "grad_accum_steps": 2, "amp": "bf16"},
    "optimizer": {"opt": "muon"},
    "loss": {"z_loss": 1e-4},
    "sample": {"prompts": ["The "], "max_new_tokens": 3},
    "scheduler": {"sched": "wsd", "decay_epochs": 0.5, "epochs": 2, "warmup_epochs": 0.2},
}
STREAM = {"streaming": True, "tokens_per_epoch": 1100, "shuffle_buffer": 10, "document_masks": True}


@pytest.mark.parametrize(
    ("data", "tokenizer", "updates"),
    [({}, {"name": "bpe", "vocab_size": 300}, 4), (STREAM, {"name": "bytes"}, 5)],
    ids=["packed", "stream"],
)
def test_going_on_is_exact(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    data: dict[str, Any],
    tokenizer: dict[str, Any],
    updates: int,
):
    """Ctrl-C in the second epoch; the end is an unbroken run's, also where the tokenizer was learned by it."""
    changes = {**EVERYTHING, "data": data, "tokenizer": tokenizer}
    train(configure(home, tmp_path / "whole", **changes))
    calls, loss = itertools.count(1), LanguageModeling.loss

    def interrupted(*args: Any) -> Any:
        if next(calls) == 2 * updates:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModeling, "loss", interrupted)
        with pytest.raises(Interrupted, match="Stopped by SIGINT and saved in"):
            train(configure(home, tmp_path / "parts", **changes))
    progress = read_state(tmp_path / "parts" / "last")["progress"]
    assert (progress["epoch"], progress["updates"]) == (1, updates)
    assert progress["batch"] > 0
    train(configure(home, tmp_path / "parts", **changes, resume="auto"))
    assert_same_checkpoint(tmp_path / "whole" / "last", tmp_path / "parts" / "last")
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    assert (tmp_path / "whole" / "samples.md").read_text() == (tmp_path / "parts" / "samples.md").read_text()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "whole" / "last" / file).read_bytes() == (tmp_path / "parts" / "last" / file).read_bytes()
    config = read_yaml(str(tmp_path / "whole" / "config.yaml"))
    assert config["optimizer"]["args"]["fallback_list"] == ["*embed_tokens*", "*lm_head*"]


def test_samples_fill_the_context_at_most(home: Path, tmp_path: Path):
    sample = {"prompts": ["a" * 60], "max_new_tokens": 30, "temperature": 0}
    train(configure(home, tmp_path / "run", sample=sample, train={"max_updates": 1}))
    assert "a" * 60 in (tmp_path / "run" / "samples.md").read_text()


def test_a_place_in_the_data_is_not_found_in_other_sequences(home: Path, tmp_path: Path):
    def sequences(length: int, **data: Any) -> dict[str, Any]:
        return {"data": {"sequence_length": length, **data}, "optimizer": {"opt": "sgd", "lr": 0.1}}

    def stop(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return loss(*args)

    loss = LanguageModeling.loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModeling, "loss", stop)
        with pytest.raises(Interrupted):
            train(configure(home, tmp_path / "run", **sequences(32)))
    with pytest.raises(ConfigError, match=r"in sequences of 32 tokens, and in those of 16 .*sequence_length at 32"):
        train(configure(home, tmp_path / "run", **sequences(16), resume="auto"))
    train(configure(home, tmp_path / "run", **sequences(32), scheduler={"epochs": 1}, resume="auto"))
    more = {"scheduler": {"epochs": 2}, "resume": "auto"}
    assert len(train(configure(home, tmp_path / "run", **sequences(16), **more)).history) == 2  # between epochs


MASKED: dict[str, Any] = {
    "train": {"max_updates": 4, "model_ema": True, "model_ema_decay": 0.9},
    "scheduler": {"epochs": 1, "warmup_epochs": 0},
    "optimizer": {"opt": "sgd", "lr": 0.1},
}


@pytest.fixture(scope="module")
def of_one(home: Path) -> Path:
    """A run whose batches do not have the same number of targets: no document guesses how the next begins."""
    write_jsonl(home / "train.ids.jsonl", [[1, 2, 3, i] * (i % 5 + 1) for i in range(4, 200)], "token_ids")
    write_jsonl(home / "val.ids.jsonl", [[1, 2, 3, i] for i in range(4, 50)], "token_ids")
    train(configure(home, home / "one", **MASKED, **token_ids(home)))
    return home / "one"


def token_ids(home: Path) -> dict[str, Any]:
    data = {"path": str(home / "*.ids.jsonl"), "cache_dir": str(home / "cache"), "document_masks": True}
    return {"data": data, "tokenizer": {"name": None}, "model": {"args": {"vocab_size": 257}}}


@pytest.mark.parametrize(("parallel", "accumulated"), [("ddp", 1), ("ddp", 2), ("fsdp", 1)])
def test_two_processes_learn_what_one_does(
    launcher: Launcher, home: Path, of_one: Path, tmp_path: Path, parallel: str, accumulated: int
):
    argv = ["--config", home / "small.yaml", *plain_flags({**MASKED, **token_ids(home)})]
    flags = ["--data.batch_size", 2 // accumulated, "--train.grad_accum_steps", accumulated]
    flags += ["--train.parallel", parallel, "--output.dir", tmp_path / "two"]
    said = launcher.run(tmp_path, *argv, *flags, processes=2)
    assert said.count("Best loss") == 1
    assert_learned_alike(of_one, tmp_path / "two")


def assert_learned_alike(one: Path, other: Path) -> None:
    models: list[Any] = [zoo.create_model(f"local-dir:{run / 'last'}", pretrained=True) for run in (one, other)]
    for (name, a), (_, b) in zip(*(model.state_dict().items() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    for key in ("train_loss", "val_loss"):
        assert float(rows(one)[0][key]) == pytest.approx(float(rows(other)[0][key]), rel=1e-4)


def test_every_target_of_an_update_weighs_the_same_however_batches_are_cut(home: Path, of_one: Path, tmp_path: Path):
    changes: dict[str, Any] = {**merged(MASKED, "train", {"grad_accum_steps": 4}), **token_ids(home)}
    train(configure(home, tmp_path / "parts", **merged(changes, "data", {"batch_size": 1})))
    assert_learned_alike(of_one, tmp_path / "parts")


# ---------------------------------------------------------------------------------------------------- chats, teachers


def test_chats_teach_their_answers(home: Path, tmp_path: Path):
    """Supervised fine-tuning, on from a run: the answer is learned, and the question is not."""
    tokenizer = train_tokenizer(["what is it? no", *TEXTS], 300, special_tokens=("<|end|>",))
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.chat_template = template
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(template)
    turns = [[{"role": "user", "content": f"what is it? {i * i}"}, {"role": "assistant", "content": "no"}]
             for i in range(40)]  # fmt: skip
    write_jsonl(tmp_path / "train.jsonl", turns, "messages")
    write_jsonl(tmp_path / "val.jsonl", turns[:5], "messages")
    changes: dict[str, Any] = {
        "tokenizer": {"name": str(tmp_path / "tokenizer")},
        "data": {"path": f"{tmp_path}/*.jsonl", "document_masks": True},
        "optimizer": {"lr": 0.01},
        "scheduler": {"epochs": 6},
    }
    run = train(configure(home, tmp_path / "run", **changes))
    assert run.metric == "loss"
    assert "val_bits_per_byte" not in run.history[0]
    assert run.best == min(row["val_loss"] for row in run.history) < 0.5
    model: Any = zoo.create_model(f"local-dir:{run.best_checkpoint}", pretrained=True).eval()
    asked = torch.tensor([tokenizer.apply_chat([{"role": "user", "content": "what is it? 7"}])])
    with torch.no_grad():
        assert model(asked[:, :-1], targets=asked[:, 1:]).item() > 3


@pytest.mark.parametrize("top_k", [None, 7])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_the_distillation_loss_by_hand(top_k: int | None, tau: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("zoo.layers.token_loss.LOGITS_AT_ONCE", 200)  # five tokens at a time
    torch.manual_seed(0)
    options: dict[str, Any] = {"dtype": torch.float64}
    hidden = torch.randn(23, 8, requires_grad=True, **options)
    weight = torch.randn(40, 8, requires_grad=True, **options)
    taught, teacher = torch.randn(23, 12, **options), torch.randn(40, 12, **options)
    targets = torch.randint(0, 40, (23,))
    targets[3:6] = -100
    loss = distillation_loss(hidden, weight, targets, taught, teacher, alpha=0.3, tau=tau, top_k=top_k, z_loss=0.1)
    logits, right = hidden @ weight.T, (taught @ teacher.T / tau).softmax(-1)
    if top_k is not None:
        kept = right >= right.topk(top_k).values[:, -1:]
        right = right * kept / (right * kept).sum(-1, keepdim=True)
    divergence = torch.xlogy(right, right).sum(-1) - (right * (logits / tau).log_softmax(-1)).sum(-1)
    each = 0.7 * F.cross_entropy(logits, targets, reduction="none") + 0.3 * tau**2 * divergence
    expected = (each + 0.1 * logits.logsumexp(-1) ** 2)[targets != -100].mean()
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    alone = distillation_loss(hidden, weight, targets, taught, teacher, alpha=0, z_loss=0.1)
    torch.testing.assert_close(alone, mean_token_loss(hidden, weight, targets, 0.1))


def test_learning_from_a_teacher(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From a finished run, alone (alpha 1): what the student says comes near to what the teacher says."""
    monkeypatch.setattr(products, "SMALLEST", 1)  # however small the model: training's products are in use
    monkeypatch.setattr(products, "_MKL_IS_FASTER", False)
    train(configure(home, tmp_path / "teacher", scheduler={"epochs": 2}))
    changes: dict[str, Any] = {
        "distill": {"teacher": str(tmp_path / "teacher"), "alpha": 1.0, "top_k": 40},
        "model": {"args": {"dim": 16, "num_heads": 2, "num_kv_heads": 1}},
        "train": {"model_ema": True, "model_ema_decay": 0.5},
    }
    run = train(configure(home, tmp_path / "student", **changes))
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]
    assert run.history[-1]["val_loss"] < 4.5
    other = {**changes, "model": {"args": {"vocab_size": 300}}}
    with pytest.raises(ConfigError, match=r"has 257 tokens and the student 300; a teacher must know the student's"):
        train(configure(home, tmp_path / "other", **other))


@pytest.mark.slow  # a recipe's test takes such a teacher, too
def test_a_teacher_of_transformers(home: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    teacher = {"teacher": f"transformers/{tmp_path / 'llama'}", "alpha": 0.5, "dtype": "bfloat16"}
    few = {"max_updates": 2}
    run = train(configure(home, tmp_path / "run", distill=teacher, train=few))
    assert math.isfinite(run.history[-1]["train_loss"])
    with pytest.raises(CheckpointError, match=r"distill\.teacher transformers/.*nowhere cannot be loaded"):
        train(configure(home, tmp_path / "none", distill={"teacher": f"transformers/{tmp_path}/nowhere"}, train=few))


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "poolformer_s12", "args": {}}}, r"poolformer_s12"),
        ({"data": {"sequence_length": 100}}, r"data\.sequence_length is 100, and the model's context 64"),
        ({"model": {"args": {"vocab_size": 200}}}, r"bytes has 257 tokens"),
        ({"tokenizer": {"name": None}}, r"The data are texts, and tokenizer\.name is null"),
        ({"sample": {"prompts": ["The", "a" * 63]}}, r"prompts: 'a{20}'\.\.\. has 64 tokens, which leave no room"),
        ({"distill": {"top_k": 4}}, r"distill\.top_k belongs to a distill\.teacher: name one, or leave"),
        ({"distill": {"teacher": "mobilellm_125n"}}, r"Did you mean mobilellm_125m"),
        ({"data": {"path": "nowhere/at/all"}}, r"There are no texts at 'nowhere/at/all'"),
    ],
)
def test_what_cannot_be_is_said(home: Path, tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(zoo.ZooError, match=message):
        train(configure(home, tmp_path / "run", **changes))


def test_weights_bring_their_tokenizer(home: Path, tmp_path: Path):
    """To a run that starts from them, by whatever names them, unless another is named."""
    few = {"train": {"max_updates": 2}}
    learned = {"tokenizer": {"name": "bpe", "vocab_size": 270}, "model": {"args": {"vocab_size": 270}}}
    first = train(configure(home, tmp_path / "first", **few, **learned)).best_checkpoint
    wanted = (first / "tokenizer.json").read_text()
    for key, value in (("name", first), ("name", tmp_path / "first"), ("checkpoint_path", first)):
        model = {key: str(value), "args": {"vocab_size": 270}}
        again = train(configure(home, tmp_path / f"again_{key}_{value.name}", **few, model=model)).best_checkpoint
        assert (again / "tokenizer.json").read_text() == wanted
    bare = zoo.save_pretrained(small(depth=2, context_length=64), tmp_path / "bare")
    changes: dict[str, Any] = {**few, "model": {"args": {}, "name": str(bare)}}
    with pytest.raises(
        ConfigError, match=r"No tokenizer lies beside the weights of .*: name theirs with tokenizer\.name"
    ):
        train(configure(home, tmp_path / "nameless", **changes))
    run = train(configure(home, tmp_path / "named", **changes, tokenizer={"name": "bytes"}))
    assert create_tokenizer(run.best_checkpoint).vocab_size == 257


def test_a_run_goes_on_with_its_tokenizer(home: Path, tmp_path: Path):
    """Though another lies beside the weights that it began with, as of runs from before these were looked at."""
    few = {"train": {"max_updates": 2}}
    learned = {"tokenizer": {"name": "bpe", "vocab_size": 270}, "model": {"args": {"vocab_size": 270}}}
    first = train(configure(home, tmp_path / "first", **few, **learned)).best_checkpoint
    begun: dict[str, Any] = {"model": {"name": str(first), "args": {"vocab_size": 270}}}
    train(configure(home, tmp_path / "run", **few, **begun, tokenizer={"name": "bytes"}))
    run = train(configure(home, tmp_path / "run", train={"max_updates": 4}, **begun, resume="auto"))
    assert create_tokenizer(run.folder / "last").vocab_size == 257


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "mobilellm_125n", "pretrained": True}, "There is no model called 'mobilellm_125n'"),
        ({"name": "poolformer_s12.sail_in1k"}, "poolformer_s12"),
        ({"name": "local-dir:/nowhere/at/all"}, "/nowhere/at/all"),
        ({"checkpoint_path": "nowhere.safetensors"}, "nowhere.safetensors"),
    ],
)
def test_weights_that_are_not_there_are_not_asked_for_a_tokenizer(
    home: Path, tmp_path: Path, model: dict[str, Any], message: str
):
    with pytest.raises(zoo.ZooError, match=message) as raised:
        train(configure(home, tmp_path / "run", model={"args": {}, **model}))
    assert "tokenizer" not in str(raised.value)


def test_quantised_weights_are_not_trained(home: Path, tmp_path: Path):
    folder = zoo.save_pretrained(
        zoo.quantize(small(depth=2, context_length=64), "int8"), tmp_path / "int8", tokenizer="bytes"
    )
    with pytest.raises(ConfigError, match=r"are in int8 and have no gradients: train the model as it was"):
        train(configure(home, tmp_path / "run", model={"args": {}, "name": str(folder)}))


def test_tokens_that_the_model_does_not_have(home: Path, tmp_path: Path):
    write_jsonl(tmp_path / "train.jsonl", [[1, 2, 300] * 99], "token_ids")
    write_jsonl(tmp_path / "val.jsonl", [[1, 2, 3] * 99], "token_ids")
    changes = {"data": {"path": str(tmp_path)}, "tokenizer": {"name": None}}
    with pytest.raises(DataError, match=r"holds token 300, and the model's vocabulary has 257"):
        train(configure(home, tmp_path / "run", **changes, model={"args": {"vocab_size": 257}}))
    run = train(configure(home, tmp_path / "run", **changes, model={"args": {"vocab_size": 301}}))
    assert run.metric == "loss"
    assert not (run.best_checkpoint / "tokenizer_config.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: langauge", r"There is no task 'langauge'.* Did you mean language"),
        ("task: language\nmodel: {nam: x}", r"there is no key model\.nam\. Did you mean"),
        ("task: language\ndata: {path: x}\naugment: {}", r"there is no key augment"),
        ("task: language\ndata: {path: x}\nloss: {z_loss: -1}", r"loss\.z_loss must not be negative"),
        ("task: language\ndata: {path: x}\ntokenizer: {name: bpe}", r"tokenizer\.vocab_size and tokenizer\.name"),
    ],
)
def test_mistakes_in_a_configuration(tmp_path: Path, text: str, message: str):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse_training_config(["--config", str(path)], prog="train.py")


def test_a_configuration_survives_its_file(home: Path, tmp_path: Path):
    config = configure(home, tmp_path / "run", **EVERYTHING)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert parse_training_config(["--config", str(tmp_path / "again.yaml")], prog="train.py") == config
