"""Layers by the names they have in the bare network, whatever wraps it or parts of it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches

from torch import nn

from knowiso_train.errors import InputTypeError, LayerNameError

# Where a wrapper class lives, its name, and the attribute that holds what it wraps. Looked up among the modules that are already imported:
# an instance can exist only if its class does, so nothing is imported (FSDP and deepspeed are slow) and no name is taken for a type.
_WRAPPERS = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper", "_checkpoint_wrapped_module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine", "module"),
)


def bare(model: nn.Module) -> nn.Module:
    """The network inside DDP, DataParallel, FSDP, `torch.compile`, DeepSpeed and activation-checkpoint wrappers, in any nesting.

    What `accelerator.prepare` returns is one of these, or the network itself.

    Raises:
        InputTypeError: not a module.

    Example:
        >>> inner = nn.Linear(2, 2)
        >>> bare(nn.DataParallel(torch.compile(inner))) is inner
        True
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    while attribute := wrapped_attribute(model):
        model = getattr(model, attribute)
    return model


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every submodule by its bare name, in the network's order; the network itself (`''`) is left out.

    Names are free of wrapper segments also where a submodule is wrapped, such as a block that is compiled on its own; modules are the ones inside.
    A module that is registered twice appears under both names.

    Example:
        >>> list(named_layers(nn.Sequential(nn.Linear(2, 2), torch.compile(nn.Sequential(nn.ReLU())))))
        ['0', '1', '1.0']
    """
    return {name: module for name, _, module in _walk(model)}


def resolve(model: nn.Module, patterns: str | Sequence[str]) -> list[str]:
    """Bare names of the layers that names or globs stand for.

    `*` and `?` match within one dotted segment, `**` across segments (`**.conv1` also matches `conv1`), `[...]` one character of a set.
    Names may be written with the wrappers' prefixes (`module.layer1`) where the model is wrapped.

    Args:
        model: the network, wrapped or not.
        patterns: a name, a glob, or several.

    Returns:
        Names without duplicates: in the network's order for a glob, in the order given for several patterns.

    Raises:
        LayerNameError: a pattern that matches nothing; the message names the nearest layers.
        InputTypeError: a pattern that is not a string.

    Example:
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.ReLU())
        >>> resolve(model, ["1", "0.*"])
        ['1', '0.0', '0.1']
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise LayerNameError("expected at least one layer name or pattern, got an empty list")
    layers = [(name, written) for name, written, _ in _walk(model)]
    found: dict[str, None] = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise InputTypeError(f"expected layer names and patterns as strings, got {pattern!r} of type {type(pattern).__name__}")
        matches = _matching(pattern, layers)
        if not matches:
            raise LayerNameError(_no_match(pattern, [name for name, _ in layers], bare(model)))
        found.update(dict.fromkeys(matches))
    return list(found)


def wrapped_attribute(model: nn.Module) -> str | None:
    """The attribute that holds the wrapped network; None for a module that is no wrapper."""
    for home, name, attribute in _WRAPPERS:
        wrapper = getattr(sys.modules.get(home), name, None)
        if wrapper is not None and isinstance(model, wrapper):
            return attribute
    return None


def _walk(model: nn.Module, prefix: str = "", written: str = "") -> Iterator[tuple[str, str, nn.Module]]:
    """(bare name, name with wrapper segments, bare module) of every submodule, parents first."""
    while attribute := wrapped_attribute(model):
        model, written = getattr(model, attribute), f"{written}{attribute}."
    for name, child in model._modules.items():  # named_children would hide the second name of a shared module
        if child is not None:
            yield prefix + name, written + name, bare(child)
            yield from _walk(child, f"{prefix}{name}.", f"{written}{name}.")


def _matching(pattern: str, layers: Sequence[tuple[str, str]]) -> list[str]:
    for spelling in (0, 1):  # bare names first: a network may have an attribute that is really called `module`
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
    hint = f"nearest: {', '.join(map(repr, near))}" if near else f"its layers begin with {', '.join(map(repr, names[:8])) or '(none)'}"
    return f"no layer of {type(model).__name__} matches {pattern!r}; {hint}. `*` matches within one dotted segment, `**` across segments."


def nearest(name: str, names: Iterable[str], limit: int = 6) -> list[str]:
    """Names that look like this one, then names that end in the same segment."""
    names = list(names)
    last = name.rsplit(".", 1)[-1]
    alike = get_close_matches(name, names, n=limit, cutoff=0.6)
    return list(dict.fromkeys([*alike, *(other for other in names if other.rsplit(".", 1)[-1] == last)]))[:limit]
