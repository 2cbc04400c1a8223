"""Results of `recipes/distill.py` on digits, with its default options.

    python -m benchmarks.distill.bench_recipe     # a minute on two idle cores

Teacher and students are trained on digits, each student with another loss, one seed. "explains" is the share of a
teacher's layer that the student's layer explains, by order-0 maps on held-out digits.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common.results import record, table

RECIPE = Path(__file__).parents[2] / "recipes" / "distill.py"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(RECIPE), "--output", folder], check=True)
        summary = json.loads((Path(folder) / "summary.json").read_text())
        log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    rows: list[dict[str, Any]] = []
    for card in summary["arms"]:
        terms = [entry["isomorphism"] for entry in log if entry["arm"] == card["arm"] and "isomorphism" in entry]
        shares = {f"explains {layer}": round(100 * share, 1) for layer, share in card.get("explained", {}).items()}
        rows.append(
            {
                "arm": card["arm"],
                "top-1": round(card["top1"], 2),
                **shares,
                **({"first": terms[0], "last": terms[-1]} if terms else {}),
            }
        )
    header = dict.fromkeys(key for row in rows for key in row)
    print(table([{key: row.get(key, "") for key in header} for row in rows]))
    record("recipe_distill", rows)


if __name__ == "__main__":
    main()
