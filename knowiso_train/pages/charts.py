"""Bars as inline SVG, and matrices as tables with colored cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from knowiso_train.pages.elements import Html, break_at_dots, cell_color, join

MIN_LABEL_PERCENT = 6.0  # segments narrower than this have no number
ROUND_STEPS, MAX_TICK_STEPS = (1.0, 2.0, 2.5, 5.0), 4  # distances of the axis' numbers, times a power of ten
MIN_AXIS_SHARE = 1e-3  # length of an axis of equal values
NARROW_PERCENT, WIDE_PERCENT = 0.0, 100.0
MAX_BARS = 24  # the others are folded

MarkKind = Literal["floor", "reference", "diamond"]


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
    """Mark on a bar: a line across it ("floor", "reference") or a diamond.

    Attributes:
        position: Share of the full width.
        hint: Tooltip, which names the mark and its number.
        kind: "floor", "reference" or "diamond".
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
        kind: "swatch", "interval", or that of a mark.
    """

    text: str
    color: str = ""
    kind: Literal["swatch", "interval"] | MarkKind = "swatch"


@dataclass(frozen=True)
class Axis:
    """Axis of shares.

    Attributes:
        low: Share at the left end.
        high: Share at the right end.
    """

    low: float = 0.0
    high: float = 1.0

    @classmethod
    def around(cls, shares: Sequence[float]) -> Axis:
        """Return the axis whose ends are the next round numbers around shares.

        Examples:
            >>> Axis.around([0.337, 0.401])
            Axis(low=0.32, high=0.42)
        """
        known = [share for share in shares if math.isfinite(share)] or [0.0]
        low, high = min(known), max(known)
        step = cls(low, max(high, low + MIN_AXIS_SHARE)).step
        low, high = step * math.floor(low / step), step * math.ceil(high / step)
        return cls(round(low, 9), round(max(high, low + step), 9))

    @property
    def step(self) -> float:
        """Smallest round distance of at most five numbers."""
        least = (self.high - self.low) / (MAX_TICK_STEPS + 1)
        power = 10.0 ** math.floor(math.log10(least))
        return next(step * power for step in (*ROUND_STEPS, 10.0, 20.0) if step * power > least * (1 + 1e-9))

    def ticks(self) -> list[float]:
        """Return the round numbers on the axis."""
        first, last = math.ceil(self.low / self.step - 1e-6), math.floor(self.high / self.step + 1e-6)
        return [i * self.step for i in range(first, last + 1)]

    def percent(self, share: float) -> float:
        """Return the place of a share as a percentage of the width; the left end for NaN."""
        position = WIDE_PERCENT * (share - self.low) / (self.high - self.low) if share == share else NARROW_PERCENT
        return min(max(position, NARROW_PERCENT), WIDE_PERCENT)


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
    axis = Axis(0.0, maximum)
    rows = join(_bar(bar, axis) for bar in bars)
    return Html(f'{legend(entries)}<div class="bars">{_axis(axis, text_title)}{rows}</div>')


def difference_bars(
    values: Sequence[tuple[str, float, str]], reference: float, reference_text: str, *, text_title: str
) -> Html:
    """Return horizontal bars from a reference to each value; those beyond the first 24 are folded.

    The axis ends at the next round numbers around the values.

    Args:
        values: Label, share and tooltip of each bar, from top to bottom.
        reference: Share at which the bars begin.
        reference_text: Text of the legend, which names the reference.
        text_title: Title of the numbers right of the bars.

    Examples:
        >>> html = difference_bars([("cat", 0.4, "cat: 40 %")], 0.3, "all images", text_title="unexplained")
        >>> html.count("<rect"), "all images: 30.0 %" in html
        (1, True)
    """
    axis = Axis.around([reference, *(share for _, share, _ in values)])
    mark = Mark(reference, text := f"{reference_text}: {100 * reference:.1f} %", "reference", "var(--ink)")
    rows = []
    for label, share, hint in values:
        color = "var(--above)" if share >= reference else "var(--below)"
        segment = Segment(min(share, reference), max(share, reference), hint, color)
        rows.append(_bar(Bar(label, (segment,), f"{100 * share:.1f} %", marks=(mark,)), axis))
    entries = [LegendEntry(text, kind="reference"), LegendEntry("more", "var(--above)")]
    entries += [LegendEntry("less", "var(--below)")] if any(share < reference for _, share, _ in values) else []
    shown, others = rows[:MAX_BARS], rows[MAX_BARS:]
    more = f'<details class="more"><summary>{len(others)} more</summary>{join(others)}</details>' if others else ""
    return Html(f'{legend(entries)}<div class="bars values">{_axis(axis, text_title)}{join(shown)}{more}</div>')


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


def _bar(bar: Bar, axis: Axis) -> Html:
    """Return the row of a bar: label, picture and number."""
    description = "; ".join(
        [part.hint for part in bar.segments] + [mark.hint for mark in bar.marks] + [bar.interval_hint]
    )
    inner = "".join(_segment(segment, axis) for segment in bar.segments)
    inner += "".join(_mark(mark, axis) for mark in bar.marks)
    # Above the marks, so that no line crosses a number
    inner += "".join(_segment_label(segment, axis) for segment in bar.segments)
    if bar.interval is not None and all(map(math.isfinite, bar.interval)):
        inner += _bracket(*bar.interval, bar.interval_hint, axis)
    small = f" <small>{escape(bar.small_text)}</small>" if bar.small_text else ""
    return Html(
        f'<div class="bar"><div class="bar-label">{break_at_dots(bar.label)}</div>'
        f'<svg role="img" aria-label="{escape(f"{bar.label}: {description}".strip(":; "))}">{inner}</svg>'
        f'<div class="bar-text">{escape(bar.text)}{small}</div></div>'
    )


def _segment(segment: Segment, axis: Axis) -> str:
    start, end = axis.percent(segment.start), axis.percent(segment.end)
    if end <= start:
        return ""
    style = f' style="fill:{escape(segment.color)}"' if segment.color else ' class="hatched"'
    return f'<rect x="{start:.2f}%" y="2" width="{end - start:.2f}%" height="20"{style}>{_title(segment.hint)}</rect>'


def _segment_label(segment: Segment, axis: Axis) -> str:
    """Return the number on a segment, with a halo of the segment's color; none on narrow segments."""
    start, end = axis.percent(segment.start), axis.percent(segment.end)
    if not segment.label or end - start < MIN_LABEL_PERCENT:
        return ""
    style = f"fill:{escape(segment.text_color)};stroke:{escape(segment.color) or 'var(--unexplained)'}"
    return f'<text class="value" x="{(start + end) / 2:.2f}%" y="16" style="{style}">{escape(segment.label)}</text>'


def _mark(mark: Mark, axis: Axis) -> str:
    x, color = f"{axis.percent(mark.position):.2f}%", escape(mark.color)
    if mark.kind == "diamond":
        return (
            f'<svg x="{x}" y="12" class="diamond"><path d="M0 -6L5 0L0 6L-5 0Z" style="fill:{color}">'
            f"{_title(mark.hint)}</path></svg>"
        )
    # Lines of references join those of the next bars
    top, bottom = (0, 24) if mark.kind == "floor" else (-3, 27)
    line = f'<line class="{mark.kind}" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}" style="stroke:{color}"/>'
    # A wider transparent line is easier to point at
    return f'<g>{_title(mark.hint)}{line}<line class="target" x1="{x}" x2="{x}" y1="0" y2="24"/></g>'


def _bracket(low: float, high: float, hint: str, axis: Axis) -> str:
    left, right = f"{axis.percent(low):.2f}%", f"{axis.percent(high):.2f}%"
    ends = "".join(f'<line x1="{x}" x2="{x}" y1="25" y2="31"/>' for x in (left, right))
    return f'<g class="bracket">{_title(hint)}<line x1="{left}" x2="{right}" y1="28" y2="28"/>{ends}</g>'


def _axis(axis: Axis, text_title: str) -> Html:
    ticks = axis.ticks()
    anchors = {NARROW_PERCENT: "first", WIDE_PERCENT: "last"}
    texts = "".join(
        f'<text x="{place:g}%" y="12" class="{anchors.get(round(place, 6), "")}">'
        f"{round(100 * tick, 6):g}{' %' if tick == ticks[-1] else ''}</text>"
        for tick in ticks
        for place in [axis.percent(tick)]
    )
    return Html(
        f'<div class="bar axis" aria-hidden="true"><div></div><svg>{texts}</svg>'
        f'<div class="bar-text">{escape(text_title)}</div></div>'
    )


def _title(hint: str) -> str:
    return f"<title>{escape(hint)}</title>" if hint else ""


def _legend_sign(entry: LegendEntry) -> str:
    if entry.kind == "swatch" and entry.color:
        return f'<span class="swatch" style="background:{escape(entry.color)}"></span>'
    style = f' style="color:{escape(entry.color)}"' if entry.color else ""
    return f'<span class="sign {"hatched" if entry.kind == "swatch" else entry.kind}"{style}></span>'
