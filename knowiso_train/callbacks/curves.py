"""Shares over training steps, as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from knowiso_train.callbacks.history import Measured, label
from knowiso_train.errors import MissingDependencyError, OptionError
from knowiso_train.measurement.palette import FLOOR, INK, MUTED, UNEXPLAINED, order_colours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE, DPI = (7.5, 4.2), 160
LIGHTEST = 4  # of this many colours more than there are curves, left out: they are too pale for a line


def plot_curves(history: Sequence[Measured], path: str | Path) -> Figure:
    """One line per layer pair and direction: its explained share by step, in per cent; noise floors dotted.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OptionError: nothing was measured.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError('share curves need matplotlib, which is not installed; pip install "knowiso_train[plots]"') from error
    if not history:
        raise OptionError("nothing was measured yet, so there are no curves to draw")

    last = history[-1].report
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.subplots()
    for pair, colour in zip(last, order_colours(len(last) + LIGHTEST), strict=False):
        known = [(measured.step, figures) for measured in history if f"{label(pair)}/share" in (figures := measured.figures)]
        steps = [step for step, _ in known]
        shares = [100 * figures[f"{label(pair)}/share"] for _, figures in known]
        floors = [100 * figures.get(f"{label(pair)}/noise_floor", math.nan) for _, figures in known]
        name = label(pair).removeprefix("iso/val/").replace("→", " → ").replace("/backward", " (backward)")
        axes.plot(steps, shares, color=colour, linewidth=1.8, marker="o", markersize=3.5, label=name)
        axes.plot(steps, floors, color=FLOOR, linewidth=0.9, linestyle=":")
    axes.plot([], [], color=FLOOR, linewidth=0.9, linestyle=":", label="noise floor")
    axes.set_title(f"{last.target} explained from {last.source}", fontsize=10.5, color=INK, loc="left", pad=8)
    axes.set_xlabel("training step", fontsize=8.5, color=MUTED)
    axes.set_ylabel("explained share on held-out images, %", fontsize=8.5, color=MUTED)
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), 100)
    axes.tick_params(axis="both", length=0, labelsize=8, labelcolor=MUTED)
    axes.grid(axis="y", color=UNEXPLAINED, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8.5, labelcolor=INK)
    figure.savefig(path, dpi=DPI)
    return figure
