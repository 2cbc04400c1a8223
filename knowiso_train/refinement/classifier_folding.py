"""The teacher's classifier folded into that of a student, in closed form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowiso_train.distillation.kd import kd_loss
from knowiso_train.errors import DataError, LayoutError, OptionError, ShapeError
from knowiso_train.features.state import check_materialized, checked_device, device_of, on_device, preserve_state
from knowiso_train.features.wrappers import unwrap_model
from knowiso_train.refinement._candidates import Candidate, replace_classifier
from knowiso_train.refinement._model_folder import save_plain_network
from knowiso_train.refinement.config import RidgeOption
from knowiso_train.refinement.folding import SELECT_FRACTION
from knowiso_train.refinement.models import (
    ClassifierModel,
    PooledFeatures,
    Transform,
    classifier_model,
    extract_pooled_features,
    flag_unusable_heads,
)
from knowiso_train.refinement.peers import MIN_SPLIT_IMAGES, row_moments
from knowiso_train.regression.ridge import solve_ridge
from knowiso_train.utils.batch import check_loader, subsample_loader
from knowiso_train.utils.hashing import split_by_hash
from knowiso_train.utils.serialization import dump_json, write_if_given
from knowiso_train.utils.text_table import format_table
from knowiso_train.utils.validation import PositiveInt, Seed, validate_arguments

# Fractions of the teacher's folded classifier in the candidates
TEACHER_FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class FoldedScore:
    """Scores of a mixture of the student's own and the teacher's folded classifier, on held-out images.

    Attributes:
        teacher_fraction: Fraction of the teacher's folded classifier; 0 is the student's own, 1 the folded one.
        agreement: Images with the teacher's class, in percent.
        divergence: Mean KL divergence from the teacher's probabilities, in nats.
        accuracy: Top-1 accuracy in percent. None: no labels.
        cross_entropy: Mean cross-entropy of the labels. None: no labels.
    """

    teacher_fraction: float
    agreement: float
    divergence: float
    accuracy: float | None = None
    cross_entropy: float | None = None

    @property
    def cost(self) -> tuple[float, float]:
        """Key of the choice: errors and cross-entropy with labels, else the divergence."""
        if self.accuracy is None or self.cross_entropy is None:
            return self.divergence, 0.0
        return -self.accuracy, self.cross_entropy


@dataclass(frozen=True)
class FoldReport:
    """Scores of the classifiers that `fold_classifier` compared.

    Attributes:
        scores: Score of every mixture, from the student's own classifier to the teacher's folded one.
        chosen: Score of the classifier of the result.
        ridge: Relative ridge of the regression.
        num_images: Numbers of images that fit the regression, and that select the classifier.
    """

    scores: tuple[FoldedScore, ...]
    chosen: FoldedScore
    ridge: float
    num_images: Mapping[str, int]

    def __str__(self) -> str:
        rows = [["teacher's fraction", "agreement", "KL", "accuracy", ""]]
        for score in self.scores:
            accuracy = "–" if score.accuracy is None else f"{score.accuracy:.2f} %"
            mark = "chosen" if score == self.chosen else ""
            figures = [f"{score.agreement:.2f} %", f"{score.divergence:.4f}", accuracy]
            rows.append([f"{score.teacher_fraction:g}", *figures, mark])
        return format_table(rows, left=(-1,))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as nested dictionaries, lists and numbers."""
        return {"format": "knowiso_train.FoldReport", "format_version": 1, **asdict(self)}

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as strict JSON, and write it to a file where a path is given."""
        return write_if_given(dump_json(self.to_dict()) + "\n", path)


@dataclass(frozen=True)
class FoldResult:
    """Result of `fold_classifier`.

    Attributes:
        model: Copy of the student in eval mode; only the classifier differs.
        report: Scores of the candidates.
    """

    model: nn.Module
    report: FoldReport

    def save(
        self, folder: str | Path, *, architecture: str | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        """Write `model.safetensors`, a plain state dict, `card.json` with report and loading code, and a model card.

        `timm.create_model(architecture, checkpoint_path=".../model.safetensors", **options)` loads it, without this
        library.

        Args:
            folder: Folder; it is created where it does not exist.
            architecture: Name of the network in timm. None: the name that timm stored in the network.
            options: Arguments of `timm.create_model`. None: the number of classes.
        """
        chosen = self.report.chosen
        figures = {"agreement with the teacher": f"{chosen.agreement:.1f} %"}
        if chosen.accuracy is not None:
            figures["top-1, validation"] = f"{chosen.accuracy:.1f} %"
        save_plain_network(
            folder,
            self.model,
            self.report.to_dict(),
            kind="distilled",
            summary="distilled (knowiso_train). "
            f"{chosen.teacher_fraction:.0%} of its classifier come from the teacher's, which was folded into a linear "
            "layer. The network runs without the teacher.",
            figures=figures,
            architecture=architecture,
            options=options,
        )


@validate_arguments
def fold_classifier(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    *,
    validation: Iterable[Any] | None = None,
    head: str | None = None,
    teacher_head: str | None = None,
    transform: Transform | None = None,
    teacher_transform: Transform | None = None,
    ridge: RidgeOption = "search",
    max_images: PositiveInt | None = 20_000,
    seed: Seed = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> FoldResult:
    """Replace the classifier of a distilled student by the teacher's, folded through a ridge regression, if better.

    The regression maps the student's pooled features x_S to the teacher's, `x_T ≈ A x_S + b`. With the teacher's
    classifier `W_T x_T + b_T` the folded one is `W_T A x_S + W_T b + b_T`, a linear layer again. Candidates are the
    student's own classifier, the folded one, and mixtures of their weights; the best on held-out images is taken. The
    result has no added cost at inference.

    Args:
        student: Trained network with a linear classifier. It is not modified.
        teacher: Network with a linear classifier of the same classes.
        loader: Images; labels are not read. The training images will do, some thousand.
        validation: Batches with labels, not of the training images, to choose by accuracy. None: choose by the KL
            divergence from the teacher on a quarter of the images of `loader`.
        head: Name of the student's classifier, a Linear. None: timm's classifier, or the last Linear.
        teacher_head: Name of the teacher's classifier.
        transform: Transform of the images for the student (resolution, normalization).
        teacher_transform: Transform of the images for the teacher.
        ridge: Relative ridge of the regression, or "search" on a quarter of the images of `loader`.
        max_images: Maximum number of images of `loader`, drawn at random where it allows this. None: all.
        seed: Seed of the choice and of the split of the images.
        device: Device to run on; the networks are brought back afterwards. None: where they are.
        progress: Show progress bars.

    Returns:
        Result with `.model` in eval mode and `.report` (print it). The chosen score is optimistic, as the classifier
        was chosen by it.

    Raises:
        LayerNameError: No linear classifier.
        LayoutError: The output of a network is not that of its classifier.
        ShapeError: Classifiers of different numbers of classes, labels that these have no output for, or features that
            are not pooled.
        InputTypeError: Images of a dtype that a network fails on, or `validation` without batches.
        DataError: Too few images.
        OptionError: A student's classifier without bias, or the same network twice.

    References:
        Chen et al., *Knowledge Distillation with the Reused Teacher Classifier* (CVPR 2022), which trains the map.

    Examples:
        >>> teacher = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
        >>> student = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
        >>> _ = student[0].load_state_dict(teacher[0].state_dict())  # the features are the teacher's
        >>> images = torch.randn(400, 8)
        >>> folded = fold_classifier(student, teacher, images.split(100), progress=False)
        >>> folded.report.chosen.teacher_fraction, folded.report.chosen.agreement
        (1.0, 100.0)
        >>> torch.allclose(folded.model(images), teacher(images), atol=1e-4)
        True
    """
    if unwrap_model(student) is unwrap_model(teacher):
        raise OptionError("expected two networks, got the same one as student and teacher; pass the teacher itself")
    if validation is not None:
        check_loader(validation, "validation", again=False)
    target_device = device_of(student)
    models = [
        classifier_model(student, "the student", head, transform, "head="),
        classifier_model(teacher, "the teacher", teacher_head, teacher_transform, "teacher_head="),
    ]
    if models[0].num_classes != models[1].num_classes:
        raise ShapeError(
            f"expected classifiers of the same classes, got {models[0].num_classes} of the student's "
            f"{models[0].head!r} and {models[1].num_classes} of the teacher's {models[1].head!r}; name the classifiers "
            "with head= and teacher_head="
        )
    with ExitStack() as stack:
        check_materialized(student, teacher)
        checked_device(device, student, teacher)
        stack.enter_context(preserve_state(student, teacher))
        stack.enter_context(on_device(device, student, teacher))
        sample = subsample_loader(loader, max_images, seed)
        _check_outputs(models, sample)
        images = extract_pooled_features(models, sample, labels=False, max_images=max_images, progress=progress)
        held_out = None
        if validation is not None:
            held_out = extract_pooled_features(models, validation, labels=True, progress=progress, what="validation")
            held_out.check_classes(models[0].num_classes, "validation")
        folded, report = choose_classifier(models[0], models[1], images, held_out, ridge=ridge, seed=seed)
        module = replace_classifier(student, models[0].head, folded)
    return FoldResult(module if target_device is None else module.to(target_device), report)


def choose_classifier(
    student: ClassifierModel,
    teacher: ClassifierModel,
    images: PooledFeatures,
    held_out: PooledFeatures | None,
    *,
    ridge: RidgeOption,
    seed: int,
) -> tuple[Candidate, FoldReport]:
    """Fit the folded classifier and choose among its mixtures with the student's own.

    Args:
        student: Student and its classifier.
        teacher: Teacher and its classifier.
        images: Pooled features of both.
        held_out: Pooled features of both and labels, to choose on. None: a part of `images`.
        ridge: Relative ridge, or "search".
        seed: Seed of the split.

    Raises:
        DataError: Too few images.
    """
    part = split_by_hash(np.arange(len(images), dtype=np.int64), (1 - SELECT_FRACTION, SELECT_FRACTION), seed)
    select = torch.from_numpy(part == 1)
    if int(select.sum()) < MIN_SPLIT_IMAGES or (held_out is not None and len(held_out) < MIN_SPLIT_IMAGES):
        raise DataError(
            f"expected {5 * MIN_SPLIT_IMAGES} images or more in loader= and {MIN_SPLIT_IMAGES} in validation=, got "
            f"{len(images)} and {'none' if held_out is None else len(held_out)}; give some thousand and some hundred"
        )
    # Ridge regression is linear in its targets: that of the teacher's logits is W_T times that of its features
    x, y = images.features[0].double(), teacher.logits(images.features[1])
    moments = [row_moments(x[mask], y[mask]) for mask in (~select, select)]
    regression = solve_ridge(moments[0], ridge, moments[1])
    layer = student.classifier
    own = layer.weight.detach().cpu().double()
    own_bias = torch.zeros(len(own)).double() if layer.bias is None else layer.bias.detach().cpu().double()
    candidates = [
        Candidate("folded", torch.lerp(own, regression.weight.T, f), torch.lerp(own_bias, regression.bias, f))
        for f in TEACHER_FRACTIONS
    ]
    features, teacher_logits, labels = x[select], y[select], None
    if held_out is not None:
        features, teacher_logits = held_out.features[0], teacher.logits(held_out.features[1])
        labels = held_out.require_labels()
    scores = [
        _score(fraction, candidate.logits(features), teacher_logits, labels)
        for fraction, candidate in zip(TEACHER_FRACTIONS, candidates, strict=True)
    ]
    best = min(range(len(scores)), key=lambda index: scores[index].cost)
    num_images = {"fit": int((~select).sum()), "select": len(features)}
    return candidates[best], FoldReport(tuple(scores), scores[best], regression.ridge, num_images)


def _score(fraction: float, logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> FoldedScore:
    predictions = logits.argmax(1)
    agreement = 100 * float((predictions == teacher_logits.argmax(1)).double().mean())
    divergence = float(kd_loss(logits, teacher_logits, temperature=1.0))
    if labels is None:
        return FoldedScore(fraction, agreement, divergence)
    accuracy = 100 * float((predictions == labels).double().mean())
    return FoldedScore(fraction, agreement, divergence, accuracy, float(F.cross_entropy(logits, labels.long())))


def _check_outputs(models: list[ClassifierModel], loader: Iterable[Any]) -> None:
    """Check that the outputs of both networks are those of their classifiers.

    Raises:
        LayoutError: They are not.
        DataError: No images.
    """
    batch = next(iter(loader), None)
    if batch is None:
        raise DataError("expected images in loader=, got none")
    if flag_unusable_heads(models, batch)[1].head_excluded:
        raise LayoutError(
            f"the teacher's output is not that of its classifier {models[1].head!r} (another classifier beside it, or "
            "a step after it); name the right layer with teacher_head="
        )
