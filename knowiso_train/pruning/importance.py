"""Importance for the pruners of torch-pruning, and rankings from importances of torch-pruning."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from knowiso_train.errors import InputTypeError, KnowisoWarning, OptionError
from knowiso_train.features.modules import unwrap_model
from knowiso_train.ops.im2col import is_plain_linear_op, num_input_features
from knowiso_train.pruning.calibration import SAMPLES_PER_FEATURE, Forward, LayerInput, input_moments
from knowiso_train.pruning.channel_groups import ChannelGroup, dependency_graph, unit_columns
from knowiso_train.pruning.elimination import BackwardElimination, Consumer, removal_costs
from knowiso_train.pruning.ranking import ChannelRanking
from knowiso_train.utils.batch import check_loader

CONSUMER_FUNCTIONS = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
PRODUCER_FUNCTIONS = (tp.prune_conv_out_channels, tp.prune_linear_out_channels, tp.prune_depthwise_conv_out_channels)


class IsomorphismImportance(tp.importance.Importance):  # type: ignore[misc]
    """Scores channels by the rise of their consumers' unexplained share when the channel goes and the consumers are refitted (DESIGN §1.4).

    One unlabeled pass over some hundred images, at the first group that is scored; again where the network's widths
    have changed since, as in
    iterative pruning, or where it was trained. `global_pruning` compares scores of different layers and knows nothing
    of what a channel computes, so
    they say what is lost for a million multiply-adds.

    Args:
        model: the network that is pruned.
        loader: batches of images, shuffled, as the first ones are taken; labels are never read.
        cumulative: scores of a backward elimination, in which each channel's cost counts what is gone already; False
            scores each alone, under which
            both of two equal channels look free.
        per: "macs", what is lost for a million multiply-adds that go with the channel; or "channel".
        ridge: relative ρ of the refit.
        max_images: to look at.
        rows: positions per regressor and layer.
        forward: `forward(model, batch)` for networks that need more than images.
        seed: of the positions.
        progress: whether to show a bar.

    Raises:
        InputTypeError: not a module.
        OptionError: an option without meaning.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> importance = IsomorphismImportance(model, [torch.randn(32, 3, 8, 8)], progress=False)
        >>> pruner = tp.pruner.BasePruner(
        ...     model, torch.randn(1, 3, 8, 8), importance, pruning_ratio=0.5, ignored_layers=[model[2]], round_to=2
        ... )
        >>> pruner.step()
        >>> model[0].out_channels, model[2].in_channels
        (4, 4)
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        cumulative: bool = True,
        per: str = "macs",
        ridge: float = 1e-4,
        max_images: int = 512,
        rows: int = SAMPLES_PER_FEATURE,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputTypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
        check_loader(loader)
        if not isinstance(ridge, (int, float)) or not 0 <= ridge < math.inf or max_images < 1 or rows < 1:
            raise OptionError(
                f"expected ridge, one finite number >= 0, max_images >= 1 and rows >= 1, got {ridge!r}, {max_images!r} and {rows!r}"
            )
        if per not in ("macs", "channel"):
            raise OptionError(f'per must be "macs" or "channel", got {per!r}')
        self.model, self.loader, self.cumulative, self.per, self.ridge = (
            unwrap_model(model),
            loader,
            cumulative,
            per,
            ridge,
        )
        self._pass: dict[str, Any] = {
            "max_images": max_images,
            "rows": rows,
            "forward": forward,
            "seed": seed,
            "progress": progress,
        }
        self._seen: dict[str, LayerInput] = {}
        self._weights: list[tuple[nn.Parameter, int]] = []

    def __call__(self, group: Any) -> Tensor | None:
        """(J,) scores of the group's channels, float32; None where nothing reads them, which torch-pruning skips."""
        consumers = self.consumers(group)
        if not consumers:
            return None
        scores = self._eliminated(consumers) if self.cumulative else removal_costs(consumers, self.ridge)
        return (scores / (self.macs(group) / 1e6) if self.per == "macs" else scores).float()

    def macs(self, group: Any) -> float:
        """Multiply-adds for one image that go with one channel of the group: in the layers that make it, and in those that read it."""
        names = {module: name for name, module in self.model.named_modules()}
        total = 0.0
        for item in group:
            layer = item.dep.target.module
            positions = self._seen[names[layer]].positions if names.get(layer) in self._seen else 0.0
            if item.dep.handler in PRODUCER_FUNCTIONS:
                total += positions * layer.weight[0].numel()
            elif item.dep.handler in CONSUMER_FUNCTIONS:
                total += positions * layer.weight[:, 0].numel() * len(item.idxs) / len(set(item.root_idxs))
        return max(total, 1.0)

    def _eliminated(self, consumers: list[Consumer]) -> Tensor:
        elimination = BackwardElimination(consumers, self.ridge)
        order, costs = elimination.run(keep=1)
        scores = torch.empty(len(elimination.kept), dtype=torch.float64, device=elimination.kept.device)
        last = int(elimination.kept.nonzero())
        order, costs = [*order, last], [*costs, float(elimination.costs()[last])]
        scores[order] = torch.tensor(costs, dtype=torch.float64, device=scores.device).cummax(0).values
        return scores

    def consumers(self, group: Any) -> list[Consumer]:
        """The linear layers and convolutions of one group that read the group's channels, as regressions."""
        readers = [
            item for item in group if item.dep.handler in CONSUMER_FUNCTIONS and _readable(item.dep.target.module)
        ]
        names = {module: name for name, module in self.model.named_modules()}
        layers = {
            names[item.dep.target.module]: item.dep.target.module for item in readers if item.dep.target.module in names
        }
        if readers and not layers:
            raise OptionError(
                f"the importance was made for another network than the one that is pruned, perhaps for a copy: its {type(self.model).__name__} has "
                "none of the layers that read these channels. Pass it the very network that the pruner gets"
            )
        stale = [
            name
            for name, layer in layers.items()
            if name not in self._seen or len(self._seen[name].moments.mean_x) != num_input_features(layer)
        ]
        if stale or self._changed():
            every = {name: layer for name, layer in self.model.named_modules() if _readable(layer)}
            self._seen = input_moments(self.model, self.loader, every, **self._pass)
            self._warn(every)
            self._weights = [(parameter, parameter._version) for parameter in self.model.parameters()]
        found = []
        for item in readers:
            layer = item.dep.target.module
            if layer in names:
                name = names[layer]
                found.append(
                    Consumer.of(
                        name, self._seen[name].moments, layer.weight, _columns(layer, item.idxs, item.root_idxs)
                    )
                )
        return found

    def _warn(self, layers: Mapping[str, nn.Module]) -> None:
        counts = {
            name: (int(self._seen[name].moments.count), num_input_features(layer))
            for name, layer in layers.items()
            if name in self._seen
        }
        short = [
            f"{name!r} ({rows} rows for {regressors} regressors)"
            for name, (rows, regressors) in counts.items()
            if rows < regressors
        ]
        if short:
            told = f"fewer rows than regressors, so that channels look like mixtures of the rest: layers {', '.join(short)}. Give more images"
            warnings.warn(told, KnowisoWarning, stacklevel=4)

    def _changed(self) -> bool:
        """Whether weights were changed in place since the pass, as training does. torch-pruning puts new ones in their place: that tells nothing."""
        present = set(map(id, self.model.parameters()))
        return any(parameter._version != version for parameter, version in self._weights if id(parameter) in present)


def _readable(layer: nn.Module) -> bool:
    return is_plain_linear_op(layer) and getattr(layer, "groups", 1) == 1


def _columns(layer: nn.Module, idxs: list[int], roots: list[int]) -> Tensor:
    """(J, m): the regressors of each of the group's channels."""
    of_channel: dict[int, list[int]] = {}
    for index, root in zip(idxs, roots, strict=True):
        of_channel.setdefault(int(root), []).append(int(index))
    return unit_columns(layer, torch.tensor([of_channel[root] for root in sorted(of_channel)]))


def rank_by_scores(
    model: nn.Module, example: Any, groups: Sequence[ChannelGroup], importance: Any, forward: Forward | None = None
) -> ChannelRanking:
    """Units in the order of the scores of a torch-pruning importance.

    Raises:
        OptionError: no importance, or one that gives no scores for a group.
    """
    if not callable(importance) or isinstance(importance, type):
        raise OptionError(f'importance must be "isomorphism" or an importance of torch-pruning, got {importance!r}')
    graph, orders = dependency_graph(model, example, forward), {}
    for group in groups:
        root, handler = _root(model, group)
        item = graph.get_pruning_group(root, handler, group.writers[_writer(group)].flatten().tolist())
        try:
            scores = importance(item)
        except Exception as error:  # whatever it needs and was not given, such as gradients
            raise OptionError(
                f"{type(importance).__name__} cannot score {group.name!r} ({type(error).__name__}: {error})"
            ) from error
        if scores is None:
            raise OptionError(
                f"{type(importance).__name__} gives no scores for {group.name!r}; pass it as ignored=, or choose another importance"
            )
        channels = [int(index) for index in item[0].idxs]
        of_channel = torch.empty(max(channels) + 1, dtype=torch.float64)
        of_channel[channels] = scores.detach().double().cpu()
        orders[group.name] = of_channel[group.writers[_writer(group)]].mean(1).argsort().tolist()
    return ChannelRanking(orders, None, {}, {group.name: group.kind for group in groups})


def _writer(group: ChannelGroup) -> str:
    return next(iter(group.writers)) if group.kind == "heads" else group.name


def _root(model: nn.Module, group: ChannelGroup) -> tuple[nn.Module, Any]:
    root = model.get_submodule(_writer(group))
    if isinstance(root, nn.Linear):
        return root, tp.prune_linear_out_channels
    depthwise = root.groups > 1 and root.weight.shape[1] == 1  # type: ignore[operator, index]
    return root, tp.prune_depthwise_conv_out_channels if depthwise else tp.prune_conv_out_channels
