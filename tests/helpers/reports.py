"""Reports of made-up figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from knowiso_train import Report
from knowiso_train.measurement import PairResult
from knowiso_train.measurement.functional import FunctionalShare


def pair(
    source: str, target: str, direction: str = "forward", shares: tuple[float, ...] = (0.6, 0.25), **changes: Any
) -> PairResult:
    unexplained = 1 - sum(shares)
    made = PairResult(
        source=source,
        target=target,
        direction=direction,
        shares=shares,
        unexplained=unexplained,
        interval=(unexplained - 0.02, unexplained + 0.03),
        share_intervals=tuple((share - 0.01, share + 0.01) for share in shares),
        noise_floor=0.0123,
        component_variances=tuple(share / 2 for share in shares),
        additive=True,
        source_channels=8,
        target_channels=16,
        source_grid=(8, 8),
        target_grid=(4, 4),
        ridge=(0.001,) * len(shares),
        rows=960,
    )
    return replace(made, **changes)


def report(*pairs: PairResult) -> Report:
    images = {"fit": 1800, "select": 600, "report": 600}
    settings = {"order": 1, "kernel_size": 3, "solver": "closed_form", "split": [0.6, 0.2, 0.2], "max_images": None}
    return Report("small", "large", pairs, images, settings, 12.34, {"torch": "2"})


def functional_pair(source: str, target: str, direction: str = "forward", **changes: Any) -> PairResult:
    """Return a pair with the figures of the outputs and two similarities."""
    figures = {
        "functional": (FunctionalShare(0.9, 0.012, 0.2, 0.88), FunctionalShare(0.937, 0.01, 0.11, 0.92)),
        "residual_only": FunctionalShare(0.25, 0.02, 2.9, 0.24),
        "target_output": FunctionalShare(1.0, 0.0, 0.0, 0.923),
        "similarity": {"cka": 0.83, "r2": -0.02},
    }
    return pair(source, target, direction, **(figures | changes))
