"""Fixtures of several test files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests.hub_stub import Hub
from tests.launcher import Launcher

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def eval_py(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Any:
    """`eval.py` in this process: its exit status, output and errors."""
    from zoo.config import run_command

    monkeypatch.syspath_prepend(ROOT)
    import eval as script

    def run(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, argv)])
        status = run_command(script.main)
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on loopback, which huggingface_hub takes for the one there is."""
    with Hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", Hub.TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()
