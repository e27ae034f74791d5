"""The whole way, on real data, in a few minutes: `python -m zoo.demo`.

Trains a small PoolFormer on scikit-learn's handwritten digits, evaluates it, counts what it costs, exports it to a
folder that both `zoo.create_model` and `timm.create_model` open, and asks it about an image file. Then trains a small
MobileLLM, byte by byte, on the topics of Python's manual, counts what it costs, and lets it write. Runs from a checkout
of the repository, whose recipes it uses; from elsewhere, name them with --recipe and --language-recipe.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from zoo.config import load_config, run_command
from zoo.errors import ZooError
from zoo.units import shape_text

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RECIPE = CONFIGS / "vision" / "digits_poolformer.yaml"
LANGUAGE_RECIPE = CONFIGS / "language" / "pydoc_demo.yaml"
LEAST_TOP1 = 97.0
MOST_BITS = 2.0  # a byte
PROMPT = "The "


class DemoError(ZooError):
    """The demo did not do what it promises."""


def demo(output: Path, recipe: Path = RECIPE, least_top1: float = LEAST_TOP1) -> None:
    """Train by `recipe` into `output/run`, then evaluate, profile, export, open again and predict.

    Raises DemoError when test accuracy stays below `least_top1` percent, or an exported model answers differently.
    """
    import timm
    import torch

    import zoo
    from zoo.data import evaluation_loader, load_split, preprocessing
    from zoo.evaluation import evaluate, load_model, predict
    from zoo.files import make_folder
    from zoo.training import TrainingConfig, train

    started = time.perf_counter()
    run_folder, export = output / "run", output / "export"
    make_folder(output)
    for made in (run_folder, export):
        shutil.rmtree(made, ignore_errors=True)
    config = load_config(TrainingConfig, recipe)
    config = dataclasses.replace(config, output=dataclasses.replace(config.output, dir=str(run_folder)))

    _title(f"1. Train {config.model.name}, made small, on digits")
    train(config)

    _title("2. Evaluate the last checkpoint on the test digits (the best was chosen by them, so it would flatter)")
    model = load_model(str(run_folder / "last")).eval()
    results = evaluate(model, config.data, name="small poolformer_s12")
    results.save(output)
    print(results)

    _title("3. What it costs, beside poolformer_s12")
    small, published = zoo.profile(model), zoo.profile("poolformer_s12")
    print(f"{'':<14}{'this model':>16}{'poolformer_s12':>18}")
    for what, name in (("parameters", "params"), ("MACs", "macs"), ("activations", "activations")):
        print(f"{what:<14}{getattr(small, name):>16,}{getattr(published, name):>18,}")
    sizes = (shape_text(profile.input_size) for profile in (small, published))
    print("{:<14}{:>16}{:>18}".format("input", *sizes))
    print("MACs: one fused multiply-add counts one. `zoo profile poolformer_s12` shows where they lie.")

    _title("4. Export, and open with zoo and with timm")
    zoo.save_pretrained(model, export, labels=list(results.per_class))
    print("zoo.register_with_timm(override=True)  # timm's own poolformer_s12 can be neither shortened nor narrowed")
    zoo.register_with_timm(override=True)
    split = load_split(config.data, training=False)
    preprocess = preprocessing(model, config.data)
    loader = evaluation_loader(split, config.data, preprocess)
    images = loader.prepare(next(iter(loader)), torch.device("cpu"))
    source = f"local-dir:{export}"
    with torch.inference_mode():
        expected = model(images)
        for name, create in (("zoo", zoo.create_model), ("timm", timm.create_model)):
            found = create(source, pretrained=True).eval()(images)
            if not torch.equal(found, expected):
                raise DemoError(f"Opened with {name}, the export answers differently than the trained model.")
            print(f'{name}.create_model("{source}", pretrained=True): the same logits for {len(images)} images')

    _title("5. Predict an image file")
    image = output / "digit.png"
    split.source.open(0).resize((64, 64)).save(image)
    top = predict(zoo.create_model(source, pretrained=True), image, topk=3)
    print(f"{image}, a {split.classes[split.labels[0]]}: " + ", ".join(f"{p.label} ({p.probability:.1%})" for p in top))

    _title(f"Images: done in {time.perf_counter() - started:.0f} s: top-1 {results.top1:.2f}%")
    for what, path in (
        ("run, with its configuration and history", run_folder),
        ("curves", run_folder / "curves.png"),
        ("results", output / "results.json"),
        ("confusion", output / "confusion.png"),
        ("exported model", export),
    ):
        print(f"  {what:<40} {path}")
    if results.top1 < least_top1:
        raise DemoError(f"Top-1 is {results.top1:.2f}%, below the {least_top1:g}% that this demo is to reach.")


def demo_language(output: Path, recipe: Path = LANGUAGE_RECIPE, most_bits: float = MOST_BITS) -> None:
    """Train a language model by `recipe` into `output/language`, then profile it, open it again, and let it write.

    Raises DemoError when the bits that a byte of the topics held out costs it stay above `most_bits`.
    """
    import zoo
    from zoo.data.tokenizers import create_tokenizer
    from zoo.files import make_folder
    from zoo.training import LanguageTrainingConfig, train

    started = time.perf_counter()
    run_folder = output / "language"
    make_folder(output)
    shutil.rmtree(run_folder, ignore_errors=True)
    config = load_config(LanguageTrainingConfig, recipe)
    config = dataclasses.replace(config, output=dataclasses.replace(config.output, dir=str(run_folder)))

    _title(f"6. Train {config.model.name}, made small, on the topics of Python's manual, byte by byte")
    run = train(config)

    source = f"local-dir:{run.best_checkpoint}"
    model = zoo.create_model(source, pretrained=True).eval()
    tokenizer = create_tokenizer(run.best_checkpoint)
    _title("7. What it costs")
    print(zoo.profile(model))

    _title(f"8. What it writes after {PROMPT!r}")
    print(f'zoo.generate(zoo.create_model("{source}", pretrained=True), "{PROMPT}", temperature=0.6, seed=0, ...)\n')
    written = zoo.generate(model, PROMPT, tokenizer=tokenizer, max_new_tokens=240, temperature=0.6, seed=0)
    print(f"{PROMPT}{written}")

    _title(f"Language: done in {time.perf_counter() - started:.0f} s: {run.best:.3f} bits a byte of other topics")
    for what, path in (
        ("run, with its configuration and history", run_folder),
        ("curves", run_folder / "curves.png"),
        ("what it wrote on the way", run_folder / "samples.md"),
        ("model with its tokenizer", run.best_checkpoint),
    ):
        print(f"  {what:<40} {path}")
    if run.best > most_bits:
        raise DemoError(f"A byte costs {run.best:.3f} bits, above the {most_bits:g} that this demo is to reach.")


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zoo.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for all that it makes")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="how it trains on images")
    parser.add_argument("--language-recipe", type=Path, default=LANGUAGE_RECIPE, help="how it trains on text")
    arguments = parser.parse_args(argv)

    import torch

    def run() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # so small a network gains little from more, and on a busy machine they wait
        demo(arguments.output, arguments.recipe)
        torch.set_num_threads(threads)
        demo_language(arguments.output, arguments.language_recipe)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
