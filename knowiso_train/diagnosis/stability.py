"""Stability: isomorphism of networks that were trained for one task."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from tqdm.auto import tqdm

from knowiso_train.diagnosis._stability_page import stability_page
from knowiso_train.errors import LayerNameError, OptionError
from knowiso_train.features.modules import resolve_layers
from knowiso_train.features.state import on_device, preserve_state
from knowiso_train.measurement._shared_network import SharedNetwork
from knowiso_train.measurement.config import MeasureConfig
from knowiso_train.measurement.data import SplitImageLoader
from knowiso_train.measurement.measure import run_measurement
from knowiso_train.measurement.render import duration, image_counts, percent
from knowiso_train.measurement.report import PairResult
from knowiso_train.utils.environment import library_versions
from knowiso_train.utils.memory import usable_bytes
from knowiso_train.utils.saved_report import SavedReport
from knowiso_train.utils.serialization import write_if_given
from knowiso_train.utils.text_table import format_table
from knowiso_train.utils.validation import NonNegativeFloat, check_known_names, validate_arguments

if TYPE_CHECKING:
    from matplotlib.figure import Figure

StabilityFigure = Literal["unexplained", "agreement", "kl", "residual_agreement"]
FIGURES: tuple[StabilityFigure, ...] = get_args(StabilityFigure)
# Options of MeasureConfig that `stability` sets itself
FIXED_OPTIONS = ("directions", "source_transform", "target_transform", "names", "order", "progress", "functional")

Transform = Callable[[Any], Any]


@dataclass(frozen=True)
class StabilityEntry:
    """Figures of one layer for one ordered pair of networks.

    Attributes:
        layer: Name of the layer in the first network.
        source: Name of the explaining network.
        target: Name of the explained network.
        pair: Measured figures.
    """

    layer: str
    source: str
    target: str
    pair: PairResult


@dataclass(frozen=True)
class Spread:
    """Distribution of a figure over the ordered pairs of networks.

    Attributes:
        mean: Mean.
        deviation: Standard deviation, 0 for a single pair.
        minimum: Smallest value.
        maximum: Largest value.
    """

    mean: float
    deviation: float
    minimum: float
    maximum: float


@dataclass(frozen=True)
class StabilityReport(SavedReport):
    """Unexplained and functional shares of several networks of one task, over all ordered pairs.

    Attributes:
        networks: Names of the networks.
        layers: Names of the layers in the first network.
        entries: One result per layer and ordered pair of networks.
        images: Numbers of images to fit, select and report on.
        settings: Options that determine the figures.
        seconds: Wall-clock time.
        versions: Versions of the packages that affect the figures.
    """

    saved_format = "knowiso_train.StabilityReport"

    networks: tuple[str, ...]
    layers: tuple[str, ...]
    entries: tuple[StabilityEntry, ...]
    images: dict[str, int]
    settings: dict[str, Any]
    seconds: float
    versions: dict[str, str]

    def matrix(self, layer: str, figure: StabilityFigure = "unexplained") -> tuple[tuple[float, ...], ...]:
        """Return a figure of a layer for all pairs: one row per explained network, one column per explaining one.

        Args:
            layer: Name of the layer in the first network.
            figure: "unexplained", or of the outputs of the explained network: "agreement" and "kl" with the explained
                part in place of the feature, "residual_agreement" with the residual alone.

        Returns:
            Rows of numbers; NaN on the diagonal, and where the figure was not measured.

        Raises:
            LayerNameError: A layer that was not compared.
            OptionError: Another figure.
        """
        if layer not in self.layers:
            raise LayerNameError(f"no layer {layer!r}; compared: {', '.join(self.layers)}")
        if figure not in FIGURES:
            raise OptionError(f"figure must be one of {FIGURES}, got {figure!r}")
        values = {
            (entry.target, entry.source): _figure(entry.pair, figure) for entry in self.entries if entry.layer == layer
        }
        return tuple(
            tuple(values.get((target, source), math.nan) for source in self.networks) for target in self.networks
        )

    def spread(self, layer: str, figure: StabilityFigure = "unexplained") -> Spread:
        """Return mean and spread of a figure over all ordered pairs; NaN if it was not measured.

        Raises:
            LayerNameError, OptionError: As `matrix`.
        """
        values = [value for row in self.matrix(layer, figure) for value in row if not math.isnan(value)]
        if not values:
            return Spread(*[math.nan] * len(fields(Spread)))
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return Spread(statistics.fmean(values), deviation, min(values), max(values))

    def __str__(self) -> str:
        return _render(self)

    def to_html(self, path: str | Path | None = None, *, title: str | None = None) -> str:
        """Return a page in one HTML file that needs no network access: one matrix per layer and figure.

        Args:
            path: File to write as well. None: no file.
            title: Heading of the page. None: the number of networks.

        Examples:
            >>> page = StabilityReport(("a", "b"), (), (), {"fit": 60}, {}, 0.1, {}).to_html()
            >>> "<h1>Stability of 2 networks</h1>" in page
            True
        """
        return write_if_given(stability_page(self, title), path)

    def plot(
        self, path: str | Path | None = None, *, figure: StabilityFigure = "unexplained", title: str | None = None
    ) -> Figure:
        """Plot one matrix of a figure per layer.

        Args:
            path: File to write (.png, .pdf, .svg). None: no file.
            figure: Figure of `matrix`.
            title: Title above the panels. None: no title.

        Raises:
            MissingDependencyError: matplotlib is not installed.
            OptionError: A file type that matplotlib cannot write.
        """
        from knowiso_train.diagnosis._plot import plot_stability

        return plot_stability(self, path, figure=figure, title=title)


@validate_arguments
def stability(
    networks: Mapping[str, nn.Module] | Sequence[nn.Module],
    loader: Iterable[Any],
    layers: str | Sequence[str] | Mapping[str, Sequence[str]],
    *,
    order: int = 0,
    functional: bool = True,
    transforms: Transform | Mapping[str, Transform] | None = None,
    cache_gib: NonNegativeFloat = 2.0,
    progress: bool = True,
    **options: Any,
) -> StabilityReport:
    """Measure how much networks of one task share, by layer and over all ordered pairs.

    The networks differ by seed, by training data or by architecture. Method: arXiv 1908.01581, section 4.

    Args:
        networks: At least two networks by name, or without names, which are then numbered.
        loader: Batches, as for `measure`.
        layers: Names or globs for all networks, or a list of names for each network, by its name. The lists have equal
            lengths; layers at one place are compared.
        order: Highest number of non-linear steps.
        functional: Also measure the outputs of the explained network with each part in place of the feature.
        transforms: Transform of the images for all networks, or for some by name. None: no transform.
        cache_gib: Largest size of the features of all networks in memory in GiB, so that each network runs once on
            each image to fit on. Above it, and where outputs are needed, a network runs again for each pair.
        progress: Show progress bars.
        **options: Further options of `measure`, such as `max_images` or `kernel_size`.

    Returns:
        A `StabilityReport`.

    Raises:
        OptionError: Fewer than two networks, or an option that `measure` does not have.
        LayerNameError: Layers that cannot be paired.

    Examples:
        >>> import torch
        >>> networks = [nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)) for _ in range(2)]
        >>> loader = torch.utils.data.DataLoader(torch.randn(200, 3, 8, 8), batch_size=50)
        >>> report = stability(networks, loader, "1", progress=False)
        >>> len(report.entries)
        2
    """
    start = time.perf_counter()
    by_name = dict(networks) if isinstance(networks, Mapping) else {f"network {i}": n for i, n in enumerate(networks)}
    if len(by_name) < 2:
        raise OptionError(f"expected at least two networks to compare, got {len(by_name)}")
    names = list(by_name)
    layers_by_name = _layers_by_name(by_name, layers)
    config = _config(order, functional, options)
    images = SplitImageLoader(loader, config.split, config.seed, config.max_images)
    if isinstance(transforms, Mapping):
        check_known_names("transforms", transforms, names, "networks")
    transform_of = transforms.get if isinstance(transforms, Mapping) else lambda name: transforms
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    entries, counts = [], {}
    cache_bytes = min(int(cache_gib * 2**30), usable_bytes(torch.device("cpu")) // 2)
    shared = {name: SharedNetwork(cache_bytes // len(names)) for name in names}
    with ExitStack() as stack:
        stack.enter_context(preserve_state(*by_name.values()))
        stack.enter_context(on_device(config.device, *by_name.values()))
        for a, b in tqdm(pairs, desc="pairs", unit="pair", disable=not progress or images.group.rank > 0):
            pair_config = replace(
                config, names=(a, b), source_transform=transform_of(a), target_transform=transform_of(b)
            )
            layer_pairs = list(zip(layers_by_name[a], layers_by_name[b], strict=True))
            report = run_measurement(
                by_name[a],
                by_name[b],
                images,
                layer_pairs,
                pair_config,
                shared_source=shared[a],
                shared_target=shared[b],
            )
            labels = dict(zip(layer_pairs, layers_by_name[names[0]], strict=True))
            entries += [StabilityEntry(labels[pair.source, pair.target], a, b, pair) for pair in report.forward]
            entries += [StabilityEntry(labels[pair.target, pair.source], b, a, pair) for pair in report.backward]
            counts = report.images
    labels_in_order = layers_by_name[names[0]]
    return StabilityReport(
        networks=tuple(names),
        layers=tuple(labels_in_order),
        entries=tuple(sorted(entries, key=lambda entry: labels_in_order.index(entry.layer))),
        images=counts,
        settings=config.report_settings() | {"processes": images.group.size},
        seconds=time.perf_counter() - start,
        versions=library_versions(),
    )


def _config(order: int, functional: bool, options: Mapping[str, Any]) -> MeasureConfig:
    allowed = [field.name for field in fields(MeasureConfig) if field.name not in FIXED_OPTIONS]
    unknown = [name for name in options if name not in allowed]
    if unknown:
        raise OptionError(f"stability has no option {', '.join(unknown)}; expected some of {', '.join(allowed)}")
    config = MeasureConfig(order=order, functional=functional, directions="both", progress=False, **options)
    config.check_functional_options()
    return config


def _layers_by_name(
    networks: Mapping[str, nn.Module], layers: str | Sequence[str] | Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Return the layers of each network, equally many."""
    if isinstance(layers, Mapping):
        missing = [name for name in networks if name not in layers]
        unknown = [name for name in layers if name not in networks]
        if missing or unknown:
            raise OptionError(
                f"layers= must have the names of the networks as keys, missing {missing or 'none'}, "
                f"unknown {unknown or 'none'}"
            )
    resolved = {
        name: resolve_layers(network, layers[name] if isinstance(layers, Mapping) else layers)
        for name, network in networks.items()
    }
    counts = {name: len(found) for name, found in resolved.items()}
    same_names = isinstance(layers, Mapping) or len({tuple(found) for found in resolved.values()}) == 1
    if len(set(counts.values())) > 1 or not same_names:
        raise LayerNameError(
            f"the networks have different layers for {layers!r}, by network: {counts}; "
            "give a list of equally many names for each network, by its name"
        )
    return {name: list(found) for name, found in resolved.items()}


def _figure(pair: PairResult, figure: StabilityFigure) -> float:
    if figure == "unexplained":
        return pair.unexplained
    if figure == "residual_agreement":
        return math.nan if pair.residual_only is None else pair.residual_only.agreement
    if not pair.functional:
        return math.nan
    return float(getattr(pair.functional[-1], figure))


def _render(report: StabilityReport) -> str:
    """Return a table with one row per layer."""
    counts = image_counts(report.images)
    title = f"{len(report.networks)} networks: {', '.join(report.networks)}"
    rows = [["layer", "unexplained", "from", "to", "agreement", "KL", "residual agreement"]]
    for layer in report.layers:
        share, kl = report.spread(layer), report.spread(layer, "kl")
        rows.append(
            [
                layer,
                _percent_spread(share),
                percent(share.minimum),
                percent(share.maximum),
                _percent_spread(report.spread(layer, "agreement")),
                "–" if math.isnan(kl.mean) else f"{kl.mean:.3g} ± {kl.deviation:.2g}",
                _percent_spread(report.spread(layer, "residual_agreement")),
            ]
        )
    return "\n".join(
        [
            f"{title} · images: {counts} · {duration(report.seconds)}",
            "",
            format_table(rows, rule=True),
            "",
            "Mean ± standard deviation over all ordered pairs. Agreement and KL: output of the explained network with",
            "the explained part in place of its feature, compared with its own output. Residual agreement: with the",
            "residual alone.",
        ]
    )


def _percent_spread(spread: Spread) -> str:
    if math.isnan(spread.mean):
        return "–"
    return f"{percent(spread.mean).removesuffix(' %')} ± {percent(spread.deviation)}"
