"""Rule of the verdicts on the paper's claims, and results files whose rows outlast an interruption.

The paper: arXiv 1908.01581. The effect of a claim is measured once per seed, with a positive sign in the claimed
direction. Its 95 % interval over the seeds, by Student's t, decides: a claim is "confirmed" if the interval is above
zero, "contradicted" if it is below zero, and "undecided" otherwise, also with a single seed.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.common.models import cifar10
from benchmarks.common.results import RESULTS, record, table
from benchmarks.common.small_networks import Training
from benchmarks.common.stats import mean_and_error
from knowiso_train.diagnosis.comparison import StageResult
from knowiso_train.measurement.report import PairResult

LAYERS = ("layer1", "layer2", "layer3")  # of all small networks
SEEDS = (0, 1, 2)
KERNEL_SIZE = 3  # of the maps between features, as published
# 97.5 % quantiles of Student's t for 1, 2, … degrees of freedom
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
read_cifar10 = functools.cache(cifar10)  # decoding the images takes seconds


def judge(claim: str, effects: Sequence[float], *, section: str, measured: str) -> dict[str, Any]:
    """Return the verdict on a claim.

    Args:
        claim: Statement of the paper, in our words.
        effects: Effect of each seed, positive in the claimed direction.
        section: Section of the paper that states it.
        measured: Definition of the effect, with its unit.

    Returns:
        Entries for the results file. `standard_error` and `interval` are None with a single seed.
    """
    mean, seeds = statistics.fmean(effects), len(effects)
    error = statistics.stdev(effects) / math.sqrt(seeds) if seeds > 1 else math.inf
    # Beyond the listed quantiles, the last one is too large by less than 14 %
    radius = T_QUANTILES[min(seeds - 1, len(T_QUANTILES)) - 1] * error
    verdict = "undecided" if abs(mean) <= radius else "confirmed" if mean > 0 else "contradicted"
    return {
        "claim": claim,
        "section": section,
        "measured": measured,
        "verdict": verdict,
        "effect": mean,
        "standard_error": error if seeds > 1 else None,
        "interval": [mean - radius, mean + radius] if seeds > 1 else None,
        "seeds": seeds,
        "effects": list(effects),
    }


class ClaimResults:
    """Results file of a claim script. A run with equal settings continues with the finished rows.

    Args:
        name: Name of the results file.
        settings: Everything that determines the figures.
    """

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.name, self.settings = name, json.loads(json.dumps(settings))
        path = RESULTS / f"{name}.json"
        stored = json.loads(path.read_text()) if path.exists() else {"figures": {"rows": []}, "settings": self.settings}
        if stored["settings"] != self.settings:
            raise SystemExit(
                f"{path} holds a run with other settings: {stored['settings']}. Remove it, or choose another --name."
            )
        self.rows: list[dict[str, Any]] = stored["figures"]["rows"]

    def row(self, compute: Callable[[], dict[str, Any]], **key: Any) -> dict[str, Any]:
        """Return the row with a key, such as seed and stage; compute and write it if it is missing.

        Args:
            compute: Function that returns the figures of the row.
            key: Entries that identify the row.
        """
        for row in self.select(**key):
            return row
        wall, cpu = time.perf_counter(), time.process_time()
        row = key | json.loads(json.dumps(compute()))
        row |= {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        self.rows.append(row)
        self._write()
        print(f"{self.name}: {key} in {row['cpu_seconds']:.0f} CPU seconds", flush=True)
        return row

    def select(self, **key: Any) -> Iterator[dict[str, Any]]:
        """Yield the finished rows with these entries."""
        yield from (row for row in self.rows if all(row.get(name) == value for name, value in key.items()))

    def finish(self, claims: list[dict[str, Any]], rows: list[dict[str, Any]], **figures: Any) -> None:
        """Print a table and the verdicts, and write them with all rows.

        Args:
            claims: Results of `judge`.
            rows: Table with equal keys in all rows.
            figures: Further figures for the file.
        """
        print(table(rows))
        for claim in claims:
            error = "" if claim["standard_error"] is None else f" ± {claim['standard_error']:.2g}"
            print(f"{claim['verdict']}: {claim['claim']} ({claim['measured']}: {claim['effect']:+.3g}{error})")
        self._write(claims=claims, table=rows, **figures)

    def _write(self, **figures: Any) -> None:
        seconds = {unit: round(sum(row[unit] for row in self.rows)) for unit in ("seconds", "cpu_seconds")}
        record(self.name, figures | {"rows": self.rows}, settings=self.settings, time=seconds)


def stage_figures(stage: StageResult) -> dict[str, list[float]]:
    """Return the figures of a network beside a stronger reference, of order 0 and up, as one list over the layers.

    `blind_spots`: share of the reference's feature that the network does not reproduce. `unreliable`: share of the
    network's feature that the reference does not reproduce. `functional_…`: share of the images whose top-1 class
    changes when only the reproduced part takes the place of the feature.
    """

    def changed(pair: PairResult) -> float:
        return 1 - pair.functional[-1].agreement if pair.functional else math.nan

    return {
        "blind_spots": [entry.lost for entry in stage],
        "unreliable": [entry.gained for entry in stage],
        "functional_blind_spots": [changed(entry.of_reference) for entry in stage],
        "functional_unreliable": [changed(entry.of_stage) for entry in stage],
    }


def percentages(rows: Sequence[Sequence[float]]) -> str:
    """Format shares of every layer, (seeds, layers), as percentages: mean ± standard error over the seeds."""
    columns = ([100 * value for value in column] for column in zip(*rows, strict=True))
    return " / ".join(mean_and_error(column) if len(column) > 1 else f"{column[0]:.1f}" for column in columns)


def open_results(description: str | None, name: str, **settings: Any) -> tuple[int, ClaimResults]:
    """Parse the command line of a claim on networks that are trained here.

    Args:
        description: Text of the help.
        name: Default name of the results file.
        **settings: Settings of the run beside those that these claims share.

    Returns:
        Number of test images, and the results file with all settings.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="test images of each comparison")
    parser.add_argument("--name", default=name, help="results file")
    args = parser.parse_args()
    shared = {"images": args.images, "layers": LAYERS, "seeds": SEEDS, "steps": Training().num_steps}
    return args.images, ClaimResults(args.name, shared | {"kernel_size": KERNEL_SIZE} | settings)
