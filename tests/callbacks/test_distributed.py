"""Measuring while training under accelerate, resumed, and in two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process
from torch import Tensor, nn

from knowiso_train import IsomorphismCallback, IsomorphismLoss, measure
from tests.helpers.processes import WORLD, run_in_processes
from tests.helpers.training import LAYERS, SHARES, held_out, network


class Listed(GeneralTracker):  # type: ignore[misc]
    """A tracker that remembers."""

    name, requires_logging_directory, main_process_only = "listed", False, True

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> list[Any]:
        return self.rows

    @on_main_process  # type: ignore[untyped-decorator]
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Nothing to store."""

    @on_main_process  # type: ignore[untyped-decorator]
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.rows.append((step, values))


class TestAccelerate:
    def run(
        self, folder: Path, steps: int, *, resume: bool = False, save: bool = False
    ) -> tuple[IsomorphismCallback, Listed, dict[str, Tensor]]:
        tracker = Listed()
        accelerator = Accelerator(cpu=True, log_with=tracker)
        accelerator.init_trackers("training")
        student, teacher = network(1), network(2)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
        prepared, prepared_optimizer = accelerator.prepare(student, optimizer)
        iso = IsomorphismLoss(prepared, teacher, LAYERS)
        callback = IsomorphismCallback.of(iso, held_out(), every=2, log=accelerator.log)
        accelerator.register_for_checkpointing(iso, callback)
        if resume:
            accelerator.load_state(str(folder))
        with iso:
            for step in range(callback.steps, callback.steps + steps):
                loss = (
                    prepared(torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(step))).square().mean()
                    + iso()
                )
                accelerator.backward(loss)
                prepared_optimizer.step()
                prepared_optimizer.zero_grad()
                callback.step()
        if save:
            accelerator.save_state(str(folder), safe_serialization=True)
        return callback, tracker, student.state_dict()

    def test_saved_and_resumed_it_goes_on(self, tmp_path: Path) -> None:
        whole, _, weights = self.run(tmp_path / "none", 7)
        first, _, _ = self.run(tmp_path / "state", 3, save=True)
        resumed, tracker, resumed_weights = self.run(tmp_path / "state", 4, resume=True)
        assert resumed.steps == 7
        assert [measured.step for measured in resumed.history] == [2, 4, 6]
        assert [measured.metrics for measured in resumed.history] == [measured.metrics for measured in whole.history]
        assert resumed.history[0] == first.history[0]  # as it was saved, seconds and all
        assert all(torch.equal(value, resumed_weights[name]) for name, value in weights.items())
        assert [step for step, _ in tracker.rows] == [4, 6]
        plain = torch.load(tmp_path / "state" / "custom_checkpoint_1.pkl", weights_only=True)
        assert plain == first.state_dict()

    def test_trackers_get_the_figures(self, tmp_path: Path) -> None:
        callback, tracker, _ = self.run(tmp_path, 5)
        assert tracker.rows == [(measured.step, measured.metrics) for measured in callback.history]
        assert [step for step, _ in tracker.rows] == [2, 4]
        assert all(0 < values[name] < 1 for _, values in tracker.rows for name in SHARES)


def worker(rank: int, folder: str) -> None:
    logged: list[int] = []
    # Its own forward would broadcast buffers and wait for the other process
    student = nn.parallel.DistributedDataParallel(network(1))
    callback = IsomorphismCallback(
        student,
        network(2),
        held_out(95),
        LAYERS,
        every=2,
        path=Path(folder) / f"of-{rank}",
        log=lambda values, step: logged.append(step),
    )
    for _ in range(3):
        callback.step()
    callback.end()
    report = measure(student, network(2), held_out(95), LAYERS, order=0, progress=False)
    unexplained = [pair.unexplained for pair in report]
    torch.save({"logged": logged, "measured": unexplained, **callback.state_dict()}, Path(folder) / f"{rank}.pt")


def test_two_processes_measure_what_one_measures_and_one_speaks(tmp_path: Path) -> None:
    run_in_processes(worker, str(tmp_path))
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    assert [state["logged"] for state in states] == [[2, 3], []]
    assert (tmp_path / "of-0" / "report.json").exists()
    assert not (tmp_path / "of-1").exists()
    one = measure(network(1), network(2), held_out(95), LAYERS, order=0, progress=False)
    for state in states:
        assert state["measured"] == pytest.approx([pair.unexplained for pair in one], abs=1e-5)
        assert state["steps"] == 3
        assert [entry["step"] for entry in state["history"]] == [2, 3]
        for entry in state["history"]:
            report = entry["report"]
            assert report["images"] == one.images
            assert [pair["unexplained"] for pair in report["pairs"]] == pytest.approx(
                [pair.unexplained for pair in one], abs=1e-5
            )
