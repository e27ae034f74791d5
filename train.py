"""Train a model: `python train.py --config configs/vision/digits_poolformer.yaml --optimizer.lr 1e-3`."""

import sys

from zoo.config import run_command

EXAMPLES = """
python train.py --config configs/vision/digits_poolformer.yaml --output.dir runs/digits
python train.py --config configs/vision/imagenet1k/poolformer_s12.yaml --data.path imagenet --resume auto
python train.py --config configs/vision/digits_segmentation.yaml --output.dir runs/pages
python train.py --config configs/language/pydoc_demo.yaml --output.dir runs/pydoc
torchrun --nproc_per_node 8 train.py --config configs/vision/imagenet1k/caformer_s18.yaml --data.path imagenet"""


def main() -> None:
    from zoo.training import parse_training_config, train

    train(parse_training_config(sys.argv[1:], prog="train.py", examples=EXAMPLES))


if __name__ == "__main__":
    sys.exit(run_command(main))
