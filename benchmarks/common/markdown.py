"""Tables in Markdown that are made from results files, between markers of a hand-written page.

A table stands between `<!-- results: NAME -->` and `<!-- end -->`. The text around the markers stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

MARKED = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
# A sign in front of a number, and the spread of a single run
SIGNED_ZERO = re.compile(r"(?<![\w.])[+-](0\.0+)(?!\d)")
MINUS, NO_SPREAD = re.compile(r"(?<![\w.)\]])-(?=\d)"), re.compile(r" ± nan\b")
NUMBER = re.compile(r"[+−]?\d[\d,]*(?:\.\d+)?")


def marked_names(text: str) -> list[str]:
    """Return the names of the marked tables of a page, in its order."""
    return [name for _, name, _ in MARKED.findall(text)]


def replace_marked(text: str, content: Callable[[str], str]) -> str:
    """Return the page with `content(name)` between the markers of every table."""
    return MARKED.sub(lambda match: f"{match[1]}{content(match[2])}\n{match[3]}", text)


def number(value: float, sign: str = "", digits: int = 2) -> str:
    """Format with a fixed number of decimals, a minus sign and no negative zero."""
    return f"{value:{sign}z.{digits}f}".replace("-", "−")


def optional(value: Any, form: str) -> str:
    """Format a number. Anything else is an empty cell."""
    return form.format(value) if isinstance(value, float) else ""


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as a table in Markdown. The keys of the first row are the header; missing cells are empty."""
    header = list(rows[0])
    lines = [header, ["---"] * len(header), *([cell(row.get(key, "")) for key in header] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    """Format a cell: four significant digits, a minus sign, no sign of a zero, no spread of a single run."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return NO_SPREAD.sub("", MINUS.sub("−", SIGNED_ZERO.sub(r"\1", text)))


def best_in_bold(rows: Sequence[dict[str, Any]], columns: Sequence[str], *, lowest: bool = False) -> None:
    """Write the best cells of columns in bold, in place. The first number of a cell counts."""
    for column in columns:
        matches = {i: NUMBER.search(cell(row.get(column, ""))) for i, row in enumerate(rows)}
        values = {i: float(m[0].replace(",", "").replace("−", "-")) for i, m in matches.items() if m is not None}
        best = (min if lowest else max)(values.values())
        for i, value in values.items():
            if value == best:
                rows[i][column] = f"**{cell(rows[i][column])}**"
