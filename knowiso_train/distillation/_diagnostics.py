"""Warnings of pairs that have no effect."""

from __future__ import annotations

import warnings

from knowiso_train.errors import KnowisoWarning
from knowiso_train.features.modules import LayerPair

# Calls without a solved map, and calls with a learned map that explains nothing, before the warning
MAX_UNSOLVED_CALLS = MAX_USELESS_CALLS = 200


class InactivityDetector:
    """Warnings of pairs without effect, once per pair.

    The reasons are eval mode, frozen layers, too few samples, or a learned map that explains nothing.

    Examples:
        >>> detector, pair = InactivityDetector(), LayerPair("layer2", "layer3")
        >>> detector.check(pair, training=True, solved=False, has_gradient=True, calls=5)
        >>> detector.warned
        set()
    """

    def __init__(self) -> None:
        self.warned: set[tuple[LayerPair, str]] = set()
        self.useless_since: dict[LayerPair, int] = {}

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

    def check_learned_map(self, pair: LayerPair, unexplained: float, calls: int) -> None:
        """Warn if the learned map of a pair explains nothing for many calls.

        Args:
            pair: Layer pair.
            unexplained: Unexplained share of the batch of this call.
            calls: Calls in training mode so far.
        """
        if unexplained < 1:
            self.useless_since.pop(pair, None)
        elif calls - self.useless_since.setdefault(pair, calls) >= MAX_USELESS_CALLS:
            self._warn(
                (pair, "learned map"),
                f"{pair.source} → {pair.target}: the learned map explains nothing: its unexplained share is at least 1 "
                f"since {MAX_USELESS_CALLS} calls, and is now {unexplained:.3g}. In log scale the student gets no "
                "gradient from this pair. Check that the optimizer holds iso.parameters(), lower their learning rate "
                'in a parameter group of their own, or use solver="closed_form"',
            )

    def _warn(self, key: tuple[LayerPair, str], message: str) -> None:
        if key not in self.warned:
            self.warned.add(key)
            warnings.warn(message, KnowisoWarning, stacklevel=2)
