"""The loss in compiled students and steps, and its balanced weights there and in eager mode."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from knowiso_train import IsomorphismLoss
from knowiso_train.distillation.config import FALLBACK_WEIGHT
from knowiso_train.errors import CaptureError, KnowisoWarning, OptionError
from tests.helpers.timm_networks import IMAGES, NETWORKS, batch, network, ready, same, stepped


@pytest.mark.parametrize("name", NETWORKS)
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


@pytest.mark.parametrize("name", NETWORKS)
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
    with iso, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KnowisoWarning)
        for call in range(6):
            run = compiled if call > 2 else student
            (F.cross_entropy(run(batch(call)), torch.arange(IMAGES)) + iso()).backward()
            weights.append(iso.log()["iso/train/layer2/weight"])
    torch.compiler.reset()
    assert 0 < weights[2] < FALLBACK_WEIGHT  # balanced
    assert weights[4:] == [FALLBACK_WEIGHT] * 2
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, KnowisoWarning)]
    assert ["is 100 at 'layer2': the gradients inside a compiled" in message for message in messages] == [True]


def test_attaching_after_the_first_compiled_call_raises() -> None:
    student = torch.compile(network("resnet18", 1), backend="eager")
    student(batch())
    with IsomorphismLoss(student, network("resnet18", 2), "layer2") as iso:
        student(batch())
        with pytest.raises(CaptureError, match="hooks attached after its first call"):
            iso()
    torch.compiler.reset()
