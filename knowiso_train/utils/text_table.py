"""Text tables with aligned columns."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first to the left, the others to the right.

    Example:
        >>> print(format_table([["a", "1"], ["bc", "20"]]))
        a    1
        bc  20
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )
