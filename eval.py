"""Evaluate classifiers, segmentation networks and language models: `python eval.py --model runs/digits`.

Models are named as everywhere: by name, run, folder or Hub id.
"""

import os
import sys

from zoo.config import run_command


def main() -> int:
    from zoo.evaluation.command import run
    from zoo.evaluation.config import parse_evaluation
    from zoo.model_card import command_without_paths

    launcher = [] if "WORLD_SIZE" in os.environ else ["python"]  # else torchrun's or accelerate's, which is not known
    return run(parse_evaluation(sys.argv[1:]), command_without_paths([*launcher, *sys.argv]))


if __name__ == "__main__":
    sys.exit(run_command(main))
