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
    """Return the tables of all pairs and budgets with rows of the part."""
    by_pair = {}
    for name in PAIRS:
        store = ResultsStore(name)
        for budget in sorted({row["budget"] for row in store.rows if row["part"] == part}):
            by_pair[f"{name}, {budget} {'epoch' if budget == 1 else 'epochs'}"] = store.table(part, budget)
    return by_pair


def draw(part: Any) -> None:
    """Draw the tables of the runs of a part into results/distill.png."""
    import matplotlib.pyplot as plt

    with_costs = {title: [row for row in rows if row["ms over kd"] != "-"] for title, rows in tables(part).items()}
    measured = {title: rows for title, rows in with_costs.items() if rows}
    if not measured:
        raise SystemExit(f"no {part} runs with measured costs in {RESULTS}: run bench_distill with --costs first")
    figure, panels = plt.subplots(len(measured), 2, figsize=(12, 4 * len(measured)), squeeze=False, sharey="row")
    arms = sorted({row["arm"] for rows in measured.values() for row in rows} - {REFERENCE_ARM})
    colors = {REFERENCE_ARM: "black"} | {arm: plt.colormaps["tab20"](index % 20) for index, arm in enumerate(arms)}
    for (title, rows), row_panels in zip(measured.items(), panels, strict=True):
        for (column, label), panel in zip(AXES, row_panels, strict=True):
            for row in rows:
                x, (y, error) = float(row[column]), (float(v) for v in row["top-1 %"].split(" ± "))
                options = {"color": colors[row["arm"]], "label": row["arm"]}
                options |= {"fmt": "*", "ms": 18, "zorder": 1} if row["arm"] == REFERENCE_ARM else {"fmt": "o"}
                panel.errorbar(x, y, yerr=error if error == error else None, **options)
            panel.set(xlabel=label)
            panel.grid(alpha=0.3)
        row_panels[0].set(ylabel="top-1, %", title=title)
        row_panels[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "distill.png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("final", "tuning"), default="final", help="images of the runs")
    draw(parser.parse_args().part)


if __name__ == "__main__":
    main()
