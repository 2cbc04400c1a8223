"""What a short tuning did, as its held-out images tell it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from knowiso_train.pruning.report import aligned


@dataclass(frozen=True)
class Check:
    """Attributes:
    step: updates before it.
    divergence: KL from the original's classes to the network's, on the held-out images; of outputs that are no logits the relative squared distance.
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
class TuneReport:
    """What `tune` returns.

    Attributes:
        checks: on the held-out images, the first one before the training.
        losses: of each step.
        layers: whose features were compared.
        images: that were looked at, held-out ones among them.
        cached: whether the original ran once for each image.
    """

    checks: tuple[Check, ...]
    losses: tuple[float, ...]
    layers: tuple[str, ...]
    images: int
    cached: bool

    @property
    def before(self) -> Check:
        """The network as it came."""
        return self.checks[0]

    @property
    def after(self) -> Check:
        """The network as it is handed back: the best one, the first of equal ones."""
        return min(self.checks, key=lambda check: check.objective)

    def to_json(self, path: str | Path | None = None) -> str:
        """As JSON; also written to a file where a path is given."""
        text = json.dumps(asdict(self), indent=1)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text + "\n")
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
        return f"{aligned(rows)}\n\n{len(self.layers)} layers and the output, {self.images} images"
