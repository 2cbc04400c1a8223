"""Bars as inline SVG, and matrices as tables with colored cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from knowiso_train.pages.elements import Html, break_at_dots, cell_color, join

MIN_LABEL_PERCENT = 6.0  # segments narrower than this have no number
TICK_SHARE, MAX_TICK_STEPS = 0.25, 5  # distance of the axis' numbers, doubled until there are few enough
NARROW_PERCENT, WIDE_PERCENT = 0.0, 100.0
MAX_BARS = 24  # the others are folded

MarkKind = Literal["floor", "diamond"]


@dataclass(frozen=True)
class Segment:
    """Colored part of a bar.

    Attributes:
        start: Left end, a share of the full width.
        end: Right end.
        hint: Tooltip, which names the part and its number.
        color: CSS color. Empty: hatched, for what is unexplained.
        label: Number on the segment; hidden where the segment is narrow. Empty: none.
        text_color: CSS color of the label.
    """

    start: float
    end: float
    hint: str
    color: str = ""
    label: str = ""
    text_color: str = "var(--ink)"


@dataclass(frozen=True)
class Mark:
    """Mark on a bar: a line across it ("floor") or a diamond.

    Attributes:
        position: Share of the full width.
        hint: Tooltip, which names the mark and its number.
        kind: "floor" or "diamond".
        color: CSS color.
    """

    position: float
    hint: str
    kind: MarkKind = "floor"
    color: str = "var(--floor)"


@dataclass(frozen=True)
class Bar:
    """Bar of a chart.

    Attributes:
        label: Text left of the bar.
        segments: Parts from left to right.
        text: Number right of the bar.
        small_text: Muted text behind that number. Empty: none.
        interval: Ends of a bracket below the bar. None: no bracket.
        interval_hint: Tooltip of the bracket.
        marks: Marks on the bar.
    """

    label: str
    segments: tuple[Segment, ...]
    text: str
    small_text: str = ""
    interval: tuple[float, float] | None = None
    interval_hint: str = ""
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class LegendEntry:
    """Entry of a legend.

    Attributes:
        text: Text of the entry.
        color: CSS color of its swatch. Empty: hatched.
        kind: "swatch", "floor", "diamond", or "interval".
    """

    text: str
    color: str = ""
    kind: Literal["swatch", "floor", "diamond", "interval"] = "swatch"


def legend(entries: Sequence[LegendEntry]) -> Html:
    """Return a legend in one line, or in several on narrow screens.

    Examples:
        >>> legend([LegendEntry("explained", "#16325b")]).count("<li>")
        1
    """
    items = "".join(f"<li>{_legend_sign(entry)}{escape(entry.text)}</li>" for entry in entries)
    return Html(f'<ul class="legend">{items}</ul>')


def stacked_edges(shares: Sequence[float], end: float) -> list[tuple[float, float]]:
    """Return the left and right ends of stacked shares, within 0 and the end of the bar.

    Shares on held-out images can be negative, and then have no width. NaN has no width either.

    Examples:
        >>> stacked_edges([0.5, -0.1, 0.25], end=0.65)
        [(0.0, 0.5), (0.5, 0.5), (0.5, 0.65)]
    """
    edges, left = [], 0.0
    for share in shares:
        right = left if math.isnan(share) else clip(min(left + max(share, 0.0), end))
        edges.append((left, max(left, right)))
        left = max(left, right)
    return edges


def clip(share: float) -> float:
    """Return a share within 0 and 1; NaN becomes 0.

    Examples:
        >>> clip(-0.2), clip(1.5), clip(math.nan)
        (0.0, 1.0, 0.0)
    """
    return 0.0 if math.isnan(share) else min(max(share, 0.0), 1.0)


def stacked_bars(bars: Sequence[Bar], entries: Sequence[LegendEntry], *, text_title: str, maximum: float = 1.0) -> Html:
    """Return horizontal stacked bars with a legend and an axis in percent.

    Args:
        bars: Bars from top to bottom.
        entries: Entries of the legend.
        text_title: Title of the numbers right of the bars.
        maximum: Share at the right end of the axis.

    Examples:
        >>> bar = Bar("layer3", (Segment(0.0, 0.6, "order 0: 60 %", "#16325b"), Segment(0.6, 1.0, "rest")), "40 %")
        >>> stacked_bars([bar], [LegendEntry("order 0", "#16325b")], text_title="unexplained").count("<rect")
        2
    """
    rows = join(_bar(bar, maximum) for bar in bars)
    return Html(f'{legend(entries)}<div class="bars">{_axis(maximum, text_title)}{rows}</div>')


def value_bars(bars: Sequence[Bar], *, text_title: str, maximum: float) -> Html:
    """Return horizontal bars of single values; those beyond the first 24 are folded.

    Args:
        bars: Bars from top to bottom, with ends as shares of 1.
        text_title: Title of the numbers right of the bars.
        maximum: Value at the right end of the axis.

    Examples:
        >>> value_bars([Bar("cat", (Segment(0, 0.3, "cat: 30 %", "#227b94"),), "30 %")], text_title="share", maximum=1)
        ... # doctest: +ELLIPSIS
        '<div class="bars values">...'
    """
    shown, others = ([_bar(bar, maximum) for bar in part] for part in (bars[:MAX_BARS], bars[MAX_BARS:]))
    more = f'<details class="more"><summary>{len(others)} more</summary>{join(others)}</details>' if others else ""
    return Html(f'<div class="bars values">{_axis(maximum, text_title)}{join(shown)}{more}</div>')


def matrix(
    caption: str, names: Sequence[str], values: Sequence[Sequence[float | None]], texts: Sequence[Sequence[str]]
) -> Html:
    """Return a square table whose cells are colored by their values between 0 and 1.

    Args:
        caption: Text that names rows and columns, above the table.
        names: Names of the rows, and of the columns.
        values: Value of each row and column; values beyond 0 and 1 are clipped. None or NaN: not colored.
        texts: Text of each row and column.

    Raises:
        ValueError: Another number of values or texts than names.

    Examples:
        >>> values, texts = [[None, 0.5], [0.25, None]], [["", "50 %"], ["25 %", ""]]
        >>> matrix("explained", ["a", "b"], values, texts).count("--strength")
        2
    """
    heads = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in names)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(_matrix_cell(value, text) for value, text, _ in zip(row, row_texts, names, strict=True))
        + "</tr>"
        for name, row, row_texts in zip(names, values, texts, strict=True)
    )
    return Html(
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table class="matrix">'
        f"<caption>{escape(caption)}</caption><thead><tr><td></td>{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _matrix_cell(value: float | None, text: str) -> str:
    return f"<td{cell_color(value)}>{escape(text)}</td>"


def _bar(bar: Bar, maximum: float) -> Html:
    """Return the row of a bar: label, picture and number."""
    description = "; ".join(
        [part.hint for part in bar.segments] + [mark.hint for mark in bar.marks] + [bar.interval_hint]
    )
    inner = "".join(_segment(segment, maximum) for segment in bar.segments)
    inner += "".join(_mark(mark, maximum) for mark in bar.marks)
    if bar.interval is not None and all(map(math.isfinite, bar.interval)):
        inner += _bracket(*bar.interval, bar.interval_hint, maximum)
    small = f" <small>{escape(bar.small_text)}</small>" if bar.small_text else ""
    return Html(
        f'<div class="bar"><div class="bar-label">{break_at_dots(bar.label)}</div>'
        f'<svg role="img" aria-label="{escape(f"{bar.label}: {description}".strip(":; "))}">{inner}</svg>'
        f'<div class="bar-text">{escape(bar.text)}{small}</div></div>'
    )


def _segment(segment: Segment, maximum: float) -> str:
    start, end = _percent(segment.start, maximum), _percent(segment.end, maximum)
    if end <= start:
        return ""
    style = f' style="fill:{escape(segment.color)}"' if segment.color else ' class="hatched"'
    rect = f'<rect x="{start:.2f}%" y="2" width="{end - start:.2f}%" height="20"{style}>{_title(segment.hint)}</rect>'
    if not segment.label or end - start < MIN_LABEL_PERCENT:
        return rect
    # On hatched ground a halo of the ground's color keeps the number readable
    kind = "value" if segment.color else "value halo"
    style = f"fill:{escape(segment.text_color)}"
    return (
        f'{rect}<text class="{kind}" x="{(start + end) / 2:.2f}%" y="16" style="{style}">{escape(segment.label)}</text>'
    )


def _mark(mark: Mark, maximum: float) -> str:
    x, color = f"{_percent(mark.position, maximum):.2f}%", escape(mark.color)
    if mark.kind == "floor":
        line = f'<line class="floor" x1="{x}" x2="{x}" y1="0" y2="24" style="stroke:{color}"/>'
        # A wider transparent line is easier to point at
        return f'<g>{_title(mark.hint)}{line}<line class="target" x1="{x}" x2="{x}" y1="0" y2="24"/></g>'
    return (
        f'<svg x="{x}" y="12" class="diamond"><path d="M0 -6L5 0L0 6L-5 0Z" style="fill:{color}">'
        f"{_title(mark.hint)}</path></svg>"
    )


def _bracket(low: float, high: float, hint: str, maximum: float) -> str:
    left, right = f"{_percent(low, maximum):.2f}%", f"{_percent(high, maximum):.2f}%"
    ends = "".join(f'<line x1="{x}" x2="{x}" y1="25" y2="31"/>' for x in (left, right))
    return f'<g class="bracket">{_title(hint)}<line x1="{left}" x2="{right}" y1="28" y2="28"/>{ends}</g>'


def _axis(maximum: float, text_title: str) -> Html:
    step = TICK_SHARE
    while maximum > MAX_TICK_STEPS * step:
        step *= 2
    ticks = [step * i for i in range(MAX_TICK_STEPS + 1) if step * i <= maximum]
    anchors = {0.0: "first", maximum: "last"}
    texts = "".join(
        f'<text x="{_percent(tick, maximum):g}%" y="12" class="{anchors.get(tick, "")}">'
        f"{100 * tick:g}{' %' if tick == ticks[-1] else ''}</text>"
        for tick in ticks
    )
    return Html(
        f'<div class="bar axis" aria-hidden="true"><div></div><svg>{texts}</svg>'
        f'<div class="bar-text">{escape(text_title)}</div></div>'
    )


def _percent(share: float, maximum: float) -> float:
    """Return a share as a percentage of the width of the chart."""
    position = WIDE_PERCENT * share / maximum if maximum > 0 and not math.isnan(share) else NARROW_PERCENT
    return min(max(position, NARROW_PERCENT), WIDE_PERCENT)


def _title(hint: str) -> str:
    return f"<title>{escape(hint)}</title>" if hint else ""


def _legend_sign(entry: LegendEntry) -> str:
    if entry.kind == "swatch" and entry.color:
        return f'<span class="swatch" style="background:{escape(entry.color)}"></span>'
    style = f' style="color:{escape(entry.color)}"' if entry.color else ""
    return f'<span class="sign {"hatched" if entry.kind == "swatch" else entry.kind}"{style}></span>'
