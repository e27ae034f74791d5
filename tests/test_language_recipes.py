"""Every shipped recipe for language states what its source states, and trains.

The tables are the papers' (arXiv 2402.14905, 2509.24945), as facebookresearch/MobileLLM and MobileLLM-R1 set them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import zoo
from tests.language import SMALL, small
from tests.test_text_data import write_jsonl
from zoo.config import to_plain
from zoo.data.tokenizers import create_tokenizer, train_tokenizer
from zoo.training import LanguageTrainingConfig, parse_training_config, train

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "language"
RECIPES = sorted(CONFIGS.rglob("*.yaml"))
MOBILELLM = sorted(CONFIGS.glob("mobilellm_*.yaml"))
# sequences to an update, tokens in each, updates, rate, rate at the end, updates or share of warm-up, weight decay
R1_STAGES = {
    "1_pretrain_1": (2048, 2048, 500_000, 4e-3, 4e-4, 2000, 0.1),
    "2_pretrain_2": (2048, 2048, 500_000, 4e-3, 4e-4, 2000, 0.1),
    "3_midtrain_1": (512, 4096, 50_000, 3.6e-4, 0, 0, 0.1),
    "4_midtrain_2": (512, 4096, 50_000, 3.6e-4, 0, 0, 0.1),
    "5_sft_general": (512, 4096, None, 5e-6, 0, 0.03, 0),
    "6_sft_reasoning": (1024, 32768, None, 8e-5, 0, 0.1, 0),
}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def read(path: Path, **changes: str) -> LanguageTrainingConfig:
    flags = [f"--{key}={value}" for key, value in changes.items()]
    config = parse_training_config(["--config", str(path), *flags], prog="train.py")
    assert isinstance(config, LanguageTrainingConfig)
    return config


def header(path: Path) -> str:
    """The comment at the top, as one line."""
    lines = path.read_text().split("\ntask:")[0].splitlines()
    assert all(line.startswith("#") for line in lines if line)
    return " ".join(" ".join(line.lstrip("# ") for line in lines).split())


def test_every_size_of_mobilellm_has_a_recipe():
    names = {info.name for info in zoo.search(family="mobilellm", task="language")}
    plain = {name for name in names if re.fullmatch(r"mobilellm_(ls_)?\d[\w]*[mb]", name)}
    assert {path.stem for path in MOBILELLM} == plain - {"mobilellm_ls_600m"}  # of which no weights are published


@pytest.mark.parametrize("path", MOBILELLM, ids=lambda path: path.stem)
def test_recipe_is_the_papers(path: Path):
    config = read(path)
    assert config.model.name == path.stem
    assert to_plain(config)["model"]["args"] == {}
    updates = config.data.tokens_per_epoch // (1024 * 2048) * config.scheduler.epochs  # type: ignore[operator]
    assert (config.train.global_batch_size, config.data.sequence_length, updates) == (1024, 2048, 480_000)
    assert config.scheduler.warmup_epochs * updates / config.scheduler.epochs == pytest.approx(1000, rel=1e-6)
    assert (config.optimizer.opt, config.optimizer.lr, config.optimizer.weight_decay) == ("adamw", 2e-3, 0.1)
    assert (config.optimizer.betas, config.optimizer.eps) == ((0.9, 0.95), 1e-8)
    assert (config.scheduler.sched, config.scheduler.min_lr) == ("cosine", 0.1 * config.optimizer.lr)
    assert (config.train.amp, config.train.grad_checkpointing) == ("bf16", False)


@pytest.mark.parametrize("stage", R1_STAGES)
def test_stage_of_r1_is_the_authors(stage: str):
    config = read(CONFIGS / "mobilellm_r1" / f"{stage}.yaml")
    batch, length, updates, lr, min_lr, warmup, decay = R1_STAGES[stage]
    assert (config.train.global_batch_size, config.data.sequence_length) == (batch, length)
    epochs = config.scheduler.epochs
    if updates is not None:
        assert config.data.tokens_per_epoch * epochs == updates * batch * length  # type: ignore[operator]
        assert config.scheduler.warmup_epochs / epochs * updates == pytest.approx(warmup)
    else:
        assert config.scheduler.warmup_epochs / epochs == pytest.approx(warmup)
        assert config.data.document_masks
    assert (config.optimizer.lr, config.scheduler.min_lr, config.optimizer.weight_decay) == (lr, min_lr, decay)
    assert (config.scheduler.sched, config.scheduler.decay_rate) == ("poly", 1)
    assert (config.distill.teacher is not None) == stage.startswith(("3", "4"))
    stages = list(R1_STAGES)
    before = stages[stages.index(stage) - 1] if stage != stages[0] else None
    assert config.model.checkpoint_path == (before and f"runs/language/mobilellm_r1/{before}")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_headers_say_what_a_reader_needs(path: Path):
    text, place = header(path), str(path.relative_to(ROOT))
    for fact in ("Command:", "Hardware:", "Time:", "Expect:"):
        assert fact in text
    assert f"--config {place}" in text
    config = read(path)
    where = path.relative_to(CONFIGS).with_suffix("")
    assert config.output.dir == {"pydoc_demo": "runs/pydoc", "books": "runs/books"}.get(
        path.stem, f"runs/language/{where}"
    )
    if config.train.global_batch_size is not None:
        nodes, processes = re.search(r"--nnodes (\d+) --nproc_per_node (\d+)", text).groups()  # type: ignore[union-attr]
        gpus = int(nodes) * int(processes)
        assert f"{gpus} GPUs with {config.data.batch_size} sequences each" in text
        assert gpus * config.data.batch_size == config.train.global_batch_size


def test_the_index_of_recipes_names_all():
    text = (CONFIGS / "README.md").read_text()
    for path in RECIPES:
        place = path.relative_to(CONFIGS)
        named = f"[{place}]({place})" in text or any(
            pattern in text for pattern in (f"`{place.stem.partition('_')[0]}_*.yaml`", f"[{place.parent}/")
        )
        assert named, place
    for place in re.findall(r"\]\((.*?)\)", text):
        assert (CONFIGS / place).is_file(), place


def one_of_each_kind() -> Iterator[Any]:
    """Those of other sizes, and second stages that are as the first, with the slow tests."""
    quick = ("pydoc_demo", "books", "mobilellm_ls_125m", "3_midtrain_1", "5_sft_general")
    for path in RECIPES:
        marks = () if path.stem in quick else pytest.mark.slow
        yield pytest.param(path, marks=marks, id=str(path.relative_to(CONFIGS)))


@pytest.mark.parametrize("path", one_of_each_kind())
def test_recipe_takes_two_steps(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The architecture, small, with the recipe's kind of data, optimizer, schedule and teacher."""
    recipe = read(path)
    tokenizer = train_tokenizer(["some text of several words " * 20], 300)
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    vocabulary = tokenizer.vocab_size
    changes: dict[str, Any] = {
        "model.pretrained": "false",
        "data.cache_dir": tmp_path / "cache",
        "data.batch_size": 2,
        "data.sequence_length": 32,
        "data.val_tokens": 100,
        "train.max_updates": 2,
        "train.device": "cpu",
        "train.amp": "no",
        "train.torchcompile": "false",
        "train.peak_flops": 1e9,
        "train.global_batch_size": "null",
        "output.dir": tmp_path / "run",
        "output.tracker": "null",
    }
    rows, column = ["some text of several words, and more words."] * 60, "text"
    if recipe.tokenizer.name is None:
        rows, column = [create_tokenizer("bytes").encode(row) for row in rows], "token_ids"  # type: ignore[misc]
        vocabulary = 257
    elif recipe.tokenizer.name == "bytes":
        vocabulary = 257
    elif recipe.tokenizer.name == "bpe":
        vocabulary = changes["tokenizer.vocab_size"] = 290
    else:
        changes["tokenizer.name"] = tmp_path / "tokenizer"
    if "sft" in path.stem:
        turns = [{"role": "user", "content": "some"}, {"role": "assistant", "content": "text of words"}]
        rows, column = [turns] * 60, "messages"  # type: ignore[list-item]
    if recipe.data.name == "files":
        write_jsonl(tmp_path / "train.jsonl", rows, column)
        write_jsonl(tmp_path / "val.jsonl", rows[:9], column)
        changes["data.path"] = f"{tmp_path}/*.jsonl"
    if recipe.data.streaming:
        changes["data.tokens_per_epoch"] = 32 * 8
    small_args = {**SMALL, "depth": 2, "vocab_size": vocabulary, "context_length": 64}
    if "ls" in path.stem.split("_"):
        small_args["layer_map"] = [0, 0, 1, 1]
    changes["model.args"] = "{" + ", ".join(f"{key}: {value}" for key, value in small_args.items()) + "}"
    if recipe.model.checkpoint_path:
        start = small(recipe.model.name, **{**small_args, "vocab_size": vocabulary})
        changes["model.checkpoint_path"] = zoo.save_pretrained(start, tmp_path / "start")
    if recipe.distill.teacher:
        transformers = pytest.importorskip("transformers")
        shape = {"vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 32}
        llama = transformers.LlamaConfig(**shape, num_hidden_layers=1, num_attention_heads=2)
        transformers.LlamaForCausalLM(llama).save_pretrained(tmp_path / "teacher")
        changes["distill.teacher"] = f"transformers/{tmp_path / 'teacher'}"
    monkeypatch.setattr("zoo.training.loop.write_checkpoint", lambda *_: None)  # tested elsewhere, and what takes time
    run = train(read(path, **changes))
    assert run.history[-1]["updates"] == 2
    assert math.isfinite(run.history[-1]["train_loss"])
    assert math.isfinite(run.history[-1]["val_loss"])
    assert ("val_bits_per_byte" in run.history[-1]) == (column == "text")
    if recipe.sample.prompts:
        assert (tmp_path / "run" / "samples.md").is_file()
