"""Images inside a page: PNG thumbnails, grids of them, and heat maps over them."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from knowiso_train.errors import ShapeError
from knowiso_train.pages.colors import HEAT_RAMP, heat_colors
from knowiso_train.pages.elements import Html

THUMBNAIL_PIXELS = 96  # longest side; a thumbnail of a photograph takes about 20 kB
GRID_COLUMNS = (4, 5, 3)  # that with the fewest empty places is used, the first of equal ones
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_COLOR_TYPES = {1: 0, 3: 2, 4: 6}  # gray, RGB, RGB with opacity; by channels


@dataclass(frozen=True)
class Tile:
    """Image of a grid.

    Attributes:
        image: Data URI of `thumbnail`. Empty: only the heat map.
        caption: Text below the image, in one or several lines.
        hint: Tooltip, also the description for screen readers.
        heat: Data URI of `heat_image`, laid over the image. Empty: none.
    """

    image: str
    caption: str = ""
    hint: str = ""
    heat: str = ""


def thumbnail(image: ArrayLike | Tensor, *, max_pixels: int = THUMBNAIL_PIXELS) -> str:
    """Return a picture of an image as a data URI.

    Args:
        image: Values between 0 and 1, or bytes; (C, H, W) or (H, W, C) with 1 or 3 channels, or (H, W). Values beyond
            the range are clipped.
        max_pixels: Longest side; larger images are reduced. Default: 96.

    Raises:
        ShapeError: An image of another shape.

    Examples:
        >>> thumbnail(np.zeros((3, 4, 4)))[:22]
        'data:image/png;base64,'
    """
    pixels = _channels_last(torch.as_tensor(image).detach().cpu())
    values = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
    values = values.nan_to_num().clamp(0, 1)
    height, width = values.shape[:2]
    if (longest := max(height, width)) > max_pixels:
        size = [max(1, round(side * max_pixels / longest)) for side in (height, width)]
        batch = values.permute(2, 0, 1)[None]
        values = torch.nn.functional.interpolate(batch, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    return _data_uri((255 * values).round().byte().numpy())


def heat_image(values: ArrayLike | Tensor, maximum: float) -> str:
    """Return a heat map as a data URI, one pixel per position; the page enlarges it over the image.

    Args:
        values: Non-negative values of positions (H, W).
        maximum: Value of the strongest color.

    Raises:
        ShapeError: Values of another number of axes.

    Examples:
        >>> heat_image(np.eye(2), maximum=1.0)[:22]
        'data:image/png;base64,'
    """
    grid = np.asarray(values.detach().cpu().float() if isinstance(values, Tensor) else values, dtype=float)
    if grid.ndim != 2:
        raise ShapeError(f"expected a heat map of shape (H, W), got {grid.shape}")
    return _data_uri(heat_colors(grid / maximum if maximum > 0 else np.zeros_like(grid)))


def image_grid(tiles: Sequence[Tile]) -> Html:
    """Return images in rows of equal lengths with their captions; heat maps fade while the pointer is over them.

    Examples:
        >>> image_grid([Tile(thumbnail(np.zeros((4, 4))), "cat")]).count("<img")
        1
    """
    columns = min(GRID_COLUMNS, key=lambda count: -len(tiles) % count)
    return Html(f'<div class="grid" style="--columns:{columns}">{"".join(map(_tile, tiles))}</div>')


def heat_scale(low: str, high: str) -> Html:
    """Return the color scale of heat maps with the texts of its ends.

    Examples:
        >>> "0 %" in heat_scale("0 %", "100 %")
        True
    """
    gradient = f"linear-gradient(90deg,{','.join(HEAT_RAMP)})"
    bar = f'<span class="scale" style="background:{gradient}"></span>'
    return Html(f'<div class="heat-scale">{escape(low)}{bar}{escape(high)}</div>')


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode pixels as PNG.

    Args:
        pixels: Bytes of shape (H, W, channels) with 1, 3 or 4 channels.

    Examples:
        >>> encode_png(np.zeros((1, 1, 3), np.uint8))[1:4]
        b'PNG'
    """
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, PNG_COLOR_TYPES[channels], 0, 0, 0)
    # Filter 2 of the PNG specification: each row as its difference to the row above, modulo 256
    above = np.concatenate([np.zeros_like(pixels[:1]), pixels[:-1]])
    rows = (pixels - above).reshape(height, width * channels)
    filtered = np.concatenate([np.full((height, 1), 2, np.uint8), rows], 1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes(), 9)), (b"IEND", b""))
    return PNG_SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_png(pixels)).decode()


def _channels_last(image: Tensor) -> Tensor:
    """Return an image as (H, W, channels) with 1 or 3 channels."""
    if image.ndim == 2:
        return image[..., None]
    if image.ndim == 3 and image.shape[0] in (1, 3):
        return image.permute(1, 2, 0)
    if image.ndim == 3 and image.shape[2] in (1, 3):
        return image
    raise ShapeError(f"expected an image (C, H, W) or (H, W, C) with 1 or 3 channels, got {tuple(image.shape)}")


def _tile(tile: Tile) -> str:
    description = escape(tile.hint or tile.caption)
    images = f'<img src="{escape(tile.image)}" alt="{description}">' if tile.image else ""
    if tile.heat:
        kind, text = ("heat", "") if tile.image else ("heat alone", description)
        images += f'<img class="{kind}" src="{escape(tile.heat)}" alt="{text}">'
    caption = f"<figcaption>{escape(tile.caption)}</figcaption>" if tile.caption else ""
    return f'<figure title="{description}"><span class="stack">{images}</span>{caption}</figure>'
