"""Warnings of pairs that have no effect."""

from __future__ import annotations

import warnings

from knowiso_train.errors import KnowisoWarning
from knowiso_train.features.modules import LayerPair

MAX_UNSOLVED_CALLS = 200


class InactivityDetector:
    """Warnings of pairs without effect: in eval mode, behind frozen layers, or with too few samples; once per pair.

    Examples:
        >>> detector, pair = InactivityDetector(), LayerPair("layer2", "layer3")
        >>> detector.check(pair, training=True, solved=False, has_gradient=True, calls=5)
        >>> detector.warned
        set()
    """

    def __init__(self) -> None:
        self.warned: set[tuple[LayerPair, str]] = set()

    def check(self, pair: LayerPair, *, training: bool, solved: bool, has_gradient: bool, calls: int) -> None:
        """Warn if the loss of a pair has no effect in a call with gradient.

        Args:
            pair: Layer pair.
            training: Whether the loss is in training mode.
            solved: Whether the map of the pair is solved.
            has_gradient: Whether the student's feature carries a gradient.
            calls: Calls in training mode so far.
        """
        name = f"{pair.source} → {pair.target}"
        if not training and not solved:
            self._warn(
                (pair, "eval mode"),
                f"{name}: the loss is 0, since it is in eval mode and its map was not solved before. "
                "Call iso.train(), also after eval() of a module that contains the loss",
            )
        elif not has_gradient:
            self._warn(
                (pair, "frozen"),
                f"{name}: the loss is a constant, since no weight up to the student's layer {pair.source!r} is "
                "trained. Leave the pair out, or pair a later layer",
            )
        elif not solved and calls >= MAX_UNSOLVED_CALLS:
            self._warn(
                (pair, "samples"),
                f"{name}: the loss is still 0 after {calls} calls, since the batches hold too few samples for its map. "
                "Use larger batches, a layer with fewer channels or more positions, or a longer window",
            )

    def _warn(self, key: tuple[LayerPair, str], message: str) -> None:
        if key not in self.warned:
            self.warned.add(key)
            warnings.warn(message, KnowisoWarning, stacklevel=2)
