"""Moments of feature pairs, the split of the images, and what is reported per image."""

from knowiso_train.statistics.distributed import Group
from knowiso_train.statistics.hashing import hash_unit
from knowiso_train.statistics.moments import Moments, StreamingMoments, batch_moments
from knowiso_train.statistics.residuals import ResidualStatistics, ShareEstimate
from knowiso_train.statistics.running import RunningMoments
from knowiso_train.statistics.sample import FeatureSample, Sample, sample_positions

__all__ = [
    "FeatureSample",
    "Group",
    "Moments",
    "ResidualStatistics",
    "RunningMoments",
    "Sample",
    "ShareEstimate",
    "StreamingMoments",
    "batch_moments",
    "hash_unit",
    "sample_positions",
]
