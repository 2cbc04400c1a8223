"""A report in a notebook: a table with a small stacked bar per row. Inline styles only, so it survives export and untrusted notebooks."""

from __future__ import annotations

from html import escape

from knowiso_train.measurement.palette import HATCH, UNEXPLAINED, order_colours
from knowiso_train.measurement.report import PairResult, Report
from knowiso_train.measurement.table import block_title, directions, footnotes, headline, interval, percent, warnings_of

_CELL = "padding:3px 10px;border:0;background:none;white-space:nowrap;"
_LEFT, _RIGHT = f"{_CELL}text-align:left;", f"{_CELL}text-align:right;font-variant-numeric:tabular-nums;"
_HATCH = f"repeating-linear-gradient(45deg,{UNEXPLAINED},{UNEXPLAINED} 4px,{HATCH} 4px,{HATCH} 5px)"


def render_html(report: Report) -> str:
    """The notebook view; colours of the text are the notebook's own, so it is readable in dark themes."""
    orders = max((len(pair.shares) for pair in report.pairs), default=0)
    floor = any(pair.noise_floor is not None for pair in report.pairs)
    colours = order_colours(orders)
    figures = [*(f"order {k}" for k in range(orders)), "unexplained", "95 % interval", *(["noise floor"] if floor else [])]
    heads = ["source layer", "target layer", "", *figures]
    body = []
    for direction, pairs in directions(report):
        title = f'<th colspan="{len(heads)}" style="{_LEFT}padding-top:12px;">{escape(block_title(report, direction))}</th>'
        body.append(f"<tr>{title}</tr>")
        body += [_row(pair, orders, colours, floor) for pair in pairs]
    sides = [_LEFT] * 3 + [_RIGHT] * (len(heads) - 3)
    top = "".join(f'<th style="{side}font-weight:normal;">{_key(name, colours)}</th>' for side, name in zip(sides, heads, strict=True))
    notes = "".join(f"<div>{escape(line)}</div>" for line in footnotes(report))
    warned = "".join(f"<div>⚠ {escape(line)}</div>" for line in warnings_of(report))
    return (
        '<div style="font-size:13px;line-height:1.45;">'
        f"<div>{escape(headline(report))}</div>"
        f'<table style="border-collapse:collapse;border:0;margin:6px 0;"><thead><tr style="border-bottom:1px solid {HATCH};">{top}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
        f'<div style="opacity:.65;">{notes}</div>{warned}</div>'
    )


def _row(pair: PairResult, orders: int, colours: list[str], floor: bool) -> str:
    shares = [percent(share) for share in pair.shares] + [""] * (orders - len(pair.shares))
    figures = [*shares, percent(pair.unexplained), interval(pair.interval), *([percent(pair.noise_floor)] if floor else [])]
    names = "".join(f'<td style="{_LEFT}"><code>{escape(name)}</code></td>' for name in (pair.source, pair.target))
    cells = "".join(f'<td style="{_RIGHT}">{cell}</td>' for cell in figures)
    return f'<tr style="background:none;">{names}<td style="{_LEFT}">{_bar(pair, colours)}</td>{cells}</tr>'


def _bar(pair: PairResult, colours: list[str]) -> str:
    """Orders from the left, the rest hatched; correlated components cannot be stacked, so there all that is explained is one piece."""
    pieces = list(zip(colours, pair.shares, strict=False)) if pair.additive else [(colours[0], pair.explained)]
    widths = [(colour, 100 * min(share, 1.0)) for colour, share in pieces if share > 0]
    inner = "".join(f'<span style="width:{width:.2f}%;background:{colour};"></span>' for colour, width in widths)
    return f'<span style="display:flex;width:160px;height:12px;border-radius:2px;overflow:hidden;background:{_HATCH};">{inner}</span>'


def _key(name: str, colours: list[str]) -> str:
    """Column heads carry the colour, so no legend is needed."""
    kind, _, number = name.partition(" ")
    background = colours[int(number)] if kind == "order" else _HATCH if name == "unexplained" else None
    if background is None:
        return escape(name)
    return f'<span style="display:inline-block;width:9px;height:9px;margin-right:5px;border-radius:2px;background:{background};"></span>{name}'
