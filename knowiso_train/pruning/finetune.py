"""Fine-tuning of a pruned model towards its original."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from knowiso_train.distillation.kd import WeightSchedule
from knowiso_train.errors import InputTypeError, NonFiniteError, OptionError, ShapeError
from knowiso_train.features.calls import call_model
from knowiso_train.features.state import device_of, preserve_state, restore_on_error
from knowiso_train.optim import FINETUNE_WARMUP_FRACTION, build_optimizers
from knowiso_train.pruning._finetune_checks import (
    check_model_pair,
    check_trainable,
    resolve_compared_layers,
    trainable_parameters,
)
from knowiso_train.pruning._finetune_config import PruneFinetuneConfig
from knowiso_train.pruning._finetune_targets import (
    Objective,
    ReferenceCache,
    Validator,
    feature_distance,
    forward_with_features,
    shuffled_batches,
)
from knowiso_train.pruning._report import FinetuneReport, ValidationPoint
from knowiso_train.pruning._tracing import Forward
from knowiso_train.pruning.calibration import Calibration
from knowiso_train.utils.batch import get_inputs, labels_of, replace_inputs
from knowiso_train.utils.validation import checked_value

# Validations of a run, besides the one before the first step
NUM_VALIDATIONS = 8


def finetune(
    pruned: nn.Module,
    original: nn.Module,
    loader: Iterable[Any],
    *,
    steps: int | None = None,
    epochs: float | None = None,
    lr: float = 1e-2,
    batch_size: int = 64,
    layers: str | Sequence[str] | None = None,
    feature_weight: float = 1.0,
    logit_weight: float | None = None,
    label_weight: float = 0.0,
    temperature: float = 1.0,
    max_images: int = 1024,
    validation_fraction: float = 0.125,
    frozen_statistics: bool = True,
    transform: Callable[[Tensor], Tensor] | None = None,
    cache_gib: float = 1.0,
    forward: Forward | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FinetuneReport:
    """Fine-tune a pruned model in place to match the original's block outputs on the calibration images. No labels.

    The loss is the mean of `‖x_pruned - x_original‖² / Var(x_original)` over the outputs of the blocks, whose widths
    pruning did not change. Optional terms are the divergence of the logits and the cross-entropy with labels.

    Some images are held out for validation. The weights with the lowest loss on them are returned, those before the
    first step included. Matrices are trained by `Muon`, norms and biases by Adam.

    Args:
        pruned: Model pruned from `original`, with the same layer names. Frozen parameters are not trained.
        original: Model before pruning, on the same device.
        loader: Batches of images, shuffled, since the first ones are taken. They are held in memory.
        steps: Updates. Default: 200, unless `epochs` is given.
        epochs: Passes over the images that are not held out.
        lr: Peak step relative to the norm of a weight. Schedule: linear warm-up over 5 % of the steps, then a cosine.
        batch_size: Images of an update.
        layers: Names or globs of layers with equal output shapes in both models. Default: the blocks, see
            `comparable_blocks`. An empty sequence compares the outputs alone.
        feature_weight: Weight of the feature distance.
        logit_weight: Weight of the divergence of the logits, or of the relative squared distance of other outputs.
            Default: 0 if features are compared, else 1. On the original's own training images its logits are
            saturated and carry little information.
        label_weight: Weight of the cross-entropy with the labels: the second entry of each batch, or its "label".
            Labels of the original's own training images are already fitted, hence use a small weight there.
        temperature: Temperature of the divergence of the logits.
        max_images: Largest number of images.
        validation_fraction: Fraction of the images held out for the selection of weights.
        frozen_statistics: Train in eval mode, which keeps the batch-norm statistics of the refit.
        transform: Augmentation of a batch of images; the original's targets are computed on its output. `cutmix`
            reduces overfitting of the last layers, but mixes images of different labels. Default: none, and the
            original's features are computed once.
        cache_gib: Largest size of these features in GiB. Above it the original runs in every step.
        forward: Function `forward(model, batch)` for models that need more than images.
        seed: Seed of the held-out part, the order and the augmentation.
        progress: Show a progress bar.

    Returns:
        Validation results before, during and after training; prints as a table.

    Raises:
        OptionError: An option out of bounds, or a model without trainable parameters.
        ShapeError: A layer or an output has another shape in the pruned model, a parameter of it is larger than the
            original's, or labels do not fit the logits.
        DataError: Too few images, or missing labels.
        InputTypeError: Not a model, not a loader, an output that is not one tensor, or a `transform` without tensor.
        NonFiniteError: NaN or Inf in the loss. The model was not modified.

    Examples:
        >>> import copy
        >>> original = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
        >>> pruned = copy.deepcopy(original)
        >>> pruned[0].weight.data += 0.1 * torch.randn_like(pruned[0].weight)
        >>> options = {"steps": 50, "lr": 1e-3, "batch_size": 16, "progress": False}
        >>> report = finetune(pruned, original, [torch.randn(64, 3, 6, 6)], **options)
        >>> report.after.divergence < report.before.divergence
        True
    """
    config = PruneFinetuneConfig(
        steps=steps,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        layers=layers,
        feature_weight=feature_weight,
        logit_weight=logit_weight,
        label_weight=label_weight,
        temperature=temperature,
        max_images=max_images,
        validation_fraction=validation_fraction,
        frozen_statistics=frozen_statistics,
        cache_gib=cache_gib,
        seed=seed,
    )
    for name, function in (("transform", transform), ("forward", forward)):
        checked_value(f"finetune: {name}", function, Callable[..., Any] | None)
    checked_value("finetune: progress", progress, bool)
    pruned, original = check_model_pair(pruned, original)
    check_trainable(pruned)
    # Without a `forward`, Calibration drops the labels
    forward = forward or (_forward_images if config.label_weight else None)
    images = Calibration(loader, config.max_images, device_of(original), forward)
    with (
        preserve_state(pruned, original, updated=pruned.modules()),
        restore_on_error(pruned),
        torch.enable_grad(),
    ):
        torch.manual_seed(config.seed)
        run = _FinetuneRun(pruned, original, images, config, transform)
        run.train(progress)
    return run.report()


class _FinetuneRun:
    """State of one fine-tuning run, from its data to its results.

    Args:
        model: Pruned model, trained in place.
        original: Original model; both in eval mode.
        images: Calibration images.
        config: Settings.
        transform: Augmentation of a batch of images.
    """

    def __init__(
        self,
        model: nn.Module,
        original: nn.Module,
        images: Calibration,
        config: PruneFinetuneConfig,
        transform: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.model, self.config, self.transform = model, config, transform
        batch = images.concatenate()
        self.labels = labels_of(batch, "label_weight") if config.label_weight else None
        num_held_out = config.num_validation_images(images.count)
        self.num_steps = config.num_steps(images.count - num_held_out)
        layers = resolve_compared_layers(model, original, images, config.layers) if config.feature_weight else []
        default_logit_weight = 0.0 if layers else 1.0
        self.objective = Objective(
            config.feature_weight,
            default_logit_weight if config.logit_weight is None else config.logit_weight,
            config.label_weight,
            config.temperature,
        )
        cache_bytes = int(config.cache_gib * 2**30) if transform is None else 0
        self.references = ReferenceCache(original, layers, images, batch, cache_bytes)
        generator = torch.Generator().manual_seed(config.seed)
        index = torch.randperm(images.count, generator=generator)
        self.batches = shuffled_batches(index[num_held_out:], config.batch_size, generator)
        held_out = index[:num_held_out].sort().values
        self.validator = Validator(model, self.references, held_out, self.objective, self.labels)
        self.validations: list[ValidationPoint] = []
        self.losses: list[float] = []
        # Losses that are still on the device: reading one makes the host wait for it
        self.unread_losses: list[Tensor] = []

    def train(self, progress: bool) -> None:
        """Train the model and load the best weights."""
        validation_steps = {round(self.num_steps * (i + 1) / NUM_VALIDATIONS) for i in range(NUM_VALIDATIONS)}
        schedule = WeightSchedule(warmup=int(FINETUNE_WARMUP_FRACTION * self.num_steps), total=self.num_steps + 1)
        optimizers = build_optimizers(self.model, self.config.lr)
        parameters = trainable_parameters(self.model)
        gradients = [parameter.grad for parameter in parameters]
        best = _clone_state(self.model)
        self.validations.append(self.validator.evaluate(0))
        for parameter in parameters:
            parameter.grad = None
        try:
            for step in tqdm(range(1, self.num_steps + 1), "finetune", unit="step", disable=not progress):
                loss = self._loss(next(self.batches))
                loss.backward()  # type: ignore[no-untyped-call]
                for optimizer, peak_lr in optimizers:
                    optimizer.param_groups[0]["lr"] = peak_lr * schedule(step)
                    optimizer.step()
                    optimizer.zero_grad()
                self.unread_losses.append(loss.detach())
                if step in validation_steps or loss.device.type == "cpu":
                    self._read_losses()
                if step in validation_steps and self._validate(step):
                    best = _clone_state(self.model)
        finally:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
        self.model.load_state_dict(best)

    def report(self) -> FinetuneReport:
        """Return the results of the run."""
        references = self.references
        return FinetuneReport(
            validations=tuple(self.validations),
            losses=tuple(self.losses),
            layers=tuple(references.layers),
            images=references.images.count,
            cached=references.is_cached,
        )

    def _loss(self, index: Tensor) -> Tensor:
        """Return the objective of one training batch."""
        references, augmented = self.references, None
        batch = references.select(index)
        if self.transform is not None:
            inputs = self.transform(get_inputs(batch))
            if not isinstance(inputs, Tensor):
                raise InputTypeError(
                    "transform: expected a function that returns a tensor, got one that returns "
                    f"{type(inputs).__name__}. Return the augmented images"
                )
            if self.labels is not None and len(inputs) != len(index):
                raise ShapeError(
                    f"transform: expected one image for each of {len(index)} labels, got {len(inputs)}. Return all "
                    "images, or leave label_weight at 0"
                )
            batch = augmented = replace_inputs(batch, inputs)
        reference = references.get(index, augmented)
        _set_training(self.model, not self.config.frozen_statistics)
        outputs = forward_with_features(references.images, self.model, references.layers, batch)
        distance = feature_distance(outputs, reference, references.variances)
        labels = None if self.labels is None else self.labels[index.to(self.labels.device, non_blocking=True)]
        loss = self.objective(distance, outputs.output, reference.output, references.output_variance, labels)
        if not loss.requires_grad:
            raise OptionError(
                "no trainable parameter has an effect on the compared outputs. Set logit_weight, or choose other layers"
            )
        return loss

    def _read_losses(self) -> None:
        """Move the losses since the last reading to the host, and check them."""
        for value in torch.stack(self.unread_losses).tolist():
            self.losses.append(value)
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"NaN or Inf in the loss at step {len(self.losses)} of {self.num_steps}, with lr={self.config.lr}. "
                    "The model was not modified; try a smaller lr"
                )
        self.unread_losses.clear()

    def _validate(self, step: int) -> bool:
        """Evaluate the held-out images, and return True for the lowest objective yet."""
        _set_training(self.model, False)
        best = min(point.objective for point in self.validations)
        self.validations.append(self.validator.evaluate(step))
        return self.validations[-1].objective < best


def _clone_state(model: nn.Module) -> dict[str, Tensor]:
    # The dict itself holds the versions of the modules, which some of them check
    state = model.state_dict()
    state.update({name: value.detach().clone() for name, value in state.items()})
    return state


def _forward_images(model: nn.Module, batch: Any) -> Any:
    return call_model(model, get_inputs(batch))


def _set_training(model: nn.Module, training: bool) -> None:
    # Flags, not train(): models may override train()
    for module in model.modules():
        module.training = training
