"""`train.py` in real processes that start at once: a server process has imported everything, and forks.

What is forked lives and dies as any process: it has its own memory, may be killed, and answers with its exit status.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass
class Job:
    """The processes of one run, in order of rank. `output` holds all that they said."""

    launcher: Launcher
    pids: list[int]
    output: Path

    def kill(self, number: int, rank: int = 0) -> None:
        os.kill(self.pids[rank], number)

    def wait(self) -> list[int]:
        """Exit statuses; negative numbers are signals."""
        return [self.launcher.ask({"wait": pid}) for pid in self.pids]

    def is_running(self) -> bool:
        return any(self.launcher.ask({"poll": pid}) is None for pid in self.pids)

    def wait_for(self, path: Path) -> None:
        while not path.exists():
            assert self.is_running(), self.text()
            time.sleep(0.01)

    def text(self) -> str:
        return self.output.read_text()


class Launcher:
    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        self.jobs = 0

    def ask(self, question: dict[str, Any]) -> Any:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(question) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(
        self,
        folder: Path,
        *argv: object,
        processes: int = 1,
        max_file_size: int | None = None,
        pause: float = 0.0,
    ) -> Job:
        """Run `train.py` with `argv` in so many processes, which find each other as under torchrun.

        With a `pause`, in seconds, before each batch it is not at its end before a busy machine gets round to stop it.
        """
        self.jobs += 1
        output, port = folder / f"output{self.jobs}.txt", _free_port()
        pids = []
        for rank in range(processes):
            environment = {} if processes == 1 else _torchrun_environment(rank, processes, port)
            question = {"argv": [str(arg) for arg in argv], "env": environment, "output": str(output)}
            pids.append(self.ask({**question, "max_file_size": max_file_size, "pause": pause}))
        return Job(self, pids, output)

    def run(self, folder: Path, *argv: object, **options: Any) -> str:
        """Run `train.py` to its end, which must be a good one; what it said."""
        job = self.start(folder, *argv, **options)
        statuses = job.wait()
        assert not any(statuses), job.text()
        return job.text()

    def close(self) -> None:
        """Ask the server to end: what this process forked meanwhile may hold the pipe open."""
        self.server.communicate(json.dumps(None) + "\n")


def _torchrun_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {key: str(value) for key, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve() -> int:
    """Fork as asked until asked to end. In the forked process: the exit status of `train.py`."""
    import docstring_parser  # noqa: F401
    import jsonargparse  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import sklearn.datasets
    import sklearn.model_selection  # noqa: F401

    import train
    import zoo.training  # noqa: F401
    from zoo.config import run_command

    ended: dict[int, int] = {}

    for line in sys.stdin:
        question = json.loads(line)
        if question is None:
            break
        answer: int | None
        if "argv" in question:
            answer = os.fork()
            if answer == 0:
                _become(question)
                return run_command(train.main)
        else:
            pid = question.get("wait", question.get("poll"))
            if pid not in ended:
                found, status = os.waitpid(pid, 0 if "wait" in question else os.WNOHANG)
                if found:
                    ended[pid] = os.waitstatus_to_exitcode(status)
            answer = ended.get(pid)
        print(json.dumps(answer), flush=True)
    return 0


def _become(question: dict[str, Any]) -> None:
    """Make the forked process one that a shell has started."""
    os.environ.update(question["env"])
    sys.argv = ["train.py", *question["argv"]]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if question["max_file_size"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does at its start: the write fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (question["max_file_size"], resource.RLIM_INFINITY))
    if question["pause"]:
        _slow_down(question["pause"])
    output = os.open(question["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


def _slow_down(pause: float) -> None:
    from zoo.training import ImageClassification

    loss = ImageClassification.loss

    def slow(*args: Any) -> Any:
        time.sleep(pause)
        return loss(*args)

    ImageClassification.loss = slow  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    sys.exit(serve())
