"""Train an image classifier: `python train.py --config configs/vision/digits_poolformer.yaml --optimizer.lr 1e-3`."""

import sys

from zoo.config import parse_config, run_command

EXAMPLES = """
python train.py --config configs/vision/digits_poolformer.yaml --output.dir runs/digits
python train.py --config configs/vision/imagenet1k/poolformer_s12.yaml --data.path imagenet --resume auto
torchrun --nproc_per_node 8 train.py --config configs/vision/imagenet1k/caformer_s18.yaml --data.path imagenet"""


def main() -> None:
    from zoo.training import TrainingConfig, train

    train(parse_config(TrainingConfig, prog="train.py", description="Train an image classifier.", examples=EXAMPLES))


if __name__ == "__main__":
    sys.exit(run_command(main))
