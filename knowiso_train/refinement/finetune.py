"""Fine-tuning towards the consensus of peers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from knowiso_train.distillation.kd import WeightSchedule, kd_loss
from knowiso_train.distillation.loss import IsomorphismLoss
from knowiso_train.errors import DataError, NonFiniteError, OptionError
from knowiso_train.features.modules import unwrap_model
from knowiso_train.features.state import device_of, preserve_state
from knowiso_train.refinement.models import ClassifierModel, pooled_layer
from knowiso_train.refinement.peers import Logits, PeerEnsemble
from knowiso_train.utils.batch import get_inputs, labels_of


@dataclass(frozen=True)
class RefineFinetuneConfig:
    """Settings of the training.

    Attributes:
        steps: updates; each takes one batch of labeled and one of unlabeled images, where there are such.
        lr: highest learning rate of SGD with momentum 0.9; it rises over a twentieth of the steps and falls as a
            cosine.
        weight_decay: of every parameter.
        consensus_weight: of the consensus loss.
        kd_weight: of the distance to `targets`.
        targets: "ensemble", the mean of what the frozen original and the peers say, where the peers tell the same
            classes apart or labels gave them
            classifiers; "own", the frozen original alone.
        temperature: of these.
        layers: of the network; None takes what its classifier reads.
        peer_layers: {own layer: peer layer}, one for all peers or one for each; None takes the same names, or with
            `layers=None` what their
            classifiers read.
        max_grad_norm: largest norm of the gradient.
        freeze_batch_norm: batch norms keep their statistics, as small sets of images need.
        seed: of dropout.

    Raises:
        OptionError: a value without meaning.
    """

    steps: int = 200
    lr: float = 0.003
    weight_decay: float = 1e-4
    consensus_weight: float = 1.0
    kd_weight: float = 1.0
    temperature: float = 2.0
    targets: str = "ensemble"
    max_grad_norm: float = 1.0
    layers: Sequence[str] | None = None
    peer_layers: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None
    freeze_batch_norm: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise OptionError(f"steps must be an integer of at least 0, got {self.steps!r}")
        if self.targets not in ("ensemble", "own"):
            raise OptionError(f'targets must be "ensemble" or "own", got {self.targets!r}')
        for name in ("lr", "temperature", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise OptionError(f"{name} must be positive, got {getattr(self, name)!r}")
        for name in ("weight_decay", "consensus_weight", "kd_weight"):
            if not getattr(self, name) >= 0:
                raise OptionError(f"{name} must be at least 0, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def finetune_schedules(
    method: str, settings: RefineFinetuneConfig, *, labels: bool, peers: bool
) -> list[tuple[str, RefineFinetuneConfig]]:
    """What `refine` trains towards, and how. There may be more in the labels than in any consensus, and only validation images can tell.

    Args:
        method: of `refine`.
        settings: as given.
        labels: whether there are labeled images.
        peers: whether any is useful.

    Example:
        >>> [towards for towards, _ in finetune_schedules("auto", RefineFinetuneConfig(), labels=True, peers=True)]
        ['the consensus', 'the labels']
    """
    found = [("the consensus", settings)] if peers else []
    if method == "auto" and labels:
        found.append(("the labels", replace(settings, consensus_weight=0.0, kd_weight=0.0)))
    return found


def resolve_consensus_layers(
    settings: RefineFinetuneConfig, own: ClassifierModel, peers: Sequence[ClassifierModel], batch: Any
) -> RefineFinetuneConfig:
    """The settings with the layers named where they were not: what the classifiers read.

    Args:
        settings: as given.
        own: in eval mode.
        peers: likewise.
        batch: of images.

    Raises:
        OptionError: no such layer, or a peer with a transform of its own.
    """
    for peer in peers:
        _bridge(peer, own)
    if settings.layers:
        return settings
    layer = pooled_layer(own, batch)
    layers = (
        settings.peer_layers
        if settings.peer_layers is not None
        else [{layer: pooled_layer(peer, batch)} for peer in peers]
    )
    return replace(settings, layers=[layer], peer_layers=layers)


def finetune_classifier(
    start: nn.Module,
    own: ClassifierModel,
    peers: Sequence[ClassifierModel],
    loader: Iterable[Any],
    labeled: Iterable[Any] | None,
    settings: RefineFinetuneConfig,
    *,
    heads: Mapping[int, Logits] | None = None,
    progress: bool = False,
) -> nn.Module:
    """A copy of `start`, trained on labels (cross-entropy), towards the consensus of its frozen original with the peers, and towards their logits.

    With both weights 0 this is training on the labels alone, and needs no peers; then unlabeled images are not looked
    at.

    Args:
        start: the network with the classifier that it starts from; left as it is.
        own: what is refined, for its transform.
        peers: useful ones.
        loader: unlabeled images; their labels, if any, are not read.
        labeled: images with labels, or None.
        settings: of the training.
        heads: by place in `peers`, what gives a peer's logits from its pooled features; None takes their own where they
            tell as many classes apart.
        progress: show a progress bar.

    Returns:
        A plain network in eval mode.

    Raises:
        OptionError: no peers, or no layer that gives the classifier what it reads.
        NonFiniteError: the loss is NaN or Inf.
        DataError: a loader without images.
    """
    compares = bool(settings.consensus_weight or settings.kd_weight)
    if compares and not peers:
        raise OptionError("no useful peer is left; there is no consensus to train towards")
    with preserve_state(start, *(peer.model for peer in peers)):
        torch.manual_seed(settings.seed)
        teacher = copy.deepcopy(unwrap_model(start)).eval().requires_grad_(False)
        student = copy.deepcopy(unwrap_model(start)).requires_grad_(True)
        _training_mode(student, settings.freeze_batch_norm)
        unlabeled = _batches(loader, "unlabeled images") if compares or labeled is None else None
        known = None if labeled is None else _batches(labeled, "labeled images")
        iso = (
            consensus_loss(student, teacher, own, peers, next(_batches(loader, "unlabeled images")), settings)
            if compares
            else None
        )
        optimizer = torch.optim.SGD(
            student.parameters(), lr=settings.lr, momentum=0.9, weight_decay=settings.weight_decay, nesterov=True
        )
        schedule = WeightSchedule(warmup=max(1, settings.steps // 20), total=max(2, settings.steps))
        asked = PeerEnsemble(peers, heads, own.classes if compares and settings.targets == "ensemble" else 0)
        with iso or nullcontext(), asked as told:
            for step in tqdm(range(settings.steps), desc="consensus", unit="step", disable=not progress):
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr * schedule(step)
                batch, few = (None if source is None else next(source) for source in (unlabeled, known))
                _step(student, iso, told, optimizer, batch, few, own.transform, settings, step)
    return student.eval()


def _step(
    student: nn.Module,
    iso: IsomorphismLoss | None,
    told: PeerEnsemble,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    known: Any,
    transform: Callable[[Any], Any] | None,
    settings: RefineFinetuneConfig,
    step: int,
) -> None:
    labels = None if known is None else labels_of(known, "labeled images").to(device_of(student) or "cpu")
    logits: Tensor = student(
        torch.cat([_prepared(part, student, transform) for part in (known, batch) if part is not None])
    )
    loss = 0.0 * logits.sum()
    if iso is not None:
        loss = settings.consensus_weight * iso()  # runs the frozen original and the peers
        loss = loss + settings.kd_weight * kd_loss(
            logits, told.targets(iso.teacher_output, settings.temperature), settings.temperature
        )
    if labels is not None:
        loss = loss + F.cross_entropy(logits[: len(labels)], labels)
    if not math.isfinite(float(loss.detach())):
        raise NonFiniteError(f"the loss is {float(loss.detach())} at step {step}; try a lower learning rate")
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    # A classifier in closed form can have large weights
    torch.nn.utils.clip_grad_norm_(student.parameters(), settings.max_grad_norm)
    optimizer.step()


def _training_mode(model: nn.Module, freeze_batch_norm: bool) -> None:
    model.train()
    if freeze_batch_norm:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = False


def consensus_loss(
    student: nn.Module,
    teacher: nn.Module,
    own: ClassifierModel,
    peers: Sequence[ClassifierModel],
    batch: Any,
    settings: RefineFinetuneConfig,
) -> IsomorphismLoss:
    """The loss towards what the peers reproduce of the teacher's features, at the layers that classifiers read where the settings name none.

    Args:
        student: to be trained, on its device.
        teacher: the frozen network that it began as.
        own: for its transform.
        peers: useful ones.
        batch: of images, as the loader gives them.
        settings: of the training.

    Raises:
        OptionError: no such layer, or a peer with a transform of its own.
    """
    settings = resolve_consensus_layers(settings, replace(own, model=teacher), peers, batch)
    first = _prepared(batch, student, own.transform)
    iso = IsomorphismLoss(
        student,
        teacher,
        list(settings.layers or ()),
        target="consensus",
        peers=[peer.model for peer in peers],
        peer_layers=settings.peer_layers,
        peer_transforms=[_bridge(peer, own) for peer in peers],
        example=first[:2],
    )
    return iso.to(first.device)


def _bridge(peer: ClassifierModel, own: ClassifierModel) -> Callable[[Any], Any] | None:
    """From what the network saw to what the peer is given: the loss hands peers the former, so they need the same transform, or one from there."""
    if own.transform is None:
        return peer.transform
    if peer.transform == own.transform:
        return None
    raise OptionError(
        f"{peer.name} has another transform than the network. In training peers see what the network sees: "
        "apply the network's transform in the loader, and let peer_transforms bring its inputs to the peers (recipes/refine.py does)"
    )


def _batches(loader: Iterable[Any], what: str) -> Iterator[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise DataError(f"the loader of {what} gave no images; it must be readable more than once")


def _prepared(batch: Any, model: nn.Module, transform: Callable[[Any], Any] | None) -> Tensor:
    images = get_inputs(batch).to(device_of(model) or "cpu")
    found: Tensor = images if transform is None else transform(images)
    return found
