"""Measurements of one training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from knowiso_train.errors import FormatError
from knowiso_train.measurement.report import PairResult, Report


class Measurement(NamedTuple):
    """One measurement: the number of training steps before it, and its report (without the fitted maps).

    Example:
        >>> from knowiso_train.measurement import Report
        >>> Measurement(500, Report("a", "b", (), {}, {}, 0.1, {})).figures
        {}
    """

    step: int
    report: Report

    @property
    def figures(self) -> dict[str, float]:
        """Flat, as trackers take them: `iso/val/<source>→<target>/share` (explained), `/noise_floor`, `/order_<k>` where there are several."""
        return {f"{label(pair)}/{name}": value for pair in self.report for name, value in _of_pair(pair).items()}


def label(pair: PairResult) -> str:
    """Prefix of a pair's figures."""
    return f"iso/val/{pair.source}→{pair.target}{'' if pair.direction == 'forward' else '/backward'}"


def without_maps(report: Report) -> Report:
    """The report alone; fitted maps of every measurement would fill the memory."""
    return replace(report, pairs=tuple(replace(pair, disentangler=None) for pair in report))


def to_plain(history: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Dicts, lists, numbers and text: what `torch.load(weights_only=True)` reads."""
    return [{"step": measured.step, "report": measured.report.to_dict()} for measured in history]


def from_plain(values: Any) -> list[Measurement]:
    """The inverse of `to_plain`.

    Raises:
        FormatError: other values.
    """
    if not isinstance(values, list) or not all(
        isinstance(entry, Mapping) and set(entry) == {"step", "report"} for entry in values
    ):
        raise FormatError(
            "expected the history that IsomorphismCallback.state_dict gave, a list of {'step': …, 'report': …}; got something else"
        )
    return [Measurement(int(entry["step"]), Report.from_dict(entry["report"])) for entry in values]


def to_rows(history: Sequence[Measurement]) -> list[dict[str, float]]:
    """Return one flat row per measurement: its step and its figures."""
    return [{"step": measured.step, **measured.figures} for measured in history]


def _of_pair(pair: PairResult) -> dict[str, float]:
    figures = {"share": pair.explained}
    if len(pair.shares) > 1:
        figures |= {f"order_{order}": share for order, share in enumerate(pair.shares)}
    if pair.noise_floor is not None:
        figures["noise_floor"] = pair.noise_floor
    return figures
