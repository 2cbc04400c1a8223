"""Killed writers, full disks, refused values and two writers at once leave files that can be read."""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from knowiso_train import Disentangler, Report, load_pruned, save_pruned
from knowiso_train.callbacks._curves import plot_curves
from knowiso_train.callbacks.history import Measurement
from knowiso_train.diagnosis.comparison import StageResult
from knowiso_train.diagnosis.comparison._folder import StageFolder
from knowiso_train.errors import DataError, KnowisoError
from knowiso_train.experiment.run_folder import RunFolder
from knowiso_train.measurement.report import PairResult
from knowiso_train.refinement.report import RefineReport, RefineResult
from knowiso_train.utils.serialization import LEFTOVER_AGE_SECONDS, read_json, read_tensors, write_file, write_json

NUM_KILLS, NUM_READS = 12, 20
NUM_FEW_KILLS = 5  # for slow writers
UNREAD_WRITERS = ("run", "stage")  # not read while they are written


def report(seed: int, repeat: int = 1) -> Report:
    pair = PairResult(
        "a", "a", "forward", (0.5,), 0.5, (0.4, 0.6), ((0.4, 0.6),), 0.0, (0.5,), True, 2, 2, (1, 1), (1, 1), (0.0,), 9
    )
    return Report(f"x{seed}", "y", (pair,) * repeat, {"fit": 9}, {"order": 0}, 0.1, {"torch": "2"})


def chain(width: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))


class State:
    """A stand-in for an accelerator, with a state of two files."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def wait_for_everyone(self) -> None:
        pass

    def save_state(self, folder: str) -> None:
        Path(folder).mkdir(parents=True)
        for name in ("a", "b"):
            (Path(folder) / name).write_text(str(self.seed) * 100_000)

    def load_state(self, folder: str) -> None:
        assert (Path(folder) / "a").read_text() == (Path(folder) / "b").read_text() != ""


def write_report(folder: Path, seed: int) -> None:
    report(seed, 300).to_json(folder / "report.json")


def write_picture(folder: Path, seed: int) -> None:
    report(seed).plot(folder / "report.png")


def write_curves(folder: Path, seed: int) -> None:
    plot_curves([Measurement(seed, report(seed))], folder / "shares.png")


def write_maps(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    Disentangler(order=0, ridge=0.1).fit(torch.randn(90, 32 + seed % 7), torch.randn(90, 400)).save(folder / "maps")


def write_pruned(folder: Path, seed: int) -> None:
    save_pruned(folder / "pruned", chain(2 + seed % 3, seed), chain(8), factory="external", example=(1, 3))


def write_run(folder: Path, seed: int) -> None:
    run = RunFolder(folder / "run")
    run.save_checkpoint(State(seed), {"step": seed + 1})
    run.write_json("card.json", {"seed": [seed] * 10_000})
    run.log({"step": seed})


def write_stage(folder: Path, seed: int) -> None:
    StageFolder(folder / "stages", {}).write(
        StageResult("x", seed, (), None, {"fit": seed}, 0.1), {"seed": [1] * 10_000}
    )


def read_stage(folder: Path) -> None:
    assert StageFolder(folder / "stages", {}).read("x", {"seed": [1] * 10_000}) is not None


def read_run(folder: Path) -> None:
    run = RunFolder(folder / "run", writes=False)
    assert run.load_checkpoint(State(0)).get("step", 0) > 0
    run.read_json("card.json")
    run.read_log()


def read_picture(path: Path) -> None:
    from matplotlib.image import imread

    assert imread(path).ndim == 3


WRITERS: dict[str, tuple[Callable[[Path, int], None], Callable[[Path], Any]]] = {
    "report": (write_report, lambda folder: Report.from_json(folder / "report.json")),
    "picture": (write_picture, lambda folder: read_picture(folder / "report.png")),
    "curves": (write_curves, lambda folder: read_picture(folder / "shares.png")),
    "maps": (write_maps, lambda folder: Disentangler.load(folder / "maps")),
    "pruned": (write_pruned, lambda folder: load_pruned(folder / "pruned", model=chain(8))),
    "stage": (write_stage, read_stage),
    "run": (write_run, read_run),
}


def start_writing(write: Callable[[Path, int], None], folder: Path) -> int:
    """Fork a process that writes again and again, and return its number once it has written once."""
    receiver, sender = os.pipe()
    process = os.fork()
    if process:
        os.close(sender)
        assert os.read(receiver, 1) == b"1"
        os.close(receiver)
        return process
    try:
        torch.set_num_threads(1)
        write(folder, 2)
        os.write(sender, b"1")
        for seed in itertools.count(3):
            write(folder, seed)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


@pytest.mark.parametrize("writer", list(WRITERS))
def test_a_writer_killed_at_any_moment_leaves_a_readable_file(writer: str, tmp_path: Path) -> None:
    write, read = WRITERS[writer]
    moments = random.Random(7)
    for _ in range(NUM_FEW_KILLS if writer in ("picture", "curves", "stage") else NUM_KILLS):
        process = start_writing(write, tmp_path)
        time.sleep(0.08 * moments.random())
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        read(tmp_path)


@pytest.mark.parametrize("writer", [name for name in WRITERS if name not in UNREAD_WRITERS])
def test_every_read_beside_a_writer_succeeds(writer: str, tmp_path: Path) -> None:
    write, read = WRITERS[writer]
    processes = [start_writing(write, tmp_path) for _ in range(2)]
    try:
        for _ in range(NUM_READS):
            read(tmp_path)
    finally:
        for process in processes:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


@pytest.mark.parametrize("writer", [name for name in WRITERS if name not in UNREAD_WRITERS])
def test_a_full_disk_leaves_the_old_file(writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, read = WRITERS[writer]
    write(tmp_path, 1)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def raise_full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def raise_full_of_safetensors(tensors: Any, path: Path, **__: Any) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", raise_full_of_safetensors)
    monkeypatch.setattr(os, "fsync", raise_full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 2)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    assert not list(tmp_path.rglob(".*"))
    read(tmp_path)


def test_a_refused_value_leaves_the_old_files(tmp_path: Path) -> None:
    write_maps(tmp_path, 1)
    write_pruned(tmp_path, 1)
    write_report(tmp_path, 1)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    maps = Disentangler.load(tmp_path / "maps")
    maps.config = replace(maps.config, solver_options={"epochs": 2})
    maps.config.solver_options["epochs"] = np.zeros(2)  # type: ignore[index]
    network = chain(2)
    network[0].note = object()
    for call in (
        lambda: maps.save(tmp_path / "maps"),
        lambda: save_pruned(tmp_path / "pruned", network, chain(9), factory="external", example=(1, 4)),
        lambda: replace(report(1), settings={"order": {1, 2}}).to_json(tmp_path / "report.json"),
    ):
        with pytest.raises(KnowisoError):
            call()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_weights_and_card_of_a_refined_network_are_in_one_file(tmp_path: Path) -> None:
    result = RefineResult(chain(4), RefineReport("a", "auto", "original", (), (), {}, {}, {"seed": 3}, 1.0, {}))
    result.save(tmp_path)
    weights, card = read_tensors(tmp_path / "model.safetensors")
    assert card == read_json(tmp_path / "card.json")
    assert weights.keys() == result.model.state_dict().keys()


def test_partial_files_of_killed_writers_are_deleted_after_an_hour(tmp_path: Path) -> None:
    old, new, other = (tmp_path / name for name in (".a.json.partial-1", ".a.json.partial-2", ".a.json.swp"))
    for folder in (old, new, other):
        folder.mkdir()
        (folder / "a.json").write_text("half")
    past = time.time() - LEFTOVER_AGE_SECONDS - 60
    os.utime(old, (past, past))
    os.utime(other, (past, past))
    write_json(tmp_path / "a.json", {"a": 1})
    assert not old.exists()
    assert new.exists()
    assert other.exists()
    assert read_json(tmp_path / "a.json") == {"a": 1}


class TestTwoWritersOfOneRun:
    def test_the_second_process_raises_and_a_reader_does_not(self, tmp_path: Path) -> None:
        process = start_writing(write_run, tmp_path)
        try:
            with pytest.raises(DataError, match="another process writes to the run"):
                RunFolder(tmp_path / "run")
            RunFolder(tmp_path / "run", writes=False)
        finally:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        # The lock has ended with its process
        RunFolder(tmp_path / "run")
        RunFolder(tmp_path / "run")

    def test_a_forked_process_does_not_keep_the_lock(self, tmp_path: Path) -> None:
        run = start_writing(lambda folder, seed: self.lock_and_fork(folder), tmp_path)
        worker = int((tmp_path / "worker").read_text())
        os.kill(run, signal.SIGKILL)
        os.waitpid(run, 0)
        try:
            RunFolder(tmp_path / "run")
        finally:
            os.kill(worker, signal.SIGKILL)

    @staticmethod
    def lock_and_fork(folder: Path) -> None:
        if (folder / "worker").exists():
            return time.sleep(60)
        RunFolder(folder / "run")
        worker = os.fork()
        if not worker:
            time.sleep(60)
            os._exit(0)
        write_file(folder / "worker", str(worker))
        return None

    def test_the_same_step_can_be_saved_twice(self, tmp_path: Path) -> None:
        run = RunFolder(tmp_path)
        for seed in (3, 4):
            run.save_checkpoint(State(seed), {"step": 5, "seed": seed})
        assert run.load_checkpoint(State(0)) == {"step": 5, "seed": 4}
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-0000000005"]

    def test_an_entry_after_half_a_line_is_kept(self, tmp_path: Path) -> None:
        run = RunFolder(tmp_path)
        run.log({"step": 1})
        with (tmp_path / "log.jsonl").open("a") as file:
            file.write('{"step": 2, "lo')
        run.log({"step": 3, "text": "one\u2028line"})
        assert run.read_log() == [{"step": 1}, {"step": 3, "text": "one\u2028line"}]
