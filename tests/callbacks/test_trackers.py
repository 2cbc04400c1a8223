"""Figures of the loss and of the monitor in an event file of TensorBoard, written through accelerate."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from knowiso_train import IsomorphismCallback, IsomorphismLoss

accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


@pytest.mark.filterwarnings("ignore::knowiso_train.KnowisoWarning")
def test_tensorboard_holds_the_logged_figures(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()) for _ in range(2))
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("run")
    # A layer in two pairs: names of figures contain both layers
    iso = IsomorphismLoss(student, teacher, [("1", "1"), ("1", "0")])
    monitor = IsomorphismCallback.of(iso, [torch.randn(100, 3, 6, 6)], every=2, log=accelerator.log)
    logged = []
    with iso:
        for step in range(1, 5):
            student(torch.randn(8, 3, 6, 6))
            iso()
            logged.append(iso.log())
            accelerator.log(logged[-1], step=step)
            monitor.step()
    accelerator.end_training()

    events = accumulators.EventAccumulator(str(tmp_path / "run")).Reload()
    tags = events.Tags()["scalars"]
    assert "iso/train/1-to-0/share" in tags
    # MLflow refuses other characters
    assert all(re.fullmatch(r"[A-Za-z0-9_./-]+", tag) for tag in tags)
    assert set(tags) == {*logged[0], *monitor.history[0].metrics}
    assert len(tags) == len(logged[0]) + len(monitor.history[0].metrics)

    def values(name: str) -> dict[int, float]:
        return {event.step: event.value for event in events.Scalars(name)}

    for name in logged[0]:
        assert values(name) == pytest.approx(
            {step: figures[name] for step, figures in enumerate(logged, 1)}, nan_ok=True
        ), name
    for name in monitor.history[0].metrics:
        assert values(name) == pytest.approx({m.step: m.metrics[name] for m in monitor.history}), name
