"""Structured pruning without training as others do it, as the rivals of `bench_prune.py`.

Kept apart from the library on purpose: nothing is shared with what is compared. Here are torch-pruning's importances, brought to a number of
multiply-adds that is the same for all; batch-norm statistics computed anew; a channel-mixing ridge in the manner of GRAIL; a local search in the
manner of OSSCAR. No labels: where a criterion asks for a gradient, the labels are what the original network says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

READERS = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
WRITERS = (tp.prune_conv_out_channels, tp.prune_linear_out_channels)
MAKERS = (*WRITERS, tp.prune_depthwise_conv_out_channels)
GOLDEN = (math.sqrt(5) - 1) / 2
LAYERS = (nn.Conv2d, nn.Linear)


class Macs:
    """Multiply-adds of convolutions and linear layers for one image; one count for everybody."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.positions: dict[str, int] = {}
        with ExitStack() as stack, torch.no_grad():
            for name, layer in model.named_modules():
                if isinstance(layer, LAYERS):
                    handle = layer.register_forward_hook(
                        lambda m, _x, y, name=name: self.positions.update({name: y.numel() // (len(y) * m.weight.shape[0])})
                    )
                    stack.callback(handle.remove)
            model(example)

    def __call__(self, model: nn.Module) -> float:
        return float(sum(count * model.get_submodule(name).weight.numel() for name, count in self.positions.items()))

    def after(self, model: nn.Module, groups: Sequence[Any]) -> float:
        """What would be left if torch-pruning's groups were cut."""
        made, read = {}, {}
        for group in groups:
            for item in group:
                lost = made if item.dep.handler in MAKERS else read if item.dep.handler in READERS else None
                if lost is not None:
                    lost.setdefault(item.dep.target.module, set()).update(item.idxs)
        total = 0.0
        for name, count in self.positions.items():
            layer = model.get_submodule(name)
            width, reads = layer.weight.shape[:2]
            taps = layer.weight[0, 0].numel()
            total += count * taps * (width - len(made.get(layer, ()))) * (reads - len(read.get(layer, ())))
        return total


class Scores:
    """An importance that is asked once for each group."""

    def __init__(self, importance: Callable[[Any], Tensor | None]) -> None:
        self.importance, self.known = importance, {}

    def __call__(self, group: Any) -> Tensor | None:
        root = group[0].dep.target.module
        if root not in self.known:
            self.known[root] = self.importance(group)
        return self.known[root]


@dataclass
class Cutter:
    """torch-pruning's pruner, brought to a number of multiply-adds by bisection on its pruning ratio.

    Attributes:
        model: pruned in place.
        example: an input to trace.
        macs: the count.
        roots: layers whose output channels may go; all others are ignored.
    """

    model: nn.Module
    example: Tensor
    macs: Macs
    roots: Sequence[str]

    def cut(self, importance: Callable[[Any], Tensor | None], target: float, scope: str) -> float:
        """Prune to at most `target` multiply-adds; returns what is left."""
        scores = Scores(importance)
        best, least = 0.0, -1.0
        low, high = 0.0, 1.0
        for _ in range(18):
            ratio = (low + high) / 2
            left = self.macs.after(self.model, list(self._pruner(scores, ratio, scope).step(interactive=True)))
            if left <= target and left > least:
                best, least = ratio, left
            low, high = (low, ratio) if left <= target else (ratio, high)
        for group in self._pruner(scores, best, scope).step(interactive=True):
            group.prune()
        return self.macs(self.model)

    def remove(self, kept: Mapping[str, Sequence[int]]) -> None:
        """Cut the output channels of root layers down to those named."""
        graph = tp.DependencyGraph().build_dependency(self.model, self.example)
        for name, indices in kept.items():
            layer = self.model.get_submodule(name)
            gone = sorted(set(range(layer.weight.shape[0])) - set(indices))
            if gone:
                graph.get_pruning_group(layer, _writer(layer), gone).prune()

    def consumers(self) -> dict[str, str]:
        """The one layer that reads each root's channels, in its channels' order; depthwise layers and norms in between."""
        names = {module: name for name, module in self.model.named_modules()}
        graph = tp.DependencyGraph().build_dependency(self.model, self.example)
        found = {}
        for name in self.roots:
            layer = self.model.get_submodule(name)
            group = graph.get_pruning_group(layer, _writer(layer), list(range(layer.weight.shape[0])))
            readers = [item for item in group if item.dep.handler in READERS]
            if len(readers) != 1 or list(readers[0].idxs) != list(range(layer.weight.shape[0])):
                raise ValueError(f"{name} has {len(readers)} readers, or one that mixes its channels up")
            found[name] = names[readers[0].dep.target.module]
        return found

    def _pruner(self, scores: Scores, ratio: float, scope: str) -> Any:
        ignored = [
            layer for name, layer in self.model.named_modules() if isinstance(layer, LAYERS) and name not in self.roots and not _depthwise(layer)
        ]
        options: dict[str, Any] = {"global_pruning": scope == "global", "pruning_ratio": ratio}
        if scope == "local":
            widths = {name: self.model.get_submodule(name).weight.shape[0] for name in self.roots}
            kept = uniform(widths, ratio)
            options["pruning_ratio_dict"] = {self.model.get_submodule(name): 1 - (kept[name] + 1e-3) / width for name, width in widths.items()}
        fresh: dict[str, Any] = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}}  # mutable defaults there
        return tp.pruner.BasePruner(self.model, self.example, scores, ignored_layers=ignored, **options, **fresh)


def uniform(widths: Mapping[str, int], ratio: float) -> dict[str, int]:
    """What is left of each width when the same share goes everywhere.

    Of layers of one width some are rounded up and some down, so that the multiply-adds follow the ratio closely: rounding all alike jumps by up to
    7 % on ResNet-56.
    """
    turn: dict[int, int] = {}
    kept = {}
    for name, width in widths.items():
        turn[width] = turn.get(width, 0) + 1
        kept[name] = max(1, min(width, int(width * (1 - ratio) + turn[width] * GOLDEN % 1)))
    return kept


def inner_roots(model: nn.Module, example: Tensor, ignored: Sequence[str]) -> list[str]:
    """Layers that alone write channels which one layer alone reads: widths inside of blocks, no residual stream."""
    names = {module: name for name, module in model.named_modules()}
    graph = tp.DependencyGraph().build_dependency(model, example)
    found = []
    for group in graph.get_all_groups(ignored_layers=[model.get_submodule(name) for name in ignored]):
        handlers = [item.dep.handler for item in group]
        if sum(h in WRITERS for h in handlers) == 1 and sum(h in READERS for h in handlers) == 1:
            found.append(next(names[item.dep.target.module] for item in group if item.dep.handler in WRITERS))
    order = list(names.values())
    return sorted(found, key=order.index)


def _depthwise(layer: nn.Module) -> bool:
    """Goes with what writes its channels."""
    return isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.groups == layer.out_channels


def _writer(layer: nn.Module) -> Any:
    return tp.prune_linear_out_channels if isinstance(layer, nn.Linear) else tp.prune_conv_out_channels


@torch.no_grad()
def recompute_statistics(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Running means and variances of batch norms as averages over the batches, layer by layer as the network is now; nothing else changes."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.training) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True  # None: the plain average
    for batch in batches:
        model(batch)
    for norm, (momentum, training) in zip(norms, before, strict=True):
        norm.momentum, norm.training = momentum, training


@dataclass(frozen=True)
class Calibration:
    """What a criterion may look at: images, and what the original network says of them."""

    images: Tensor
    said: Tensor
    seed: int = 0


def mean_gradient(model: nn.Module, data: Calibration, images: int = 512, batch: int = 64) -> None:
    """Leaves the gradient of the mean cross-entropy in the parameters."""
    model.zero_grad()
    chosen = data.images[:images]
    for x, y in zip(chosen.split(batch), data.said[:images].split(batch), strict=True):
        (F.cross_entropy(model(x), y, reduction="sum") / len(chosen)).backward()


def taylor(model: nn.Module, data: Calibration) -> Any:
    mean_gradient(model, data)
    return tp.importance.TaylorImportance()


def hessian(model: nn.Module, data: Calibration, images: int = 128) -> Any:
    """Squares of single images' gradients. Added up here: torch-pruning's own `accumulate_grad` keeps those of the last image only."""
    scorer = tp.importance.HessianImportance()
    squares: dict[nn.Parameter, Tensor] = {}
    for x, y in zip(data.images[:images].split(1), data.said[:images].split(1), strict=True):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                squares[parameter] = squares.get(parameter, 0) + parameter.grad.square()
    scorer._accu_grad, scorer._counter = squares, dict.fromkeys(squares, images)
    return scorer


def obdc(model: nn.Module, data: Calibration, images: int = 128, batch: int = 32) -> Any:
    """EigenDamage's OBD-C as torch-pruning has it: labels drawn from what the network says; layers without bias and of one group only."""
    scorer = tp.importance.OBDCImportance(num_classes=len(model(data.images[:1])[0]))
    torch.manual_seed(data.seed)
    with ExitStack() as stack:
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.bias is None:
                scorer.modules.append(layer)
                stack.callback(layer.register_forward_pre_hook(scorer._save_input).remove)
                stack.callback(layer.register_full_backward_hook(scorer._save_grad_output).remove)
        for x in data.images[:images].split(batch):
            model.zero_grad()
            logits = model(x.clone().requires_grad_())
            drawn = logits.detach().softmax(1).multinomial(1)[:, 0]
            F.cross_entropy(logits, drawn).backward()
            scorer.step()
    return scorer


def activation(model: nn.Module, data: Calibration, images: int = 256) -> Any:
    """Mean absolute activation; torch-pruning's hook keeps one batch."""
    scorer = tp.importance.ActivationImportance()
    with scorer.compute_importance(model):
        model(data.images[:images])
    return scorer


def random(model: nn.Module, data: Calibration) -> Any:
    torch.manual_seed(data.seed)
    return tp.importance.RandomImportance()


IMPORTANCES: dict[str, Callable[[nn.Module, Calibration], Any]] = {
    "L1": lambda model, data: tp.importance.MagnitudeImportance(p=1),
    "L2": lambda model, data: tp.importance.MagnitudeImportance(p=2),
    "LAMP": lambda model, data: tp.importance.LAMPImportance(),
    "FPGM": lambda model, data: tp.importance.FPGMImportance(),
    "BN scale": lambda model, data: tp.importance.BNScaleImportance(),
    "Taylor": taylor,
    "Hessian": hessian,
    "OBD-C": obdc,
    "Activation": activation,
    "Random": random,
}


def prune_with(
    cutter: Cutter, prepare: Callable[[nn.Module, Calibration], Any], data: Calibration, target: float, scope: str = "global", steps: int = 1
) -> None:
    """Prune to `target` multiply-adds in equal parts of what goes; scores, and gradients where needed, are taken anew before each step."""
    whole = cutter.macs(cutter.model)
    for step in range(1, steps + 1):
        importance = prepare(cutter.model, data)
        cutter.cut(importance, whole - (whole - target) * step / steps, scope)
    cutter.model.zero_grad()
    for module in cutter.model.modules():
        vars(module).pop("_importance", None)  # left behind by torch-pruning's activations


@torch.no_grad()
def grams(model: nn.Module, layers: Sequence[str], batches: Sequence[Tensor], rows: int = 20, taps: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """(d, d) mean outer product, about the origin, of what each layer reads; d counts the taps of a kernel too, in the order of `weight.flatten(1)`.

    Args:
        model: the original.
        layers: convolutions of one group, linear layers.
        batches: of images.
        rows: per regressor, at positions drawn at random.
        taps: False for channels alone, d = C, at all positions.
        seed: of the positions.
    """
    generator = torch.Generator().manual_seed(seed)
    total: dict[str, Any] = dict.fromkeys(layers, 0)
    seen: dict[str, int] = dict.fromkeys(layers, 0)
    images = sum(len(batch) for batch in batches)

    def add(name: str, layer: Any, x: Tensor) -> None:
        found = _rows(layer, x, math.ceil(rows * layer.weight[0].numel() / images), generator) if taps else _channels(x)
        total[name] = total[name] + (found.T @ found).double()
        seen[name] += len(found)

    with ExitStack() as stack:
        for name in layers:
            layer = model.get_submodule(name)
            stack.callback(layer.register_forward_pre_hook(lambda m, x, name=name: add(name, m, x[0])).remove)
        for batch in batches:
            model(batch)
    return {name: total[name] / seen[name] for name in layers}


def _channels(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.movedim(1, -1).flatten(0, -2)


def _rows(layer: Any, x: Tensor, positions: int, generator: torch.Generator) -> Tensor:
    if isinstance(layer, nn.Linear):
        return x
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # (N, C·k·k, L)
    at = torch.randperm(patches.shape[2], generator=generator)[:positions]
    return patches[:, :, at].movedim(1, 2).flatten(0, 1)


def mixed(weight: Tensor, gram: Tensor, kept: Sequence[int], ridge: float = 1e-3) -> Tensor:
    """GRAIL's compensation (Tang et al. 2026, arXiv 2602.23795): what reads the channels reads their ridge reconstruction from the kept ones.

    Args:
        weight: of the consumer, (out, C, ...).
        gram: of its C input channels in the original network, (C, C).
        kept: channels.
        ridge: relative to the mean square of the kept channels.

    Returns:
        (out, K, ...): W'[:, k] = Σ_c W[:, c] M[c, k], with M = G[:, K] (G[K, K] + λI)⁻¹.
    """
    at = torch.as_tensor(kept)
    inner = gram[at][:, at]
    damped = inner + ridge * inner.diagonal().mean() * torch.eye(len(at), dtype=gram.dtype)
    reconstruction = torch.linalg.solve(damped, gram[at]).T  # (C, K)
    return torch.einsum("oc...,ck->ok...", weight.double(), reconstruction).to(weight.dtype)


class Regression:
    """A consumer's output as a least-squares problem in a subset of its input channels, damped as OSSCAR does (Meng et al. 2024, 2403.12983).

    Args:
        weight: of the consumer, (out, C, ...).
        gram: of its inputs with all taps, (C·taps, C·taps).
        ridge: relative; added to the Gram matrix's diagonal.
    """

    def __init__(self, weight: Tensor, gram: Tensor, ridge: float = 1e-4) -> None:
        self.shape, self.channels = weight.shape, weight.shape[1]
        self.taps = weight[0, 0].numel()
        self.weight = weight.detach().flatten(1).double().T  # (d, out)
        self.gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        self.target = self.gram @ self.weight

    def columns(self, channels: Sequence[int]) -> Tensor:
        return (torch.as_tensor(channels)[:, None] * self.taps + torch.arange(self.taps)).flatten()

    def solve(self, kept: Sequence[int]) -> Tensor:
        """(K·taps, out) best weights for what is kept."""
        at = self.columns(kept)
        return torch.cholesky_solve(self.target[at], torch.linalg.cholesky(self.gram[at][:, at]))

    def error(self, kept: Sequence[int]) -> float:
        """Mean square of what the kept channels cannot give."""
        at = self.columns(kept)
        return float((self.weight * self.target).sum() - (self.solve(kept) * self.target[at]).sum())

    def losses(self, kept: Sequence[int]) -> Tensor:
        """(K,) rise of the error when a kept channel goes."""
        at = self.columns(kept)
        factor = torch.linalg.cholesky(self.gram[at][:, at])
        inverse = torch.cholesky_inverse(factor)
        weights = (inverse @ self.target[at]).unflatten(0, (len(kept), self.taps))
        own = torch.arange(len(at)).view(len(kept), self.taps)
        blocks = inverse[own[:, :, None], own[:, None, :]]
        return (weights * torch.linalg.solve(blocks, weights)).sum((1, 2))

    def gains(self, kept: Sequence[int], offered: Sequence[int]) -> Tensor:
        """(M,) fall of the error when one of the offered channels joins."""
        at, new = self.columns(kept), self.columns(offered)
        across = torch.cholesky_solve(self.gram[at][:, new], torch.linalg.cholesky(self.gram[at][:, at]))  # (k, m)
        left = (self.target[new] - across.T @ self.target[at]).unflatten(0, (len(offered), self.taps))
        rest = self.gram[new][:, new] - self.gram[new][:, at] @ across
        own = torch.arange(len(new)).view(len(offered), self.taps)
        return (left * torch.linalg.solve(rest[own[:, :, None], own[:, None, :]], left)).sum((1, 2))

    def search(self, width: int, tries: int = 4, swaps: int = 40) -> list[int]:
        """Channels to keep: greedy removal down to `width`, some at a time where there are many, then the best exchange until none helps."""
        kept = list(range(self.channels))
        while len(kept) > width:
            goes = min(len(kept) - width, max(1, len(kept) // 64))
            gone = set(self.losses(kept).argsort()[:goes].tolist())
            kept = [channel for at, channel in enumerate(kept) if at not in gone]
        for _ in range(swaps if 0 < width < self.channels else 0):
            better = self._swapped(kept, tries)
            if better is None:
                break
            kept = better
        return sorted(kept)

    def _swapped(self, kept: list[int], tries: int) -> list[int] | None:
        losses = self.losses(kept)
        outside = sorted(set(range(self.channels)) - set(kept))
        found: tuple[float, list[int]] | None = None
        for j in losses.argsort()[:tries].tolist() if len(kept) > 1 else []:
            rest = kept[:j] + kept[j + 1 :]
            gain, i = self.gains(rest, outside).max(0)
            change = float(losses[j] - gain)
            if change < -1e-9 * abs(float(losses[j])) and (found is None or change < found[0]):
                found = change, [*rest, outside[int(i)]]
        return None if found is None else found[1]

    def weights(self, kept: Sequence[int]) -> Tensor:
        """(out, K, ...) as the pruned consumer takes them."""
        return self.solve(kept).T.unflatten(1, (len(kept), self.taps)).reshape(self.shape[0], len(kept), *self.shape[2:])


@torch.no_grad()
def set_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        own = model.get_submodule(name).weight
        if own.shape != weight.shape:
            raise ValueError(f"{name}: expected {tuple(own.shape)}, got {tuple(weight.shape)}")
        own.copy_(weight)
