"""Options by layer: values for all layers, or by name or glob."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from knowiso_train.errors import LayerNameError
from knowiso_train.features.hooks import Side
from knowiso_train.features.modules import LayerPair, resolve_layers

OptionT = TypeVar("OptionT")


def layers_of_networks(
    source: nn.Module, target: nn.Module, pairs: Sequence[LayerPair]
) -> list[tuple[nn.Module, list[str]]]:
    """Return source and target, each with the names of its layers in some pairs.

    Examples:
        >>> a, b = nn.ReLU(), nn.ReLU()
        >>> [names for _, names in layers_of_networks(a, b, [LayerPair("0", "1"), LayerPair("0", "2")])]
        [['0', '0'], ['1', '2']]
    """
    return [(source, [pair.source for pair in pairs]), (target, [pair.target for pair in pairs])]


def _matching_layers(pattern: str, model: nn.Module, layers: Sequence[str]) -> list[str]:
    """Return those of a network's layers that a name or glob stands for; none for one of another network."""
    try:
        return [name for name in resolve_layers(model, pattern) if name in layers]
    except LayerNameError:
        return []


def options_of_layers(
    value: OptionT | Mapping[str, OptionT], model: nn.Module, layers: Sequence[str]
) -> dict[str, OptionT]:
    """Return an option's value for those layers of one network that it is given for.

    Args:
        value: Value for all layers, or by name or glob. Later entries replace earlier ones; others are left out.
        model: Network.
        layers: Names of its layers.

    Examples:
        >>> network = nn.Sequential(nn.ReLU(), nn.ReLU())
        >>> options_of_layers({"*": "nc", "1": "nlc"}, network, ["0", "1"])
        {'0': 'nc', '1': 'nlc'}
    """
    if not isinstance(value, Mapping):
        return dict.fromkeys(layers, value)
    return {name: setting for pattern, setting in value.items() for name in _matching_layers(pattern, model, layers)}


def matching_entries(value: Any, networks: Sequence[tuple[nn.Module, Sequence[str]]]) -> Any:
    """Return an option by layer without the entries for layers of other networks.

    Args:
        value: Value for all layers, or by name or glob.
        networks: Networks with the names of their layers.

    Examples:
        >>> matching_entries({"0": "nc", "1": "nlc"}, [(nn.Sequential(nn.ReLU()), ["0"])])
        {'0': 'nc'}
    """
    if not isinstance(value, Mapping):
        return value
    return {
        pattern: setting
        for pattern, setting in value.items()
        if any(_matching_layers(pattern, model, layers) for model, layers in networks)
    }


def check_named_layers(option: str, value: Any, networks: Sequence[tuple[nn.Module, Sequence[str]]]) -> None:
    """Check that each entry of an option by layer is a layer, or a glob for layers, of one of the networks.

    Args:
        option: Name of the option.
        value: Its value; only mappings are checked.
        networks: Networks with the names of their layers.

    Raises:
        LayerNameError: A name or glob of none of these layers.

    Examples:
        >>> check_named_layers("layout", {"0": "nchw"}, [(nn.Sequential(nn.ReLU()), ["0"])])
    """
    if not isinstance(value, Mapping):
        return
    found = matching_entries(value, networks)
    for pattern in value:
        if pattern not in found:
            layers = [list(names) for _, names in networks]
            raise LayerNameError(f"{option}= names {pattern!r}, which is none of the layers; these are {layers}")


def sides_of_networks(
    at: Side | Mapping[str, Side], networks: Sequence[tuple[nn.Module, Sequence[str]]]
) -> list[dict[str, Side]]:
    """Return the side of each network's layers, where a mapping may name layers of any of the networks.

    Args:
        at: Side of all layers, or a mapping from name or glob to side. Layers missing in it: "output".
        networks: Networks with the names of their layers.

    Raises:
        LayerNameError: A name or glob of none of these layers.

    Examples:
        >>> a, b = nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU(), nn.ReLU())
        >>> sides_of_networks({"1": "input"}, [(a, ["0"]), (b, ["1"])])
        [{'0': 'output'}, {'1': 'input'}]
    """
    check_named_layers("at", at, networks)
    default: Side = "output"
    return [dict.fromkeys(layers, default) | options_of_layers(at, model, layers) for model, layers in networks]
