"""Reports of pruning, refitting and fine-tuning."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from knowiso_train.utils.environment import library_versions
from knowiso_train.utils.serialization import dump_json, write_file
from knowiso_train.utils.text_table import format_table


@dataclass(frozen=True)
class RefitReport:
    """Per layer the unexplained share of what it should give, before and after the refit, on images that were not fitted.

    Attributes:
        layers: in forward order.
        blocks: that were tuned as a whole, with the unexplained share of what they give.
    """

    layers: tuple[LayerFit, ...]
    blocks: tuple[BlockResult, ...] = ()

    def __str__(self) -> str:
        rows = [
            [fit.name, str(fit.inputs), f"{100 * fit.before:.1f} %", f"{100 * fit.after:.1f} %"] for fit in self.layers
        ]
        text = format_table([["layer", "inputs", "unexplained", "refitted"], *rows])
        if not self.blocks:
            return text
        tuned = [[fit.name, f"{100 * fit.before:.1f} %", f"{100 * fit.after:.1f} %"] for fit in self.blocks]
        return text + "\n\n" + format_table([["block", "unexplained", "tuned"], *tuned])


@dataclass(frozen=True)
class GroupWidth:
    """Attributes:
    name: of the layer that writes the group.
    kind: "channels" or "heads".
    before: units of the original.
    after: units that are left.
    """

    name: str
    kind: str
    before: int
    after: int


@dataclass(frozen=True)
class PruneReport:
    """What `ki.prune` did.

    Attributes:
        widths: of every channel group.
        layers: of the refit, in forward order; empty where nothing was refitted.
        blocks: that were tuned as a whole.
        macs: multiply-adds of convolutions and linear layers for one image, before and after.
        parameters: before and after.
        latency: seconds for the batch that was timed, before and after; None where it was not asked for.
        seconds: that it took.
        images: that it looked at.
        settings: of the call.
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
        """As JSON, with the versions of what made it; also written to a file where a path is given."""
        text = dump_json({**asdict(self), "versions": library_versions()}) + "\n"
        if path is not None:
            write_file(path, text)
        return text

    def __str__(self) -> str:
        fits = {fit.name: fit for fit in self.layers}
        blocks = [
            format_table(
                [
                    ["group", "", "before", "after"],
                    *([w.name, w.kind, str(w.before), str(w.after)] for w in self.widths),
                ]
            )
        ]
        if fits:
            blocks.append(str(RefitReport(self.layers, self.blocks)))
        total = [
            ["", "before", "after", ""],
            [
                "multiply-adds",
                f"{self.macs[0] / 1e6:.1f} M",
                f"{self.macs[1] / 1e6:.1f} M",
                f"{self.macs[0] / max(self.macs[1], 1):.2f}× fewer",
            ],
            [
                "parameters",
                f"{self.parameters[0] / 1e6:.3f} M",
                f"{self.parameters[1] / 1e6:.3f} M",
                f"{_times(self.parameters):.2f}× fewer",
            ],
        ]
        if self.latency is not None:
            total.append(
                [
                    "latency",
                    f"{1e3 * self.latency[0]:.1f} ms",
                    f"{1e3 * self.latency[1]:.1f} ms",
                    f"{self.latency[0] / self.latency[1]:.2f}× faster",
                ]
            )
        blocks.append(format_table(total))
        blocks.append(f"{self.images} images, no labels, {self.seconds:.0f} s")
        return "\n\n".join(blocks)


def _times(pair: tuple[int, int]) -> float:
    return pair[0] / max(pair[1], 1)


@dataclass(frozen=True)
class ValidationPoint:
    """Attributes:
    step: updates before it.
    divergence: KL from the original's classes to the network's, on the held-out images; of outputs that are no logits
        the relative squared distance.
    agreement: share of them with the same first guess; None where the outputs are no logits.
    cross_entropy: with their labels; None where these are not read.
    features: mean relative squared distance of the layers that are compared; None where none is.
    objective: what is trained, the weighted sum; what chooses, less is better.
    """

    step: int
    divergence: float
    agreement: float | None
    cross_entropy: float | None
    features: float | None
    objective: float


@dataclass(frozen=True)
class FinetuneReport:
    """What `tune` returns.

    Attributes:
        checks: on the held-out images, the first one before the training.
        losses: of each step.
        layers: whose features were compared.
        images: that were looked at, held-out ones among them.
        cached: whether the original ran once for each image.
    """

    checks: tuple[ValidationPoint, ...]
    losses: tuple[float, ...]
    layers: tuple[str, ...]
    images: int
    cached: bool

    @property
    def before(self) -> ValidationPoint:
        """The network as it came."""
        return self.checks[0]

    @property
    def after(self) -> ValidationPoint:
        """The network as it is handed back: the best one, the first of equal ones."""
        return min(self.checks, key=lambda check: check.objective)

    def to_json(self, path: str | Path | None = None) -> str:
        """As JSON; also written to a file where a path is given."""
        text = dump_json(asdict(self)) + "\n"
        if path is not None:
            write_file(path, text)
        return text

    def __str__(self) -> str:
        rows = [["step", "features", "divergence", "agreement", "cross-entropy", "objective", ""]]
        for check in self.checks:
            agreement = "" if check.agreement is None else f"{100 * check.agreement:.1f} %"
            truth = "" if check.cross_entropy is None else f"{check.cross_entropy:.4f}"
            features = "" if check.features is None else f"{check.features:.4f}"
            rows.append(
                [
                    str(check.step),
                    features,
                    f"{check.divergence:.4f}",
                    agreement,
                    truth,
                    f"{check.objective:.4f}",
                    "kept" if check is self.after else "",
                ]
            )
        return f"{format_table(rows)}\n\n{len(self.layers)} layers and the output, {self.images} images"


@dataclass(frozen=True)
class BlockResult:
    """One block.

    Attributes:
        name: of the module.
        before: unexplained share of what the original's block gives, by images that were not fitted, with its layers
            solved one by one.
        after: the same once the block was tuned; never more, for then it stays as it was.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class LayerFit:
    """One refitted layer.

    Attributes:
        name: of the layer.
        inputs: channels that it reads.
        rows: of its regression.
        before: unexplained share of what it should give, with the surviving original weights, on images that were not
            fitted; where a rectifier reads
            it, of what passes that.
        after: the same with refitted ones.
    """

    name: str
    inputs: int
    rows: int
    before: float
    after: float
