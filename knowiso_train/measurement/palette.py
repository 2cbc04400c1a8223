"""Colours of the orders, the same in pictures and notebooks: one dark-to-light sequence that colour-blind readers and grey printers can order."""

from __future__ import annotations

ORDERS = ("#16325b", "#227b94", "#6cbf9c", "#d3e59b")
UNEXPLAINED = "#ececec"
HATCH = "#bdbdbd"
FLOOR = "#d1495b"
INK = "#222222"
MUTED = "#6b6b6b"


def order_colours(count: int) -> list[str]:
    """One colour per order: the first of the sequence while they last, stretched over all of it for more.

    Example:
        >>> order_colours(2)
        ['#16325b', '#227b94']
    """
    if count <= len(ORDERS):
        return list(ORDERS[:count])
    last = len(ORDERS) - 1
    colours = []
    for i in range(count):
        at = i * last / (count - 1)
        left = min(int(at), last - 1)
        colours.append(_between(ORDERS[left], ORDERS[left + 1], at - left))
    return colours


def ink_on(colour: str) -> str:
    """Black or white, whichever reads better on a colour."""
    red, green, blue = _channels(colour)
    return "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else INK


def _between(a: str, b: str, share: float) -> str:
    return "#" + "".join(f"{round(x + (y - x) * share):02x}" for x, y in zip(_channels(a), _channels(b), strict=True))


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
