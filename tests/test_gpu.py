"""CPU = GPU, where a GPU is at hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from prune_families import FAMILIES, chain, family, little
from refined_networks import Eye, batches
from refined_networks import images as labelled_images
from test_losses import built
from test_measure import network
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import knowiso_train as ki
from knowiso_train.errors import KnowisoWarning
from knowiso_train.measurement import measure
from knowiso_train.pruning import mix_patches, take
from knowiso_train.refinement import FineTuning
from knowiso_train.statistics import StreamingMoments

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Convolutions in float32, so that both devices compute the same."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).cuda()


def agree(here: nn.Module, there: nn.Module, images: Tensor, within: float) -> None:
    """Outputs differ by at most this share of their variance."""
    with torch.no_grad():
        wanted, found = here(images), there(images.cuda()).cpu()
    assert (found - wanted).square().sum() <= within * (wanted - wanted.mean(0)).square().sum()


def test_moments_on_the_gpu_equal_those_on_the_cpu_also_with_tf32_allowed() -> None:
    x, y = torch.randn(40, 6, 9, 7) + 3, torch.randn(40, 4, 9, 7)
    here, there = StreamingMoments(6, 4, 3), StreamingMoments(6, 4, 3, "cuda")
    here.update(x, y)
    torch.set_float32_matmul_precision("high")
    try:
        there.update(x.cuda(), y.cuda())
    finally:
        torch.set_float32_matmul_precision("highest")
    for name, value in here.state_dict().items():
        torch.testing.assert_close(there.state_dict()[name].cpu(), value, rtol=1e-5, atol=1e-3)


def test_measure_on_the_gpu_equals_measure_on_the_cpu_and_brings_the_networks_back() -> None:
    loader = DataLoader(TensorDataset(torch.randn(160, 3, 8, 8)), batch_size=40)
    a, b = network(1), network(2)
    reports = [measure(a, b, loader, ["0", "4"], order=1, device=d, progress=False, solver_options={"epochs": 5}) for d in ("cpu", "cuda")]
    assert next(a.parameters()).device.type == "cpu"
    for one, other in zip(*reports, strict=True):
        assert one.shares[0] == pytest.approx(other.shares[0], abs=1e-4)
        assert one.unexplained == pytest.approx(other.unexplained, abs=0.02)  # order 1 is trained: same recipe, other rounding


def test_the_paper_s_solver_and_its_exact_split() -> None:
    x, y = torch.randn(64, 6, 5, 5, device="cuda"), torch.randn(64, 6, 5, 5, device="cuda")
    maps = ki.Disentangler(solver="paper", order=2, kernel_size=3, solver_options={"epochs": 3}).fit(x, y)
    components, residual = maps.split(x, y)
    torch.testing.assert_close(sum(components) + residual, y, rtol=1e-4, atol=1e-4)


def trained(device: str, form: str, autocast: bool, calls: Callable[[nn.Module], nn.Module] = lambda model: model) -> list[float]:
    student, teacher, peer = (built(seed).to(device) for seed in (1, 2, 3))
    iso = ki.IsomorphismLoss(student, teacher, {"2": "2"}, form=form, **({"peers": [peer]} if form == "consensus" else {})).to(device)
    optimizer = torch.optim.SGD([*student.parameters(), *iso.parameters()], lr=0.01)
    generator, losses = torch.Generator().manual_seed(0), []
    with iso:
        run = calls(student)
        for _ in range(25):
            images = torch.randn(32, 3, 8, 8, generator=generator).to(device)
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                loss = run(images).square().mean() + iso()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("form", ["moment", "learned", "consensus"])
def test_a_training_with_the_loss_is_the_same_on_both(form: str) -> None:
    exactly = trained("cuda", form, False)
    assert exactly == pytest.approx(trained("cpu", form, False), rel=2e-3)
    assert trained("cuda", form, True) == pytest.approx(exactly, rel=0.05)


def test_a_compiled_student_trains_the_same() -> None:
    assert trained("cuda", "moment", False, torch.compile) == pytest.approx(trained("cuda", "moment", False), rel=2e-3)


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv3_small_050", "densenet121", "convnext_atto", "vit_tiny_patch16_224"])
def test_prune_on_the_gpu_gives_the_same_network(name: str, tmp_path: Path) -> None:
    model, images = family(name)
    there = copied(model)
    results = [little(net, batch) for net, batch in ((model, images), (there, images.cuda()))]
    assert next(results[1].model.parameters()).is_cuda
    assert results[0].report.macs == results[1].report.macs
    for key, value in model.state_dict().items():
        assert torch.equal(*(take(value, result.kept[key]) if key in result.kept else value for result in results))
    agree(results[0].model, results[1].model, images, 1e-3)
    results[1].save(tmp_path / "saved", factory=(name, {"num_classes": 5, **FAMILIES[name]}), example=images[:1].shape)
    loaded = ki.load_pruned(tmp_path / "saved")
    agree(loaded, results[1].model, images, 1e-6)


def test_refit_after_torch_pruning_and_blocks_and_tune() -> None:
    model, images = chain()
    fresh = torch.randn(64, 3, 10, 10)
    cuts = []
    for net, seen in ((model, images), (copied(model), images.cuda())):
        small = copy.deepcopy(net)
        importance = ki.IsomorphismImportance(small, [seen])
        options: dict[str, Any] = {"pruning_ratio": 0.4, "ignored_layers": [small.fc]}
        tp.pruner.BasePruner(small, seen[:1], importance, **options).step()
        ki.refit(small, net, [seen], progress=False)
        cuts.append(small)
    agree(cuts[0], cuts[1], fresh, 1e-3)
    report = ki.tune(cuts[1], net, [seen], steps=60, batch_size=32, logit_weight=1.0, transform=lambda x: mix_patches(x, flip=True), progress=False)
    assert report.after.objective <= report.before.objective


def test_blocks_are_tuned_on_the_gpu_too() -> None:
    model, images = family("test_resnet")
    small = little(copied(model), images.cuda(), block_steps=5)
    assert next(small.model.parameters()).is_cuda


def test_optimisers_are_carried() -> None:
    model, images = chain()
    model, images = model.cuda(), images.cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model(images).square().mean().backward()
    optimizer.step()
    with ki.carrying(model, optimizer):
        tp.pruner.BasePruner(model, images[:1], tp.importance.MagnitudeImportance(p=1), pruning_ratio=0.5, ignored_layers=[model.fc]).step()
    for parameter in model.parameters():
        assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape
        assert optimizer.state[parameter]["momentum_buffer"].is_cuda
    model(images).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("options", [{"method": "head"}, {"method": "consensus", "training": FineTuning(steps=20)}], ids=["head", "consensus"])
def test_refine_gives_the_same_accuracy(options: dict[str, Any]) -> None:
    x, y = labelled_images(600)
    few = torch.cat([torch.nonzero(c == y)[:6, 0] for c in range(3)])
    sets: dict[str, Any] = {
        "labelled": batches(x[few], y[few]),
        "validation": batches(*labelled_images(300, seed=2)),
        "test": batches(*labelled_images(600, seed=3)),
        "progress": False,
    }
    here, there, brought = (
        ki.refine(Eye(0).to(home), [Eye(1).to(home)], batches(x), device=device, **sets, **options)
        for home, device in (("cpu", None), ("cuda", None), ("cpu", "cuda"))
    )
    for other, device in ((there, "cuda"), (brought, "cpu")):
        assert next(other.model.parameters()).device.type == device
        assert other.report.row("after").test.accuracy == pytest.approx(here.report.row("after").test.accuracy, abs=1.5)


def test_the_callback_leaves_the_training_alone(tmp_path: Path) -> None:
    held_out = [torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(9)) for _ in range(3)]

    def run(watched: bool) -> list[float]:
        student, teacher = built(1).cuda(), built(2).cuda()
        iso = ki.IsomorphismLoss(student, teacher, {"2": "2"}).cuda()
        monitor = ki.IsomorphismCallback.of(iso, held_out, every=5, path=tmp_path / "iso", progress=False) if watched else None
        optimizer, losses = torch.optim.SGD(student.parameters(), lr=0.01), []
        torch.manual_seed(5)
        with iso:
            for _ in range(15):
                out = student(torch.randn(16, 3, 8, 8, device="cuda"))
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


def test_few_images_warn_and_do_not_break_on_the_gpu() -> None:
    model, images = family("test_resnet")
    with pytest.warns(KnowisoWarning):
        pruned = ki.prune(model.cuda(), [images[:8].cuda()], macs=0.7, progress=False)
    assert pruned.model(images.cuda()).isfinite().all()
