"""Scaffolding shared by the recipes and the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from knowiso_train.utils.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from knowiso_train.experiment.arguments import (
        RecipeParser,
        at_least,
        describe_run,
        loader_options,
        parse_key_value,
        run_settings,
        training_options,
    )
    from knowiso_train.experiment.arms import write_arms
    from knowiso_train.experiment.cards import network_card, results_table
    from knowiso_train.experiment.demo import demo_digits, demo_efficientnet_file, load_datasets
    from knowiso_train.experiment.evaluation import compare_networks, comparison_table, top1_accuracy
    from knowiso_train.experiment.networks import (
        architecture_name,
        build_checkpoint,
        build_network,
        check_published_classifier,
        timm_options,
    )
    from knowiso_train.experiment.processes import Processes, launch_accelerator
    from knowiso_train.experiment.run_folder import RunFolder
    from knowiso_train.experiment.training import ResumableTraining, sgd_with_schedule

__all__ = [
    "Processes",
    "RecipeParser",
    "ResumableTraining",
    "RunFolder",
    "architecture_name",
    "at_least",
    "build_checkpoint",
    "build_network",
    "check_published_classifier",
    "compare_networks",
    "comparison_table",
    "demo_digits",
    "demo_efficientnet_file",
    "describe_run",
    "launch_accelerator",
    "load_datasets",
    "loader_options",
    "network_card",
    "parse_key_value",
    "results_table",
    "run_settings",
    "sgd_with_schedule",
    "timm_options",
    "top1_accuracy",
    "training_options",
    "write_arms",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    globals(),
    {
        "Processes": "processes",
        "RecipeParser": "arguments",
        "ResumableTraining": "training",
        "RunFolder": "run_folder",
        "at_least": "arguments",
        "architecture_name": "networks",
        "build_checkpoint": "networks",
        "build_network": "networks",
        "check_published_classifier": "networks",
        "compare_networks": "evaluation",
        "comparison_table": "evaluation",
        "demo_digits": "demo",
        "demo_efficientnet_file": "demo",
        "describe_run": "arguments",
        "launch_accelerator": "processes",
        "load_datasets": "demo",
        "loader_options": "arguments",
        "network_card": "cards",
        "parse_key_value": "arguments",
        "results_table": "cards",
        "run_settings": "arguments",
        "sgd_with_schedule": "training",
        "training_options": "arguments",
        "timm_options": "networks",
        "top1_accuracy": "evaluation",
        "write_arms": "arms",
    },
)
