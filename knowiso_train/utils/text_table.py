"""Text tables with aligned columns."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def format_table(
    rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,), rule: bool = False, indent: str = ""
) -> str:
    """Format rows of cells as a text table with two spaces between columns.

    Args:
        rows: Cells of each row, equally many in every row. The first row is the header.
        left: Left-aligned columns; negative numbers count from the last one. The others are right-aligned.
        rule: Draw a line below the header.
        indent: Text in front of every row.

    Raises:
        ValueError: Rows of different lengths.

    Examples:
        >>> print(format_table([["layer", "inputs"], ["a", "1"], ["bc", "20"]], rule=True))
        layer  inputs
        ─────────────
        a           1
        bc         20
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned_left = [i in left or i - len(widths) in left for i in range(len(widths))]
    lines = [
        indent
        + "  ".join(
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(row, widths, aligned_left, strict=True)
        ).rstrip()
        for row in rows
    ]
    if rule:
        lines.insert(1, "─" * (len(indent) + sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)
