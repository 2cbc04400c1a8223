"""Cards and tables of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from knowiso_train.features.wrappers import unwrap_model
from knowiso_train.loading.timm import input_config, loading_snippet
from knowiso_train.utils.text_table import format_table


def network_card(
    model: nn.Module, architecture: str, options: Mapping[str, Any], image_size: Sequence[int]
) -> dict[str, Any]:
    """Return the information that is needed to load a plain state dict with timm alone, and to preprocess its images.

    Args:
        model: Network of timm.
        architecture: Name in timm.
        options: Options of `timm.create_model`, with `num_classes`.
        image_size: (C, H, W) of its images.

    Examples:
        >>> from knowiso_train.loading.timm import load_model
        >>> model = load_model("test_resnet", pretrained=False, num_classes=4)
        >>> card = network_card(model, "test_resnet", {"num_classes": 4}, (3, 32, 32))
        >>> card["load"]
        "timm.create_model('test_resnet', num_classes=4, checkpoint_path='FILE')"
    """
    inner, config = unwrap_model(model), input_config(model)
    return {
        "architecture": architecture,
        "options": dict(options),
        "load": loading_snippet(architecture, options, inner.state_dict(), "FILE"),
        "input": {} if config is None else {**config._asdict(), "size": tuple(image_size)},
        "parameters": sum(parameter.numel() for parameter in inner.parameters()),
    }


def explained_layers(cards: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the layers whose explained share a card states, in order.

    Examples:
        >>> explained_layers([{"explained": {"layer2": 0.5}}, {}, {"explained": {"layer3": 0.4, "layer2": 0.6}}])
        ['layer2', 'layer3']
    """
    return list(dict.fromkeys(layer for card in cards for layer in card.get("explained", {})))


def results_table(cards: Sequence[Mapping[str, Any]], log: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of networks: accuracy, loss during training, and explained shares of the teacher's layers.

    Args:
        cards: Cards with `arm`, `parameters` and `top1` (percent), and optionally `best_top1`, `best_epoch`, `seconds`
            and `explained` (share by layer).
        log: Log entries with `arm` and `loss`, in order.

    Examples:
        >>> card = {"arm": "student", "parameters": 1200, "top1": 98.5, "explained": {"a": 0.5}}
        >>> print(results_table([card], [{"arm": "student", "loss": 2.0}]))
                 parameters    top-1  best (epoch)  loss: first, last  explains a  seconds
        student       1,200  98.50 %                     2.000, 2.000      50.0 %
    """
    layers = explained_layers(cards)
    rows = [
        [
            "",
            "parameters",
            "top-1",
            "best (epoch)",
            "loss: first, last",
            *(f"explains {layer}" for layer in layers),
            "seconds",
        ]
    ]
    for card in cards:
        losses = [entry["loss"] for entry in log if entry["arm"] == card["arm"] and "loss" in entry]
        rows.append(
            [
                card["arm"],
                f"{card['parameters']:,}",
                f"{card['top1']:.2f} %",
                f"{card['best_top1']:.2f} % ({card['best_epoch']})" if "best_top1" in card else "",
                f"{losses[0]:.3f}, {losses[-1]:.3f}" if losses else "",
                *(
                    f"{100 * card['explained'][layer]:.1f} %" if layer in card.get("explained", {}) else ""
                    for layer in layers
                ),
                f"{card['seconds']:.0f}" if "seconds" in card else "",
            ]
        )
    return format_table(rows)
