"""Importance for the pruners of torch-pruning, and rankings from importances of torch-pruning."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from knowiso_train.errors import KnowisoWarning, OptionError
from knowiso_train.features.recording import record_outputs
from knowiso_train.features.state import device_of, preserve_state
from knowiso_train.features.wrappers import unwrap_model
from knowiso_train.ops.im2col import num_input_features, regression_weight
from knowiso_train.pruning._channel_group import ChannelGroup
from knowiso_train.pruning._channel_groups import is_single_regression, pruning_root, unit_columns
from knowiso_train.pruning._dependencies import CONSUMER_PRUNERS, PRODUCER_PRUNERS, PruningGraph
from knowiso_train.pruning._elimination import ABSENT_FEATURE, BackwardElimination, Consumer, removal_costs
from knowiso_train.pruning._ranking import ChannelRanking
from knowiso_train.pruning._tracing import Forward
from knowiso_train.pruning.calibration import Calibration
from knowiso_train.pruning.layer_samples import SAMPLES_PER_FEATURE, WIDE_LAYER_FEATURES, LayerInput, input_moments
from knowiso_train.regression.moments import Moments
from knowiso_train.utils.batch import check_loader, to_device
from knowiso_train.utils.validation import NonNegativeFloat, PositiveInt, Seed, validate_arguments


class IsomorphismImportance(tp.importance.Importance):  # type: ignore[misc]
    """Score channels by the unexplained variance of their consumers when the channel is removed and they are refitted.

    The first scored group triggers one unlabeled pass over the images. It is repeated when widths, weights or buffers
    of the network change, as in iterative pruning or after training; changes in place of `parameter.data` have no
    trace. `global_pruning` compares scores of different layers
    without regard to their cost, so scores are per million multiply-adds by default.

    In layers of more than 6,000 input features, such as the first linear layer of a VGG, the features of a channel
    count as samples of one feature. Each of these layers needs a pass of its own.

    Args:
        model: Network to prune.
        loader: Shuffled batches of images, of which the first ones are taken; labels are never read.
        cumulative: Score by backward elimination, in which each cost accounts for earlier removals. False scores each
            channel alone, under which both of two equal channels cost nothing.
        per: "macs" for the loss per million multiply-adds removed with the channel, or "channel".
        ridge: Relative ρ of the refit.
        max_images: Maximum number of images.
        rows: Samples per input feature of a layer.
        forward: `forward(model, batch)` for models that need more than images.
        seed: Seed of the positions.
        progress: Show a progress bar.

    Raises:
        InputTypeError: An object that is no module.
        OptionError: An option out of range.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> importance = IsomorphismImportance(model, [torch.randn(32, 3, 8, 8)], progress=False)
        >>> pruner = tp.pruner.BasePruner(
        ...     model, torch.randn(1, 3, 8, 8), importance, pruning_ratio=0.5, ignored_layers=[model[2]], round_to=2
        ... )
        >>> pruner.step()
        >>> model[0].out_channels, model[2].in_channels
        (4, 4)
    """

    @validate_arguments
    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        cumulative: bool = True,
        per: Literal["macs", "channel"] = "macs",
        ridge: NonNegativeFloat = 1e-4,
        max_images: PositiveInt = 512,
        rows: PositiveInt = SAMPLES_PER_FEATURE,
        forward: Forward | None = None,
        seed: Seed = 0,
        progress: bool = True,
    ) -> None:
        check_loader(loader)
        if math.isinf(ridge):
            raise OptionError(f"ridge must be finite, got {ridge}")
        self.model, self.loader = unwrap_model(model), loader
        self.cumulative, self.per, self.ridge = cumulative, per, ridge
        self._pass_options: dict[str, Any] = {
            "max_images": max_images,
            "rows": rows,
            "forward": forward,
            "seed": seed,
            "progress": progress,
        }
        self._inputs: dict[str, LayerInput] = {}
        self._merged: dict[str, tuple[Tensor, Moments]] = {}  # features (J, m) and moments of J channels of wide layers
        self._positions: dict[str, float] = {}  # of layers that run
        self._versions: list[tuple[Tensor, int, int]] = []  # tensors of the network with version and address

    def __call__(self, group: Any) -> Tensor | None:
        """Return the scores (J,) of the group's channels, float32; None without consumers, which skips the group."""
        consumers = self.consumers(group)
        if not consumers:
            return None
        scores = self._cumulative_costs(consumers) if self.cumulative else removal_costs(consumers, self.ridge)
        return (scores / (self.macs(group) / 1e6) if self.per == "macs" else scores).float()

    def macs(self, group: Any) -> float:
        """Return the multiply-adds for one image of one channel of the group, in its producers and consumers."""
        names = {module: name for name, module in self.model.named_modules()}
        total = 0.0
        for item in group:
            layer = item.dep.target.module
            positions = self._positions.get(names.get(layer, ""), 0.0)
            if item.dep.handler in PRODUCER_PRUNERS:
                total += positions * layer.weight[0].numel()
            elif item.dep.handler in CONSUMER_PRUNERS:
                total += positions * layer.weight[:, 0].numel() * len(item.idxs) / len(set(item.root_idxs))
        return max(total, 1.0)

    def _cumulative_costs(self, consumers: list[Consumer]) -> Tensor:
        elimination = BackwardElimination(consumers, self.ridge)
        order, costs = elimination.eliminate_until(keep=1)
        scores = torch.empty(len(elimination.remaining), dtype=torch.float64, device=elimination.remaining.device)
        last = int(elimination.remaining.nonzero())
        order, costs = [*order, last], [*costs, float(elimination.costs()[last])]
        # The running maximum keeps the order of removal where a later removal costs less
        scores[order] = torch.tensor(costs, dtype=torch.float64, device=scores.device).cummax(0).values
        return scores

    def consumers(self, group: Any) -> list[Consumer]:
        """Return the ungrouped layers that consume the group's channels, as regressions."""
        items = [
            item
            for item in group
            if item.dep.handler in CONSUMER_PRUNERS and is_single_regression(item.dep.target.module)
        ]
        names = {module: name for name, module in self.model.named_modules()}
        layers = {
            names[item.dep.target.module]: item.dep.target.module for item in items if item.dep.target.module in names
        }
        if items and not layers:
            raise OptionError(
                f"the importance was made for another network than the one that is pruned, perhaps for a copy: its "
                f"{type(self.model).__name__} has none of the consumers of these channels. Pass it the pruner's network"
            )
        self._update_inputs(layers)
        roots = sorted({int(root) for root in group[0].root_idxs})
        return [
            self._consumer(names[layer], layer, _channel_columns(layer, item.idxs, item.root_idxs, roots))
            for item in items
            if names.get(layer := item.dep.target.module) in self._positions
        ]

    def _consumer(self, name: str, layer: nn.Module, columns: Tensor) -> Consumer:
        """Return a layer that takes the channels as the features `columns` (J, m), as a regression."""
        weight: Tensor = layer.weight  # type: ignore[assignment]
        if not _is_wide(layer):
            return Consumer.of(name, self._inputs[name].moments, weight, columns)
        present = (columns != ABSENT_FEATURE).any(1)
        features = columns[present]
        if name not in self._merged or not torch.equal(self._merged[name][0], features):
            moments = self._input_moments({name: layer}, self._images(), {name: features})[name].moments
            self._merged[name] = features, moments
        # The m features of a channel count as m outputs with the same input
        merged = torch.full((len(columns), 1), ABSENT_FEATURE)
        merged[present] = torch.arange(len(features))[:, None]
        return Consumer.of(
            name, self._merged[name][1], regression_weight(weight.detach())[features].flatten(1).T, merged
        )

    def _update_inputs(self, layers: Mapping[str, nn.Module]) -> None:
        """Repeat the pass where the moments of these layers do not belong to the present network."""
        stale = any(
            name not in self._inputs or len(self._inputs[name].moments.mean_x) != num_input_features(layer)
            for name, layer in layers.items()
            if name in self._positions and not _is_wide(layer)
        )
        if stale or (layers and not self._versions) or self._weights_changed():
            self._compute_inputs()
            self._versions = [(value, value._version, value.data_ptr()) for value in self._state()]

    def _compute_inputs(self) -> None:
        """Compute the moments of the inputs of all layers that run, except wide ones."""
        images = self._images()
        layers = {name: layer for name, layer in self.model.named_modules() if is_single_regression(layer)}
        self._positions = _output_positions(self.model, layers, images)
        used = {name: layer for name, layer in layers.items() if name in self._positions and not _is_wide(layer)}
        self._inputs, self._merged = self._input_moments(used, images) if used else {}, {}
        self._warn(used)

    def _images(self) -> Calibration:
        return Calibration(self.loader, self._pass_options["max_images"], None, self._pass_options["forward"])

    def _input_moments(
        self, layers: Mapping[str, nn.Module], images: Calibration, merged: Mapping[str, Tensor] | None = None
    ) -> dict[str, LayerInput]:
        # The samples of a layer are divided by the number of images, of which the loader may have fewer than allowed
        options = {**self._pass_options, "max_images": images.count}
        return input_moments(self.model, images, layers, merged=merged, **options)

    def _warn(self, layers: Mapping[str, nn.Module]) -> None:
        counts = {
            name: (int(self._inputs[name].moments.count), num_input_features(layer))
            for name, layer in layers.items()
            if name in self._inputs
        }
        short = [
            f"{name!r} ({count} samples for {num_features} features)"
            for name, (count, num_features) in counts.items()
            if count < num_features
        ]
        if short:
            message = (
                "fewer samples than features, so that channels look like linear maps of the others: layers "
                f"{', '.join(short)}. Give more images"
            )
            warnings.warn(message, KnowisoWarning, stacklevel=5)

    def _weights_changed(self) -> bool:
        """Return whether weights or buffers were changed since the pass, as training does.

        torch-pruning replaces tensors, which is no change of the remaining channels.
        """
        present = {id(value) for value in self._state()}
        return any(
            (value._version, value.data_ptr()) != (version, address)
            for value, version, address in self._versions
            if id(value) in present
        )

    def _state(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]


def _is_wide(layer: nn.Module) -> bool:
    return num_input_features(layer) > WIDE_LAYER_FEATURES


@torch.no_grad()
def _output_positions(model: nn.Module, layers: Mapping[str, nn.Module], images: Calibration) -> dict[str, float]:
    """Return the output positions for one image of the layers that run in a forward pass in eval mode."""
    device, batch = device_of(model), images.first(1)
    with preserve_state(model), record_outputs(layers, Tensor.numel) as sizes:
        images.forward(model, batch if device is None else to_device(batch, device))
    return {name: sizes[name][-1] / len(layers[name].weight) for name in sizes}  # type: ignore[arg-type]


def _channel_columns(layer: nn.Module, idxs: list[int], roots: list[int], group_roots: list[int]) -> Tensor:
    """Return the features (J, m) of each of the group's channels; -1 for channels that the layer does not take.

    Args:
        layer: Consumer.
        idxs: Its input channels in the group.
        roots: Channel of the group's root for each of them.
        group_roots: All J channels of the group's root.
    """
    channels: dict[int, list[int]] = {}
    for index, root in zip(idxs, roots, strict=True):
        channels.setdefault(int(root), []).append(int(index))
    if len({len(inputs) for inputs in channels.values()}) > 1:
        raise OptionError(f"{layer}: takes some channels of a group more often than others, and cannot be scored")
    columns = unit_columns(layer, torch.tensor([channels[root] for root in sorted(channels)]))
    if sorted(channels) == group_roots:
        return columns
    padded = torch.full((len(group_roots), columns.shape[1]), ABSENT_FEATURE)
    padded[[group_roots.index(root) for root in sorted(channels)]] = columns
    return padded


def rank_by_scores(
    model: nn.Module, example: Any, groups: Sequence[ChannelGroup], importance: Any, forward: Forward | None = None
) -> ChannelRanking:
    """Rank units by the scores of an importance of torch-pruning.

    Raises:
        OptionError: An object that is no importance, or an importance without scores for a group.
    """
    if not callable(importance) or isinstance(importance, type):
        raise OptionError(f'importance must be "isomorphism" or an importance of torch-pruning, got {importance!r}')
    graph, removal_order = PruningGraph(model, example, forward), {}
    for group in groups:
        root = next(iter(group.producers)) if group.kind == "heads" else group.name
        units = group.producers[root]
        item = graph.group(*pruning_root(model, root), units.flatten().tolist())
        try:
            scores = importance(item)
        except Exception as error:  # whatever the importance requires and was not given, such as gradients
            raise OptionError(
                f"{type(importance).__name__} cannot score {group.name!r} ({type(error).__name__}: {error})"
            ) from error
        if not isinstance(scores, Tensor):
            raise OptionError(
                f"{type(importance).__name__} returns no scores for {group.name!r}; pass it as ignored=, or choose "
                "another importance"
            )
        channels = [int(index) for index in item[0].idxs]
        score_of_channel = torch.empty(max(channels) + 1, dtype=torch.float64)
        score_of_channel[channels] = scores.detach().double().cpu()
        removal_order[group.name] = score_of_channel[units].mean(1).argsort().tolist()
    return ChannelRanking(removal_order, None, {}, {group.name: group.kind for group in groups})
