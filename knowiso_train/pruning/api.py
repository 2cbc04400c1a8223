"""Pruning to a budget of multiply-adds, parameters or latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from knowiso_train.errors import InputTypeError, OptionError
from knowiso_train.features.modules import unwrap_model
from knowiso_train.features.state import device_of, preserve_state
from knowiso_train.pruning.allocation import count_macs, count_positions, layer_costs
from knowiso_train.pruning.blocks import finetunable_blocks
from knowiso_train.pruning.builder import PrunedModelBuilder
from knowiso_train.pruning.calibration import Calibration, Forward, check_counts
from knowiso_train.pruning.channel_groups import channel_groups
from knowiso_train.pruning.importance import rank_by_scores
from knowiso_train.pruning.kept_indices import KeptIndices
from knowiso_train.pruning.ranking import rank_by_isomorphism
from knowiso_train.pruning.reconstruction import RECONSTRUCTION_RIDGES, REFIT_SAMPLES_PER_FEATURE, validate_ridges
from knowiso_train.pruning.report import BlockResult, GroupWidth, LayerFit, PruneReport
from knowiso_train.pruning.serialization import save_pruned
from knowiso_train.pruning.tracing import check_network, trace_model
from knowiso_train.utils.batch import batch_size

Built = TypeVar("Built", bound=tuple[Any, ...])
TIMED_IMAGES = 32  # images
TIMING_REPEATS = 7
MAX_SECANT_STEPS = 6
LATENCY_TOLERANCE = 0.9  # of the time that is allowed: what takes less has lost more than it had to

PruneOutcome = tuple[nn.Module, dict[str, KeptIndices], list[LayerFit], dict[str, int]]


@torch.no_grad()
def measure_latency(model: nn.Module, images: Calibration) -> float:
    """Median seconds of a forward pass of up to 32 images, in the network's present mode, after two passes to warm up.

    Example:
        >>> measure_latency(nn.Linear(2, 2), Calibration([torch.zeros(4, 2)])) > 0
        True
    """
    batch, seconds, device = images.first(min(TIMED_IMAGES, images.count)), [], device_of(model)
    for turn in range(TIMING_REPEATS + 2):
        began = time.perf_counter()
        images.forward(model, batch)
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn >= 2:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def reach_latency(make: Callable[[float], Built], original: nn.Module, images: Calibration, share: float) -> Built:
    """Prune to fewer and fewer multiply-adds until a batch takes at most this share of the original's time, and back where it takes far less.

    Args:
        make: gives (network, …) for a share of the multiply-adds.
        original: the network to compare with.
        images: the first are timed.
        share: of the original's time.

    Returns:
        The largest network that was fast enough, within six tries.

    Raises:
        OptionError: not reached.
    """
    target, whole = share, measure_latency(original, images)
    slow, fast = (1.0, 1.0), (0.0, 0.0)  # (multiply-adds, time) of the nearest on either side
    best: Built | None = None
    for _ in range(MAX_SECANT_STEPS):
        try:
            made = make(target)
        except OptionError as error:
            if best is not None:
                return best
            raise OptionError(
                f"a latency of {share} of the original's was not reached: {slow[1]:.2f} was, and at {target:.2f} of the multiply-adds no more can go "
                f"({error})"
            ) from error
        taken = measure_latency(made[0], images) / whole
        if taken > share:
            slow = (target, taken)
        else:
            best, fast = made, (target, taken)
        if best is None:
            target *= 0.9 * share / taken
        elif fast[1] >= LATENCY_TOLERANCE * share or slow[1] <= fast[1]:
            break
        else:
            target = fast[0] + (slow[0] - fast[0]) * ((1 + LATENCY_TOLERANCE) / 2 * share - fast[1]) / (
                slow[1] - fast[1]
            )
    if best is not None:
        return best
    raise OptionError(
        f"a latency of {share} of the original's was not reached: {slow[1]:.2f} at {slow[0]:.2f} of the multiply-adds. "
        "Widths that are multiples of 8 are faster on most machines: round_to=8"
    )


@dataclass(frozen=True)
class PruneResult:
    """What `ki.prune` returns.

    Attributes:
        model: the pruned network, a plain module that needs nothing of this library.
        report: what was done, per layer and altogether; prints as a table.
        kept: for each tensor that was cut, which of the original's entries stayed, see `pruning.recording`.
    """

    model: nn.Module
    report: PruneReport
    kept: Mapping[str, KeptIndices]
    original: nn.Module

    def save(self, folder: str | Path, **options: Any) -> None:
        """Write safetensors and JSON that `ki.load_pruned` reads, and the report; options are those of `ki.save_pruned`."""
        save_pruned(folder, self.model, self.original, kept=self.kept, **options)
        self.report.to_json(Path(folder) / "report.json")


def prune(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    importance: Any = "isomorphism",
    refit: bool = True,
    ignored: Collection[str] = (),
    min_width: float = 0.125,
    round_to: int = 1,
    max_images: int = 1024,
    rows: int = REFIT_SAMPLES_PER_FEATURE,
    ridge: float | Sequence[float] = RECONSTRUCTION_RIDGES,
    block_steps: int = 0,
    forward: Forward | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PruneResult:
    """A smaller copy of a trained network: no labels, no training, some hundred images (DESIGN §1.4).

    1. Every group of channels that does not belong to a residual stream is eliminated backwards: each time the channel
    goes that its readers miss
       least once they are refitted. Attention loses whole heads.
    2. How much the network's output minds is measured for each group, and widths are allocated for least harm at the
    given cost; of two ways to
       weigh that, the one whose quickly refitted network is nearest to the original on other images.
    3. In forward order every layer is refitted in closed form to the original's outputs, on what the pruned network
    gives it; where one layer alone
       reads a group, the channels are chosen again by what it is given there.

    Args:
        model: the network; it is left as it is.
        loader: batches of images, shuffled, as the first ones are taken; labels are never read.
        macs: share of the multiply-adds of convolutions and linear layers that may stay; 0.5 where neither this nor
            another budget is given.
        params: the same of the parameters of these layers.
        latency: the same of the time that a batch takes here; found by measuring, so it is only as exact as the clock.
            Odd widths can be slower than
            even ones, see `round_to`.
        importance: "isomorphism", or an importance of torch-pruning, whose scores then choose the channels and cut the
            same share of every group.
        refit: False leaves the surviving weights as they are.
        ignored: names or globs of layers, or of modules all of whose layers keep their width. Their weights are
            refitted all the same.
        min_width: least share of a group's width that stays.
        round_to: widths are multiples of this, or whole; heads are not rounded.
        max_images: to look at; they pass through the network at once in the refit.
        rows: of each refit, per regressor.
        ridge: relative ρ ≥ 0 of the refit, one or several to choose from.
        block_steps: where more than 0, a fourth step: in forward order the layers are solved once more, and every block
            is tuned as a whole, by so
            many updates towards what the original's block gives, see `refit`. Gradients within one block at a time,
            still no labels.
        forward: `forward(model, batch)` for networks that need more than images.
        seed: of the positions.
        progress: whether to show bars.

    Raises:
        OptionError: a network that torch-pruning cannot trace, nothing to prune, a budget out of reach, options without
            meaning.
        InputTypeError: no network, or no loader.
        DataError: no images.
        NonFiniteError: NaN or Inf, with the layer's name.

    Example:
        >>> widen = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
        >>> model = nn.Sequential(*widen, nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        >>> pruned = prune(model, [torch.randn(64, 3, 12, 12)], macs=0.5, progress=False)
        >>> pruned.model[0].out_channels < 16, model[0].out_channels
        (True, 16)
        >>> pruned.report.macs[1] <= 0.5 * pruned.report.macs[0]
        True
    """
    began = time.monotonic()
    kind, share = _budget(macs, params, latency)
    _check(model, min_width, round_to=round_to, rows=rows)
    check_counts(0, block_steps=block_steps, seed=seed)
    if block_steps and not refit:
        raise OptionError("block_steps needs the refit: pass refit=True, or block_steps=0")
    ridges, original = validate_ridges(ridge), unwrap_model(model)
    images = Calibration(loader, max_images, device_of(original), forward)
    few = images.first(min(2, images.count))
    with preserve_state(original), torch.no_grad():
        tails = trace_model(original, images)
        if block_steps:
            # Refused before the long part
            finetunable_blocks(original, original, list(tails), images, block_steps)
        groups = channel_groups(original, few, tails, ignored, forward)
        if not groups:
            raise OptionError(
                f"nothing to prune in {type(original).__name__}: every width is ignored, or belongs to a residual stream, to an output, or to what a "
                "layer norm runs over. The network is as it was"
            )
        if importance == "isomorphism":
            choice, target = rank_by_isomorphism(
                original, groups, tails, images, seed, progress, rows if refit else None
            )
        else:
            target = None
            choice = rank_by_scores(original, few, groups, importance, forward)

        carving = PrunedModelBuilder(
            original, groups, tails, images, few, choice, refit, rows, ridges, seed, progress, target
        )
        places = count_positions(original, lambda: images.forward(original, few), batch_size(few))

        def pruned_to(target: float, of: str) -> PruneOutcome:
            candidates = choice.candidates(layer_costs(original, groups, places, of), target, min_width, round_to)
            widths = dict(carving.best(candidates))
            if all(widths[group.name] == group.size for group in groups):
                raise OptionError(
                    f"a share of {target} leaves every width as it is (min_width={min_width}, round_to={round_to}); nothing was pruned. Ask for a smaller one"
                )
            return (*carving.make(widths), widths)

        if kind == "latency":
            small, kept, fits, widths = reach_latency(lambda target: pruned_to(target, "macs"), original, images, share)
        else:
            small, kept, fits, widths = pruned_to(share, kind)
        blocks: list[BlockResult] = []
        if block_steps:
            fits, blocks = carving.rebuilt(small, kept, fits, block_steps)
        times = (measure_latency(original, images), measure_latency(small, images)) if kind == "latency" else None
        count = [
            count_macs(network, partial(images.forward, network, few), batch_size(few)) for network in (original, small)
        ]
    if not (count[1] < count[0] or _parameters(small) < _parameters(original)):
        raise OptionError(
            f"nothing was taken out of {type(original).__name__}, though {share} was asked for; this network cannot be pruned so"
        )
    for name, module in small.named_modules():
        module.training = original.get_submodule(name).training
    trains = {name: parameter.requires_grad for name, parameter in original.named_parameters()}
    for name, parameter in small.named_parameters():  # an added bias trains if its weight does
        parameter.requires_grad_(trains[name if name in trains else name.removesuffix("bias") + "weight"])
    settings = {
        kind: share,
        "importance": str(importance),
        "refit": refit,
        "min_width": min_width,
        "round_to": round_to,
        "rows": rows,
        "block_steps": block_steps,
        "seed": seed,
    }
    report = PruneReport(
        tuple(GroupWidth(group.name, group.kind, group.size, widths[group.name]) for group in groups),
        tuple(fits),
        tuple(blocks),
        (count[0], count[1]),
        (_parameters(original), _parameters(small)),
        times,
        time.monotonic() - began,
        images.count,
        settings,
    )
    return PruneResult(small, report, kept, original)


def _budget(macs: float | None, params: float | None, latency: float | None) -> tuple[str, float]:
    given = {
        name: value for name, value in (("macs", macs), ("params", params), ("latency", latency)) if value is not None
    } or {"macs": 0.5}
    if len(given) > 1:
        raise OptionError(f"give one budget, macs=, params= or latency=; got {given}")
    [(name, share)] = given.items()
    if not isinstance(share, (int, float)) or not 0 < share < 1:
        raise OptionError(f"{name} is the share that may stay, between 0 and 1; got {share!r}")
    return name, float(share)


def _check(model: Any, min_width: float, **counts: int) -> None:
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(min_width, (int, float)) or not 0 < min_width <= 1:
        raise OptionError(
            f"min_width is the least share of a width that stays: expected 0 < min_width <= 1, got {min_width!r}"
        )
    check_counts(**counts)
    check_network(unwrap_model(model))


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
