"""Layer pairs: names, checks of their grids, and the inputs of their maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from knowiso_train.distillation._student import StudentBatch
from knowiso_train.features.extractor import FeatureReader, align, check_line
from knowiso_train.features.modules import LayerPair, metric_name


def pair_key(pair: LayerPair) -> str:
    """Return the pair's key in a ModuleDict, which allows no dots."""
    return f"{pair.source}→{pair.target}".replace(".", "/")


def pair_label(pair: LayerPair, pairs: Sequence[LayerPair]) -> str:
    """Return the student's layer, followed by the teacher's if the former is in several pairs."""
    unique = sum(other.source == pair.source for other in pairs) == 1
    return metric_name(pair.source) if unique else pair.metric_name


def map_inputs(
    batch: StudentBatch, pair: LayerPair, feature: Tensor, targets: Sequence[Tensor], kernel_size: int
) -> list[Tensor]:
    """Return the inputs of the pair's map: the features of student, teacher and peers at common positions.

    Args:
        batch: Batch of the student, whose padded positions are left out.
        pair: Layer pair.
        feature: Feature of the student (N, C, H, W).
        targets: Features of the teacher and of the peers; their grid is the teacher's.
        kernel_size: Kernel size of the map.

    Raises:
        CaptureError: Padded positions that cannot be left out.
    """
    grid = (targets[0].shape[2], targets[0].shape[3])
    target, *peers = [align(other.to(feature.device), grid) for other in targets]
    inputs = [align(feature, grid), target, *([torch.cat(peers, 1)] if peers else [])]
    if batch.padding is None:
        # A view of its own, at which the loss may scale the gradient
        return [inputs[0].view_as(inputs[0]), *inputs[1:]]
    source_grid = (feature.shape[2], feature.shape[3])
    if not batch.padding.fits(grid, source_grid, kernel_size=kernel_size):
        raise batch.padding.misfit_error({pair.source: source_grid, pair.target: grid})
    # (N, C, H, W) → (1, C, 1, P) of the P valid positions
    return [batch.padding.rows(part).T[None, :, None] for part in inputs]


def check_grids(
    pair: LayerPair, feature: Tensor, target: Tensor, student: FeatureReader, teacher: FeatureReader
) -> None:
    """Check that both features of a pair have a grid, or both are lines, or one of them is a single position.

    Raises:
        LayoutError: A line on one side, a feature map on the other.
    """
    sides = (("student", student, pair.source, feature, target), ("teacher", teacher, pair.target, target, feature))
    for role, reader, name, line, other in sides:
        if name in reader.lines:
            check_line(line, other, f"{role}: layer {name!r}")
