"""Colors of pictures: one ramp for light and one for dark backgrounds, both distinguishable by color-blind readers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ORDER_COLORS = ("#16325b", "#227b94", "#6cbf9c", "#d3e59b")
DARK_ORDER_COLORS = ("#5f9ae6", "#35a7b5", "#7fd1ae", "#dceaa6")
TEXT_COLOR, DARK_TEXT_COLOR = "#222222", "#0d1117"
# Dark violet to pale yellow with monotone lightness, at equal steps
HEAT_RAMP = ("#1b0c41", "#65156e", "#b63655", "#f1731d", "#fcdf7e")
MAX_HEAT_OPACITY = 0.8


def ramp(colors: Sequence[str], count: int) -> list[str]:
    """Return the first colors of a ramp, or an interpolation over all of them for more colors than it has.

    Examples:
        >>> ramp(("#000000", "#ffffff"), 1), ramp(("#000000", "#ffffff"), 3)
        (['#000000'], ['#000000', '#808080', '#ffffff'])
    """
    if count <= len(colors):
        return list(colors[:count])
    steps = np.linspace(0, len(colors) - 1, count)
    return ["#" + "".join(f"{round(channel):02x}" for channel in rgb) for rgb in _interpolate(colors, steps)]


def order_colors(count: int) -> list[str]:
    """Return one color per order, for light backgrounds.

    Examples:
        >>> order_colors(2)
        ['#16325b', '#227b94']
    """
    return ramp(ORDER_COLORS, count)


def series_colors(count: int) -> list[tuple[str, str]]:
    """Return CSS colors of segments and of the text on them; both follow the theme of the page.

    Examples:
        >>> series_colors(1)
        [('light-dark(#16325b,#5f9ae6)', 'light-dark(#ffffff,#0d1117)')]
    """
    pairs = zip(ramp(ORDER_COLORS, count), ramp(DARK_ORDER_COLORS, count), strict=True)
    return [
        (f"light-dark({light},{dark})", f"light-dark({text_color_on(light)},{DARK_TEXT_COLOR})")
        for light, dark in pairs
    ]


def text_color_on(color: str) -> str:
    """Return the text color, black or white, with the better contrast on a color.

    Examples:
        >>> text_color_on("#16325b"), text_color_on("#d3e59b")
        ('#ffffff', '#222222')
    """
    red, green, blue = _channels(color)
    # Luma of ITU-R BT.601
    return "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else TEXT_COLOR


def heat_colors(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return the color and the opacity of values between 0 and 1; higher values are lighter and less transparent.

    Args:
        values: Values of any shape. Others are clipped; NaN is fully transparent.

    Returns:
        Red, green, blue and opacity, of the shape of the values with a last axis of 4.

    Examples:
        >>> heat_colors(np.array([0.0, 1.0, np.nan])).tolist()
        [[27, 12, 65, 0], [252, 223, 126, 204], [27, 12, 65, 0]]
    """
    missing = np.isnan(values)
    levels = np.clip(np.where(missing, 0.0, values), 0.0, 1.0)
    rgb = _interpolate(HEAT_RAMP, levels * (len(HEAT_RAMP) - 1))
    opacity = np.where(missing, 0.0, 255 * MAX_HEAT_OPACITY * levels)
    return np.concatenate([rgb, opacity[..., None]], -1).round().astype(np.uint8)


def _interpolate(colors: Sequence[str], positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the channels at positions 0…n−1 of a ramp of n colors."""
    anchors = np.array([_channels(color) for color in colors], float)
    steps = np.arange(len(anchors))
    return np.stack([np.interp(positions, steps, anchors[:, channel]) for channel in range(3)], -1)


def _channels(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)
