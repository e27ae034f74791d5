"""Train an image classifier: `python train.py --config configs/vision/digits_poolformer.yaml --optimizer.lr 1e-3`."""

import sys

from zoo.config import parse_config, run_command


def main() -> None:
    from zoo.training import TrainingConfig, train

    train(parse_config(TrainingConfig, prog="train.py", description="Train an image classifier."))


if __name__ == "__main__":
    sys.exit(run_command(main))
