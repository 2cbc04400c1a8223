"""Image folders of three classes that differ in a color under noise, for tests of recipes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def write(folder: Path, counts: Mapping[str, int], side: int, *, faint: bool = False) -> Path:
    """Write PNG files to folder/split/class and return the folder.

    Args:
        folder: Target folder.
        counts: Number of images of each split.
        side: Height and width in pixels.
        faint: Draw the strength of the color for each image from 0 to 90, instead of 60 for all.
    """
    noise = np.random.default_rng(0)
    for split, count in counts.items():
        for i in range(count):
            pixels = noise.integers(0, 160, (side, side, 3))
            pixels[..., i % 3] += noise.integers(0, 90) if faint else 60
            target = folder / split / f"class{i % 3}" / f"{i:03d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(target)
    return folder
