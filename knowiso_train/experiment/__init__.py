"""Scaffolding shared by the recipes and the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from knowiso_train.utils.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from knowiso_train.experiment.arguments import Options, at_least, parse_key_value
    from knowiso_train.experiment.cards import network_card, results_table
    from knowiso_train.experiment.evaluation import compare_networks, comparison_table, top1_accuracy
    from knowiso_train.experiment.processes import Processes
    from knowiso_train.experiment.run_folder import RunFolder

__all__ = [
    "Options",
    "Processes",
    "RunFolder",
    "at_least",
    "compare_networks",
    "comparison_table",
    "network_card",
    "parse_key_value",
    "results_table",
    "top1_accuracy",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    globals(),
    {
        "Options": "arguments",
        "Processes": "processes",
        "RunFolder": "run_folder",
        "at_least": "arguments",
        "compare_networks": "evaluation",
        "comparison_table": "evaluation",
        "network_card": "cards",
        "parse_key_value": "arguments",
        "results_table": "cards",
        "top1_accuracy": "evaluation",
    },
)
