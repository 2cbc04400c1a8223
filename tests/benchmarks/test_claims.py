"""Test the rule of the verdicts on the paper's claims, and the results files of interrupted claim scripts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.claims import common
from benchmarks.claims.common import T_QUANTILES, ClaimResults, judge
from benchmarks.common import results


def verdict(*effects: float) -> str:
    return str(judge("", effects, section="4", measured="")["verdict"])


def test_the_interval_over_the_seeds_decides() -> None:
    # Mean 2, standard error 1 / √3: the interval of three seeds is 2 ± 4.303 / √3, that of five with equal spread less
    assert verdict(1, 2, 3) == verdict(-1, -2, -3) == "undecided"
    assert verdict(1, 1, 2, 3, 3) == "confirmed"
    assert verdict(2, 2.5, 3) == "confirmed"
    assert verdict(-2, -2.5, -3) == "contradicted"
    assert verdict(0, 0, 0) == verdict(5) == "undecided"
    entry = judge("", (1, 2, 3), section="4", measured="")
    assert entry["standard_error"] == pytest.approx(1 / math.sqrt(3))
    assert entry["interval"] == pytest.approx([2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)])
    assert judge("", (5,), section="4", measured="")["standard_error"] is None


@pytest.mark.parametrize("degrees", [1, 2, 5, 10])
def test_quantiles_are_those_of_students_t(degrees: int) -> None:
    # The integral of the density from 0 to the 97.5 % quantile is 0.475
    scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    quantile, steps = T_QUANTILES[degrees - 1], 20_000
    points = ((i + 0.5) * quantile / steps for i in range(steps))
    integral = sum((1 + x * x / degrees) ** (-(degrees + 1) / 2) for x in points) * scale * quantile / steps
    assert integral == pytest.approx(0.475, abs=2e-5)


def test_an_interrupted_script_continues_with_the_finished_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (common, results):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    computed: list[int] = []

    def run(seeds: int, stop: int | None = None) -> ClaimResults:
        store = ClaimResults("claim", {"images": 10, "layers": ("a", "b")})

        def compute(seed: int) -> dict[str, Any]:
            if seed == stop:
                raise KeyboardInterrupt
            computed.append(seed)
            return {"effect": 1.0 + seed}

        effects = [store.row(lambda seed=seed: compute(seed), seed=seed, stage="x")["effect"] for seed in range(seeds)]
        store.finish([judge("claimed", effects, section="4", measured="points")], [{"effect": effects[0]}])
        return store

    with pytest.raises(KeyboardInterrupt):
        run(3, stop=2)
    assert [row["seed"] for row in json.loads((tmp_path / "claim.json").read_text())["figures"]["rows"]] == [0, 1]
    run(3)
    assert computed == [0, 1, 2]
    saved = json.loads((tmp_path / "claim.json").read_text())
    assert saved["figures"]["claims"][0]["effects"] == [1.0, 2.0, 3.0]
    assert saved["settings"] == {"images": 10, "layers": ["a", "b"]}
    assert saved["time"]["cpu_seconds"] >= 0
    assert [file.name for file in tmp_path.iterdir()] == ["claim.json"]
    with pytest.raises(SystemExit, match="other settings"):
        ClaimResults("claim", {"images": 11})
