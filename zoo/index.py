"""`index.json`: every fact about the models that come with the package. `python -m zoo.index` writes it.

`python -m zoo.index --check` exits 1 when the file is not what the code generates.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
from dataclasses import asdict
from typing import Any

from zoo.errors import ConfigError
from zoo.files import whole_file
from zoo.registry import INDEX_PATH, Entry, LanguageFacts, ModelInfo, _entries, get_entry


def measure(entry: Entry) -> ModelInfo:
    """The facts of `entry`, its costs counted on the meta device, where nothing is allocated."""
    from zoo.factory import create_model

    model: Any = create_model(entry.name, pretrained=False, device="meta")
    costs = _costs_of_decoder(model) if entry.task == "language" else _costs_of_image(model)
    return ModelInfo(
        name=entry.name,
        family=entry.family,
        task=entry.task,
        module=entry.module,
        **costs,
        paper=entry.paper,
        compact=entry.compact,
        code_license=entry.code_license,
        code_url=entry.code_url,
        reported=entry.reported,
        weights=entry.weights,
        note=entry.note,
    )


def _costs_of_image(model: Any) -> dict[str, Any]:
    from zoo.profiling import profile

    costs = profile(model, input_size=tuple(model.pretrained_cfg["input_size"]))
    fields = ("input_size", "params", "trainable_params", "macs", "fvcore_total", "activations")
    return {field: getattr(costs, field) for field in fields}


def _costs_of_decoder(model: Any) -> dict[str, Any]:
    from zoo.layers.decoder import Decoder
    from zoo.profiling.tokens import token_costs

    if not isinstance(model, Decoder):
        raise ConfigError(
            f"A language model is built by zoo.layers.decoder.build_decoder, which gives a Decoder, not a "
            f"{type(model).__name__}: register it with another task."
        )
    costs, config = asdict(token_costs(model)), model.config
    params = sum(parameter.numel() for parameter in model.parameters())
    return {
        "params": params,
        "trainable_params": params,
        "macs": costs.pop("macs"),
        "language": LanguageFacts(
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            stored_layers=config.depth,
            executed_layers=len(config.executed),
            sliding_window=config.sliding_window,
            **costs,
        ),
    }


def model_names() -> list[str]:
    """The models of every file in `zoo/models`, in order."""
    import zoo.models

    for module in pkgutil.iter_modules(zoo.models.__path__):
        importlib.import_module(f"zoo.models.{module.name}")
    return sorted(name for name, entry in _entries.items() if entry.module.startswith("zoo.models."))


def line(name: str) -> str:
    """What `index.json` says of one model."""
    return json.dumps(_without_empty(measure(get_entry(name)).to_dict()))


def generate() -> str:
    """The text of `index.json`: one model a line."""
    return '{"models": [\n' + ",\n".join(map(line, model_names())) + "\n]}\n"


def _without_empty(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts without those that are not known: the reader has the defaults."""
    kept = {key: value for key, value in facts.items() if value not in (None, "", (), {})}
    if "weights" in facts:
        kept["weights"] = [_without_empty(weights) for weights in facts["weights"]]
    if facts.get("language"):
        kept["language"] = _without_empty(facts["language"])
    return kept


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m zoo.index", description="Write zoo/index.json anew.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the file is out of date")
    args = parser.parse_args(arguments)
    current = INDEX_PATH.read_text() if INDEX_PATH.exists() else ""
    generated = generate()
    if args.check:
        if generated != current:
            print("zoo/index.json is not what the code generates: run `python -m zoo.index`.", file=sys.stderr)
        return int(generated != current)
    with whole_file(INDEX_PATH) as file:
        file.write(generated.encode())
    print(f"{INDEX_PATH}: {generated.count(chr(10)) - 2} models")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
