"""What the library computes on another device is what it computes on the CPU: on a pretended one everywhere, and on a GPU where there is one."""

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
from knowiso_train.refinement import FinetuneConfig
from tests.distillation.test_estimators import built
from tests.helpers import fake_device
from tests.helpers.prune_models import FAMILIES, chain, family, little
from tests.helpers.refine_models import Eye, batches
from tests.helpers.refine_models import images as labeled_images
from tests.measurement.test_measure import network

needs_it = pytest.mark.skipif(not fake_device.ON, reason="no device is pretended here; test_all_of_it turns it on")


@pytest.fixture(params=[pytest.param(fake_device.NAME, marks=needs_it), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Convolutions in float32, so that both devices compute the same."""
    if request.param == "cuda":
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield request.param
    else:
        with fake_device.pretending():
            yield request.param


@pytest.mark.skipif(fake_device.ON, reason="this is it")
def test_all_of_it() -> None:
    fake_device.run_pretended(__file__)


@needs_it
def test_pretended_tensors_do_not_mix_with_others() -> None:
    with fake_device.pretending():
        x, here = torch.randn(3, 4).to(fake_device.NAME), torch.randn(3, 4)
        with pytest.raises(RuntimeError, match="same device"):
            x + here
        with pytest.raises(RuntimeError, match="same device"):
            here[torch.tensor([0], device=fake_device.NAME)]
        assert (2 * x).device.type == fake_device.NAME
        assert torch.equal((x @ x.T).cpu(), x.cpu() @ x.cpu().T)


def copied(model: nn.Module, device: str) -> nn.Module:
    return copy.deepcopy(model).to(device)


def agree(here: nn.Module, there: nn.Module, images: Tensor, within: float) -> None:
    """Outputs differ by at most this share of their variance."""
    with torch.no_grad():
        wanted, found = here(images), there(images.to(next(there.parameters()).device)).cpu()
    assert (found - wanted).square().sum() <= within * (wanted - wanted.mean(0)).square().sum()


def test_measure_and_the_networks_come_back(device: str) -> None:
    loader = DataLoader(TensorDataset(torch.randn(160, 3, 8, 8)), batch_size=40)
    a, b = network(1), network(2)
    reports = [
        measure(a, b, loader, ["0", "4"], order=1, device=d, progress=False, solver_options={"epochs": 5})
        for d in ("cpu", device)
    ]
    assert next(a.parameters()).device.type == "cpu"
    for one, other in zip(*reports, strict=True):
        assert one.shares[0] == pytest.approx(other.shares[0], abs=1e-4)
        # Order 1 is trained: same recipe, other rounding
        assert one.unexplained == pytest.approx(other.unexplained, abs=0.02)


def test_the_paper_s_solver_and_its_exact_split(device: str) -> None:
    x, y = torch.randn(64, 6, 5, 5, device=device), torch.randn(64, 6, 5, 5, device=device)
    maps = ki.Disentangler(solver="paper", order=2, kernel_size=3, solver_options={"epochs": 3}).fit(x, y)
    components, residual = maps.split(x, y)
    torch.testing.assert_close(sum(components) + residual, y, rtol=1e-4, atol=1e-4)


def trained(
    device: str,
    form: str,
    calls: Callable[[nn.Module], nn.Module] = lambda model: model,
    autocast: bool = False,
    **options: Any,
) -> list[float]:
    student, teacher, peer = (built(seed).to(device) for seed in (1, 2, 3))
    options |= {"peers": [peer]} if form == "consensus" else {}
    iso = ki.IsomorphismLoss(student, teacher, {"2": "2"}, form=form, **options).to(device)
    optimizer = torch.optim.SGD([*student.parameters(), *iso.parameters()], lr=0.01)
    generator, losses = torch.Generator().manual_seed(0), []
    with iso:
        run = calls(student)
        for _ in range(25):
            images = torch.randn(32, 3, 8, 8, generator=generator).to(device)
            with torch.autocast(device, torch.bfloat16) if autocast else nullcontext():
                loss = run(images).square().mean() + iso()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


FORMS: list[tuple[str, dict[str, Any]]] = [
    ("moment", {}),
    ("moment", {"kernel_size": 3}),
    ("moment", {"weight": "balanced"}),
    ("learned", {}),
    ("learned", {"order": 1}),
    ("consensus", {}),
]


@pytest.mark.parametrize(("form", "options"), FORMS, ids=str)
def test_a_training_with_the_loss_is_the_same_on_both(device: str, form: str, options: dict[str, Any]) -> None:
    assert trained(device, form, **options) == pytest.approx(trained("cpu", form, **options), rel=2e-3)


def waits(device: str, work: Callable[[], Any]) -> list[str]:
    """What made the host wait for the device."""
    if device != "cuda":
        with fake_device.stops() as stops:
            work()
        return list(stops)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            work()
        return [str(warning.message) for warning in seen if "synchroniz" in str(warning.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("form", "options"), FORMS, ids=str)
def test_between_refreshes_no_step_waits_for_the_device(device: str, form: str, options: dict[str, Any]) -> None:
    student, teacher, peer = (built(seed).to(device) for seed in (1, 2, 3))
    options |= {"peers": [peer]} if form == "consensus" else {}
    iso = ki.IsomorphismLoss(student, teacher, {"2": "2"}, form=form, **options).to(device)
    images = torch.randn(32, 3, 8, 8, device=device)

    def step() -> None:
        (student(images).square().mean() + iso()).backward()

    with iso:
        for _ in range(41):
            step()
        for _ in range(9):
            assert waits(device, step) == []
    assert all(map_.ready for map_ in iso.maps.values())


def test_a_teacher_that_was_left_on_the_cpu_is_named(device: str) -> None:
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
def test_a_longer_tuning_waits_no_more_often_for_the_device(device: str, transform: Any, labels: float) -> None:
    original, pruned = (built(seed).to(device).eval() for seed in (1, 2))
    images, truth = torch.randn(64, 3, 8, 8, device=device), torch.arange(64, device=device) % 5

    def work(steps: int) -> Callable[[], Any]:
        options: dict[str, Any] = {
            "batch_size": 16,
            "lr": 1e-3,
            "transform": transform,
            "label_weight": labels,
            "progress": False,
        }
        return lambda: ki.finetune(pruned, original, [(images, truth)], steps=steps, **options)

    work(8)()
    assert len(waits(device, work(16))) == len(waits(device, work(8)))


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "densenet121", "convnext_atto", "vit_tiny_patch16_224"]
)
def test_prune_gives_the_same_network(device: str, name: str, tmp_path: Path) -> None:
    model, images = family(name)
    there = copied(model, device)
    results = [little(net, batch) for net, batch in ((model, images), (there, images.to(device)))]
    assert next(results[1].model.parameters()).device.type == device
    assert results[0].report.macs == results[1].report.macs
    for key, value in model.state_dict().items():
        assert torch.equal(
            *(index_kept(value, result.kept[key]) if key in result.kept else value for result in results)
        )
    agree(results[0].model, results[1].model, images, 1e-3)
    results[1].save(tmp_path / "saved", factory=(name, {"num_classes": 5, **FAMILIES[name]}), example=images[:1].shape)
    loaded = ki.load_pruned(tmp_path / "saved")
    agree(loaded, results[1].model, images, 1e-6)


def test_refit_after_torch_pruning_and_blocks_and_tune(device: str) -> None:
    model, images = chain()
    fresh = torch.randn(64, 3, 10, 10)
    cuts = []
    for net, seen in ((model, images), (copied(model, device), images.to(device))):
        small = copy.deepcopy(net)
        importance = ki.IsomorphismImportance(small, [seen])
        options: dict[str, Any] = {"pruning_ratio": 0.4, "ignored_layers": [small.fc]}
        tp.pruner.BasePruner(small, seen[:1], importance, **options).step()
        ki.refit(small, net, [seen], progress=False)
        cuts.append(small)
    agree(cuts[0], cuts[1], fresh, 1e-3)
    report = ki.finetune(
        cuts[1],
        net,
        [seen],
        steps=60,
        batch_size=32,
        logit_weight=1.0,
        transform=lambda x: cutmix(x, flip=True),
        progress=False,
    )
    assert report.after.objective <= report.before.objective


def test_other_budgets_and_importances(device: str) -> None:
    model, images = chain()
    pruned = little(
        copied(model, device),
        images.to(device),
        macs=None,
        params=0.7,
        importance=tp.importance.MagnitudeImportance(p=1),
    )
    assert pruned.report.parameters[1] <= 0.7 * pruned.report.parameters[0]


def test_blocks_are_tuned_there_too(device: str) -> None:
    model, images = family("test_resnet")
    small = little(copied(model, device), images.to(device), block_steps=5)
    assert next(small.model.parameters()).device.type == device


def test_optimizers_are_carried(device: str) -> None:
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
        {"method": "auto", "training": FinetuneConfig(steps=5)},
        {"method": "head"},
        {"method": "consensus", "training": FinetuneConfig(steps=20)},
        {"method": "paper", "layer": "global_pool", "training": FinetuneConfig(steps=20)},
    ],
    ids=lambda options: options["method"],
)
def test_refine_gives_the_same_accuracy(device: str, options: dict[str, Any]) -> None:
    x, y = labeled_images(600)
    few = torch.cat([torch.nonzero(c == y)[:6, 0] for c in range(3)])
    sets: dict[str, Any] = {
        "labeled": batches(x[few], y[few]),
        "validation": batches(*labeled_images(300, seed=2)),
        "test": batches(*labeled_images(600, seed=3)),
        "progress": False,
    }
    here, there, brought = (
        ki.refine(Eye(0).to(home), [Eye(1).to(home)], batches(x), device=runs_on, **sets, **options)
        for home, runs_on in (("cpu", None), (device, None), ("cpu", device))
    )
    for other, home in ((there, device), (brought, "cpu")):
        assert next(other.model.parameters()).device.type == home
        assert other.report.row("after").test.accuracy == pytest.approx(here.report.row("after").test.accuracy, abs=1.5)


def test_the_callback_leaves_the_training_alone(device: str, tmp_path: Path) -> None:
    held_out = [torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(9)) for _ in range(3)]

    def run(watched: bool) -> list[float]:
        student, teacher = built(1).to(device), built(2).to(device)
        iso = ki.IsomorphismLoss(student, teacher, {"2": "2"}).to(device)
        monitor = (
            ki.IsomorphismCallback.of(iso, held_out, every=5, path=tmp_path / "iso", progress=False)
            if watched
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


def test_few_images_warn_and_do_not_break(device: str) -> None:
    model, images = family("test_resnet")
    with pytest.warns(KnowisoWarning):
        pruned = ki.prune(model.to(device), [images[:8].to(device)], macs=0.7, progress=False)
    assert pruned.model(images.to(device)).isfinite().all()
