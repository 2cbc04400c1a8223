"""Tables and pictures of docs/claims.md, made from the results files.

    python -m benchmarks.claims.document

A table stands between the markers `<!-- results: NAME -->` and `<!-- end -->`, NAME being a results file, or "summary"
for the verdicts of all. The text around the markers is written by hand and stays.
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.common.results import RESULTS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "claims.md"
MARKED = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
OTHER_SCRIPTS = {"trajectory": "benchmarks.measure.bench_trajectory"}
SUMMARY, MISSING = "summary", "*Not recorded yet.*"
VERDICT_COLORS = {"confirmed": "#227b94", "undecided": "#7a7f87", "not confirmed": "#b3261e"}
ROW_INCHES, WIDTH_INCHES, WRAP_CHARACTERS = 1.05, 7.5, 88


def document(text: str) -> str:
    """Return the document with the tables of the present results files."""
    names = [name for _, name, _ in MARKED.findall(text) if name != SUMMARY]
    results = {name: read(name) for name in names}

    def replaced(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        content = summary(results) if name == SUMMARY else section(name, results[name])
        return f"{begin}{content}\n{end}"

    return MARKED.sub(replaced, text)


def read(name: str) -> dict[str, Any] | None:
    """Return the content of a results file whose run is finished, or None."""
    path = RESULTS / f"{name}.json"
    content = json.loads(path.read_text()) if path.exists() else None
    return content if content is not None and "table" in content["figures"] else None


def summary(results: dict[str, dict[str, Any] | None]) -> str:
    """Return a table with the verdict on every claim."""
    rows = [
        {
            "claim": f"[{claim['claim']}](#{name.removeprefix('claims_').replace('_', '-')})",
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


def number(value: float, sign: str = "") -> str:
    """Format with two decimals, and a minus sign."""
    return f"{value:{sign}.2f}".replace("-", "−")


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Return rows of equal keys as a table in Markdown."""
    cells = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def lower_first(text: str) -> str:
    """Return a sentence for the middle of another one."""
    return text[:1].lower() + text[1:]


def upper_first(text: str) -> str:
    """Return a phrase as the begin of a sentence."""
    return text[:1].upper() + text[1:]


def draw(name: str, entries: list[dict[str, Any]]) -> None:
    """Draw the effect of every replicate, with mean and interval, into docs/<name>.svg."""
    import matplotlib.pyplot as plt

    # Text stays text, and the file is the same whenever it is drawn
    options = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 8, "font.family": "sans-serif"}
    with plt.rc_context(options):
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
            axes.set_title(
                "\n".join(textwrap.wrap(f"{claim['verdict']}: {claim['claim']}", WRAP_CHARACTERS)), loc="left"
            )
            axes.set_xlabel("\n".join(textwrap.wrap(claim["measured"], WRAP_CHARACTERS)), color="#5f6368")
            for side in ("left", "top", "right"):
                axes.spines[side].set_visible(False)
        figure.savefig(DOCUMENT.with_name(f"{name}.svg"), metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(document(text), encoding="utf-8")
    for _, name, _ in MARKED.findall(text):
        if entries := claims(None if name == SUMMARY else read(name)):
            draw(name, entries)
    print(f"{DOCUMENT} written")


if __name__ == "__main__":
    main()
