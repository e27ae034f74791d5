"""Python in real processes that start at once: a server process has imported what takes seconds, and forks.

What is forked lives and dies as any process: it has its own memory, may be killed, and answers with its exit status.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
# what train.py imports, some of it on its way
TRAINING = (
    "zoo.training",
    "docstring_parser",
    "jsonargparse",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "sklearn.datasets",
    "sklearn.model_selection",
)


class Server:
    """Has imported `modules`, and forks when asked."""

    def __init__(self, *modules: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
        )

    def ask(self, question: dict[str, Any] | None) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """Ask the server to end: what this process forked meanwhile may hold the pipe open."""
        self.process.communicate(json.dumps(None) + "\n")


# ---------------------------------------------------------------------------------------------------------- any program


class Program:
    """As `subprocess.Popen([sys.executable, *argv], ...)`, its output kept."""

    def __init__(
        self,
        *argv: object,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        input: str | bytes = "",
    ) -> None:
        self.argv = [str(arg) for arg in argv]
        self.folder = tempfile.TemporaryDirectory()
        self.stdin, self.stdout, self.stderr = (Path(self.folder.name) / name for name in ("in", "out", "err"))
        self.stdin.write_bytes(input.encode() if isinstance(input, str) else input)
        streams = {"stdin": str(self.stdin), "stdout": str(self.stdout), "stderr": str(self.stderr)}
        where = {"cwd": str(cwd or Path.cwd()), "env": dict(os.environ if env is None else env)}
        self.pid = _torch().ask({"argv": self.argv, **streams, **where})

    def finish(self, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Wait for its end. Raises `subprocess.TimeoutExpired` after so many seconds, as `subprocess.run` does."""
        deadline = time.monotonic() + timeout
        while (status := _torch().ask({"poll": self.pid})) is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(self.argv, timeout, self.stdout.read_text(), self.stderr.read_text())
            time.sleep(0.01)
        with self.folder:
            return subprocess.CompletedProcess(self.argv, status, self.stdout.read_text(), self.stderr.read_text())


def python(*argv: object, **where: Any) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run([sys.executable, *argv], capture_output=True, text=True, ...)`, but for seconds of imports."""
    return Program(*argv, **where).finish()


@functools.cache
def _torch() -> Server:
    server = Server("torch", "torchvision")
    atexit.register(server.close)
    return server


# ------------------------------------------------------------------------------------------------------------- train.py


@dataclasses.dataclass
class Job:
    """The processes of one run, in order of rank. `output` holds all that they said."""

    server: Server
    pids: list[int]
    output: Path

    def kill(self, number: int, rank: int = 0) -> None:
        """Signal a process and all of its group, as terminals, torchrun and job schedulers do."""
        os.killpg(self.pids[rank], number)

    def wait(self) -> list[int]:
        """Exit statuses; negative numbers are signals."""
        return [self.server.ask({"wait": pid}) for pid in self.pids]

    def is_running(self) -> bool:
        return any(self.server.ask({"poll": pid}) is None for pid in self.pids)

    def wait_for(self, path: Path) -> None:
        while not path.exists():
            assert self.is_running(), self.text()
            time.sleep(0.01)

    def text(self) -> str:
        return self.output.read_text()


class Launcher:
    def __init__(self) -> None:
        self.server = Server(*TRAINING)
        self.jobs = 0

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
        output, port = folder / f"output{self.jobs}.txt", free_port()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        streams = {"stdin": os.devnull, "stdout": str(output), "stderr": str(output)}
        question: dict[str, Any] = {"argv": [str(arg) for arg in (ROOT / "train.py", *argv)], "cwd": str(ROOT)}
        question |= {"max_file_size": max_file_size, "pause": pause, **streams}
        pids = []
        for rank in range(processes):
            ranks = {} if processes == 1 else torchrun_environment(rank, processes, port)
            pids.append(self.server.ask({**question, "env": environment | ranks}))
        return Job(self.server, pids, output)

    def run(self, folder: Path, *argv: object, **options: Any) -> str:
        """Run `train.py` to its end, which must be a good one; what it said."""
        job = self.start(folder, *argv, **options)
        statuses = job.wait()
        assert not any(statuses), job.text()
        return job.text()

    def close(self) -> None:
        self.server.close()


def torchrun_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun tells the process of this rank, all of them on this machine."""
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {key: str(value) for key, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ----------------------------------------------------------------------------------------------------------- the server


def serve(modules: list[str]) -> dict[str, Any] | None:
    """Fork as asked until asked to end. In the forked process: what it was asked for."""
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # what is collected in a forked process need not go over all of this, and copy its pages
    ended: dict[int, int] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if question is None:
            break
        answer: int | None
        if "argv" in question:
            answer = os.fork()
            if answer == 0:
                return question
        else:
            pid = question.get("wait", question.get("poll"))
            if pid not in ended:
                found, status = os.waitpid(pid, 0 if "wait" in question else os.WNOHANG)
                if found:
                    ended[pid] = os.waitstatus_to_exitcode(status)
            answer = ended.get(pid)
        print(json.dumps(answer), flush=True)
    return None


def become(question: dict[str, Any]) -> None:
    """Make the forked process one that a shell has started as `python *argv`, and run it to its end."""
    os.setpgrp()
    os.environ.clear()
    os.environ.update(question["env"])
    os.chdir(question["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if question.get("max_file_size"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does at its start: the write fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (question["max_file_size"], resource.RLIM_INFINITY))
    if question.get("pause"):
        _slow_down(question["pause"])
    streams = [os.open(question["stdin"], os.O_RDONLY)]
    streams += [os.open(question[key], os.O_WRONLY | os.O_CREAT | os.O_APPEND) for key in ("stdout", "stderr")]
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)

    sys.path[:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))  # not the folder of this file
    what, *rest = question["argv"]
    if what == "-c":
        code, *rest = rest
        sys.argv, main = ["-c", *rest], types.ModuleType("__main__")
        sys.path.insert(0, "")
        sys.modules["__main__"] = main
        exec(compile(code, "<string>", "exec"), main.__dict__)
    elif what == "-m":
        module, *rest = rest
        sys.argv = ["-m", *rest]
        sys.path.insert(0, question["cwd"])
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [what, *rest]
        sys.path.insert(0, str(Path(what).parent))
        runpy.run_path(what, run_name="__main__")


def _slow_down(pause: float) -> None:
    from zoo.training import ImageClassification

    loss = ImageClassification.loss

    def slow(*args: Any) -> Any:
        time.sleep(pause)
        return loss(*args)

    ImageClassification.loss = slow  # type: ignore[assignment, method-assign]


def end(status: int) -> NoReturn:
    """As Python ends, but for taking apart all that was imported, which takes a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    asked = serve(sys.argv[1:])
    status = 0
    try:
        if asked is not None:
            become(asked)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    end(status)
