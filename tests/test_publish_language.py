"""Language models in the Hub's layout: what is saved and published opens, here and in transformers, with its card."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    attach_align_device_hook,
    remove_hook_from_module,
)
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import zoo
from tests.hub_stub import Hub
from tests.language import small
from tests.sparse_runs import make_sparse
from zoo import cli
from zoo.cli import main
from zoo.data.text import TextDataConfig
from zoo.data.tokenizers import create_tokenizer
from zoo.errors import ConfigError
from zoo.layers.decoder import Decoder
from zoo.publishing import model_card, prepare, publish
from zoo.training import LanguageTrainingConfig, train
from zoo.training.config import OutputConfig, SchedulerConfig
from zoo.training.language_config import LanguageModelConfig, LanguageTrainConfig, SampleConfig, TokenizerConfig
from zoo.training.loop import make_accelerator

TINY = {"depth": 1, "dim": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "hidden_dim": 32, "context_length": 32}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two short epochs, as `train.py` leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "manual"
    train(
        LanguageTrainingConfig(
            model=LanguageModelConfig(name="mobilellm_125m", args=TINY),
            tokenizer=TokenizerConfig(name="bytes"),
            data=TextDataConfig(
                name="pydoc", sequence_length=32, batch_size=32, tokens_per_epoch=8192, val_tokens=2048
            ),
            scheduler=SchedulerConfig(epochs=2, warmup_epochs=0.1),
            train=LanguageTrainConfig(device="cpu"),
            sample=SampleConfig(prompts=("The ",), max_new_tokens=8),
            output=OutputConfig(dir=str(folder), tracker=None),
        )
    )
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "manual"))


def results_of(run: Path) -> dict[str, Any]:
    """What `eval.py --model RUN --output RUN/evaluation` leaves there, with a task."""
    model = zoo.create_model(f"local-dir:{run / 'best'}")
    scores = zoo.evaluation.perplexity(model, "A text to be measured.", create_tokenizer("bytes"))
    found = {
        "model": "/home/jane/runs/manual", "task": "language", "data": "/home/jane/wiki.txt", "split": None,
        "perplexity": scores.perplexity, "bits_per_byte": scores.bits_per_byte, "loss": scores.loss,
        "tokens": scores.tokens, "bytes": scores.bytes, "context": scores.context, "stride": scores.stride,
        "tokenizer": "bytes", "command": "python eval.py --model /home/jane/runs/manual",
        "tasks": [{"task": "arc_easy", "metric": "acc", "value": 0.25, "stderr": 0.01, "num_fewshot": 0, "samples": 9}],
    }  # fmt: skip
    (run / "evaluation").mkdir()
    (run / "evaluation" / "results.json").write_text(json.dumps(found))
    return found


def tokens() -> torch.Tensor:
    return torch.randint(257, (2, 20), generator=torch.Generator().manual_seed(3))


def files_of(hub: Hub, name: str) -> dict[str, bytes]:
    return hub.repos[name].commits[hub.repos[name].refs["main"]]


# -------------------------------------------------------------------------------------------------------------- saving


def test_one_folder_serves_both(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model = small("mobilellm_r1_140m").eval()
    zoo.save_pretrained(model, tmp_path / "both", tokenizer=create_tokenizer("bytes"), note="One for two.")
    ours = zoo.create_model(f"local-dir:{tmp_path / 'both'}").eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "both").eval()
    with torch.no_grad():
        wanted = model(tokens())
        assert torch.equal(ours(tokens()), wanted)
        assert ((theirs(tokens()).logits - wanted).abs().max() / wanted.abs().max()).item() < 1e-5
    assert ours.pretrained_cfg["architecture"] == "mobilellm_r1_140m"  # type: ignore[index]
    config = json.loads((tmp_path / "both" / "config.json").read_text())
    assert config["model_type"] == "llama4_text"
    assert config["eos_token_id"] == 256
    assert config["note"] == "One for two."
    assert "tag" not in config["pretrained_cfg"]  # the weights were never published
    assert create_tokenizer(tmp_path / "both").vocab_size == 257


def test_shared_layers_are_stored_once_and_open_here_alone(tmp_path: Path):
    model = small("mobilellm_ls_125m", layer_map=(0, 0, 1, 1, 2, 2))
    zoo.save_pretrained(model, tmp_path / "shared", dtype=torch.float16)
    again: Any = zoo.create_model(f"local-dir:{tmp_path / 'shared'}", dtype=torch.float16)
    assert again.config == model.config
    assert "model_type" not in json.loads((tmp_path / "shared" / "config.json").read_text())
    assert torch.equal(again.head_weight, model.head_weight.half())


def test_saving_again_replaces_the_tokenizer_and_keeps_the_rest(tmp_path: Path):
    zoo.save_pretrained(small(), tmp_path / "model", tokenizer=create_tokenizer("bytes"))
    (tmp_path / "model" / "notes.txt").write_text("mine")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    zoo.save_pretrained(small(), tmp_path / "model", tokenizer=create_tokenizer("bytes"), overwrite=True)
    assert create_tokenizer(tmp_path / "model").vocab_size == 257
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


def test_a_decoder_saves_and_opens_itself(tmp_path: Path):
    model = small("youtu_llm_2b", num_kv_heads=None, q_rank=24, kv_rank=32)
    again = type(model).from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert torch.equal(again.eval()(tokens()), model(tokens()))


def test_what_cannot_be_saved(tmp_path: Path):
    with pytest.raises(ConfigError, match="no classes"):
        zoo.save_pretrained(small(), tmp_path / "model", labels=["a"])
    with pytest.raises(ConfigError, match="another model's tokenizer"):
        zoo.save_pretrained(small(vocab_size=100), tmp_path / "model", tokenizer=create_tokenizer("bytes"))
    vision = zoo.create_model("poolformer_s12", pretrained=False, depths=(1,), dims=(8,))
    with pytest.raises(ConfigError, match="none"):
        zoo.save_pretrained(vision, tmp_path / "model", tokenizer=create_tokenizer("bytes"))
    assert not list(tmp_path.iterdir())


class Adapter(torch.nn.Module):
    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base, self.up = base, torch.nn.Linear(base.in_features, base.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(x)


def cut(model: Any) -> None:
    model.model.layers = model.model.layers[:2]


def runs_fewer_layers(model: Any) -> None:
    model.config = dataclasses.replace(model.config, layer_map=(0, 1))


def resize(model: Any) -> None:
    model.model.embed_tokens = torch.nn.Embedding(300, model.config.dim)


def adapt(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj = Adapter(model.model.layers[0].self_attn.q_proj)


def add_bias(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.ones(32))


def normalise(model: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].self_attn.q_proj)


def hook(model: Any) -> None:
    model.model.norm.register_forward_hook(lambda module, inputs, output: output + 1)


def patch(model: Any) -> None:
    model.model.norm.forward = torch.neg


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((change, "not as its arguments build it") for change in (cut, resize, adapt, add_bias, normalise)),
        (runs_fewer_layers, "config is not what its arguments build"),
        (hook, r"model\.norm \(RMSNorm\) has hooks: first merge adapters"),
        (patch, r"model\.norm \(RMSNorm\) has .* a forward of its own"),
    ],
)
def test_a_model_that_would_open_as_another_is_not_saved(change: Any, message: str, tmp_path: Path):
    model = small()
    change(model)
    with pytest.raises(ConfigError, match=message):
        zoo.save_pretrained(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_mixed_precision_of_accelerate_is_no_change(tmp_path: Path):
    model = small()
    wanted = model(tokens())
    accelerator = make_accelerator(LanguageTrainConfig(device="cpu", amp="bf16"), OutputConfig(tracker=None))
    accelerator.prepare(model)
    again = zoo.create_model(f"local-dir:{zoo.save_pretrained(model, tmp_path / 'model')}").eval()
    assert torch.equal(again(tokens()), wanted)
    assert zoo.save_pretrained(accelerator.unwrap_model(model, keep_fp32_wrapper=False), tmp_path / "unwrapped")


def test_a_dispatched_model_is_saved_and_scored_as_it_was(tmp_path: Path):
    model = small(tie_embeddings=False)
    wanted, loss = model(tokens()), model(tokens(), tokens())
    attach_align_device_hook(model, execution_device=torch.device("cpu"))
    add_hook_to_module(model, SequentialHook(AlignDevicesHook(), AlignDevicesHook()))
    again = zoo.create_model(f"local-dir:{zoo.save_pretrained(model, tmp_path / 'model')}").eval()
    assert torch.equal(again(tokens()), wanted)
    assert torch.equal(model(tokens(), tokens()), loss)
    remove_hook_from_module(model, recurse=True)
    assert zoo.save_pretrained(model, tmp_path / "removed")
    assert torch.equal(model(tokens(), tokens()), loss)
    assert zoo.optimize_for_inference(model) is not model


class PlusOne(ModelHook):
    def post_forward(self, module: torch.nn.Module, output: torch.Tensor) -> torch.Tensor:
        return output + 1


def hook_by_accelerate(module: torch.nn.Module) -> None:
    add_hook_to_module(module, PlusOne())


def hook_twice(module: torch.nn.Module) -> None:
    add_hook_to_module(module, SequentialHook(AlignDevicesHook(), PlusOne()))


def patch_and_dispatch(module: torch.nn.Module) -> None:
    module.forward = torch.neg
    add_hook_to_module(module, AlignDevicesHook())


@pytest.mark.parametrize("change", [hook_by_accelerate, hook_twice, patch_and_dispatch])
def test_what_accelerates_hooks_compute_counts(change: Any, tmp_path: Path):
    model = small(tie_embeddings=False)
    change(model.model.norm)
    with pytest.raises(ConfigError, match=r"model\.norm \(RMSNorm\) has .* a forward of its own"):
        zoo.save_pretrained(model, tmp_path / "model")
    change(model.lm_head)
    with pytest.raises(ConfigError, match=r"lm_head \(Linear\) has a forward of its own: .* remove hooks"):
        model(tokens(), tokens())


def test_losses_of_offloaded_heads_are_refused():
    untied, tied = small(tie_embeddings=False), small()
    cpu_offload(untied, torch.device("cpu"))
    cpu_offload(tied, torch.device("cpu"))
    assert torch.isfinite(untied(tokens())).all()
    with pytest.raises(ConfigError, match=r"lm_head .* its weight elsewhere: .* keep the weight in memory"):
        untied(tokens(), tokens())
    with pytest.raises(ConfigError, match="embedding's, which is offloaded: keep embed_tokens in memory"):
        tied(tokens())


def test_norms_in_float32_do_not_describe_a_model(tmp_path: Path):
    model = small().bfloat16()
    model.model.norm.float()
    folder = zoo.save_pretrained(model, tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_file(folder / "model.safetensors")["model.norm.weight"].dtype == torch.float32


def test_a_subclass_of_a_model_is_saved_as_the_model(tmp_path: Path):
    class Counting(Decoder):
        calls = 0

        def forward(self, *args: Any, **options: Any) -> torch.Tensor:
            self.calls += 1
            return super().forward(*args, **options)

    model = small()
    wanted = model(tokens())
    model.__class__ = Counting
    again = zoo.create_model(f"local-dir:{zoo.save_pretrained(model, tmp_path / 'model')}").eval()
    assert torch.equal(again(tokens()), wanted)
    model.forward = torch.neg
    with pytest.raises(ConfigError, match=r"the model .* a forward of its own"):
        zoo.save_pretrained(model, tmp_path / "other")


# ---------------------------------------------------------------------------------------------------------- publishing


def test_a_sparse_run_says_so_and_brings_its_masks(run: Path, tmp_path: Path):
    dense = model_card(run)
    assert "effective" not in dense
    assert "- sparse" not in dense
    found = make_sparse(run)
    draft = prepare(run, tmp_path / "sparse")
    assert "sparse" in ModelCard(draft.card).data.to_dict()["tags"]
    assert f"| density | {found.density:.2%} of " in draft.card
    assert f"| effective parameters | {found.effective_params:,} |" in draft.card
    assert f" for a text of {found.input_size[-1]} tokens |" in draft.card
    assert "](masks.png)" in draft.card
    assert {"sparsity.json", "masks.png", "masks.safetensors"} <= draft.files.keys()


def test_a_run_is_published_and_opens(hub: Hub, run: Path, tmp_path: Path):
    results = results_of(run)
    found = publish(run, "me/manual", license="apache-2.0", note="Trained on a toaster.")
    files = files_of(hub, "me/manual")
    assert set(found.files) == set(files) - {".gitattributes"}
    assert set(found.files) == {
        *("README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("generation_config.json", "training_config.yaml", "environment.json", "history.csv", "curves.png"),
        *("samples.md", "results.json"),
    }
    assert files["model.safetensors"] == (run / "best" / "model.safetensors").read_bytes()
    assert b"jane" not in b"".join(files.values())
    served: Any = zoo.create_model("hf-hub:me/manual", cache_dir=tmp_path / "cache").eval()
    ours = zoo.create_model(f"local-dir:{run / 'best'}").eval()
    assert torch.equal(served(tokens()), ours(tokens()))
    assert served.pretrained_cfg["license"] == "apache-2.0"
    tokenizer = create_tokenizer("hf-hub:me/manual", cache_dir=tmp_path / "cache")
    assert zoo.generate(served, "The ", tokenizer=tokenizer, max_new_tokens=4)

    card: Any = ModelCard(files["README.md"].decode(), ignore_metadata_errors=False)
    assert card.data.pipeline_tag == "text-generation"
    assert {"zoo", "mobilellm"} <= set(card.data.tags)
    measured = {(result.dataset_name, result.metric_type): result for result in card.data.eval_results}
    assert measured["wiki.txt", "perplexity"].metric_value == round(results["perplexity"], 4)
    assert measured["wiki.txt", "bits_per_byte"].source_url.endswith("/me/manual/blob/main/results.json")
    assert measured["arc_easy", "acc"].metric_value == 0.25
    parameters = sum(parameter.numel() for parameter in ours.parameters())
    for text in (
        f"| parameters | {parameters:,}, embedding and head being one |",
        "| memory | 64 bytes of keys and values a token |",
        "| context | 32 tokens |",
        "| vocabulary | 257, tokenizer of 257 |",
        'zoo.create_model("hf-hub:me/manual")',
        "zoo export hf-hub:me/manual FOLDER --to gguf",
        f"| Bits per byte | {results['bits_per_byte']:.4f} |",
        "| `arc_easy` | acc | 0.2500 | 0.0100 | 0 | 9 |",
        "python eval.py --model manual",
        "| `model.args.dim` | `16` |",
        "![Loss by epoch](curves.png)",
        "Trained on a toaster.",
        "eprint = {2402.14905}",
    ):
        assert text in card.text, text
    assert "`optimizer.opt`" not in card.text  # the default
    assert not publish(run, "me/manual", license="apache-2.0", note="Trained on a toaster.").changed


def test_the_card_speaks_of_transformers_where_it_opens_the_files(trained: Path, tmp_path: Path):
    pytest.importorskip("transformers")
    card: Any = ModelCard(model_card(trained), ignore_metadata_errors=False)
    assert card.data.library_name == "transformers"
    assert 'AutoModelForCausalLM.from_pretrained("OWNER/NAME")' in card.text
    shared = small("mobilellm_ls_125m", layer_map=(0, 0, 1, 1, 2, 2))
    draft = prepare(shared, tmp_path / "draft", tokenizer="bytes")
    card = ModelCard(draft.card, ignore_metadata_errors=False)
    assert card.data.library_name == "backbone-zoo"
    assert "AutoModelForCausalLM" not in card.text
    assert "zoo export hf-hub:OWNER/NAME FOLDER --to transformers" in card.text
    assert "| layers, width | 3 stored, 6 executed; 32, 64 within |" in card.text
    assert "These weights come without measured results." in card.text
    assert "tokenizer.json" in draft.files


def test_without_an_evaluation_the_run_speaks_for_itself(trained: Path):
    rows = [line.split(",") for line in (trained / "history.csv").read_text().splitlines()]
    best = min(float(row[rows[0].index("val_bits_per_byte")]) for row in rows[1:])
    card: Any = ModelCard(model_card(trained), ignore_metadata_errors=False)
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured["bits_per_byte"] == round(best, 4)
    assert "the topics of Python's manual (pydoc)" in card.text


def test_a_model_without_a_tokenizer_is_remarked_on_and_halving_too(tmp_path: Path):
    model = small()
    draft = prepare(model, tmp_path / "draft", half=True)
    assert any("no tokenizer" in remark for remark in draft.remarks)
    assert "token numbers: there is no tokenizer" in draft.card
    assert "float16, halved after training" in draft.card
    assert "tokenizer.json" not in draft.files


@pytest.mark.parametrize("half", [False, True])
def test_what_a_dry_run_leaves_is_what_a_publish_of_it_sends(run: Path, tmp_path: Path, half: bool):
    results = results_of(run)
    draft = prepare(run, tmp_path / "draft", license="mit", half=half)
    assert {"samples.md", "history.csv", "results.json", "tokenizer.json"} <= draft.files.keys()
    again = prepare(draft.folder, tmp_path / "again")
    assert again.remarks == draft.remarks
    assert again.files == draft.files
    for name in draft.files:
        assert (again.folder / name).read_bytes() == (draft.folder / name).read_bytes(), name
    results |= {"perplexity": 12.5}
    (tmp_path / "results.json").write_text(json.dumps(results))
    card: Any = ModelCard(model_card(draft.folder, results=tmp_path / "results.json"))
    measured = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert measured["perplexity"] == 12.5
    assert ("halved after training" in card.text) == half


def test_a_quantised_model_is_not_halved(tmp_path: Path):
    folder = zoo.save_pretrained(zoo.quantize(small(), "int4"), tmp_path / "int4")
    with pytest.raises(ConfigError, match=r"weights are int4, and are not halved: leave out half \(--half\)"):
        prepare(folder, tmp_path / "draft", half=True)


def test_results_of_images_are_not_those_of_text(run: Path):
    (run / "evaluation").mkdir()
    (run / "evaluation" / "results.json").write_text(json.dumps({"top1": 80.0}))
    with pytest.raises(ConfigError, match="neither perplexity nor tasks"):
        model_card(run)


def test_published_weights_keep_their_name_and_licence(hub: Hub, tmp_path: Path):
    """A repository of the registry opens by its address, and nobody gives its weights out under another licence."""
    base = zoo.save_pretrained(small("mobilellm_125m"), tmp_path / "base", tokenizer=create_tokenizer("bytes"))
    config = json.loads((base / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in ("architecture", "model_args", "zoo")}
    repo = {path.name: path.read_bytes() for path in base.iterdir()} | {"config.json": json.dumps(kept).encode()}
    from tests.hub_stub import Repo

    hub.repos["HuggingFaceTB/SmolLM-135M"] = Repo()
    hub.repos["HuggingFaceTB/SmolLM-135M"].commit(repo)
    model: Any = zoo.create_model("hf-hub:HuggingFaceTB/SmolLM-135M", cache_dir=tmp_path / "cache")
    assert model.pretrained_cfg["architecture"] == "smollm_135m"
    assert model.pretrained_cfg["tag"] == "smollm_corpus"
    card: Any = ModelCard(model_card(model, tokenizer="bytes"), ignore_metadata_errors=False)
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "HuggingFaceTB/SmolLM-135M"
    assert "with the weights `smollm_135m.smollm_corpus`" in card.text


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["publish", str(run), "me/manual", "--dry-run", str(tmp_path / "draft")]) == 0
    said = capsys.readouterr()
    assert "tokenizer.json" in said.out
    assert "Nothing was published" in said.err
    assert cli.main(["card", str(run), "--tokenizer", "nothing"]) == 1
    assert "no tokenizer 'nothing'" in capsys.readouterr().err


def test_the_card_of_a_quantised_model(tmp_path: Path):
    """Counts what the packed weights stand for."""
    (tmp_path / "text.md").write_text("The sea of Rome is red. " * 20)
    zoo.save_pretrained(small(), tmp_path / "plain", tokenizer="bytes")
    assert main(["quantize", f"{tmp_path}/plain", f"{tmp_path}/int8", "--text", f"{tmp_path}/text.md"]) == 0
    plain, quantised = (model_card(tmp_path / name, license="mit") for name in ("plain", "int8"))
    for row in ("parameters", "MACs", "attention"):
        pattern = rf"\| {row} \| (.*) \|"
        assert re.findall(pattern, plain) == re.findall(pattern, quantised) != []
    assert "| weights | int8, a scale in float16 for every 32 of a row |" in quantised
    assert re.search(r"changed the perplexity on \d+ tokens of text.md from [\d.]+ to [\d.]+, measured", quantised)
    assert "without measured results" in plain
    assert "without measured results" not in quantised


@pytest.mark.parametrize("form", ["shared layers", "int8"])
def test_tokenizers_open_where_transformers_has_no_such_model(form: str, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model = small(layer_map=(0, 0, 1, 2)) if form == "shared layers" else zoo.quantize(small(), "int8")
    folder = zoo.save_pretrained(model, tmp_path / "model", tokenizer="bytes")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("sea", add_special_tokens=False)["input_ids"] == [*b"sea"]
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(zoo.create_model(f"local-dir:{folder}").eval()(tokens), model(tokens))
    with pytest.raises(ValueError, match="model type `zoo`"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
