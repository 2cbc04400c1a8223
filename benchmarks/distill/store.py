"""Rows of `bench_distill.py` in the results files, one file for each pair, and their tables."""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.common.results import RESULTS, record
from benchmarks.common.stats import mean_and_error, standard_error
from benchmarks.distill.arms import OURS, TUNED, Arm, parse_arm
from benchmarks.distill.pairs import Part
from benchmarks.distill.teacher_cache import CACHE
from knowiso_train.distillation._closed_form_map import MIN_RIDGE, RIDGE_HALVING_CALLS, START_RIDGE
from knowiso_train.distillation.config import IsomorphismLossConfig

REFERENCE_ARM = "kd+ours"
COSTS = "costs"  # part of the rows with time and memory of a step
# Defaults of `IsomorphismLoss` that identify a row: other defaults are another arm
IDENTIFYING_DEFAULTS = ("scale", "weight", "schedule", "ridge", "kernel_size")


def loss_defaults(arm: Arm) -> dict[str, Any] | None:
    """Return the present defaults of `IsomorphismLoss` for an arm with it, or None.

    The ridge "auto" is written as its formula, which may be another one in later versions.
    """
    if OURS not in arm.names:
        return None
    config = IsomorphismLossConfig()
    defaults = {key: getattr(config, key) for key in IDENTIFYING_DEFAULTS}
    if defaults["ridge"] == "auto":
        defaults["ridge"] = f"max({MIN_RIDGE}, {START_RIDGE} / (1 + t / {RIDGE_HALVING_CALLS}))"
    return defaults


class ResultsStore:
    """Finished rows of a pair, each with part, budget, seed and arm. Several processes can write to it."""

    def __init__(self, pair: str) -> None:
        self.pair = pair
        self.name = f"distill_{pair}"
        self.rows = self._read()

    def find(self, part: Part, budget: int, seed: int, arm: Arm) -> dict[str, Any] | None:
        """Return the row of an arm, or None."""
        key = self._key({"part": part, "budget": budget, "seed": seed, "arm": str(arm), "defaults": loss_defaults(arm)})
        return next((row for row in self.rows if self._key(row) == key), None)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows to the file, in the place of rows of the same runs."""
        with self._locked():
            stored = {self._key(row): row for row in self._read()} | {self._key(row): row for row in rows}
            self.rows = sorted(stored.values(), key=self._key)
            budgets = sorted({row["budget"] for row in self.rows if row["part"] == "final"})
            tables = {f"{budget} epochs": self.table("final", budget) for budget in budgets}
            record(self.name, {"tables": tables, "rows": self.rows}, settings={"pair": self.pair})

    def best_weight(self, arm: Arm, budget: int) -> float | None:
        """Return the weight of the arm's last term with the best mean accuracy in the tuning runs.

        Those of the nearest budget count, if there are none of this one.
        """
        scores: dict[tuple[int, float], list[float]] = {}
        for row in self.rows:
            tried = parse_arm(row["arm"])
            weight = tried.terms[-1].option("weight", None) if tried.terms else None
            if row["part"] == "tuning" and weight is not None and str(tried) == str(arm.with_weight(weight)):
                scores.setdefault((row["budget"], weight), []).append(row["accuracy"])
        if not scores:
            return None
        nearest = min((tried for tried, _ in scores), key=lambda tried: abs(tried - budget))
        means = {weight: sum(v) / len(v) for (tried, weight), v in scores.items() if tried == nearest}
        return max(means, key=lambda weight: means[weight])

    def resolve(self, arm: Arm, budget: int) -> Arm:
        """Return the arm with the best weight of the tuning runs in the place of `weight=tuned`."""
        if not arm.terms or arm.terms[-1].option("weight", None) != TUNED:
            return arm
        weight = self.best_weight(arm, budget)
        if weight is None:
            raise SystemExit(f"no tuning runs of {arm} in {self.name}.json: run with --tune first, or write a weight")
        return arm.with_weight(weight)

    def by_arm(self, part: Part, budget: int) -> dict[str, dict[int, dict[str, Any]]]:
        """Return the rows by arm and seed, without those of `IsomorphismLoss` at other defaults than the present."""
        selected: dict[str, dict[int, dict[str, Any]]] = {}
        for row in self.rows:
            present = row["defaults"] == loss_defaults(parse_arm(row["arm"]))
            if present and (row["part"], row["budget"]) == (part, budget):
                selected.setdefault(row["arm"], {})[row["seed"]] = row
        return selected

    def costs(self) -> dict[str, tuple[float, float]]:
        """Return added milliseconds over KD and peak MiB of a step by unweighted arm."""
        rows = {row["arm"]: row for row in self.rows if row["part"] == COSTS}
        if "kd" not in rows:
            return {}
        return {arm: (row["step_ms"] - rows["kd"]["step_ms"], row["peak_mib"]) for arm, row in rows.items()}

    def table(self, part: Part, budget: int) -> list[dict[str, Any]]:
        """Return accuracies and their paired differences from `kd+ours`, best arm first."""
        by_arm, costs, table = self.by_arm(part, budget), self.costs(), []
        for arm, rows in by_arm.items():
            paired = paired_differences(rows, by_arm.get(REFERENCE_ARM, {}))
            added, peak = costs.get(str(parse_arm(arm).unweighted()), (None, None))
            table.append({
                "arm": arm,
                "seeds": len(rows),
                "top-1 %": mean_and_error([row["accuracy"] for row in rows.values()]),
                f"over {REFERENCE_ARM}": mean_and_error(paired, signed=True) if paired else "-",
                "folded": mean_and_error([row["folded_accuracy"] for row in rows.values()]),
                "ms over kd": "-" if added is None else f"{added:+.1f}",
                "peak MiB": "-" if peak is None else f"{peak:.1f}",
            })  # fmt: skip
        return sorted(table, key=lambda row: -float(row["top-1 %"].split()[0]))

    def _read(self) -> list[dict[str, Any]]:
        path = RESULTS / f"{self.name}.json"
        rows: list[dict[str, Any]] = json.loads(path.read_text())["figures"]["rows"] if path.exists() else []
        return [row | {"arm": str(parse_arm(row["arm"]))} for row in rows]

    @staticmethod
    def _key(row: dict[str, Any]) -> str:
        """Return what identifies a run."""
        return json.dumps([row["part"], row["budget"], row["seed"], row["arm"], row["defaults"]], default=repr)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        CACHE.mkdir(parents=True, exist_ok=True)
        with (CACHE / f"{self.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def paired_differences(rows: dict[int, dict[str, Any]], reference: dict[int, dict[str, Any]]) -> list[float]:
    """Return the differences of accuracy from the reference, one for each common seed."""
    return [row["accuracy"] - reference[seed]["accuracy"] for seed, row in rows.items() if seed in reference]


def summary(stores: Sequence[ResultsStore], part: Part, budget: int) -> list[dict[str, Any]]:
    """Return the mean over the pairs of the differences from `kd+ours`, with its standard error, best method first.

    A rival with several weights counts with the best of them on each pair. A method needs rows of all pairs.
    """
    by_pair = []
    for store in stores:
        by_arm, best = store.by_arm(part, budget), {}
        for text, rows in by_arm.items():
            values = paired_differences(rows, by_arm.get(REFERENCE_ARM, {}))
            arm = parse_arm(text)
            method = text if OURS in arm.names else str(arm.unweighted())
            if values and (method not in best or sum(values) / len(values) > best[method][0]):
                best[method] = sum(values) / len(values), standard_error(values)
        if best:
            by_pair.append(best)
    methods = set.intersection(*(set(best) for best in by_pair)) if by_pair else set()
    means = {method: sum(best[method][0] for best in by_pair) / len(by_pair) for method in methods}
    errors = {method: math.hypot(*(best[method][1] for best in by_pair)) / len(by_pair) for method in methods}
    return [
        {
            "method": method,
            "pairs": len(by_pair),
            f"over {REFERENCE_ARM}": f"{means[method]:+.2f} ± {errors[method]:.2f}",
        }
        for method in sorted(methods, key=lambda method: -means[method])
    ]
