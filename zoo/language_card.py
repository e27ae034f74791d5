"""The card of one checkpoint of a language model, with the Hub's metadata on top.

As in `zoo.model_card`, nothing in it is a claim: its figures come from an evaluation (`results.json`) or from the
history of the run.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import EvalResult, ModelCardData
from torch import Tensor, nn

from zoo.cards import bibtex, cite, markdown_table, module_docstring
from zoo.errors import ConfigError
from zoo.exporting.gguf import gguf_architecture
from zoo.layers.decoder import DecoderConfig, outline
from zoo.model_card import (
    HUB,
    Base,
    RunRecord,
    assemble,
    command_without_paths,
    dtypes_of,
    facts_of,
    licence_metadata,
    licence_section,
    measured_by,
    measured_figures,
    sparsity_of,
    sparsity_rows,
    sparsity_text,
    tools_of,
    training_section,
    without_paths,
)
from zoo.profiling.tokens import token_costs
from zoo.registry import ModelInfo
from zoo.units import humanize

if TYPE_CHECKING:
    from zoo.sparsity import SparseModel

__all__ = ["render_language_card"]

TASK = "text-generation"
PROMPT = "Once upon a time"
METRICS = {
    "perplexity": "Perplexity of a token",
    "bits_per_byte": "Bits per byte",
    "loss": "Cross-entropy of a token, in nats",
}


def render_language_card(
    model: nn.Module,
    *,
    repo_id: str | None = None,
    tokenizer: Any = None,
    opens_in_transformers: bool,
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
    """The card of `model`, a decoder with its weights, as Markdown with the Hub's metadata on top.

    The arguments are those of `zoo.model_card.render_model_card`, and `opens_in_transformers` says whether
    `AutoModelForCausalLM` makes the same model of the files. Raises ConfigError when the metadata is not what the Hub
    reads.
    """
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    config: DecoderConfig = model.config  # type: ignore[assignment]
    info = facts_of(str(cfg["architecture"]))
    place = repo_id or "OWNER/NAME"
    name = place.rpartition("/")[2] if repo_id else str(cfg["architecture"])
    figures, tasks = measured_figures(run, results, METRICS), _tasks(results)
    data_name = _data_name(run, results, dataset)
    stated = ({}, []) if rounded else (figures, tasks)
    sparse = sparsity_of(model, masks)
    data = _metadata(
        name=name,
        info=info,
        is_sparse=sparse is not None,
        opens_in_transformers=opens_in_transformers,
        base=base,
        license=license,
        trained_on=dataset or _hub_data(run),
        measured=_measured(*stated, data_name, dataset, repo_id, results, files),
    )
    quantization = getattr(model, "quantization", None)
    is_exported = quantization is None  # else only the model that it was made from is
    sections = {
        "Model": _model_section(model, config, cfg, info, tokenizer, half, sparse, "masks.png" in files),
        "Use": _use_section(place, config if is_exported else None, tokenizer is not None, opens_in_transformers),
        "Evaluation": _evaluation_section(data_name, figures, tasks, run, results, rounded, quantization),
        "Training": training_section(run, base, files),
        "Limits": _limits_section(run, data_name, base),
        "Licence": licence_section(license, base, info),
        "Citation": f"```bibtex\n{bibtex(info.paper)}\n```" if info and info.paper else "",
    }
    return assemble(name, _summary(cfg, info, data_name, {} if rounded else figures, base), note, sections, data)


# ------------------------------------------------------------------------------------------------------------- figures


def _tasks(results: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The figures of tasks that an evaluation holds; none of one that took some samples alone, to try it out."""
    if results is None or results.get("limit") is not None:
        return []
    listed = results.get("tasks")
    keys = ("task", "metric", "value")
    return [one for one in listed if isinstance(one, Mapping) and all(key in one for key in keys)] if listed else []


def _data_name(run: RunRecord | None, results: Mapping[str, Any] | None, dataset: str | None) -> str | None:
    """What the text was that figures are of, as people call it."""
    trained = (run.config.get("data") if run else None) or {}
    measured = (results or {}).get("data") or trained.get("path") or trained.get("name")
    if measured is None or measured == (trained.get("path") or trained.get("name")):
        measured = dataset or measured
    if measured == "pydoc":
        return "the topics of Python's manual (pydoc)"
    return None if measured is None else str(without_paths(str(measured)))


def _hub_data(run: RunRecord | None) -> str | None:
    data = run.config.get("data") if run else None
    return data.get("path") if isinstance(data, Mapping) and data.get("name") == "hub" else None


def _measured(
    figures: Mapping[str, float],
    tasks: Sequence[Mapping[str, Any]],
    data_name: str | None,
    dataset: str | None,
    repo_id: str | None,
    results: Mapping[str, Any] | None,
    files: Sequence[str],
) -> list[EvalResult]:
    measured_in = "history.csv" if results is None else "results.json"
    linked = repo_id is not None and measured_in in files
    source: dict[str, Any] = {
        "source_name": measured_in if linked else None,
        "source_url": f"{HUB}/{repo_id}/blob/main/{measured_in}" if linked else None,
    }
    on_text = [
        EvalResult(
            task_type=TASK,
            task_name="Text generation",
            dataset_type=dataset or _identifier(data_name or "text"),
            dataset_name=data_name or "text",
            metric_type=key,
            metric_name=METRICS[key],
            metric_value=round(value, 4),
            **source,
        )
        for key, value in figures.items()
    ]
    on_tasks = [
        EvalResult(
            task_type=TASK,
            task_name="Text generation",
            dataset_type=_identifier(str(one["task"])),
            dataset_name=str(one["task"]),
            metric_type=str(one["metric"]),
            metric_name=f"{one['metric']} ({one.get('num_fewshot') or 'zero'}-shot)",
            metric_value=round(float(one["value"]), 4),
            **source,
        )
        for one in tasks
    ]
    return on_text + on_tasks


def _identifier(name: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-") or "data"


def _metadata(
    *,
    name: str,
    info: ModelInfo | None,
    is_sparse: bool,
    opens_in_transformers: bool,
    base: Base | None,
    license: str | None,
    trained_on: str | None,
    measured: Sequence[EvalResult],
) -> ModelCardData:
    extra: dict[str, Any] = {}
    if base is not None and base.hub_id and base.trained:
        extra["base_model_relation"] = "finetune"
    return ModelCardData(
        library_name="transformers" if opens_in_transformers else "backbone-zoo",
        pipeline_tag=TASK,
        tags=[
            *(TASK, "zoo"),
            *(["transformers"] if opens_in_transformers else []),
            *([info.family] if info else []),
            *(["sparse"] if is_sparse else []),
        ],
        datasets=[trained_on] if trained_on else None,
        base_model=base.hub_id if base else None,
        metrics=sorted({str(one.metric_type) for one in measured}) or None,
        model_name=name if measured else None,
        eval_results=list(measured) or None,
        **licence_metadata(license),
        **extra,
    )


# ------------------------------------------------------------------------------------------------------------ sections


def _summary(
    cfg: Mapping[str, Any],
    info: ModelInfo | None,
    data_name: str | None,
    figures: Mapping[str, float],
    base: Base | None,
) -> str:
    family = f" (a {re.split('[:.,]', module_docstring(info.module))[0]})" if info else ""
    text = f"`{cfg['architecture']}`{family}"
    if base is not None:
        text += f", {'fine-tuned from' if base.trained else 'with the weights'} `{base.name}`"
    if data_name and "bits_per_byte" in figures:
        text += f". {figures['bits_per_byte']:.3f} bits per byte on {data_name}, measured"
    elif data_name and "perplexity" in figures:
        text += f". Perplexity {figures['perplexity']:.4g} on {data_name}, measured"
    return text + "."


def _model_section(
    model: nn.Module,
    config: DecoderConfig,
    cfg: Mapping[str, Any],
    info: ModelInfo | None,
    tokenizer: Any,
    half: bool,
    sparse: SparseModel | None,
    has_picture: bool,
) -> str:
    plain, quantization = outline(model), getattr(model, "quantization", None)
    costs = token_costs(plain)
    layers = f"{config.depth}"
    if len(config.executed) != config.depth:
        layers = f"{config.depth} stored, {len(config.executed)} executed"
    if config.kv_rank is not None:
        attention = f"latent, {config.num_heads} heads over {config.kv_rank} + {config.rope_head_dim} numbers a token"
    else:
        attention = f"{config.num_heads} heads of {config.head_dim}, {config.kv_heads} of keys and values"
    if config.sliding_window is not None:
        everything = sum(config.window(i) is None for i in range(len(config.executed)))
        attention += f"; {everything} layers see everything, the others {config.sliding_window} tokens"
    kept = torch.bfloat16 if quantization else next(model.parameters()).dtype  # as caches are by default
    width = kept.itemsize
    memory = f"{costs.kv_elements * width:,} bytes of keys and values"
    if costs.windowed_kv_elements:
        memory += f", of which {costs.windowed_kv_elements * width:,} are forgotten again"
    parameters = sum(parameter.numel() for parameter in plain.parameters())
    weights = "float16, halved after training" if half else dtypes_of(model)
    if quantization:
        weights = f"{quantization.to}, a scale in float16 for every {quantization.group_size} of a row"
    rows = [
        ("architecture", f"`{cfg['architecture']}`"),
        ("parameters", f"{parameters:,}" + (", embedding and head being one" if config.tie_embeddings else "")),
        ("layers, width", f"{layers}; {config.dim}, {config.hidden_range} within"),
        ("attention", attention),
        ("context", f"{config.context_length:,} tokens"),
        ("vocabulary", f"{config.vocab_size:,}" + (f", tokenizer of {tokenizer.vocab_size:,}" if tokenizer else "")),
        ("MACs", f"{humanize(costs.macs)} a token, and {humanize(costs.attention_macs)} for each remembered one"),
        *(sparsity_rows(sparse, f" for a text of {sparse.input_size[-1]} tokens") if sparse else []),
        ("memory", f"{memory} a token"),
        ("weights", weights),
    ]
    text = [
        markdown_table(("", ""), rows),
        "MACs are multiply-accumulates of linear layers and head for a generated token (one fused multiply-add counts "
        "one).",
        *(sparsity_text(has_picture) if sparse else []),
    ]
    if info and info.compact:
        text.insert(0, f"{info.compact.rstrip('.')}.")
    if info and info.paper:
        text.append(f"Paper: {cite(info.paper)}")
    return "\n\n".join(text)


def _quantised_text(quantization: Any) -> list[str]:
    """What quantising changed, where that was measured."""
    measured = quantization and quantization.perplexity
    if not measured:
        return []
    return [
        f"Quantising changed the perplexity on {measured['tokens']:,} tokens of {measured['text']} from "
        f"{measured['before']:.4g} to {measured['after']:.4g}, measured."
    ]


def _use_section(place: str, config: DecoderConfig | None, has_tokenizer: bool, opens_in_transformers: bool) -> str:
    """`config` is that of a model which other programs take."""
    create = f'import zoo\n\nmodel = zoo.create_model("hf-hub:{place}").eval()\n'
    if has_tokenizer:
        create += f'print(zoo.generate(model, "{PROMPT}", tokenizer="hf-hub:{place}", max_new_tokens=64))'
    else:
        create += "print(zoo.generate(model, [1, 2, 3], max_new_tokens=64))  # token numbers: there is no tokenizer"
    text = [f"```python\n{create}\n```"]
    if opens_in_transformers and has_tokenizer:
        text.append(
            "and with transformers\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n'
            f'model = AutoModelForCausalLM.from_pretrained("{place}")\n'
            f'inputs = tokenizer("{PROMPT}", return_tensors="pt", return_token_type_ids=False)\n'
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))\n```"
        )
    elif opens_in_transformers:
        text.append(
            "and with transformers\n\n```python\nfrom transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{place}")\n```'
        )
    exports = []
    if config is not None:
        if not opens_in_transformers:
            exports.append(f"zoo export hf-hub:{place} FOLDER --to transformers")
        with contextlib.suppress(ConfigError):
            gguf_architecture(config)
            exports.append(f"zoo export hf-hub:{place} FOLDER --to gguf --dtype q8_0")
    if exports:
        commands = "\n".join(exports)
        text.append(f"For other programs it is exported:\n\n```bash\n{commands}\n```")
    return "\n\n".join(text)


def _evaluation_section(
    data_name: str | None,
    figures: Mapping[str, float],
    tasks: Sequence[Mapping[str, Any]],
    run: RunRecord | None,
    results: Mapping[str, Any] | None,
    rounded: bool,
    quantization: Any,
) -> str:
    text = _quantised_text(quantization)
    if not figures and not tasks:
        return "\n\n".join(text) or "These weights come without measured results."
    if figures:
        rows = [(METRICS[key], f"{value:.4f}") for key, value in figures.items()]
        text.append(markdown_table(("metric", ">value"), rows))
    if results is None:
        assert run is not None
        ends = (
            " The token that ends a text counts, too, which `eval.py` leaves out." if "bits_per_byte" in figures else ""
        )
        text.append(measured_by(run, f"the evaluation part of {data_name}") + ends)
    elif figures:
        text.append(_how(data_name, results))
    if tasks:
        scores = [
            (
                f"`{one['task']}`",
                str(one["metric"]),
                f"{float(one['value']):.4f}",
                "" if one.get("stderr") is None else f"{float(one['stderr']):.4f}",
                str(one.get("num_fewshot", "")),
                str(one.get("samples", "")),
            )
            for one in tasks
        ]
        columns = ("task", "metric", ">value", ">standard error", ">shots", ">samples")
        text.append(markdown_table(columns, scores))
        text.append("Tasks are those of lm-evaluation-harness; accuracies are shares of 1.")
    if rounded:
        text.append("The figures are of the weights before they were halved, and not of these.")
    if results is not None and isinstance(results.get("command"), str):
        text.append(f"The command was\n\n```bash\n{command_without_paths(results['command'])}\n```")
    return "\n\n".join(text)


def _how(data_name: str | None, results: Mapping[str, Any]) -> str:
    size = ""
    if isinstance(results.get("tokens"), int) and isinstance(results.get("bytes"), int):
        size = f" on {results['tokens']:,} tokens ({results['bytes']:,} bytes)"
    split = f", split {results['split']}" if results.get("split") else ""
    windows = ""
    if isinstance(results.get("context"), int) and isinstance(results.get("stride"), int):
        windows = f" Every token is predicted once, in windows of {results['context']:,} tokens that begin every "
        windows += f"{results['stride']:,}."
    where = f" of {data_name}{split}" if data_name else ""
    return f"Measured{size}{where} with {tools_of(results)}; `results.json` holds every figure.{windows}"


def _limits_section(run: RunRecord | None, data_name: str | None, base: Base | None) -> str:
    lines = []
    if run is not None and run.checkpoint == "best":
        lines.append("- The epoch was chosen by its loss on the text that the run evaluates on.")
    if data_name is not None:
        lines.append(f"- It was measured on {data_name}: of other text nothing is known.")
    lines.append("- It writes what is likely after its training data, true or not, with their biases.")
    if base is not None:
        lines.append(f"- It inherits what is said of `{base.name}`.")
    return "\n".join(lines)
