"""Equality of training in two processes (gloo, DDP) and in one: losses, student, and state of the loss."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from knowiso_train import IsomorphismLoss
from knowiso_train.distillation import WeightSchedule
from knowiso_train.distillation._collapse import CollapseGuard
from knowiso_train.distillation._scale import joint_shares
from knowiso_train.errors import KnowisoWarning
from knowiso_train.features.modules import LayerPair
from knowiso_train.utils.distributed import ProcessGroup
from tests.helpers.processes import WORLD, run_in_processes

STEPS, IMAGES = 5, 32
FORMS: dict[str, dict[str, Any]] = {
    "moment": {},
    "moment_3x3": {"kernel_size": 3, "window": 7},
    "learned": {"solver": "learned", "order": 1},
    "learned_linear": {"solver": "learned"},
    "consensus": {"target": "consensus"},
    "log": {"scale": "log", "weight": 3.0},
    "log_learned": {"scale": "log", "weight": 3.0, "solver": "learned", "order": 1},
    "balanced": {"weight": "balanced", "ratio": 0.5, "schedule": WeightSchedule(warmup=2)},
}


def network(seed: int) -> nn.Module:
    """vit_tiny at reduced size: no batch norm, whose statistics differ by process."""
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=12, depth=3, num_heads=3, num_classes=5
    )
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(IMAGES, 3, 32, 32, generator=generator), torch.randint(5, (IMAGES,), generator=generator)


def trained(form: str, rank: int = 0, world: int = 1, *, accelerated: bool = False) -> dict[str, Any]:
    """Losses, weights and state after a few steps on this process's part of the batches."""
    options: dict[str, Any] = {"scale": "linear", "weight": 1.0} | FORMS[form]
    if form == "consensus":
        options["peers"] = [network(3)]
    student, teacher = network(1), network(2)
    torch.manual_seed(100 + rank)  # a learned map that starts differently in each process must be made equal
    iso = IsomorphismLoss(student, teacher, {"blocks.0": "blocks.0", "blocks.2": "blocks.1"}, refresh=2, **options)
    if world == 1:
        torch.manual_seed(100)
        iso = IsomorphismLoss(student, teacher, {"blocks.0": "blocks.0", "blocks.2": "blocks.1"}, refresh=2, **options)
    optimizer: Any = torch.optim.SGD([*student.parameters(), *iso.parameters()], lr=0.05)
    run: Any = student
    accelerator = Accelerator(cpu=True) if accelerated else None
    if accelerator is not None:
        run, optimizer = accelerator.prepare(student, optimizer)
    elif world > 1:
        run = DistributedDataParallel(student)
    losses, logs = [], []
    mine = slice(rank * IMAGES // world, (rank + 1) * IMAGES // world)
    with iso:
        for step in range(STEPS):
            images, labels = (part[mine] for part in batch(step))
            loss = F.cross_entropy(run(images), labels) + iso()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            logs.append(iso.log())
    assert logs[-1]["iso/train/blocks.0/share"] != 0  # every map was on
    assert logs[-1]["iso/train/blocks.2/share"] != 0
    of_each = (
        "moments",
        "target",
        "balance.other_square",
        "balance.pair_square",
    )  # each process holds its part of them
    own = {name: value for name, value in iso.state_dict().items() if not any(part in name for part in of_each)}
    # The references of collapsed features are means over the processes
    own["_extra_state"] = own["_extra_state"][:5]
    return {"losses": torch.stack(losses), "student": student.state_dict(), "own": own}


CASES = [*((form, False) for form in FORMS), ("learned", True)]


def lowered_factors(rank: int) -> list[float]:
    """Return the factors for a feature whose variance falls to 1e-6 in one process and to 0.01 in the other."""
    guard, healthy = CollapseGuard([LayerPair("a", "b")]), batch(0)[0][:, :, :8, :8]
    factors = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KnowisoWarning)
        for scale in [1.0] * 2 + [1e-3 if rank else 1e-1] * 4 + [1.0] * 2:
            guard.refresh([scale * healthy], [healthy], [50.0])
            factors.append(guard.factor(0))
    return factors


def joint_shares_and_gradients(rank: int) -> list[list[float]]:
    """Return the joint shares of two pairs and their gradients; the last process has no images for the second pair."""
    shares = [torch.tensor(0.25 * (rank + 1), requires_grad=True), torch.tensor([0.5, 0.0][rank], requires_grad=True)]
    joint = joint_shares(shares, ProcessGroup())
    return [[float(share.detach()) for share in joint], [float(g) for g in torch.autograd.grad(sum(joint), shares)]]


def learned_with_an_empty_process(rank: int) -> dict[str, Tensor]:
    """Return the maps after a training in which the last process has no images from the third step on."""
    torch.manual_seed(rank)
    student, teacher = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1)) for _ in range(2))
    iso = IsomorphismLoss(student, teacher, ["0", "1"], refresh=2, solver="learned", order=1, weight=1.0, scale="log")
    optimizer = torch.optim.SGD([*student.parameters(), *iso.parameters()], lr=0.01)
    with iso:
        for step in range(6):
            images = batch(step)[0][:, :, :4, :4]
            student(images[: 0 if rank and step > 1 else 8])
            optimizer.zero_grad()
            iso().backward()
            optimizer.step()
    return {name: value.detach() for name, value in iso.named_parameters()}


def worker(rank: int, folder: str) -> None:
    torch.save(learned_with_an_empty_process(rank), Path(folder) / f"empty-{rank}.pt")
    torch.save(joint_shares_and_gradients(rank), Path(folder) / f"shares-{rank}.pt")
    torch.save(lowered_factors(rank), Path(folder) / f"factors-{rank}.pt")
    for form, accelerated in CASES:
        torch.save(
            trained(form, rank, WORLD, accelerated=accelerated), Path(folder) / f"{form}-{accelerated}-{rank}.pt"
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two")
    run_in_processes(worker, str(path))
    return path


def test_two_processes_lower_weights_together(folder: Path) -> None:
    first, second = (torch.load(folder / f"factors-{rank}.pt", weights_only=True) for rank in range(WORLD))
    assert first == second
    assert min(first) < 1


def test_processes_without_images_do_not_lower_joint_shares(folder: Path) -> None:
    results = [torch.load(folder / f"shares-{rank}.pt", weights_only=True) for rank in range(WORLD)]
    assert results == [[[0.375, 0.5], [1.0, 1.0]]] * WORLD


def test_learned_maps_stay_equal_where_a_process_has_no_images(folder: Path) -> None:
    first, second = (torch.load(folder / f"empty-{rank}.pt", weights_only=True) for rank in range(WORLD))
    assert first.keys() == second.keys() != set()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(("form", "accelerated"), CASES)
def test_two_processes_train_as_one(form: str, accelerated: bool, folder: Path) -> None:
    first, second = (torch.load(folder / f"{form}-{accelerated}-{rank}.pt", weights_only=True) for rank in range(WORLD))
    alone = trained(form)
    torch.testing.assert_close((first["losses"] + second["losses"]) / 2, alone["losses"], rtol=1e-4, atol=1e-5)
    start = network(1).state_dict()
    for name, value in alone["student"].items():
        torch.testing.assert_close(first["student"][name], second["student"][name], rtol=0, atol=0)
        torch.testing.assert_close(
            first["student"][name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert any(not torch.equal(value, start[name]) for name, value in alone["student"].items())
    for name, value in alone["own"].items():
        torch.testing.assert_close(first["own"][name], second["own"][name], rtol=0, atol=0)
        torch.testing.assert_close(
            first["own"][name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
