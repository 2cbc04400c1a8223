"""Which layer of the source is paired with which layer of the target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from knowiso_train.errors import InputTypeError, LayerNameError
from knowiso_train.features.names import bare, resolve


@dataclass(frozen=True)
class LayerPair:
    """Bare names of two layers."""

    source: str
    target: str


def pair_layers(source: nn.Module, target: nn.Module, layers: str | Sequence[str] | Sequence[tuple[str, str]] | Mapping[str, str]) -> list[LayerPair]:
    """Pairs of layers from names or globs.

    Args:
        source: the network that explains.
        target: the network that is explained.
        layers: a name or glob, or several, for the same names in both networks; or (source, target) tuples, or a dict {source: target}.
            Both sides of a tuple may be globs that match the same number of layers: these are paired in order.

    Returns:
        Pairs in the order given; a pair that is given twice appears once.

    Raises:
        LayerNameError: a pattern that matches nothing, names that only one network has, or two globs that match different numbers of layers.
        InputTypeError: layers in another form.

    Example:
        >>> a, b = (nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2))
        >>> pair_layers(a, b, {"*": "*"})
        [LayerPair(source='0', target='0'), LayerPair(source='1', target='1')]
    """
    if isinstance(layers, Mapping):
        return _zipped(source, target, layers.items())
    if isinstance(layers, str):
        return _same_names(source, target, [layers])
    if not isinstance(layers, Iterable):
        raise InputTypeError(f"layers must be names or globs, (source, target) tuples, or a dict {{source: target}}; got {type(layers).__name__}")
    given = list(layers)
    names = [item for item in given if isinstance(item, str)]
    tuples = [item for item in given if isinstance(item, (tuple, list)) and len(item) == 2 and all(isinstance(side, str) for side in item)]
    if given and len(tuples) == len(given):
        return _zipped(source, target, [(a, b) for a, b in tuples])
    if len(names) == len(given):
        return _same_names(source, target, names)
    raise InputTypeError(f"layers must be all names or globs, or all (source, target) tuples of names; got {given!r}")


def _same_names(source: nn.Module, target: nn.Module, patterns: Sequence[str]) -> list[LayerPair]:
    of_source, of_target = resolve(source, patterns), resolve(target, patterns)
    if set(of_source) != set(of_target):
        only_source, only_target = (sorted(set(a) - set(b)) for a, b in ((of_source, of_target), (of_target, of_source)))
        raise LayerNameError(
            f"{list(patterns)} stands for different layers in the two networks: only in the source ({type(bare(source)).__name__}) {only_source}, "
            f"only in the target ({type(bare(target)).__name__}) {only_target}. Give (source, target) tuples or a dict {{source: target}}."
        )
    return [LayerPair(name, name) for name in of_source]


def _zipped(source: nn.Module, target: nn.Module, patterns: Iterable[tuple[str, str]]) -> list[LayerPair]:
    pairs: dict[LayerPair, None] = {}
    for a, b in patterns:
        of_source, of_target = resolve(source, a), resolve(target, b)
        if len(of_source) != len(of_target):
            raise LayerNameError(
                f"{a!r} → {b!r} cannot be paired in order: {len(of_source)} layer(s) of the source {of_source}, "
                f"{len(of_target)} of the target {of_target}. Both must match the same number."
            )
        pairs.update(dict.fromkeys(map(LayerPair, of_source, of_target)))
    if not pairs:
        raise LayerNameError("expected at least one pair of layers, got none")
    return list(pairs)
