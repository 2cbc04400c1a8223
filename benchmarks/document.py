"""Tables of docs/benchmarks.md and docs/claims.md, made from the results files.

python -m benchmarks.document
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import document_measurement as measurement
from benchmarks import document_pruning as pruning
from benchmarks import document_training as training
from benchmarks.claims import document as claims
from benchmarks.common.markdown import best_in_bold, markdown_table, replace_marked
from benchmarks.common.results import RESULTS
from benchmarks.distill.arms import parse_arm
from benchmarks.distill.pairs import PAIRS
from benchmarks.distill.store import REFERENCE_ARM, ResultsStore, loss_defaults, summary

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
DISTILLATION, NOT_MEASURED, PICTURE = "distillation", "-", "distill.png"
NETWORK_LABELS = {"resnet": "ResNet-", "mobile": "MobileNetV2 0.35", "cifar": "CIFAR-"}
COLUMNS = {
    "top-1 %": "top-1, %",
    f"over {REFERENCE_ARM}": "over our defaults",
    "ms over kd": "added ms of a step over KD",
    "peak MiB": "peak MiB of a step",
}
METHOD_LABELS = {
    "ce": "cross-entropy alone",
    "kd": "KD",
    "std_kd": "KD of standardized logits",
    "dkd": "DKD",
    "dist": "DIST",
    "mlkd": "multi-level KD",
    "fitnet": "FitNet",
    "fitnet3": "FitNet with 3×3 adapters",
    "linear3": "FitNet with linear 3×3 adapters",
    "at": "attention transfer",
    "review": "ReviewKD",
    "simkd": "SimKD",
    "srd": "SRD",
    "vkd": "VkD",
    "crd": "CRD",
    "itrd": "ITRD",
    "timm": "timm's feature task",
    "ours": "`IsomorphismLoss`",
}


@dataclass(frozen=True)
class Table:
    """Table of one or several results files, with the script that records them.

    Args:
        script: Module that writes the results files.
        files: Names of the results files.
        rows: Function from the figures of the files to the rows.
    """

    script: str
    files: tuple[str, ...]
    rows: Callable[..., list[dict[str, Any]]]


TABLES = {
    "fit": Table("measure.bench_fit", ("fit",), measurement.fit),
    "orders": Table("measure.bench_orders", ("orders",), measurement.orders),
    "networks": Table("measure.bench_networks", ("networks",), measurement.networks),
    "diagnose": Table("measure.bench_diagnose", ("diagnose",), measurement.diagnose),
    "functional": Table("measure.bench_functional", ("functional",), measurement.functional),
    "functional_time": Table("measure.bench_functional", ("functional",), measurement.functional_time),
    "scale": Table("measure.bench_measure", ("measure",), measurement.scale),
    "ranking": Table("measure.bench_ranking", ("ranking",), measurement.ranking),
    "step_costs": Table("distill.bench_loss", ("bench_loss", "bench_loss_gpu"), training.step_costs),
    "recipe": Table("distill.bench_recipe", ("recipe_distill",), training.recipe),
    "pruned": Table("prune.bench_prune", ("bench_prune",), pruning.pruned),
    "finishes": Table("prune.bench_prune", ("bench_prune",), pruning.finishes),
    "prune_time": Table("prune.bench_prune_time", ("bench_prune_time", "bench_prune_time_gpu"), pruning.prune_time),
    "architectures": Table("prune.sweep_prune", ("sweep_prune",), pruning.architectures),
    "pruned_depthwise": Table("prune.bench_prune", ("bench_prune",), pruning.pruned_depthwise),
    "heads": Table("refine.bench_refine", ("bench_refine",), training.heads),
    "full_training": Table("refine.bench_refine", ("bench_refine",), training.full_training),
    "transfer": Table("refine.bench_refine", ("bench_refine",), training.transfer),
    "hard_transfer": Table("refine.bench_refine", ("bench_refine",), training.hard_transfer),
    "useless_peers": Table("refine.bench_refine", ("bench_refine",), training.useless_peers),
    "composite": Table("refine.bench_refine", ("bench_refine",), training.composite),
    "limits": Table("refine.bench_refine", ("bench_refine",), training.limits),
    "operators": Table("ops.bench_ops", ("bench_ops",), measurement.operators),
    "operators_gpu": Table("ops.bench_ops", ("bench_ops_gpu",), measurement.operators),
    "operators_bfloat16": Table("ops.bench_ops", ("bench_ops_gpu_bf16",), measurement.operators),
}


def document(text: str) -> str:
    """Return the page with the tables of the present results files."""
    return replace_marked(text, lambda name: distillation() if name == DISTILLATION else section(TABLES[name]))


def section(table: Table) -> str:
    """Return a table, and the script and files that it comes from."""
    contents = [read(name) for name in table.files]
    sources = [source(name, content) for name, content in zip(table.files, contents, strict=True)]
    rows = table.rows(*(content["figures"] for content in contents))
    return f"{markdown_table(rows)}\n\n`python -m benchmarks.{table.script}` → {'; '.join(sources)}"


def read(name: str) -> dict[str, Any]:
    """Return the content of a results file."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def source(name: str, content: dict[str, Any]) -> str:
    """Return file, device, date and commit of a results file."""
    device = content["device"].replace(" 1 threads", " 1 thread")
    return f"`benchmarks/results/{name}.json`, {device}, {content['date']}, commit {content['commit']}"


def distillation() -> str:
    """Return the tables of all pairs of student and teacher and all budgets, each with the rank of our defaults."""
    parts: list[str] = []
    all_rows: list[list[dict[str, Any]]] = []
    for path in sorted(RESULTS.glob("distill_*.json")):
        content = read(path.stem)
        if not content["figures"]["tables"]:  # tuning runs alone
            continue
        _, teacher, student, dataset = path.stem.split("_")
        for budget, rows in content["figures"]["tables"].items():
            title = f"{label(teacher)} teaches {label(student)} on {label(dataset)}, {duration(budget)}"
            parts.append(
                f"**{title}.** {rank(rows)}{other_defaults(content, budget)}\n\n"
                f"{markdown_table(distillation_rows(rows))}"
            )
            all_rows.append(rows)
        parts.append(f"`python -m benchmarks.distill.bench_distill` → {source(path.stem, content)}")
    parts += means()
    if any(row["ms over kd"] != NOT_MEASURED for rows in all_rows for row in rows):
        parts.append(f"![Accuracy by added time and by memory of a step](../benchmarks/results/{PICTURE})")
    return "\n\n".join(parts)


def means() -> list[str]:
    """Return the tables of the mean differences over the pairs, for every budget with several pairs."""
    stores = [ResultsStore(pair) for pair in PAIRS if (RESULTS / f"distill_{pair}.json").exists()]
    parts = []
    for budget in sorted({row["budget"] for store in stores for row in store.rows if row["part"] == "final"}):
        rows = [
            {"loss beside cross-entropy": arm_label(row["method"]), "over our defaults": row[f"over {REFERENCE_ARM}"]}
            | {"pairs": row["pairs"]}
            for row in summary(stores, "final", budget)
        ]
        if rows and rows[0]["pairs"] > 1:
            title = f"Mean over {rows[0]['pairs']} pairs, {duration(f'{budget} epochs')}"
            takeaway = f"**{title}.** A rival has its best weight on each pair."
            parts.append(f"{takeaway}\n\n{markdown_table(rows)}")
    return parts


def duration(budget: str) -> str:
    """Return a number of epochs such as "10 epochs", or "1 epoch"."""
    return "1 epoch" if budget == "1 epochs" else budget


def label(name: str) -> str:
    """Return the label of a network or data set, such as ResNet-56."""
    for start, text in NETWORK_LABELS.items():
        if name.startswith(start):
            return text + name.removeprefix(start)
    return name


def rank(rows: list[dict[str, Any]]) -> str:
    """Return a sentence with the rank of the defaults among the arms of a table."""
    position = next((i for i, row in enumerate(rows) if row["arm"] == REFERENCE_ARM), None)
    if position is None:
        return "The defaults of `IsomorphismLoss` have no run yet."
    place = f"The defaults of `IsomorphismLoss` beside KD are in place {position + 1} of {len(rows)}"
    if position == 0:
        return f"{place}."
    best = rows[0]
    lead, _, error = best[f"over {REFERENCE_ARM}"].lstrip("+").partition(" ± ")
    points = f"{lead} points, one seed" if error == "nan" else f"{lead} ± {error} points"
    return f"{place}; {arm_label(best['arm'])} is ahead by {points}."


def other_defaults(content: dict[str, Any], budget: str) -> str:
    """Return a sentence with the defaults of `IsomorphismLoss` that have changed since the runs of a budget."""
    present = loss_defaults(parse_arm(REFERENCE_ARM))
    recorded = [
        row["defaults"]
        for row in content["figures"]["rows"]
        if (row["part"], row["arm"], f"{row['budget']} epochs") == ("final", REFERENCE_ARM, budget)
    ]
    if present is None or not recorded or present in recorded:
        return ""
    changed = [f"{key}={value!r}" for key, value in recorded[-1].items() if value != present[key]]
    return f" Recorded with other defaults: {', '.join(changed)}."


def distillation_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a table with labels, without columns that no arm has."""
    labeled = [
        {"loss beside cross-entropy": arm_label(row["arm"]), "seeds": row["seeds"]}
        | {name: "" if row[key] == NOT_MEASURED else row[key] for key, name in COLUMNS.items()}
        for row in rows
    ]
    empty = {key for key in labeled[0] if not any(row[key] for row in labeled)}
    labeled = [{key: value for key, value in row.items() if key not in empty} for row in labeled]
    best_in_bold(labeled, ["top-1, %"])
    return labeled


def arm_label(arm: str) -> str:
    """Return the label of a sum of loss terms with options, such as "kd+fitnet,weight=10"."""
    labels = []
    for term in arm.split("+"):
        name, *options = term.split(",")
        values = ", ".join(option.replace("_", " ").replace("=", " ") for option in options)
        labels.append(METHOD_LABELS.get(name, name) + (f" ({values})" if values else ""))
    return " + ".join(labels)


def main() -> None:
    text = document(DOCUMENT.read_text(encoding="utf-8"))
    DOCUMENT.write_text(text, encoding="utf-8")
    if PICTURE in text:
        from benchmarks.distill.plot_distill import draw

        draw("final")
    print(f"{DOCUMENT} written")
    claims.main()


if __name__ == "__main__":
    main()
