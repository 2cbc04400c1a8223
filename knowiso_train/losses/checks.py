"""What a pair's features have to be, in every call."""

from __future__ import annotations

from torch import Tensor

from knowiso_train.errors import LayoutError, NonFiniteError
from knowiso_train.features import LayerPair
from knowiso_train.losses.reader import FeatureReader


def check_grids(pair: LayerPair, feature: Tensor, target: Tensor, of_student: FeatureReader, of_teacher: FeatureReader) -> None:
    """Raises:
    LayoutError: tokens without a known grid on one side, a map on the other.
    """
    sides = (("student", of_student, pair.source, feature, target), ("teacher", of_teacher, pair.target, target, feature))
    for role, reader, name, own, other in sides:
        if name in reader.without_grid and min(other.shape[2:]) > 1:
            raise LayoutError(
                f"{role}: the {own.shape[2]} tokens of layer {name!r} form no grid that is known, so they have no place on the other "
                f"network's of {other.shape[2]} × {other.shape[3]}: tokens that are dropped or merged (patch_drop_rate), or images of a size "
                "that the network does not name. Train without dropping, or pair a pooled layer."
            )


def check_finite(pair: LayerPair, loss: Tensor, feature: Tensor, target: Tensor, step: int) -> None:
    """Reads the loss.

    Raises:
        NonFiniteError: NaN or Inf; the message names layer and step.
    """
    if not bool(loss.detach().isfinite()):
        counts = [
            f"{role} {name!r}: {int((~x.isfinite()).sum())} of {x.numel()} values"
            for role, name, x in (("student's", pair.source, feature.detach()), ("teacher's", pair.target, target))
        ]
        raise NonFiniteError(
            f"NaN or Inf in the isomorphism loss at step {step} (counted from 0): {'; '.join(counts)} are not finite. "
            "Nothing was accumulated from that batch. Check learning rate, images and the autocast dtype."
        )
