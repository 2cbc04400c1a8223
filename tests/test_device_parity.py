"""Compare every part of the library on another device with the CPU: on the fake device, and on a GPU if available."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import knowiso_train as ki
from knowiso_train.errors import KnowisoWarning
from knowiso_train.measurement import measure
from knowiso_train.pruning import cutmix
from knowiso_train.pruning.kept_indices import index_kept
from knowiso_train.refinement import RefineFinetuneConfig
from tests.helpers import fake_device
from tests.helpers.prune_models import FAMILIES, chain, family, little
from tests.helpers.refine_models import SignalNet, batches
from tests.helpers.refine_models import images as labeled_images
from tests.helpers.small_networks import built
from tests.measurement.test_measure import network

needs_fake_device = pytest.mark.skipif(
    not fake_device.ENABLED, reason="runs in the process that test_this_file_passes_on_a_second_device starts"
)


@pytest.fixture(
    params=[pytest.param(fake_device.NAME, marks=needs_fake_device), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Activate the device; convolutions run in float32 on it, as on the CPU."""
    if request.param == "cuda":
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield request.param
    else:
        with fake_device.activate():
            yield request.param


@pytest.mark.skipif(fake_device.ENABLED, reason="already runs on the second device")
def test_this_file_passes_on_a_second_device() -> None:
    # Two families of networks run on CUDA only, as the fake device takes long for them
    fake_device.run_on_fake_device(__file__, without="test_efficientnet or densenet121")


@needs_fake_device
def test_fake_device_tensors_do_not_mix_with_cpu_tensors() -> None:
    with fake_device.activate():
        x, on_cpu = torch.randn(3, 4).to(fake_device.NAME), torch.randn(3, 4)
        with pytest.raises(RuntimeError, match="same device"):
            x + on_cpu
        with pytest.raises(RuntimeError, match="same device"):
            on_cpu[torch.tensor([0], device=fake_device.NAME)]
        assert (2 * x).device.type == fake_device.NAME
        assert torch.equal((x @ x.T).cpu(), x.cpu() @ x.cpu().T)


def copy_to(model: nn.Module, device: str) -> nn.Module:
    return copy.deepcopy(model).to(device)


def assert_outputs_agree(reference: nn.Module, other: nn.Module, images: Tensor, tolerance: float) -> None:
    """Assert that outputs differ by at most this fraction of their variance."""
    with torch.no_grad():
        expected, actual = reference(images), other(images.to(next(other.parameters()).device)).cpu()
    assert (actual - expected).square().sum() <= tolerance * (expected - expected.mean(0)).square().sum()


def test_measure_gives_the_same_shares_and_restores_the_device(device: str) -> None:
    loader = DataLoader(TensorDataset(torch.randn(120, 3, 8, 8)), batch_size=40)
    a, b = network(1), network(2)
    reports = [
        measure(a, b, loader, ["0", "4"], order=1, device=d, progress=False, solver_options={"epochs": 2})
        for d in ("cpu", device)
    ]
    assert next(a.parameters()).device.type == "cpu"
    for on_cpu, other in zip(*reports, strict=True):
        assert on_cpu.shares[0] == pytest.approx(other.shares[0], abs=1e-4)
        # Order 1 is trained by gradient descent, so rounding differences grow
        assert on_cpu.unexplained == pytest.approx(other.unexplained, abs=0.02)


def test_the_paper_solver_splits_exactly(device: str) -> None:
    x, y = torch.randn(64, 6, 5, 5, device=device), torch.randn(64, 6, 5, 5, device=device)
    maps = ki.Disentangler(solver="paper", order=2, kernel_size=3, solver_options={"epochs": 3}).fit(x, y)
    components, residual = maps.split(x, y)
    torch.testing.assert_close(sum(components) + residual, y, rtol=1e-4, atol=1e-4)


def train_losses(
    device: str,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    autocast: bool = False,
    **options: Any,
) -> list[float]:
    """Train a small student for 25 steps and return the loss of every step."""
    student, teacher, peer = (built(seed).to(device) for seed in (1, 2, 3))
    options |= {"peers": [peer]} if options.get("target") == "consensus" else {}
    iso = ki.IsomorphismLoss(student, teacher, {"2": "2"}, **({"scale": "linear", "weight": 1.0} | options)).to(device)
    optimizer = torch.optim.SGD([*student.parameters(), *iso.parameters()], lr=0.01)
    generator, losses = torch.Generator().manual_seed(0), []
    with iso:
        wrapped_student = wrap(student)
        for _ in range(25):
            images = torch.randn(32, 3, 8, 8, generator=generator).to(device)
            with torch.autocast(device, torch.bfloat16) if autocast else nullcontext():
                loss = wrapped_student(images).square().mean() + iso()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


LOSS_OPTIONS: list[dict[str, Any]] = [
    {},
    {"kernel_size": 3},
    {"weight": "balanced"},
    {"solver": "learned"},
    {"solver": "learned", "order": 1},
    {"target": "consensus"},
]


@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=str)
def test_training_with_the_loss_gives_the_same_losses(device: str, options: dict[str, Any]) -> None:
    assert train_losses(device, **options) == pytest.approx(train_losses("cpu", **options), rel=2e-3)


def synchronizing_calls(device: str, work: Callable[[], Any]) -> list[str]:
    """Return the operations of `work` that made the host wait for the device."""
    if device != "cuda":
        with fake_device.host_synchronizations() as synchronizations:
            work()
        return list(synchronizations)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter("always")
            work()
        return [str(warning.message) for warning in messages if "synchroniz" in str(warning.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=str)
def test_steps_between_refreshes_do_not_synchronize(device: str, options: dict[str, Any]) -> None:
    student, teacher, peer = (built(seed).to(device) for seed in (1, 2, 3))
    options |= {"peers": [peer]} if options.get("target") == "consensus" else {}
    iso = ki.IsomorphismLoss(student, teacher, {"2": "2"}, **({"scale": "linear", "weight": 1.0} | options)).to(device)
    images = torch.randn(32, 3, 8, 8, device=device)

    def step() -> None:
        (student(images).square().mean() + iso()).backward()

    with iso:
        for _ in range(41):
            step()
        for _ in range(9):
            assert synchronizing_calls(device, step) == []
    assert all(map_.ready for map_ in iso.maps.values())


def test_a_teacher_on_the_cpu_gives_a_warning_that_names_it(device: str) -> None:
    student, teacher = built(1).to(device), built(2)
    with pytest.warns(KnowisoWarning, match=f"teacher is on the CPU .* are on {device}"):
        iso = ki.IsomorphismLoss(student, teacher, ["3"])
    with iso:
        student(torch.randn(8, 3, 8, 8).to(device))
        iso()
    assert iso.teacher_output.device.type == "cpu"


@pytest.mark.parametrize(
    ("transform", "labels"), [(None, 0.0), (lambda images: images.flip(3), 0.1)], ids=["cached", "transformed, labels"]
)
def test_the_number_of_synchronizations_of_finetune_is_independent_of_steps(
    device: str, transform: Any, labels: float
) -> None:
    original, pruned = (built(seed).to(device).eval() for seed in (1, 2))
    images, targets = torch.randn(64, 3, 8, 8, device=device), torch.arange(64, device=device) % 5

    def work(steps: int) -> Callable[[], Any]:
        options: dict[str, Any] = {
            "batch_size": 16,
            "lr": 1e-3,
            "transform": transform,
            "label_weight": labels,
            "progress": False,
        }
        return lambda: ki.finetune(pruned, original, [(images, targets)], steps=steps, **options)

    work(8)()
    assert len(synchronizing_calls(device, work(16))) == len(synchronizing_calls(device, work(8)))


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "densenet121", "convnext_atto", "vit_tiny_patch16_224"]
)
def test_prune_gives_the_same_channels_and_outputs(device: str, name: str, tmp_path: Path) -> None:
    model, images = family(name)
    model_on_device = copy_to(model, device)
    results = [little(net, batch) for net, batch in ((model, images), (model_on_device, images.to(device)))]
    assert next(results[1].model.parameters()).device.type == device
    assert results[0].report.macs == results[1].report.macs
    for key, value in model.state_dict().items():
        assert torch.equal(
            *(index_kept(value, result.kept[key]) if key in result.kept else value for result in results)
        )
    assert_outputs_agree(results[0].model, results[1].model, images, 1e-3)
    results[1].save(tmp_path / "saved", factory=(name, {"num_classes": 5, **FAMILIES[name]}), example=images[:1].shape)
    loaded = ki.load_pruned(tmp_path / "saved")
    assert_outputs_agree(loaded, results[1].model, images, 1e-6)


def test_refit_and_finetune_after_torch_pruning(device: str) -> None:
    model, images = chain()
    other_images = torch.randn(64, 3, 10, 10)
    pruned_models = []
    for net, batch in ((model, images), (copy_to(model, device), images.to(device))):
        small = copy.deepcopy(net)
        importance = ki.IsomorphismImportance(small, [batch])
        options: dict[str, Any] = {"pruning_ratio": 0.4, "ignored_layers": [small.fc]}
        tp.pruner.BasePruner(small, batch[:1], importance, **options).step()
        ki.refit(small, net, [batch], progress=False)
        pruned_models.append(small)
    assert_outputs_agree(pruned_models[0], pruned_models[1], other_images, 1e-3)
    report = ki.finetune(
        pruned_models[1],
        net,
        [batch],
        steps=20,
        batch_size=32,
        logit_weight=1.0,
        transform=lambda x: cutmix(x, flip=True),
        progress=False,
    )
    assert report.after.objective <= report.before.objective


def test_prune_with_a_parameter_budget_and_another_importance(device: str) -> None:
    model, images = chain()
    pruned = little(
        copy_to(model, device),
        images.to(device),
        macs=None,
        params=0.7,
        importance=tp.importance.MagnitudeImportance(p=1),
    )
    assert pruned.report.parameters[1] <= 0.7 * pruned.report.parameters[0]


def test_prune_finetunes_blocks_on_the_device(device: str) -> None:
    model, images = family("test_resnet")
    small = little(copy_to(model, device), images.to(device), block_steps=5)
    assert next(small.model.parameters()).device.type == device


def test_optimizer_states_stay_on_the_device(device: str) -> None:
    model, images = chain()
    model, images = model.to(device), images.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model(images).square().mean().backward()
    optimizer.step()
    with ki.preserve_optimizer_state(model, optimizer):
        tp.pruner.BasePruner(
            model, images[:1], tp.importance.MagnitudeImportance(p=1), pruning_ratio=0.5, ignored_layers=[model.fc]
        ).step()
    for parameter in model.parameters():
        assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape
        assert optimizer.state[parameter]["momentum_buffer"].device.type == device
    model(images).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {"method": "auto", "finetune_config": RefineFinetuneConfig(steps=5)},
        {"method": "head"},
        {"method": "consensus", "finetune_config": RefineFinetuneConfig(steps=6)},
        {"method": "paper", "layer": "global_pool", "finetune_config": RefineFinetuneConfig(steps=6)},
    ],
    ids=lambda options: options["method"],
)
def test_refine_gives_the_same_accuracy(device: str, options: dict[str, Any]) -> None:
    x, y = labeled_images(600)
    labeled_indices = torch.cat([torch.nonzero(c == y)[:6, 0] for c in range(3)])
    sets: dict[str, Any] = {
        "labeled": batches(x[labeled_indices], y[labeled_indices]),
        "validation": batches(*labeled_images(300, seed=2)),
        "test": batches(*labeled_images(600, seed=3)),
        "progress": False,
    }
    on_cpu, on_device, moved = (
        ki.refine(
            SignalNet(0).to(model_device),
            [SignalNet(1).to(model_device)],
            batches(x),
            device=run_device,
            **sets,
            **options,
        )
        for model_device, run_device in (("cpu", None), (device, None), ("cpu", device))
    )
    for other, expected_device in ((on_device, device), (moved, "cpu")):
        assert next(other.model.parameters()).device.type == expected_device
        assert other.report.row("after").test.accuracy == pytest.approx(
            on_cpu.report.row("after").test.accuracy, abs=1.5
        )


def test_the_callback_does_not_change_the_training(device: str, tmp_path: Path) -> None:
    held_out = [torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(9)) for _ in range(3)]

    def run(with_callback: bool) -> list[float]:
        student, teacher = built(1).to(device), built(2).to(device)
        iso = ki.IsomorphismLoss(student, teacher, {"2": "2"}).to(device)
        monitor = (
            ki.IsomorphismCallback.of(iso, held_out, every=5, path=tmp_path / "iso", progress=False)
            if with_callback
            else None
        )
        optimizer, losses = torch.optim.SGD(student.parameters(), lr=0.01), []
        torch.manual_seed(5)
        with iso:
            for _ in range(15):
                out = student(torch.randn(16, 3, 8, 8, device=device))
                loss = F.dropout(out, 0.2).square().mean() + iso()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
                if monitor is not None:
                    monitor.step()
        if monitor is not None:
            monitor.end()
            assert (tmp_path / "iso" / "report.json").exists()
        return losses

    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        assert run(True) == run(False)


def test_few_images_warn_and_give_finite_outputs(device: str) -> None:
    model, images = family("test_resnet")
    with pytest.warns(KnowisoWarning):
        pruned = ki.prune(model.to(device), [images[:8].to(device)], macs=0.7, progress=False)
    assert pruned.model(images.to(device)).isfinite().all()
