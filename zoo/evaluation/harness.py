"""Tasks of lm-evaluation-harness on models of the zoo. Needs lm-eval, which comes with the extra of that name."""

from __future__ import annotations

import contextlib
import fnmatch
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from zoo.errors import ConfigError, DataError, MissingDependencyError, ZooError, did_you_mean
from zoo.evaluation.language import Amp, Predictor, Window, batches, check_fits, evaluating, window_losses
from zoo.evaluation.language_results import TaskScore

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise MissingDependencyError('Tasks need lm-evaluation-harness: pip install "backbone-zoo[lm-eval]".') from error

__all__ = ["SUITES", "HarnessModel", "evaluate_tasks", "suite_tasks"]

SUITES: Mapping[str, tuple[str, ...]] = {  # names of several tasks
    # MobileLLM, arXiv 2402.14905, table 3; the authors' own prompts are not published, these are the harness's
    "zero_shot": (
        *("arc_easy", "arc_challenge", "boolq", "piqa", "social_iqa", "hellaswag", "openbookqa", "winogrande"),
    ),
}
LOGITS_AT_ONCE = 2**27  # elements; 512 MiB in float32
MAX_NEW_TOKENS = 256  # where a task does not say

Request = tuple[Any, list[int], list[int]]  # (what it is called, context, continuation)


version: str = lm_eval.__version__


def suite_tasks(suite: str | None) -> tuple[str, ...]:
    """The tasks of a suite; none of None. Raises ConfigError for one that there is not."""
    if suite is None:
        return ()
    if suite not in SUITES:
        raise ConfigError(f"There is no suite {suite!r}.{did_you_mean(suite, SUITES)} There are: {', '.join(SUITES)}.")
    return SUITES[suite]


def evaluate_tasks(
    model: nn.Module,
    tasks: Sequence[str],
    tokenizer: Any,
    *,
    include_path: str | Path | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    amp: Amp = "no",
    bootstrap_iters: int = 100_000,
) -> list[TaskScore]:
    """What `model` reaches on tasks of lm-evaluation-harness, in the order of the tasks.

    Args:
        model: a language model of the zoo, in any form.
        tasks: names of tasks, groups and tags, or patterns such as "arc_*".
        tokenizer: the model's.
        include_path: a folder with tasks of one's own, as YAML files. Where all names are found there, the tasks that
            come with the harness are not looked through.
        limit: samples of each task to take, from the first on; below 1 what share of them. For trying out.
        num_fewshot: worked examples before each question, for tasks that do not say zero themselves.
        chat: write each question as a conversation, by the tokenizer's template.
        batch_size: sequences at once.
        device: where to run; "auto" takes the accelerator there is; by default the model stays where it is.
        amp: mixed precision.
        bootstrap_iters: resamplings for the standard error of metrics that have no formula; 0 leaves all out.

    Raises ConfigError for unknown tasks (names the nearest) and what does not go together; DataError for tasks whose
    data cannot be had.
    """
    if limit is not None and not limit > 0:
        raise ConfigError(f"limit must be above zero, not {limit}.")
    if chat and tokenizer.chat_template is None:
        raise ConfigError(f"The tokenizer {tokenizer.name} has no chat template: leave out chat.")
    lm = HarnessModel(model, tokenizer, batch_size=batch_size)
    with _seeds():
        loaded = _load(tasks, include_path)
        for task in loaded["tasks"].values():  # as lm_eval.simple_evaluate does
            own = task.get_config("num_fewshot")
            if own is None or (num_fewshot is not None and own != 0):
                task.set_config(key="num_fewshot", value=num_fewshot or 0)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        with evaluating(model, device, amp):
            found = lm_eval.evaluate(
                lm,
                loaded,
                limit=limit,
                bootstrap_iters=bootstrap_iters,
                log_samples=False,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )
    return _scores(found)


class HarnessModel(TemplateLM):
    """A model of the zoo as lm-evaluation-harness asks it: the log-likelihood of texts, and what follows a prompt.

    Raises ConfigError for a tokenizer that does not fit, or has neither bos nor eos to begin a text with.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, batch_size: int = 8) -> None:
        super().__init__()
        if type(batch_size) is not int or batch_size < 1:
            raise ConfigError(f"batch_size must be a whole number from 1 up, not {batch_size!r}.")
        self.predict = Predictor(model)
        if not hasattr(model, "make_cache"):
            raise ConfigError(
                f"{type(model).__name__} is no model of the zoo. lm_eval.models.huggingface.HFLM takes those of "
                "transformers."
            )
        check_fits(tokenizer, model)
        self.model: Any = model
        self.text_tokenizer = tokenizer  # not `tokenizer`, where the harness looks for one of transformers
        self.batch_size = batch_size
        self.max_length = self.predict.context_length

    @property
    def eot_token_id(self) -> int:
        if self.text_tokenizer.eos_id is None:
            raise ConfigError(f"The tokenizer {self.text_tokenizer.name} has no token that ends a text.")
        return self.text_tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.text_tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def device(self) -> torch.device:
        return self.predict.device

    @property
    def tokenizer_name(self) -> str:
        return self.text_tokenizer.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.text_tokenizer.chat_template or ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text = self.text_tokenizer.chat_text(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        begun = chat_history[-1]["content"].strip()  # the answer's beginning, which is to be continued
        return text[: text.rindex(begun) + len(begun)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens, with bos before them where the tokenizer's models expect one that the text does not have."""
        ids = self.text_tokenizer.encode(string)
        bos = self.text_tokenizer.bos_id
        if add_special_tokens is None:
            add_special_tokens = self.text_tokenizer.adds_bos and ids[:1] != [bos]
        return [bos, *ids] if add_special_tokens and bos is not None else ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # the bar is that of the model

    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        """(log-probability, whether it is what greedy decoding writes) of each continuation of its context.

        A context that several requests share is computed once, and its keys and values serve them all.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        continuations = []
        for number, (text, context, continuation) in enumerate(requests):
            if not context or not 1 <= len(continuation) <= self.max_length:
                raise DataError(
                    f"{text!r} is a context of {len(context)} tokens and a continuation of {len(continuation)}: each "
                    f"needs one at least, and the continuation {self.max_length}, the model's context, at most."
                )
            whole = (*context, *continuation)[-(self.max_length + 1) :]
            groups.setdefault(whole[: -len(continuation)], []).append(number)
            continuations.append(continuation)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), desc="log-likelihoods", unit=" requests", disable=None) as bar:
            for batch in self._batches(groups, continuations):
                contexts = list(batch)
                rows = [row for row, context in enumerate(contexts) for _ in batch[context]]
                numbers = [number for context in contexts for number in batch[context]]
                scores = self._score(contexts, rows, [continuations[number] for number in numbers])
                for number, score in zip(numbers, scores, strict=True):
                    found[number] = score
                bar.update(len(numbers))
        return found

    def _batches(
        self, groups: Mapping[tuple[int, ...], list[int]], continuations: Sequence[list[int]]
    ) -> Iterator[dict[tuple[int, ...], list[int]]]:
        """Contexts of like length together, with so many continuations as a batch takes, and room for them all."""

        def tail(context: tuple[int, ...]) -> int:
            return max(len(continuations[number]) for number in groups[context])

        batch: dict[tuple[int, ...], list[int]] = {}
        longest = longest_tail = 0
        for context in sorted(groups, key=lambda context: (-len(context) - tail(context), context)):
            longest, longest_tail = max(longest, len(context)), max(longest_tail, tail(context))
            rows = sum(map(len, batch.values())) + len(groups[context])
            if batch and (rows > self.batch_size or longest + longest_tail - 1 > self.max_length):
                yield batch
                batch, longest, longest_tail = {}, len(context), tail(context)
            batch[context] = groups[context]
        if batch:
            yield batch

    def _score(
        self, contexts: Sequence[tuple[int, ...]], rows: Sequence[int], continuations: Sequence[list[int]]
    ) -> Iterator[tuple[float, bool]]:
        """For each continuation, whose context is that of its row."""
        device, longest = self.device, max(map(len, contexts))
        width = max(map(len, continuations)) - 1  # its last token is not asked what follows
        tokens = torch.zeros(len(contexts), longest, dtype=torch.long)
        positions = torch.full_like(tokens, -1)
        for row, context in enumerate(contexts):  # they end in the same place
            tokens[row, longest - len(context) :] = torch.tensor(context)
            positions[row, longest - len(context) :] = torch.arange(len(context))
        padded = bool((positions < 0).any())
        cache = self.model.make_cache(len(contexts), longest + width)
        places = positions.to(device) if padded else None
        logits = self.model(tokens.to(device), cache=cache, positions=places)[:, -1]
        first = logits.float().log_softmax(-1)
        at_once = max(1, min(self.batch_size, LOGITS_AT_ONCE // max(1, width * first.shape[-1])))
        for begin in range(0, len(rows), at_once):
            own = torch.tensor(rows[begin : begin + at_once], device=device)
            asked = continuations[begin : begin + at_once]
            scores = first[own][:, None]
            width = max(map(len, asked)) - 1
            if width:
                tails = torch.zeros(len(asked), width, dtype=torch.long)
                tail_positions = torch.full_like(tails, -1)
                for row, (parent, continuation) in enumerate(zip(own.tolist(), asked, strict=True)):
                    count = len(continuation) - 1
                    tails[row, :count] = torch.tensor(continuation[:-1])
                    tail_positions[row, :count] = torch.arange(count) + len(contexts[parent])
                places = tail_positions.to(device) if padded else None
                branch = cache.select(own)
                logits = self.model(tails.to(device), cache=branch, positions=places, logits_to_keep=width)
                scores = torch.cat((scores, logits.float().log_softmax(-1)), 1)
            yield from _pick(scores, asked)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        windows = []
        # bos, or eos, is what a text begins from, and no token of it: the harness's adapter for transformers counts it
        # once more where the tokenizer adds it by itself
        for number, (text,) in enumerate(request.args for request in requests):
            tokens = self.tok_encode(text, add_special_tokens=False)
            rolled = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            for context, continuation in map(make_disjoint_window, rolled):
                windows.append(Window(number, np.array([*context, *continuation]), len(continuation)))
        found = [0.0] * len(requests)
        with tqdm(total=len(windows), desc="texts", unit=" windows", disable=None) as bar:
            for batch in batches(iter(windows), self.batch_size):
                for window, losses in zip(batch, window_losses(self.predict, batch), strict=True):
                    found[window.document] -= losses.sum().item()
                bar.update(len(batch))
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        from zoo.generation import generate

        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        found = [""] * len(requests)
        with tqdm(total=len(requests), desc="answers", unit=" answers", disable=None) as bar:
            for numbers in alike.values():
                options = normalize_gen_kwargs(requests[numbers[0]].args[1], MAX_NEW_TOKENS)
                count, stop = int(options["max_gen_toks"]), [term for term in options["until"] if term]
                room = self.max_length - count
                if room < 1:
                    raise ConfigError(f"A task asks for {count} new tokens, and the context has {self.max_length}.")
                sampling = {key: options[key] for key in ("temperature", "top_k", "top_p", "min_p") if key in options}
                numbers = sorted(numbers, key=lambda number: -len(prompts[number]))
                for begin in range(0, len(numbers), self.batch_size):
                    part = numbers[begin : begin + self.batch_size]
                    answers = generate(
                        self.model,
                        [prompts[number][-room:] for number in part],
                        tokenizer=self.text_tokenizer,
                        max_new_tokens=count,
                        stop=stop,
                        seed=DEFAULT_OTHER_SEED,
                        **{"temperature": 0.0, **sampling},
                    )
                    for number, answer in zip(part, answers, strict=True):
                        found[number] = _before(self.text_tokenizer.decode(answer), stop)
                    bar.update(len(part))
        return found


def _pick(scores: Tensor, continuations: Sequence[list[int]]) -> Iterator[tuple[float, bool]]:
    """Sum over each continuation of its tokens' `scores`, (R, W, V) log-probabilities; whether each is the highest."""
    best = scores.argmax(-1).tolist()
    for row, continuation in enumerate(continuations):
        targets = torch.tensor(continuation, device=scores.device)
        own = scores[row, : len(continuation)].gather(-1, targets[:, None])
        yield own.cpu().double().sum().item(), best[row][: len(continuation)] == continuation


def _before(text: str, stop: Sequence[str]) -> str:
    for term in stop:
        text = text.partition(term)[0]
    return text


@contextlib.contextmanager
def _seeds() -> Iterator[None]:
    """Those of lm_eval.simple_evaluate, so that what tasks draw is what others drew; restored behind it."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            random.seed(DEFAULT_RANDOM_SEED)
            np.random.seed(DEFAULT_OTHER_SEED)
            torch.manual_seed(DEFAULT_OTHER_SEED)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _load(tasks: Sequence[str], include_path: str | Path | None) -> Any:
    """The harness's tasks of these names, with their data."""
    if include_path is not None and not Path(include_path).expanduser().is_dir():
        raise ConfigError(f"There is no folder {str(include_path)!r} to include tasks from.")
    own = None if include_path is None else str(Path(include_path).expanduser())
    if not tasks:
        raise ConfigError("No tasks are named.")
    manager = TaskManager(include_path=own, include_defaults=False) if own else TaskManager()
    names, missing = _match(tasks, manager.all_tasks)
    if missing and own:
        manager = TaskManager(include_path=own)
        names, missing = _match(tasks, manager.all_tasks)
    if missing:
        near = did_you_mean(missing[0], manager.all_tasks)
        raise ConfigError(f"There is no task {missing[0]!r} in lm-evaluation-harness {lm_eval.__version__}.{near}")
    try:
        loaded = manager.load(names)
    except ZooError:
        raise
    except Exception as error:  # the data sets of tasks raise what they like
        text = (str(error).splitlines() or [""])[0]
        raise DataError(f"The tasks {', '.join(names)} cannot be loaded: {type(error).__name__}: {text}") from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(f"The task {name} runs code that the model has written, which is not done here.")
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"The task {name} shows pictures, and the model reads text alone.")
    return loaded


def _match(wanted: Sequence[str], there: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of the names that are there, with what patterns stand for, and those that are not."""
    found = {name: fnmatch.filter(there, name) for name in wanted}
    return list(dict.fromkeys(name for names in found.values() for name in names)), [n for n in wanted if not found[n]]


def _scores(found: Any) -> list[TaskScore]:
    scores = []
    for task, figures in found["results"].items():
        samples = found["n-samples"].get(task, {})
        for key, value in figures.items():
            metric, _, form = key.partition(",")
            if not form or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = figures.get(f"{metric}_stderr,{form}")
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric if form == "none" else f"{metric},{form}",
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    samples=int(samples.get("effective", figures.get("sample_len", 0))),
                    num_fewshot=int(found["n-shot"].get(task) or 0),
                    version=str(found["versions"].get(task, "")),
                    higher_is_better=found["higher_is_better"].get(task, {}).get(metric),
                )
            )
    return scores
