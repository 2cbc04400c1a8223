"""Fine-tuning of a pruned network towards its original."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from knowiso_train.distillation.kd import WeightSchedule
from knowiso_train.errors import DataError, InputTypeError, NonFiniteError, OptionError, ShapeError
from knowiso_train.features.modules import resolve_layers, unwrap_model
from knowiso_train.features.state import device_of, preserve_state
from knowiso_train.optim import OrthogonalMomentum, split_parameters
from knowiso_train.pruning.calibration import Calibration, Forward, check_counts
from knowiso_train.pruning.finetune_targets import (
    Objective,
    ReferenceCache,
    Validator,
    distance,
    forward_with_features,
    labels_of,
)
from knowiso_train.pruning.report import FinetuneReport
from knowiso_train.pruning.tracing import comparable_blocks
from knowiso_train.utils.batch import get_inputs, index_batch, replace_inputs

DEFAULT_STEPS = 200

MIN_FINETUNE_IMAGES = 8  # images
NUM_VALIDATIONS = 8  # in a run, besides the one before it
WARMUP_FRACTION = 0.05
BIAS_LR_FACTOR = 0.05  # of the learning rate, for norms and biases: Adam's steps are absolute
ADAM_BETAS_SHORT_RUN = (0.9, 0.99)  # the second moment must settle within a short run


def two_networks(pruned: Any, original: Any) -> tuple[nn.Module, nn.Module]:
    """The bare networks.

    Raises:
        InputTypeError: no network.
        OptionError: one network twice.
    """
    for role, model in (("pruned", pruned), ("original", original)):
        if not isinstance(model, nn.Module):
            raise InputTypeError(f"{role}: expected a torch.nn.Module, got {type(model).__name__}")
    small, whole = unwrap_model(pruned), unwrap_model(original)
    if small is whole:
        raise OptionError("pruned and original are the same network")
    return small, whole


def check_numbers(lr: float, batch_size: int, temperature: float, held_out: float, others: Sequence[float]) -> None:
    """Raises:
    OptionError: a number without meaning; the others are the weights of the loss and the memory.
    """
    check_counts(batch_size=batch_size)
    if not all(isinstance(value, (int, float)) for value in (lr, temperature, held_out, *others)):
        raise OptionError(
            f"lr, temperature, held_out, the weights and memory must be numbers, got {', '.join(map(repr, (lr, temperature, held_out, *others)))}"
        )
    if not 0 < lr < math.inf or not 0 < temperature < math.inf or not 0 < held_out < 1:
        raise OptionError(
            f"expected lr > 0, temperature > 0 and 0 < held_out < 1, got {lr!r}, {temperature!r} and {held_out!r}"
        )
    if not all(0 <= value < math.inf for value in others):
        raise OptionError(
            f"feature_weight, logit_weight, label_weight and memory must be numbers >= 0, got {', '.join(map(repr, others))}"
        )


def count_updates(steps: int | None, epochs: float | None, count: int, batch_size: int) -> int:
    """Number of updates.

    Example:
        >>> count_updates(None, 2, 100, 32)
        6
    """
    if steps is not None and epochs is not None:
        raise OptionError(f"give steps or epochs, not both; got {steps!r} and {epochs!r}")
    total = (
        steps if steps is not None else DEFAULT_STEPS if epochs is None else math.ceil(epochs * (count // batch_size))
    )
    if not isinstance(total, int) or total < 1:
        raise OptionError(f"expected at least one step, as an integer, got steps={steps!r}, epochs={epochs!r}")
    return total


def compared_layers(
    small: nn.Module, whole: nn.Module, images: Calibration, layers: str | Sequence[str] | None
) -> list[str]:
    """Names of the layers whose outputs are compared.

    Raises:
        ShapeError: a layer that emits another shape in the pruned network.
        LayerNameError: no such layer.
    """
    few = images.first(2)
    if layers is None:
        return comparable_blocks(small, whole, lambda network: images.forward(network, few))
    names = resolve_layers(whole, layers) if layers else []
    with torch.no_grad():
        of_small, of_whole = (forward_with_features(images, network, names, few) for network in (small, whole))
    for name, feature in of_whole.features.items():
        if feature.shape != of_small.features[name].shape:
            raise ShapeError(
                f"layer {name!r} emits {tuple(of_small.features[name].shape)} in the pruned network and {tuple(feature.shape)} in the original; "
                "name layers whose width pruning left, such as the ends of blocks, or train with IsomorphismLoss, which takes any widths"
            )
    return names


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
    held_out: float = 0.125,
    frozen_statistics: bool = True,
    transform: Callable[[Tensor], Tensor] | None = None,
    memory: float = 1.0,
    forward: Forward | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FinetuneReport:
    """Train a pruned network, in place, to be what its original was, on the few images that pruned it. It needs no labels.

    The loss is the mean of `‖x_pruned - x_original‖² / Var(x_original)` at the ends of the blocks, where pruning left
    the widths, plus, where
    asked, the divergence of the logits and the cross-entropy with labels. Some images are held out: the weights with
    the least loss there are kept,
    those before the training included.

    Matrices move along orthogonalized momenta, see `OrthogonalMomentum`; norms and biases by Adam.

    Args:
        pruned: pruned from `original`, with the same layer names; parameters that are frozen stay as they are. Wrapped
            or not.
        original: the network before pruning, on the same device.
        loader: batches of images, see `knowiso_train.features.inputs_of`; shuffled, as the first ones are taken. They
            are held in memory.
        steps: updates; 200 where neither this nor `epochs` is given.
        epochs: passes over the images that are not held out.
        lr: longest step, relative to the norm of a weight; it rises over a twentieth of the steps and falls as a
            cosine.
        batch_size: images of an update.
        layers: names or globs of layers with equal shapes in both; None takes the blocks, see `shared_layers`. ()
            matches the logits alone.
        feature_weight: of the features' distance.
        logit_weight: of the logits' divergence; for outputs that are no logits (N, classes), of their relative squared
            distance. None is 0 where
            features are compared, and 1 where none can be: on images that trained the original its logits are sure of
            themselves, and say little.
        label_weight: of the cross-entropy with the labels, the second element of each batch, or its "label"; they are
            read where this is not 0.
            Images that trained the original have nothing new to say to it, and their labels pull the features away:
            keep it small there.
        temperature: of the logits.
        max_images: to look at.
        held_out: share of the images that choose and do not train.
        frozen_statistics: the network trains in eval mode, so that batch norms keep the statistics of the refit; False
            trains in training mode.
        transform: augmentation, from a batch of images to one; the original sees what it gives. `mix_patches` is worth
            its price, since
            the last layers learn a few images by heart; with labels it would mix these. None computes the original's
            features once.
        memory: GiB that these may take; above it the original runs in every step.
        forward: `forward(model, batch)` for networks that need more than images.
        seed: of the held-out part, the order and the augmentation.
        progress: whether to show a bar.

    Returns:
        What was held out says before, during and after; prints as a table.

    Raises:
        OptionError: options without meaning, or a network without anything to train.
        ShapeError: a layer or an output of another shape in the pruned network.
        DataError: too few images.
        InputTypeError: no network, no loader, no labels where they are to be read, or an output that is not one tensor.
        NonFiniteError: NaN or Inf in the loss. The weights are then as they were.

    Example:
        >>> import copy
        >>> original = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
        >>> pruned = copy.deepcopy(original)
        >>> pruned[0].weight.data += 0.1 * torch.randn_like(pruned[0].weight)
        >>> report = finetune(pruned, original, [torch.randn(64, 3, 6, 6)], steps=50, lr=1e-3, batch_size=16, progress=False)
        >>> report.after.divergence < report.before.divergence
        True
    """
    small, whole = two_networks(pruned, original)
    check_numbers(lr, batch_size, temperature, held_out, (feature_weight, logit_weight or 0.0, label_weight, memory))
    trained = [parameter for parameter in small.parameters() if parameter.requires_grad]
    if not trained:
        raise OptionError(
            "every parameter of the pruned network is frozen, as the original's are: call requires_grad_() on what is to be tuned"
        )
    if any(parameter.dtype == torch.float16 for parameter in trained):
        raise OptionError(
            "weights in float16 lose what small steps change: call float() on both networks, tune, and half() afterwards"
        )
    images = Calibration(
        loader, max_images, device_of(whole), forward or (_called if label_weight else None)
    )  # without one it keeps the inputs alone
    batch = images.concatenate()
    truth = labels_of(batch) if label_weight else None
    away = max(1, round(held_out * images.count))
    if images.count < MIN_FINETUNE_IMAGES or images.count - away < batch_size:
        raise DataError(
            f"{images.count} images, {away} of them held out, do not make a batch of {batch_size}: give {MIN_FINETUNE_IMAGES} or more, "
            f"and a batch_size of at most what is not held out"
        )
    total = count_updates(steps, epochs, images.count - away, batch_size)
    start = _weights(small)
    gradients = [parameter.grad for parameter in trained]

    with preserve_state(small, whole), torch.enable_grad():
        torch.manual_seed(seed)
        order = torch.Generator().manual_seed(seed)
        names = compared_layers(small, whole, images, layers) if feature_weight else []
        of_logits = logit_weight if logit_weight is not None else 0.0 if names else 1.0
        objective = Objective(feature_weight, of_logits, label_weight, temperature)
        targets = ReferenceCache(whole, names, images, batch, int(memory * 2**30) if transform is None else 0)
        mixed = torch.randperm(images.count, generator=order)
        chooser = Validator(small, targets, mixed[:away].sort().values, objective, truth)
        optimizers = _optimizers(small, lr)
        schedule = WeightSchedule(warmup=int(WARMUP_FRACTION * total), total=total + 1)
        checked = {round(total * (i + 1) / NUM_VALIDATIONS) for i in range(NUM_VALIDATIONS)}
        history = [chooser.check(0)]
        best = start
        losses: list[float] = []
        unread: list[Tensor] = []  # losses: reading one makes the host wait for a GPU
        waiting = mixed[away:][:0]
        for parameter in trained:
            parameter.grad = None
        try:
            for step in tqdm(range(total), "tune", unit="step", disable=not progress):
                if len(waiting) < batch_size:  # what an epoch leaves over is in another order the next time
                    waiting = mixed[away:][torch.randperm(images.count - away, generator=order)]
                index, waiting = waiting[:batch_size], waiting[batch_size:]
                seen = index_batch(batch, index)
                if transform is not None:
                    seen = replace_inputs(seen, transform(get_inputs(seen)))
                given = targets.of(index, None if transform is None else seen)
                _mode(small, not frozen_statistics)
                made = forward_with_features(images, small, names, seen)
                known = None if truth is None else truth[index.to(truth.device, non_blocking=True)]
                loss = objective(distance(made, given, targets), made.output, given.output, targets.output_scale, known)
                if not loss.requires_grad:
                    raise OptionError(
                        "what is trained has no part in what is compared; set logit_weight, or choose other layers"
                    )
                loss.backward()  # type: ignore[no-untyped-call]
                for optimizer, highest in optimizers:
                    optimizer.param_groups[0]["lr"] = highest * schedule(step + 1)
                    optimizer.step()
                    optimizer.zero_grad()
                unread.append(loss.detach())
                if step + 1 in checked or loss.device.type == "cpu":
                    for value in torch.stack(unread).tolist():
                        losses.append(value)
                        if not math.isfinite(value):
                            raise NonFiniteError(
                                f"NaN or Inf in the loss at step {len(losses)} of {total}, with lr={lr}; the weights are as they were"
                            )
                    unread.clear()
                if step + 1 in checked:
                    _mode(small, False)
                    history.append(chooser.check(step + 1))
                    if history[-1].objective < min(check.objective for check in history[:-1]):
                        best = _weights(small)
        except BaseException:
            small.load_state_dict(start)
            raise
        finally:
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient
        small.load_state_dict(best)
    return FinetuneReport(tuple(history), tuple(losses), tuple(names), images.count, targets.kept)


def _optimizers(small: nn.Module, lr: float) -> list[tuple[Optimizer, float]]:
    """Each with its highest learning rate."""
    matrices, rest = split_parameters(small)
    found: list[tuple[Optimizer, float]] = []
    if matrices:
        found.append((OrthogonalMomentum(matrices, lr), lr))
    if rest:
        found.append((torch.optim.Adam(rest, BIAS_LR_FACTOR * lr, betas=ADAM_BETAS_SHORT_RUN), BIAS_LR_FACTOR * lr))
    return found


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _called(model: nn.Module, batch: Any) -> Any:
    return model(get_inputs(batch))


def _mode(model: nn.Module, training: bool) -> None:
    for module in model.modules():
        module.training = training
