"""What pruning and refitting did, per layer and altogether."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from knowiso_train.measurement.versions import versions
from knowiso_train.pruning.blocks import BlockFit
from knowiso_train.pruning.forward import LayerFit


@dataclass(frozen=True)
class RefitReport:
    """Per layer the unexplained share of what it should give, before and after the refit, on images that were not fitted.

    Attributes:
        layers: in forward order.
        blocks: that were tuned as a whole, with the unexplained share of what they give.
    """

    layers: tuple[LayerFit, ...]
    blocks: tuple[BlockFit, ...] = ()

    def __str__(self) -> str:
        rows = [[fit.name, str(fit.inputs), f"{100 * fit.before:.1f} %", f"{100 * fit.after:.1f} %"] for fit in self.layers]
        text = aligned([["layer", "inputs", "unexplained", "refitted"], *rows])
        if not self.blocks:
            return text
        tuned = [[fit.name, f"{100 * fit.before:.1f} %", f"{100 * fit.after:.1f} %"] for fit in self.blocks]
        return text + "\n\n" + aligned([["block", "unexplained", "tuned"], *tuned])


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
    blocks: tuple[BlockFit, ...]
    macs: tuple[float, float]
    parameters: tuple[int, int]
    latency: tuple[float, float] | None
    seconds: float
    images: int
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self, path: str | Path | None = None) -> str:
        """As JSON, with the versions of what made it; also written to a file where a path is given."""
        text = json.dumps({**asdict(self), "versions": versions()}, indent=1)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text + "\n")
        return text

    def __str__(self) -> str:
        fits = {fit.name: fit for fit in self.layers}
        blocks = [aligned([["group", "", "before", "after"], *([w.name, w.kind, str(w.before), str(w.after)] for w in self.widths)])]
        if fits:
            blocks.append(str(RefitReport(self.layers, self.blocks)))
        total = [
            ["", "before", "after", ""],
            ["multiply-adds", f"{self.macs[0] / 1e6:.1f} M", f"{self.macs[1] / 1e6:.1f} M", f"{self.macs[0] / max(self.macs[1], 1):.2f}× fewer"],
            ["parameters", f"{self.parameters[0] / 1e6:.3f} M", f"{self.parameters[1] / 1e6:.3f} M", f"{_times(self.parameters):.2f}× fewer"],
        ]
        if self.latency is not None:
            total.append(
                ["latency", f"{1e3 * self.latency[0]:.1f} ms", f"{1e3 * self.latency[1]:.1f} ms", f"{self.latency[0] / self.latency[1]:.2f}× faster"]
            )
        blocks.append(aligned(total))
        blocks.append(f"{self.images} images, no labels, {self.seconds:.0f} s")
        return "\n\n".join(blocks)


def _times(pair: tuple[int, int]) -> float:
    return pair[0] / max(pair[1], 1)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first to the left, the others to the right.

    Example:
        >>> print(aligned([["a", "1"], ["bc", "20"]]))
        a    1
        bc  20
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows)
