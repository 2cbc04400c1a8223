"""Rows of the tables on fitting, measuring and operators, computed from the figures of results files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.common.markdown import best_in_bold, number, optional

Row = dict[str, Any]

SIMILARITY_LABELS = {"cka": "linear CKA", "procrustes": "Procrustes", "r2": "R²"}
OPERATIONS = {
    "gate": "gate",
    "gate_orders": "carried orders",
    "residual_energy": "residual energy",
    "residual_energy, learned": "residual energy, learned map",
    "fixed_map_energy": "energy of a fixed map",
    "moments 3x3": "moments of 3×3 patches",
    "moments 1x1": "moments of positions",
}
MODES = {"forward": "forward", "backward": "backward", "both": "forward and backward"}


def percent(share: float, digits: int = 1) -> str:
    """Format a share in per cent."""
    return number(100 * share, digits=digits)


def fit(figures: list[Row]) -> list[Row]:
    """Return unexplained shares and seconds of each disentangler at both stages."""
    rows: dict[str, Row] = {}
    for entry in figures:
        row = rows.setdefault(entry["what"], {"": entry["what"].replace("paper,", "the paper's network and recipe,")})
        row[f"stage {entry['stage']}: unexplained"] = number(entry["held-out unexplained"], digits=3)
        row[f"stage {entry['stage']}: seconds"] = f"{entry['seconds']:,.1f}"
    table = list(rows.values())
    best_in_bold(table, [key for key in table[0] if "unexplained" in key], lowest=True)
    return table


def orders(figures: list[Row]) -> list[Row]:
    """Return shares and seconds of the earlier and the present solver."""
    return [
        {
            "pair": entry["pair"],
            "maps": f"{entry['kernel']}×{entry['kernel']}",
            "earlier: unexplained": entry["unexplained, earlier"],
            "present: unexplained": entry["unexplained, present"],
            "earlier: seconds": number(entry["seconds, earlier"], digits=1),
            "present: seconds": number(entry["seconds, present"], digits=1),
            "times faster": number(entry["times faster"], digits=1),
            "above order 0, times faster": optional(entry.get("times faster above order 0"), "{:.1f}"),
        }
        for entry in figures
    ]


def networks(figures: Row) -> list[Row]:
    """Return the shares of EfficientNet-Lite0 and Lite1."""
    return [
        {
            "explained": entry["explained"],
            "from": entry["explained from"],
            "layer": f"`{entry['layer']}`",
            "order 0, %": percent(entry["order 0"]),
            "order 1, %": percent(entry["order 1"]),
            "unexplained, %": percent(entry["unexplained"]),
            "noise floor, %": percent(entry["noise floor"]),
        }
        for entry in figures["imagenet1k_sample"]
    ]


def diagnose(figures: Row) -> list[Row]:
    """Return the diagnosis of ResNet-20 beside ResNet-56."""
    return [
        {
            "features": entry["kind"].replace("_", " "),
            "layer": f"`{entry['layer']}`",
            "unexplained, %": percent(entry["unexplained"]),
            "largest KL of a direction, nats": number(entry["largest KL of a direction"], digits=3),
            "most unexplained class": entry["most unexplained class"],
            "its unexplained share, %": percent(entry["its unexplained share"]),
            "least unexplained class": entry["least unexplained class"],
        }
        for entry in figures["resnet20_resnet56"]
    ]


def functional(figures: Row) -> list[Row]:
    """Return functional beside unexplained shares, without the first stage."""
    entries = [entry for name, rows in figures.items() if name != "time" for entry in rows]
    return [
        {
            "explained": f"{entry['explained']} from {entry['from']}",
            "layer": f"`{entry['layer']}`",
            "unexplained": percent(entry["unexplained"]),
            "own top-1": percent(entry["own top-1"]),
            "top-1": percent(entry["top-1"]),
            "agreement": percent(entry["agreement"]),
            "KL": number(entry["KL"]),
            "residual alone: top-1": percent(entry["residual top-1"]),
        }
        for entry in entries
        if entry["layer"] != "layer1"
    ]


def functional_time(figures: Row) -> list[Row]:
    """Return the time of `measure` without and with functional shares."""
    return [
        {
            "case": entry["case"],
            "images": f"{entry['images']:,}",
            "plain, s": number(entry["plain CPU s"], digits=1),
            "functional, s": number(entry["functional CPU s"], digits=1),
            "ratio": number(entry["ratio"]),
        }
        for entry in figures["time"]
    ]


def scale(figures: list[Row]) -> list[Row]:
    """Return time and memory of `measure` and of stored features."""
    return [
        {
            "images": f"{entry['images']:,}",
            "channels": f"{entry['channels']:,}",
            "positions": f"{entry['grid']}×{entry['grid']}",
            "maps": f"{entry['kernel_size']}×{entry['kernel_size']}",
            "layer pairs": entry["pairs"],
            "order": entry["order"],
            "memory, MiB": f"{entry['ours: MiB']:,.0f}",
            "seconds": number(entry["ours: seconds"], digits=1),
            "stored features: memory, MiB": optional(entry["store + lstsq: MiB"], "{:,.0f}"),
            "stored features: seconds": optional(entry["store + lstsq: seconds"], "{:.1f}"),
        }
        for entry in figures
    ]


def ranking(figures: Row) -> list[Row]:
    """Return the correlation of each measure with the known orderings."""
    rows = [entry | {"measure": similarity_label(entry["measure"])} for entry in figures["table"]]
    best_in_bold(rows, [key for key in rows[0] if key != "measure"])
    return rows


def similarity_label(name: str) -> str:
    """Return the label of a measure of similarity."""
    base = name.removeprefix("pooled_")
    if base in SIMILARITY_LABELS:
        return SIMILARITY_LABELS[base] + (", pooled" if base != name else "")
    orders_label = name.replace("orders 0..0", "order 0").replace("orders 0..", "orders 0 to ")
    return orders_label.replace("explained", "explained share")


def operators(figures: Row) -> list[Row]:
    """Return time and memory relative to the plain reference, with their ranges over shapes."""
    rows = []
    for operation, label in OPERATIONS.items():
        for mode, mode_label in MODES.items():
            row: Row = {"operator": label, "pass": mode_label}
            for contender, prefix in (("ours", ""), ("compiled", "`torch.compile`: ")):
                key = operation, mode, contender
                entries = [e for e in figures["rows"] if (e["operation"], e["mode"], e["contender"]) == key]
                row[f"{prefix}time"] = _range([entry["of eager"] for entry in entries])
                row[f"{prefix}memory"] = _range([entry["memory of eager"] for entry in entries])
            if row["time"] or row["`torch.compile`: time"]:
                rows.append(row)
    return rows


def _range(values: Sequence[float]) -> str:
    """Format the lowest and the highest value."""
    ends = list(dict.fromkeys(number(end) for end in (min(values), max(values)))) if values else []
    return " to ".join(ends)
