"""Test that small networks depend only on their settings, and that distilled ones get the gradient of their term."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.common import small_networks
from benchmarks.common.models import CifarResNet
from benchmarks.common.small_networks import Training, train_networks, trained_network

BASE = Training(num_images=128, num_steps=2, num_checkpoints=2)


def test_students_side_by_side_equal_those_trained_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    images, labels, teacher = torch.randn(128, 3, 8, 8), torch.randint(10, (128,)), CifarResNet(8).eval()
    monkeypatch.setattr(small_networks, "cifar_resnet", lambda depth: teacher)
    runs = [BASE, *(replace(BASE, method=method) for method in ("kd", "fitnet", "isomorphism"))]
    runs.append(replace(BASE, generation=1))
    states = {}
    for name in ("together", "alone"):
        monkeypatch.setattr(small_networks, "CACHE_FOLDER", tmp_path / name)
        if name == "together":
            train_networks(runs, images, labels)
        states[name] = [trained_network(run, images, labels).state_dict() for run in runs]
    for together, alone in zip(states["together"], states["alone"], strict=True):
        assert all(torch.equal(together[key], alone[key]) for key in together)
    plain, *distilled = (state["conv1.weight"] for state in states["alone"])
    # The map of `IsomorphismLoss` is not solved yet in the first steps
    assert [torch.equal(plain, weight) for weight in distilled] == [False, False, True, False]


def test_an_interrupted_training_leaves_no_half_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_networks, "CACHE_FOLDER", tmp_path)
    images, labels = torch.randn(128, 3, 8, 8), torch.randint(10, (128,))
    save = small_networks.save_file

    def interrupted(state: dict[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
        if "step2" in str(path):
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        save(state, path)

    monkeypatch.setattr(small_networks, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_networks([BASE], images, labels)
    assert [file.exists() for file in BASE.files] == [True, False]
    monkeypatch.setattr(small_networks, "save_file", save)
    trained_network(BASE, images, labels)
    assert all(file.exists() for file in BASE.files)
