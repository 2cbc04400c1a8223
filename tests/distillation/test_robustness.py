"""The loss on timm networks with random weights under checkpointing, compilation, autocast, wrappers and errors."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from knowiso_train import IsomorphismLoss
from knowiso_train.distillation.config import FALLBACK_WEIGHT
from knowiso_train.errors import CaptureError, LayerNameError, NonFiniteError, OptionError

# With an early and a late layer, overwritten in place where there is such a one
NETWORKS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "resnet18": ({}, ["bn1", "layer3"]),
    "mobilenetv3_small_050": ({}, ["bn1", "blocks.4"]),
    "vit_tiny_patch16_224": ({"img_size": 64}, ["blocks.2", "blocks.9"]),
    "convnext_atto": ({}, ["stages.0", "stages.2"]),
    "swin_tiny_patch4_window7_224": ({"img_size": 64, "window_size": 4}, ["layers.0", "layers.2"]),
}
SIDE, IMAGES = 64, 2
FORMS: dict[str, dict[str, Any]] = {"moment": {}, "learned": {"solver": "learned", "order": 1}}

_made: dict[tuple[str, int], nn.Module] = {}


def network(name: str, seed: int) -> nn.Module:
    if (name, seed) not in _made:
        torch.manual_seed(seed)
        _made[name, seed] = timm.create_model(name, num_classes=10, **NETWORKS[name][0])
    return copy.deepcopy(_made[name, seed])


def batch(seed: int = 0) -> Tensor:
    return torch.randn(IMAGES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def hooks_of(*models: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for model in models for module in model.modules() for kind in kinds)


def stepped(
    student: nn.Module, iso: IsomorphismLoss, call: int = 0, run: Callable[[Tensor], Any] | None = None
) -> dict[str, Tensor]:
    """One training step without the update: the gradients of cross-entropy plus loss, by parameter."""
    torch.manual_seed(call)  # drop path
    student.zero_grad()
    loss = F.cross_entropy((student if run is None else run)(batch(call)).float(), torch.arange(IMAGES)) + iso()
    loss.backward()
    return {"loss": loss.detach()} | {
        name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None
    }


def ready(form: str, student: nn.Module, teacher: nn.Module, layers: Any, **more: Any) -> IsomorphismLoss:
    """A loss whose maps stand, whatever the number of rows that one batch has."""
    iso = IsomorphismLoss(student, teacher, layers, **({"scale": "linear", "weight": 1.0} | FORMS[form] | more))
    for map_ in iso.maps.values():
        if form == "moment":
            torch.nn.init.normal_(map_.weight, std=0.05)
            map_.variance.fill_(10.0)
            map_.ready = True
            map_.refresh = 10**6
    return iso


def same(first: dict[str, Tensor], second: dict[str, Tensor], **tolerance: float) -> None:
    assert set(first) == set(second)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


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


def test_a_compiled_student_has_the_same_gradients(name: str) -> None:
    student, teacher = network(name, 1), network(name, 2)
    torch.manual_seed(0)
    iso = ready("moment", student, teacher, NETWORKS[name][1])
    with iso:
        plain = stepped(student, iso)
    torch.compiler.reset()
    compiled = torch.compile(student, backend="eager", fullgraph=True)
    torch.manual_seed(0)
    iso = ready("moment", compiled, teacher, NETWORKS[name][1])
    with iso:
        same(plain, stepped(student, iso, run=compiled), rtol=1e-3, atol=1e-4)
    torch.compiler.reset()


def test_a_compiled_step_works() -> None:
    student, teacher = network("resnet18", 1), network("resnet18", 2)
    iso = ready("moment", student, teacher, "layer2")
    weight = iso.maps["layer2→layer2"].weight.clone()
    with iso:
        plain = stepped(student, iso)
    torch.compiler.reset()
    iso = ready("moment", student, teacher, "layer2")
    iso.maps["layer2→layer2"].weight.copy_(weight)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(student(images), labels) + iso()

    with iso:
        student.zero_grad()
        loss = torch.compile(step, backend="aot_eager")(batch(), torch.arange(IMAGES))
        loss.backward()
        found = {"loss": loss.detach()} | {
            name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None
        }
    same(plain, found, rtol=1e-3, atol=1e-4)
    torch.compiler.reset()


def test_balancing_measures_the_gradients_at_the_layer(name: str) -> None:
    student, teacher, late = network(name, 1), network(name, 2), NETWORKS[name][1][1]
    iso = ready("moment", student, teacher, NETWORKS[name][1], weight="balanced")
    emitted: list[Tensor] = []
    student.get_submodule(late).register_forward_hook(lambda module, args, out: emitted.append(out))
    with iso:
        for call in range(2):  # the first forward is captured in another way
            emitted.clear()
            before = iso.balance.other_square[1].clone(), iso.balance.pair_square[1].clone()
            task = F.cross_entropy(student(batch(call)), torch.arange(IMAGES))
            own = iso()
            squares = [torch.autograd.grad(part, emitted, retain_graph=True)[0].square().sum() for part in (task, own)]
            (512.0 * (task + own)).backward()
            for kept, old, square in zip(
                (iso.balance.other_square[1], iso.balance.pair_square[1]), before, squares, strict=True
            ):
                assert float(kept) == pytest.approx(0.9 * float(old) + 0.1 * 512**2 * float(square), rel=1e-3)


def test_balancing_a_compiled_student_raises() -> None:
    student = network("resnet18", 1)
    iso = ready("moment", student, network("resnet18", 2), "layer2", weight="balanced")
    torch.compiler.reset()
    with iso:
        torch.compile(student, backend="aot_eager")(batch())
        with pytest.raises(OptionError, match=r"layer2.*not accessible in a compiled student"):
            iso()
    torch.compiler.reset()


def test_the_default_weight_of_a_compiled_student_is_fixed() -> None:
    student = network("resnet18", 1)
    iso = ready("moment", student, network("resnet18", 2), "layer2", refresh=1, weight="auto")
    torch.compiler.reset()
    compiled = torch.compile(student, backend="aot_eager")
    weights = []
    with iso:
        for call in range(6):
            run = compiled if call > 2 else student
            (F.cross_entropy(run(batch(call)), torch.arange(IMAGES)) + iso()).backward()
            weights.append(iso.log()["iso/train/layer2/weight"])
    torch.compiler.reset()
    assert 0 < weights[2] < FALLBACK_WEIGHT  # balanced
    assert weights[4:] == [FALLBACK_WEIGHT] * 2


def test_attaching_after_the_first_compiled_call_raises() -> None:
    student = torch.compile(network("resnet18", 1), backend="eager")
    student(batch())
    with IsomorphismLoss(student, network("resnet18", 2), "layer2") as iso:
        student(batch())
        with pytest.raises(CaptureError, match="hooks attached after its first call"):
            iso()
    torch.compiler.reset()


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


@pytest.fixture
def _collected() -> Iterator[None]:
    gc.collect()
    yield
    gc.collect()


# Without another loss four images a step leave few directions of six channels
@pytest.mark.filterwarnings("ignore:1. the student's features have collapsed")
@pytest.mark.usefixtures("_collected")
@pytest.mark.parametrize(
    "options", [{}, {"solver": "learned", "order": 1}, {"weight": "balanced"}], ids=["moment", "learned", "balanced"]
)
def test_memory_is_flat_over_hundreds_of_steps(options: dict[str, Any]) -> None:
    def tiny() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, 2), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
        )

    def alive() -> tuple[int, int]:
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
        return len(tensors), sum(tensor.numel() for tensor in tensors)

    torch.manual_seed(0)
    student, teacher = tiny(), tiny()
    iso = IsomorphismLoss(student, teacher, "1", example=torch.zeros(1, 3, 9, 9), **options)
    optimizer = torch.optim.SGD([*student.parameters(), *iso.parameters()], lr=0.01)
    with iso:
        for step in range(301):
            optimizer.zero_grad()
            (student(torch.randn(4, 3, 9, 9)).square().mean() + iso()).backward()
            optimizer.step()
            if step == 100:
                early = alive()
        assert alive() == early
    assert hooks_of(student, teacher) == 0
