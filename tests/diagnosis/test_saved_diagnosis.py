"""Saved diagnoses whose values do not fit each other."""

from __future__ import annotations

import pytest

from knowiso_train.diagnosis import Diagnosis
from knowiso_train.errors import FormatError
from tests.helpers.diagnoses import diagnosis


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("channels",), "one value per channel"),
        (("positions", 0), "'positions': expected rows of one length"),
        (("position_variances", 0), "'position_variances': expected rows of one length"),
        (("images", 0, "heat_map", 0), "'heat_map': expected rows of one length"),
        (("directions", 0, "weights"), "one weight per channel"),
    ],
)
def test_lists_of_unequal_lengths_are_named(path: tuple[str | int, ...], message: str) -> None:
    saved = diagnosis().to_dict()
    assert Diagnosis.from_dict(saved) == diagnosis()
    values = saved["layers"][0]
    for key in path:
        values = values[key]
    del values[0]
    with pytest.raises(FormatError, match=message):
        Diagnosis.from_dict(saved)


def test_negative_classes_are_named() -> None:
    saved = diagnosis().to_dict()
    saved["layers"][0]["classes"][0]["label"] = -1
    with pytest.raises(FormatError, match="a class of at least 0"):
        Diagnosis.from_dict(saved)
