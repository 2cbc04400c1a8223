"""Pruning to a budget of multiply-adds, parameters or latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from knowiso_train.errors import InputTypeError, OptionError
from knowiso_train.features.modules import network_name
from knowiso_train.features.state import device_of, preserve_state
from knowiso_train.features.wrappers import unwrap_model
from knowiso_train.loading.model_card import write_model_card
from knowiso_train.pruning._blocks import finetunable_blocks
from knowiso_train.pruning._builder import PrunedModelBuilder, copy_model
from knowiso_train.pruning._channel_groups import channel_groups
from knowiso_train.pruning._group_trial import usable_groups
from knowiso_train.pruning._ranking import rank_by_isomorphism
from knowiso_train.pruning._report import BlockResult, GroupWidth, LayerFit, PruneReport
from knowiso_train.pruning._tracing import TRACE_IMAGES, Forward, trace_model
from knowiso_train.pruning.allocation import count_macs, count_positions, layer_costs, unlayered_costs
from knowiso_train.pruning.calibration import Calibration
from knowiso_train.pruning.importance import rank_by_scores
from knowiso_train.pruning.kept_indices import KeptIndices
from knowiso_train.pruning.reconstruction import (
    RECONSTRUCTION_RIDGES,
    REFIT_SAMPLES_PER_FEATURE,
    validate_ridges,
)
from knowiso_train.pruning.refit import check_network
from knowiso_train.pruning.serialization import save_pruned
from knowiso_train.utils.validation import NonNegativeInt, PositiveInt, Range, Seed, checked_value, validate_fields

Built = TypeVar("Built", bound=tuple[Any, ...])
BudgetKind = Literal["macs", "params", "latency"]
# Pruned model, kept indices, results of the refit, widths
BuildResult = tuple[nn.Module, dict[str, KeptIndices], list[LayerFit], dict[str, int]]

TIMED_IMAGES = 32  # images
TIMING_REPEATS, TIMING_WARMUPS = 7, 2  # passes
MAX_SECANT_STEPS = 6
LATENCY_TOLERANCE = 0.9  # fraction of the allowed time; a faster model is pruned more than necessary


@torch.no_grad()
def measure_latency(model: nn.Module, images: Calibration) -> float:
    """Return the median seconds of a forward pass of up to 32 images, in the model's present mode, after two warm-ups.

    Examples:
        >>> measure_latency(nn.Linear(2, 2), Calibration([torch.zeros(4, 2)])) > 0
        True
    """
    batch, device = images.first(TIMED_IMAGES), device_of(model)
    seconds = []
    for _ in range(TIMING_WARMUPS + TIMING_REPEATS):
        start = time.perf_counter()
        images.forward(model, batch)
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[TIMING_WARMUPS:])


def reach_latency(build: Callable[[float], Built], original: nn.Module, images: Calibration, latency: float) -> Built:
    """Search the fraction of multiply-adds at which a batch takes at most a fraction of the original's time.

    Secant steps between the nearest slower and the nearest faster model.

    Args:
        build: Function from a fraction of the multiply-adds to (model, …).
        original: Original model.
        images: Images, of which the first ones are timed.
        latency: Fraction of the original's time.

    Returns:
        The largest model that was fast enough, within six steps.

    Raises:
        OptionError: A latency that was not reached.
    """
    target, original_seconds = latency, measure_latency(original, images)
    # (multiply-adds, time) of the nearest models on either side, as fractions
    slow, fast = (1.0, 1.0), (0.0, 0.0)
    best: Built | None = None
    for _ in range(MAX_SECANT_STEPS):
        try:
            built = build(target)
        except OptionError as error:
            if best is not None:
                return best
            raise OptionError(
                f"a latency of {latency} of the original's was not reached: {slow[1]:.2f} was, and {target:.2f} of the "
                f"multiply-adds is out of reach ({error})"
            ) from error
        measured = measure_latency(built[0], images) / original_seconds
        if measured > latency:
            slow = (target, measured)
        else:
            best, fast = built, (target, measured)
        if best is None:
            # The time falls more slowly than the multiply-adds: aim 10 % lower
            target *= 0.9 * latency / measured
        elif fast[1] >= LATENCY_TOLERANCE * latency or slow[1] <= fast[1]:
            break
        else:
            # Linear interpolation at the middle of the tolerated times
            time_target = (1 + LATENCY_TOLERANCE) / 2 * latency
            target = fast[0] + (slow[0] - fast[0]) * (time_target - fast[1]) / (slow[1] - fast[1])
    if best is not None:
        return best
    raise OptionError(
        f"a latency of {latency} of the original's was not reached: {slow[1]:.2f} at {slow[0]:.2f} of the "
        "multiply-adds. Widths that are multiples of 8 are faster on most machines: round_to=8"
    )


@dataclass(frozen=True)
class PruneConfig:
    """Options of `ki.prune`.

    Attributes:
        macs: Fraction of the original's multiply-adds to keep.
        params: Fraction of the original's parameters to keep.
        latency: Fraction of the original's time to keep.
        importance: "isomorphism" or an importance of torch-pruning.
        refit: Refit the weights.
        ignored: Names or globs of layers and modules that keep their widths.
        min_width: Minimum fraction of each width to keep.
        round_to: Divisor of all new widths.
        max_images: Maximum number of images.
        rows: Samples per feature of a layer's refit.
        ridge: Relative ridges of the refit.
        block_steps: Updates of each block.
        seed: Seed of the positions.
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    importance: Any = "isomorphism"
    refit: bool = True
    ignored: str | Collection[str] = ()
    min_width: Annotated[float, Range(0, 1, open_minimum=True)] = 0.125
    round_to: PositiveInt = 1
    max_images: PositiveInt = 1024
    rows: PositiveInt = REFIT_SAMPLES_PER_FEATURE
    ridge: float | Sequence[float] = RECONSTRUCTION_RIDGES
    block_steps: NonNegativeInt = 0
    seed: Seed = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "ridge", validate_ridges(self.ridge))
        validate_fields(self)
        kind, fraction = self.budget
        if not 0 < fraction < 1:
            raise OptionError(f"{kind} is the fraction of the original to keep, between 0 and 1; got {fraction!r}")
        if self.block_steps and not self.refit:
            raise OptionError("block_steps needs the refit: pass refit=True, or block_steps=0")

    @property
    def budget(self) -> tuple[BudgetKind, float]:
        """Kind of the budget, and the fraction of the original's to keep.

        Raises:
            OptionError: Several budgets.
        """
        kinds: tuple[BudgetKind, ...] = ("macs", "params", "latency")
        budgets = [(kind, float(value)) for kind in kinds if (value := getattr(self, kind)) is not None]
        if len(budgets) > 1:
            raise OptionError(f"give one budget, macs=, params= or latency=; got {dict(budgets)}")
        return budgets[0] if budgets else ("macs", 0.5)

    @property
    def ridges(self) -> tuple[float, ...]:
        """Ridges to choose from."""
        return validate_ridges(self.ridge)

    def settings(self) -> dict[str, Any]:
        """Return the settings for the report."""
        kind, fraction = self.budget
        names = ("refit", "min_width", "round_to", "rows", "block_steps", "seed")
        return {kind: fraction, "importance": str(self.importance), **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class PruneResult:
    """Result of `ki.prune`.

    Attributes:
        model: Pruned model, a plain module that does not need this library.
        report: Widths, costs and results of the refit; prints as a table.
        kept: Indices of the original's entries kept in each pruned tensor, see `pruning.track_kept_indices`.
        original: Original model.
    """

    model: nn.Module
    report: PruneReport
    kept: Mapping[str, KeptIndices]
    original: nn.Module

    def save(self, folder: str | Path, **options: Any) -> None:
        """Save the model for `ki.load_pruned`, the report and a model card; options are those of `ki.save_pruned`."""
        save_pruned(folder, self.model, self.original, kept=self.kept, **options)
        self.report.to_json(Path(folder) / "report.json")
        name, report = network_name(self.original), self.report
        argument = ", model=original" if options.get("factory") == "external" else ""
        write_model_card(
            folder,
            f"{name}, pruned",
            f"{name} after structured pruning in closed form (knowiso_train), with {report.images:,} unlabeled images.",
            f'import knowiso_train as ki\n\nmodel = ki.load_pruned("{Path(folder).name}"{argument})',
            tags=["pruned"],
            library="knowiso_train",
            figures={
                "multiply-adds of an image": f"{report.macs[1]:,.0f} of {report.macs[0]:,.0f}",
                "parameters": f"{report.parameters[1]:,} of {report.parameters[0]:,}",
            },
        )


def prune(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    importance: Any = "isomorphism",
    refit: bool = True,
    ignored: str | Collection[str] = (),
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
    """Return a smaller copy of a trained network, from some hundred images, without labels and without training.

    1. In every channel group outside residual streams, channels are removed one by one: each time the one whose removal
       costs its refitted consumers least. Attention loses whole heads.
    2. The sensitivity of the network's output to each group is measured, and widths of least total removal cost are
       allocated within the budget. Of two weightings, the one is taken whose quickly refitted network is nearer to the
       original on other images.
    3. In forward order, every layer is refitted in closed form to the original's outputs, on its inputs in the pruned
       network. Where one layer alone consumes a group, its channels are ranked again on these inputs.

    Args:
        model: Trained network, which is not modified.
        loader: Shuffled batches of images, of which the first ones are taken; labels are never read.
        macs: Fraction of the original's multiply-adds to keep, those of attention and recurrent layers included.
            Default: 0.5, without another budget.
        params: Fraction of the original's parameters of convolutions and linear layers to keep.
        latency: Fraction of the original's time for a batch to keep, by measurement on this machine. Odd widths can be
            slower than even ones, see `round_to`.
        importance: "isomorphism", or an importance of torch-pruning, whose scores then rank the channels. The same
            fraction of every group is removed in that case.
        refit: False keeps the surviving weights.
        ignored: Names or globs of layers, or of modules whose layers all keep their width. They are still refitted.
        min_width: Minimum fraction of each group's width to keep.
        round_to: New widths are multiples of it, except heads.
        max_images: Maximum number of images; they pass through the network at once in the refit.
        rows: Samples per input feature of each layer's refit.
        ridge: Relative ρ ≥ 0 of the refit, one or several to choose from.
        block_steps: Updates of each block, after its layers are solved once more in forward order, towards the output
            of the original's block, see `refit`. Gradients stay within one block; no labels. Default: none.
        forward: `forward(model, batch)` for networks that need more than images.
        seed: Seed of the positions.
        progress: Show progress bars.

    Raises:
        OptionError: A network that torch-pruning cannot trace, nothing to prune, a budget out of reach, or an option
            out of range.
        InputTypeError: An object that is no network, or no loader.
        DataError: No images.
        NonFiniteError: NaN or Inf, with the layer's name.

    Examples:
        >>> first = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
        >>> model = nn.Sequential(*first, nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        >>> pruned = prune(model, [torch.randn(64, 3, 12, 12)], macs=0.5, progress=False)
        >>> pruned.model[0].out_channels < 16, model[0].out_channels
        (True, 16)
        >>> pruned.report.macs[1] <= 0.5 * pruned.report.macs[0]
        True
    """
    checked_value("prune: progress", progress, bool)
    config = PruneConfig(
        macs=macs,
        params=params,
        latency=latency,
        importance=importance,
        refit=refit,
        ignored=ignored,
        min_width=min_width,
        round_to=round_to,
        max_images=max_images,
        rows=rows,
        ridge=ridge,
        block_steps=block_steps,
        seed=seed,
    )
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    original = unwrap_model(model)
    check_network(original)
    start = time.monotonic()
    images = Calibration(loader, config.max_images, device_of(original), forward)
    with preserve_state(original), torch.no_grad():
        builder = _prepare_builder(original, images, config, forward, progress)
        pruned, kept, fits, widths = _prune_to_budget(builder, config)
        blocks: list[BlockResult] = []
        if config.block_steps:
            fits, blocks = builder.finetune_blocks(pruned, kept, fits, config.block_steps)
        timed = config.budget[0] == "latency"
        times = (measure_latency(original, images), measure_latency(pruned, images)) if timed else None
        costs = tuple(count_macs(network, builder.batch, images.forward) for network in (original, pruned))
    report = PruneReport(
        widths=tuple(
            GroupWidth(group.name, group.kind, before=group.size, after=widths[group.name]) for group in builder.groups
        ),
        layers=tuple(fits),
        blocks=tuple(blocks),
        macs=(costs[0], costs[1]),
        parameters=(_num_parameters(original), _num_parameters(pruned)),
        latency=times,
        seconds=time.monotonic() - start,
        images=images.count,
        settings=config.settings(),
    )
    _check_smaller(report, type(original).__name__)
    _restore_training_state(pruned, original)
    return PruneResult(pruned, report, kept, original)


def _prepare_builder(
    original: nn.Module, images: Calibration, config: PruneConfig, forward: Forward | None, progress: bool
) -> PrunedModelBuilder:
    """Trace the network, find its channel groups and rank their channels."""
    batch = images.first(TRACE_IMAGES)
    epilogues = trace_model(original, batch, images.forward)
    if config.block_steps:
        finetunable_blocks(original, original, list(epilogues), images, config.block_steps)  # an error before long work
    groups = channel_groups(original, batch, epilogues, config.ignored, forward)
    if not groups:
        raise OptionError(
            f"nothing to prune in {type(original).__name__}: every width is ignored, or belongs to a residual stream, "
            f"an output, a norm over several channels or a parameter outside of Conv2d, Linear and batch norms"
            f"{_unsupported_layers(original)}. The model was not modified."
        )
    groups = usable_groups(copy_model(original), batch, groups, images.forward, config.round_to)
    reference = None
    if isinstance(config.importance, str) and config.importance == "isomorphism":
        ranking, reference = rank_by_isomorphism(
            original, groups, epilogues, images, config.seed, progress, config.rows if config.refit else None
        )
    else:
        ranking = rank_by_scores(original, batch, groups, config.importance, forward)
    return PrunedModelBuilder(
        original=original,
        groups=groups,
        epilogues=epilogues,
        images=images,
        batch=batch,
        ranking=ranking,
        refit=config.refit,
        rows=config.rows,
        ridges=config.ridges,
        seed=config.seed,
        progress=progress,
        reference=reference,
    )


def _unsupported_layers(model: nn.Module) -> str:
    """Return the end of the list of reasons that a network has nothing to prune: layers that are no `Conv2d`."""
    convolutions = {
        layer for layer in model.modules() if isinstance(layer, _ConvNd) and not isinstance(layer, nn.Conv2d)
    }
    kinds = sorted({type(layer).__name__ for layer in convolutions})
    return f", or to layers other than Conv2d and Linear ({', '.join(kinds)})" if kinds else ""


def _prune_to_budget(builder: PrunedModelBuilder, config: PruneConfig) -> BuildResult:
    """Build the pruned model within the budget."""
    kind, fraction = config.budget
    positions = count_positions(builder.original, builder.batch, builder.images.forward)
    costs = layer_costs(builder.original, builder.groups, positions, "params" if kind == "params" else "macs")
    if kind != "params":
        costs |= unlayered_costs(builder.original, builder.groups, costs, builder.batch, builder.images.forward)

    def build(target: float) -> BuildResult:
        candidates = builder.ranking.candidates(costs, target, config.min_width, config.round_to)
        widths = dict(builder.select_widths(candidates))
        if all(widths[group.name] == group.size for group in builder.groups):
            raise OptionError(
                f"a fraction of {target} leaves every width as it is (min_width={config.min_width}, "
                f"round_to={config.round_to}); nothing was pruned. Pass a smaller fraction"
            )
        return (*builder.build(widths), widths)

    if kind == "latency":
        return reach_latency(build, builder.original, builder.images, fraction)
    return build(fraction)


def _check_smaller(report: PruneReport, name: str) -> None:
    if report.macs[1] >= report.macs[0] and report.parameters[1] >= report.parameters[0]:
        raise OptionError(f"no channel was removed from {name}, whatever the budget; this network cannot be pruned")


def _restore_training_state(pruned: nn.Module, original: nn.Module) -> None:
    """Give the pruned model the modes of the original's modules and the gradient flags of its parameters."""
    for name, module in pruned.named_modules():
        module.training = original.get_submodule(name).training
    trainable = {name: parameter.requires_grad for name, parameter in original.named_parameters()}
    for name, parameter in pruned.named_parameters():
        # An added bias is trained if its weight is
        source = name if name in trainable else name.removesuffix("bias") + "weight"
        parameter.requires_grad_(trainable[source])


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
