"""Tables of docs/claims.md: equal to those of the results files, links that lead somewhere, and known figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.claims import document
from benchmarks.claims.common import judge


def test_the_page_has_the_tables_of_the_results_files() -> None:
    text = document.DOCUMENT.read_text(encoding="utf-8")
    assert document.document(text) == text, "run python -m benchmarks.document"
    anchors = {title.lower().replace(" ", "-") for title in re.findall(r"^## (.+)$", text, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= anchors
    for link in re.findall(r"\]\(([\w./-]+\.(?:svg|md|cff))", text):
        assert (document.DOCUMENT.parent / link).exists(), link


def test_a_results_file_gives_verdict_table_and_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "RESULTS", tmp_path)
    text = "\n".join(f"<!-- results: {name} -->\nold\n<!-- end -->" for name in ("summary", "claims_a_b", "claims_c"))
    assert document.document(text).count(document.MISSING) == 3
    claim = judge("Deep layers lose more", [-1.0, -1.5, -2.0], section="4", measured="rise, points")
    figures = {"claims": [claim], "table": [{"layer": "layer1", "lost": 12.3456}], "rows": []}
    content = {"figures": figures, "date": "2026-01-02", "commit": "abc", "time": {"cpu_seconds": 150}}
    (tmp_path / "claims_a_b.json").write_text(json.dumps(content))
    (tmp_path / "claims_c.json").write_text(json.dumps({"figures": {"rows": []}}))  # an unfinished run
    result = document.document(text)
    assert (
        "| [Deep layers lose more](#a-b) | **contradicted** | −1.50 ± 0.29 | −2.74 … −0.26 | 3 |" in result.splitlines()
    )
    assert "| layer1 | 12.35 |" in result
    assert "`python -m benchmarks.claims.bench_a_b` → `benchmarks/results/claims_a_b.json`, 2026-01-02" in result
    assert "commit abc, 2 CPU minutes" in result
    assert result.count(document.MISSING) == 1
    assert document.document(result) == result
    # Several verdicts on a claim
    figures["claims"].append(judge("Deep layers lose more", [1.0, 2.0, 3.0], section="4", measured="rise, per cent"))
    (tmp_path / "claims_a_b.json").write_text(json.dumps(content))
    assert "](#a-b): rise, points | **contradicted**" in document.document(text)
    assert "](#a-b): rise, per cent | **" in document.document(text)
