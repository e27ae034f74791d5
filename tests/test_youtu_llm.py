"""Youtu-LLM, held to what the published code computes."""

from __future__ import annotations

import pytest

from tests import golden
from tests.language import check_golden


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.names("youtu_llm"))
def test_golden(name: str):
    check_golden("youtu_llm", name, depth=int(name.partition("@")[2][0]))
