"""Finished rows of bench_prune.py and the tables made from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.results import record, table
from benchmarks.common.stats import mean_and_error
from benchmarks.prune.methods import BLOCK_STEPS, FINISHES, ITERATIVE_STEPS, OURS
from benchmarks.prune.tasks import TASKS, Task

# Stored in each new row. Increase it when the numbers of ki.prune or ki.refit change.
# Older rows may have "library" instead, a hash of the code.
ALGORITHM_VERSION = 1
NUM_BEST, SEEDS = 8, (0, 1, 2)
RESULTS_NAME = "bench_prune"


def fingerprint(kept: dict[str, Any]) -> str:
    """Hash a choice of channels."""
    return hashlib.sha256(json.dumps({name: str(kept[name]) for name in sorted(kept)}).encode()).hexdigest()[:16]


class ResultsStore:
    """Finished rows in a JSON-lines file.

    A new file starts with the rows of the results file.
    """

    def __init__(self, path: Path, results: Path | None = None) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() and results is not None and results.exists():
            figures = json.loads(results.read_text())["figures"]
            path.write_text("".join(json.dumps(row) + "\n" for part in figures.values() for row in part["rows"]))
        self.rows: list[dict[str, Any]] = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )

    def find(self, **key: Any) -> dict[str, Any] | None:
        """Return the first row with these values, or None."""
        return next(iter(self.select(**key)), None)

    def select(self, **key: Any) -> list[dict[str, Any]]:
        """Return all rows with these values."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in key.items())]

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and print it."""
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        accuracy = row["accuracy"]
        print(
            f"{row['network']} {row['ratio']:g}x seed {row['seed']}: {row['method']}, {row['finish']}:",
            accuracy,
            f"{row['seconds']:.0f} s",
            flush=True,
        )


def select_baselines(task: Task, store: ResultsStore) -> list[tuple[str, str]]:
    """Return (method, finish) of the baselines for the full comparison.

    These are the best eight of the screening, the best of each finish, and GRAIL and OSSCAR.
    """
    rows = [row for row in store.select(network=task.name, screen=True, ratio=task.screened) if row["method"] != OURS]
    rows.sort(key=lambda row: -row["accuracy"][task.selection_part])
    isomorphism = [row for row in rows if row["method"].startswith("Isomorphism")][:1]
    others = [row for row in rows if not row["method"].startswith("Isomorphism")]
    picked = others[:NUM_BEST] + isomorphism
    picked += [{**row, "finish": "blocks"} for row in others if row["finish"] == "refit"][:1]
    for finish in FINISHES[:2]:
        picked += [row for row in others if row["finish"] == finish][:1]
    for name in ("GRAIL", "OSSCAR"):
        picked += [row for row in others if row["method"] == name][:1]
    return list(dict.fromkeys((row["method"], row["finish"]) for row in picked))


def summarize(task: Task, store: ResultsStore, ratio: float) -> list[dict[str, Any]]:
    """Return mean ± standard error over the seeds, and of the paired differences to ki.prune."""
    rows = store.select(network=task.name, screen=False, ratio=ratio)
    ours = {row["seed"]: row for row in rows if (row["method"], row["finish"]) == (OURS, "refit")}
    lines = []
    for method, finish in dict.fromkeys((row["method"], row["finish"]) for row in rows):
        method_rows = [row for row in rows if (row["method"], row["finish"]) == (method, finish)]
        paired = [(row, ours[row["seed"]]) for row in method_rows if row["seed"] in ours]
        line = {"network": task.name, "ratio": ratio, "method": method, "finish": finish, "seeds": len(method_rows)}
        line["MACs %"] = round(100 * sum(row["macs"] for row in method_rows) / len(method_rows), 2)
        line |= {
            part: mean_and_error([row["accuracy"][part] for row in method_rows]) for part in method_rows[0]["accuracy"]
        }
        line["agreement"] = mean_and_error([row["agreement"][task.reported_part] for row in method_rows])
        for name in ("accuracy", "agreement"):
            line[f"{name} - {OURS}'s"] = (
                mean_and_error([a[name][task.reported_part] - b[name][task.reported_part] for a, b in paired], True)
                if paired
                else "-"
            )
        lines.append(
            (
                -sum(row["accuracy"][task.reported_part] for row in method_rows) / len(method_rows),
                {**line, "s": round(sum(r["seconds"] for r in method_rows) / len(method_rows))},
            )
        )
    return [line for _, line in sorted(lines, key=lambda pair: pair[0])]


def screening_table(task: Task, store: ResultsStore) -> list[dict[str, Any]]:
    """Return the rows of the screening, best first."""
    rows = sorted(store.select(network=task.name, screen=True), key=lambda row: -row["accuracy"][task.selection_part])
    return [
        {
            **{key: row[key] for key in ("network", "ratio", "seed", "method", "finish")},
            "MACs %": round(100 * row["macs"], 2),
            task.selection_part: row["accuracy"][task.selection_part],
            "agreement": row["agreement"][task.selection_part],
            "s": round(row["seconds"]),
        }
        for row in rows
    ]


def original_accuracy(task: Task) -> dict[str, str]:
    """Return the accuracy before pruning for each part of the evaluation images, over the seeds that draw them."""
    accuracies: dict[str, list[float]] = {}
    for seed in SEEDS:
        _, labels, logits, parts = task.evaluation_data(seed, False)
        correct = (logits.argmax(1) == labels).double()
        for name, part in parts.items():
            accuracies.setdefault(name, []).append(100 * float(correct[part].mean()))
    return {name: mean_and_error(values) for name, values in accuracies.items()}


def report(tasks: Sequence[Task], store: ResultsStore, write: bool) -> None:
    """Print all tables and write the results file."""
    tables = {task.name: [summarize(task, store, ratio) for ratio in task.ratios] for task in tasks}
    for task in tasks:
        for rows in (screening_table(task, store), *tables[task.name]):
            if rows:
                print(table(rows), "\n", flush=True)
    all_tasks = [TASKS[name](False) for name in TASKS]
    if write and any(not row["screen"] for row in store.rows):
        figures = {
            task.name: {
                "original": original_accuracy(task),
                "table": [row for ratio in task.ratios for row in summarize(task, store, ratio)],
                "screening": screening_table(task, store),
                "rows": store.select(network=task.name),
            }
            for task in all_tasks
        }
        settings = {
            "calibration": {"resnet56": 1024, "lite0": 500},
            "iterative steps": ITERATIVE_STEPS,
            "best": NUM_BEST,
            "block steps": BLOCK_STEPS,
        }
        print(record(RESULTS_NAME, figures, settings=settings))
