"""Second moments, samples and ridge regression."""

from knowiso_train.regression.explained_variance import ResidualStatistics, ShareEstimate
from knowiso_train.regression.moments import Moments, RunningMoments, StreamingMoments, batch_moments
from knowiso_train.regression.sampling import FeatureSample, Sample, sample_positions

__all__ = [
    "FeatureSample",
    "Moments",
    "ResidualStatistics",
    "RunningMoments",
    "Sample",
    "ShareEstimate",
    "StreamingMoments",
    "batch_moments",
    "sample_positions",
]
