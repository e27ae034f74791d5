"""The configuration of an evaluation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from zoo.config import UsageError, flag_values, parse_config, plain_flags, read_yaml
from zoo.data import DataConfig, SegmentationDataConfig
from zoo.data.text import TextDataConfig
from zoo.errors import ConfigError, ZooError
from zoo.evaluation.features import FeatureConfig, Method
from zoo.evaluation.predictions import check_topk
from zoo.loading import looks_like_path, model_task

__all__ = ["EvaluationConfig", "LanguageEvaluationConfig", "SegmentationEvaluationConfig", "parse_evaluation"]

LISTS = ("--model", "--features", "--sizes", "--tasks")  # flags that take several values
EXAMPLES = """
python eval.py --model runs/digits --output runs/digits/evaluation
python eval.py --model caformer_s18.sail_in1k timm/resnet18.a1_in1k --data.path imagenet --output results
python eval.py --model caformer_s18.sail_in1k --data.path imagenet-r --label_map r
python eval.py --model poolformer_s12.sail_in1k --data.path imagenet --sizes 160 192 224 256
python eval.py --model runs/digits --features knn linear
python eval.py --model runs/digits --predictions answers.parquet --topk 3"""
LANGUAGE_EXAMPLES = """
python eval.py --model runs/books --output runs/books/evaluation
python eval.py --model smollm_135m mobilellm_125m --data.path texts.jsonl --data.column text --output results
python eval.py --model smollm_135m --data.name hub --data.path Salesforce/wikitext --data.subset wikitext-2-raw-v1
    --data.val_split test --joined true
python eval.py --model smollm_135m --suite zero_shot --output results
python eval.py --model runs/books --tasks my_task --include_path my_tasks --num_fewshot 2 --limit 100"""
SEGMENTATION_EXAMPLES = """
python eval.py --model runs/digits_segmentation --output runs/digits_segmentation/evaluation
python eval.py --model ffnet78s_dbbb_mobile.cityscapes --data.name cityscapes --data.path cityscapes --output results
python eval.py --model runs/first runs/second --data.path ade20k --data.num_classes 150 --data.reduce_zero_label true"""
KINDS = {"vision": "an image classifier", "segmentation": "a segmentation network", "language": "a language model"}
OF_THE_MODEL = ("input_size", "crop_pct", "interpolation", "mean", "std")  # what a run's model says itself


class _Models:
    """What every evaluation says of its models."""

    model: list[str] | str
    checkpoint_path: str | None

    @property
    def models(self) -> list[str]:
        """Every model there is, with those that text files list. Raises ConfigError for a file that lists none."""
        return list(dict.fromkeys(_listed([self.model] if isinstance(self.model, str) else self.model)))

    def check_checkpoint(self) -> None:
        if self.checkpoint_path is not None and len(self.models) > 1:
            raise ConfigError(f"checkpoint_path holds the weights of one model, and there are {len(self.models)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig(_Models):
    """Evaluate image classifiers.

    Args:
        model: one or several: a name in the zoo with the tag of its weights or without, "timm/name",
            "hf-hub:owner/name", the folder of a run (its best checkpoint, and its data unless other data is named), a
            folder in the Hub's layout, or a text file that lists such, one on a line.
        data: which images.
        checkpoint_path: weights for a model that is given by its name.
        label_map: what is right, where names of classes do not tell: "imagenet" (WordNet ids), "real" (ImageNet-Real),
            "v2" (folders 0 to 999), "a", "r" or "mini" (the outputs of that part of ImageNet alone), "sketch"; a text
            file with the data's name for each of the model's classes, line by line; or a JSON file with an object from
            the data's names to the model's names or numbers.
        sizes: heights and widths of the model's input, to evaluate at each.
        features: judge frozen features instead of the classifier: by "knn", "linear" or both, fitted on the training
            split.
        probe: how features are judged.
        predictions: parquet file to write the most probable classes of each image to.
        topk: how many of them.
        device: where to run; "auto" takes the accelerator there is.
        amp: mixed precision.
        channels_last: memory layout of model and images.
        torchcompile: compile the model first.
        output: folder for results.json, results.csv, tables and pictures; null to print only.
    """

    model: list[str] | str
    data: DataConfig
    checkpoint_path: str | None = None
    label_map: str | None = None
    sizes: list[int] | None = None
    features: list[Method] | None = None
    probe: FeatureConfig = dataclasses.field(default_factory=FeatureConfig)
    predictions: str | None = None
    topk: int = 5
    device: str = "auto"
    amp: Literal["no", "bf16", "fp16"] = "no"
    channels_last: bool = False
    torchcompile: bool = False
    output: str | None = None

    def __post_init__(self) -> None:
        check_topk(self.topk)
        self.check_checkpoint()
        if self.predictions is not None and len(self.models) * len(self.sizes or [0]) > 1:
            raise ConfigError("predictions takes one model at one size: evaluate each with a file of its own.")
        if self.features and (self.label_map or self.predictions):
            option = "label_map" if self.label_map else "predictions"
            raise ConfigError(f"features are judged by the labels of the data, one way: leave out {option}.")
        for size in self.sizes or ():
            if size < 1:
                raise ConfigError(f"sizes must be whole numbers above zero, not {size}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationEvaluationConfig(_Models):
    """Evaluate segmentation networks.

    Args:
        model: one or several: a name in the zoo with the tag of its weights or without, "hf-hub:owner/name", the folder
            of a run (its best checkpoint, and its data unless other data is named), a folder in the Hub's layout, or a
            text file that lists such, one on a line.
        data: which images and masks.
        checkpoint_path: weights for a model that is given by its name.
        pictures: images to show with their true and their predicted classes in predictions.png.
        device: where to run; "auto" takes the accelerator there is.
        amp: mixed precision.
        channels_last: memory layout of model and images.
        torchcompile: compile the model first.
        output: folder for results.json, results.csv, tables and pictures; null to print only.
    """

    model: list[str] | str
    data: SegmentationDataConfig
    checkpoint_path: str | None = None
    pictures: int = 4
    device: str = "auto"
    amp: Literal["no", "bf16", "fp16"] = "no"
    channels_last: bool = False
    torchcompile: bool = False
    output: str | None = None

    def __post_init__(self) -> None:
        self.check_checkpoint()
        if self.pictures < 0:
            raise ConfigError(f"pictures must not be negative, but is {self.pictures}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageEvaluationConfig(_Models):
    """Evaluate language models.

    Args:
        model: one or several: a name in the zoo with the tag of its weights or without, "hf-hub:owner/name", the folder
            of a run (its best checkpoint, and its data unless other data or tasks are named), a folder in the Hub's
            layout, or a text file that lists such, one on a line.
        data: which texts, for perplexity and bits per byte: their evaluation split, or all where they have none.
            `batch_size` counts windows, or sequences of a task, at once; `val_tokens` ends the reading.
        checkpoint_path: weights for a model that is given by its name.
        tokenizer: "bytes", a folder, a file, "hf-hub:owner/name", or the name of a model; by default the one beside
            checkpoint_path, or the model's own.
        context: tokens that the model is given at once; by default those that its run was trained with, or all that it
            takes up to 2048.
        stride: tokens from one window to the next, half the context by default; as many as the context: windows do not
            overlap.
        joined: make one document of all texts, two line ends between them, as WikiText is judged.
        per_document: write what each document's tokens cost to documents.csv.
        suite: a named suite of tasks of lm-evaluation-harness: "zero_shot", the eight of MobileLLM's table.
        tasks: tasks, groups and tags of lm-evaluation-harness, by name or pattern.
        include_path: folder with tasks of one's own, as YAML files.
        limit: samples of each task, from the first on; below 1 what share of them.
        num_fewshot: worked examples before each question, for tasks that do not say zero themselves.
        chat: put each question as a conversation, by the tokenizer's template.
        bootstrap_iters: resamplings for the standard error of metrics that have no formula; 0 leaves all out.
        device: where to run; "auto" takes the accelerator there is.
        dtype: of the weights; by default as they were saved.
        amp: mixed precision.
        output: folder for results.json and tables; null to print only.
    """

    model: list[str] | str
    data: TextDataConfig = dataclasses.field(default_factory=TextDataConfig)
    checkpoint_path: str | None = None
    tokenizer: str | None = None
    context: int | None = None
    stride: int | None = None
    joined: bool = False
    per_document: bool = False
    suite: str | None = None
    tasks: list[str] | str | None = None
    include_path: str | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    chat: bool = False
    bootstrap_iters: int = 100_000
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    amp: Literal["no", "bf16", "fp16"] = "no"
    output: str | None = None

    def __post_init__(self) -> None:
        self.check_checkpoint()
        if not self.reads_text and not self.task_names and self.suite is None:
            raise ConfigError("There is nothing to evaluate on: name texts (--data.path), --tasks or a --suite.")

    @property
    def reads_text(self) -> bool:
        return self.data.path is not None or self.data.name != "files"

    @property
    def task_names(self) -> list[str]:
        """`a,b` and a list of names are both taken."""
        given = [self.tasks] if isinstance(self.tasks, str) else self.tasks or []
        return [name.strip() for names in given for name in names.split(",") if name.strip()]


def parse_evaluation(
    argv: Sequence[str],
) -> EvaluationConfig | SegmentationEvaluationConfig | LanguageEvaluationConfig:
    """The configuration in `argv`; a run's own data fills in where that names a run. Raises as `parse_config` does.

    What the models are made for decides which of the three it is. The flags of lists take their values one after the
    other, as in `--model A B C`.
    """
    argv = _gather_lists(argv)
    task = _task(argv)
    is_language = task == "language"
    flags: list[str] = []
    named = ("--data.name", "--data.path", "--config", *(("--tasks", "--suite") if is_language else ()))
    if not any(token.startswith(named) for token in argv):
        flags = _data_of_runs(argv)
    if is_language:
        few = ["--data.batch_size=8"]  # windows of 2048 tokens are larger than images
        return parse_config(
            LanguageEvaluationConfig,
            [*few, *flags, *argv],
            prog="eval.py",
            description="Evaluate language models: perplexity and bits per byte of text, tasks of "
            "lm-evaluation-harness. For image classifiers: eval.py --help.",
            examples=LANGUAGE_EXAMPLES,
        )
    if task == "segmentation":
        return parse_config(
            SegmentationEvaluationConfig,
            [*flags, *argv],
            prog="eval.py",
            description="Evaluate segmentation networks: mIoU, accuracies, loss, per class, confusion, pictures. For "
            "image classifiers: eval.py --help.",
            examples=SEGMENTATION_EXAMPLES,
        )
    return parse_config(
        EvaluationConfig,
        [*flags, *argv],
        prog="eval.py",
        description="Evaluate image classifiers: accuracy, loss, calibration, per class, confusion, throughput. For "
        "language models and segmentation networks: eval.py --model NAME --help.",
        examples=EXAMPLES,
    )


def _task(argv: Sequence[str]) -> str:
    """What the models in `argv` are made for. Raises ConfigError where that is not one thing."""
    found: dict[str, str] = {}
    unknown: list[ZooError] = []
    for model in _models(argv):
        try:
            found.setdefault(model_task(model), model)
        except ZooError as error:  # a name that does not exist fails when its turn comes
            if model and not Path(model).expanduser().exists():
                unknown.append(error)
    if unknown and not found and not any(token.startswith(("--data", "--config")) for token in argv):
        raise unknown[0]  # before the data are missed, which a run would have named
    if len(found) > 1:
        (task, first), (other, second) = list(found.items())[:2]
        raise ConfigError(f"{first} is {KINDS[task]} and {second} {KINDS[other]}: evaluate them by two commands.")
    task = next(iter(found), "vision")
    if task != "language":
        for flag in ("--tasks", "--suite", "--tokenizer"):
            if found and any(token.partition("=")[0] == flag for token in argv):
                raise UsageError(f"{flag} is for language models, and {found[task]} is none.")
    return task


def _models(argv: Sequence[str]) -> Iterator[str]:
    """The models that flags and files in `argv` name."""
    for path in flag_values(argv, "--config"):
        values = read_yaml(path)
        given = values.get("model") if isinstance(values, dict) else None
        yield from _listed([name for name in (given if isinstance(given, list) else [given]) if isinstance(name, str)])
    for value in flag_values(argv, "--model"):
        yield from _listed(json.loads(value) if value.startswith('["') else [value])


def _listed(models: Sequence[str]) -> Iterator[str]:
    for model in models:
        path = Path(model).expanduser()
        if path.suffix != ".txt":
            yield model
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"The list of models {model!r} cannot be read: {error}") from None
        names = [name for line in lines if (name := line.partition("#")[0].strip())]
        if not names:
            raise ConfigError(f"The list of models {model!r} is empty: write a name on each line.")
        yield from names


def _gather_lists(argv: Sequence[str]) -> list[str]:
    """`--sizes 160 192` -> `--sizes=[160, 192]`, which is one token as all other flags are."""
    gathered: list[str] = []
    position = 0
    while position < len(argv):
        flag = argv[position]
        position += 1
        if flag not in LISTS:
            gathered.append(flag)
            continue
        values = []
        while position < len(argv) and not argv[position].startswith("--"):
            values.append(argv[position])
            position += 1
        if len(values) == 1 and (flag == "--model" or values[0].startswith("[")):
            gathered += [flag, *values]
        elif values:
            numbers = [int(value) if value.isdigit() and flag == "--sizes" else value for value in values]
            gathered.append(f"{flag}={json.dumps(numbers)}")
        else:
            gathered.append(flag)
    return gathered


def _data_of_runs(argv: Sequence[str]) -> list[str]:
    """The data of the runs that `--model` names, as flags. Raises ConfigError where they differ."""
    found: dict[str, dict[str, Any]] = {}
    for model in _models(argv):
        recorded = Path(model).expanduser() / "config.yaml"
        if looks_like_path(model) and not recorded.parent.exists():
            raise ConfigError(f"There is no run or checkpoint {model!r}.")
        if recorded.is_file():
            run = read_yaml(str(recorded))
            if not isinstance(run, dict) or not isinstance(run.get("data"), dict):
                raise ConfigError(f"{recorded} is not the configuration of a run: name the data with --data.name.")
            found[model] = {key: value for key, value in run["data"].items() if key not in OF_THE_MODEL}
    if not found:
        return []
    first, *others = found
    for other in others:
        if any(found[other].get(key) != found[first].get(key) for key in ("name", "path", "val_path", "val_split")):
            raise ConfigError(f"{first} and {other} were trained on different data: name the data with --data.name.")
    return plain_flags({"data": found[first]})
