"""Seeded hashes of image indices."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Stream(IntEnum):
    """Independent streams of random numbers of one seed, one for each purpose; eight at most."""

    SPLIT = 0  # of images into fit, select and report
    SAMPLE_ORDER = 1  # in which a bounded sample takes images
    POSITIONS = 2  # drawn in each image
    BOOTSTRAP = 3  # weights of the images in each replicate
    # The same numbers as BOOTSTRAP. A peer's score permutes images and draws no replicates.
    PERMUTATION = 3
    CROP_TOP = 4
    CROP_LEFT = 5
    SUBSET = 6  # of a loader's images, where `max_images` limits them


def hash_unit(index: NDArray[np.int64], seed: int, stream: int = Stream.SPLIT) -> NDArray[np.float64]:
    """Return a uniform number in [0, 1) for each index (SplitMix64), independent between seeds and between streams.

    Examples:
        >>> bool((hash_unit(np.arange(1000), seed=0) < 0.6).mean().round(1) == 0.6)
        True
    """
    with np.errstate(over="ignore"):
        # The state of SplitMix64 advances by the golden ratio times an odd number; seed and stream choose that number
        z = index.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(
            1 + 2 * (seed * 8 + stream) & 0xFFFFFFFF
        )
        # Finalizer: two rounds of xorshift and multiplication, and a last xorshift
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        z ^= z >> np.uint64(31)
    # The upper 53 bits are the mantissa of a double
    return np.asarray((z >> np.uint64(11)).astype(np.float64) / 2.0**53)


def split_by_hash(index: NDArray[np.int64], fractions: Sequence[float], seed: int) -> NDArray[np.int64]:
    """Assign each index to a part of a hold-out split by its hash, independent of order and of the other indices.

    Args:
        index: (N,) dataset indices.
        fractions: Expected size of each part. Sum 1.
        seed: Seed of the hash.

    Returns:
        (N,) number of each index's part.

    Examples:
        >>> np.bincount(split_by_hash(np.arange(1000), (0.6, 0.2, 0.2), seed=0)).tolist()
        [600, 208, 192]
    """
    boundaries = np.cumsum(fractions)[:-1]
    return np.searchsorted(boundaries, hash_unit(index, seed), side="right").astype(np.int64)
