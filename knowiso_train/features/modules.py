"""Layers by name: resolving and pairing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import nn

from knowiso_train.errors import InputTypeError, LayerNameError
from knowiso_train.features.wrappers import plain_class, unwrap_model, wrapped_attribute
from knowiso_train.utils.validation import checked_value


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return every submodule by its name without wrapper segments, in the network's order.

    The network itself (`''`) is left out. Wrapped submodules, such as a compiled block, are unwrapped. A module
    that is registered twice appears under both names.

    Examples:
        >>> list(named_layers(nn.Sequential(nn.Linear(2, 2), torch.compile(nn.Sequential(nn.ReLU())))))
        ['0', '1', '1.0']
    """
    return {name: module for name, _, module in _walk(model)}


def resolve_layers(model: nn.Module, patterns: str | Sequence[str]) -> list[str]:
    """Return the names of the layers that match names or globs.

    `*` and `?` match within one dotted segment, `**` across segments (`**.conv1` also matches `conv1`), `[...]` one
    character of a set. For wrapped models the patterns may include the wrapper's prefix (`module.layer1`).

    Args:
        model: Network, wrapped or not.
        patterns: A name, a glob, or a sequence of them.

    Returns:
        Names without wrapper prefixes and duplicates: the matches of each pattern in the network's order.

    Raises:
        LayerNameError: A pattern without a match; the message lists the nearest names.
        InputTypeError: A pattern that is not a string.

    Examples:
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.ReLU())
        >>> resolve_layers(model, ["1", "0.*"])
        ['1', '0.0', '0.1']
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise LayerNameError("expected at least one layer name or pattern, got an empty list")
    layers = [(name, written) for name, written, _ in _walk(model)]
    found: dict[str, None] = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise InputTypeError(
                f"expected layer names and patterns as strings, got {pattern!r} of type {type(pattern).__name__}"
            )
        matches = _matching(pattern, layers)
        if not matches:
            raise LayerNameError(_no_match(pattern, [name for name, _ in layers], unwrap_model(model)))
        found.update(dict.fromkeys(matches))
    return list(found)


def _walk(model: nn.Module, prefix: str = "", written: str = "") -> Iterator[tuple[str, str, nn.Module]]:
    """Yield (name, name with wrapper segments, unwrapped module) of every submodule, parents first."""
    while attribute := wrapped_attribute(model):
        model, written = getattr(model, attribute), f"{written}{attribute}."
    # named_children() would omit the second name of a shared module.
    for name, child in model._modules.items():
        if child is not None:
            yield prefix + name, written + name, unwrap_model(child)
            yield from _walk(child, f"{prefix}{name}.", f"{written}{name}.")


def _matching(pattern: str, layers: Sequence[tuple[str, str]]) -> list[str]:
    # Unwrapped names first: a network may have a submodule that is called `module`.
    for spelling in (0, 1):
        exact = [layer[0] for layer in layers if layer[spelling] == pattern]
        if exact:
            return exact
        glob = _glob(pattern)
        if matches := [layer[0] for layer in layers if glob.fullmatch(layer[spelling])]:
            return matches
    return []


def _glob(pattern: str) -> re.Pattern[str]:
    out, rest = "", pattern
    while rest:
        if rest.startswith("**."):
            piece, size = r"(?:.*\.)?", 3
        elif rest.startswith("**"):
            piece, size = ".*", 2
        elif rest[0] == "*":
            piece, size = r"[^.]*", 1
        elif rest[0] == "?":
            piece, size = r"[^.]", 1
        elif choice := re.match(r"\[(!?)(\]?[^\]]*)\]", rest):
            members = choice[2].replace("\\", r"\\").replace("[", r"\[").replace("]", r"\]").replace("^", r"\^")
            piece, size = f"[{'^.' if choice[1] else ''}{members}]", choice.end()
        else:
            piece, size = re.escape(rest[0]), 1
        out, rest = out + piece, rest[size:]
    try:
        return re.compile(out)
    except re.error as error:
        raise LayerNameError(f"{pattern!r} is not a valid layer pattern: {error}") from error


def _no_match(pattern: str, names: Sequence[str], model: nn.Module) -> str:
    near = nearest(pattern, names)
    hint = (
        f"nearest: {', '.join(map(repr, near))}"
        if near
        else f"its layers begin with {', '.join(map(repr, names[:8])) or '(none)'}"
    )
    return (
        f"no layer of {type(model).__name__} matches {pattern!r}; {hint}. "
        "`*` matches within one dotted segment, `**` across segments."
    )


def nearest(name: str, names: Iterable[str], limit: int = 6) -> list[str]:
    """Return similar names, then names with the same last segment."""
    names = list(names)
    last = name.rsplit(".", 1)[-1]
    alike = get_close_matches(name, names, n=limit, cutoff=0.6)
    return list(dict.fromkeys([*alike, *(other for other in names if other.rsplit(".", 1)[-1] == last)]))[:limit]


@dataclass(frozen=True)
class LayerPair:
    """Names of a source layer and a target layer."""

    source: str
    target: str

    @property
    def metric_name(self) -> str:
        """Name of the pair in the figures for trackers, of letters, digits and `_`, `.`, `/`, `-`.

        MLflow refuses other characters.

        Examples:
            >>> LayerPair("layer1.0", "layer2").metric_name
            'layer1.0-to-layer2'
        """
        return metric_name(f"{self.source}-to-{self.target}")


def metric_name(name: str) -> str:
    """Return a name with `_` in the place of characters that trackers refuse.

    Args:
        name: Name of a layer or a pair.

    Returns:
        Name of letters, digits and `_`, `.`, `/`, `-`.

    Examples:
        >>> metric_name("heads.→ α")
        'heads.___'
    """
    return re.sub(r"[^\w./-]", "_", name, flags=re.ASCII)


def pair_layers(
    source: nn.Module, target: nn.Module, layers: str | Sequence[str] | Sequence[tuple[str, str]] | Mapping[str, str]
) -> list[LayerPair]:
    """Return pairs of layers from names or globs.

    Args:
        source: Network that explains.
        target: Network that is explained.
        layers: A name or glob, or a sequence of them, for the same names in both networks; or (source, target) tuples,
            or a mapping from source to target. Two globs of a tuple must match equally many layers, which are paired in
            order.

    Returns:
        Pairs in the given order without duplicates.

    Raises:
        LayerNameError: A pattern without a match, names that only one network has, or two globs with different numbers
            of matches.
        InputTypeError: Layers in another form.

    Examples:
        >>> a, b = (nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2))
        >>> pair_layers(a, b, {"*": "*"})
        [LayerPair(source='0', target='0'), LayerPair(source='1', target='1')]
    """
    checked_value("layers", layers, str | Sequence[Any] | Mapping[str, Any])
    if isinstance(layers, Mapping):
        return _zipped(source, target, layers.items())
    if isinstance(layers, str):
        return _same_names(source, target, [layers])
    if not isinstance(layers, Iterable):
        raise InputTypeError(
            "layers must be names or globs, (source, target) tuples, or a dict {source: target}; "
            f"got {type(layers).__name__}"
        )
    given = list(layers)
    names = [item for item in given if isinstance(item, str)]
    tuples = [
        item
        for item in given
        if isinstance(item, (tuple, list)) and len(item) == 2 and all(isinstance(side, str) for side in item)
    ]
    if given and len(tuples) == len(given):
        return _zipped(source, target, [(a, b) for a, b in tuples])
    if len(names) == len(given):
        return _same_names(source, target, names)
    raise InputTypeError(f"layers must be all names or globs, or all (source, target) tuples of names; got {given!r}")


def _same_names(source: nn.Module, target: nn.Module, patterns: Sequence[str]) -> list[LayerPair]:
    of_source, of_target = resolve_layers(source, patterns), resolve_layers(target, patterns)
    if set(of_source) != set(of_target):
        only_source, only_target = (
            sorted(set(a) - set(b)) for a, b in ((of_source, of_target), (of_target, of_source))
        )
        raise LayerNameError(
            f"{list(patterns)} stands for different layers in the two networks: "
            f"only in the source ({type(unwrap_model(source)).__name__}) {only_source}, "
            f"only in the target ({type(unwrap_model(target)).__name__}) {only_target}. "
            "Pass (source, target) tuples or a dict {source: target}."
        )
    return [LayerPair(name, name) for name in of_source]


def _zipped(source: nn.Module, target: nn.Module, patterns: Iterable[tuple[str, str]]) -> list[LayerPair]:
    pairs: dict[LayerPair, None] = {}
    for a, b in patterns:
        of_source, of_target = resolve_layers(source, a), resolve_layers(target, b)
        if len(of_source) != len(of_target):
            raise LayerNameError(
                f"{a!r} → {b!r} cannot be paired in order: {len(of_source)} layer(s) of the source {of_source}, "
                f"{len(of_target)} of the target {of_target}. Both must match the same number."
            )
        pairs.update(dict.fromkeys(map(LayerPair, of_source, of_target)))
    if not pairs:
        raise LayerNameError("expected at least one pair of layers, got none")
    return list(pairs)


def network_name(model: nn.Module) -> str:
    """Return the architecture name of a timm network, else the class name."""
    inner = unwrap_model(model)
    config = getattr(inner, "default_cfg", None) or {}
    name = config.get("architecture") if hasattr(config, "get") else None
    return str(name or plain_class(inner).__name__)


def distinct_names(source: str, target: str) -> tuple[str, str]:
    """Return the names of two networks, with their roles if the names are equal.

    Examples:
        >>> distinct_names("resnet18", "resnet18")
        ('resnet18 (source)', 'resnet18 (target)')
    """
    return (source, target) if source != target else (f"{source} (source)", f"{target} (target)")
