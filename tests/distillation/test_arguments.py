"""Frozen networks run with the arguments of the student's call, and padded positions are left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from knowiso_train.distillation import IsomorphismLoss
from knowiso_train.errors import CaptureError, KnowisoError, LayerNameError, OptionError, OptionTypeError
from knowiso_train.features import FeatureTaps

META = torch.linspace(-2, 2, 16)


class Conditioned(nn.Module):
    """Network whose features depend on a second argument."""

    def __init__(self, seed: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.calls = nn.Conv2d(3, width, 3, 2, 1), 0

    def forward(self, pixel_values: Any, meta: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        if isinstance(pixel_values, dict):
            pixel_values, meta = pixel_values["image"], pixel_values["meta"]
        elif isinstance(pixel_values, (tuple, list)):
            pixel_values, meta = pixel_values
        assert meta is not None
        out: Tensor = self.conv(scale * pixel_values + meta[:, None, None, None])
        return out


def images(seed: int = 0) -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


CALLS: dict[str, Any] = {
    "positional": lambda net, x: net(x, META),
    "keyword": lambda net, x: net(x, meta=META),
    "all keywords": lambda net, x: net(pixel_values=x, meta=META, scale=3.0),
    "not a tensor": lambda net, x: net(x, META, scale=3.0),
    "mapping": lambda net, x: net({"image": x, "meta": META}),
    "list": lambda net, x: net([x, META]),
    "tuple": lambda net, x: net((x, META)),
}


@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize("call", list(CALLS))
def test_the_teacher_gets_the_arguments_of_the_student(call: str, transformed: bool) -> None:
    student, teacher = Conditioned(1, 4), Conditioned(2, 6)

    def transform(x: Tensor) -> Tensor:
        return 2 * x + 1 if transformed else x

    iso = IsomorphismLoss(student, teacher, {"conv": "conv"}, teacher_transform=transform, example=(images(), META))
    received: list[Tensor] = []
    iso.maps["conv→conv"].register_forward_pre_hook(lambda module, args: received.append(args[1]))
    with iso:
        CALLS[call](student, images())
        iso()
    with torch.no_grad():
        expected = CALLS[call](teacher, transform(images()))
    torch.testing.assert_close(received[0], expected)
    torch.testing.assert_close(iso.teacher_output, expected)


def test_an_example_may_hold_keyword_arguments() -> None:
    iso = IsomorphismLoss(
        Conditioned(1, 4), Conditioned(2, 6), {"conv": "conv"}, example={"pixel_values": images(), "meta": META}
    )
    assert iso.maps["conv→conv"].weight.shape[:2] == (6, 4)


@pytest.mark.parametrize(
    "example",
    [5, 2.5, "images", b"x", torch.zeros(2, 3, 8, 8).numpy(), {0: images()}, nn.ReLU(), {1.0}, Tensor],
    ids=lambda example: type(example).__name__,
)
def test_an_example_of_another_type_raises(example: Any) -> None:
    with pytest.raises(OptionTypeError, match=r"example must be a batch of student images, a tuple .* got"):
        IsomorphismLoss(Conditioned(1, 4), Conditioned(2, 6), {"conv": "conv"}, example=example)


@pytest.mark.parametrize(
    "example",
    [
        torch.tensor(1.0),
        torch.zeros(8, 8),
        torch.zeros(2, 1, 8, 8),
        torch.zeros(2, 3, 8, 8, dtype=torch.long),
        torch.zeros(2, 3, 8, 8, device="meta"),
        {"pixel_values": images()},
        (images(), images()),
        [],
        {},
        (None,),
        (5,),
    ],
    ids=lambda example: f"{type(example).__name__} {getattr(example, 'shape', '')}",
)
def test_an_example_that_the_networks_do_not_take_raises(example: Any) -> None:
    student, teacher = (nn.Sequential(nn.Conv2d(3, width, 3)) for width in (4, 6))
    with pytest.raises(KnowisoError, match=r"cannot run on example=.* Pass a batch as in training|with images as its"):
        IsomorphismLoss(student, teacher, "0", example=example)


def test_arguments_that_the_teacher_does_not_take_raise() -> None:
    teacher = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1))
    student = Conditioned(1, 4)
    plain = {"example": (images(), META), "teacher_forward": lambda net, x: net(x)}
    for call in ("positional", "keyword", "all keywords"):
        iso = IsomorphismLoss(student, teacher, {"conv": "0"}, **plain)
        with iso:
            CALLS[call](student, images())
            iso()
        iso._teacher._custom_forward = None
        with iso:
            CALLS[call](student, images())
            with pytest.raises(CaptureError, match=r"student was called with .*does not take.*teacher_forward="):
                iso()
    with pytest.raises(CaptureError, match=r"does not take.*teacher_forward="):
        IsomorphismLoss(student, teacher, {"conv": "0"}, example=(images(), META))


class Parts(nn.Module):
    """Network whose features are often computed alone, like those of timm."""

    def __init__(self, seed: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.head = nn.Conv2d(3, width, 3, 2, 1), nn.Linear(width, 5)

    def forward_features(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.forward_features(x).mean((2, 3)))
        return out


def test_a_call_of_a_part_of_the_student_counts_with_its_images() -> None:
    losses: list[list[float]] = []
    for part in (False, True):
        student, teacher = Parts(1, 4), Parts(2, 6)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
        losses.append([])
        with IsomorphismLoss(
            student, teacher, {"conv": "conv"}, weight=100.0, teacher_transform=lambda x: 2 * x + 1
        ) as iso:
            for step in range(14):
                x = images(step)
                features = student.forward_features(x) if part else student(x) * 0
                loss = iso(images=x) if part else iso()
                assert iso.teacher_output.shape == (16, 5)
                optimizer.zero_grad()
                (loss + 0 * features.sum()).backward()
                optimizer.step()
                losses[-1].append(loss.item())
            student.forward_features(images())
            with pytest.raises(CaptureError, match=r"student has not run .* iso\(images=x\) after a call of a part"):
                iso()
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0


def test_labels_are_not_passed_to_the_teacher() -> None:
    class Labeled(nn.Sequential):
        def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
            return super().forward(pixel_values), labels

    student, teacher = (Labeled(nn.Conv2d(3, width, 3)) for width in (4, 6))
    with IsomorphismLoss(student, teacher, "0", example=images()) as iso:
        student(pixel_values=images(), labels=torch.zeros(16))
        iso()
        assert iso.teacher_output[1] is None


class Tokens(nn.Module):
    """Network on token sequences (N, L, 3); padding has no effect on other positions."""

    def __init__(self, seed: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.proj = nn.Linear(3, width)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        out: Tensor = self.proj(x)
        return out


@pytest.mark.parametrize("keyword", ["attention_mask", "key_padding_mask"])
@pytest.mark.parametrize("options", [{}, {"solver": "learned"}, {"target": "consensus"}, {"scale": "linear"}], ids=str)
def test_padded_positions_are_left_out(options: dict[str, Any], keyword: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(8, 11, 3, generator=generator)
    lengths = torch.tensor([11, 3, 5, 11, 1, 7, 9, 2])
    valid = torch.arange(11) < lengths[:, None]
    results = []
    for value in (0.0, 1e3):
        student, teacher = Tokens(1, 4), Tokens(2, 6)
        peers = [Tokens(3, 5)] if options.get("target") == "consensus" else []
        torch.manual_seed(0)
        iso = IsomorphismLoss(student, teacher, "proj", layout="nlc", example=tokens, peers=peers, **options)
        x = torch.where(valid[..., None], tokens, value)
        mask = valid.long() if keyword == "attention_mask" else ~valid
        with iso:
            for _ in range(12):
                student(x, **{keyword: mask})
                loss = iso()
            loss.backward()
        results.append([float(loss.detach()), *student.proj.weight.grad.flatten().tolist()])
    assert results[0][0] != 0
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_padding_that_cannot_be_left_out_raises() -> None:
    x = torch.randn(4, 9, 3)
    mask = torch.ones(4, 9)
    for options, shape in (({"kernel_size": 3}, (4, 9)), ({}, (4, 10))):
        iso = IsomorphismLoss(Tokens(1, 4), Tokens(2, 6), "proj", layout="nlc", example=x, **options)
        with iso:
            iso.student(x, attention_mask=mask)
            iso()
            padded = torch.ones(shape)
            padded[0, -1] = 0
            iso.student(x, attention_mask=padded)
            with pytest.raises(CaptureError, match="attention_mask= marks padded positions"):
                iso()


def test_features_in_the_padded_case_equal_those_of_the_layers() -> None:
    student, teacher = Tokens(1, 4), Tokens(2, 6)
    x, valid = torch.randn(4, 9, 3), torch.rand(4, 9) < 0.5
    iso = IsomorphismLoss(student, teacher, "proj", layout="nlc", example=x)
    received: list[tuple[Tensor, ...]] = []
    iso.maps["proj→proj"].register_forward_pre_hook(lambda module, args: received.append(args))
    with iso:
        student(x, attention_mask=valid)
        iso()
    with FeatureTaps(student, ["proj"]) as taps:
        student(x)
        features = taps.collect()["proj"]
    torch.testing.assert_close(received[0][0][0, :, 0].T, features[valid])


# In log scale a map that explains nothing of random networks has no gradient
@pytest.mark.parametrize("options", [{"solver": "closed_form"}, {"solver": "learned"}], ids=str)
def test_mutual_learning_asks_for_the_outputs_and_works_with_them(options: dict[str, Any]) -> None:
    a, b = (nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU()) for width in (4, 6))
    options = {"scale": "linear", "weight": 1.0, **options}
    ab, ba = IsomorphismLoss(a, b, "1", **options), IsomorphismLoss(b, a, "1", **options)
    with ab, ba:
        for step in range(6):
            x = images(step)
            a(x), b(x)
            ab()
            with pytest.raises(CaptureError, match=r"mutual learning.*ab\(teacher_output=output_b\)"):
                ba()
            output_a, output_b = a(x), b(x)
            (ab(teacher_output=output_b) + ba(teacher_output=output_a)).backward()
    assert all(network[0].weight.grad.abs().sum() > 0 for network in (a, b))
    # The advice of a forward without gradient stays
    with ba:
        with torch.no_grad():
            b(images())
        with pytest.raises(CaptureError, match="right after the training forward"):
            ba()


@pytest.mark.parametrize("at", ["input", {"1": "input"}])
@pytest.mark.parametrize("solver", ["closed_form", "learned"])
def test_the_input_of_an_activation_is_the_output_of_the_layer_before(at: Any, solver: Any) -> None:
    def train(layers: dict[str, str], **options: Any) -> tuple[Tensor, Tensor | None]:
        torch.manual_seed(0)
        student, teacher = (nn.Sequential(nn.Conv2d(3, w, 3), nn.ReLU(inplace=True)) for w in (4, 6))
        torch.manual_seed(1)
        iso = IsomorphismLoss(student, teacher, layers, solver=solver, example=images(), **options)
        with iso:
            for step in range(12):
                student(images(step))
                loss = iso()
            loss.backward()
        return loss.detach(), student[0].weight.grad

    loss, gradient = train({"1": "1"}, at=at)
    expected, expected_gradient = train({"0": "0"})
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert train({"1": "1"})[0] != expected


def test_sides_that_no_network_has_are_refused() -> None:
    networks = [nn.Sequential(nn.Conv2d(3, w, 3), nn.ReLU()) for w in (4, 6)]
    with pytest.raises(LayerNameError, match="none of the layers"):
        IsomorphismLoss(*networks, "1", at={"0": "input"})
    with pytest.raises(OptionError, match="at must be"):
        IsomorphismLoss(*networks, "1", at="before")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="name the layers for at="):
        IsomorphismLoss(*networks, "auto", loader=[images()], at="input")


@pytest.mark.parametrize("peers", [3, "ab", b"ab", torch.float16, torch.zeros(2), nn.Linear(1, 1), {"a": 1}], ids=repr)
def test_peers_that_are_no_list_of_networks_raise(peers: Any) -> None:
    with pytest.raises(KnowisoError, match="peers must be a list or tuple, each item"):
        IsomorphismLoss(Conditioned(0, 4), Conditioned(1, 4), "conv", target="consensus", peers=peers)
