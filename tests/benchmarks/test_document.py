"""Tables of docs/benchmarks.md: equal to those of the results files, and known figures of made results files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import document
from benchmarks.common import results
from benchmarks.common.markdown import best_in_bold, cell, markdown_table, marked_names, number
from benchmarks.distill import store
from benchmarks.distill.arms import CROSS_ENTROPY, METHODS, OURS


def move_results(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read and write results files in another folder."""
    for module in (document, results, store):
        monkeypatch.setattr(module, "RESULTS", folder)


def test_the_page_has_the_tables_of_the_results_files() -> None:
    text = document.DOCUMENT.read_text(encoding="utf-8")
    assert document.document(text) == text, "run python -m benchmarks.document"
    names = marked_names(text)
    assert sorted(names) == sorted([*document.TABLES, document.DISTILLATION])
    # A takeaway in bold is the begin of the paragraph above each table, or a heading's first paragraph
    for name in set(names) - {document.DISTILLATION}:
        paragraph = text[: text.index(f"<!-- results: {name} -->")].rstrip().rsplit("\n\n", 1)[-1]
        assert paragraph.startswith("**"), name
    assert set(document.source("fit", document.read("fit")).split("`")) >= {"benchmarks/results/fit.json"}


def test_every_loss_of_the_benchmark_has_a_label() -> None:
    assert {*METHODS, OURS, CROSS_ENTROPY} == set(document.METHOD_LABELS)


def test_no_table_of_the_page_is_written_by_hand() -> None:
    text = document.DOCUMENT.read_text(encoding="utf-8")
    assert "\n|" not in document.replace_marked(text, lambda _: "")


def test_every_pair_and_budget_of_distillation_has_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    move_results(tmp_path, monkeypatch)
    ours = {"arm": "kd+ours", "seeds": 5, "top-1 %": "70.10 ± 0.20", "over kd+ours": "+0.00 ± 0.00"}
    rival = {"arm": "kd+fitnet,weight=10", "seeds": 5, "top-1 %": "69.00 ± nan", "over kd+ours": "-1.10 ± 0.30"}
    costs = {"ms over kd": "+1.5", "peak MiB": "-"}
    none = {"ms over kd": "-", "peak MiB": "-"}
    tables = {"10 epochs": [ours | none, rival | none], "30 epochs": [rival | costs, ours | none]}
    # Without a default that a loss has by now
    rows = [{"part": "final", "budget": 10, "arm": "kd+ours", "defaults": {"weight": 7.0, "schedule": None}}]
    content = {
        "figures": {"tables": tables, "rows": rows},
        "device": "a CPU, 1 threads",
        "date": "2026-01-02",
        "commit": "abc",
    }
    (tmp_path / "distill_resnet32_mobile_cifar100.json").write_text(json.dumps(content))
    text = document.distillation()
    title = "**ResNet-32 teaches MobileNetV2 0.35 on CIFAR-100"
    assert f"{title}, 10 epochs.** The defaults of `IsomorphismLoss` beside KD are in place 1 of 2. Recorded" in text
    assert text.count("Recorded with other defaults: weight=7.0, schedule=None.") == 1
    assert f"{title}, 30 epochs.** The defaults of `IsomorphismLoss` beside KD are in place 2 of 2; KD + FitNet" in text
    assert "| KD + `IsomorphismLoss` | 5 | **70.10 ± 0.20** | 0.00 ± 0.00 |\n" in text
    assert "| KD + FitNet (weight 10) | 5 | 69.00 | −1.10 ± 0.30 | +1.5 |\n" in text
    assert text.count("added ms of a step") == 1
    assert "a CPU, 1 thread, 2026-01-02, commit abc" in text
    assert text.endswith("(../benchmarks/results/distill.png)")


def test_cells_are_formatted_as_they_are_printed() -> None:
    assert (number(-0.001), number(-1.25, "+"), number(2.0, "+", 1)) == ("0.00", "−1.25", "+2.0")
    assert (cell(12.3456), cell("-0.50 ± nan"), cell("-0.00 ± 0.07"), cell("2026-01-02"), cell("l-1")) == (
        "12.35",
        "−0.50",
        "0.00 ± 0.07",
        "2026-01-02",
        "l-1",
    )
    rows = [{"a": "9.5 ± 1.0", "b": 3}, {"a": "−11.0", "b": 1}, {"a": "1,000", "b": ""}]
    best_in_bold(rows, ["a"])
    best_in_bold(rows, ["b"], lowest=True)
    assert markdown_table(rows).splitlines()[2:] == ["| 9.5 ± 1.0 | 3 |", "| −11.0 | **1** |", "| **1,000** |  |"]


def test_pairs_with_runs_of_one_budget_have_a_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    move_results(tmp_path, monkeypatch)
    for pair, rival in (("resnet56_resnet8_cifar10", 71.0), ("resnet56_resnet20_cifar10", 68.0)):
        runs = store.ResultsStore(pair)
        for arm, accuracy in (("kd+ours", 70.0), ("kd+fitnet,weight=10", rival)):
            defaults = store.loss_defaults(store.parse_arm(arm))
            row = {"part": "final", "budget": 10, "arm": arm, "defaults": defaults, "folded_accuracy": 0.0}
            runs.add([row | {"seed": seed, "accuracy": accuracy + seed} for seed in (0, 1)])
    text = document.distillation()
    assert "**Mean over 2 pairs, 10 epochs.**" in text
    # (71 - 70 + 68 - 70) / 2
    assert "| KD + FitNet | −0.50 ± 0.00 | 2 |" in text.splitlines()
    assert text.count("over our defaults |\n") == 2


def test_files_with_tuning_runs_alone_have_no_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    move_results(tmp_path, monkeypatch)
    (tmp_path / "distill_resnet56_mobile_cifar10.json").write_text('{"figures": {"tables": {}, "rows": []}}')
    assert document.distillation() == ""
