"""Construction of pruned models for given widths."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from knowiso_train.errors import OptionError
from knowiso_train.pruning._blocks import BlockFinetuner
from knowiso_train.pruning._channel_group import ChannelGroup
from knowiso_train.pruning._channel_groups import remove_channels
from knowiso_train.pruning._group_trial import input_masks, mask_weights, output_failure
from knowiso_train.pruning._ranking import ChannelRanking, output_tensor
from knowiso_train.pruning._report import BlockResult, LayerFit
from knowiso_train.pruning._structure import restore_memory_format
from knowiso_train.pruning._tracing import Epilogue
from knowiso_train.pruning.allocation import affordable_images, count_macs
from knowiso_train.pruning.calibration import Calibration
from knowiso_train.pruning.index_tracking import track_kept_indices
from knowiso_train.pruning.kept_indices import KeptIndices, infer_kept_outputs
from knowiso_train.pruning.layer_samples import ReferenceOutputs, record_reference_outputs
from knowiso_train.pruning.reconstruction import reconstruct

Quality = Literal["fast", "full"]

TRIAL_IMAGES = (64, 256)  # minimum and maximum number of images of a trial refit
MAX_TRIAL_MACS = 2.5e11  # multiply-adds of one pass of them
TRIAL_VALIDATION_FRACTION = 1 / 3  # fraction of the images of a trial that compare the refitted models
MIN_TRIAL_VALIDATION_IMAGES = 8
TRIAL_SAMPLES_PER_FEATURE, TRIAL_RIDGES = 20, (1e-2, 1.0, math.inf)


def copy_model(model: nn.Module) -> nn.Module:
    """Return a deep copy in eval mode, without gradients; tensors cached by its modules are copied without history.

    Raises:
        OptionError: A network with state that cannot be copied.

    Examples:
        >>> copy_model(nn.Linear(2, 2)).training
        False
    """
    attributes = [vars(module) for module in model.modules()]
    # torch copies leaves of the autograd graph only
    cached = {
        id(value): value.detach().clone()
        for value in tree_leaves(attributes)
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        copied = copy.deepcopy(model, cached).requires_grad_(False)
    except Exception as error:  # of modules that define how they are copied
        raise OptionError(
            f"{type(model).__name__} cannot be pruned: it cannot be copied ({error}). The model was not modified."
        ) from error
    # Flags instead of .eval(), which may clear caches: the copy has the operations of the original
    for module in copied.modules():
        module.training = False
    return copied


@dataclass(frozen=True)
class _RefitData:
    """Data of a reconstruction.

    Attributes:
        images: Images to refit on.
        epilogues: Epilogues of the layers.
        reference: Targets on these images.
        ridges: Ridges to choose from.
    """

    images: Calibration
    epilogues: Mapping[str, Epilogue]
    reference: ReferenceOutputs
    ridges: tuple[float, ...]


@dataclass
class PrunedModelBuilder:
    """Builder of pruned models for any widths.

    Attributes:
        original: Original model in eval mode, which is not modified.
        groups: Its channel groups.
        epilogues: Epilogues of its layers.
        images: Images to refit on.
        batch: Small batch, to trace and to compare outputs.
        ranking: Order of removal of the units of each group.
        refit: Refit the weights.
        rows: Samples per feature of a full refit.
        ridges: Ridges to choose from.
        seed: Seed of the positions.
        progress: Show progress bars.
        reference: Outputs of the original on `images`. Default: recorded when needed.
    """

    original: nn.Module
    groups: Sequence[ChannelGroup]
    epilogues: Mapping[str, Epilogue]
    images: Calibration
    batch: Any
    ranking: ChannelRanking
    refit: bool
    rows: int
    ridges: tuple[float, ...]
    seed: int
    progress: bool
    reference: ReferenceOutputs | None = None
    _trial_data: _RefitData | None = field(default=None, init=False)

    @torch.no_grad()
    def select_widths(self, candidates: Sequence[Mapping[str, int]]) -> Mapping[str, int]:
        """Return the widths whose quickly refitted model has the output nearest to the original's, on other images."""
        fit, validation = self._num_trial_images()
        if len(candidates) < 2 or not self.refit or validation < MIN_TRIAL_VALIDATION_IMAGES:
            return candidates[0]
        batch = self.images.slice(fit, fit + validation).concatenate()
        expected = output_tensor(self.images.forward(self.original, batch))
        errors: list[float] = []
        for widths in tqdm(candidates, desc="widths", unit="choice", disable=not self.progress):
            model = copy_model(self.original)
            self._reconstruct(model, "fast", masks=input_masks(self.original, self.groups, self._removed_units(widths)))
            # ‖f_w(x) - f(x)‖². Not the KL divergence: the original is overconfident on its training images
            errors.append(float((output_tensor(self.images.forward(model, batch)) - expected).square().sum()))
        return candidates[errors.index(min(errors))]

    @torch.no_grad()
    def build(self, widths: Mapping[str, int]) -> tuple[nn.Module, dict[str, KeptIndices], list[LayerFit]]:
        """Build the model of these widths.

        Returns:
            Pruned model, kept indices of each tensor, and the result of the refit for each layer.

        Raises:
            OptionError: A network in which removing channels differs from ignoring them.
        """
        model = copy_model(self.original)
        removed = self._removed_units(widths)
        fits: list[LayerFit] = []
        if self.refit:
            deferred = self.ranking.deferred(dict(model.named_modules()), self.groups, widths)
            fits = self._reconstruct(
                model,
                "full",
                masks=input_masks(
                    self.original, self.groups, {name: units for name, units in removed.items() if name not in deferred}
                ),
                rankings={ranking.consumer: ranking for ranking in deferred.values()},
            )
            removed.update({name: ranking.removed for name, ranking in deferred.items()})
        mask_weights(model, input_masks(self.original, self.groups, removed))
        expected = self.images.forward(model, self.batch)
        with track_kept_indices(model) as kept:
            remove_channels(model, self.batch, self.groups, removed, self.images.forward)
        restore_memory_format(model, self.original)
        model.eval().requires_grad_(False)
        self._check_output(model, expected)
        return model, kept, fits

    @torch.no_grad()
    def finetune_blocks(
        self, model: nn.Module, kept: Mapping[str, KeptIndices], fits: Sequence[LayerFit], steps: int
    ) -> tuple[list[LayerFit], list[BlockResult]]:
        """Reconstruct a built model again, in place, and fine-tune each block after its layers are solved.

        Args:
            model: Result of `build`.
            kept: Its kept indices.
            fits: Results of its refit.
            steps: Updates of each block.

        Returns:
            Result for each layer, relative to before `fits`, and for each block.

        Raises:
            OptionError: A model without blocks.
        """
        outputs = infer_kept_outputs(self.original, model, self.epilogues, kept)
        blocks = BlockFinetuner.from_original(self.original, model, list(self.epilogues), self.images, steps, self.seed)
        later_fits = self._reconstruct(model, "full", outputs=outputs, blocks=blocks)
        return [replace(new, before=old.before) for old, new in zip(fits, later_fits, strict=True)], blocks.results

    def _reconstruct(self, model: nn.Module, quality: Quality, **options: Any) -> list[LayerFit]:
        """Refit a model in place; options are those of `reconstruct`."""
        data, full = self._refit_data(quality), quality == "full"
        options |= {"ridges": data.ridges, "warn": full, "progress": full and self.progress}
        return reconstruct(model, data.epilogues, data.reference, data.images, **options)

    def _refit_data(self, quality: Quality) -> _RefitData:
        if quality == "full":
            if self.reference is None:
                self.reference = record_reference_outputs(
                    self.original, self.epilogues, self.images, self.rows, self.seed, self.progress
                )
            return _RefitData(self.images, self.epilogues, self.reference, self.ridges)
        if self._trial_data is None:
            count, _ = self._num_trial_images()
            images = Calibration([self.images.first(count)], count, None, self.images.forward)
            # Without ReLU-aware targets, which are slower and led to the same widths (ResNet-56, EfficientNet-Lite0)
            epilogues = {name: replace(item, activation_range=None) for name, item in self.epilogues.items()}
            reference = record_reference_outputs(
                self.original, epilogues, images, TRIAL_SAMPLES_PER_FEATURE, self.seed, progress=False
            )
            ridges = TRIAL_RIDGES if len(self.ridges) > 1 else self.ridges
            self._trial_data = _RefitData(images, epilogues, reference, ridges)
        return self._trial_data

    def _num_trial_images(self) -> tuple[int, int]:
        """Return the numbers of images for trial refits and for their validation."""
        macs = count_macs(self.original, self.images.first(1), self.images.forward)
        fit = min(
            affordable_images(macs, MAX_TRIAL_MACS, TRIAL_IMAGES),
            round((1 - TRIAL_VALIDATION_FRACTION) * self.images.count),
        )
        validation = round(TRIAL_VALIDATION_FRACTION / (1 - TRIAL_VALIDATION_FRACTION) * fit)
        return fit, min(validation, self.images.count - fit)

    def _removed_units(self, widths: Mapping[str, int]) -> dict[str, list[int]]:
        order = self.ranking.removal_order
        return {group.name: order[group.name][: group.size - widths[group.name]] for group in self.groups}

    def _check_output(self, model: nn.Module, expected: Any) -> None:
        """Compare the output of a pruned model with that of the model with masked channels."""
        name = type(self.original).__name__
        try:
            output = self.images.forward(model, self.batch)
        except RuntimeError as error:
            raise OptionError(
                f"{name} cannot be pruned: its forward pass does not fit its new widths ({error}). The model was not "
                "modified."
            ) from error
        if (reason := output_failure(expected, output)) is not None:
            raise OptionError(
                f"{name} cannot be pruned: {reason}. The model was not modified; pass the modules concerned as ignored="
            )
