"""Evaluate an image classifier: `python eval.py --model runs/digits`, or any name, checkpoint, folder or Hub id."""

import sys

from zoo.config import run_command


def main() -> None:
    from zoo.evaluation import evaluate, load_model
    from zoo.evaluation.config import parse_evaluation
    from zoo.evaluation.image_classification import make_folder

    config = parse_evaluation(sys.argv[1:])
    if config.output:
        make_folder(config.output)  # before the work, not after it
    model = load_model(config.model, config.checkpoint_path)
    results = evaluate(
        model, config.data, name=config.model, device=config.device, amp=config.amp, channels_last=config.channels_last
    )
    print(results)
    if results.skipped:
        print(f"Skipped {len(results.skipped)} damaged images:", *results.skipped[:20], sep="\n  ")
    if config.output:
        print(f"Written to {results.save(config.output)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
