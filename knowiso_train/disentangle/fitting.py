"""The fitter for given settings and features."""

from __future__ import annotations

import torch
from torch import Tensor

from knowiso_train.disentangle.closed_form_fit import ClosedFormFitter
from knowiso_train.disentangle.fitter import Fitter, Task
from knowiso_train.disentangle.paper_fit import PaperFitter
from knowiso_train.disentangle.settings import Settings
from knowiso_train.statistics import Group


def make_fitter(settings: Settings, x: Tensor, y: Tensor, expected: int, *, targets: int = 1, group: Group | None = None) -> Fitter:
    """A fitter for features like these.

    Args:
        settings: kernel decided (`Settings.on_grid`).
        x: a source feature, (N, C_A, H, W).
        y: its target, (N, targets · C_B, H, W).
        expected: images that will come, as far as is known.
        targets: number of targets stacked along the channels of `y`.
        group: the processes that share the fit.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    task = Task(settings, x.shape[1], y.shape[1] // targets, targets, expected, dtype, y.device, group or Group())
    return (PaperFitter if settings.solver == "paper" else ClosedFormFitter)(task)
