"""Fixtures of several test files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

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
