"""Accuracy, calibration and significance of differences."""

from __future__ import annotations

import pytest
import torch

from knowiso_train.errors import ShapeError
from knowiso_train.refinement._metrics import (
    PairedCV,
    Score,
    _folds,
    best_temperature,
    classification_score,
    significantly_less,
)


def test_calibration_error_is_the_gap_of_confidence_and_accuracy() -> None:
    logits = torch.tensor([[2.0, 0.0]] * 4)
    labels = torch.tensor([0, 0, 0, 1])
    confidence = float(torch.tensor(2.0).sigmoid())
    assert classification_score(logits, labels).ece == pytest.approx(100 * abs(0.75 - confidence), abs=1e-4)
    temperature = best_temperature(logits, labels)
    assert float((logits[0] / temperature).softmax(0)[0]) == pytest.approx(0.75, abs=0.02)


def test_logits_and_labels_of_different_lengths_raise() -> None:
    with pytest.raises(ShapeError, match="expected logits"):
        classification_score(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long))


def test_a_drop_is_significant_beyond_two_standard_errors() -> None:
    before = Score(50.0, 0.0, 100)  # standard error 5 points
    assert significantly_less(Score(39.9, 0.0, 100), before)
    assert not significantly_less(Score(40.1, 0.0, 100), before)
    assert significantly_less(Score(97.9, 0.0, 100), Score(100.0, 0.0, 100))


def test_a_paired_difference_is_significant_beyond_one_and_a_half_standard_errors() -> None:
    differences = torch.tensor([1.0] * 6 + [0.0] * 94)
    cv = PairedCV.from_differences(differences)
    assert cv.gain == pytest.approx(6.0)
    assert cv.std_error == pytest.approx(float(100 * differences.std() / 10))
    assert cv.significantly_better
    assert not cv.significantly_worse
    assert PairedCV(-1.6, 1.0).significantly_worse
    assert not PairedCV(-1.4, 1.0).significantly_worse
    assert not PairedCV(1.4, 1.0).significantly_better


def test_folds_are_a_stratified_partition() -> None:
    labels = torch.arange(60) % 4
    folds = list(_folds(labels, seed=0))
    assert len(folds) == 5
    assert sorted(torch.cat([test for test, _ in folds]).tolist()) == list(range(60))
    for test, train in folds:
        assert not train[test].any()
        assert int(train.sum()) == 48
        assert torch.bincount(labels[test], minlength=4).tolist() == [3, 3, 3, 3]
