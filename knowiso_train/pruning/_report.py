"""Reports of pruning, refitting and fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from knowiso_train.utils.environment import library_versions
from knowiso_train.utils.serialization import dump_json, write_if_given
from knowiso_train.utils.text_table import format_table


@dataclass(frozen=True)
class RefitReport:
    """Unexplained share (1 - R²) of each layer's target before and after the refit, on held-out images.

    Attributes:
        layers: Results of the refitted layers, in forward order.
        blocks: Results of the fine-tuned blocks.
    """

    layers: tuple[LayerFit, ...]
    blocks: tuple[BlockResult, ...] = ()

    def __str__(self) -> str:
        layers = [[fit.name, str(fit.num_inputs), _percent(fit.before), _percent(fit.after)] for fit in self.layers]
        text = format_table([["layer", "inputs", "unexplained", "refitted"], *layers])
        if not self.blocks:
            return text
        blocks = [[block.name, _percent(block.before), _percent(block.after)] for block in self.blocks]
        return text + "\n\n" + format_table([["block", "unexplained", "finetuned"], *blocks])


@dataclass(frozen=True)
class LayerFit:
    """Result of one refitted layer.

    Attributes:
        name: Name of the layer.
        num_inputs: Input channels.
        num_samples: Samples of its regression.
        before: Unexplained share of the target with the remaining original weights, on held-out images. If a ReLU
            follows, the share of what passes it.
        after: The same with the refitted weights.
    """

    name: str
    num_inputs: int
    num_samples: int
    before: float
    after: float


@dataclass(frozen=True)
class BlockResult:
    """Result of one fine-tuned block.

    Attributes:
        name: Name of the module.
        before: Unexplained share of the output of the original's block on held-out images, after its layers were
            refitted one by one.
        after: The same after fine-tuning; never larger, since the block is restored otherwise.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class GroupWidth:
    """Width of one channel group before and after pruning.

    Attributes:
        name: Name of the layer that produces the group.
        kind: "channels" or "heads".
        before: Units of the original.
        after: Units of the pruned model.
    """

    name: str
    kind: str
    before: int
    after: int


@dataclass(frozen=True)
class PruneReport:
    """Result of `ki.prune`.

    Attributes:
        widths: Widths of every channel group.
        layers: Results of the refit, in forward order; empty without a refit.
        blocks: Results of the fine-tuned blocks.
        macs: Multiply-adds of the whole network for one image, before and after.
        parameters: Number of parameters, before and after.
        latency: Seconds for the timed batch, before and after; None without a latency budget.
        seconds: Duration of the call.
        images: Number of calibration images.
        settings: Arguments of the call.
    """

    widths: tuple[GroupWidth, ...]
    layers: tuple[LayerFit, ...]
    blocks: tuple[BlockResult, ...]
    macs: tuple[float, float]
    parameters: tuple[int, int]
    latency: tuple[float, float] | None
    seconds: float
    images: int
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as JSON with the versions of the libraries, and write it to a file if a path is given."""
        return _to_json({**asdict(self), "versions": library_versions()}, path)

    def __str__(self) -> str:
        widths = [[width.name, width.kind, str(width.before), str(width.after)] for width in self.widths]
        (macs, pruned_macs), (parameters, pruned_parameters) = self.macs, self.parameters
        costs = [
            ["", "before", "after", ""],
            [
                "multiply-adds",
                _millions(macs, 1),
                _millions(pruned_macs, 1),
                f"{macs / max(pruned_macs, 1):.2f}× fewer",
            ],
            [
                "parameters",
                _millions(parameters, 3),
                _millions(pruned_parameters, 3),
                f"{parameters / max(pruned_parameters, 1):.2f}× fewer",
            ],
        ]
        if self.latency is not None:
            before, after = self.latency
            costs.append(
                ["latency", f"{1e3 * before:.1f} ms", f"{1e3 * after:.1f} ms", f"{before / after:.2f}× faster"]
            )
        tables = [format_table([["group", "", "before", "after"], *widths])]
        if self.layers:
            tables.append(str(RefitReport(self.layers, self.blocks)))
        return "\n\n".join([*tables, format_table(costs), f"{self.images} images, no labels, {self.seconds:.0f} s"])


@dataclass(frozen=True)
class ValidationPoint:
    """Comparison with the original on the held-out images at one step of fine-tuning.

    Attributes:
        step: Number of updates before it.
        divergence: KL divergence from the original's class probabilities, or the relative squared distance of outputs
            that are not logits.
        agreement: Fraction of images with the same top-1 class; None for outputs that are not logits.
        cross_entropy: Cross-entropy with the labels; None without labels.
        feature_distance: Relative squared distance, averaged over the compared layers; None without layers.
        objective: Weighted sum that is trained and that selects the weights; lower is better.
    """

    step: int
    divergence: float
    agreement: float | None
    cross_entropy: float | None
    feature_distance: float | None
    objective: float


@dataclass(frozen=True)
class FinetuneReport:
    """Result of `ki.finetune`.

    Attributes:
        validations: Comparisons on the held-out images, the first one before training.
        losses: Loss of each step.
        layers: Names of the compared layers.
        images: Number of images, the held-out ones included.
        cached: True if the original ran once for each image.
    """

    validations: tuple[ValidationPoint, ...]
    losses: tuple[float, ...]
    layers: tuple[str, ...]
    images: int
    cached: bool

    @property
    def before(self) -> ValidationPoint:
        """Comparison before the first step."""
        return self.validations[0]

    @property
    def after(self) -> ValidationPoint:
        """Comparison of the returned weights: the lowest objective, the first of equal ones."""
        return min(self.validations, key=lambda point: point.objective)

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as JSON, and write it to a file if a path is given."""
        return _to_json(asdict(self), path)

    def __str__(self) -> str:
        rows = [
            [
                str(point.step),
                "" if point.feature_distance is None else f"{point.feature_distance:.4f}",
                f"{point.divergence:.4f}",
                "" if point.agreement is None else _percent(point.agreement),
                "" if point.cross_entropy is None else f"{point.cross_entropy:.4f}",
                f"{point.objective:.4f}",
                "selected" if point is self.after else "",
            ]
            for point in self.validations
        ]
        header = ["step", "features", "divergence", "agreement", "cross-entropy", "objective", ""]
        return f"{format_table([header, *rows])}\n\n{len(self.layers)} layers and the output, {self.images} images"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _millions(count: float, digits: int) -> str:
    return f"{count / 1e6:.{digits}f} M"


def _to_json(content: Mapping[str, Any], path: str | Path | None) -> str:
    return write_if_given(dump_json(content) + "\n", path)
