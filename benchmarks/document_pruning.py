"""Rows of the tables on pruning, computed from the figures of results files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.common.markdown import best_in_bold

Row = dict[str, Any]

METHOD_LABELS = {
    "OSSCAR, ki.prune's widths": "OSSCAR's local search at the widths of `ki.prune`",
    "Isomorphism, global, one-shot": "`ki.IsomorphismImportance` in torch-pruning, global, one-shot",
}
SEEDS = {1: " (one seed)", 2: " (two seeds)"}
FINISH_LABELS = {"refit": " + our refit", "statistics": " + recomputed statistics", "bare": ""}
FINISHES_OF_PRUNE = {
    "refit": "`ki.prune`, closed form",
    "blocks": "`ki.prune` with finetuned blocks (`block_steps=60`)",
    "blocks, tuned": "the same, then `ki.finetune`",
    "tuned": "`ki.prune`, then `ki.finetune`: 800 steps of 32 images without labels, with crops",
    "tuned, four times": "the same, 3,200 steps",
    "5 epochs, ki.finetune": "`ki.prune`, then `ki.finetune` without labels: 5 epochs of 15,000 images",
    "5 epochs, cross-entropy": "`ki.prune`, then SGD on labels: 5 epochs of 15,000 images",
}
REFUSALS = {
    "cannot reach a fraction": "refused: more than 0.6 is left at the minimum widths",
    "nothing to prune": "refused: every width belongs to a residual sum, an output or a norm over several channels",
    "cannot be pruned": "refused: the channels of its layers cannot be matched",
}
OUTCOMES = {
    ("ok", "full"): "pruned by ranking and refit",
    ("ok", "structure"): "pruned by weight magnitude, without refit",
    ("time-out", None): "over the limit of 60 CPU seconds",
    ("skipped", None): "not run: a library is missing, or no small configuration could be built",
}
MAX_LISTED_NAMES = 6


def pruned(figures: Row) -> list[Row]:
    """Return the accuracy of pruned ResNet-56 by method and ratio."""
    return _by_ratio(figures["resnet56"]["table"], lambda entry: entry["judged"])


def pruned_depthwise(figures: Row) -> list[Row]:
    """Return accuracy and agreement of pruned EfficientNet-Lite0 by method and ratio."""
    return _by_ratio(figures["lite0"]["table"], lambda entry: f"{entry['judged']}, {entry['agreement']}")


def _by_ratio(table: list[Row], content: Callable[[Row], str]) -> list[Row]:
    """Return a row for each method with several ratios, the best at the first ratio first."""
    rows: dict[str, Row] = {}
    for entry in table:
        if entry["finish"] in FINISH_LABELS:
            label = _method_label(entry["method"], entry["finish"])
            row = rows.setdefault(label, {"fewer multiply-adds": label})
            row[f"{entry['ratio']:g}×"] = content(entry) + SEEDS.get(entry["seeds"], "")
    complete = [row for row in rows.values() if len(row) > 2]
    best_in_bold(complete, list(complete[0])[1:])
    return complete


def _method_label(method: str, finish: str) -> str:
    if method == "ki.prune":
        return "`ki.prune`, closed form"
    return METHOD_LABELS.get(method, method) + FINISH_LABELS[finish]


def finishes(figures: Row) -> list[Row]:
    """Return the accuracy of ResNet-56 at half of its multiply-adds by what follows the closed form."""
    table = figures["resnet56"]["table"]
    entries = {entry["finish"]: entry for entry in table if (entry["method"], entry["ratio"]) == ("ki.prune", 2.0)}
    rows = [
        {"at 2×": label, "top-1, %": entries[finish]["judged"], "seeds": entries[finish]["seeds"]}
        for finish, label in FINISHES_OF_PRUNE.items()
        if finish in entries
    ]
    best_in_bold(rows, ["top-1, %"])
    return rows


def prune_time(cpu: list[Row], gpu: list[Row]) -> list[Row]:
    """Return time and memory of pruning on CPU and GPU."""
    labels = {"ki.prune": "`ki.prune`", "torch-pruning, L1, statistics": "torch-pruning L1, recomputed statistics"}
    return [
        {
            "": labels[first["method"]],
            "two CPU cores": f"{first['seconds']:.1f} s",
            "memory": f"{first['peak GiB']:.1f} GiB",
            "H200": f"{second['seconds']:.1f} s",
            "GPU memory": f"{second['peak GiB']:.1f} GiB",
        }
        for first, second in zip(cpu, gpu, strict=True)
    ]


def architectures(figures: list[Row]) -> list[Row]:
    """Return the number of architectures by outcome, and the names of a few."""
    names: dict[str, list[str]] = {}
    for entry in figures:
        names.setdefault(_outcome(entry), []).append(entry["network"].split("/")[-1])
    return [
        {"outcome": outcome, "networks": len(n), "which": ", ".join(n) if len(n) <= MAX_LISTED_NAMES else ""}
        for outcome, n in sorted(names.items(), key=lambda item: -len(item[1]))
    ]


def _outcome(entry: Row) -> str:
    if entry["outcome"] == "refused":
        return next(label for phrase, label in REFUSALS.items() if phrase in entry["reason"])
    return OUTCOMES[entry["outcome"], entry.get("method")]
