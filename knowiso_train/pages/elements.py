"""Text elements of a page; all text is escaped here, so that names of layers and classes cannot contain markup."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import NewType

# Strengths above which the text of a cell changes: to light text in the light theme, to dark text in the dark theme
STRONG_PERCENT, STRONGEST_PERCENT = 52.0, 68.0
HATCHED = "hatched"  # in place of a color: the pattern of what is unexplained

Html = NewType("Html", str)  # escaped; plain text is not accepted in its place


@dataclass(frozen=True)
class Column:
    """Column of a table.

    Attributes:
        title: Text of the head.
        numeric: Right-aligned, and sorted by `Cell.value`. False: left-aligned, and sorted by text.
        hint: Tooltip of the head. Empty: none.
        color: CSS color of a swatch in front of the title, which links the column to a picture, or "hatched". Empty:
            none.
    """

    title: str
    numeric: bool = True
    hint: str = ""
    color: str = ""


@dataclass(frozen=True)
class Cell:
    """Cell of a table.

    Attributes:
        text: Text of the cell.
        value: Number that the cell is sorted by. None or NaN: sorted last.
        hint: Tooltip. Empty: none.
        strength: Strength of the cell's color between 0 and 1. None or NaN: not colored.
    """

    text: str
    value: float | None = None
    hint: str = ""
    strength: float | None = None


def join(parts: Iterable[Html]) -> Html:
    """Return several elements one after the other.

    Examples:
        >>> join([paragraph("a"), paragraph("b")])
        '<p>a</p><p>b</p>'
    """
    return Html("".join(parts))


def paragraph(text: str) -> Html:
    """Return a paragraph.

    Examples:
        >>> paragraph("a < b")
        '<p>a &lt; b</p>'
    """
    return Html(f"<p>{escape(text)}</p>")


def heading(text: str) -> Html:
    """Return a heading within a section.

    Examples:
        >>> heading("Directions")
        '<h3>Directions</h3>'
    """
    return Html(f"<h3>{escape(text)}</h3>")


def side_by_side(columns: Sequence[Sequence[Html]]) -> Html:
    """Return columns whose parts begin at equal heights; on narrow screens, one column below the other.

    Args:
        columns: Parts of each column. Shorter columns end earlier.

    Examples:
        >>> side_by_side([[paragraph("a")], [paragraph("b")]])
        '<div class="side-by-side" style="--rows:1"><div><div><p>a</p></div></div><div><div><p>b</p></div></div></div>'
    """
    num_rows = max((len(parts) for parts in columns), default=0)
    content = "".join(f"<div>{''.join(f'<div>{part}</div>' for part in parts)}</div>" for parts in columns)
    return Html(f'<div class="side-by-side" style="--rows:{num_rows}">{content}</div>')


def term(title: str, text: str) -> Html:
    """Return a paragraph that begins with its title.

    Examples:
        >>> term("Direction 1", "5 % of the variance")
        '<p class="term"><strong>Direction 1</strong> 5 % of the variance</p>'
    """
    return Html(f'<p class="term"><strong>{escape(title)}</strong> {escape(text)}</p>')


def note(lines: Sequence[str]) -> Html:
    """Return small print below a picture or table, one paragraph per line; nothing if there are no lines.

    Examples:
        >>> note(["Images are 32 px wide."])
        '<div class="note"><p>Images are 32 px wide.</p></div>'
    """
    return Html(f'<div class="note">{join(map(paragraph, lines))}</div>' if lines else "")


def picture(reading_aid: str, content: Html) -> Html:
    """Return a picture below the sentence that explains how to read it.

    Examples:
        >>> picture("Each bar is a layer.", Html("<svg></svg>"))
        '<figure class="picture"><figcaption>Each bar is a layer.</figcaption><svg></svg></figure>'
    """
    return Html(f'<figure class="picture"><figcaption>{escape(reading_aid)}</figcaption>{content}</figure>')


def folded(title: str, content: Html, *, printed: bool = True) -> Html:
    """Return content that a click on its title shows.

    Args:
        title: Title that is always visible.
        content: Content to fold.
        printed: Print the content although it is folded. False: for long tables.

    Examples:
        >>> folded("Settings", paragraph("seed 0"))
        '<details><summary>Settings</summary><div class="folded"><p>seed 0</p></div></details>'
    """
    kind = "" if printed else ' class="unprinted"'
    summary = f"<summary>{escape(title)}</summary>"
    return Html(f'<details{kind}>{summary}<div class="folded">{content}</div></details>')


def table(caption: str, columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> Html:
    """Return a table whose heads become buttons that sort it; without JavaScript it keeps the given order.

    Args:
        caption: Text that names the table, above it.
        columns: One column per cell of a row.
        rows: Cells of each row, as many as columns.

    Raises:
        ValueError: A row with another number of cells than columns.

    Examples:
        >>> html = table("Layers", [Column("layer", numeric=False), Column("share")], [[Cell("a"), Cell("5 %", 0.05)]])
        >>> '<td class="number" data-value="0.05">5 %</td>' in html
        True
    """
    heads = "".join(f"<th{_column_attributes(column)}>{_column_title(column)}</th>" for column in columns)
    body = "".join(
        f"<tr>{''.join(_table_cell(cell, column) for cell, column in zip(row, columns, strict=True))}</tr>"
        for row in rows
    )
    return Html(
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f'<table class="sortable"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def swatch(color: str) -> Html:
    """Return a small square of a CSS color, or of the pattern "hatched".

    Examples:
        >>> swatch("#16325b")
        '<span class="swatch" style="background:#16325b"></span>'
    """
    if color == HATCHED:
        return Html('<span class="swatch hatched"></span>')
    return Html(f'<span class="swatch" style="background:{escape(color)}"></span>')


def attributes(**values: str | None) -> str:
    """Return HTML attributes with a leading space each; those that are None or empty are left out.

    Examples:
        >>> attributes(title="a & b", id=None)
        ' title="a &amp; b"'
    """
    return "".join(f' {name.strip("_").replace("_", "-")}="{escape(value)}"' for name, value in values.items() if value)


def cell_color(strength: float | None, *classes: str | None) -> str:
    """Return the HTML attributes that color a cell, with its classes.

    Args:
        strength: Strength between 0 and 1; values beyond are clipped. None or NaN: not colored.
        classes: Further classes of the cell. None: left out.

    Examples:
        >>> cell_color(0.25, "number")
        ' class="number" style="--strength:25.0%"'
        >>> cell_color(None)
        ''
    """
    percent = None if strength is None or math.isnan(strength) else 100 * min(max(strength, 0.0), 1.0)
    if percent is None:
        return attributes(class_=" ".join(filter(None, classes)))
    names = {"strong": percent > STRONG_PERCENT, "strongest": percent > STRONGEST_PERCENT}
    kinds = [*filter(None, classes), *(name for name, applies in names.items() if applies)]
    return attributes(class_=" ".join(kinds), style=f"--strength:{percent:.1f}%")


def break_at_dots(name: str) -> str:
    """Return an escaped name that may break at its dots on narrow screens, if it has no spaces to break at.

    Examples:
        >>> break_at_dots("layer1.conv"), break_at_dots("pruned 1.3×")
        ('layer1.<wbr>conv', 'pruned 1.3×')
    """
    return escape(name) if " " in name else escape(name).replace(".", ".<wbr>")


def _column_attributes(column: Column) -> str:
    return ' scope="col"' + attributes(
        class_="number" if column.numeric else None,
        data_sort="number" if column.numeric else "text",
        title=column.hint,
    )


def _column_title(column: Column) -> Html:
    return Html((swatch(column.color) if column.color else "") + escape(column.title))


def _table_cell(cell: Cell, column: Column) -> str:
    known = cell.value is not None and not math.isnan(cell.value)
    content = cell_color(cell.strength, "number" if column.numeric else None) + attributes(
        title=cell.hint,
        data_value=repr(float(cell.value)) if cell.value is not None and known else None,
    )
    text = escape(cell.text) if column.numeric else break_at_dots(cell.text)
    return f"<td{content}>{text}</td>"
