"""Test the harness of the distillation benchmark: arms, the teacher's cache, and the results of tuning."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.common import results
from benchmarks.distill import pairs, store, teacher_cache
from benchmarks.distill.arms import decay, parse_arm, warmup
from benchmarks.distill.store import ResultsStore, summary
from benchmarks.distill.teacher_cache import RecordedTeacher, TeacherCache
from benchmarks.distill.training import Run, train


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (store, teacher_cache):
        monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    for module in (store, results):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")


def test_an_arm_is_its_text() -> None:
    for text in ("ce", "kd+fitnet,weight=10,schedule=decay", "dkd,weight=2.5+ours,scale=linear,weight=balanced"):
        assert str(parse_arm(text)) == text
    assert str(parse_arm("kd,weight=3+fitnet,schedule=decay").with_weight(0.1)) == (
        "kd,weight=3+fitnet,weight=0.1,schedule=decay"
    )
    assert dict(parse_arm("ours,weight=1e-3,scale=log").terms[0].options) == {"weight": 1e-3, "scale": "log"}
    assert str(parse_arm("kd,schedule=constant+review,schedule=warmup")) == "kd+review"
    assert str(parse_arm("fitnet").with_weight(100.0)) == "fitnet,weight=100"
    with pytest.raises(SystemExit, match="got 'fitnets'"):
        parse_arm("kd+fitnets")
    with pytest.raises(SystemExit, match="options weight and schedule of 'dkd', got 'dkd,beta=2'"):
        parse_arm("dkd,beta=2+ours,ridge=0.1")


def test_schedules_by_hand() -> None:
    assert [decay(p) for p in (0.0, 0.5, 0.75, 1.0)] == pytest.approx([1.0, 1.0, 0.51, 0.02])
    assert [warmup(p) for p in (0.0, 1 / 24, 1 / 12, 1.0)] == pytest.approx([0.0, 0.5, 1.0, 1.0])


def make_cache() -> TeacherCache:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
    return TeacherCache(RecordedTeacher(layers, ["1"], "3"), "teacher", 10, torch.zeros(1, 3, 4, 4))


def test_the_cache_returns_what_the_teacher_computed() -> None:
    indices, images = torch.tensor([7, 2, 4]), torch.randn(3, 3, 4, 4)
    cache = make_cache()
    first = cache.batch(0, indices, images)
    direct = cache.teacher(images)
    torch.testing.assert_close(first.features["1"], direct.features["1"], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(first.logits, direct.logits, rtol=1e-2, atol=1e-2)
    # Another process finds the images in another order, without the teacher
    other = make_cache()
    other.teacher.model = nn.Module()
    second = other.batch(0, indices.flip(0), images.flip(0))
    assert torch.equal(second.features["1"], first.features["1"].flip(0))
    assert torch.equal(second.pooled, first.pooled.flip(0))
    assert torch.equal(second.logits, first.logits.flip(0))


def test_a_full_disk_budget_computes_in_place_of_storing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "MAX_DISK_BYTES", 10)
    cache, images = make_cache(), torch.randn(2, 3, 4, 4)
    first, second = (cache.batch(3, torch.tensor([0, 1]), images) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    assert not list(teacher_cache.CACHE.rglob("*.bfloat16"))


def row(arm: str, accuracy: float, seed: int = 1000, budget: int = 10, part: str = "tuning") -> dict[str, Any]:
    figures = {"accuracy": accuracy, "folded_accuracy": accuracy, "step_ms": 10.0 + accuracy, "peak_mib": 1.0}
    defaults = store.loss_defaults(parse_arm(arm))
    return {"part": part, "budget": budget, "seed": seed, "arm": arm, "defaults": defaults, **figures}


def test_tuned_weights_are_those_of_the_best_tuning_run() -> None:
    runs = ResultsStore("pair")
    runs.add([row("kd+fitnet,weight=10", 80.0), row("kd+fitnet,weight=100", 70.0), row("kd+at,weight=5", 99.0)])
    runs.add([row("kd+fitnet,weight=1", 90.0, part="final"), row("kd+fitnet,weight=100", 82.0, seed=1001)])
    arm = parse_arm("kd+fitnet,weight=tuned")
    assert ResultsStore("pair").best_weight(arm, 30) == 10
    assert str(runs.resolve(arm, 10)) == "kd+fitnet,weight=10"
    runs.add([row("kd+fitnet,weight=100", 99.0)])  # in the place of the one before
    assert len(runs.rows) == 5
    assert runs.best_weight(arm, 10) == 100
    with pytest.raises(SystemExit, match="run with --tune first"):
        runs.resolve(parse_arm("kd+srd,weight=tuned"), 10)


def test_the_table_holds_paired_differences() -> None:
    runs = ResultsStore("pair")
    pairs = [("kd+ours", 80.0, 90.0), ("kd", 70.0, 82.0)]
    runs.add([row(arm, value, seed, part="final") for arm, *values in pairs for seed, value in enumerate(values)])
    runs.add([row("kd+ours", 4.5, part="costs"), row("kd", 1.0, part="costs")])
    best, other = runs.table("final", 10)
    assert (best["arm"], other["arm"]) == ("kd+ours", "kd")
    assert other["over kd+ours"] == "-9.00 ± 1.00"
    assert best["over kd+ours"] == "+0.00 ± 0.00"
    assert (best["ms over kd"], other["ms over kd"]) == ("+3.5", "+0.0")


def test_the_summary_takes_the_best_weight_of_each_rival_on_each_pair() -> None:
    easy, hard = ResultsStore("easy"), ResultsStore("hard")
    for runs, weights in ((easy, (("1", 81.0), ("10", 85.0))), (hard, (("1", 41.0), ("10", 30.0)))):
        runs.add([row("kd+ours", 80.0 if runs is easy else 40.0, seed, part="final") for seed in (0, 1)])
        runs.add([row(f"kd+at,weight={w}", v + seed, seed, part="final") for w, v in weights for seed in (0, 1)])
    easy.add([row("dkd", 99.0, part="final", seed=0)])  # of one pair only
    best, reference = summary([easy, hard], "final", 10)
    # Differences 5 and 6, 1 and 2: means 5.5 and 1.5 with errors of 0.5
    assert (best["method"], best["over kd+ours"]) == ("kd+at", "+3.50 ± 0.35")
    assert (reference["method"], reference["over kd+ours"]) == ("kd+ours", "+0.00 ± 0.00")


def test_rows_of_another_default_ridge_are_those_of_another_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, arm = ResultsStore("pair"), parse_arm("kd+ours")
    runs.add([row("kd+ours", 80.0, part="final"), row("kd", 70.0, part="final")])
    monkeypatch.setattr(store, "RIDGE_HALVING_CALLS", 2 * store.RIDGE_HALVING_CALLS)
    assert runs.find("final", 10, 1000, arm) is None
    assert list(runs.by_arm("final", 10)) == ["kd"]
    runs.add([row("kd+ours", 81.0, part="final")])
    found = runs.find("final", 10, 1000, arm)
    assert found is not None
    assert found["accuracy"] == 81.0
    assert len(runs.rows) == 3


class SmallNetwork(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, width, 3, 4, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.classifier = nn.Linear(width, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(pairs.pooled(self.stage(images)))


def make_run(monkeypatch: pytest.MonkeyPatch) -> Run:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(192, 3, 32, 32, generator=generator).half(), torch.randint(4, (192,), generator=generator)
    monkeypatch.setattr(pairs, "decoded_images", lambda _dataset, _split: images)
    torch.manual_seed(1)
    networks = lambda: SmallNetwork(8), lambda: SmallNetwork(4)
    pair = pairs.Pair("none", *networks, {"stage": "stage"}, ("classifier", "classifier"), pairs.pooled, 128)
    own, teacher = pairs.Images(pair), pair.teacher()
    cache = TeacherCache(RecordedTeacher(teacher, ["stage"], "classifier"), "small", 192, own.training[:1].float())
    return Run(pair, own, cache, teacher.classifier, "tuning", budget=2, seed=3)


def test_an_arm_does_not_depend_on_the_arms_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(monkeypatch)
    texts = ["ce", "kd+ours,schedule=decay", "kd+fitnet+srd,weight=0.5", "simkd", "kd+vkd+timm+review"]
    together = train([parse_arm(text) for text in texts], run)
    for text, student in list(zip(texts, together, strict=True))[1:]:
        (alone,) = train([parse_arm(text)], run)
        for name, value in alone.model.state_dict().items():
            assert torch.equal(value, student.model.state_dict()[name]), (text, name)
    for first, second in pairwise(together):
        assert not torch.equal(first.model.stage[0].weight, second.model.stage[0].weight)
    rows = [student.row() for student in together]
    assert all(row["steps"] == 4 for row in rows)
    assert not any(row["diverged"] for row in rows)
    # SimKD has one classifier, the teacher's
    assert rows[3]["accuracy"] == rows[3]["folded_accuracy"]
