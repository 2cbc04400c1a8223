"""A report as plain text, and the words that the notebook table shares with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from knowiso_train.measurement.report import DIRECTIONS, PairResult, Report


def render_text(report: Report) -> str:
    """Aligned table: one row per layer pair, one block per direction."""
    orders = max((len(pair.shares) for pair in report.pairs), default=0)
    floor = any(pair.noise_floor is not None for pair in report.pairs)
    head = [
        "source layer",
        "target layer",
        *(f"order {k}" for k in range(orders)),
        "unexplained",
        "95 % interval",
        *(["noise floor"] if floor else []),
    ]
    blocks = [(direction, [_row(pair, orders, floor) for pair in pairs]) for direction, pairs in directions(report)]
    widths = [max(map(len, column)) for column in zip(head, *(row for _, rows in blocks for row in rows), strict=True)]
    rule = "─" * (sum(widths) + 2 * len(widths))
    lines = [headline(report), ""]
    for direction, rows in blocks:
        lines += [block_title(report, direction), _aligned(head, widths), rule, *(_aligned(row, widths) for row in rows), ""]
    if not report.pairs:
        lines += ["no layer pairs", ""]
    lines += footnotes(report)
    noted = warnings_of(report)
    return "\n".join(lines + ([""] + [f"! {note}" for note in noted] if noted else []))


def directions(report: Report) -> list[tuple[str, tuple[PairResult, ...]]]:
    """The directions that were measured, with their pairs."""
    return [(name, pairs) for name in DIRECTIONS if (pairs := getattr(report, name))]


def headline(report: Report) -> str:
    """Networks, numbers of images, settings, time."""
    counts = ", ".join(f"{count:,} to {role}" for role, count in report.images.items())
    parts = [f"{report.source} and {report.target}", f"images: {counts}", *_how(report), f"{report.seconds:.1f} s"]
    return " · ".join(parts)


def block_title(report: Report, direction: str) -> str:
    """What is explained from what."""
    explaining, explained = report.roles(direction)
    return f"{explained} explained from {explaining}"


def footnotes(report: Report) -> list[str]:
    """What the figures mean, in plain words."""
    if not report.pairs:
        return []
    lines = []
    if any(pair.additive for pair in report.pairs):
        lines.append("Order k: what k non-linear steps explain beyond k − 1, on held-out images. Shares and unexplained sum to 100 %.")
    if not all(pair.additive for pair in report.pairs):
        lines.append("Order k: variance of that component over the target's, as published. Components are correlated: they do not add up to 100 %.")
    if any(pair.noise_floor is not None for pair in report.pairs):
        lines.append("Noise floor: what still counts as explained when targets are shuffled between images.")
    return lines


def warnings_of(report: Report) -> list[str]:
    """Every warning with the pair that it is about."""
    return [f"{pair_name(pair)} ({pair.direction}): {note}" for pair in report.pairs for note in pair.warnings]


def pair_name(pair: PairResult) -> str:
    """One name where both layers have the same."""
    return pair.source if pair.source == pair.target else f"{pair.source} → {pair.target}"


def percent(share: float | None) -> str:
    """One decimal, no minus before zero, a dash for what is not known.

    Example:
        >>> percent(0.1234), percent(-0.0001), percent(None), percent(float("nan"))
        ('12.3 %', '0.0 %', '–', '–')
    """
    if share is None or math.isnan(share):
        return "–"
    return f"{100 * share:.1f} %" if abs(share) >= 0.0005 else "0.0 %"


def interval(bounds: tuple[float, float]) -> str:
    """Both ends of an interval."""
    if any(map(math.isnan, bounds)):
        return "–"
    low, high = bounds
    return f"{percent(low).removesuffix(' %')} … {percent(high)}"


def _row(pair: PairResult, orders: int, floor: bool) -> list[str]:
    shares = [percent(share) for share in pair.shares] + [""] * (orders - len(pair.shares))
    return [pair.source, pair.target, *shares, percent(pair.unexplained), interval(pair.interval), *([percent(pair.noise_floor)] if floor else [])]


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Names to the left, figures to the right."""
    return "".join(f"  {cell:<{width}}" if i < 2 else f"  {cell:>{width}}" for i, (cell, width) in enumerate(zip(cells, widths, strict=True)))


def _how(report: Report) -> list[str]:
    settings, parts = report.settings, []
    if "solver" in settings:
        parts.append({"closed_form": "closed form", "paper": "the paper's solver"}.get(settings["solver"], str(settings["solver"])))
    if kernel := settings.get("kernel_size"):
        parts.append(f"{kernel}×{kernel} maps")
    return parts
