"""Train an image classifier: `python train.py --config configs/vision/digits_poolformer.yaml --optimizer.lr 1e-3`."""

import sys

from zoo.config import parse_config, run_command


def main() -> None:
    from zoo.training import TrainingConfig, train

    run = train(parse_config(TrainingConfig, prog="train.py", description="Train an image classifier."))
    print(f"Best {run.metric} {run.best:.2f}% in epoch {run.best_epoch}: {run.best_checkpoint}")


if __name__ == "__main__":
    sys.exit(run_command(main))
