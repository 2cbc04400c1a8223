"""Settings of a refinement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from knowiso_train.errors import OptionError
from knowiso_train.refinement.heads import HeadConfig
from knowiso_train.refinement.models import ClassifierModel, Transform
from knowiso_train.utils.batch import check_loader
from knowiso_train.utils.validation import (
    LearningRate,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    validate_fields,
)

RefineMethod = Literal["auto", "fold", "head", "consensus", "paper"]
RidgeOption = NonNegativeFloat | Literal["search"]

PAPER_OPTIONS = ("layer", "peer_layer", "order", "max_order")  # that no other method uses


@dataclass(frozen=True)
class RefineFinetuneConfig:
    """Settings of the fine-tuning in a refinement.

    Attributes:
        steps: Number of updates. Each takes one batch of labeled and one of unlabeled images, where there are such.
        lr: Highest learning rate of SGD with momentum 0.9. It rises over a twentieth of the steps, then falls as a
            cosine.
        weight_decay: Weight decay of every parameter.
        consensus_weight: Weight of the consensus loss on features.
        kd_weight: Weight of the distillation loss towards `targets`.
        temperature: Temperature of the distillation loss.
        targets: "ensemble": mean probability of the frozen original and the peers with classifiers of the same classes.
            "original": the frozen original alone.
        max_grad_norm: Maximum norm of the gradient.
        layers: Layers of the network to compare. None: the input of its classifier.
        peer_layers: {layer: peer's layer}, one mapping for all peers or one per peer. None: the same names, or the
            inputs of the peers' classifiers where `layers` is None.
        freeze_batch_norm: Keep the statistics of batch norms, as small sets of images need.
        seed: Seed of dropout and of the loaders' order.

    Raises:
        OptionError: An option out of bounds.
    """

    steps: NonNegativeInt = 200
    lr: LearningRate = 0.003
    weight_decay: NonNegativeFloat = 1e-4
    consensus_weight: NonNegativeFloat = 1.0
    kd_weight: NonNegativeFloat = 1.0
    temperature: PositiveFloat = 2.0
    targets: Literal["ensemble", "original"] = "ensemble"
    max_grad_norm: PositiveFloat = 1.0
    layers: Sequence[str] | None = None
    peer_layers: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None
    freeze_batch_norm: bool = True
    seed: Seed = 0

    def __post_init__(self) -> None:
        validate_fields(self)

    @property
    def uses_peers(self) -> bool:
        """True where a loss compares the network with its frozen original and its peers."""
        return bool(self.consensus_weight or self.kd_weight)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class RefineConfig:
    """Options of `refine`, with the same names and meanings.

    Raises:
        OptionError: An option out of bounds, a method without the images or the layer that it needs, or with labels or
            layers that it does not use.
        InputTypeError: Labeled images that can be read only once.
    """

    method: RefineMethod = "auto"
    labeled: Iterable[Any] | None = None
    validation: Iterable[Any] | None = None
    test: Iterable[Any] | None = None
    head: str | None = None
    peer_heads: Sequence[str | None] | None = None
    transform: Transform | None = None
    peer_transforms: Transform | Sequence[Transform | None] | None = None
    ridge: RidgeOption = "search"
    head_config: HeadConfig = field(default_factory=HeadConfig)
    finetune_config: RefineFinetuneConfig | None = None
    layer: str | None = None
    peer_layer: str | None = None
    order: NonNegativeInt = 0
    max_order: NonNegativeInt | None = None
    min_explained: float = 0.2
    keep_all_peers: bool = False
    max_images: PositiveInt | None = 20_000
    seed: Seed = 0
    device: torch.device | str | None = None
    names: Sequence[str] | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.method == "auto" and self.validation is None:
            raise OptionError(
                'method="auto" chooses on labeled images that nothing was fitted to: pass validation=, or choose '
                "another method"
            )
        if self.method in ("head", "paper") and self.labeled is None:
            raise OptionError(f"method={self.method!r} needs a few labeled images: pass labeled=")
        if self.method == "paper" and self.layer is None:
            raise OptionError('method="paper" needs layer=, the layer of the network that the peer\'s layer replaces')
        if self.method == "fold" and self.labeled is not None:
            raise OptionError(
                'method="fold" uses no labels to fit to, got labeled=; leave it out, pass the images in validation= or '
                'test= for the report, or choose method="auto"'
            )
        unused = next((name for name in PAPER_OPTIONS if getattr(self, name) not in (None, 0)), None)
        if self.method != "paper" and unused is not None:
            raise OptionError(
                f'{unused}= is for method="paper" alone, got it with method={self.method!r}; leave it out. Layers to '
                "fine-tune to the consensus are RefineFinetuneConfig(layers=[...], peer_layers=...)"
            )
        for name in ("labeled", "validation", "test"):
            if getattr(self, name) is not None:
                check_loader(getattr(self, name), name)

    @property
    def notes(self) -> list[str]:
        """Notes for the user on options that the method does not use."""
        if self.finetune_config is None or self.method not in ("fold", "head"):
            return []
        return [f'method="{self.method}" does not fine-tune, so finetune_config= is not used; leave it out']

    @property
    def finetunes(self) -> bool:
        """True where the method fine-tunes the network."""
        return self.method == "consensus" or (self.method == "auto" and self.finetune_config is not None)

    @property
    def finetuning(self) -> RefineFinetuneConfig:
        """Settings of the fine-tuning, or their defaults."""
        return self.finetune_config or RefineFinetuneConfig(seed=self.seed)

    def check_bias(self, model: ClassifierModel) -> None:
        """Check that the classifier has the bias that the method changes.

        Raises:
            OptionError: It has none.
        """
        needs_bias = self.method in ("head", "fold") or (self.method == "consensus" and self.labeled is not None)
        if needs_bias and not model.has_bias:
            raise OptionError(
                f"the classifier {model.head!r} of {model.name} has no bias, but its refinement needs one; give the "
                "network one with a bias"
            )

    def check_trainable(self, model: ClassifierModel) -> None:
        """Check that a fine-tuning towards the consensus has layers to train before the classifier.

        Raises:
            OptionError: All of them are frozen.
        """
        classifier = {id(parameter) for parameter in model.classifier.parameters()}
        trained = (p for p in model.module.parameters() if p.requires_grad and id(p) not in classifier)
        if self.finetunes and self.finetuning.uses_peers and next(trained, None) is None:
            raise OptionError(
                f"fine-tuning towards the consensus trains layers before the classifier, but all those of {model.name} "
                "are frozen; unfreeze some with requires_grad_(True), or train the classifier on the labels alone: "
                "consensus_weight=0, kd_weight=0"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that determine the result, for the report."""
        return {
            "seed": self.seed,
            "ridge": self.ridge,
            "min_explained": self.min_explained,
            "head_config": self.head_config.to_dict(),
            "finetune_config": self.finetuning.to_dict(),
        }
