"""The loss on timm networks with random weights under checkpointing, autocast, accumulation and errors."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from knowiso_train import IsomorphismLoss
from knowiso_train.errors import CaptureError, LayerNameError, NonFiniteError
from tests.helpers.timm_networks import FORMS, IMAGES, NETWORKS, batch, hooks_of, network, ready, same, stepped


@pytest.fixture(params=list(NETWORKS))
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(params=list(FORMS))
def form(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


every_network = pytest.mark.parametrize(
    ("name", "form"), [*((name, "moment") for name in NETWORKS), ("resnet18", "learned")]
)


def test_the_maps_receive_the_outputs_of_the_layers(name: str) -> None:
    student, teacher, layers = network(name, 1), network(name, 2), NETWORKS[name][1]
    iso = IsomorphismLoss(student, teacher, layers)
    given: dict[str, tuple[Tensor, ...]] = {}
    for key, map_ in iso.maps.items():
        map_.register_forward_pre_hook(
            lambda module, args, key=key: given.update({key: (args[0].detach().clone(), args[1].clone())})
        )
    with iso:
        stepped(student, iso)  # the first forward finds out what is overwritten
        teacher.eval()
        for index, model in enumerate((student, teacher)):
            kept: dict[str, Tensor] = {}
            handles = [
                model.get_submodule(layer).register_forward_hook(
                    lambda m, a, out, layer=layer, kept=kept: kept.update({layer: out.detach().clone()})
                )
                for layer in layers
            ]
            torch.manual_seed(0)
            model(batch())
            if index == 0:
                iso()
            for handle in handles:
                handle.remove()
            for layer in layers:
                ours, plain = given[f"{layer}→{layer}".replace(".", "/")][index], kept[layer]
                assert sorted(ours.flatten().tolist()) == pytest.approx(_spatial(name, layer, plain), abs=1e-6)


def _spatial(name: str, layer: str, emitted: Tensor) -> list[float]:
    values = emitted[:, 1:] if name.startswith("vit") else emitted  # without the class token
    return sorted(values.flatten().tolist())


@every_network
def test_gradient_checkpointing_changes_nothing(name: str, form: str) -> None:
    student, teacher = network(name, 1), network(name, 2)
    torch.manual_seed(0)
    iso = ready(form, student, teacher, NETWORKS[name][1])
    other = copy.deepcopy(student)
    other.set_grad_checkpointing(True)
    torch.manual_seed(0)
    with iso:
        plain = [stepped(student, iso, call) for call in range(2)]
    torch.manual_seed(0)
    iso = ready(form, other, teacher, NETWORKS[name][1])
    with iso:
        for call in range(2):
            same(plain[call], stepped(other, iso, call), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the probe runs without gradient
def test_reentrant_checkpointing_raises() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.block, self.stem(x), use_reentrant=True)
            return out.mean((2, 3))

    student = Checkpointed()
    with IsomorphismLoss(student, network("resnet18", 2), {"block": "layer1"}) as iso:
        student(batch())
        with pytest.raises(CaptureError, match="re-entrant"):
            iso()


def test_layer_names_are_those_of_the_unwrapped_network() -> None:
    student, teacher = network("resnet18", 1), network("resnet18", 2)
    for wrapped, prefix in (
        (torch.compile(student, backend="eager"), "_orig_mod."),
        (nn.DataParallel(student), "module."),
    ):
        for layer in ("layer2", f"{prefix}layer2"):
            iso = IsomorphismLoss(wrapped, teacher, {layer: "layer2"})
            assert [(pair.source, pair.target) for pair in iso.pairs] == [("layer2", "layer2")]
    with pytest.raises(LayerNameError, match=r"layer22.*layer2"):
        IsomorphismLoss(student, teacher, {"layer22": "layer2"})


@pytest.mark.parametrize(
    ("name", "form", "dtype"),
    [
        *((name, "moment", torch.bfloat16) for name in NETWORKS),
        ("resnet18", "learned", torch.bfloat16),
        ("resnet18", "moment", torch.float16),
    ],
)
def test_autocast_changes_the_loss_little_and_stays_finite(name: str, form: str, dtype: torch.dtype) -> None:
    student, teacher = network(name, 1), network(name, 2)
    torch.manual_seed(0)
    iso = ready(form, student, teacher, NETWORKS[name][1])
    seen: list[torch.dtype] = []
    teacher.get_submodule(NETWORKS[name][1][1]).register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with iso:
        plain = stepped(student, iso)
    torch.manual_seed(0)
    iso = ready(form, student, teacher, NETWORKS[name][1])
    with iso, torch.autocast("cpu", dtype):
        half = stepped(student, iso)
    assert half["loss"].dtype == torch.float32
    assert float(half["loss"]) == pytest.approx(float(plain["loss"]), rel=0.1)
    assert len(half) > 1
    assert all(bool(value.isfinite().all()) for value in half.values())
    assert all(
        value.dtype in (torch.float32, torch.float64)
        for value in iso.state_dict().values()
        if value.is_floating_point()
    )


def test_gradient_accumulation_with_an_evaluation_in_between(form: str) -> None:
    student, teacher = network("resnet18", 1), network("resnet18", 2)
    iso = ready(form, student, teacher, "layer[23]")
    with iso:
        plain = [stepped(student, iso, call) for call in range(2)]
    fresh = ready(form, student, teacher, "layer[23]")
    fresh.load_state_dict(iso.state_dict())
    with fresh:
        for call in range(2):
            student.eval()
            with torch.no_grad():
                student(batch(9))  # an evaluation, whose captures must not be taught
            student.train()
            loss = F.cross_entropy(student(batch(call)), torch.arange(IMAGES)) + fresh()
            loss.backward()
            assert not any(slot.captures for slot in fresh._student.taps._slots.values())
    accumulated = {name: p.grad for name, p in student.named_parameters()}
    gradients = [gradient for gradient in accumulated.values() if gradient is not None]
    assert len(gradients) > 1
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert set(plain[0]) - {"loss"} == {name for name, gradient in accumulated.items() if gradient is not None}


def test_no_hook_survives_the_context_or_an_error(form: str) -> None:
    student, teacher = network("resnet18", 1), network("resnet18", 2)
    iso = ready(form, student, teacher, "layer[23]")

    def broken_loop() -> None:
        with iso:
            assert hooks_of(student, teacher) > 0
            student(batch())
            raise ZeroDivisionError

    assert hooks_of(student, teacher) == 0
    with pytest.raises(ZeroDivisionError):
        broken_loop()
    assert hooks_of(student, teacher) == 0
    with iso, pytest.raises(CaptureError, match="has not run"):
        iso()  # nothing of the broken step is left
    with iso, pytest.raises(RuntimeError, match="channels"):
        student(torch.zeros(1, 7, 8, 8))
    assert hooks_of(student, teacher) == 0


def test_the_teacher_is_not_modified(name: str) -> None:
    student, teacher = network(name, 1), network(name, 2)
    teacher.train()
    next(iter(teacher.children())).eval()  # a mixed mode must come back too
    modes = [module.training for module in teacher.modules()]
    before = copy.deepcopy(teacher.state_dict())
    iso = ready("moment", student, teacher, NETWORKS[name][1])
    with iso:
        stepped(student, iso)
        output = iso.teacher_output
    assert [module.training for module in teacher.modules()] == modes
    same(before, teacher.state_dict(), rtol=0, atol=0)
    assert list(teacher.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    torch.testing.assert_close(output, teacher.eval()(batch()))


def test_the_teacher_runs_on_transformed_images() -> None:
    student, teacher = network("resnet18", 1), network("vit_tiny_patch16_224", 2)
    seen: list[Tensor] = []
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0]))

    def transform(images: Tensor) -> Tensor:
        return F.interpolate(images * 2 + 1, (64, 64))

    iso = ready(
        "moment",
        student,
        teacher,
        {"layer3": "blocks.5"},
        teacher_transform=transform,
        example=torch.zeros(1, 3, 48, 48),
    )
    with iso:
        images = batch()[:, :, :48, :48]
        student(images)
        assert bool(iso().isfinite())
    torch.testing.assert_close(seen[-1], transform(images))


def test_non_finite_features_raise_with_their_layer() -> None:
    student, teacher = network("resnet18", 1), network("resnet18", 2)
    iso = ready("moment", student, teacher, "layer[23]")
    with iso:
        stepped(student, iso)
        with torch.no_grad():
            student.get_submodule("layer3.0.bn1").weight[0] = float("inf")
        before = iso.maps["layer3→layer3"].moments.count.clone()
        with pytest.raises(NonFiniteError, match=r"step 1 .*student's 'layer3'"):
            stepped(student, iso, 1)
    assert iso.maps["layer3→layer3"].moments.count == before


def test_dead_channels_have_finite_gradients(form: str) -> None:
    student, teacher = network("resnet18", 1), network("resnet18", 2)
    for model in (student, teacher):
        with torch.no_grad():
            for bn in (model.get_submodule("layer2.1.bn2"), model.get_submodule("bn1")):
                bn.weight[:5] = 0
                bn.bias[:5] = 0
    iso = ready(form, student, teacher, ["bn1", "layer2"])
    with iso:
        for call in range(3):
            found = stepped(student, iso, call)
            assert all(bool(value.isfinite().all()) for value in found.values())
            assert float(iso.log()["iso/train/bn1/grad_norm"]) < 100


def test_a_layer_that_fires_twice() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Conv2d(3, 6, 3, 4, 1), nn.Conv2d(6, 6, 3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.block(self.block(self.stem(x)))
            return out.mean((2, 3))

    student = Shared()
    with pytest.raises(CaptureError, match="fired 2 times"):
        IsomorphismLoss(student, network("resnet18", 2), {"block": "layer1"})
    with IsomorphismLoss(student, network("resnet18", 2), {"block": "layer1"}, repeated="last") as iso:
        student(batch())
        assert iso().requires_grad


@every_network
def test_the_saved_student_is_the_plain_one(name: str, form: str) -> None:
    student = network(name, 1)
    keys = list(student.state_dict())
    iso = ready(form, student, network(name, 2), NETWORKS[name][1])
    with iso:
        stepped(student, iso)
        assert list(student.state_dict()) == keys
        assert not set(iso.state_dict()) & set(keys)
        own = {id(parameter) for parameter in iso.parameters()}
        assert not own & {id(parameter) for parameter in student.parameters()}
        assert bool(own) == (form == "learned")
        copied = copy.deepcopy(student)
        copied(batch())
        with pytest.raises(CaptureError, match="has not run"):
            iso()  # a copy of the student is not the student
    timm.create_model(name, num_classes=10, **NETWORKS[name][0]).load_state_dict(student.state_dict())
