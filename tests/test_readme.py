"""The README's Python runs as it stands, on small networks under the names that it uses."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torch_pruning as tp
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import knowiso_train as ki
from knowiso_train.distillation import kd_loss

TEXT = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


# Few images, which the README does not ask for
@pytest.mark.filterwarnings("ignore::knowiso_train.KnowisoWarning")
def test_every_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained=False, **rest: create("test_resnet", **{"num_classes": 5, **rest})
    )
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(90, 3, 32, 32), torch.randint(5, (90,))), batch_size=20)
    names: dict[str, Any] = {
        "copy": copy,
        "ki": ki,
        "tp": tp,
        "torch": torch,
        "F": F,
        "kd_loss": kd_loss,
        "loader": loader,
        "model": create("test_resnet"),
        "held_out": loader,
        "few": DataLoader(TensorDataset(torch.randn(40, 3, 32, 32), torch.arange(40) % 5), batch_size=20),
        "peer": create("test_resnet", num_classes=5),
        "accelerator": Accelerator(cpu=True),
        "images": torch.randn(2, 3, 64, 64),
        "x_source": torch.randn(200, 6, 3, 3),
        "x_target": torch.randn(200, 4, 3, 3),
    }
    for block in BLOCKS:
        exec(block, names)
    assert {"report", "components", "features", "iso"} <= set(names)
    assert (tmp_path / "report.json").exists()
    assert (tmp_path / "output/iso/history.json").exists()
    assert 0.4 < names["pruned"].report.macs[1] / names["pruned"].report.macs[0] <= 0.5
    assert (tmp_path / "pruned/model.safetensors").exists()
    assert names["smaller"](names["images"]).shape == (2, 1000)
    assert 0 < float(names["loss"].detach()) < 100
