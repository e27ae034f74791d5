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

from zoo.files import whole_file
from zoo.registry import INDEX_PATH, Entry, ModelInfo, _entries, get_entry


def measure(entry: Entry) -> ModelInfo:
    """The facts of `entry`, its costs counted on the meta device, where nothing is allocated."""
    from zoo.factory import create_model
    from zoo.profiling import profile

    model: Any = create_model(entry.name, pretrained=False, device="meta")
    if entry.task == "language":
        return _measure_decoder(entry, model)
    costs = profile(model, input_size=tuple(model.pretrained_cfg["input_size"]))
    return ModelInfo(
        name=entry.name,
        family=entry.family,
        task=entry.task,
        module=entry.module,
        input_size=costs.input_size,
        params=costs.params,
        trainable_params=costs.trainable_params,
        macs=costs.macs,
        fvcore_total=costs.fvcore_total,
        activations=costs.activations,
        paper=entry.paper,
        compact=entry.compact,
        code_license=entry.code_license,
        code_url=entry.code_url,
        reported=entry.reported,
        weights=entry.weights,
        note=entry.note,
    )


def _measure_decoder(entry: Entry, model: Any) -> ModelInfo:
    from zoo.profiling.tokens import token_costs

    costs = token_costs(model)
    params = sum(parameter.numel() for parameter in model.parameters())
    return ModelInfo(
        name=entry.name,
        family=entry.family,
        task=entry.task,
        module=entry.module,
        input_size=(1,),
        params=params,
        trainable_params=params,
        macs=costs.macs,
        fvcore_total=0,
        activations=0,
        paper=entry.paper,
        compact=entry.compact,
        code_license=entry.code_license,
        code_url=entry.code_url,
        reported=entry.reported,
        weights=entry.weights,
        note=entry.note,
    )


def model_names() -> list[str]:
    """The models of every file in `zoo/models`, in order."""
    import zoo.models

    for module in pkgutil.iter_modules(zoo.models.__path__):
        importlib.import_module(f"zoo.models.{module.name}")
    return sorted(name for name, entry in _entries.items() if entry.module.startswith("zoo.models."))


def line(name: str) -> str:
    """What `index.json` says of one model."""
    return json.dumps(_without_empty(asdict(measure(get_entry(name)))))


def generate() -> str:
    """The text of `index.json`: one model a line."""
    return '{"models": [\n' + ",\n".join(map(line, model_names())) + "\n]}\n"


def _without_empty(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts without those that are not known: the reader has the defaults."""
    kept = {key: value for key, value in facts.items() if value not in (None, "", (), {})}
    kept["weights"] = [_without_empty(weights) for weights in facts.get("weights", ())]
    return kept if "weights" in facts else {k: v for k, v in kept.items() if k != "weights"}


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
