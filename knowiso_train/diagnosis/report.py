"""Results of a diagnosis, and their JSON form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from knowiso_train.diagnosis._page import diagnosis_page
from knowiso_train.diagnosis.render import render_diagnosis, render_layer
from knowiso_train.errors import FormatError, LayerNameError
from knowiso_train.measurement.report import PairResult
from knowiso_train.utils.saved_report import SavedReport
from knowiso_train.utils.serialization import write_if_given

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kind = Literal["blind_spots", "unreliable"]
KINDS: tuple[Kind, ...] = get_args(Kind)
HeatMap = tuple[tuple[float, ...], ...]


def _check_heat_map(values: HeatMap, label: str) -> None:
    widths = {len(row) for row in values}
    if len(widths) != 1 or 0 in widths:
        raise FormatError(f"{label}: expected rows of one length, got lengths {sorted(widths)}")


@dataclass(frozen=True)
class RankedImage:
    """Image that holds much of a residual, or of one direction.

    Attributes:
        index: Index in the dataset; for other loaders than DataLoaders, its number in reading order.
        label: Class. None: no labels.
        share: Share of the energy of all report images that this image holds.
        value: Projection on the direction at the peak, in standard deviations of the feature along the direction. None:
            a whole residual.
        peak: (row, column) of the position with most energy, on the feature's grid.
        heat_map: Energy of each position over the mean energy of the target's positions, at most 14 × 14. The mean of
            the maps of all images is the share.
    """

    index: int
    label: int | None
    share: float
    value: float | None
    peak: tuple[int, int]
    heat_map: HeatMap

    def check_saved(self, label: str) -> None:
        """Check values that were read from a file.

        Raises:
            FormatError: A heat map whose rows differ in length.
        """
        _check_heat_map(self.heat_map, f"{label}: 'heat_map'")


@dataclass(frozen=True)
class OutputEffect:
    """Change of a network's output when a part is removed from one of its features.

    Attributes:
        kl: Mean of KL(unchanged output ‖ changed output), in nats.
        agreement: Share of the outputs with the same highest class as the unchanged ones.
        top1_change: Top-1 accuracy with the change minus that without. None: no labels.
    """

    kl: float
    agreement: float
    top1_change: float | None


@dataclass(frozen=True)
class FeatureDirection:
    """Principal direction of a residual, or of an explained part, in the channels of the examined feature.

    Attributes:
        share: Share of the feature's variance: that of the residual along a residual direction, and that of the
            explained part along a shared direction.
        unexplained: Share of the feature's variance along this direction that is not reproduced.
        channels: Channels with the largest weights.
        weights: Weights of these channels in the direction, which has length 1.
        images: Images with most energy along the direction. For a shared direction, the energy is the product of the
            projections of feature and explained part, which is large where both networks respond.
        effect: Effect on the output when the residual along this direction is removed from the feature. None: not
            measured.
        confirmed: Share of the residual along this direction that each other network reproduces, in the order of
            `LayerDiagnosis.confirmations`.
        vector: (C,) tensor of length 1; neither saved nor compared.
    """

    share: float
    unexplained: float
    channels: tuple[int, ...]
    weights: tuple[float, ...]
    images: tuple[RankedImage, ...]
    effect: OutputEffect | None = None
    confirmed: tuple[float, ...] = ()
    vector: Any = field(default=None, repr=False, compare=False)

    def check_saved(self, label: str) -> None:
        """Check values that were read from a file.

        Raises:
            FormatError: Another number of weights than of channels.
        """
        if len(self.channels) != len(self.weights):
            raise FormatError(
                f"{label}: expected one weight per channel, got {len(self.weights)} for {len(self.channels)}"
            )


@dataclass(frozen=True)
class ClassResult:
    """Residual of the images of one class.

    Attributes:
        label: Class.
        images: Number of report images.
        unexplained: Share of the energy of the feature in these images that is not reproduced. Energies are taken about
            the mean of all report images.
        share: Share of the residual's energy that these images hold.
    """

    label: int
    images: int
    unexplained: float
    share: float

    def check_saved(self, label: str) -> None:
        """Check values that were read from a file.

        Raises:
            FormatError: A negative class.
        """
        if self.label < 0:
            raise FormatError(f"{label}: expected a class of at least 0, got {self.label}")


@dataclass(frozen=True)
class Confirmation:
    """Part of a residual that another strong network reproduces.

    Attributes:
        network: Name of that network.
        share: Share of the feature's variance that the explaining network does not reproduce and this one does.
        channels: The same for each channel, relative to its own variance.
    """

    network: str
    share: float
    channels: tuple[float, ...]


@dataclass(frozen=True)
class LayerDiagnosis:
    """Residual of one layer: blind spots of the weak network, or unreliable features of it.

    Attributes:
        kind: "blind_spots" (residual of a strong network's feature given the weak network) or "unreliable" (residual of
            the weak network's feature given a strong one).
        network: Name of the network whose feature is examined.
        explaining: Name of the network that the feature is explained from.
        pair: Figures of the layer pair: shares, interval, noise floor, functional shares.
        directions: Leading directions of the residual, by share.
        shared: Leading directions of the explained part, by share.
        channels: Unexplained share of each channel's variance.
        channel_variances: Share of the feature's variance that each channel has; they sum to 1.
        positions: Residual energy of each position over the mean energy of the target's positions, (H, W). The mean is
            the unexplained share.
        position_variances: Energy of the feature at each position over the mean of all positions, (H, W).
        classes: Results of the classes, by decreasing unexplained share; empty without labels.
        images: Images that hold most of the residual.
        confirmations: Part of the residual that each other strong network reproduces; empty for a single one.
        warnings: Conditions that limit the accuracy of the figures, beyond those of `pair`.
    """

    kind: Kind
    network: str
    explaining: str
    pair: PairResult
    directions: tuple[FeatureDirection, ...]
    shared: tuple[FeatureDirection, ...]
    channels: tuple[float, ...]
    channel_variances: tuple[float, ...]
    positions: HeatMap
    position_variances: HeatMap
    classes: tuple[ClassResult, ...]
    images: tuple[RankedImage, ...]
    confirmations: tuple[Confirmation, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def layer(self) -> str:
        """Name of the examined layer."""
        return self.pair.target

    @property
    def confirmed_by_all(self) -> float | None:
        """Share of the variance that is unexplained here and that every other strong network confirms, at most."""
        return min((entry.share for entry in self.confirmations), default=None)

    @property
    def confirmed_by_none(self) -> float | None:
        """Share of the variance that no other network confirms, at most: what the examined network alone has."""
        if not self.confirmations:
            return None
        return self.pair.unexplained - max(entry.share for entry in self.confirmations)

    def check_saved(self, label: str) -> None:
        """Check values that were read from a file.

        Raises:
            FormatError: Different numbers of channels, or a heat map whose rows differ in length.
        """
        counts = {len(self.channels), len(self.channel_variances), *(len(c.channels) for c in self.confirmations)}
        if len(counts) > 1:
            raise FormatError(f"{label}: expected one value per channel in each list, got {sorted(counts)} values")
        _check_heat_map(self.positions, f"{label}: 'positions'")
        _check_heat_map(self.position_variances, f"{label}: 'position_variances'")

    def __str__(self) -> str:
        return render_layer(self)


@dataclass(frozen=True)
class Thumbnail:
    """Small picture of a report image.

    Attributes:
        index: Index in the dataset, as in `RankedImage.index`.
        picture: PNG file as a data URI ("data:image/png;base64,…"), at most 96 pixels wide and high.
    """

    index: int
    picture: str


@dataclass(frozen=True)
class Diagnosis(SavedReport):
    """Blind spots and unreliable features of a weak network beside one or several strong ones.

    Attributes:
        weak: Name of the weak network.
        strong: Names of the strong networks.
        layers: One result for each layer pair, strong network and kind.
        images: Numbers of images to fit, select and report on.
        thumbnails: Pictures of the images in the results, as far as they are images.
        class_names: Name of each class; empty if none were given.
        settings: Options that determine the figures.
        seconds: Wall-clock time.
        versions: Versions of the packages that affect the figures.
    """

    saved_format = "knowiso_train.Diagnosis"
    saved_indent = None

    weak: str
    strong: tuple[str, ...]
    layers: tuple[LayerDiagnosis, ...]
    images: dict[str, int]
    thumbnails: tuple[Thumbnail, ...]
    class_names: tuple[str, ...]
    settings: dict[str, Any]
    seconds: float
    versions: dict[str, str]

    @property
    def blind_spots(self) -> tuple[LayerDiagnosis, ...]:
        """Residuals of the strong networks' features given the weak network."""
        return tuple(layer for layer in self.layers if layer.kind == "blind_spots")

    @property
    def unreliable(self) -> tuple[LayerDiagnosis, ...]:
        """Residuals of the weak network's features given a strong network."""
        return tuple(layer for layer in self.layers if layer.kind == "unreliable")

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerDiagnosis]:
        return iter(self.layers)

    def __getitem__(self, key: str | tuple[str, str]) -> LayerDiagnosis:
        """Return the result of an examined layer: `diagnosis["layer3"]`, or `diagnosis["layer3", "unreliable"]`.

        The default kind is "blind_spots". With several strong networks, the first result is returned.

        Raises:
            LayerNameError: No result for this layer and kind; the message lists the layers.
        """
        name, kind = key if isinstance(key, tuple) else (key, "blind_spots")
        if kind not in KINDS:
            raise LayerNameError(
                f"expected diagnosis[layer] or diagnosis[layer, kind] with kind one of {KINDS}, got {key!r}"
            )
        layers = [layer for layer in self.layers if layer.kind == kind]
        for layer in layers:
            if layer.layer == name:
                return layer
        listed = ", ".join(dict.fromkeys(layer.layer for layer in layers)) or "none"
        raise LayerNameError(f"no result of {kind} for layer {name!r}; examined: {listed}")

    def __str__(self) -> str:
        return render_diagnosis(self)

    def to_html(self, path: str | Path | None = None, *, title: str | None = None) -> str:
        """Return a page in one HTML file that needs no network access: directions, images, classes and channels.

        Args:
            path: File to write as well. None: no file.
            title: Heading of the page. None: the names of the networks.

        Examples:
            >>> page = Diagnosis("small", ("large",), (), {"fit": 60}, (), (), {}, 0.1, {}).to_html()
            >>> "<h1>Diagnosis of small beside large</h1>" in page
            True
        """
        return write_if_given(diagnosis_page(self, title), path)

    def plot(self, path: str | Path | None = None, *, title: str | None = None) -> Figure:
        """Plot one row per result: unexplained share by channel, heat map of the positions, and bars of the classes.

        Args:
            path: File to write (.png, .pdf, .svg). None: no file.
            title: Title above the panels. None: no title.

        Raises:
            MissingDependencyError: matplotlib is not installed.
            OptionError: A file type that matplotlib cannot write, or a diagnosis without layers.
        """
        from knowiso_train.diagnosis._plot import plot_diagnosis

        return plot_diagnosis(self, path, title=title)
