"""Modules by name: unwrapping, resolving and pairing of layers."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.errors import InputTypeError, LayerNameError, OptionError
from knowiso_train.utils.batch import get_inputs
from knowiso_train.utils.validation import checked_value

# (module, class, attribute of the wrapped network). The class is looked up only in modules that are imported already:
# without its module no instance can exist, and importing FSDP or deepspeed is slow.
_WRAPPERS = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper", "_checkpoint_wrapped_module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine", "module"),
)
# Attribute of the wrapper FSDP1, whose forward gathers the weights
_FSDP1_ATTRIBUTE = "_fsdp_wrapped_module"


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the network inside wrappers, in any nesting.

    Wrappers are DDP, DataParallel, FSDP, `torch.compile`, DeepSpeed and activation checkpointing; `accelerator.prepare`
    returns one of these or the network itself.

    Raises:
        InputTypeError: Not a module.

    Examples:
        >>> inner = nn.Linear(2, 2)
        >>> unwrap_model(nn.DataParallel(torch.compile(inner))) is inner
        True
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    while attribute := wrapped_attribute(model):
        model = getattr(model, attribute)
    return model


def call_model(model: nn.Module, images: Any) -> Any:
    """Run a network on images, and name images of another dtype than the weights if it fails.

    Raises:
        InputTypeError: A network that fails on images of another dtype than its weights.

    Examples:
        >>> call_model(nn.Linear(2, 3).bfloat16(), torch.zeros(4, 2))
        Traceback (most recent call last):
        knowiso_train.errors.InputTypeError: Linear has weights of bfloat16 and fails on images of float32 ...
    """

    def message(weights: torch.dtype, given: torch.dtype, error: Exception) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in (weights, given)]
        return (
            f"{type(unwrap_model(model)).__name__} has weights of {names[0]} and fails on images of {names[1]} "
            f"({error}). Convert the images to {names[0]} in the loader, or in a transform"
        )

    with explain_dtype_errors(model, images, message):
        return model(images)


@contextmanager
def explain_dtype_errors(
    model: nn.Module, images: Any, message: Callable[[torch.dtype, torch.dtype, Exception], str]
) -> Iterator[None]:
    """Name the dtypes of images and weights in the place of an error that another dtype of the images causes.

    Args:
        model: Network that runs in the context.
        images: Its images.
        message: Function from the dtypes of weights and images, and the error, to the new message.

    Raises:
        InputTypeError: An error in the context, with images of another dtype than the weights.
    """
    try:
        yield
    except RuntimeError as error:
        weights = next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), None)
        # Other integers may be tokens
        is_images = isinstance(images, Tensor) and (
            images.is_floating_point() or images.dtype == torch.uint8 or images.ndim == 4
        )
        # Not of a subclass: memory ran out, or an error of a hook
        if not is_images or weights in (None, images.dtype) or type(error) not in (RuntimeError, NotImplementedError):
            raise
        raise InputTypeError(message(weights, images.dtype, error)) from error


def runnable_model(model: nn.Module) -> nn.Module:
    """Return the network inside wrappers, except for FSDP, without which it has no weights to run with.

    Raises:
        OptionError: A module inside a network that FSDP shards.

    Examples:
        >>> inner = nn.Linear(2, 2)
        >>> runnable_model(nn.DataParallel(torch.compile(inner))) is inner
        True
    """
    while (attribute := wrapped_attribute(model)) and attribute != _FSDP1_ATTRIBUTE:
        model = getattr(model, attribute)
    # FSDP1 and FSDP2 mark all modules inside
    inside = getattr(model, "_is_fsdp_managed_module", False) and attribute is None
    if inside and not isinstance(model, sharded_classes()):
        raise OptionError(
            f"{type(model).__name__} is inside a network that FSDP shards, so it cannot be run alone. Pass the sharded "
            "network, after FSDP or fully_shard was applied to it"
        )
    return model


def sharded_classes() -> tuple[type[Any], ...]:
    """Return the class of the modules of FSDP2, if it is imported."""
    return _imported_classes(("torch.distributed.fsdp", "FSDPModule"))


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, which FSDP2 replaces by a subclass.

    Examples:
        >>> plain_class(nn.Linear(2, 2)).__name__
        'Linear'
    """
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, sharded_classes()))


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP shards the weights of the network or of a part of it.

    Examples:
        >>> is_sharded(nn.Linear(2, 2))
        False
    """
    classes = (*_imported_classes(("torch.distributed.fsdp", "FullyShardedDataParallel")), *sharded_classes())
    return any(isinstance(module, classes) for module in model.modules())


def has_collective_forward(model: nn.Module) -> bool:
    """Return whether a forward of the network waits for the other processes, as that of DDP and FSDP.

    Examples:
        >>> has_collective_forward(nn.Linear(2, 2))
        False
    """
    ddp = _imported_classes(("torch.nn.parallel.distributed", "DistributedDataParallel"))
    return is_sharded(model) or any(isinstance(module, ddp) for module in model.modules())


def _imported_classes(*names: tuple[str, str]) -> tuple[type[Any], ...]:
    """Return classes by module and name, without those whose module is not imported and that have no instances."""
    classes = (getattr(sys.modules.get(home), name, None) for home, name in names)
    return tuple(cls for cls in classes if cls is not None)


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


def wrapped_attribute(model: nn.Module) -> str | None:
    """Return the attribute that holds the wrapped network; None for other modules."""
    for home, name, attribute in _WRAPPERS:
        wrapper = getattr(sys.modules.get(home), name, None)
        if wrapper is not None and isinstance(model, wrapper):
            return attribute
    return None


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


def forward_override(
    network: nn.Module, forward: Callable[[nn.Module, Tensor], Any]
) -> Callable[[nn.Module, Any], Any]:
    """Return a `forward=` for two networks that applies a function to one of them and calls the other plainly.

    Examples:
        >>> teacher, student = nn.Linear(2, 3), nn.Linear(2, 3)
        >>> run = forward_override(teacher, lambda model, images: 2 * model(images))
        >>> batch = torch.ones(1, 2)
        >>> torch.equal(run(teacher, batch), 2 * teacher(batch)), torch.equal(run(student, batch), student(batch))
        (True, True)
    """

    def run(model: nn.Module, batch: Any) -> Any:
        images = get_inputs(batch)
        return forward(model, images) if unwrap_model(model) is unwrap_model(network) else model(images)

    return run


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
