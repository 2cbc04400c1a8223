"""Text tables of a diagnosis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowiso_train.measurement.render import duration, image_counts, interval, pair_name, percent
from knowiso_train.utils.text_table import format_table

if TYPE_CHECKING:
    from knowiso_train.diagnosis.report import Diagnosis, FeatureDirection, Kind, LayerDiagnosis

KIND_TITLES: dict[Kind, str] = {"blind_spots": "blind spots", "unreliable": "unreliable features"}
TABLE_CLASSES, TABLE_CHANNELS, TABLE_IMAGES = 10, 10, 5


def render_diagnosis(diagnosis: Diagnosis) -> str:
    """Return an aligned table with one row per result."""
    counts = image_counts(diagnosis.images)
    title = f"{diagnosis.weak} beside {', '.join(diagnosis.strong)}"
    lines = [" · ".join([title, f"images: {counts}", duration(diagnosis.seconds)]), ""]
    head = ["layer", "unexplained", "95 % interval", "first direction", "its KL", "most unexplained class"]
    groups: dict[str, list[LayerDiagnosis]] = {}
    for layer in diagnosis.layers:
        groups.setdefault(block_title(layer), []).append(layer)
    rows = [[_summary_cells(layer, diagnosis.class_names) for layer in layers] for layers in groups.values()]
    table = format_table([head, *(row for block in rows for row in block)], rule=True, indent="  ")
    header_line, rule, *body = table.split("\n")
    for name, block in zip(groups, rows, strict=True):
        lines += [name, header_line, rule, *body[: len(block)], ""]
        body = body[len(block) :]
    if not groups:
        lines += ["no layer pairs", ""]
    for kind, title in KIND_TITLES.items():
        if (key := key_figures(diagnosis, kind)) is not None:
            lines += [f"{title.capitalize()}:", *(f"  {figure} {text}" for figure, text in key.lines), ""]
    lines.append("First direction: share of the feature's variance in the leading direction of the residual.")
    lines.append('print(diagnosis["layer"]) lists directions, channels, classes and images of a layer.')
    notes = [
        f"! {pair_name(layer.pair)} ({layer.kind}): {note}"
        for layer in diagnosis
        for note in (*layer.pair.warnings, *layer.warnings)
    ]
    return "\n".join([*lines, "", *notes] if notes else lines)


@dataclass(frozen=True)
class KeyFigures:
    """Figures that sum up the results of one kind.

    Attributes:
        lines: Each figure with the text that follows it.
        layer: Result whose images show the residual: that with the largest change of the output, if it is measured.
    """

    lines: tuple[tuple[str, str], ...]
    layer: LayerDiagnosis


def key_figures(diagnosis: Diagnosis, kind: Kind) -> KeyFigures | None:
    """Return the figures that sum up the blind spots, or the unreliable features; None if there are no results."""
    layers = [layer for layer in diagnosis if layer.kind == kind]
    if not layers:
        return None
    largest = max(layers, key=lambda layer: layer.pair.unexplained)
    text = f"of the variance of {_place(largest)} cannot be computed from {largest.explaining}"
    lines = [
        (percent(largest.pair.unexplained), f"{text}, more than of any other layer." if layers[1:] else f"{text}.")
    ]
    measured = [layer for layer in layers if layer.pair.functional]
    shown = min(measured, key=lambda layer: layer.pair.functional[-1].agreement, default=largest)
    if measured:
        text = f"of the predictions change with the reproduced part alone in place of {_place(shown)}"
        text += ", more than at any other layer." if measured[1:] else "."
        lines.append((percent(1 - shown.pair.functional[-1].agreement), text))
    if classes := [(layer.classes[0], layer) for layer in layers if layer.classes]:
        first, layer = max(classes, key=lambda entry: entry[0].unexplained - entry[1].pair.unexplained)
        name = class_name(diagnosis.class_names, first.label).removeprefix("class ")
        text = f"of {_place(layer)} is not reproduced in images of class {name}, against"
        lines.append((percent(first.unexplained), f"{text} {percent(layer.pair.unexplained)} over all images."))
    effects = [
        (1 - direction.effect.agreement, number, layer)
        for layer in layers
        for number, direction in enumerate(layer.directions, 1)
        if direction.effect is not None
    ]
    if effects:
        change, number, layer = max(effects, key=lambda effect: effect[0])
        text = f"of the predictions change without direction {number} of {_place(layer)}, more than without any other."
        lines.append((percent(change), text if change > 0 else "of the predictions change without any one direction."))
    return KeyFigures(tuple(lines), shown)


def _place(layer: LayerDiagnosis) -> str:
    return f"{layer.layer} of {layer.network}"


def class_name(class_names: Sequence[str], label: int) -> str:
    """Return the name of a class, or its number where it has no name."""
    return class_names[label] if 0 <= label < len(class_names) else f"class {label}"


def block_title(layer: LayerDiagnosis) -> str:
    """Return the kind of a result and the names of both networks."""
    return f"{KIND_TITLES[layer.kind]}: {layer.network} not explained from {layer.explaining}"


def render_layer(layer: LayerDiagnosis) -> str:
    """Return tables of the directions, channels, classes and images of one layer."""
    lines = [
        f"{block_title(layer)}, layer {pair_name(layer.pair)}",
        f"unexplained {percent(layer.pair.unexplained)} ({interval(layer.pair.interval)})",
    ]
    if layer.pair.functional and layer.pair.residual_only is not None:
        explained, residual = layer.pair.functional[-1], layer.pair.residual_only
        lines.append(
            f"output with the explained part alone: agreement {percent(explained.agreement)}, KL {explained.kl:.3g}; "
            f"with the residual alone: {percent(residual.agreement)}, {residual.kl:.3g}"
        )
    for entry in layer.confirmations:
        lines.append(f"reproduced by {entry.network}: {percent(entry.share)}")
    if layer.directions:
        lines += ["", _direction_table("direction", layer.directions)]
    if layer.shared:
        lines += ["", _direction_table("shared", layer.shared)]
    order = sorted(
        range(len(layer.channels)), key=lambda c: layer.channels[c] * layer.channel_variances[c], reverse=True
    )
    rows = [[str(c), percent(layer.channels[c]), percent(layer.channel_variances[c])] for c in order[:TABLE_CHANNELS]]
    lines += ["", format_table([["channel", "unexplained", "share of variance"], *rows], rule=True)]
    if layer.classes:
        rows = [
            [str(entry.label), str(entry.images), percent(entry.unexplained), percent(entry.share)]
            for entry in layer.classes[:TABLE_CLASSES]
        ]
        lines += ["", format_table([["class", "images", "unexplained", "share of residual"], *rows], rule=True)]
    rows = [
        [str(image.index), "–" if image.label is None else str(image.label), percent(image.share), str(image.peak)]
        for image in layer.images[:TABLE_IMAGES]
    ]
    lines += ["", format_table([["image", "class", "share of residual", "peak"], *rows], rule=True)]
    return "\n".join(lines)


def _summary_cells(layer: LayerDiagnosis, class_names: Sequence[str]) -> list[str]:
    first = layer.directions[0] if layer.directions else None
    effect = first.effect if first else None
    label = "–"
    if layer.classes:
        top = layer.classes[0]
        label = f"{class_name(class_names, top.label)} ({percent(top.unexplained)})"
    return [
        pair_name(layer.pair),
        percent(layer.pair.unexplained),
        interval(layer.pair.interval),
        percent(first.share if first else None),
        "–" if effect is None else f"{effect.kl:.3g}",
        label,
    ]


def _direction_table(name: str, directions: Sequence[FeatureDirection]) -> str:
    has_effect = any(direction.effect is not None for direction in directions)
    head = [name, "share", "unexplained", *(["KL", "agreement"] if has_effect else []), "channels", "images"]
    rows = [head]
    for i, direction in enumerate(directions, 1):
        effect = direction.effect
        cells = ["–", "–"] if effect is None else [f"{effect.kl:.3g}", percent(effect.agreement)]
        channels = ", ".join(map(str, direction.channels))
        images = ", ".join(str(image.index) for image in direction.images)
        figures = [percent(direction.share), percent(direction.unexplained), *(cells if has_effect else [])]
        rows.append([str(i), *figures, channels, images])
    return format_table(rows, left=(0, -2, -1), rule=True)
