"""MobileLLM and its successors, held to what the published code computes."""

from __future__ import annotations

from typing import Any

import pytest

from tests import golden
from tests.language import check_golden

FAST = ("mobilellm_ls_125m",)


def _args(name: str) -> dict[str, Any]:
    base, _, reduced = name.partition("@")
    if not reduced:
        return {}
    args: dict[str, Any] = {"depth": 4}
    if "_ls_" in base:
        args["layer_map"] = (0, 0, 1, 1, 2, 2, 3, 3)
    if reduced.endswith("noqknorm"):
        args["qk_norm"] = False
    return args


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in golden.names("mobilellm")]
)
def test_golden(name: str):
    check_golden("mobilellm", name, **_args(name))
