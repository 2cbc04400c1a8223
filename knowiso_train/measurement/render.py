"""Text and HTML tables of a report, and its colors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from knowiso_train.measurement.config import DIRECTIONS, MIN_RELIABLE_IMAGES
from knowiso_train.pages.colors import order_colors
from knowiso_train.pages.elements import Cell
from knowiso_train.utils.text_table import format_table

if TYPE_CHECKING:
    from knowiso_train.measurement.report import PairResult, Report


UNEXPLAINED_COLOR = "#ececec"
EXPLAINED_COLOR = "#c9d8e6"  # all orders together, where they cannot be stacked
HATCH_COLOR = "#bdbdbd"
NOISE_FLOOR_COLOR = "#d1495b"
MUTED_COLOR = "#6b6b6b"
SIMILARITY_HEADS = {
    "cka": "CKA",
    "procrustes": "Procrustes",
    "r2": "R²",
    "pooled_cka": "pooled CKA",
    "pooled_procrustes": "pooled Procrustes",
    "pooled_r2": "pooled R²",
}
FUNCTIONAL_HEADS = ("output agrees", "residual agrees", "top-1", "residual top-1", "own top-1")
ROUGHNESS_MARK = "~"  # in front of shares from too few images

_CELL = "padding:3px 10px;border:0;background:none;white-space:nowrap;"
_LEFT, _RIGHT = f"{_CELL}text-align:left;", f"{_CELL}text-align:right;font-variant-numeric:tabular-nums;"
_HATCH = (
    f"repeating-linear-gradient(45deg,{UNEXPLAINED_COLOR},{UNEXPLAINED_COLOR} 4px,{HATCH_COLOR} 4px,{HATCH_COLOR} 5px)"
)


def render_text(report: Report) -> str:
    """Return an aligned table with one row per layer pair and one block per direction."""
    columns, mark = number_columns(report.pairs), roughness_mark(report)
    head = ["source layer", "target layer", *columns]
    blocks = [
        (direction, [_text_row(pair, columns, mark) for pair in pairs]) for direction, pairs in directions(report)
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
    notes = pair_warnings(report)
    return "\n".join(lines + ([""] + [f"! {note}" for note in notes] if notes else []))


def render_pair(pair: PairResult) -> str:
    """Return the table of one layer pair, with its warnings."""
    columns = number_columns((pair,))
    rows = [["source layer", "target layer", *columns], _text_row(pair, columns, "")]
    notes = [f"! {note}" for note in pair.warnings]
    return "\n".join(
        [
            f"{pair.target} explained from {pair.source} ({pair.direction})",
            format_table(rows, left=(0, 1), rule=True, indent="  "),
            *notes,
        ]
    )


def _text_row(pair: PairResult, columns: Sequence[str], mark: str) -> list[str]:
    return [pair.source, pair.target, *(cell.text for cell in number_cells(pair, columns, mark))]


def roughness_mark(report: Report) -> str:
    """Return the mark of shares from too few images, or nothing."""
    return ROUGHNESS_MARK if report.images.get("report", MIN_RELIABLE_IMAGES) < MIN_RELIABLE_IMAGES else ""


def directions(report: Report) -> list[tuple[str, tuple[PairResult, ...]]]:
    """Return the measured directions with their pairs."""
    return [(name, pairs) for name in DIRECTIONS if (pairs := getattr(report, name))]


def image_counts(images: Mapping[str, int]) -> str:
    """Return the number of images of each part, such as "60 to fit, 20 to select"."""
    return ", ".join(f"{count:,} to {role}" for role, count in images.items())


def headline(report: Report) -> str:
    """Return networks, numbers of images, settings and time in one line."""
    networks, counts = f"{report.source} and {report.target}", f"images: {image_counts(report.images)}"
    return " · ".join([networks, counts, *_method(report), duration(report.seconds)])


def block_title(report: Report, direction: str) -> str:
    """Return the names of the explained and of the explaining network."""
    explaining, explained = report.roles(direction)
    return f"{explained} explained from {explaining}"


def footnotes(report: Report) -> list[str]:
    """Return the definitions of the figures."""
    if not report.pairs:
        return []
    lines = []
    if any(pair.additive for pair in report.pairs):
        lines.append(
            "Order k: share explained by k non-linear steps beyond k − 1, on held-out images. "
            "Shares and unexplained sum to 100 %."
        )
    if not all(pair.additive for pair in report.pairs):
        lines.append(
            "Order k: variance of that component over the target's, as published. "
            "Components are correlated: they do not add up to 100 %."
        )
    if any(pair.noise_floor is not None for pair in report.pairs):
        lines.append("Noise floor: share that is still explained after the targets are permuted between images.")
    if any(pair.functional for pair in report.pairs):
        lines.append(
            "Output agrees: images with the explained network's own top-1 class while all orders together stand in "
            "the feature's place; residual agrees: while the residual and the mean do. Own: the network unchanged."
        )
    if any(pair.similarity for pair in report.pairs):
        lines.append(
            "CKA, Procrustes, R²: 1 for equal features up to the respective map; positions are samples "
            "(pooled: images). Maps are fitted on other images than the reported ones."
        )
    if mark := roughness_mark(report):
        lines.append(f"{mark} rough: measured on {report.images['report']} images only.")
    return lines


def pair_warnings(report: Report) -> list[str]:
    """Return all warnings, each with its layer pair."""
    return [f"{pair_name(pair)} ({pair.direction}): {note}" for pair in report.pairs for note in pair.warnings]


def pair_name(pair: PairResult) -> str:
    """Return the layer names of a pair, once if they are equal."""
    return pair.source if pair.source == pair.target else f"{pair.source} → {pair.target}"


def percent(share: float | None) -> str:
    """Format a share with one decimal; no minus before zero, a dash for None and NaN.

    Examples:
        >>> percent(0.1234), percent(-0.0001), percent(None), percent(float("nan"))
        ('12.3 %', '0.0 %', '–', '–')
    """
    if share is None or math.isnan(share):
        return "–"
    return f"{100 * share:.1f} %" if abs(share) >= 0.0005 else "0.0 %"


def similarity(value: float) -> str:
    """Format a similarity; no minus before zero, a dash for NaN.

    Examples:
        >>> similarity(0.12345), similarity(-0.0001), similarity(float("nan"))
        ('0.123', '0.000', '–')
    """
    return "–" if math.isnan(value) else f"{value if abs(value) >= 0.0005 else 0:.3f}"


def interval(bounds: tuple[float, float]) -> str:
    """Format an interval of shares."""
    if any(map(math.isnan, bounds)):
        return "–"
    low, high = bounds
    return f"{percent(low).removesuffix(' %')} … {percent(high)}"


def duration(seconds: float) -> str:
    """Format a duration: seconds up to two minutes, then minutes, then hours and minutes.

    Examples:
        >>> duration(9.26), duration(914.1), duration(7500)
        ('9.3 s', '15.2 min', '2 h 5 min')
    """
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 119.95 else "{} h {} min".format(*divmod(round(minutes), 60))


def number_columns(pairs: Sequence[PairResult]) -> list[str]:
    """Return the heads of the columns of numbers."""
    num_orders = max((len(pair.shares) for pair in pairs), default=0)
    has_noise_floor = any(pair.noise_floor is not None for pair in pairs)
    orders = [f"order {k}" for k in range(num_orders)]
    floor = ["noise floor"] if has_noise_floor else []
    functional = list(FUNCTIONAL_HEADS[:2]) if any(pair.functional for pair in pairs) else []
    if any(pair.target_output is not None and pair.target_output.top1 is not None for pair in pairs):
        functional += FUNCTIONAL_HEADS[2:]
    similarities = [head for name, head in SIMILARITY_HEADS.items() if any(name in pair.similarity for pair in pairs)]
    return [*orders, "unexplained", "95 % interval", *floor, *functional, *similarities]


def number_cells(pair: PairResult, columns: Sequence[str], mark: str = "") -> list[Cell]:
    """Return the numbers of one pair in the given columns; orders beyond those of the pair are empty."""
    low, high = pair.interval
    cells = {f"order {k}": Cell(mark + percent(share), share) for k, share in enumerate(pair.shares)} | {
        "unexplained": Cell(mark + percent(pair.unexplained), pair.unexplained),
        "95 % interval": Cell(interval(pair.interval), high - low),
        "noise floor": Cell(mark + percent(pair.noise_floor), pair.noise_floor),
    }
    cells |= {
        head: Cell(mark + similarity(pair.similarity[name]), pair.similarity[name])
        for name, head in SIMILARITY_HEADS.items()
        if name in pair.similarity
    }
    if pair.functional and pair.residual_only is not None and pair.target_output is not None:
        mapped, residual, own = pair.functional[-1], pair.residual_only, pair.target_output
        figures = (mapped.agreement, residual.agreement, mapped.top1, residual.top1, own.top1)
        cells |= {
            head: Cell(mark + percent(figure), figure) for head, figure in zip(FUNCTIONAL_HEADS, figures, strict=True)
        }
    return [cells.get(column, Cell("")) for column in columns]


def _method(report: Report) -> list[str]:
    settings, parts = report.settings, []
    if solver := settings.get("solver"):
        parts.append({"closed_form": "closed form", "paper": "the paper's solver"}.get(str(solver), str(solver)))
    if kernel := settings.get("kernel_size"):
        parts.append(f"{kernel}×{kernel} maps")
    if (side := settings.get("at", "output")) != "output":
        parts.append("inputs of layers" if side == "input" else "inputs of some layers")
    return parts


def render_html(report: Report) -> str:
    """Return the table for notebooks; it sets no text color, so that it is readable in dark themes."""
    columns, mark = number_columns(report.pairs), roughness_mark(report)
    colors = order_colors(sum(name.startswith("order ") for name in columns))
    heads = ["source layer", "target layer", "", *columns]
    body = []
    for direction, pairs in directions(report):
        title = (
            f'<th colspan="{len(heads)}" style="{_LEFT}padding-top:12px;">{escape(block_title(report, direction))}</th>'
        )
        body.append(f"<tr>{title}</tr>")
        body += [_html_row(pair, colors, columns, mark) for pair in pairs]
    styles = [_LEFT] * 3 + [_RIGHT] * (len(heads) - 3)
    top = "".join(
        f'<th style="{style}font-weight:normal;">{_html_head(name, colors)}</th>'
        for style, name in zip(styles, heads, strict=True)
    )
    notes = "".join(f"<div>{escape(line)}</div>" for line in footnotes(report))
    warnings = "".join(f"<div>⚠ {escape(line)}</div>" for line in pair_warnings(report))
    return (
        '<div style="font-size:13px;line-height:1.45;">'
        f"<div>{escape(headline(report))}</div>"
        '<table style="border-collapse:collapse;border:0;margin:6px 0;">'
        f'<thead><tr style="border-bottom:1px solid {HATCH_COLOR};">{top}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
        f'<div style="opacity:.65;">{notes}</div>{warnings}</div>'
    )


def _html_row(pair: PairResult, colors: list[str], columns: Sequence[str], mark: str) -> str:
    names = "".join(f'<td style="{_LEFT}"><code>{escape(name)}</code></td>' for name in (pair.source, pair.target))
    cells = "".join(f'<td style="{_RIGHT}">{cell.text}</td>' for cell in number_cells(pair, columns, mark))
    return f'<tr style="background:none;">{names}<td style="{_LEFT}">{_html_bar(pair, colors)}</td>{cells}</tr>'


def _html_bar(pair: PairResult, colors: list[str]) -> str:
    """Return a stacked bar of the orders, or one segment for correlated components, which cannot be stacked."""
    segments = list(zip(colors, pair.shares, strict=False)) if pair.additive else [(colors[0], pair.explained)]
    widths = [(color, 100 * min(share, 1.0)) for color, share in segments if share > 0]
    inner = "".join(f'<span style="width:{width:.2f}%;background:{color};"></span>' for color, width in widths)
    style = f"display:flex;width:160px;height:12px;border-radius:2px;overflow:hidden;background:{_HATCH};"
    return f'<span style="{style}">{inner}</span>'


def _html_head(name: str, colors: list[str]) -> str:
    """Return a column head with its color in the bar, so that no legend is needed."""
    kind, _, number = name.partition(" ")
    background = colors[int(number)] if kind == "order" else _HATCH if name == "unexplained" else None
    if background is None:
        return escape(name)
    style = f"display:inline-block;width:9px;height:9px;margin-right:5px;border-radius:2px;background:{background};"
    return f'<span style="{style}"></span>{name}'
