"""Text and HTML tables of a report."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from knowiso_train.utils.text_table import format_table

if TYPE_CHECKING:
    from knowiso_train.measurement.report import PairResult, Report

DIRECTIONS = ("forward", "backward")

ORDER_COLORS = ("#16325b", "#227b94", "#6cbf9c", "#d3e59b")
UNEXPLAINED_COLOR = "#ececec"
HATCH_COLOR = "#bdbdbd"
NOISE_FLOOR_COLOR = "#d1495b"
TEXT_COLOR = "#222222"
MUTED_COLOR = "#6b6b6b"

_CELL = "padding:3px 10px;border:0;background:none;white-space:nowrap;"
_LEFT, _RIGHT = f"{_CELL}text-align:left;", f"{_CELL}text-align:right;font-variant-numeric:tabular-nums;"
_HATCH = (
    f"repeating-linear-gradient(45deg,{UNEXPLAINED_COLOR},{UNEXPLAINED_COLOR} 4px,{HATCH_COLOR} 4px,{HATCH_COLOR} 5px)"
)


def order_colors(count: int) -> list[str]:
    """One color per order: the first of the sequence while they last, stretched over all of it for more.

    Example:
        >>> order_colors(2)
        ['#16325b', '#227b94']
    """
    if count <= len(ORDER_COLORS):
        return list(ORDER_COLORS[:count])
    last = len(ORDER_COLORS) - 1
    colors = []
    for i in range(count):
        at = i * last / (count - 1)
        left = min(int(at), last - 1)
        colors.append(_between(ORDER_COLORS[left], ORDER_COLORS[left + 1], at - left))
    return colors


def text_color_on(color: str) -> str:
    """Black or white, whichever reads better on a color."""
    red, green, blue = _channels(color)
    return "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else TEXT_COLOR


def _between(a: str, b: str, share: float) -> str:
    return "#" + "".join(f"{round(x + (y - x) * share):02x}" for x, y in zip(_channels(a), _channels(b), strict=True))


def _channels(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


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
    blocks = [
        (direction, [_text_row(pair, orders, floor) for pair in pairs]) for direction, pairs in directions(report)
    ]
    # One table for all directions, so that their columns have the same widths.
    table = format_table([head, *(row for _, rows in blocks for row in rows)], left=(0, 1), rule=True, indent="  ")
    header_line, rule, *body = table.split("\n")
    lines = [headline(report), ""]
    for direction, rows in blocks:
        lines += [block_title(report, direction), header_line, rule, *body[: len(rows)], ""]
        body = body[len(rows) :]
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
        lines.append(
            "Order k: what k non-linear steps explain beyond k − 1, on held-out images. Shares and unexplained sum to 100 %."
        )
    if not all(pair.additive for pair in report.pairs):
        lines.append(
            "Order k: variance of that component over the target's, as published. Components are correlated: they do not add up to 100 %."
        )
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


def _text_row(pair: PairResult, orders: int, floor: bool) -> list[str]:
    shares = [percent(share) for share in pair.shares] + [""] * (orders - len(pair.shares))
    return [
        pair.source,
        pair.target,
        *shares,
        percent(pair.unexplained),
        interval(pair.interval),
        *([percent(pair.noise_floor)] if floor else []),
    ]


def _how(report: Report) -> list[str]:
    settings, parts = report.settings, []
    if "solver" in settings:
        parts.append(
            {"closed_form": "closed form", "paper": "the paper's solver"}.get(
                settings["solver"], str(settings["solver"])
            )
        )
    if kernel := settings.get("kernel_size"):
        parts.append(f"{kernel}×{kernel} maps")
    return parts


def render_html(report: Report) -> str:
    """The notebook view; colors of the text are the notebook's own, so it is readable in dark themes."""
    orders = max((len(pair.shares) for pair in report.pairs), default=0)
    floor = any(pair.noise_floor is not None for pair in report.pairs)
    colors = order_colors(orders)
    figures = [
        *(f"order {k}" for k in range(orders)),
        "unexplained",
        "95 % interval",
        *(["noise floor"] if floor else []),
    ]
    heads = ["source layer", "target layer", "", *figures]
    body = []
    for direction, pairs in directions(report):
        title = (
            f'<th colspan="{len(heads)}" style="{_LEFT}padding-top:12px;">{escape(block_title(report, direction))}</th>'
        )
        body.append(f"<tr>{title}</tr>")
        body += [_html_row(pair, orders, colors, floor) for pair in pairs]
    sides = [_LEFT] * 3 + [_RIGHT] * (len(heads) - 3)
    top = "".join(
        f'<th style="{side}font-weight:normal;">{_key(name, colors)}</th>'
        for side, name in zip(sides, heads, strict=True)
    )
    notes = "".join(f"<div>{escape(line)}</div>" for line in footnotes(report))
    warned = "".join(f"<div>⚠ {escape(line)}</div>" for line in warnings_of(report))
    return (
        '<div style="font-size:13px;line-height:1.45;">'
        f"<div>{escape(headline(report))}</div>"
        f'<table style="border-collapse:collapse;border:0;margin:6px 0;"><thead><tr style="border-bottom:1px solid {HATCH_COLOR};">{top}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
        f'<div style="opacity:.65;">{notes}</div>{warned}</div>'
    )


def _html_row(pair: PairResult, orders: int, colors: list[str], floor: bool) -> str:
    shares = [percent(share) for share in pair.shares] + [""] * (orders - len(pair.shares))
    figures = [
        *shares,
        percent(pair.unexplained),
        interval(pair.interval),
        *([percent(pair.noise_floor)] if floor else []),
    ]
    names = "".join(f'<td style="{_LEFT}"><code>{escape(name)}</code></td>' for name in (pair.source, pair.target))
    cells = "".join(f'<td style="{_RIGHT}">{cell}</td>' for cell in figures)
    return f'<tr style="background:none;">{names}<td style="{_LEFT}">{_bar(pair, colors)}</td>{cells}</tr>'


def _bar(pair: PairResult, colors: list[str]) -> str:
    """Orders from the left, the rest hatched; correlated components cannot be stacked, so there all that is explained is one piece."""
    pieces = list(zip(colors, pair.shares, strict=False)) if pair.additive else [(colors[0], pair.explained)]
    widths = [(color, 100 * min(share, 1.0)) for color, share in pieces if share > 0]
    inner = "".join(f'<span style="width:{width:.2f}%;background:{color};"></span>' for color, width in widths)
    return f'<span style="display:flex;width:160px;height:12px;border-radius:2px;overflow:hidden;background:{_HATCH};">{inner}</span>'


def _key(name: str, colors: list[str]) -> str:
    """Column heads carry the color, so no legend is needed."""
    kind, _, number = name.partition(" ")
    background = colors[int(number)] if kind == "order" else _HATCH if name == "unexplained" else None
    if background is None:
        return escape(name)
    return f'<span style="display:inline-block;width:9px;height:9px;margin-right:5px;border-radius:2px;background:{background};"></span>{name}'
