"""The card of one checkpoint: what it is, how it was trained, and what was measured, with the Hub's metadata on top.

Nothing in it is a claim: its figures come from an evaluation (`results.json`) or from the history of the run.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import Tensor, nn

from zoo.cards import bibtex, cite, markdown_table, module_docstring, span
from zoo.config import read_yaml, to_plain
from zoo.errors import ConfigError, MissingDependencyError, UnknownModelError
from zoo.history import FIGURES, SHRUNK, best_row
from zoo.registry import UNSTATED, ModelInfo, model_info
from zoo.units import humanize, shape_text

if TYPE_CHECKING:
    from zoo.profiling import Profile, StitchCosts
    from zoo.sparsity import SparseModel

__all__ = [
    "Base",
    "RunRecord",
    "command_without_paths",
    "is_segmentation",
    "read_published_run",
    "read_run",
    "render_model_card",
    "without_paths",
]

HUB = "https://huggingface.co"
SPARSE = 0.99  # the density below which a model is called sparse: halving leaves a few zeros in any
ENVIRONMENT = "environment.json"  # of a run: what it was made with, a row for each start
RECIPE = "training_config.yaml"  # as which a run's configuration is published


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """The weights that others come from. `license` is None where nobody here knows it, "unstated" where there is none.

    `trained` says whether training came after: a fine-tune, and not the weights themselves.
    """

    name: str
    hub_id: str | None = None
    url: str | None = None  # where they were published, on the Hub or elsewhere
    license: str | None = None
    trained: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run's folder says of one of its checkpoints.

    `row` is the history's row of the epoch that the checkpoint is of, or that of a shrunk model's own figures; None
    where it was not evaluated. `environment` has a row for each of the run's starts.
    """

    folder: Path
    checkpoint: str
    config: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    row: Mapping[str, Any] | None
    environment: Sequence[Mapping[str, Any]] = ()

    @property
    def measured_in(self) -> str:
        """The file that `row` is from."""
        return FIGURES if self.checkpoint == SHRUNK else "history.csv"


# ------------------------------------------------------------------------------------------------------------- the run


def read_run(folder: Path, checkpoint: str) -> RunRecord:
    """The record of `folder / checkpoint`. Raises ConfigError for a configuration or history that is none."""
    config, history = _read_config(folder / "config.yaml"), _read_history(folder / "history.csv")
    return RunRecord(
        folder=folder,
        checkpoint=checkpoint,
        config=config,
        history=history,
        row=_row_of(folder / checkpoint, checkpoint, history),
        environment=read_environment(folder),
    )


def read_published_run(folder: Path, checkpoint: str, epoch: int | None) -> RunRecord:
    """The record of the run that a published folder's weights are of, from the files there.

    `epoch` is that of the checkpoint, None where it was not evaluated. Raises ConfigError as `read_run` does.
    """
    config, history = _read_config(folder / RECIPE), _read_history(folder / "history.csv")
    row = _figures_of(folder) if checkpoint == SHRUNK else next((r for r in history if r.get("epoch") == epoch), None)
    return RunRecord(
        folder=folder,
        checkpoint=checkpoint,
        config=config,
        history=history,
        row=row if epoch is not None else None,
        environment=read_environment(folder),
    )


def _read_config(path: Path) -> dict[str, Any]:
    config = read_yaml(str(path))
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is not the configuration of a run.")
    return config


def _read_history(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's history; none where there is no such file."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        try:
            return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]
        except (csv.Error, UnicodeDecodeError, AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"{path} is not the history of a run: {error}.") from None


def read_environment(folder: Path) -> list[dict[str, Any]]:
    """What a run was made with, a row for each of its starts; empty where that was not written down."""
    try:
        rows = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _number(text: str) -> int | float | None:
    return None if not text else int(text) if text.isdigit() else float(text)


def _row_of(folder: Path, checkpoint: str, history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    if checkpoint == SHRUNK:
        return _figures_of(folder)
    metrics = ("val_top1", "val_miou", "val_bits_per_byte", "val_loss")  # the first there is decides, as in training
    metric = next((key for key in metrics if any(row.get(key) is not None for row in history)), None)
    if metric is None:
        return None
    evaluated = [row for row in history if row.get(metric) is not None]
    if checkpoint == "best":
        return best_row(evaluated, metric, metric not in ("val_top1", "val_miou"))
    return evaluated[-1] if _is_of_epoch(folder, history[-1]) and evaluated[-1] is history[-1] else None


def _figures_of(folder: Path) -> dict[str, Any] | None:
    """What a run measured of its shrunk model; None where it did not write that down."""
    try:
        row = json.loads((folder / FIGURES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return row if isinstance(row, dict) and "epoch" in row else None


def _is_of_epoch(folder: Path, row: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of the end of `row`'s epoch: a run that was stopped saves itself in the middle of one."""
    import torch

    try:
        progress = torch.load(folder / "state.pt", map_location="cpu", weights_only=True, mmap=True)["progress"]
    except Exception:  # no state, or one that cannot be read: then nobody knows
        return False
    return progress.get("batch") == 0 and progress.get("epoch") == row["epoch"]


_PATH = re.compile(r"(?:file://)?(?:~[\w.-]*|\.\.?|[A-Za-z]:)?[/\\].*|~[\w.-]*")
_IN_TEXT = re.compile(r"(?<![\w./:\\-])(?:~[\w.-]*|\.\.|[A-Za-z]:)?[/\\](?:[^\s/\\'\",;()]+[/\\])+[^\s/\\'\",;()]*")
_CREDENTIALS = re.compile(r"(\w+://)[^/@\s]*@")
_QUERY = re.compile(r"(\w+://[^\s?]*)\?[^\s'\"]*")  # of a signed URL, whoever has it may read


def without_paths(value: Any) -> Any:
    """Plain data in which every local path is its last part alone, and no URL holds a password.

    Where a file lay, and in whose home, is nobody's business; `hf-hub:` names, URLs (without what follows a "?", which
    may be a key) and relative names stay.
    """
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    prefix = "local-dir:" if value.startswith("local-dir:") else ""
    path = value.removeprefix(prefix)
    if _PATH.fullmatch(path):
        return prefix + _last_part(path)
    return _IN_TEXT.sub(lambda match: _last_part(match[0]), _QUERY.sub(r"\1", _CREDENTIALS.sub(r"\1", value)))


def command_without_paths(command: str | Sequence[str]) -> str:
    """A command as it may be shown: what `without_paths` leaves of each argument, and of the value in --flag=value."""
    try:
        argv = shlex.split(command) if isinstance(command, str) else command
    except ValueError:  # quotes that do not close, in a file that was edited
        return str(without_paths(command))

    def clean(argument: str) -> str:
        flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        return f"{flag}{equals}{without_paths(value)}"

    return shlex.join(map(clean, argv))


def _last_part(path: str) -> str:
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..") and not part.startswith("~")]
    return parts[-1] if parts else "."


# ------------------------------------------------------------------------------------------------------------ rendering


def render_model_card(
    model: nn.Module,
    *,
    repo_id: str | None = None,
    opens_in_timm: bool,
    run: RunRecord | None = None,
    results: Mapping[str, Any] | None = None,
    base: Base | None = None,
    license: str | None = None,
    dataset: str | None = None,
    note: str | None = None,
    half: bool = False,
    rounded: bool = False,
    files: Sequence[str] = (),
    masks: Mapping[str, Tensor] | None = None,
) -> str:
    """The card of `model`, as Markdown with the Hub's metadata on top.

    Args:
        model: with its weights, as `create_model` makes it.
        repo_id: where it is, or will be; without it the card speaks of OWNER/NAME.
        opens_in_timm: whether plain timm makes the same model of it.
        run: the run that trained it.
        results: what an evaluation wrote, over the run's own figures.
        base: the weights it was trained from.
        license: of the weights, by its id on the Hub.
        dataset: id on the Hub of the data that it was trained on.
        note: what else there is to say.
        half: whether the weights are kept in half precision.
        rounded: whether that changed them, so that the figures are of other weights than these.
        files: that lie beside the card.
        masks: of a sparse model, by which its weights are counted, as `zoo.sparsity.report` does.

    Raises ConfigError when the metadata is not what the Hub reads.
    """
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    info = facts_of(str(cfg["architecture"]))
    from zoo.profiling import profile, stitch_costs

    about = _Data.of(run, results, dataset)
    place = repo_id or "OWNER/NAME"
    figures = measured_figures(run, results, METRICS)
    name = place.rpartition("/")[2] if repo_id else str(cfg["architecture"])
    costs = profile(model)
    stitches = stitch_costs(model) if getattr(model, "has_whole_anchors", False) else None
    sparse = sparsity_of(model, masks)
    data = _metadata(
        name=name,
        model=model,
        is_sparse=sparse is not None,
        info=info,
        repo_id=repo_id,
        opens_in_timm=opens_in_timm,
        base=base,
        license=license,
        data=about,
        trained_on=dataset or _hub_data(run),
        figures={} if rounded else figures,
        measured_in="results.json" if results is not None else run.measured_in if run else "",
        files=files,
    )
    sections = {
        "Model": _model_section(model, cfg, info, half, costs, stitches, sparse, "masks.png" in files),
        "Use": _use_section(place, model, info, opens_in_timm),
        "Evaluation": _evaluation_section(place, cfg, about, figures, run, results, rounded),
        "Training": training_section(run, base, files),
        "Limits": _limits_section(run, about, base),
        "Licence": licence_section(license, base, info),
        "Citation": f"```bibtex\n{bibtex(info.paper)}\n```" if info and info.paper else "",
    }
    return assemble(name, _summary(cfg, info, about, {} if rounded else figures, base), note, sections, data)


def assemble(name: str, summary: str, note: str | None, sections: Mapping[str, str], data: ModelCardData) -> str:
    """A card of its parts; sections without text are left out. Raises ConfigError for metadata that cannot be read."""
    parts = [
        f"# {name}",
        summary,
        *([note] if note else []),
        *(f"## {heading}\n\n{text}" for heading, text in sections.items() if text),
    ]
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"
    if ModelCard(text, ignore_metadata_errors=False).data.to_dict() != data.to_dict():
        raise ConfigError("The card's metadata does not read back as it was written: is the dataset's name plain text?")
    return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Data:
    """What a model was measured on: as people call it, its id on the Hub, its split, and flags of `eval.py`.

    `label_map` says what was right, where it was not the data's own labels, and `is_training_data` whether it is the
    evaluation split of what the model was trained on.
    """

    name: str
    hub_id: str | None
    split: str | None
    flags: Sequence[str]
    label_map: str | None = None
    is_training_data: bool = True

    @property
    def title(self) -> str:
        return self.name + (f", label map {self.label_map}" if self.label_map else "")

    @classmethod
    def of(cls, run: RunRecord | None, results: Mapping[str, Any] | None, dataset: str | None) -> _Data | None:
        config = run.config.get("data") if run else None
        config = config if isinstance(config, Mapping) else {}
        results = results or {}
        kind, path, trained_by = config.get("name"), config.get("path"), config.get("val_split")
        measured = results.get("data") or path or kind
        if measured is None:
            return cls(name=dataset, hub_id=dataset, split=None, flags=()) if dataset else None
        split = results.get("split", trained_by)  # an evaluation says itself which, where it was told
        label_map = results.get("label_map") and str(without_paths(str(results["label_map"])))
        where = str(without_paths(str(measured)))
        options = {"val_split": split}
        if measured != (path or kind):
            is_known = not run and dataset  # a checkpoint comes with no other data than what it was measured on
            return cls(
                name=dataset if is_known else where,  # type: ignore[arg-type]
                hub_id=dataset if is_known else None,
                split=split,
                flags=_data_flags({"name" if where == "digits" else "path": where, **options}),
                label_map=label_map,
                is_training_data=False,
            )
        hub_id = dataset or (path if kind == "hub" else None)
        called = where if kind != "digits" else "scikit-learn digits"
        if kind == "digits" and run is not None and run.config.get("task") == "segmentation":
            called = f"pages of {called}"
        options |= {key: config.get(key) for key in ("image_key", "label_key")}
        return cls(
            name=hub_id or called,
            hub_id=hub_id,
            split=split or ("test" if kind == "digits" else None),
            flags=_data_flags({"name": kind, "path": path and where, **options}),
            label_map=label_map,
            is_training_data=split == trained_by,
        )


def _data_flags(values: Mapping[str, Any]) -> list[str]:
    return [part for key, value in values.items() if value is not None for part in (f"--data.{key}", str(value))]


def _hub_data(run: RunRecord | None) -> str | None:
    data = run.config.get("data") if run else None
    return data.get("path") if isinstance(data, Mapping) and data.get("name") == "hub" else None


def facts_of(architecture: str) -> ModelInfo | None:
    try:
        return model_info(architecture)
    except UnknownModelError:  # one of timm's
        return None


METRICS = {
    "top1": ("accuracy", "Top-1 accuracy, %"),
    "top5": ("accuracy", "Top-5 accuracy, %"),
    "miou": ("mean_iou", "mIoU, %"),
    "mean_accuracy": ("accuracy", "Mean accuracy of the classes, %"),
    "pixel_accuracy": ("accuracy", "Accuracy of pixels, %"),
    "loss": ("loss", "Cross-entropy"),
    "ece": ("expected_calibration_error", "Expected calibration error, %"),
}


def measured_figures(
    run: RunRecord | None, results: Mapping[str, Any] | None, metrics: Iterable[str]
) -> dict[str, float]:
    """What was measured of these very weights: by an evaluation, or else by the run that trained them."""
    found = results or {key.removeprefix("val_"): value for key, value in ((run and run.row) or {}).items()}
    figures = {key: found[key] for key in metrics if isinstance(found.get(key), int | float)}
    return {key: float(value) for key, value in figures.items() if math.isfinite(value)}


def _metadata(
    *,
    name: str,
    model: nn.Module,
    is_sparse: bool,
    info: ModelInfo | None,
    repo_id: str | None,
    opens_in_timm: bool,
    base: Base | None,
    license: str | None,
    data: _Data | None,
    trained_on: str | None,
    figures: Mapping[str, float],
    measured_in: str,
    files: Sequence[str],
) -> ModelCardData:
    segments = is_segmentation(model)
    task = "image-classification" if getattr(model, "num_classes", 0) else "image-feature-extraction"
    task = "image-segmentation" if segments else task
    measured = []
    if data is not None:
        linked = repo_id is not None and measured_in in files
        measured = [
            EvalResult(
                task_type=task,
                task_name="Semantic segmentation" if segments else "Image classification",
                dataset_type=data.hub_id or re.sub(r"[^a-z0-9]+", "-", data.name.lower()).strip("-") or "data",
                dataset_name=data.title,
                dataset_split=data.split,
                metric_type=METRICS[key][0],
                metric_name=METRICS[key][1],
                metric_value=round(value, 4),
                source_name=measured_in if linked else None,
                source_url=f"{HUB}/{repo_id}/blob/main/{measured_in}" if linked else None,
            )
            for key, value in figures.items()
        ]
    extra: dict[str, Any] = {}
    if base is not None and base.hub_id and base.trained:
        extra["base_model_relation"] = "finetune"
    return ModelCardData(
        library_name="timm" if opens_in_timm else "backbone-zoo",
        pipeline_tag=task,
        tags=[
            *(task, "zoo"),
            *(["timm"] if opens_in_timm else []),
            *([info.family] if info else []),
            *(["sparse"] if is_sparse else []),
        ],
        datasets=[trained_on] if trained_on else None,
        base_model=base.hub_id if base else None,
        metrics=["mean_iou" if segments else "accuracy"] if measured else None,
        model_name=name if measured else None,
        eval_results=measured or None,
        **licence_metadata(license),
        **extra,
    )


def licence_metadata(license: str | None) -> dict[str, Any]:
    """A licence as the Hub's metadata has it."""
    if license == UNSTATED:
        return {"license": "other", "license_name": UNSTATED}
    return {"license": license}


def _summary(
    cfg: Mapping[str, Any],
    info: ModelInfo | None,
    data: _Data | None,
    figures: Mapping[str, float],
    base: Base | None,
) -> str:
    family = re.split("[:.]", module_docstring(info.module))[0] if info else "timm's"
    text = f"`{cfg['architecture']}` ({family})"
    if base is not None:
        text += f", {'fine-tuned from' if base.trained else 'with the weights'} `{base.name}`"
    if data is not None and "top1" in figures:
        text += f". Top-1 accuracy on {data.title}: {figures['top1']:.2f}%, measured"
    if data is not None and "miou" in figures:
        text += f". mIoU on {data.title}: {figures['miou']:.2f}%, measured"
    return text + "."


def sparsity_of(model: nn.Module, masks: Mapping[str, Tensor] | None) -> SparseModel | None:
    """What `zoo sparsity` counts of a sparse model; None of any other, and of a quantised one."""
    from zoo.sparsity import report, sparse_parameters

    if getattr(model, "quantization", None) is not None:
        return None
    if not masks:  # a report takes a trace, which of a dense model says nothing
        weights = sparse_parameters(model).values()
        if sum(int(w.count_nonzero()) for w in weights) >= SPARSE * sum(w.numel() for w in weights):
            return None
    found = report(model, masks=masks)
    return found if found.density < SPARSE else None


def _model_section(
    model: nn.Module,
    cfg: Mapping[str, Any],
    info: ModelInfo | None,
    half: bool,
    costs: Profile,
    stitches: StitchCosts | None,
    sparse: SparseModel | None,
    has_picture: bool,
) -> str:
    classes = getattr(model, "num_classes", 0)
    size = tuple(cfg["input_size"])
    of_one, networks = "", []
    if stitches:
        number: int = model.stitch  # type: ignore[assignment]
        of_one = f", of network {number}"
        networks = [
            (
                "networks",
                f"{len(stitches)}, of {span([cost.macs for cost in stitches])} MACs, which `zoo profile --stitches` "
                f"lists; without `set_stitch`, it is network {number} that computes: {stitches[number].path}",
            )
        ]
    rows = [
        ("architecture", f"`{cfg['architecture']}`"),
        ("classes", f"{classes:,}{_some_labels(cfg)}" if classes else "none: features"),
        *networks,
        ("parameters", f"{costs.params:,}{' of all networks together' if stitches else ''}"),
        ("MACs", f"{humanize(costs.macs)} for one input of {shape_text(size)}{of_one}"),
        *(sparsity_rows(sparse, of_one) if sparse else []),
        ("activations", f"{humanize(costs.activations)}{of_one}"),
        ("weights", "float16, halved after training" if half else dtypes_of(model)),
        ("preprocessing", _preprocessing(cfg, whole=is_segmentation(model))),
    ]
    text = [
        markdown_table(("", ""), rows),
        "MACs are multiply-accumulates of convolution, linear, matmul and attention (one fused multiply-add counts "
        "one); activations are the output elements of the same operators.",
    ]
    text += sparsity_text(has_picture) if sparse else []
    if info and info.compact:
        text.insert(0, f"{info.compact.rstrip('.')}.")
    if info and info.paper:
        text.append(f"Paper: {cite(info.paper)}")
    return "\n\n".join(text)


def sparsity_rows(sparse: SparseModel, of_what: str = "") -> list[tuple[str, str]]:
    """Of the table of a model: `of_what` says what its MACs are of, where the table does not."""
    zeros = sum(layer.nonzeros < layer.params for layer in sparse.layers)
    return [
        ("density", f"{sparse.density:.2%} of the weights of {len(sparse.layers)} layers, of which {zeros} have zeros"),
        ("effective parameters", f"{sparse.effective_params:,}"),
        ("effective MACs", f"{humanize(sparse.effective_macs)}{of_what}"),
    ]


def sparsity_text(has_picture: bool) -> list[str]:
    """What those rows mean, and the picture where there is one."""
    text = (
        "Density is the share of the weights of convolutions and linear layers that are not zero, or that masks keep; "
        "effective parameters are without the others, and of effective MACs each layer has its density's share. "
        "`zoo sparsity` counts them. Ordinary kernels multiply by zero as by anything else."
    )
    return [text, *(["![Density of every layer, and masks](masks.png)"] if has_picture else [])]


def _some_labels(cfg: Mapping[str, Any]) -> str:
    names = cfg.get("label_names")
    if not isinstance(names, list | tuple):
        return ""
    return f": {', '.join(map(str, names[:5]))}{', ...' if len(names) > 5 else ''}"


def dtypes_of(model: nn.Module) -> str:
    return ", ".join(dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in model.parameters()))


def is_segmentation(model: nn.Module) -> bool:
    return getattr(model, "task", None) == "segmentation"


def _preprocessing(cfg: Mapping[str, Any], *, whole: bool) -> str:
    def numbers(values: Sequence[float]) -> str:
        return f"({', '.join(f'{value:g}' for value in values)})"

    cut = (
        f"resize the shorter side to input / {cfg.get('crop_pct', 1.0):g} ({cfg.get('interpolation')}), crop the centre"
    )
    if whole:
        cut = f"resize to fit into the input ({cfg.get('interpolation')}), fill up with the mean"
    return f"{cut}, scale to 0..1, subtract {numbers(cfg['mean'])}, divide by {numbers(cfg['std'])}"


def _use_section(place: str, model: nn.Module, info: ModelInfo | None, opens_in_timm: bool) -> str:
    cfg: Any = model.pretrained_cfg
    if is_segmentation(model):
        size = ", ".join(map(str, cfg["input_size"]))
        return (
            f'```python\nimport torch\nimport zoo\n\nmodel = zoo.create_model("hf-hub:{place}").eval()\n'
            f"logits = model(torch.zeros(1, {size}))  # of each class, at a part of the input's height and width\n```"
        )
    text = []
    if info is not None:
        text.append(
            f'```python\nimport zoo\n\nmodel = zoo.create_model("hf-hub:{place}").eval()\n'
            'print(zoo.predict(model, "picture.jpg"))\n```'
            if cfg.get("num_classes")
            else f'```python\nimport zoo\n\nmodel = zoo.create_model("hf-hub:{place}").eval()\n```'
        )
    create = f'model = timm.create_model("hf-hub:{place}", pretrained=True).eval()'
    if opens_in_timm:
        text.append(f"{'and with' if info else 'With'} timm\n\n```python\nimport timm\n\n{create}\n```")
    elif info is not None:
        text.append(
            "and with timm, which computes this model otherwise, or not at all, by itself\n\n"
            f"```python\nimport timm\nimport zoo\n\nzoo.register_with_timm(override=True)\n{create}\n```"
        )
    return "\n\n".join(text)


def _evaluation_section(
    place: str,
    cfg: Mapping[str, Any],
    data: _Data | None,
    figures: Mapping[str, float],
    run: RunRecord | None,
    results: Mapping[str, Any] | None,
    rounded: bool,
) -> str:
    if data is None or not figures:
        return "These weights come without measured results."
    rows = [(METRICS[key][1], f"{value:.4f}" if key == "loss" else f"{value:.2f}") for key, value in figures.items()]
    where = data.title + (f", split {data.split}" if data.split else "")
    command = ["python", "eval.py", "--model", f"hf-hub:{place}", *data.flags]
    if results is not None:
        preprocess = results.get("preprocessing")
        preprocess = preprocess if isinstance(preprocess, Mapping) else {}
        if isinstance(preprocess.get("input_size"), list):
            where += f", at {shape_text(preprocess['input_size'])}"
        images = f" on {results['images']:,} images" if isinstance(results.get("images"), int) else ""
        source = f"Measured{images} of {where} with {tools_of(results)}; `results.json` holds every figure."
        if isinstance(results.get("command"), str):
            source += f" The command was\n\n```bash\n{command_without_paths(results['command'])}\n```\n\n"
        if data.label_map:
            command += ["--label_map", data.label_map]
        own = {"input_size": list(cfg["input_size"]), "crop_pct": cfg.get("crop_pct")}
        other = {key: preprocess[key] for key in own if preprocess.get(key) not in (None, own[key])}
        command += _data_flags(other)
        if results.get("amp", "no") != "no":
            command += ["--amp", str(results["amp"])]
    else:
        assert run is not None
        source = measured_by(run, where)
    text = [markdown_table(("metric", ">value"), rows)]
    if rounded:
        text.append("The figures are of the weights before they were halved, and not of these.")
    again = f"To measure again, with the data in its place:\n\n```bash\n{shlex.join(command)}\n```"
    return "\n\n".join([*text, f"{source} {again}".replace("\n\n ", "\n\n")])


def measured_by(run: RunRecord, where: str) -> str:
    """When a run measured its checkpoint, and where its figures are kept."""
    assert run.row is not None
    epoch = f"epoch {run.row['epoch']} of {run.history[-1]['epoch']}"
    if run.checkpoint == SHRUNK:
        return (
            f"Measured on {where} after {epoch} of the training run, when the channels that had died out were cut off; "
            f"`{FIGURES}` holds the figures, and `history.csv` those of every epoch before that."
        )
    return f"Measured on {where} at the end of {epoch} of the training run; `history.csv` holds every epoch."


def tools_of(results: Mapping[str, Any]) -> str:
    """`eval.py`, and what it ran on where that was written down."""
    versions = results.get("versions")
    stated = versions if isinstance(versions, Mapping) else {}
    return ", ".join(["`eval.py`", *(f"{name} {version}" for name, version in stated.items())])


def training_section(run: RunRecord | None, base: Base | None, files: Sequence[str]) -> str:
    if run is None:
        return ""
    rows = [(f"`{key}`", f"`{json.dumps(value)}`") for key, value in _recipe(run.config)]
    text = [markdown_table(("setting", "value"), rows)]
    history = [row for row in run.history if isinstance(row.get("seconds"), int | float)]
    if history:
        seconds = sum(row["seconds"] for row in history)
        updates = f", {history[-1]['updates']:,} updates" if history[-1].get("updates") else ""
        epochs = f"{len(history)} epoch{'s' * (len(history) != 1)}{updates}"
        text.append(f"{epochs}, {_duration(seconds)} of training without the evaluations.")
    surroundings = dict.fromkeys(filter(None, map(_surroundings, run.environment)))
    if surroundings:
        text.append(f"Trained on {'; then on '.join(surroundings)}.")
    if base is not None:
        text.insert(0, f"Training began with the weights of `{base.name}`.")
    if RECIPE in files:
        text.append(
            f"Settings that are not in the table are the defaults; `{RECIPE}` holds all of them, and trains again with "
            f"`python train.py --config {RECIPE}`."
        )
    if "curves.png" in files:
        curves = "Loss" if run.config.get("task") == "language" else "Loss and accuracy"
        text.append(f"![{curves} by epoch](curves.png)")
    return "\n\n".join(text)


def _surroundings(row: Mapping[str, Any]) -> str:
    """Hardware and versions of one start of a run."""
    devices = row.get("devices")
    if not isinstance(devices, Mapping) or not devices:
        return ""
    hardware = ", ".join(f"{count} x {name}" if count != 1 else str(name) for name, count in devices.items())
    names = {"zoo": "backbone-zoo", "torch": "torch", "timm": "timm", "python": "Python"}
    versions = [f"{name} {row[key]}" for key, name in names.items() if row.get(key)]
    return hardware + (f" with {', '.join(versions)}" if versions else "")


def _recipe(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Dotted keys and values that differ from the defaults, without those that say where a run lay."""
    chosen = dict(_flat(without_paths({k: v for k, v in config.items() if k not in ("output", "resume")})))
    try:
        from zoo.data import DataConfig, SegmentationDataConfig
        from zoo.data.text import TextDataConfig
        from zoo.training import LanguageTrainingConfig, SegmentationTrainingConfig, TrainingConfig
    except MissingDependencyError:  # without the training extra there are no defaults to compare with
        return list(chosen.items())
    default: Any = TrainingConfig(data=DataConfig(name="digits"))
    if config.get("task") == "language":
        default = LanguageTrainingConfig(data=TextDataConfig(name="pydoc"))
    elif config.get("task") == "segmentation":
        default = SegmentationTrainingConfig(data=SegmentationDataConfig(name="digits"))
    defaults = dict(_flat(to_plain(default)))
    return [(key, value) for key, value in chosen.items() if key == "data.name" or defaults.get(key) != value]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        flat += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else [(prefix + key, value)]
    return flat


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _limits_section(run: RunRecord | None, data: _Data | None, base: Base | None) -> str:
    lines = []
    if run is not None and run.checkpoint == "best" and data is not None:
        lines.append(
            "- The epoch was chosen by its accuracy on the split that the figures are of: they flatter it a little."
            if data.is_training_data
            else "- The epoch was chosen by its accuracy on the evaluation split of the training data."
        )
    if data is not None:
        lines.append(f"- Accuracy was measured on {data.title}: on other pictures it is not known.")
    lines.append("- The model knows the classes, and carries the biases, of its training data.")
    if base is not None:
        lines.append(f"- It inherits what is said of `{base.name}`.")
    return "\n".join(lines)


def licence_section(license: str | None, base: Base | None, info: ModelInfo | None) -> str:
    stated = {None: "none is stated: ask the authors before use", UNSTATED: "none is stated"}.get(license, license)
    lines = [f"- These weights: {stated}."]
    if base is not None:
        known = {None: "not known here", UNSTATED: "none is stated by their authors"}.get(base.license, base.license)
        lines.append(f"- `{base.name}`, which they come from: {known}.")
    if info is not None and info.code_license:
        lines.append(f"- The architecture's original code: {info.code_license}, <{info.code_url}>.")
    return "\n".join(lines)
