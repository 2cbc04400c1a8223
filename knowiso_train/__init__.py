"""knowiso_train: measure and control which knowledge survives when a vision network is distilled, pruned or refined.

import knowiso_train as ki
report = ki.measure(source, target, loader, ["layer2", "layer3"])
print(report)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knowiso_train.callbacks import IsomorphismCallback
    from knowiso_train.disentangle import Disentangler
    from knowiso_train.errors import KnowisoError, KnowisoWarning
    from knowiso_train.features import FeatureTaps
    from knowiso_train.integrations.prune import prune
    from knowiso_train.integrations.pruned_storage import load_pruned, save_pruned
    from knowiso_train.integrations.torch_pruning import IsomorphismImportance
    from knowiso_train.losses import IsomorphismLoss
    from knowiso_train.measurement import Report, measure
    from knowiso_train.pruning import carrying, refit, tune
    from knowiso_train.refinement import refine

__version__ = "0.1.0"
__all__ = [
    "Disentangler",
    "FeatureTaps",
    "IsomorphismCallback",
    "IsomorphismImportance",
    "IsomorphismLoss",
    "KnowisoError",
    "KnowisoWarning",
    "Report",
    "carrying",
    "load_pruned",
    "measure",
    "prune",
    "refine",
    "refit",
    "save_pruned",
    "tune",
]

_HOMES = {  # resolved at first use, so that `knowiso --help` does not wait for torch
    "Disentangler": "disentangle",
    "FeatureTaps": "features",
    "IsomorphismCallback": "callbacks",
    "IsomorphismImportance": "integrations.torch_pruning",
    "IsomorphismLoss": "losses",
    "KnowisoError": "errors",
    "KnowisoWarning": "errors",
    "Report": "measurement",
    "carrying": "pruning",
    "load_pruned": "integrations.pruned_storage",
    "measure": "measurement",
    "prune": "integrations.prune",
    "refine": "refinement",
    "refit": "pruning",
    "save_pruned": "integrations.pruned_storage",
    "tune": "pruning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'knowiso_train' has no attribute {name!r}")
    value = getattr(import_module(f"knowiso_train.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
