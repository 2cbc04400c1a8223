"""Run the recipes where accelerate selects another device than the CPU: the fake device, and a GPU if available."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate.state import PartialState

from tests.helpers import fake_device, image_folder
from tests.test_device_parity import device  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

import distill
import prune
import refine

# So few images deserve them
pytestmark = pytest.mark.filterwarnings("ignore::knowiso_train.errors.KnowisoWarning")
SIDE, BATCH = 24, 16
NARROW, WIDE = "test_resnet channels=(8,8,16,16)", "test_resnet channels=(16,16,24,24)"


@pytest.mark.skipif(fake_device.ENABLED, reason="already runs on the second device")
def test_this_file_passes_on_a_second_device() -> None:
    fake_device.run_on_fake_device(__file__)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """And weights of two networks."""
    folder = image_folder.write(tmp_path_factory.mktemp("pictures"), {"train": 72, "validation": 33, "test": 33}, SIDE)
    torch.manual_seed(0)
    for name in ("own", "peer"):
        torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), folder / f"{name}.pth")
    return folder


@pytest.fixture
def elsewhere(device: str, monkeypatch: pytest.MonkeyPatch) -> str:  # noqa: F811
    """accelerate's choice of a device."""
    made = PartialState.__init__

    def init(self: PartialState, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.device = torch.device(device)

    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(PartialState, "__init__", init)
    return device


def data(pictures: Path, output: Path) -> list[str]:
    return f"--output {output} --dataset {pictures} --image-size {SIDE} --batch-size {BATCH} --log-every 1".split()


def assert_finite_losses(output: Path, terms: set[str]) -> None:
    """Assert that the log has entries with these terms of the loss, and that all of them are finite."""
    entries = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "loss" in entry]
    assert steps
    assert terms <= {name for entry in steps for name in entry}
    for entry in steps:
        losses = [entry[name] for name in terms | {"loss"} if name in entry]
        assert np.isfinite(losses).all(), entry


def test_distill(elsewhere: str, pictures: Path, tmp_path: Path) -> None:
    networks = (
        f"--teacher {WIDE} --teacher-epochs 1 --student {NARROW} --layers layer1 layer2=layer2 --epochs 1".split()
    )
    assert distill.main([*data(pictures, tmp_path), *networks]) == 0
    assert_finite_losses(tmp_path, {"cross_entropy", "kd", "isomorphism"})
    assert json.loads((tmp_path / "summary.json").read_text())


def test_prune(elsewhere: str, pictures: Path, tmp_path: Path) -> None:
    steps = (
        f"--model {NARROW} --model-epochs 1 --images 64 --macs 0.6 --block-steps 2 --tune-steps 3 --epochs 1".split()
    )
    assert prune.main([*data(pictures, tmp_path), *steps]) == 0
    assert_finite_losses(tmp_path, {"cross_entropy", "kd", "isomorphism"})


def test_refine(elsewhere: str, pictures: Path, tmp_path: Path) -> None:
    nets = f"--model test_resnet={pictures / 'own.pth'} --peers test_resnet={pictures / 'peer.pth'}"
    assert (
        refine.main([*data(pictures, tmp_path), *nets.split(), "--labels", "4", "--lr", "0.001", "--steps", "4"]) == 0
    )
    assert_finite_losses(tmp_path, {"cross_entropy", "consensus", "soft_targets"})
