"""lm-evaluation-harness on models of the zoo: the same answers as of its own adapter, and tasks without a network."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from tests.language import random_model, small

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from zoo.evaluation import harness  # noqa: E402
from zoo.evaluation.harness import SUITES, HarnessModel, evaluate_tasks  # noqa: E402

BYTES = zoo.create_tokenizer("bytes")
WORDS = ("the", "cat", "sat", "on", "a", "mat", "while", "many", "dogs", "ran", "over", "green", "hills", "slept")
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
)


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model()


def request(kind: str, *args: Any) -> Any:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)


def sentence(count: int) -> str:
    return " ".join(random.choices(WORDS, k=count))


@pytest.fixture(scope="module")
def questions() -> list[Any]:
    """Contexts short, long, too long and none, each with continuations of several lengths, some of one token."""
    random.seed(0)
    found = []
    for count in (1, 3, 3, 9, 20, 40):
        context = sentence(count)
        found += [request("loglikelihood", context, f" {sentence(i)}") for i in (1, 2, 7)]
        found += [request("loglikelihood", context, letter) for letter in "xy"]
    found.append(request("loglikelihood", "", sentence(3)))
    found.append(request("loglikelihood", "ends in a space ", "here"))
    return random.sample(found, len(found))


@pytest.fixture(scope="module")
def theirs(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The harness's own adapter, on the same weights in transformers' class: with bos before each text, or without."""
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("tokenizer")
    BYTES.save(folder)
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
        bos_token_id=256,
        eos_token_id=256,
    )
    same = transformers.LlamaForCausalLM(config).eval()
    same.load_state_dict({**model.state_dict(), "lm_head.weight": model.head_weight})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [
        HFLM(pretrained=same, tokenizer=tokenizer, batch_size=4, device="cpu", add_bos_token=adds_bos)
        for adds_bos in (False, True)
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_likelihoods_are_those_of_the_harness(model: Any, theirs: Any, questions: list[Any], batch_size: int):
    ours = HarnessModel(model, BYTES, batch_size=batch_size)
    with torch.inference_mode():
        found, wanted = ours.loglikelihood(questions), theirs[True].loglikelihood(questions, disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_texts_are_judged_as_the_harness_does(model: Any, theirs: Any):
    random.seed(1)
    texts = [request("loglikelihood_rolling", text) for text in ("", "a", sentence(9), sentence(90), "Füchse")]
    with torch.inference_mode():
        found = HarnessModel(model, BYTES, batch_size=3).loglikelihood_rolling(texts)
        # without bos, which theirs would count as a token of the text; and theirs fails at an empty one
        wanted = theirs[False].loglikelihood_rolling(texts[1:], disable_tqdm=True)
    assert found == pytest.approx([0.0, *wanted], rel=1e-5)


def test_answers_are_those_of_the_harness(model: Any, theirs: Any):
    random.seed(2)
    kinds: list[dict[str, Any]] = [
        {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
        {"until": ["q", "z"], "max_gen_toks": 5, "do_sample": False},
    ]
    prompts = [request("generate_until", sentence(count), kinds[count % 2]) for count in (1, 2, 5, 8, 30)]
    with torch.inference_mode():
        found = HarnessModel(model, BYTES, batch_size=2).generate_until(prompts)
        wanted = theirs[True].generate_until(prompts, disable_tqdm=True)
    assert found == wanted
    assert any(found)


def test_greedy_continuations_are_known_as_such(model: Any):
    """What generation writes is what likelihood calls greedy; another last token is not."""
    lm = HarnessModel(model, BYTES)
    begin = BYTES.encode("the cat", bos=True)
    (written,) = zoo.generate(model, [begin], max_new_tokens=6, temperature=0)
    other = [*written[:-1], (written[-1] + 1) % 256]
    with torch.inference_mode():
        scores = lm._loglikelihood_tokens([("", begin, written), ("", begin, other), ("", begin, written[:1])])
    assert [greedy for _, greedy in scores] == [True, False, True]


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("mobilellm_ls_125m", {"layer_map": (0, 0, 1, 1, 2, 2)}),
        ("mobilellm_pro", {"sliding_window": 16, "global_layers": (1,)}),
        ("fast", {}),
    ],
)
def test_shared_contexts_change_nothing(questions: list[Any], name: str, args: dict[str, Any]):
    """Every continuation scored from one pass over all of its text, without a cache."""
    model = random_model("mobilellm_125m" if name == "fast" else name, **args)
    lm = HarnessModel(zoo.optimize_for_inference(model) if name == "fast" else model, BYTES, batch_size=5)
    with torch.inference_mode():
        for (score, greedy), asked in zip(lm.loglikelihood(questions), questions, strict=True):
            context, continuation = asked.args
            stripped = context.rstrip(" ")
            tail = BYTES.encode(context[len(stripped) :] + continuation)
            ids = [*BYTES.encode(stripped, bos=True), *tail][-129:]
            log_p = model(torch.tensor([ids[:-1]]))[0, -len(tail) :].double().log_softmax(-1)
            assert score == pytest.approx(log_p.gather(1, torch.tensor(tail)[:, None]).sum().item(), rel=1e-5)
            assert greedy == (log_p.argmax(-1).tolist() == tail)


def test_a_context_is_computed_once(model: Any, questions: list[Any]):
    class Counting(torch.nn.Module):
        """Counts the tokens that the model reads."""

        def __init__(self) -> None:
            super().__init__()
            self.model, self.config, self.tokens = model, model.config, 0

        def make_cache(self, *args: Any, **options: Any) -> Any:
            return model.make_cache(*args, **options)

        def forward(self, tokens: Any, **options: Any) -> Any:
            self.tokens += tokens.numel()
            return model(tokens, **options)

    counting = Counting()
    asked = [request("loglikelihood", "a long context " * 5, ending) for ending in (" one", " two", " x", "y")]
    with torch.inference_mode():
        HarnessModel(counting, BYTES, batch_size=4).loglikelihood(asked)
    context = len(BYTES.encode(("a long context " * 5).rstrip(), bos=True))
    assert context < counting.tokens <= context + 4 * 5


# --------------------------------------------------------------------------------------------------------------- tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks as YAML and JSONL: multiple choice, text, answers."""
    folder = tmp_path_factory.mktemp("tasks")
    random.seed(3)
    rows = [
        {
            "q": f"Which comes first, {sentence(i)}?",
            "choices": ["red", "a deep green", "b"],
            "a": i % 3,
            "t": sentence(9),
        }
        for i in range(8)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/rows.jsonl}}}}
validation_split: validation
fewshot_split: validation
"""
    mean = "aggregation: mean, higher_is_better: true"
    kinds = {
        "zoo_choice": f"""
output_type: multiple_choice
doc_to_text: "{{{{q}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{a}}}}"
metric_list: [{{metric: acc, {mean}}}, {{metric: acc_norm, {mean}}}]
metadata: {{version: 2.0}}
""",
        "zoo_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{t}}"
num_fewshot: 0
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
""",
        "zoo_answer": f"""
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "red"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match, {mean}}}]
""",
    }
    for name, text in kinds.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}{common}{text}")
    return folder


def test_tasks_of_ones_own(model: Any, theirs: Any, tasks: Path):
    names = ["zoo_choice", "zoo_answer", "zoo_text"]
    before = random.getstate(), torch.get_rng_state()
    scores = evaluate_tasks(model, names, BYTES, include_path=tasks, num_fewshot=1, bootstrap_iters=10, batch_size=3)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    wanted: dict[str, Any] = {}
    for asked, lm in ((names[:2], theirs[True]), (names[2:], theirs[False])):
        results = lm_eval.simple_evaluate(
            lm, tasks=asked, num_fewshot=1, bootstrap_iters=10, task_manager=manager, log_samples=False
        )
        wanted |= results["results"]
    for score in scores:
        figures = wanted[score.task]
        assert score.value == pytest.approx(figures[f"{score.metric},none"], rel=1e-5)
        stated = figures[f"{score.metric}_stderr,none"]
        assert score.stderr == (pytest.approx(stated, rel=1e-4) if isinstance(stated, float) else None)
    assert {score.task: score.num_fewshot for score in scores} == {"zoo_choice": 1, "zoo_text": 0, "zoo_answer": 1}
    assert {score.metric for score in scores} == {"acc", "acc_norm", "bits_per_byte", "exact_match"}
    assert [score.version for score in scores if score.task == "zoo_choice"] == ["2.0", "2.0"]


def test_questions_as_conversations(model: Any, tasks: Path):
    """The prompt is that of the template, with bos once."""
    tokenizer = zoo.create_tokenizer("bytes")
    with pytest.raises(zoo.ZooError, match="bytes has no chat template: leave out chat"):
        evaluate_tasks(model, ["zoo_choice"], tokenizer, include_path=tasks, chat=True)
    tokenizer.chat_template = CHAT
    lm = HarnessModel(model, tokenizer)
    history = [{"role": "user", "content": "Hello"}]
    assert lm.apply_chat_template(history) == "[user]Hello\n[bot]"
    begun = [*history, {"role": "assistant", "content": "The answer is"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == "[user]Hello\n[assistant]The answer is"
    assert lm.tok_encode("a") == [256, ord("a")]
    assert lm.tok_encode("a", add_special_tokens=False) == [ord("a")]
    how: dict[str, Any] = {"include_path": tasks, "limit": 3, "bootstrap_iters": 0}
    (score, _) = evaluate_tasks(model, ["zoo_choice"], tokenizer, chat=True, **how)
    assert (score.metric, score.samples, score.stderr) == ("acc", 3, None)


def test_the_command_writes_tasks_beside_text(eval_py: Any, model: Any, tasks: Path, tmp_path: Path):
    folder, out = zoo.save_pretrained(model, tmp_path / "model"), tmp_path / "out"
    BYTES.save(folder)
    (tmp_path / "text.txt").write_text("some text")
    flags = ["--tasks", "zoo_choice,zoo_text", "--include_path", tasks, "--limit", 4, "--bootstrap_iters", 0]
    data = ["--data.path", tmp_path / "text.txt", "--output", out, "--device", "cpu"]
    status, text, errors = eval_py("--model", folder, *flags, *data)
    assert status == 0, errors
    assert "zoo_choice  acc" in text
    results = json.loads((out / "results.json").read_text())
    assert results["tokens"] == len("some text")
    assert set(results["versions"]) == {"backbone-zoo", "torch", "lm-eval"}
    assert results["limit"] == 4
    expected = evaluate_tasks(model, ["zoo_choice", "zoo_text"], BYTES, include_path=tasks, limit=4, bootstrap_iters=0)
    assert [row["value"] for row in results["tasks"]] == pytest.approx([score.value for score in expected], rel=1e-5)
    with open(out / "tasks.csv", newline="") as file:
        assert [row["task"] for row in csv.DictReader(file)] == ["zoo_choice", "zoo_choice", "zoo_text"]


def test_the_suite_of_the_paper_is_there():
    root = Path(lm_eval.__file__).parent / "tasks"
    homes = ("arc", "super_glue", "piqa", "siqa", "hellaswag", "openbookqa", "winogrande")
    manager = TaskManager(include_path=[str(root / home) for home in homes], include_defaults=False)
    assert len(SUITES["zero_shot"]) == 8
    assert set(SUITES["zero_shot"]) <= set(manager.all_tasks)


@pytest.mark.slow
def test_tasks_of_the_harness_are_found_beside_ones_own(model: Any, tasks: Path):
    with pytest.raises(zoo.ZooError, match=r"no task 'helaswag' in lm-evaluation-harness .* Did you mean hellaswag"):
        evaluate_tasks(model, ["zoo_choice", "helaswag"], BYTES, include_path=tasks)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["zoo_choise"], {}, "There is no task 'zoo_choise' in lm-evaluation-harness .* Did you mean zoo_choice"),
        (["zoo_*s"], {}, r"There is no task 'zoo_\*s'"),
        (["zoo_choice"], {"include_path": "/nowhere"}, "There is no folder '/nowhere' to include tasks from"),
        (["zoo_lost"], {}, "The tasks zoo_lost cannot be loaded: FileNotFoundError"),
        (["zoo_choice"], {"limit": 0}, "limit must be above zero, not 0"),
        ([], {}, "No tasks are named"),
    ],
)
def test_bad_input(
    monkeypatch: pytest.MonkeyPatch,
    model: Any,
    tasks: Path,
    names: list[str],
    options: dict[str, Any],
    message: str,
):
    # to read the names of the harness's own 14,000 tasks takes long
    monkeypatch.setattr(harness, "TaskManager", lambda **k: TaskManager(**{**k, "include_defaults": False}))
    lost = (tasks / "zoo_choice.yaml").read_text().replace("zoo_choice", "zoo_lost").replace("rows.jsonl", "gone.jsonl")
    (tasks / "zoo_lost.yaml").write_text(lost)
    with pytest.raises(zoo.ZooError, match=message):
        evaluate_tasks(model, names, BYTES, **{"include_path": tasks, **options})


def test_unknown_suites_and_models(model: Any):
    with pytest.raises(zoo.ZooError, match=r"There is no suite 'zeroshot'\. Did you mean zero_shot"):
        zoo.evaluate(model, tokenizer=BYTES, suite="zeroshot")
    with pytest.raises(zoo.ZooError, match="257 tokens and the model 100"):
        HarnessModel(small(vocab_size=100), BYTES)
    with pytest.raises(zoo.ZooError, match="a context of 0 tokens and a continuation of 1"):
        HarnessModel(model, BYTES)._loglikelihood_tokens([("", [], [1])])
