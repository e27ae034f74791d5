"""Evaluate image classifiers: `python eval.py --model runs/digits`, or any names, checkpoints, folders and Hub ids."""

import sys

from zoo.config import run_command


def main() -> int:
    from zoo.evaluation.command import run
    from zoo.evaluation.config import parse_evaluation

    return run(parse_evaluation(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(run_command(main))
