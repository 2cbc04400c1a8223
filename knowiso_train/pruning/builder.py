"""Construction of pruned networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from knowiso_train.errors import OptionError
from knowiso_train.pruning.allocation import affordable
from knowiso_train.pruning.blocks import BlockFinetuner
from knowiso_train.pruning.calibration import Calibration
from knowiso_train.pruning.channel_groups import ChannelGroup, num_input_channels, remove_channels
from knowiso_train.pruning.index_tracking import track_kept_indices
from knowiso_train.pruning.kept_indices import KeptIndices, infer_kept_outputs
from knowiso_train.pruning.ranking import ChannelRanking
from knowiso_train.pruning.reconstruction import reconstruct
from knowiso_train.pruning.reference_outputs import ReferenceOutputs, record_reference_outputs
from knowiso_train.pruning.report import BlockResult, LayerFit
from knowiso_train.pruning.sensitivity import output_of
from knowiso_train.pruning.tracing import Epilogue
from knowiso_train.utils.batch import index_batch

# Images that widths are tried with, the share of others that judge, and how many of these it takes
TRIAL_IMAGES, VALIDATION_FRACTION, MIN_VALIDATION_IMAGES = (64, 256), 1 / 3, 8
# Multiply-adds of one pass of those that widths are tried with, within these: large networks take fewer
MAX_TRIAL_MACS = 2.5e11
# Rows per regressor in such a trial, and what there is to choose from
TRIAL_SAMPLES_PER_FEATURE, TRIAL_RIDGES = 20, (1e-2, 1.0, math.inf)
MAX_RELATIVE_ERROR = 1e-3  # relative: the cut network against the one whose readers only ignore what goes


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode, without gradients.

    Raises:
        OptionError: the network holds what cannot be copied, such as results that it caches in eval mode.

    Example:
        >>> copy_model(nn.Linear(2, 2)).training
        False
    """
    try:
        return copy.deepcopy(model).eval().requires_grad_(False)
    except RuntimeError as error:
        raise OptionError(
            f"{type(model).__name__} cannot be pruned: it cannot be copied ({error}). It is as it was"
        ) from error


@dataclass
class PrunedModelBuilder:
    """What it takes to make a smaller network, for any widths.

    Attributes:
        original: in eval mode, left as it is.
        groups: its channel groups.
        tails: what follows its layers.
        images: to refit on.
        few: a small batch, for tracing and checking.
        choice: which units go first.
        refit: whether weights are solved anew.
        rows: of each regression, per regressor.
        ridges: to choose from.
        seed: of the positions.
        progress: whether to show bars.
        target: what the original gives on the images; None has it made when it is needed.
    """

    original: nn.Module
    groups: Sequence[ChannelGroup]
    tails: Mapping[str, Epilogue]
    images: Calibration
    few: Any
    choice: ChannelRanking
    refit: bool
    rows: int
    ridges: tuple[float, ...]
    seed: int
    progress: bool
    target: ReferenceOutputs | None = None

    @torch.no_grad()
    def best(self, candidates: Sequence[Mapping[str, int]]) -> Mapping[str, int]:
        """The widths that leave the output nearest to the original's, by a quick refit of each on some images, judged on others.

        Near in squared distance: images that trained the original make its logits sure of themselves, so that their
            divergence tells less. Rectifiers
        are not minded here: that takes longer, and preferred the same widths wherever both were tried (ResNet-56,
            EfficientNet-Lite0).
        """
        if len(candidates) < 2 or not self.refit:
            return candidates[0]
        fitted = min(
            affordable(self.original, self.images, MAX_TRIAL_MACS, TRIAL_IMAGES),
            round((1 - VALIDATION_FRACTION) * self.images.count),
        )
        judged = min(round(VALIDATION_FRACTION / (1 - VALIDATION_FRACTION) * fitted), self.images.count - fitted)
        if judged < MIN_VALIDATION_IMAGES:
            return candidates[0]
        both = self.images.first(fitted + judged)
        images = Calibration([index_batch(both, torch.arange(fitted))], fitted, None, self.images.forward)
        others = index_batch(both, torch.arange(fitted, fitted + judged))
        tails = {name: replace(tail, limits=None) for name, tail in self.tails.items()}
        target = record_reference_outputs(
            self.original,
            dict(self.original.named_modules()),
            tails,
            images,
            TRIAL_SAMPLES_PER_FEATURE,
            self.seed,
            False,
        )
        wanted = output_of(self.images.forward(self.original, others))
        found, ridges = [], TRIAL_RIDGES if len(self.ridges) > 1 else self.ridges
        for widths in tqdm(candidates, desc="widths", unit="choice", disable=not self.progress):
            small = copy_model(self.original)
            removed = self._removed(widths)
            layers, masks = dict(small.named_modules()), self._masks(small, removed)
            reconstruct(small, layers, tails, target, images, masks=masks, ridge=ridges, quiet=True, progress=False)
            found.append(float((output_of(self.images.forward(small, others)) - wanted).square().sum()))
        return candidates[found.index(min(found))]

    @torch.no_grad()
    def make(self, widths: Mapping[str, int]) -> tuple[nn.Module, dict[str, KeptIndices], list[LayerFit]]:
        """The network, what was kept of each tensor, and what the refit did to each layer.

        Raises:
            OptionError: a network in which taking channels out is not the same as not reading them.
        """
        small = copy_model(self.original)
        removed = self._removed(widths)
        fits = self._refitted(small, widths, removed) if self.refit else []
        silenced = self._silenced(small, removed)
        with track_kept_indices(small) as kept:
            remove_channels(small, self.few, self.groups, removed, self.images.forward)
        small.eval().requires_grad_(False)
        self._check(small, silenced)
        return small, kept, fits

    @torch.no_grad()
    def rebuilt(
        self, small: nn.Module, kept: Mapping[str, KeptIndices], fits: Sequence[LayerFit], steps: int
    ) -> tuple[list[LayerFit], list[BlockResult]]:
        """Solve the layers of a network of `make` once more, in place, and tune each block as a whole when its layers are solved.

        Returns:
            What became of each layer since `fits`, and of each block.

        Raises:
            OptionError: no blocks.
        """
        outputs = infer_kept_outputs(self.original, small, self.tails, kept)
        blocks = BlockFinetuner.from_original(self.original, small, list(self.tails), self.images, steps, self.seed)
        again = reconstruct(
            small,
            dict(small.named_modules()),
            self.tails,
            self._originals(),
            self.images,
            outputs=outputs,
            ridge=self.ridges,
            blocks=blocks,
            progress=self.progress,
        )
        return [replace(new, before=old.before) for old, new in zip(fits, again, strict=True)], blocks.results

    def _removed(self, widths: Mapping[str, int]) -> dict[str, list[int]]:
        """Units that go, by group."""
        return {group.name: self.choice.orders[group.name][: group.size - widths[group.name]] for group in self.groups}

    def _originals(self) -> ReferenceOutputs:
        if self.target is None:
            modules = dict(self.original.named_modules())
            self.target = record_reference_outputs(
                self.original, modules, self.tails, self.images, self.rows, self.seed, self.progress
            )
        return self.target

    def _refitted(self, small: nn.Module, widths: Mapping[str, int], removed: dict[str, list[int]]) -> list[LayerFit]:
        """Refit in place; groups that are chosen again on the way are entered into `removed`."""
        layers = dict(small.named_modules())
        later = self.choice.again(layers, self.groups, widths)
        masks = self._masks(small, {name: units for name, units in removed.items() if name not in later})
        choosers = {chooser.reader: chooser for chooser in later.values()}
        fits = reconstruct(
            small,
            layers,
            self.tails,
            self._originals(),
            self.images,
            masks=masks,
            choose=choosers,
            ridge=self.ridges,
            progress=self.progress,
        )
        removed.update({name: chooser.removed for name, chooser in later.items()})
        return fits

    def _masks(self, small: nn.Module, removed: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """For each reader, the input channels that stay."""
        masks: dict[str, Tensor] = {}
        for group in self.groups:
            if removed.get(group.name):
                inputs = {name: num_input_channels(small.get_submodule(name)) for name in group.readers}
                for name, mask in group.masks(inputs, removed[group.name]).items():
                    masks[name] = masks.get(name, torch.ones_like(mask)) & mask
        return masks

    def _silenced(self, small: nn.Module, removed: Mapping[str, Sequence[int]]) -> Any:
        """Zero weights for what goes, also where nothing was refitted; gives the outputs."""
        for name, mask in self._masks(small, removed).items():
            layer: Any = small.get_submodule(name)
            convs = getattr(layer, "groups", 1)
            # (C_out, C_in of its group)
            left = mask.view(convs, 1, -1).expand(-1, len(layer.weight) // convs, -1).flatten(0, 1)
            layer.weight.mul_(left.view(*left.shape, *[1] * (layer.weight.ndim - 2)).to(layer.weight))
        return self.images.forward(small, self.few)

    def _check(self, small: nn.Module, silenced: Any) -> None:
        kind = type(self.original).__name__
        try:
            after = self.images.forward(small, self.few)
        except RuntimeError as error:
            raise OptionError(
                f"{kind} cannot be pruned: its forward pass does not fit its new widths ({error}). It is as it was"
            ) from error
        wanted, got = (list(filter(torch.is_tensor, tree_leaves(output))) for output in (silenced, after))
        shapes = [tuple(map(tuple, (a.shape for a in part))) for part in (wanted, got)]
        if shapes[0] != shapes[1]:
            first = next((a, b) for a, b in zip_longest(*shapes) if a != b)
            raise OptionError(
                f"{kind} cannot be pruned: a width reaches its output, of which a part would be {first[1]} and not {first[0]}. It is as it was; pass "
                "the modules that make it as ignored="
            )
        numbers = [(a.double(), b.double()) for a, b in zip(wanted, got, strict=True) if a.numel()]
        apart = max(
            (float((b - a).abs().max()) / float(a.abs().max().clamp_min(1e-12)) for a, b in numbers), default=0.0
        )
        if not apart <= MAX_RELATIVE_ERROR:
            raise OptionError(
                f"{kind} cannot be pruned: taking channels out is not the same there as not reading them (outputs differ by {apart:.1e}). "
                "It is as it was; pass the modules concerned as ignored="
            )
