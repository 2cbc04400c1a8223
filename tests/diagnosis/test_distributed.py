"""Two processes (gloo) diagnose what one diagnoses, also under DDP; networks that FSDP shards are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from knowiso_train import diagnose
from knowiso_train.diagnosis import Diagnosis
from knowiso_train.errors import OptionError
from tests.diagnosis.test_diagnose import FeatureNetwork, erase_channels, figures, images, noise
from tests.helpers.processes import WORLD, run_in_processes


def diagnosis(wrap: Callable[[nn.Module], nn.Module] = lambda network: network) -> Diagnosis:
    data = TensorDataset(images(203), torch.arange(203) % 3)
    weak = wrap(FeatureNetwork(erase_channels(2, 5)))
    strong = [FeatureNetwork(), FeatureNetwork(noise(2), 10)]
    loader = DataLoader(data, batch_size=16)
    return diagnose(weak, strong, loader, "feature", progress=False, bootstrap=20, num_directions=2)


def save_diagnosis(rank: int, folder: str) -> None:
    diagnosis(DistributedDataParallel).to_json(Path(folder) / f"{rank}.json")
    mesh = init_device_mesh("cpu", (WORLD,))
    with pytest.raises(OptionError, match=r"FSDP shards FeatureNetwork \(weak\)"):
        diagnosis(lambda network: fully_shard(network, mesh=mesh))


# Erased channels have no variance, of which the measurement warns
@pytest.mark.filterwarnings("ignore::knowiso_train.KnowisoWarning")
def test_two_processes_diagnose_what_one_diagnoses(tmp_path: Path) -> None:
    run_in_processes(save_diagnosis, str(tmp_path))
    both = [Diagnosis.from_json(tmp_path / f"{rank}.json") for rank in range(WORLD)]
    assert both[0].layers == both[1].layers
    assert both[0].thumbnails == both[1].thumbnails
    single = diagnosis()
    assert both[0].images == single.images
    for one, two in zip(single, both[0], strict=True):
        np.testing.assert_allclose(figures(two), figures(one), atol=1e-4)
        for a, b in zip(one.directions, two.directions, strict=True):
            np.testing.assert_allclose(b.confirmed, a.confirmed, atol=1e-4)
