"""Tables and pictures of docs/claims.md, made from the results files.

    python -m benchmarks.document

A name between the markers of a table is a results file, or "summary" for the verdicts of all.
"""

from __future__ import annotations

import json
import statistics
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.common.markdown import markdown_table, marked_names, number, replace_marked
from benchmarks.common.results import RESULTS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "claims.md"
OTHER_SCRIPTS = {"trajectory": "benchmarks.measure.bench_trajectory"}
COMPRESSION = "claims_compression"
SUMMARY, MISSING = "summary", "*Not recorded yet.*"
VERDICT_COLORS = {"confirmed": "#227b94", "undecided": "#7a7f87", "contradicted": "#b3261e"}
METHOD_COLORS = ("#16325b", "#e07a1f", "#b3261e", "#7a7f87", "#227b94")
ROW_INCHES, WIDTH_INCHES, CURVES_INCHES, WRAP_CHARACTERS = 0.95, 7.5, 10.5, 110


def document(text: str) -> str:
    """Return the document with the tables of the present results files."""
    results = {name: read(name) for name in marked_names(text) if name != SUMMARY}
    return replace_marked(text, lambda name: summary(results) if name == SUMMARY else section(name, results[name]))


def read(name: str) -> dict[str, Any] | None:
    """Return the content of a results file whose run is finished, or None."""
    path = RESULTS / f"{name}.json"
    content = json.loads(path.read_text()) if path.exists() else None
    return content if content is not None and "table" in content["figures"] else None


def summary(results: dict[str, dict[str, Any] | None]) -> str:
    """Return a table with the verdict on every claim. Claims with several verdicts state what each one measures."""
    texts = [claim["claim"] for content in results.values() for claim in claims(content)]
    rows = [
        {
            "claim": f"[{claim['claim']}](#{name.removeprefix('claims_').replace('_', '-')})"
            + (f": {claim['measured']}" if texts.count(claim["claim"]) > 1 else ""),
            "verdict": f"**{claim['verdict']}**",
            "effect": effect(claim),
            "95 % interval": interval(claim),
            "replicates": str(claim["seeds"]),
        }
        for name, content in results.items()
        for claim in claims(content)
    ]
    return markdown_table(rows) if rows else MISSING


def section(name: str, content: dict[str, Any] | None) -> str:
    """Return verdicts, table and picture of a results file."""
    if content is None:
        return MISSING
    verdicts = [
        f"- **{claim['verdict'].capitalize()}: {lower_first(claim['claim'])}.** {upper_first(claim['measured'])}: "
        f"{effect(claim)}, 95 % interval {interval(claim)}, {claim['seeds']} replicates."
        for claim in claims(content)
    ]
    parts = ["\n".join(verdicts), markdown_table(content["figures"]["table"])]
    if claims(content):
        parts.append(f"![Effect of every replicate, with mean and 95 % interval]({name}.svg)")
    if name == COMPRESSION:
        parts.append("![Lost shares over the ratio by method, and over redundancy by block](compression_curves.svg)")
    seconds = content.get("time", {}).get("cpu_seconds")
    time = "" if seconds is None else f", {max(1, round(seconds / 60))} CPU minutes"
    script = OTHER_SCRIPTS.get(name, f"benchmarks.claims.bench_{name.removeprefix('claims_')}")
    source = f"`benchmarks/results/{name}.json`, {content['date']}, commit {content['commit']}{time}"
    parts.append(f"`python -m {script}` → {source}")
    return "\n\n".join(filter(None, parts))


def claims(content: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the verdicts of a results file."""
    found: list[dict[str, Any]] = [] if content is None else content["figures"].get("claims", [])
    return found


def effect(claim: dict[str, Any]) -> str:
    """Format mean ± standard error."""
    error = claim["standard_error"]
    return number(claim["effect"], "+") + ("" if error is None else f" ± {number(error)}")


def interval(claim: dict[str, Any]) -> str:
    """Format a 95 % interval."""
    ends = claim["interval"]
    return "–" if ends is None else f"{number(ends[0], '+')} … {number(ends[1], '+')}"


def lower_first(text: str) -> str:
    """Return a sentence for the middle of another one."""
    return text[:1].lower() + text[1:]


def upper_first(text: str) -> str:
    """Return a phrase as the begin of a sentence."""
    return text[:1].upper() + text[1:]


def draw(name: str, entries: list[dict[str, Any]]) -> None:
    """Draw the effect of every replicate, with mean and interval, into docs/<name>.svg."""
    import matplotlib.pyplot as plt

    with plt.rc_context(svg_options(name)):
        figure, panels = plt.subplots(
            len(entries),
            1,
            squeeze=False,
            figsize=(WIDTH_INCHES, ROW_INCHES * len(entries) + 0.2),
            layout="constrained",
        )
        for axes, claim in zip(panels[:, 0], entries, strict=True):
            color = VERDICT_COLORS[claim["verdict"]]
            axes.axvline(0, color="#9aa0a6", linewidth=0.8)
            if claim["interval"] is not None:
                axes.plot(claim["interval"], [0, 0], color=color, linewidth=2)
            axes.plot([claim["effect"]], [0], "D", color=color, markersize=6)
            axes.plot(claim["effects"], [0.35] * len(claim["effects"]), "o", color=color, alpha=0.6, markersize=4)
            axes.set_ylim(-0.4, 0.75)
            axes.set_yticks([])
            title = f"{upper_first(claim['verdict'])}: {lower_first(claim['claim'])}"
            axes.set_title("\n".join(textwrap.wrap(title, WRAP_CHARACTERS)), loc="left")
            axes.set_xlabel("\n".join(textwrap.wrap(claim["measured"], WRAP_CHARACTERS)), color="#5f6368")
            for side in ("left", "top", "right"):
                axes.spines[side].set_visible(False)
        figure.savefig(DOCUMENT.with_name(f"{name}.svg"), metadata={"Date": None})
        plt.close(figure)


def draw_compression(rows: list[dict[str, Any]]) -> None:
    """Draw lost shares over the ratios by method and layer, and over redundancy, into docs/compression_curves.svg."""
    import matplotlib.pyplot as plt

    chains, blocks = ([row for row in rows if row["part"] == part] for part in ("chain", "blocks"))
    layers = list(chains[0]["stages"][0]["layers"])
    methods = list(dict.fromkeys(stage["method"] for stage in chains[0]["stages"] if stage["ratio"]))
    with plt.rc_context(svg_options("compression_curves")):
        figure, panels = plt.subplots(1, len(layers) + 1, figsize=(CURVES_INCHES, 2.6), layout="constrained")
        for axes, layer in zip(panels, layers, strict=False):
            for method, color in zip(methods, METHOD_COLORS, strict=True):
                stages = [[stage for stage in row["stages"] if stage["method"] == method] for row in chains]
                ratios = [stage["ratio"] for stage in stages[0]]
                shares = [[100 * stage["layers"][layer]["lost"] for stage in stage_row] for stage_row in stages]
                means = [statistics.fmean(column) for column in zip(*shares, strict=True)]
                errors = [statistics.stdev(column) / len(shares) ** 0.5 for column in zip(*shares, strict=True)]
                axes.errorbar(ratios, means, errors, color=color, marker="o", markersize=3, linewidth=1.3, label=method)
            axes.set_title(f"{layer}: lost share, %", loc="left")
            axes.set_xlabel("reduction of multiply-adds")
            axes.set_ylim(0, 100)
        for row, color in zip(blocks, METHOD_COLORS, strict=False):
            redundancies, lost = ([100 * value for value in row[key].values()] for key in ("redundancy", "lost"))
            panels[-1].plot(redundancies, lost, "o", color=color, markersize=3.5, alpha=0.8, label=row["network"])
        panels[-1].set_title("blocks: lost share, %", loc="left")
        panels[-1].set_xlabel("redundancy, %")
        panels[-1].set_ylim(0, None)
        for axes in panels:
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        for axes in (panels[0], panels[-1]):
            axes.legend(frameon=False, fontsize=6.5)
        figure.savefig(DOCUMENT.with_name("compression_curves.svg"), metadata={"Date": None})
        plt.close(figure)


def svg_options(name: str) -> dict[str, Any]:
    """Return options with which text stays text, and a file is the same whenever it is drawn."""
    return {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 8, "font.family": "sans-serif"}


def main() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(document(text), encoding="utf-8")
    for name in marked_names(text):
        if entries := claims(None if name == SUMMARY else read(name)):
            draw(name, entries)
    if (compression := read(COMPRESSION)) is not None:
        draw_compression(compression["figures"]["rows"])
    print(f"{DOCUMENT} written")


if __name__ == "__main__":
    main()
