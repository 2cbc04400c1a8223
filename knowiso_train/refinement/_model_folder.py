"""Folder with the weights of a plain network, its report and a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from knowiso_train.features.modules import network_name
from knowiso_train.features.wrappers import unwrap_model
from knowiso_train.loading.model_card import loading_code, write_model_card
from knowiso_train.loading.timm import input_config, loading_snippet
from knowiso_train.utils.serialization import write_json, write_tensors

WEIGHTS_FILE, CARD_FILE = "model.safetensors", "card.json"


def save_plain_network(
    folder: str | Path,
    model: nn.Module,
    report: Mapping[str, Any],
    *,
    kind: str,
    summary: str,
    figures: Mapping[str, object],
    architecture: str | None,
    options: Mapping[str, Any] | None,
) -> None:
    """Write `model.safetensors`, a plain state dict, `card.json` with report and loading code, and a model card.

    The weight file holds the card too, as a text entry, so that weights and card of one save stay together.

    Args:
        folder: Folder; it is created where it does not exist.
        model: Network, wrapped or not.
        report: Report as nested dictionaries, lists and numbers.
        kind: How the network was made, such as "refined": part of the title and a tag.
        summary: Verb phrase after the name of the network, with a period.
        figures: Values of the table of the model card, by name.
        architecture: Name of the network in timm. None: the name that timm stored in the network.
        options: Arguments of `timm.create_model`. None: the number of classes.
    """
    module, folder = unwrap_model(model), Path(folder)
    state = module.state_dict()
    num_classes = getattr(module, "num_classes", None)
    if options is None:
        options = {} if num_classes is None else {"num_classes": num_classes}
    name = architecture or network_name(module)
    config = input_config(module)
    load = loading_snippet(name, options, state, WEIGHTS_FILE)
    card = {
        "architecture": name,
        "options": dict(options),
        "load": load,
        "input": {} if config is None else config._asdict(),
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "report": dict(report),
    }
    write_tensors(folder / WEIGHTS_FILE, state, card)
    write_json(folder / CARD_FILE, card)
    write_model_card(
        folder,
        f"{name}, {kind}",
        f"{name} {summary}",
        loading_code(load),
        tags=[kind],
        figures={"parameters": f"{card['parameters']:,}", **figures},
    )
