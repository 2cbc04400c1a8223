"""Seeded hashes of image indices."""

from __future__ import annotations

import numpy as np

from knowiso_train.utils.hashing import split_by_hash


def test_split_has_the_given_fractions_and_depends_on_index_and_seed_alone() -> None:
    index = np.arange(20_000)
    parts = split_by_hash(index, (0.6, 0.3, 0.1), seed=1)
    np.testing.assert_allclose(np.bincount(parts, minlength=3) / len(index), [0.6, 0.3, 0.1], atol=0.01)
    np.testing.assert_array_equal(split_by_hash(index[5000:5100], (0.6, 0.3, 0.1), seed=1), parts[5000:5100])
    assert (split_by_hash(index, (0.6, 0.3, 0.1), seed=2) != parts).any()


def test_parts_of_fraction_zero_are_empty() -> None:
    assert set(split_by_hash(np.arange(1000), (0.0, 1.0), seed=0)) == {1}
    assert set(split_by_hash(np.arange(1000), (0.5, 0.0, 0.5), seed=0)) == {0, 2}
