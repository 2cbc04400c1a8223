"""Pairing of stages for layers="auto"."""

from __future__ import annotations

from knowiso_train.distillation.layer_selection import pair_stages


def test_equal_grids_are_paired_by_relative_depth() -> None:
    student = {"a": (8, 8), "b": (8, 8)}
    teacher = {"1": (8, 8), "2": (8, 8), "3": (8, 8), "4": (8, 8)}
    assert pair_stages(student, teacher) == [("a", "2"), ("b", "4")]


def test_the_nearest_grid_precedes_the_nearest_depth() -> None:
    student = {"a": (16, 16), "b": (4, 4)}
    teacher = {"1": (4, 4), "2": (5, 5), "3": (14, 14)}
    assert pair_stages(student, teacher) == [("a", "3"), ("b", "1")]


def test_a_teacher_without_stages_has_no_pairs() -> None:
    assert pair_stages({"a": (8, 8)}, {}) == []
