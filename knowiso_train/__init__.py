"""knowiso_train: measure and control which knowledge survives when a vision network is distilled, pruned or refined.

import knowiso_train as ki
report = ki.measure(source, target, loader, ["layer2", "layer3"])
print(report)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from knowiso_train.utils.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from knowiso_train.callbacks import IsomorphismCallback
    from knowiso_train.diagnosis import diagnose, stability
    from knowiso_train.diagnosis.comparison import compare_stages
    from knowiso_train.disentangle import Disentangler
    from knowiso_train.distillation import IsomorphismLoss
    from knowiso_train.errors import KnowisoError, KnowisoWarning
    from knowiso_train.features import FeatureTaps
    from knowiso_train.measurement import Report, measure
    from knowiso_train.pruning import finetune, preserve_optimizer_state, refit
    from knowiso_train.pruning.api import prune
    from knowiso_train.pruning.importance import IsomorphismImportance
    from knowiso_train.pruning.serialization import load_pruned, save_pruned
    from knowiso_train.refinement import refine

__version__ = "0.2.0"
__all__ = [
    "Disentangler",
    "FeatureTaps",
    "IsomorphismCallback",
    "IsomorphismImportance",
    "IsomorphismLoss",
    "KnowisoError",
    "KnowisoWarning",
    "Report",
    "compare_stages",
    "diagnose",
    "finetune",
    "load_pruned",
    "measure",
    "preserve_optimizer_state",
    "prune",
    "refine",
    "refit",
    "save_pruned",
    "stability",
]

# Imported at first use, so that `knowiso --help` does not wait for torch.
__getattr__, __dir__ = lazy_exports(
    __name__,
    globals(),
    {
        "Disentangler": "disentangle",
        "FeatureTaps": "features",
        "IsomorphismCallback": "callbacks",
        "IsomorphismImportance": "pruning.importance",
        "IsomorphismLoss": "distillation",
        "KnowisoError": "errors",
        "KnowisoWarning": "errors",
        "Report": "measurement",
        "compare_stages": "diagnosis.comparison",
        "diagnose": "diagnosis",
        "finetune": "pruning",
        "load_pruned": "pruning.serialization",
        "measure": "measurement",
        "preserve_optimizer_state": "pruning",
        "prune": "pruning.api",
        "refine": "refinement",
        "refit": "pruning",
        "save_pruned": "pruning.serialization",
        "stability": "diagnosis",
    },
)
