"""Two processes (gloo) give what one gives, also where the images do not divide evenly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from knowiso_train import measure
from knowiso_train.regression import FeatureSample, StreamingMoments
from tests.helpers.processes import WORLD, run_in_processes
from tests.measurement.test_measure import network

KINDS = ("plain", "sampler", "accelerate")


def images() -> torch.Tensor:
    return torch.randn(83, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def figures(kind: str) -> list[dict[str, Any]]:
    data = TensorDataset(images())
    loader: Any = DataLoader(data, batch_size=10)
    if kind == "sampler" and dist.is_initialized():
        loader = DataLoader(data, batch_size=10, sampler=DistributedSampler(data))  # pads to an even number
    if kind == "accelerate":
        loader = Accelerator(cpu=True).prepare(DataLoader(data, batch_size=10, shuffle=True))
    report = measure(
        network(1),
        network(2),
        loader,
        ["0", "4"],
        order=1,
        directions="both",
        progress=False,
        bootstrap=50,
        # bfloat16 turns the different rounding of two processes into 1e-4
        solver_options={"epochs": 2, "precision": "float32"},
        functional=True,
        similarity=True,
    )
    return [
        {
            "shares": [*pair.shares, pair.unexplained, *pair.interval, pair.noise_floor, *pair.similarity.values()],
            "functional": [
                [share.agreement, share.agreement_error, share.kl]
                for share in (*pair.functional, pair.residual_only, pair.target_output)
                if share is not None
            ],
            "ridge": pair.ridge,
            "images": report.images,
            "rows": pair.rows,
        }
        for pair in report.pairs
    ]


def worker(rank: int, folder: str) -> None:
    for kind in KINDS:
        (Path(folder) / f"{kind}-{rank}.json").write_text(json.dumps(figures(kind)))
    x, y = images(), images().flip(0) * 2 + 3
    mine = slice(0, 50) if rank == 0 else slice(50, None)
    stream = StreamingMoments(3, 3, 3)
    stream.update(x[mine].double(), y[mine].double())
    stream.all_reduce()
    sample = FeatureSample(2000, 83, 3, 1, seed=0)
    sample.add(x[mine], y[mine], np.arange(83)[mine])
    kept = sample.result()
    assert kept is not None
    torch.save({"moments": vars(stream.value), "x": kept.x, "y": kept.y}, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the results of two processes, which start once for all tests."""
    folder = tmp_path_factory.mktemp("results")
    run_in_processes(worker, str(folder))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_measure_what_one_measures(kind: str, results: Path) -> None:
    both = [json.loads((results / f"{kind}-{rank}.json").read_text()) for rank in range(WORLD)]
    assert both[0] == both[1]
    for one, two in zip(figures("plain"), both[0], strict=True):
        np.testing.assert_allclose(two["shares"], one["shares"], atol=1e-5)
        np.testing.assert_allclose(two["functional"], one["functional"], atol=1e-4)
        np.testing.assert_allclose(two["ridge"], one["ridge"])
        assert two["images"] == one["images"]
        assert sum(two["images"].values()) == 83  # padding is not counted
        assert two["rows"] == one["rows"]


def test_all_reduced_moments_and_gathered_samples_equal_those_of_one(results: Path) -> None:
    x, y = images(), images().flip(0) * 2 + 3
    whole = StreamingMoments(3, 3, 3)
    whole.update(x.double(), y.double())
    sample = FeatureSample(2000, 83, 3, 1, seed=0)
    sample.add(x, y, np.arange(83))
    kept = sample.result()
    assert kept is not None
    for rank in range(WORLD):
        got = torch.load(results / f"{rank}.pt", weights_only=True)
        for name, value in vars(whole.value).items():
            torch.testing.assert_close(got["moments"][name], value, rtol=1e-10, atol=1e-8)
        assert torch.equal(got["x"], kept.x)
        assert torch.equal(got["y"], kept.y)
