"""Rows of the tables on distillation and refinement, computed from the figures of results files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.common.markdown import best_in_bold, number, optional

Row = dict[str, Any]

CONTENDERS = {
    "+ ours": "ours (default)",
    "+ ours, moment": "ours, 1×1 maps",
    "+ ours, consensus, one peer": "ours, consensus of one peer",
}
RECIPE_ARMS = {"teacher": "teacher", "student": "student alone", "kd": "+ KD", "ours": "+ KD and ours"}
HEAD_LABELS = {
    "raw features": "raw features",
    "raw features, in proportion": "raw features, class prior",
    "two networks side by side, in proportion": "two networks at inference, class prior",
    "own → own, own → mirrored": "a map of the network to itself, without peers",
    "self-training as shipped": "best control without a peer (self-training as shipped, class prior)",
    "ours as shipped, lite1": "ours, peer Lite1, as shipped",
    "ours, lite1, lite2": "ours, peers Lite1 and Lite2, all settings tuned",
    "ours as shipped, lite1, lite2": "ours, peers Lite1 and Lite2, as shipped",
}
TRAINING_LABELS = {
    "ridge head": "best classifier on raw features, no training",
    "plain": "plain finetuning from it",
    "self-distillation": "towards its own logits (self-distillation)",
    "ensemble": "towards the logits of three networks (ensemble distillation)",
    "self-training": "ours without peers: closed-form self-training, then towards its own head",
    "consensus head": "ours, the consensus head alone: closed form, no training",
    "ours": "ours: from the consensus head, towards the three consensus heads",
    "ours, features": 'ours as `method="consensus"` trains, with the peers\' features in every step',
    "ours, labels": "ours: from the consensus head, on the labels alone",
    "as auto chooses": '`method="auto"`, selected on validation images',
}
COMPARED_METHODS = {
    "plain": "plain finetuning",
    "ensemble": "ensemble distillation",
    "self-training": "ours without peers",
}


def step_costs(cpu: Row, gpu: Row) -> list[Row]:
    """Return time and memory of a training step relative to teacher and KD."""
    cases = {f"CPU, {name}": case for name, case in cpu.items()} | {f"H200, {name}": case for name, case in gpu.items()}
    rows: dict[str, Row] = {}
    for name, case in cases.items():
        for entry in case["rows"]:
            if entry["contender"].startswith("+ "):
                loss = CONTENDERS.get(entry["contender"], entry["contender"].removeprefix("+ "))
                row = rows.setdefault(loss, {"beside KD": loss})
                row |= {f"{name}: time": change(entry["with refresh"]), f"{name}: memory": change(entry["memory"])}
    return list(rows.values())


def change(ratio: float) -> str:
    """Format a ratio as a signed change in per cent."""
    return number(100 * (ratio - 1), "+", digits=1) + " %"


def recipe(figures: list[Row]) -> list[Row]:
    """Return accuracies and explained shares of the arms of the recipe."""
    rows = [
        {
            "": RECIPE_ARMS[entry["arm"]],
            "top-1, %": number(entry["top-1"]),
            "`layer2` explained, %": optional(entry.get("explains layer2 → layer2"), "{:.1f}"),
            "`layer3` explained, %": optional(entry.get("explains layer3 → layer3"), "{:.1f}"),
        }
        for entry in figures
    ]
    best_in_bold(rows, list(rows[0])[2:])
    return rows


def heads(figures: Row) -> list[Row]:
    """Return the accuracy of classifiers by the number of labels."""
    by_method = {entry["method"]: entry for entry in figures["head table"]}
    rows = [
        {
            "labels per class": label,
            **{
                count: number(by_method[method][f"{count} labels"], digits=1)
                for count in ("3", "5", "10", "20", "50", "all")
            },
            "over raw features": by_method[method]["over raw"],
            "over the best control": by_method[method]["over control"],
        }
        for method, label in HEAD_LABELS.items()
    ]
    best_in_bold(rows, list(rows[0])[1:])
    return rows


def full_training(figures: Row) -> list[Row]:
    """Return the accuracy of full finetuning by the number of labels, and the differences from its rivals."""
    counts = ("3", "5", "10", "20", "50", "all")
    rows = _by_labels(figures["full table"], counts)
    best_in_bold(rows, counts)
    return rows + _differences((figures["full table"], ""))


def _by_labels(table: Sequence[Row], counts: Sequence[str], suffix: str = "") -> list[Row]:
    """Return the accuracies of each method, with a column for each number of labels."""
    cells = {(entry["method"], str(entry["labels"])): number(entry["top-1 %"]) for entry in table}
    return [
        {"labels per class": label} | {f"{count}{suffix}": cells.get((method, count), "") for count in counts}
        for method, label in TRAINING_LABELS.items()
        if any((method, count) in cells for count in counts)
    ]


def transfer(figures: Row) -> list[Row]:
    """Return the accuracy of CIFAR-100 networks on CIFAR-10, with and without augmentation."""
    augmented = figures["transfer table"], ", crops and flips"
    plain = figures["transfer, as it is table"], ", no augmentation"
    without = {row["labels per class"]: row for row in _by_labels(plain[0], ("10", "5"), plain[1])}
    rows = [row | without[row["labels per class"]] for row in _by_labels(augmented[0], ("10", "5"), augmented[1])]
    best_in_bold(rows, list(rows[0])[1:])
    return rows + _differences(augmented, plain)


def _differences(*tables: tuple[Sequence[Row], str]) -> list[Row]:
    """Return the differences of ours from the compared methods, for tables with the suffix of their columns."""
    rows = []
    for method, label in COMPARED_METHODS.items():
        row = {"labels per class": f"ours over {label}"}
        for table, suffix in tables:
            ours = [entry for entry in table if entry["method"] == "ours"]
            row |= {f"{entry['labels']}{suffix}": entry[f"over {method}"] for entry in ours}
        rows.append(row)
    return rows


def hard_transfer(figures: Row) -> list[Row]:
    """Return the accuracy of CIFAR-10 networks on the classes of CIFAR-100, and differences from rivals."""
    table = figures["transfer to CIFAR-100 table"]
    rows = _by_labels(table, ("10", "5"))
    entries = {(TRAINING_LABELS.get(entry["method"]), str(entry["labels"])): entry for entry in table}
    for row in rows:
        row |= {
            f"over {label}, {count} labels": entries[row["labels per class"], count][f"over {method}"]
            for method, label in (("plain", "plain"), ("ensemble", "ensemble"))
            for count in ("10", "5")
        }
    best_in_bold(rows, ["10", "5"])
    return rows


def useless_peers(figures: Row) -> list[Row]:
    """Return the accuracy with useless peers."""
    return [
        {
            "peers": entry["peers"],
            "detected as useful": entry["found useful"],
            "top-1, %": entry["top-1 %"],
            "over Lite1 alone": entry["over lite1 alone"],
        }
        for entry in figures["harm table"]
    ]


def composite(figures: Row) -> list[Row]:
    """Return the accuracy of the paper's composite network."""
    return [
        {
            "layer": f"`{entry['layer']}`",
            "trained on": entry["handed on"].replace("orders 0…0", "order 0").replace("…", " to "),
            "top-1, %": number(entry["top-1 %"]),
            "over own features": entry["over own features"],
        }
        for entry in figures["paper table"]
    ]


def limits(figures: Row) -> list[Row]:
    """Return the differences where all networks are small and trained on the task."""
    datasets = {"CIFAR-10, 2,000 labels": figures["cifar table"], "CIFAR-100, 5,000 labels": figures["cifar-100 table"]}
    return [
        {
            "data": name,
            "images": {"plain": "no augmentation", "augmented": "crops and flips"}[entry["images"]],
            "unlabeled images": entry["unlabeled"],
            "over plain finetuning": entry["over cross-entropy"],
            "over ensemble distillation": entry["over ensemble"],
        }
        for name, table in datasets.items()
        for entry in table
        if entry["method"] == "ours"
    ]
