"""The loss under copies, casts, alternating views, in-place writes to images, and shared layers."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import knowiso_train as ki
from knowiso_train.distillation import IsomorphismLoss, kd_loss
from knowiso_train.distillation.config import FALLBACK_WEIGHT
from knowiso_train.errors import CaptureError, InputTypeError, KnowisoWarning, LayoutError, OptionError
from knowiso_train.features import FeatureTaps
from tests.helpers.small_networks import built

FORMS: list[dict[str, Any]] = [{}, {"kernel_size": 3}, {"solver": "learned", "order": 1}, {"target": "consensus"}]


def loss_of(student: nn.Module, teacher: nn.Module, options: dict[str, Any]) -> IsomorphismLoss:
    peers = [built(3).to(student[0].weight.dtype)] if options.get("target") == "consensus" else []
    return IsomorphismLoss(student, teacher, ["3"], peers=peers, **({"scale": "linear", "weight": 1.0} | options))


def trained(iso: IsomorphismLoss, steps: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    losses = []
    with iso:
        for _ in range(steps):
            iso.student(torch.randn(16, 3, 8, 8, generator=generator).to(dtype))
            loss = iso()
            loss.backward()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_float64_networks_train_as_float32_ones(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    single = trained(loss_of(built(1), built(2), options), 12)
    torch.manual_seed(0)
    iso = loss_of(built(1).double(), built(2).double(), options)
    double = trained(iso, 12, torch.float64)
    assert double == pytest.approx(single, rel=1e-4)
    assert iso.log()["iso/train/3/grad_norm"] > 0


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_copy_trains_independently(options: dict[str, Any], how: Any, attached: bool) -> None:
    iso = loss_of(built(1), built(2), options)
    trained(iso, 12)
    if attached:
        with iso:
            iso.student(torch.randn(16, 3, 8, 8))
            twin = how(iso)
    else:
        twin = how(iso)
    assert not twin.attached
    assert twin.student is not iso.student
    assert trained(twin, 12, seed=1) == trained(iso, 12, seed=1)
    with iso:
        twin.student(torch.randn(2, 3, 8, 8))  # the copy's networks wake nothing here
        with pytest.raises(CaptureError, match="the student has not run"):
            iso()


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [FORMS[0], *FORMS[2:]], ids=str)
def test_casting_the_loss_changes_no_loss_value(options: dict[str, Any], cast: torch.dtype) -> None:
    """The networks stay in float32; an outlier channel would not survive half precision."""
    student = built(1)
    student[2].bias.data[0] += 1000
    iso = loss_of(copy.deepcopy(student), built(2), options)
    twin = copy.deepcopy(iso).to(cast)
    assert [value.dtype for value in twin.state_dict().values()] == [value.dtype for value in iso.state_dict().values()]
    assert trained(twin, 14) == trained(iso, 14)


def test_balanced_weights_of_one_layer_stay_bounded() -> None:
    torch.manual_seed(0)
    student, teacher = built(1), built(2)

    def weights(pairs: list[tuple[str, str]], steps: int) -> dict[str, float]:
        iso = IsomorphismLoss(student, teacher, pairs, scale="linear", weight="balanced", ratio=2.0)
        with iso:
            for _ in range(steps):
                loss = F.cross_entropy(student(torch.randn(16, 3, 8, 8)), torch.randint(5, (16,))) + iso()
                loss.backward()
        return {name: value for name, value in iso.log().items() if "weight" in name}

    alone = weights([("3", "3")], 100)["iso/train/3/weight"]
    early, late = (weights([("3", "3"), ("3", "1")], steps) for steps in (60, 150))
    assert late["iso/train/3-to-3/weight"] == pytest.approx(alone, rel=0.25)  # other batches
    assert late["iso/train/3-to-1/weight"] == pytest.approx(early["iso/train/3-to-1/weight"], rel=0.25)


def test_balanced_weights_of_two_losses_stay_bounded() -> None:
    torch.manual_seed(0)
    student = built(1)
    losses = [
        IsomorphismLoss(student, built(seed), ["3"], scale="linear", weight="balanced", ratio=2.0) for seed in (2, 3)
    ]
    with losses[0], losses[1]:
        for _ in range(200):
            (
                F.cross_entropy(student(torch.randn(16, 3, 8, 8)), torch.randint(5, (16,))) + losses[0]() + losses[1]()
            ).backward()
    assert all(iso.log()["iso/train/3/weight"] < 20 for iso in losses)


@pytest.mark.parametrize("weight", ["auto", "balanced"])
def test_balancing_in_a_separate_backward_keeps_the_weight(weight: Any) -> None:
    student = built(1)
    iso = IsomorphismLoss(student, built(2), ["3"], weight=weight)

    def apart() -> None:
        task = F.cross_entropy(student(torch.randn(16, 3, 8, 8)), torch.randint(5, (16,)))
        loss = iso()
        task.backward(retain_graph=True)
        loss.backward()

    with iso:
        for _ in range(10):
            apart()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", KnowisoWarning)
            apart()
        apart()
    messages = [str(warning.message) for warning in caught if "nothing to balance against" in str(warning.message)]
    assert len(messages) == 1
    assert iso.log()["iso/train/3/weight"] == (FALLBACK_WEIGHT if weight == "auto" else 1)


@pytest.mark.filterwarnings("ignore:weight=.auto. has nothing to balance against")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pairs_of_one_layer_without_another_loss_keep_the_fixed_weight(dtype: torch.dtype) -> None:
    student = built(1)
    iso = IsomorphismLoss(student, built(2), [("3", "3"), ("3", "1")], refresh=2)
    with iso:
        for _ in range(12):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                student(torch.randn(16, 3, 8, 8))
            iso().backward()
    assert [value for name, value in iso.log().items() if "weight" in name] == [FALLBACK_WEIGHT] * 2


@pytest.mark.filterwarnings("ignore:weight=.auto. has nothing to balance against")
def test_a_loss_that_becomes_the_only_one_has_the_fixed_weight() -> None:
    student = built(1)
    iso = IsomorphismLoss(student, built(2), ["3"], refresh=2, ratio=0.5)
    weights = []
    with iso:
        for step in range(30):
            output = student(torch.randn(16, 3, 8, 8))
            loss = iso() + (F.cross_entropy(output, torch.randint(5, (16,))) if step < 15 else 0)
            loss.backward()
            weights.append(iso.log()["iso/train/3/weight"])
    assert weights[14] != weights[-1] == 0.5 * FALLBACK_WEIGHT


def test_missing_logits_raise() -> None:
    with pytest.raises(InputTypeError, match="teacher_logits must be a tensor"):
        kd_loss(torch.zeros(2, 3), None)  # type: ignore[arg-type]


def test_alternating_views_both_update_the_map() -> None:
    """With every second call the map would know one view alone, and judge the other by it."""

    def shares(order: tuple[float, float]) -> list[float]:
        student, teacher = (nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU()) for width in (8, 16))
        for seed, model in enumerate((student, teacher)):
            torch.manual_seed(seed)
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.3)
        generator = torch.Generator().manual_seed(0)
        kept: dict[float, list[float]] = {shift: [] for shift in order}
        with IsomorphismLoss(student, teacher, {"1": "1"}) as iso, torch.enable_grad():
            for _ in range(200):
                for shift in order:
                    student(torch.randn(8, 3, 8, 8, generator=generator) + shift)
                    kept[shift].append(float(iso().detach()))
        return [sum(kept[shift][-50:]) / 50 for shift in (2.0, -2.0)]

    assert shares((2.0, -2.0)) == pytest.approx(shares((-2.0, 2.0)), rel=0.15)


def test_images_overwritten_by_the_student_raise() -> None:
    class Normalizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = built(1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x.sub_(0.5))
            return out

    student, teacher = Normalizes(), built(2)
    x = torch.randn(4, 3, 8, 8)
    with IsomorphismLoss(student, teacher, {"net.3": "3"}) as iso:
        student(x)
        with pytest.raises(CaptureError, match=r"written to .* teacher .* student\(x.clone\(\)\)"):
            iso()
        student(x)
        iso(teacher_output=teacher(x + 0.5))  # the caller knows what the teacher saw


def test_teacher_output_of_another_batch_is_dropped() -> None:
    student, teacher = built(1), built(2)
    a, b = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    with IsomorphismLoss(student, teacher, ["3"]) as iso:
        student(a)
        iso()
        assert torch.equal(iso.teacher_output, teacher(a))
        with FeatureTaps(teacher, "3") as taps, torch.no_grad():
            teacher(b)
            features = taps.collect()
        student(b)
        iso(teacher_features=features)
        assert iso.teacher_output is None


def test_cached_tokens_get_the_grid_of_oblong_images() -> None:
    torch.manual_seed(0)
    options = {"dynamic_img_size": True, "num_classes": 5, "depth": 2, "embed_dim": 48, "num_heads": 3}
    vit = timm.create_model("vit_tiny_patch16_224", **options).eval()
    student = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.ReLU())
    losses: list[list[float]] = []
    for cached in (False, True):
        iso, generator = (
            IsomorphismLoss(student, vit, {"1": "blocks.1"}, scale="linear", weight=1.0),
            torch.Generator().manual_seed(0),
        )
        losses.append([])
        with iso:
            for _ in range(14):
                x = F.interpolate(torch.randn(8, 3, 6, 4, generator=generator), size=(96, 64), mode="bilinear")
                with FeatureTaps(vit, "blocks.1") as taps, torch.no_grad():
                    vit(x)
                    features = taps.collect()
                student(x)
                losses[-1].append(float(iso(teacher_features=features if cached else None).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] > 0


def test_tokens_without_a_grid_and_a_feature_map_raise() -> None:
    options = {"num_classes": 5, "depth": 2, "embed_dim": 48, "num_heads": 3}
    student = timm.create_model("vit_tiny_patch16_224", img_size=128, patch_drop_rate=0.5, **options).train()
    teacher = nn.Sequential(nn.Conv2d(3, 16, 16, stride=16), nn.ReLU())
    with IsomorphismLoss(student, teacher, {"blocks.1": "1"}, example=torch.randn(2, 3, 128, 128)) as iso:
        student(torch.randn(2, 3, 128, 128))
        with pytest.raises(LayoutError, match=r"tokens of layer 'blocks.1' form no grid, .* 8 × 8"):
            iso()


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_an_empty_batch_has_loss_zero_and_changes_nothing(options: dict[str, Any]) -> None:
    iso = loss_of(built(1), built(2), options | {"refresh": 2})
    with iso:
        for step in range(9):
            iso.student(torch.randn(16 if step % 4 else 0, 3, 8, 8))  # before a solve, at a refresh and after it
            loss = iso()
            loss.backward()
            assert (loss == 0) if step % 4 == 0 else loss.isfinite()
    state = {name: value for name, value in iso.state_dict().items() if isinstance(value, torch.Tensor)}
    assert all(value.isfinite().all() for value in state.values())
    assert iso.input_moments.num_images in (32, 48)


def test_a_window_below_the_minimum_warns_with_the_minimum() -> None:
    student, teacher = (nn.Sequential(nn.Linear(20, width), nn.ReLU()) for width in (128, 256))
    with IsomorphismLoss(student, teacher, {"1": "1"}, window=20) as iso:
        student(torch.randn(32, 20))
        with pytest.warns(KnowisoWarning, match=r"1 → 1: a window of 20 calls .* window=(\d+)") as caught:
            iso()
    enough = float(str(caught[0].message).split("window=")[1].split()[0])
    with IsomorphismLoss(student, teacher, {"1": "1"}, scale="linear", window=enough) as iso:
        for _ in range(400):
            student(torch.randn(32, 20))
            loss = iso()
    assert loss.item() > 0


@pytest.mark.parametrize("options", FORMS[:3], ids=str)
def test_second_derivatives_raise(options: dict[str, Any]) -> None:
    iso = loss_of(built(1), built(2), options)
    trained(iso, 12)
    with iso:
        iso.student(torch.randn(16, 3, 8, 8))
        with pytest.raises(OptionError, match="create_graph=True"):
            torch.autograd.grad(iso(), iso.student[0].weight, create_graph=True)


def test_calls_of_parts_of_the_student_keep_two_captures() -> None:
    student = timm.create_model("resnet18", num_classes=5).eval()
    with FeatureTaps(student, "layer1") as taps, torch.no_grad():
        for _ in range(7):
            student.forward_features(torch.randn(1, 3, 32, 32))
        assert sum(len(slot.captures) for slot in taps._slots.values()) == 2
        with pytest.raises(CaptureError, match="fired 7 times"):
            taps.collect()


def test_an_evaluation_of_a_part_is_not_taken_for_the_training_step() -> None:
    student, teacher = (timm.create_model("resnet18", num_classes=5) for _ in range(2))
    images = [torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    losses = []
    for evaluates in (False, True):
        iso = IsomorphismLoss(copy.deepcopy(student), teacher, "layer2", weight=1.0, kernel_size=1)
        with iso:
            for step in range(8):
                if evaluates:
                    iso.student.eval()
                    with torch.no_grad():
                        iso.student.forward_features(images[1])
                    iso.student.train()
                iso.student.forward_features(images[step % 2])
                loss = iso(images=images[step % 2])
        assert loss.requires_grad
        losses.append(loss.item())
    assert losses[0] == losses[1] != 0


@pytest.mark.parametrize("options", FORMS)
def test_several_losses_before_one_backward_pass(options: dict[str, Any]) -> None:
    """Multi-view training: a map is solved anew between two losses of one backward pass."""
    iso = loss_of(built(1), built(2), options | {"refresh": 2})
    with iso:
        for step in range(6):
            losses = []
            for view in range(3):
                iso.student(torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(3 * step + view)))
                losses.append(iso())
            gradients = torch.autograd.grad(sum(losses), list(iso.student[0].parameters()), allow_unused=True)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert losses[-1] != 0


def test_replicas_of_data_parallel_raise() -> None:
    iso = IsomorphismLoss(built(1), built(2), "3")
    with iso:
        # What nn.DataParallel runs on every device
        replica = iso.student._replicate_for_data_parallel()
        with pytest.raises(CaptureError, match=r"nn\.DataParallel.*DistributedDataParallel"):
            replica(torch.randn(2, 3, 8, 8))
        iso.student(torch.randn(16, 3, 8, 8))
        iso()


class Float32Output(nn.Module):
    """Adds a parameter in float32, as the position embedding of a ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.position = nn.Conv2d(3, 4, 1), nn.Parameter(torch.zeros(4, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x) + self.position
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_the_teacher_runs_in_the_autocast_precision_of_the_student(dtype: torch.dtype | None) -> None:
    """accelerate surrounds the student's forward alone with autocast, and the features are in float32."""
    student, teacher = Float32Output(), Float32Output()
    layer, convolutions = nn.Sequential(student, nn.ReLU()), []
    teacher.conv.register_forward_hook(lambda _m, _x, out: convolutions.append(out.dtype))
    example = torch.zeros(1, 3, 8, 8)
    iso = IsomorphismLoss(layer, nn.Sequential(teacher, nn.ReLU()), "0", weight=1.0, example=example)
    convolutions.clear()
    with iso:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            assert layer(torch.randn(4, 3, 8, 8)).dtype == torch.float32
        iso()
        layer(torch.randn(4, 3, 8, 8))
        iso()
    assert convolutions == [dtype or torch.float32, torch.float32]


class Repeats(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.b(self.act(self.a(x))))
        return out


def test_the_callback_uses_the_capture_of_the_loss_for_repeated_layers() -> None:
    torch.manual_seed(0)
    student, teacher, held_out = Repeats(8), Repeats(16), [torch.randn(64, 3, 8, 8)] * 3
    iso = IsomorphismLoss(student, teacher, {"act": "act"}, repeated="last")
    found = ki.IsomorphismCallback.of(iso, held_out, every=1).measure()["act"]
    options: dict[str, Any] = {"layers": {"act": "act"}, "order": 0, "kernel_size": 3, "progress": False}
    plain = ki.measure(student, teacher, held_out, repeated="last", **options)["act"]
    first = ki.measure(student, teacher, held_out, repeated="first", **options)["act"]
    assert found.explained == pytest.approx(plain.explained)
    assert found.explained != pytest.approx(first.explained)
    with pytest.raises(OptionError, match="repeated must be"):
        ki.measure(student, teacher, held_out, {"act": "act"}, repeated="all", progress=False)


def test_auto_layers_uses_teacher_forward() -> None:
    class Asks(nn.Sequential):
        def forward(self, x: Tensor, scale: float) -> Tensor:  # type: ignore[override]
            return super().forward(scale * x)

    student, teacher = (
        kind(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1)) for kind in (nn.Sequential, Asks)
    )
    loader = [torch.randn(80, 3, 16, 16)] * 4
    iso = IsomorphismLoss(
        student,
        teacher,
        "auto",
        loader=loader,
        teacher_forward=lambda model, images: model(images, 2.0),
        example=torch.randn(2, 3, 16, 16),
    )
    assert [pair.target for pair in iso.pairs] == ["1", "2"]


def test_features_without_gradient_raise_with_their_layer() -> None:
    student = built(1)
    student[:4].requires_grad_(False)
    with IsomorphismLoss(student, built(2), ["3"]) as iso:
        student(torch.randn(2, 3, 8, 8))
        with pytest.raises(CaptureError, match=r"'3' carry no gradient: .* is frozen"):
            iso()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"kernel_size": 1.0}, "kernel_size must be an integer"),
        ({"refresh": 2.5}, "refresh must be an integer"),
        ({"ridge": None}, "ridge must be a number"),
        ({"weight": None}, "weight must be a number"),
        ({"weight": float("inf")}, "weights must be finite"),
        ({"schedule": 5}, "schedule must be a function"),
    ],
)
def test_options_of_the_wrong_type_raise(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        IsomorphismLoss(built(1), built(2), ["3"], **wrong)
