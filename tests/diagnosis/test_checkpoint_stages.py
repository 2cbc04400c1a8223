"""Checkpoints of trainings as stages: layouts, order, prefixes and refusals."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from knowiso_train.diagnosis.comparison import checkpoint_stages
from knowiso_train.errors import DataError, FormatError, InputTypeError, OptionError


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def weights(value: float, prefix: str = "") -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": torch.full_like(tensor, value) for name, tensor in network().state_dict().items()}


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)


def timm_run(folder: Path, step: int) -> None:
    args = argparse.Namespace(model="resnet18", lr=0.1)
    content = {"epoch": step, "arch": "resnet18", "state_dict": weights(step), "optimizer": {"state": {}}, "args": args}
    write(folder / f"checkpoint-{step}.pth.tar", content)
    write(folder / "last.pth.tar", content)
    write(folder / "model_best.pth.tar", content)


def trainer_run(folder: Path, step: int) -> None:
    write(folder / f"checkpoint-{step}" / "model.safetensors", weights(step))
    write(folder / f"checkpoint-{step}" / "optimizer.pt", {"state": {}})
    (folder / "runs").mkdir(exist_ok=True)


def lightning_run(folder: Path, step: int) -> None:
    state = weights(step, "model.") | {"criterion.weight": torch.ones(3)}
    content = {"epoch": 1, "global_step": step, "state_dict": state, "hyper_parameters": {"lr": 0.1}}
    write(folder / "checkpoints" / f"epoch=7-step={step}-loss=0.25.ckpt", content)
    write(folder / "checkpoints" / "last.ckpt", content)


def accelerate_run(folder: Path, step: int) -> None:
    write(folder / "checkpoints" / f"checkpoint_{step}" / "pytorch_model.bin", weights(step, "_orig_mod."))
    write(folder / "checkpoints" / f"checkpoint_{step}" / "random_states_0.pkl", {})


def sharded_run(folder: Path, step: int) -> None:
    state = list(weights(step).items())
    shards = {f"model-{i}.safetensors": dict(state[i::2]) for i in range(2)}
    for name, part in shards.items():
        write(folder / f"step_{step}" / name, part)
    index = {"weight_map": {key: name for name, part in shards.items() for key in part}}
    (folder / f"step_{step}" / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("layout", [timm_run, trainer_run, lightning_run, accelerate_run, sharded_run])
def test_checkpoints_are_loaded_in_the_order_of_their_steps(layout: Any, tmp_path: Path) -> None:
    for step in (100, 9, 20):
        layout(tmp_path, step)
    stages = checkpoint_stages(tmp_path, network)
    assert [stage.step for stage in stages] == [9, 20, 100]
    assert len({stage.digest() for stage in stages}) == 3
    for stage in stages:
        state = stage().state_dict()
        assert state.keys() == network().state_dict().keys()
        assert {float(value) for tensor in state.values() for value in tensor.flatten()} == {float(stage.step)}


def test_a_glob_selects_files(tmp_path: Path) -> None:
    for epoch in (0, 1, 2):
        write(tmp_path / f"resnet20-epoch{epoch}.pth", weights(epoch))
        write(tmp_path / f"resnet20-epoch{epoch}-ema.pth", weights(epoch))
    stages = checkpoint_stages(tmp_path / "*[0-9].pth", network)
    assert [(stage.name, stage.step) for stage in stages] == [(f"resnet20-epoch{i}", i) for i in range(3)]
    with pytest.raises(DataError, match=r"epoch0-ema.pth and resnet20-epoch0.pth have the same number"):
        checkpoint_stages(tmp_path, network)


def test_what_is_no_series_of_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none; pass a folder or a glob"):
        checkpoint_stages(tmp_path, network)
    write(tmp_path / "resnet20.pth", weights(0))
    with pytest.raises(DataError, match=r"resnet20\.pth"):
        checkpoint_stages(tmp_path, network)
    with pytest.raises(OptionError, match=r"each checkpoint, got 'resnet20.pth'"):
        checkpoint_stages(tmp_path / "*.pth", network)
    write(tmp_path / "epoch-1.pth", weights(0))
    write(tmp_path / "step-1.pth", weights(0))
    with pytest.raises(OptionError, match="steps alone or epochs alone"):
        checkpoint_stages(tmp_path, network)


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code of a checkpoint ran",)


def test_files_that_do_not_fit_or_would_run_code_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "epoch-1.pth", weights(0) | {"other": torch.ones(1)})
    write(tmp_path / "epoch-2.pth", weights(0, "teacher.") | weights(1, "student."))
    write(tmp_path / "epoch-3.pth", {"state_dict": weights(0), "args": _Code()})
    stages = checkpoint_stages(tmp_path, network)
    for stage, message in zip(stages, ["'other'", "missing", "runs? their code"], strict=True):
        with pytest.raises(FormatError, match=message):
            stage()
    assert "ran" not in capsys.readouterr().out
    with pytest.raises(InputTypeError, match="make_network must return a network, got int"):
        checkpoint_stages(tmp_path, lambda: 3)[0]()  # type: ignore[arg-type, return-value]
