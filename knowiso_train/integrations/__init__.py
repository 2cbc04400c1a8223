"""Bridges to the libraries around: timm's networks and datasets, accelerate's processes. Loaded at first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knowiso_train.integrations.accuracy import top1_accuracy
    from knowiso_train.integrations.arguments import Options, at_least, key_value
    from knowiso_train.integrations.cards import network_card, results_table
    from knowiso_train.integrations.checkpoints import load_checkpoint
    from knowiso_train.integrations.comparison import compare_networks, comparison_table
    from knowiso_train.integrations.inputs import InputBridge
    from knowiso_train.integrations.processes import Processes
    from knowiso_train.integrations.pruned_storage import load_pruned, save_pruned, saved_kept
    from knowiso_train.integrations.runs import RunFolder
    from knowiso_train.integrations.timm import image_loader, input_transform, load_model
    from knowiso_train.integrations.training import labelled_images, training_loader

__all__ = [
    "InputBridge",
    "Options",
    "Processes",
    "RunFolder",
    "at_least",
    "compare_networks",
    "comparison_table",
    "image_loader",
    "input_transform",
    "key_value",
    "labelled_images",
    "load_checkpoint",
    "load_model",
    "load_pruned",
    "network_card",
    "results_table",
    "save_pruned",
    "saved_kept",
    "top1_accuracy",
    "training_loader",
]

_HOMES = {
    "InputBridge": "inputs",
    "Options": "arguments",
    "Processes": "processes",
    "RunFolder": "runs",
    "at_least": "arguments",
    "compare_networks": "comparison",
    "comparison_table": "comparison",
    "image_loader": "timm",
    "input_transform": "timm",
    "key_value": "arguments",
    "labelled_images": "training",
    "load_checkpoint": "checkpoints",
    "load_model": "timm",
    "load_pruned": "pruned_storage",
    "network_card": "cards",
    "results_table": "cards",
    "save_pruned": "pruned_storage",
    "saved_kept": "pruned_storage",
    "top1_accuracy": "accuracy",
    "training_loader": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
