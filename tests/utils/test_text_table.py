"""Tests of the text-table printer."""

from __future__ import annotations

import pytest

from knowiso_train.utils.text_table import format_table

ROWS = [["layer", "inputs", "note"], ["a", "1", "first"], ["bc", "20", ""]]


def test_columns_are_aligned_and_end_without_spaces() -> None:
    assert format_table(ROWS).split("\n") == ["layer  inputs   note", "a           1  first", "bc         20"]


def test_left_columns_may_be_counted_from_the_end() -> None:
    assert format_table(ROWS, left=(0, -1)).split("\n")[0] == "layer  inputs  note"
    assert format_table(ROWS, left=()).split("\n")[1] == "    a       1  first"


def test_the_rule_is_as_wide_as_the_indented_table() -> None:
    lines = format_table(ROWS, rule=True, indent="  ").split("\n")
    assert lines[1] == "─" * len(lines[2])
    assert lines[2] == "  a           1  first"


def test_rows_of_different_lengths_raise() -> None:
    with pytest.raises(ValueError, match="zip"):
        format_table([["a", "b"], ["c"]])


def test_no_rows_give_no_text() -> None:
    assert format_table([]) == ""
