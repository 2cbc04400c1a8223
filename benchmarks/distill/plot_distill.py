"""Picture of `bench_distill.py`: accuracy by added step time and by memory, every arm a point.

python -m benchmarks.distill.plot_distill                # writes results/distill.png
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.common.results import RESULTS
from benchmarks.distill.pairs import PAIRS
from benchmarks.distill.store import REFERENCE_ARM, ResultsStore

AXES = (("ms over kd", "added CPU time of a step over KD, ms"), ("peak MiB", "peak memory of a step, MiB"))


def tables(part: Any) -> dict[str, list[dict[str, Any]]]:
    """Return the tables of all pairs at their largest budget with rows of the part."""
    by_pair = {}
    for name in PAIRS:
        store = ResultsStore(name)
        budgets = [row["budget"] for row in store.rows if row["part"] == part]
        if budgets:
            by_pair[f"{name}, {max(budgets)} epochs"] = store.table(part, max(budgets))
    return by_pair


def draw(part: Any) -> None:
    """Draw the tables of the runs of a part into results/distill.png."""
    import matplotlib.pyplot as plt

    by_pair = tables(part)
    if not by_pair:
        raise SystemExit(f"no rows of {part} runs in {RESULTS}")
    figure, panels = plt.subplots(len(by_pair), 2, figsize=(13, 5 * len(by_pair)), squeeze=False)
    for (title, rows), row_panels in zip(by_pair.items(), panels, strict=True):
        for (column, label), panel in zip(AXES, row_panels, strict=True):
            for row in rows:
                if row[column] == "-":
                    continue
                x, (y, error) = float(row[column]), (float(v) for v in row["top-1 %"].split(" ± "))
                color = "C3" if row["arm"] == REFERENCE_ARM else "C0"
                panel.errorbar(x, y, yerr=error if error == error else None, fmt="o", color=color)
                panel.annotate(row["arm"], (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7, color=color)
            panel.set(xlabel=label, ylabel="top-1, %", title=title)
            panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(RESULTS / "distill.png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("final", "tuning"), default="final", help="images of the runs")
    draw(parser.parse_args().part)


if __name__ == "__main__":
    main()
