"""History of the measurements of one training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from knowiso_train.errors import FormatError
from knowiso_train.features.modules import LayerPair
from knowiso_train.measurement.report import PairResult, Report


class Measurement(NamedTuple):
    """Training step and report of one measurement, without the fitted maps.

    Attributes:
        step: Number of training steps before the measurement.
        report: Report of the measurement.

    Examples:
        >>> from knowiso_train.measurement import Report
        >>> Measurement(500, Report("a", "b", (), {}, {}, 0.1, {})).metrics
        {}
    """

    step: int
    report: Report

    @property
    def metrics(self) -> dict[str, float]:
        """Flat metrics for experiment trackers.

        Names are `iso/val/<source>-to-<target>/share` (explained by all orders), `…/noise_floor` and, for several
        orders, `…/order_<k>`.
        """
        return {
            f"{metric_prefix(pair)}/{name}": value
            for pair in self.report
            for name, value in _pair_metrics(pair).items()
        }


def metric_prefix(pair: PairResult) -> str:
    """Return the prefix of the metric names of a pair."""
    name = LayerPair(pair.source, pair.target).metric_name
    return f"iso/val/{name}{'' if pair.direction == 'forward' else '/backward'}"


def without_maps(report: Report) -> Report:
    """Return a report without the fitted maps, to limit the memory of the history."""
    return replace(report, pairs=tuple(replace(pair, disentangler=None) for pair in report))


def to_plain(history: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Return the history as dicts, lists, numbers and text, for `torch.load(weights_only=True)`."""
    return [{"step": measurement.step, "report": measurement.report.to_dict()} for measurement in history]


def from_plain(values: Any) -> list[Measurement]:
    """Return the history of `to_plain`.

    Raises:
        FormatError: Other values.
    """
    if not isinstance(values, list) or not all(
        isinstance(entry, Mapping) and set(entry) == {"step", "report"} for entry in values
    ):
        raise FormatError(
            "expected the history of IsomorphismCallback.state_dict, a list of {'step': …, 'report': …}, "
            f"got {type(values).__name__} with other content"
        )
    return [Measurement(int(entry["step"]), Report.from_dict(entry["report"])) for entry in values]


def to_rows(history: Sequence[Measurement]) -> list[dict[str, float]]:
    """Return one flat row of step and metrics per measurement."""
    return [{"step": measurement.step, **measurement.metrics} for measurement in history]


def _pair_metrics(pair: PairResult) -> dict[str, float]:
    metrics = {"share": pair.explained}
    if len(pair.shares) > 1:
        metrics |= {f"order_{order}": share for order, share in enumerate(pair.shares)}
    if pair.noise_floor is not None:
        metrics["noise_floor"] = pair.noise_floor
    return metrics
