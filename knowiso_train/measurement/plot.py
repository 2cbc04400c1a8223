"""Figures of reports."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowiso_train.errors import MissingDependencyError, OptionError
from knowiso_train.measurement.render import (
    HATCH_COLOR,
    MUTED_COLOR,
    NOISE_FLOOR_COLOR,
    TEXT_COLOR,
    UNEXPLAINED_COLOR,
    directions,
    order_colors,
    pair_name,
    text_color_on,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from knowiso_train.measurement.report import PairResult, Report

FIGURE_WIDTH_INCHES, REPORT_DPI = 9.0, 160
BAR_HEIGHT = 0.62  # of the row
MIN_LABEL_SHARE = 0.075  # narrower pieces carry no label
MAX_NAME_CHARACTERS = 26  # characters of a layer name


def plot(report: Report, path: str | Path | None = None, *, title: str | None = None) -> Figure:
    """Draw the report; see `Report.plot`."""
    try:
        from matplotlib.figure import Figure  # not pyplot: no global state, no back-end chosen
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise MissingDependencyError(
            'Report.plot needs matplotlib, which is not installed; pip install "knowiso_train[plots]"'
        ) from error

    panels = directions(report)
    if not panels:
        raise OptionError("the report has no layer pairs, so there is nothing to plot")
    rows = max(len(pairs) for _, pairs in panels)
    margins = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06, wspace=0.04)
    figure = Figure(
        figsize=(FIGURE_WIDTH_INCHES, 0.44 * rows + (1.6 if title is None else 1.95)),
        dpi=REPORT_DPI,
        layout=margins,
        facecolor="white",
    )
    if title is not None:
        figure.suptitle(title, fontsize=12, color=TEXT_COLOR, fontweight="bold")
    colors = order_colors(max(len(pair.shares) for pair in report.pairs))
    labels = [list(map(_label, pairs)) for _, pairs in panels]
    panel_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (direction, pairs) in zip(panel_axes, panels, strict=True):
        _title(axes, *report.roles(direction), room=84 // len(panels))
        room = MIN_LABEL_SHARE * len(panels) / 2
        for place, pair in enumerate(pairs):
            _bar(axes, place, pair, colors, room)
        repeated = axes is not panel_axes[0] and all(names == labels[0] for names in labels)
        _frame(axes, pairs, [] if repeated else list(map(_label, pairs)))
    _legend(figure, report, colors)
    if path is not None:
        _save(figure, Path(path))
    return figure


def _bar(axes: Axes, place: int, pair: PairResult, colors: list[str], room: float) -> None:
    explained = _clip(pair.explained)
    axes.barh(
        place,
        1 - explained,
        BAR_HEIGHT,
        left=explained,
        color=UNEXPLAINED_COLOR,
        edgecolor=HATCH_COLOR,
        hatch="/////",
        linewidth=0,
    )
    if pair.additive:
        left = 0.0
        for share, color in zip(pair.shares, colors, strict=False):
            right = _clip(min(left + max(share, 0.0), explained) if not math.isnan(share) else left)
            axes.barh(place, right - left, BAR_HEIGHT, left=left, color=color, edgecolor="white", linewidth=0.6)
            if right - left >= room:
                axes.text(
                    _clear_of(pair.noise_floor, left, right),
                    place,
                    _figure(share),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=text_color_on(color),
                    zorder=6,
                )
            left = right
    else:  # correlated components cannot be stacked: one bar, and a marker per component
        axes.barh(place, explained, BAR_HEIGHT, color="#c9d8e6", linewidth=0)
        for variance, color in zip(pair.component_variances, colors, strict=False):
            axes.plot(
                variance,
                place,
                marker="D",
                markersize=5.5,
                color=color,
                markeredgecolor="white",
                markeredgewidth=0.7,
                linestyle="none",
                zorder=5,
            )
    if 1 - explained >= room * 1.15 and not math.isnan(pair.unexplained):
        label = axes.text(
            (1 + explained) / 2,
            place,
            _figure(pair.unexplained),
            ha="center",
            va="center",
            fontsize=8,
            color=TEXT_COLOR,
            zorder=6,
        )
        label.set_bbox({"facecolor": UNEXPLAINED_COLOR, "edgecolor": "none", "pad": 1.2})
    low, high = 1 - pair.interval[1], 1 - pair.interval[0]
    if math.isfinite(low) and math.isfinite(high):
        # Under the bar: never over a figure, nor dark on dark
        low, high, below = _clip(low), _clip(high), place + BAR_HEIGHT / 2 + 0.1
        axes.plot([low, high], [below, below], color=TEXT_COLOR, linewidth=1.1, solid_capstyle="butt", zorder=5)
        for end in (low, high):
            axes.plot([end, end], [below - 0.07, below + 0.07], color=TEXT_COLOR, linewidth=1.1, zorder=5)
    if pair.noise_floor is not None and math.isfinite(pair.noise_floor):
        at = _clip(pair.noise_floor)
        axes.plot(
            [at, at],
            [place - BAR_HEIGHT / 2 - 0.06, place + BAR_HEIGHT / 2 + 0.06],
            color=NOISE_FLOOR_COLOR,
            linewidth=1.8,
            solid_capstyle="butt",
            zorder=7,
            clip_on=False,
        )


def _title(axes: Axes, explaining: str, explained: str, room: int) -> None:
    """What is explained from what: smaller where it is long, and only then with shortened names."""
    words = " explained from "
    longest = (room * 5 // 4 - len(words)) // 2
    whole = f"{explained}{words}{explaining}"
    text = (
        whole if len(whole) <= room * 5 // 4 else f"{_fitted(explained, longest)}{words}{_fitted(explaining, longest)}"
    )
    axes.set_title(text, fontsize=10.5 if len(text) <= room else 9.0, color=TEXT_COLOR, loc="left", pad=8)


def _clear_of(mark: float | None, left: float, right: float) -> float:
    """Where a figure goes in a piece: its middle, or the middle of the wider part where the noise floor's mark would cross it."""
    middle = (left + right) / 2
    if mark is None or math.isnan(mark) or abs(mark - middle) > MIN_LABEL_SHARE / 2:
        return middle
    return (mark + right) / 2 if mark <= middle else (left + mark) / 2


def _label(pair: PairResult) -> str:
    """In two lines where both layers together are long."""
    name = pair_name(pair)
    if pair.source == pair.target or len(name) <= MAX_NAME_CHARACTERS:
        return _fitted(name, MAX_NAME_CHARACTERS)
    return f"{_fitted(pair.source, MAX_NAME_CHARACTERS)}\n→ {_fitted(pair.target, MAX_NAME_CHARACTERS - 2)}"


def _frame(axes: Axes, pairs: tuple[PairResult, ...], names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=9, color=TEXT_COLOR, linespacing=1.05)
    axes.set_ylim(len(pairs) - 0.45, -0.55)  # the first layer on top
    widest = max(
        [1.0, *(v for pair in pairs if not pair.additive for v in pair.component_variances if math.isfinite(v))]
    )
    axes.set_xlim(0, 1.0 if widest == 1 else widest * 1.04)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25", "50", "75", "100 %"], fontsize=8, color=MUTED_COLOR)
    axes.tick_params(axis="both", length=0, pad=5)
    axes.set_xlabel("share of the explained layer's variance", fontsize=8.5, color=MUTED_COLOR)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _legend(figure: Figure, report: Report, colors: list[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    marks: list[Any] = []
    if any(pair.additive for pair in report.pairs):
        marks += [
            Patch(facecolor=color, label=f"order {k}{' (linear)' if k == 0 else ''}") for k, color in enumerate(colors)
        ]
    if not all(pair.additive for pair in report.pairs):
        marks.append(Patch(facecolor="#c9d8e6", label="explained"))
        marks += [
            Line2D([], [], marker="D", linestyle="none", color=color, markersize=5.5, label=f"Var(order {k})")
            for k, color in enumerate(colors)
        ]
    marks.append(
        Patch(facecolor=UNEXPLAINED_COLOR, edgecolor=HATCH_COLOR, hatch="/////", linewidth=0, label="unexplained")
    )
    marks.append(Line2D([], [], color=TEXT_COLOR, linewidth=1.1, marker="|", markersize=6, label="95 % interval"))
    if any(pair.noise_floor is not None for pair in report.pairs):
        marks.append(
            Line2D(
                [],
                [],
                color=NOISE_FLOOR_COLOR,
                linewidth=1.8,
                marker="|",
                markersize=9,
                markeredgewidth=1.8,
                linestyle="none",
                label="noise floor",
            )
        )
    legend = figure.legend(
        handles=marks,
        loc="outside lower center",
        ncols=len(marks),
        frameon=False,
        fontsize=8.5,
        labelcolor=TEXT_COLOR,
        handlelength=1.3,
        columnspacing=1.6,
    )
    legend.set_in_layout(True)


def _save(figure: Figure, path: Path) -> None:
    kinds = sorted(figure.canvas.get_supported_filetypes())
    kind = path.suffix.lstrip(".").lower() or "png"
    if kind not in kinds:
        raise OptionError(f"cannot write a picture as {path.suffix!r}; expected one of {', '.join(kinds)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=REPORT_DPI, format=kind)


def _figure(share: float) -> str:
    return f"{100 * share:.1f}"


def _clip(share: float) -> float:
    """Inside the bar; held-out shares may be slightly negative, and a failed fit leaves more than everything unexplained."""
    return 0.0 if math.isnan(share) else min(max(share, 0.0), 1.0)


def _fitted(name: str, room: int) -> str:
    """Long names lose their middle: both ends tell layers apart.

    Example:
        >>> _fitted("encoder.stages.3.blocks.12.mlp.fc2", 20)
        'encoder.s…12.mlp.fc2'
    """
    if len(name) <= room:
        return name
    head = (room - 1) // 2
    return f"{name[:head]}…{name[len(name) - (room - 1 - head) :]}"
