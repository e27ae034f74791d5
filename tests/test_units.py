"""Large numbers, for people and from them."""

from __future__ import annotations

import pytest

from zoo.units import humanize, parse_quantity


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.6, "1.00K"),
        (1000, "1.00K"),
        (9999, "10.0K"),
        (11_915_176, "11.9M"),
        (99_960_000, "100M"),
        (999_700_000, "1.00G"),
        (1_812_267_008, "1.81G"),
        (2.3e14, "230T"),
        (2.3e15, "2300T"),
    ],
)
def test_large_numbers_for_people(number, text):
    assert humanize(number) == text


@pytest.mark.parametrize(
    ("text", "number"),
    [("6e6", 6e6), ("6M", 6e6), ("1.2G", 1.2e9), ("1.2g", 1.2e9), (".5k", 500), ("7", 7), ("-1T", -1e12), (" 3 ", 3)],
)
def test_large_numbers_from_people(text, number):
    assert parse_quantity(text) == pytest.approx(number)


@pytest.mark.parametrize("text", ["", "M", "6B", "6 M", "1,200", "nan", "inf", "1e", "0x10"])
def test_what_is_no_number(text):
    with pytest.raises(ValueError, match="is not a number such as"):
        parse_quantity(text)
