"""Check of the available memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import knowiso_train as ki
from knowiso_train import cli
from knowiso_train.disentangle._closed_form_fit import ClosedFormFitter
from knowiso_train.disentangle.config import DisentangleConfig, MemoryEstimate
from knowiso_train.errors import CapacityError
from knowiso_train.experiment.arguments import RecipeParser
from knowiso_train.features._memory import ActivationMemory
from knowiso_train.loading import image_loader
from knowiso_train.measurement._pair import check_capacity
from knowiso_train.utils.memory import free_bytes

MIB = 2**20


def test_memory_that_torch_keeps_for_later_tensors_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"mem_get_info": (3, 9), "memory_reserved": 5, "memory_allocated": 1}
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes(torch.device("cuda")) == 3 + 5 - 1


def test_eighty_percent_of_the_free_memory_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knowiso_train.utils.memory.free_bytes", lambda device: 100 * MIB)
    cpu = torch.device("cpu")
    # All pairs stream at the same time; they are solved one after the other
    fitting = {"a": MemoryEstimate(8, 20 * MIB, 39 * MIB), "b": MemoryEstimate(8, 20 * MIB, 10 * MIB)}
    check_capacity(fitting, cpu)
    too_large = fitting | {"c": MemoryEstimate(72, 2 * MIB, 0)}
    with pytest.raises(CapacityError, match=r"3 layer pair.*81 MiB on cpu, but 80 MiB can be used; the largest is a"):
        check_capacity(too_large, cpu)


def test_estimate_of_the_closed_form_is_the_size_of_its_moments() -> None:
    config = DisentangleConfig(order=0, kernel_size=3)
    estimate = ClosedFormFitter.estimate_memory(config, 16, 24, 2, expected_rows=1000)
    features = 16 * 9
    assert estimate.num_features == features
    assert estimate.streaming == 2 * 8 * features * (features + 2 * 24)
    projected = DisentangleConfig(order=0, kernel_size=3, source_channels=4)
    assert ClosedFormFitter.estimate_memory(projected, 16, 24, 2, 1000).num_features == 4 * 9


def test_sample_of_higher_orders_is_bounded_by_max_rows() -> None:
    estimates = [
        ClosedFormFitter.estimate_memory(DisentangleConfig(order=1, kernel_size=1, max_rows=500), 16, 24, 1, rows)
        for rows in (100, 500, 10_000, None)
    ]
    streaming = [estimate.streaming for estimate in estimates]
    assert streaming[0] < streaming[1] == streaming[2] == streaming[3]


class Growing(nn.Module):
    """Layer whose output is `factor` times as large as its input."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor, self.largest = factor, 0

    def forward(self, x: Tensor) -> Tensor:
        y = x.repeat(1, self.factor, 1, 1)
        self.largest = max(self.largest, y.nbytes)
        return y


def growing(factor: int) -> nn.Sequential:
    """Return a network of large activations and a small output."""
    return nn.Sequential(Growing(factor), nn.AdaptiveAvgPool2d(1), nn.Conv2d(3 * factor, 2, 1))


def images(count: int = 80, batch: int = 40) -> DataLoader[Any]:
    """Return a loader of images of 3 kB each."""
    return DataLoader(TensorDataset(torch.randn(count, 3, 16, 16)), batch_size=batch)


OPTIONS: dict[str, Any] = {"order": 0, "noise_floor": False, "bootstrap": 0, "progress": False}


def test_activations_of_a_batch_are_estimated_from_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knowiso_train.utils.memory.free_bytes", lambda device: 20 * MIB)
    small, large = growing(16), growing(256)
    ki.measure(small, growing(16), images(), "2", **OPTIONS)
    for networks, role in (((small, large), "target"), ((large, small), "source")):
        large[0].largest = 0
        with pytest.raises(CapacityError, match=f"{role}: the activations of a batch of 40 images exceed the 16 MiB"):
            ki.measure(*networks, images(), "2", **OPTIONS)
        # 768 kB of one image, 30 MiB of a batch
        assert large[0].largest < MIB
    ki.measure(small, large, images(batch=10), "2", **OPTIONS)


def test_features_of_the_source_are_counted_beside_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knowiso_train.utils.memory.free_bytes", lambda device: 20 * MIB)
    a, b = growing(40), growing(110)
    ki.measure(a, b, images(), "2", **OPTIONS)
    with pytest.raises(CapacityError, match="target: the activations"):
        ki.measure(a, b, images(), {"0": "2"}, **OPTIONS)


def test_one_image_run_changes_no_figure_and_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(x: Any) -> Any:
        return x + 0.1 * torch.randn_like(x)

    def report() -> ki.Report:
        torch.manual_seed(1)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        return ki.measure(network, network, images(), "1", target_transform=noisy, **OPTIONS)

    checked = report()
    module = sys.modules["knowiso_train.measurement.measure"]
    monkeypatch.setattr(module, "check_activations", lambda extractors, batch: None)
    assert report().pairs[0].unexplained == checked.pairs[0].unexplained


def test_activation_memory_counts_storages_once_and_releases_them() -> None:
    with ActivationMemory() as memory:
        kept = torch.zeros(10, dtype=torch.uint8)
        view = kept[2:].view(2, 4)
        view += 1
        _ = torch.zeros(50, dtype=torch.uint8) + 1
    assert (memory.live, memory.peak) == (60, 110)


def huge_images(tmp_path: Path) -> None:
    """Create a loader of images of 12 TB each."""
    from PIL import Image

    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    image_loader(str(tmp_path), image_size=10**6)


def huge_option(tmp_path: Path) -> None:
    """Parse such a size on the command line of a recipe."""
    parser = RecipeParser("A recipe.")
    parser.add_data(["train"], "use", digits="28 pixels")
    parser.parse_args(["--image-size", "1000000"])


def huge_summary(tmp_path: Path) -> None:
    """List the layers of a network on such images."""
    raise SystemExit(cli.main(["layers", "resnet18", "--image-size", "1000000"]))


@pytest.mark.parametrize("call", [huge_images, huge_option, huge_summary])
def test_images_beyond_the_memory_are_refused_before_they_are_made(
    call: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((CapacityError, SystemExit)) as caught:
        call(tmp_path)
    assert "1000000 × 1000000 pixels need" in f"{caught.value} {capsys.readouterr().err}"
