"""The process that `benchmark` starts to measure memory on a CPU: `python -m zoo.profiling.memory JOB` prints bytes."""

from __future__ import annotations

import importlib
import json
import sys

from zoo.errors import ZooError
from zoo.profiling.measure import measure_resident_memory


def main(arguments: list[str]) -> int:
    job = json.loads(arguments[0])
    try:
        if job["imports"]:
            importlib.import_module(job["imports"])
        print(measure_resident_memory(job))
    except (ZooError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
