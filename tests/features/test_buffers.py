"""Buffers that a forward pass changes are restored wherever the library runs a network of the user."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import knowiso_train as ki
from knowiso_train.features import preserve_state
from knowiso_train.features.summary import layer_summary, stage_grids

IMAGES = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(48) % 4


class Observer(nn.Module):
    """Identity with buffers that its forward pass changes in eval mode too, each in another way."""

    def __init__(self, change: Callable[[Any, Tensor], None], **buffers: Tensor | None) -> None:
        super().__init__()
        self.change, self.length = change, 0
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=name != "hidden")

    def forward(self, x: Tensor) -> Tensor:
        self.change(self, x.detach())
        return x


def count(module: Any, x: Tensor) -> None:
    module.calls += 1


def resize(module: Any, x: Tensor) -> None:
    with torch.no_grad():
        module.low.resize_(x.shape[1]).copy_(x.amin((0, 2, 3)))


def replace(module: Any, x: Tensor) -> None:
    module.mean, module.length = 0.9 * module.mean + 0.1 * x.mean(), len(x)


def fill(module: Any, x: Tensor) -> None:
    module.mask = torch.ones(x.shape[1:])


def register(module: Any, x: Tensor) -> None:
    if len(module._buffers) == 1:
        module.register_buffer("cache", x[:1].clone())


def through_alias(module: Any, x: Tensor) -> None:
    module.part.add_(1)


def assign_data(module: Any, x: Tensor) -> None:
    module.low.data = x.mean((0, 2, 3))


def expanded() -> Tensor:
    return torch.zeros(1).expand(3)


def set_expanded(module: Any, x: Tensor) -> None:
    module.steps[:1].add_(1)


def aliases() -> dict[str, Tensor | None]:
    whole = torch.zeros(4)
    return {"whole": whole, "part": whole[1:3], "again": whole}


OBSERVERS: dict[str, Callable[[], Observer]] = {
    "counter": lambda: Observer(count, calls=torch.tensor(0)),
    "hidden counter": lambda: Observer(lambda m, x: m.hidden.add_(1), hidden=torch.zeros(2)),
    "resized": lambda: Observer(resize, low=torch.tensor([])),
    "replaced": lambda: Observer(replace, mean=torch.tensor(0.5)),
    "filled": lambda: Observer(fill, mask=None),
    "registered": lambda: Observer(register, first=torch.tensor(1.0)),
    "alias": lambda: Observer(through_alias, **aliases()),
    "data": lambda: Observer(assign_data, low=torch.zeros(1)),
    "expanded": lambda: Observer(set_expanded, steps=expanded()),
}


def network(observer: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        observer,
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def observed(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Return identity, shape and values of every buffer, and the plain attribute of the observer."""
    found: dict[tuple[str, str], Any] = {}
    for name, module in model.named_modules():
        for key, buffer in module._buffers.items():
            found[name, key] = None if buffer is None else (id(buffer), buffer.data_ptr(), buffer.tolist())
        found[name, "persistent"] = sorted(module._non_persistent_buffers_set)
        found[name, "length"] = getattr(module, "length", None)
    return found


def run_monitor(model: nn.Module, twin: nn.Module) -> None:
    iso = ki.IsomorphismLoss(model, twin, "3")
    ki.IsomorphismCallback.of(iso, [IMAGES], every=1, bootstrap=0, order=0).measure()


def run_prune(model: nn.Module, twin: nn.Module) -> None:
    ki.prune(model, [IMAGES], macs=0.8, progress=False)


def run_finetune(model: nn.Module, twin: nn.Module) -> None:
    ki.finetune(twin, model, [IMAGES], steps=2, batch_size=8, progress=False)


def run_refine(model: nn.Module, twin: nn.Module) -> None:
    loader = DataLoader(TensorDataset(IMAGES, LABELS), 16)
    ki.refine(model, [twin], loader, validation=loader, max_images=48, progress=False)


CALLS: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "measure": lambda m, t: ki.measure(m, t, [IMAGES], "3", order=0, bootstrap=0, progress=False),
    "measure on a device": lambda m, t: ki.measure(
        m, t, [IMAGES], "3", order=0, bootstrap=0, progress=False, device="cpu"
    ),
    "loss": lambda m, t: ki.IsomorphismLoss(m, t, "3"),
    "teacher": lambda m, t: ki.IsomorphismLoss(t, m, "3"),
    "monitor": run_monitor,
    "prune": run_prune,
    "refit": lambda m, t: ki.refit(t, m, [IMAGES], progress=False),
    "finetune": run_finetune,
    "refine": run_refine,
    "summary": lambda m, t: layer_summary(m, IMAGES[:2]),
    "stages": lambda m, t: stage_grids(m, lambda: m(IMAGES[:2])),
}


@pytest.mark.parametrize("kind", OBSERVERS)
@pytest.mark.parametrize("call", ["measure", "measure on a device", "loss", "summary"])
@pytest.mark.filterwarnings("ignore")
def test_every_kind_of_buffer_is_restored(call: str, kind: str) -> None:
    model, twin = network(OBSERVERS[kind]()), network(nn.Identity())
    before = observed(model)
    CALLS[call](model, twin)
    assert observed(model) == before


@pytest.mark.parametrize("kind", ["counter", "replaced"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_buffers_are_restored_by_every_function_that_runs_a_network(call: str, kind: str) -> None:
    model, twin = network(OBSERVERS[kind]()), network(OBSERVERS[kind]())
    before = observed(model)
    try:
        CALLS[call](model, twin)
    except ki.KnowisoError:
        # Refused networks are restored too
        assert call in ("prune", "refit", "finetune", "refine")
    assert observed(model) == before


def test_buffers_are_restored_after_an_error() -> None:
    model = network(OBSERVERS["counter"]())
    before = observed(model)

    def fail() -> None:
        with preserve_state(model):
            model(IMAGES[:2])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert observed(model) == before


def test_restoring_does_not_invalidate_a_pending_backward_pass() -> None:
    norm = nn.BatchNorm2d(3).eval()
    x = IMAGES[:2].clone().requires_grad_()
    output = norm(x).square().sum()
    with preserve_state(norm):
        pass
    output.backward()
    assert x.grad is not None


def test_training_updates_the_running_statistics_of_the_student() -> None:
    student, teacher = network(nn.BatchNorm2d(8)), network(nn.BatchNorm2d(8))
    iso = ki.IsomorphismLoss(student, teacher, "3")
    statistics = student[2].running_mean.clone()
    with iso:
        student(IMAGES)
        iso()
    assert not torch.equal(student[2].running_mean, statistics)


def test_modules_that_the_block_updates_keep_their_buffers() -> None:
    model = network(nn.BatchNorm2d(8))
    with preserve_state(model, eval_mode=False, updated=[model[2]]):
        model(IMAGES)
    assert int(model[2].num_batches_tracked) == 1


@pytest.fixture
def quantized_student() -> Iterator[nn.Module]:
    quantization = pytest.importorskip("torch.ao.quantization")
    student = network(nn.Identity()).train()
    student.qconfig = quantization.get_default_qat_qconfig("x86")  # type: ignore[assignment]
    return quantization.prepare_qat(student)


@pytest.mark.filterwarnings("ignore")
def test_constructing_a_loss_leaves_the_observers_of_a_quantized_student(quantized_student: nn.Module) -> None:
    before = {name: buffer.clone() for name, buffer in quantized_student.named_buffers()}
    ki.IsomorphismLoss(quantized_student, network(nn.Identity()), "3")
    after = dict(quantized_student.named_buffers())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
