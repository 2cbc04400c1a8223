"""Rows of bench_prune.py that are done, and the tables made of them."""

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

# Stored in each new row. Raise it by hand when the numbers of ki.prune or ki.refit change.
# Older rows may have "library" instead, a hash of code.
ALGORITHM_VERSION = 1
NUM_BEST, SEEDS = 8, (0, 1, 2)
RESULTS_NAME = "bench_prune"  # of the results file


def fingerprint(kept: dict[str, Any]) -> str:
    """Of a choice of channels."""
    return hashlib.sha256(json.dumps({name: str(kept[name]) for name in sorted(kept)}).encode()).hexdigest()[:16]


class ResultsStore:
    """Rows that are done; where the file is not there, those of the results file."""

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
        return next(iter(self.select(**key)), None)

    def select(self, **key: Any) -> list[dict[str, Any]]:
        return [row for row in self.rows if all(row.get(name) == value for name, value in key.items())]

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        at = row["accuracy"]
        print(
            f"{row['network']} {row['ratio']:g}x seed {row['seed']}: {row['method']}, {row['finish']}:",
            at,
            f"{row['seconds']:.0f} s",
            flush=True,
        )


def select_baselines(task: Task, book: ResultsStore) -> list[tuple[str, str]]:
    """The best eight rivals of the screening, and the best of each finish, GRAIL and OSSCAR where they are not among them."""
    rows = [row for row in book.select(network=task.name, screen=True, ratio=task.screened) if row["method"] != OURS]
    rows.sort(key=lambda row: -row["accuracy"][task.chosen])
    own = [row for row in rows if row["method"].startswith("Isomorphism")][:1]
    others = [row for row in rows if not row["method"].startswith("Isomorphism")]
    picked = others[:NUM_BEST] + own
    picked += [{**row, "finish": "blocks"} for row in others if row["finish"] == "refit"][:1]
    for finish in FINISHES[:2]:
        picked += [row for row in others if row["finish"] == finish][:1]
    for name in ("GRAIL", "OSSCAR"):
        picked += [row for row in others if row["method"] == name][:1]
    return list(dict.fromkeys((row["method"], row["finish"]) for row in picked))


def summarize(task: Task, book: ResultsStore, ratio: float) -> list[dict[str, Any]]:
    """Mean ± standard error over the seeds, and over the differences to ki.prune seed by seed."""
    rows = book.select(network=task.name, screen=False, ratio=ratio)
    ours = {row["seed"]: row for row in rows if (row["method"], row["finish"]) == (OURS, "refit")}
    lines = []
    for method, finish in dict.fromkeys((row["method"], row["finish"]) for row in rows):
        own = [row for row in rows if (row["method"], row["finish"]) == (method, finish)]
        paired = [(row, ours[row["seed"]]) for row in own if row["seed"] in ours]
        line = {"network": task.name, "ratio": ratio, "method": method, "finish": finish, "seeds": len(own)}
        line["MACs %"] = round(100 * sum(row["macs"] for row in own) / len(own), 2)
        line |= {part: mean_and_error([row["accuracy"][part] for row in own]) for part in own[0]["accuracy"]}
        line["agreement"] = mean_and_error([row["agreement"][task.claimed] for row in own])
        for name in ("accuracy", "agreement"):
            line[f"{name} - {OURS}'s"] = (
                mean_and_error([a[name][task.claimed] - b[name][task.claimed] for a, b in paired], True)
                if paired
                else "-"
            )
        lines.append(
            (
                -sum(row["accuracy"][task.claimed] for row in own) / len(own),
                {**line, "s": round(sum(r["seconds"] for r in own) / len(own))},
            )
        )
    return [line for _, line in sorted(lines, key=lambda pair: pair[0])]


def screening_table(task: Task, book: ResultsStore) -> list[dict[str, Any]]:
    """Rows of the screening, the best first."""
    rows = sorted(book.select(network=task.name, screen=True), key=lambda row: -row["accuracy"][task.chosen])
    return [
        {
            **{key: row[key] for key in ("network", "ratio", "seed", "method", "finish")},
            "MACs %": round(100 * row["macs"], 2),
            task.chosen: row["accuracy"][task.chosen],
            "agreement": row["agreement"][task.chosen],
            "s": round(row["seconds"]),
        }
        for row in rows
    ]


def original_accuracy(task: Task) -> dict[str, str]:
    """Accuracy before pruning, by part of the judging images, over the seeds that draw these."""
    found: dict[str, list[float]] = {}
    for seed in SEEDS:
        _, labels, logits, parts = task.judges(seed, False)
        right = (logits.argmax(1) == labels).double()
        for name, part in parts.items():
            found.setdefault(name, []).append(100 * float(right[part].mean()))
    return {name: mean_and_error(values) for name, values in found.items()}


def report(tasks: Sequence[Task], book: ResultsStore, write: bool) -> None:
    tables = {task.name: [summarize(task, book, ratio) for ratio in task.ratios] for task in tasks}
    for task in tasks:
        for rows in (screening_table(task, book), *tables[task.name]):
            if rows:
                print(table(rows), "\n", flush=True)
    every = [TASKS[name](False) for name in TASKS]
    if write and any(not row["screen"] for row in book.rows):
        figures = {
            task.name: {
                "original": original_accuracy(task),
                "table": [row for ratio in task.ratios for row in summarize(task, book, ratio)],
                "screening": screening_table(task, book),
                "rows": book.select(network=task.name),
            }
            for task in every
        }
        settings = {
            "calibration": {"resnet56": 1024, "lite0": 500},
            "iterative steps": ITERATIVE_STEPS,
            "best": NUM_BEST,
            "block steps": BLOCK_STEPS,
        }
        print(record(RESULTS_NAME, figures, settings=settings))
