"""Page of a diagnosis: blind spots and unreliable features of each layer side by side, with their images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from knowiso_train.diagnosis.render import KIND_TITLES, class_name, key_figures
from knowiso_train.measurement._page import method_details, output_bars, pair_bars
from knowiso_train.measurement.render import duration, image_counts, interval, pair_name, percent
from knowiso_train.pages import (
    Cell,
    Column,
    Html,
    Section,
    Tile,
    difference_bars,
    folded,
    heading,
    heat_image,
    heat_scale,
    image_grid,
    join,
    paragraph,
    picture,
    render_page,
    side_by_side,
    table,
    term,
)

if TYPE_CHECKING:
    from knowiso_train.diagnosis.report import Diagnosis, FeatureDirection, HeatMap, Kind, LayerDiagnosis, RankedImage

PAGE_CHANNELS = 10  # bars of the channels with most residual; a folded table has all
SHOWN_DIRECTIONS = 3  # the others are folded
STRONGEST_QUANTILE = 0.98  # of the values of heat maps side by side: it and larger ones have the strongest color
OVERVIEW_AIDS: dict[Kind, str] = {
    "blind_spots": "Each bar is a layer of the strong network; the weak network cannot reproduce the hatched part.",
    "unreliable": "Each bar is a layer of the weak network; the strong network cannot reproduce the hatched part.",
}
HEAT_AID = "Light colors mark where it is strongest; the pointer over an image hides them."
DIRECTION_AID = (
    "Each row is a direction of the residual with the images that hold most of it, and their shares of it. " + HEAT_AID
)
SHARED_AID = "Each row is a direction that both networks have, with the images where both respond most."
IMAGES_AID = "These images hold most of the residual; the number is the share of each. " + HEAT_AID
POSITIONS_AID = "Residual at each position over all images, as a share of the mean variance of a position."
CLASSES_AID = "Share of each class that is not reproduced, beside that of all images."
CHANNELS_AID = "The channels that hold most of the residual: the share of each that is not reproduced."


def diagnosis_page(diagnosis: Diagnosis, title: str | None = None) -> str:
    """Return the page; see `Diagnosis.to_html`."""
    names = f"{diagnosis.weak} beside {', '.join(diagnosis.strong)}"
    counts = image_counts(diagnosis.images)
    sections = [Section("In short", _summary(diagnosis)), Section("All layers", _overview(diagnosis))]
    sections = sections if diagnosis.layers else []
    sections += [
        Section(name, side_by_side([_LayerColumn(diagnosis, layer).parts() for layer in layers]))
        for name, layers in _by_layers(diagnosis).items()
    ]
    if not sections:
        sections = [Section("No layer pairs", paragraph("The diagnosis has no layer pairs."))]
    warnings = [
        f"{pair_name(layer.pair)} ({KIND_TITLES[layer.kind]}): {note}"
        for layer in diagnosis.layers
        for note in (*layer.pair.warnings, *layer.warnings)
    ]
    return render_page(
        title or f"Diagnosis of {names}",
        sections,
        subtitle=f"{names} · images: {counts} · {duration(diagnosis.seconds)}",
        appendix=join(method_details(diagnosis.settings, diagnosis.versions, warnings)),
    )


def _strong(layer: LayerDiagnosis) -> str:
    """Return the name of the strong network of a result."""
    return layer.network if layer.kind == "blind_spots" else layer.explaining


def _label(diagnosis: Diagnosis, layer: LayerDiagnosis) -> str:
    """Return the layers of a result, with the strong network where there are several."""
    return pair_name(layer.pair) + (f", {_strong(layer)}" if len(diagnosis.strong) > 1 else "")


def _by_layers(diagnosis: Diagnosis) -> dict[str, list[LayerDiagnosis]]:
    """Return the results of each layer pair and strong network, blind spots first."""
    groups: dict[str, list[LayerDiagnosis]] = {}
    for layer in sorted(diagnosis.layers, key=lambda layer: layer.kind):
        names = (layer.pair.source, layer.pair.target)
        weak, strong = names if layer.kind == "blind_spots" else names[::-1]
        title = weak if weak == strong else f"{weak} and {strong}"
        groups.setdefault(f"{title}, {_strong(layer)}" if len(diagnosis.strong) > 1 else title, []).append(layer)
    return groups


def _summary(diagnosis: Diagnosis) -> Html:
    """Return the key figures of both kinds side by side, with the images that hold most of the residual."""
    columns = []
    for kind, title in KIND_TITLES.items():
        key = key_figures(diagnosis, kind)
        if key is not None:
            column, name = _LayerColumn(diagnosis, key.layer), f"{key.layer.layer} of {key.layer.network}"
            aid = f"Images that hold most of what is not reproduced of {name}. {HEAT_AID}"
            images = picture(aid, image_grid(column.tiles(key.layer.images, "the residual")))
            parts = [join(term(figure, text) for figure, text in key.lines)]
            columns.append([heading(title.capitalize()), *parts, *([images] if key.layer.images else [])])
    return side_by_side(columns)


def _overview(diagnosis: Diagnosis) -> Html:
    """Return bars of the shares, both kinds side by side, and a table of all results."""
    panels: list[list[Html]] = []
    for kind, aid in OVERVIEW_AIDS.items():
        layers = [layer for layer in diagnosis.layers if layer.kind == kind]
        if layers:
            pairs, labels = [layer.pair for layer in layers], [_label(diagnosis, layer) for layer in layers]
            panel = [heading(KIND_TITLES[kind].capitalize()), picture(aid, pair_bars(pairs, labels))]
            panels.append([*panel, output_bars(pairs, labels)] if any(pair.functional for pair in pairs) else panel)
    columns = [
        Column("layer", numeric=False),
        Column("kind", numeric=False),
        Column("unexplained", hint="Share of the feature's variance that the other network does not reproduce"),
        Column("95 % interval", hint="Bootstrap interval over images; sorted by its width"),
        Column("first direction", hint="Share of the feature's variance in the leading direction of the residual"),
        Column("its KL", hint="Change of the output when the residual in that direction is removed, in nats"),
    ]
    if any(layer.classes for layer in diagnosis.layers):
        columns.append(Column("least explained class", numeric=False))
    rows = [_overview_row(diagnosis, layer)[: len(columns)] for layer in diagnosis.layers]
    return join([side_by_side(panels), table("All results", columns, rows)])


def _overview_row(diagnosis: Diagnosis, layer: LayerDiagnosis) -> list[Cell]:
    first = layer.directions[0] if layer.directions else None
    effect = None if first is None else first.effect
    worst = "–"
    if layer.classes:
        worst = f"{class_name(diagnosis.class_names, layer.classes[0].label)} ({percent(layer.classes[0].unexplained)})"
    low, high = layer.pair.interval
    return [
        Cell(_label(diagnosis, layer)),
        Cell(KIND_TITLES[layer.kind]),
        Cell(percent(layer.pair.unexplained), layer.pair.unexplained),
        Cell(interval(layer.pair.interval), high - low),
        Cell("–") if first is None else Cell(percent(first.share), first.share),
        Cell("–") if effect is None else Cell(f"{effect.kl:.3g}", effect.kl),
        Cell(worst),
    ]


class _LayerColumn:
    """Column of the page with one result.

    Args:
        diagnosis: Diagnosis with the pictures and class names.
        layer: Result to show.
    """

    def __init__(self, diagnosis: Diagnosis, layer: LayerDiagnosis) -> None:
        self.diagnosis, self.layer = diagnosis, layer
        self.pictures = {thumbnail.index: thumbnail.picture for thumbnail in diagnosis.thumbnails}

    def parts(self) -> list[Html]:
        """Return the elements of the column, equally many for every result."""
        layer = self.layer
        directions = Html("")
        if layer.directions:
            directions = join([heading("Directions"), self._directions(layer.directions, DIRECTION_AID)])
        shared = folded("Shared directions", self._directions(layer.shared, SHARED_AID)) if layer.shared else Html("")
        title = join([heading(KIND_TITLES[layer.kind].capitalize()), paragraph(self._summary())])
        return [title, directions, self._images(), self._classes(), self._channels(), shared]

    def _summary(self) -> str:
        layer = self.layer
        sentences = [
            f"{layer.explaining} does not reproduce {percent(layer.pair.unexplained)} "
            f"({interval(layer.pair.interval)}) of the variance of {layer.layer} in {layer.network}."
        ]
        sentences += [f"{entry.network} reproduces {percent(entry.share)}." for entry in layer.confirmations]
        if layer.confirmed_by_none is not None:
            sentences.append(f"At most {percent(layer.confirmed_by_none)} is reproduced by none of them.")
        return " ".join(sentences)

    def _directions(self, directions: Sequence[FeatureDirection], aid: str) -> Html:
        """Return a row of images per direction; those beyond the first three are folded."""
        rows = [self._direction(number, direction) for number, direction in enumerate(directions, 1)]
        shown, others = join(rows[:SHOWN_DIRECTIONS]), join(rows[SHOWN_DIRECTIONS:])
        more = folded(f"{len(directions) - SHOWN_DIRECTIONS} more directions", others) if others else Html("")
        return picture(aid, join([heat_scale("no energy", "strongest"), shown, more]))

    def _direction(self, number: int, direction: FeatureDirection) -> Html:
        parts = []
        if (effect := direction.effect) is not None:
            top1 = (
                ""
                if effect.top1_change is None
                else f", top-1 {100 * effect.top1_change:+.1f} points".replace(" -", " −")
            )
            change = percent(1 - effect.agreement)
            parts.append(f"without it, {change} of the predictions change (KL {effect.kl:.2g}{top1})")
        parts.append(f"{percent(direction.unexplained)} of the feature along it is unexplained")
        for entry, share in zip(self.layer.confirmations, direction.confirmed, strict=False):
            parts.append(f"{entry.network} reproduces {percent(share)}")
        parts.append(f"channels {', '.join(map(str, direction.channels))}")
        title = f"{number}. {percent(direction.share)} of the variance"
        return join([term(title, " · ".join(["", *parts])), image_grid(self.tiles(direction.images, "the direction"))])

    def _images(self) -> Html:
        """Return the images with most residual, and the mean over all images."""
        positions = self.layer.positions
        values = np.array(positions)
        caption = f"{percent(values.min())} … {percent(values.max())}"
        mean = Tile("", caption, f"residual at each position: {caption}", _heat(positions, _maximum([positions])))
        parts = [heading("Images"), picture(IMAGES_AID, image_grid(self.tiles(self.layer.images, "the residual")))]
        where = [heading("Positions"), picture(POSITIONS_AID, image_grid([mean]))]
        return join([*(parts if self.layer.images else []), *where])

    def tiles(self, images: Sequence[RankedImage], part: str) -> list[Tile]:
        """Return images with heat maps of one common scale, which single positions do not determine."""
        values = [value for image in images for row in image.heat_map for value in row]
        maximum = float(np.quantile(values or [0.0], STRONGEST_QUANTILE))
        tiles = []
        for image in images:
            name = f"image {image.index}"
            hints = [name, f"{percent(image.share)} of the energy of {part}"]
            if image.label is not None:
                name = class_name(self.diagnosis.class_names, image.label)
                hints.insert(1, f"class {name}")
            if image.value is not None:
                hints.append(f"{image.value:+.1f} standard deviations at the peak")
            hints.append(f"peak at row {image.peak[0]}, column {image.peak[1]}")
            hints.append(f"at most {_maximum([image.heat_map]):.3g} times the feature's mean energy")
            heat = _heat(image.heat_map, maximum)
            caption = f"{name}\n{percent(image.share)}"
            tiles.append(Tile(self.pictures.get(image.index, ""), caption, ", ".join(hints), heat))
        return tiles

    def _classes(self) -> Html:
        """Return one bar per class; nothing without labels."""
        classes = self.layer.classes
        if not classes:
            return Html("")
        bars = []
        for entry in classes:
            name = class_name(self.diagnosis.class_names, entry.label)
            hint = f"{name}: {percent(entry.unexplained)} unexplained in {entry.images:,} images, "
            hint += f"{percent(entry.share)} of the residual"
            bars.append((name, entry.unexplained, hint))
        chart = difference_bars(bars, self.layer.pair.unexplained, "all images", text_title="unexplained")
        return join([heading("Classes"), picture(CLASSES_AID, chart)])

    def _channels(self) -> Html:
        """Return bars of the channels with most residual, and a table of all."""
        layer = self.layer
        energies = np.array(layer.channels) * np.array(layer.channel_variances)
        bars = [
            (
                f"channel {c}",
                layer.channels[c],
                f"channel {c}: {percent(layer.channels[c])} unexplained, {percent(energies[c])} of all variance",
            )
            for c in np.argsort(-energies)[:PAGE_CHANNELS].tolist()
        ]
        chart = difference_bars(bars, layer.pair.unexplained, "all channels", text_title="unexplained")
        columns = [
            Column("channel"),
            Column("unexplained"),
            Column("share of the variance"),
            Column("share of the residual"),
        ]
        total = float(energies.sum())
        rows = [
            [
                Cell(str(c), c),
                Cell(percent(share), share),
                Cell(percent(variance), variance),
                Cell(percent(energy / total if total else None), float(energy)),
            ]
            for c, (share, variance, energy) in enumerate(
                zip(layer.channels, layer.channel_variances, energies, strict=True)
            )
        ]
        all_channels = folded(f"All {len(rows)} channels", table("Channels", columns, rows), printed=False)
        return join([heading("Channels"), picture(CHANNELS_AID, chart), all_channels])


def _heat(values: HeatMap, maximum: float) -> str:
    return heat_image(np.array(values, float), maximum)


def _maximum(maps: Sequence[HeatMap]) -> float:
    """Return the largest value of several maps."""
    return max((value for heat_map in maps for row in heat_map for value in row), default=0.0)
