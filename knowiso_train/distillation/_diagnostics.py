"""Warnings of pairs that have no effect."""

from __future__ import annotations

import warnings

from knowiso_train.errors import KnowisoWarning
from knowiso_train.features.modules import LayerPair

MAX_UNSOLVED_CALLS = 200
# Consecutive refreshes with a learned map that explains nothing, before the warning
MAX_USELESS_REFRESHES = 20


class InactivityDetector:
    """Warnings of pairs without effect: in eval mode, behind frozen layers, too few samples, a map that diverges.

    Each is issued once per pair.

    Examples:
        >>> detector, pair = InactivityDetector(), LayerPair("layer2", "layer3")
        >>> detector.check(pair, training=True, solved=False, has_gradient=True, calls=5)
        >>> detector.warned
        set()
    """

    def __init__(self) -> None:
        self.warned: set[tuple[LayerPair, str]] = set()
        self.num_useless: dict[LayerPair, int] = {}

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

    def check_learned_map(self, pair: LayerPair, unexplained: float) -> None:
        """Warn if the learned map of a pair explains nothing, refresh after refresh.

        Args:
            pair: Layer pair.
            unexplained: Unexplained share of the batch of a refresh.
        """
        self.num_useless[pair] = self.num_useless.get(pair, 0) + 1 if unexplained >= 1 else 0
        if self.num_useless[pair] >= MAX_USELESS_REFRESHES:
            self._warn(
                (pair, "learned map"),
                f"{pair.source} → {pair.target}: the learned map explains nothing, and the student gets no gradient: "
                f"the unexplained share is at least 1 in {MAX_USELESS_REFRESHES} refreshes, now {unexplained:.3g}. "
                "Give the parameters of the loss a lower learning rate, in a parameter group of their own, or use "
                'solver="closed_form"',
            )

    def _warn(self, key: tuple[LayerPair, str], message: str) -> None:
        if key not in self.warned:
            self.warned.add(key)
            warnings.warn(message, KnowisoWarning, stacklevel=2)
