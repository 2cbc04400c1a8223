"""The teacher's classifier in the student: known answers, mixtures, what is chosen, and errors."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from knowiso_train.errors import DataError, InputTypeError, LayerNameError, LayoutError, OptionError, ShapeError
from knowiso_train.refinement import FoldResult, fold_classifier
from knowiso_train.utils.hashing import split_by_hash

CLASSES = 4


class Network(nn.Module):
    """Non-linear features, a linear map of them, pooling, and a classifier."""

    def __init__(self, mix: Tensor, seed: int, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3)
        torch.manual_seed(seed)
        self.mix = nn.Conv2d(6, len(mix), 1)
        self.mix.weight = nn.Parameter(mix[:, :, None, None].clone())
        self.fc = nn.Linear(len(mix), CLASSES, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.mix(torch.tanh(self.stem(x))).mean((2, 3)))
        return logits


IMAGES = torch.randn(400, 3, 6, 6, generator=torch.Generator().manual_seed(0))
MIX = torch.eye(6) + 0.3 * torch.randn(6, 6, generator=torch.Generator().manual_seed(1))


def folded(student: nn.Module, teacher: nn.Module, images: Tensor = IMAGES, **options: Any) -> FoldResult:
    return fold_classifier(student, teacher, torch.split(images, 64), progress=False, **options)


@pytest.mark.parametrize("channels", [6, 3])
def test_a_linear_map_of_the_features_gives_the_logits_of_the_teacher(channels: int) -> None:
    """Student features are an invertible map of the teacher's, or the teacher has fewer features."""
    student, teacher = Network(MIX, 1), Network(torch.eye(6)[:channels], 2)
    before = copy.deepcopy(student.state_dict())
    result = folded(student.train(), teacher)
    torch.testing.assert_close(result.model(IMAGES), teacher(IMAGES), rtol=1e-3, atol=1e-4)
    assert result.report.chosen.teacher_fraction == 1
    assert result.report.num_images["fit"] + result.report.num_images["select"] == len(IMAGES)
    # A plain copy, of which only the classifier differs
    assert student.training
    assert type(result.model) is Network
    changed = [name for name, value in result.model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["fc.weight", "fc.bias"]
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_scores_by_hand() -> None:
    student, teacher = Network(MIX[:3], 1), Network(torch.eye(6), 2)
    with torch.no_grad():
        logits, teacher_logits = student(IMAGES), teacher(IMAGES)
    labels = teacher_logits.argmax(1)
    report = folded(
        student, teacher, validation=list(zip(torch.split(IMAGES, 50), torch.split(labels, 50), strict=True))
    ).report
    score = report.scores[0]
    divergence = F.kl_div(logits.log_softmax(1), teacher_logits.softmax(1), reduction="batchmean")
    assert score.divergence == pytest.approx(float(divergence), rel=1e-4)
    assert score.cross_entropy == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-4)
    assert score.accuracy == score.agreement == pytest.approx(100 * float((logits.argmax(1) == labels).double().mean()))
    assert report.chosen == max(report.scores, key=lambda score: (score.accuracy or 0, -(score.cross_entropy or 0)))
    assert json.loads(report.to_json())["chosen"]["teacher_fraction"] == report.chosen.teacher_fraction
    assert str(report).count("chosen") == 1


def test_the_folded_classifier_is_the_teachers_after_the_regression() -> None:
    student, teacher = Network(MIX[:3], 1), Network(torch.eye(6), 2)
    nn.init.zeros_(student.fc.weight)
    result = folded(student, teacher, ridge=0.1, seed=3)
    assert result.report.chosen.teacher_fraction == 1
    with torch.no_grad():
        x, y = (net.mix(torch.tanh(net.stem(IMAGES))).mean((2, 3)).double() for net in (student, teacher))
    fit = torch.from_numpy(split_by_hash(np.arange(len(IMAGES), dtype=np.int64), (0.75, 0.25), 3) == 0)
    mean_x, mean_y = x[fit].mean(0), y[fit].mean(0)
    gram = (x[fit] - mean_x).T @ (x[fit] - mean_x)
    ridge = 0.1 * gram.diagonal().mean() * torch.eye(3)
    weight = torch.linalg.solve(gram + ridge, (x[fit] - mean_x).T @ (y[fit] - mean_y))
    expected = teacher.double().fc((x - mean_x) @ weight + mean_y)
    torch.testing.assert_close(result.model(IMAGES).double(), expected, rtol=1e-4, atol=1e-5)


def test_a_student_that_is_better_keeps_its_classifier() -> None:
    """The features hold nothing of the teacher's, but the student classifies the validation images."""
    student, teacher = Network(MIX, 1), Network(torch.eye(6), 2)
    labels = student(IMAGES).argmax(1)
    result = folded(student, teacher, validation=[(IMAGES, labels)])
    assert result.report.chosen.teacher_fraction == 0
    assert result.report.chosen.accuracy == 100
    torch.testing.assert_close(result.model(IMAGES), student(IMAGES))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": IMAGES[:16]}, DataError, "40 images or more"),
        ({"student": nn.Sequential(nn.Conv2d(3, 4, 6), nn.Flatten())}, LayerNameError, "no linear"),
        ({"student": Network(MIX, 1, bias=False)}, OptionError, "has no bias"),
        ({"teacher": nn.Sequential(nn.Flatten(), nn.Linear(108, 7))}, ShapeError, "4 of the student's 'fc' and 7"),
        ({"teacher": nn.Sequential(Network(MIX, 1), nn.Softmax(1))}, LayoutError, "not that of its classifier"),
        ({"teacher_head": "nothing"}, LayerNameError, "no layer 'nothing'; name it with teacher_head="),
        ({"head": "nothing"}, LayerNameError, "no layer 'nothing'; name it with head=$"),
        ({"ridge": -1.0}, OptionError, "ridge"),
        ({"validation": [(IMAGES[:4], torch.zeros(4).long())]}, DataError, "got 400 and 4"),
        ({"validation": [(IMAGES, torch.full((400,), 50))]}, ShapeError, "validation images have labels up to 50"),
        ({"validation": IMAGES}, InputTypeError, "validation: expected a DataLoader or another iterable of batches"),
        ({"teacher": Network(MIX, 2).double()}, InputTypeError, "weights of float64 and fails on images of float32"),
    ],
    ids=lambda value: "",
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    options = {"student": Network(MIX, 1), "teacher": Network(torch.eye(6), 2)} | change
    with pytest.raises(error, match=message):
        folded(**options)


def test_the_student_as_its_own_teacher_raises() -> None:
    student = Network(MIX, 1)
    with pytest.raises(OptionError, match="got the same one as student and teacher"):
        folded(student, student)


def test_a_loader_without_images_raises() -> None:
    with pytest.raises(DataError, match="expected images in loader=, got none"):
        fold_classifier(Network(MIX, 1), Network(MIX, 2), [], progress=False)


@pytest.mark.parametrize("labels", [False, True])
def test_a_saved_student_loads_with_timm_alone(labels: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student, teacher = (timm.create_model("test_resnet", num_classes=CLASSES) for _ in range(2))
    images = torch.rand(160, 3, 32, 32)
    batches = TensorDataset(images, teacher.eval()(images).argmax(1))
    options = {"validation": DataLoader(batches, 80)} if labels else {}
    result = folded(student, teacher, images, **options)
    result.save(tmp_path)
    card = json.loads((tmp_path / "card.json").read_text())
    weights = tmp_path / "model.safetensors"
    loaded = timm.create_model(card["architecture"], checkpoint_path=weights, **card["options"]).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images[:8]), result.model(images[:8]))
    assert card["report"] == json.loads(result.report.to_json())
    text = (tmp_path / "README.md").read_text()
    assert f"| agreement with the teacher | {result.report.chosen.agreement:.1f} % |" in text
    assert ("top-1, validation" in text) == labels
