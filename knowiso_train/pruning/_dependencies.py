"""Dependency graphs of torch-pruning, with a bound on the search of a group and errors that name the layer."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch_pruning.dependency import index_mapping

from knowiso_train.errors import OptionError
from knowiso_train.pruning._tracing import Forward
from knowiso_train.utils.batch import tensor_leaves

# The largest groups of DenseNet-201 and Swin-T take 2.2 steps for each node of the graph, and channel indices of 0.1
# times its nodes and its largest width; searches without end exceed any number
MAX_STEPS_PER_NODE, MIN_MAX_STEPS = 10, 1000
# Functions of torch-pruning that cut the producers of a group's channels, and their consumers
CONV_PRUNER = tp.prune_conv_out_channels
DEPTHWISE_PRUNER = tp.prune_depthwise_conv_out_channels
LINEAR_PRUNER = tp.prune_linear_out_channels
CONSUMER_PRUNERS = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
PRODUCER_PRUNERS = (CONV_PRUNER, LINEAR_PRUNER, DEPTHWISE_PRUNER)
_MAPPING_UPDATES = {
    tp.ops.OPTYPE.CONCAT: index_mapping.update_concat_index_mapping,
    tp.ops.OPTYPE.SPLIT: index_mapping.update_split_index_mapping,
    tp.ops.OPTYPE.RESHAPE: index_mapping.update_reshape_index_mapping,
    tp.ops.OPTYPE.UNBIND: index_mapping.update_unbind_index_mapping,
    tp.ops.OPTYPE.EXPAND: index_mapping.update_expand_index_mapping,
    tp.ops.OPTYPE.SLICE: index_mapping.update_slice_index_mapping,
}
CONTAINERS = (dict, OrderedDict, list)
MAX_INDEX_FACTOR = 4  # largest channel index, as a multiple of the largest width of any parameter


class _SearchError(RuntimeError):
    """Search of a group that does not end, or that meets an operation of unknown channels."""


class _UnknownChannels:
    """Index mapping of an operation whose input and output channels torch-pruning cannot match.

    Args:
        operation: Name of the operation.
    """

    def __init__(self, operation: str) -> None:
        self.operation = operation

    def __call__(self, indices: Sequence[Any]) -> Sequence[Any]:
        raise _SearchError(f"it does not match the channels before and after {self.operation}")


def _update_mappings(graph: Any) -> None:
    """Infer the index mappings of all nodes; groups through a node where this fails are not found.

    In place of `update_index_mapping` of torch-pruning, where one such node fails the whole network.
    """
    for node in graph.module2node.values():
        update = _MAPPING_UPDATES.get(node.type)
        try:
            if update is not None:
                update(graph, node)
        except Exception:  # of inferred sizes that are None, zero or out of range
            unknown = _UnknownChannels(node.grad_fn.name())
            for neighbor in (node, *node.inputs, *node.outputs):
                for dependency in neighbor.dependencies:
                    if node in (neighbor, dependency.target):
                        dependency.index_mapping[0] = unknown


def _skip_update(graph: Any) -> None:
    """Keep the index mappings."""


@contextmanager
def _tolerant_mappings(update: Callable[[Any], None]) -> Iterator[None]:
    """Let torch-pruning update index mappings by this function."""
    before = index_mapping.update_index_mapping
    index_mapping.update_index_mapping = update
    try:
        yield
    finally:
        index_mapping.update_index_mapping = before


class _SearchBudget:
    """Bound on the steps of one search, and on the channel indices in it.

    Args:
        max_steps: Maximum number of followed dependencies.
        max_index: Upper bound of channel indices and of their number.
        max_total: Maximum number of channel indices of all steps.
    """

    def __init__(self, max_steps: int, max_index: int, max_total: int) -> None:
        self.max_steps, self.max_index, self.max_total = max_steps, max_index, max_total
        self.steps = self.total = 0
        self.producers: set[int] = set()  # identities of the layers reached so far whose outputs would be cut

    def start(self) -> None:
        """Start another search."""
        self.steps = self.total = 0
        self.producers.clear()

    def check_size(self, indices: Sequence[Any], repeats: int) -> None:
        """Check the number of indices that a mapping to several channels each would return."""
        if len(indices) * repeats > self.max_index:
            raise _SearchError(f"more than {self.max_index} channels, more than any layer has")

    def check_indices(self, indices: Sequence[Any]) -> Sequence[Any]:
        """Return mapped indices, if they are channels of this network."""
        if any(index.idx >= self.max_index for index in indices):
            raise _SearchError(f"channel indices beyond {self.max_index}, more than any layer has")
        return indices

    def count_step(self, indices: Sequence[Any]) -> Sequence[Any]:
        """Return mapped indices, and count one step."""
        self.steps += 1
        self.total += len(indices)
        if self.steps > self.max_steps or self.total > self.max_total:
            raise _SearchError(f"the search did not end within {self.steps - 1} steps")
        return indices


class _BoundedMappings(list[Any]):
    """Index mappings of one dependency, which the search of torch-pruning applies one after the other.

    Args:
        mappings: The mappings.
        budget: Bound on the search.
        producer: Layer whose outputs the dependency cuts, or None.
    """

    def __init__(self, mappings: Sequence[Any], budget: _SearchBudget, producer: Any = None) -> None:
        super().__init__(mappings)
        self.budget, self.producer = budget, producer

    def __iter__(self) -> Iterator[Any]:
        if self.producer is not None:
            self.budget.producers.add(id(self.producer))
        for mapping in super().__iter__():
            if mapping is not None:
                yield partial(self._apply, mapping)
        yield self.budget.count_step

    def _apply(self, mapping: Any, indices: Sequence[Any]) -> Sequence[Any]:
        # A flatten yields all positions of a channel, of which a wrongly inferred stride makes millions
        repeats = 1 if getattr(mapping, "reverse", True) else getattr(mapping, "_stride", 1)
        self.budget.check_size(indices, repeats)
        return self.budget.check_indices(mapping(indices))


def _differentiable_tensors(output: Any) -> list[torch.Tensor]:
    """Return the tensors of an output that the tracer can follow back."""
    return [tensor for tensor in tensor_leaves(output) if tensor.requires_grad]


class PruningGraph:
    """Dependency graph of torch-pruning for a network.

    Args:
        model: Network in eval mode.
        example: Small batch for `forward`, or a tensor of images.
        forward: See `ki.prune`.

    Attributes:
        graph: The graph of torch-pruning.

    Raises:
        OptionError: A network that torch-pruning cannot trace.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        >>> groups, failures = PruningGraph(model, torch.zeros(1, 3, 8, 8)).groups()
        >>> [len(group[0].idxs) for group in groups], failures
        ([4, 8], {})
    """

    def __init__(self, model: nn.Module, example: Any, forward: Forward | None = None) -> None:
        self.model = model
        self._names: dict[Any, str] = {module: name for name, module in model.named_modules()}
        requires_grad = [parameter.requires_grad for parameter in model.parameters()]
        try:
            with (
                warnings.catch_warnings(),
                torch.enable_grad(),
                restored_attributes(model.modules()),
                _tolerant_mappings(_update_mappings),
            ):
                warnings.simplefilter("ignore")
                # The tracer follows the autograd graph
                for parameter in model.parameters():
                    parameter.requires_grad_(True)
                self.graph: Any = tp.DependencyGraph().build_dependency(
                    model, example, forward_fn=forward, output_transform=_differentiable_tensors, verbose=False
                )
        except Exception as error:  # any exception that the network raises under the tracer
            raise OptionError(
                f"{type(model).__name__} cannot be pruned: torch-pruning {_version()} cannot trace it "
                f"({type(error).__name__}: {error}). The model was not modified."
            ) from error
        finally:
            for parameter, before in zip(model.parameters(), requires_grad, strict=True):
                parameter.requires_grad_(before)
        nodes = self.graph.module2node.values()
        width = max((max(parameter.shape, default=1) for parameter in model.parameters()), default=1)
        self._budget = _SearchBudget(
            max(MIN_MAX_STEPS, MAX_STEPS_PER_NODE * len(nodes)),
            MAX_INDEX_FACTOR * width,
            max(MIN_MAX_STEPS, len(nodes)) * width,
        )
        for node in nodes:
            for dependency in node.dependencies:
                cuts_outputs = self.graph.is_out_channel_pruning_fn(dependency.handler)
                producer = dependency.target.module if cuts_outputs else None
                dependency.index_mapping = _BoundedMappings(dependency.index_mapping, self._budget, producer)

    def group(
        self, layer: nn.Module, pruner: Callable[..., Any], channels: Sequence[int], *, update: bool = True
    ) -> Any:
        """Return the group of torch-pruning for the removal of channels of a layer.

        Args:
            layer: Layer.
            pruner: Function of torch-pruning that removes its output channels.
            channels: These channels.
            update: Infer the index mappings again, as is needed after a removal.

        Raises:
            OptionError: A group that torch-pruning cannot find.
        """
        self._budget.start()
        try:
            with warnings.catch_warnings(), _tolerant_mappings(_update_mappings if update else _skip_update):
                warnings.simplefilter("ignore")
                return self.graph.get_pruning_group(layer, pruner, list(channels))
        except Exception as error:  # torch-pruning raises what its index mappings raise
            reason = str(error) if isinstance(error, _SearchError) else f"{type(error).__name__}: {error}"
            raise OptionError(
                f"torch-pruning {_version()} cannot find the channels that depend on layer "
                f"{self._names.get(layer, '')!r} of {type(self.model).__name__} ({reason})"
            ) from error

    def groups(self) -> tuple[list[Any], dict[str, OptionError]]:
        """Return the groups of all convolutions and linear layers, and the error of each layer without one."""
        groups: list[Any] = []
        failures: dict[str, OptionError] = {}
        grouped: set[int] = set()
        for layer in list(self.graph.module2node):
            if not isinstance(layer, (nn.Conv2d, nn.Linear)) or id(layer) in grouped:
                continue
            pruner = self.graph.get_pruner_of_module(layer)
            channels = None if pruner is None else pruner.get_out_channels(layer)
            if channels is None:
                continue
            try:
                group = self.group(layer, pruner.prune_out_channels, range(channels), update=False)
            except OptionError as error:
                failures[self._names.get(layer, type(layer).__name__)] = error
                # The search from a layer of the same group would not end either
                grouped.update(self._budget.producers)
                continue
            grouped.update(
                id(item.dep.target.module) for item in group if self.graph.is_out_channel_pruning_fn(item.dep.handler)
            )
            groups.append(group)
        return groups, failures


def _version() -> str:
    return str(getattr(tp, "__version__", ""))


@contextmanager
def restored_attributes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore the attributes of modules, among them parameters, hooks and caches, after the context.

    Dictionaries and lists keep their identity, to which handles of hooks refer.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> with restored_attributes([layer]):
        ...     layer.weight = nn.Parameter(torch.zeros(1, 2))
        >>> layer.weight.shape
        torch.Size([2, 2])
    """
    snapshots = [
        (
            vars(module),
            dict(vars(module)),
            {key: copy.copy(value) for key, value in vars(module).items() if type(value) in CONTAINERS},
        )
        for module in modules
    ]
    try:
        yield
    finally:
        for attributes, before, contents in snapshots:
            for name, content in contents.items():
                before[name].clear()
                (before[name].extend if isinstance(content, list) else before[name].update)(content)
            for name in attributes.keys() - before.keys():
                del attributes[name]
            attributes.update(before)
