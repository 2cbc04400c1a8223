"""Equality of training and measuring under FSDP1, FSDP2 and DDP, in two processes on CPUs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from knowiso_train import IsomorphismCallback, IsomorphismLoss, measure
from knowiso_train.distillation.config import FALLBACK_WEIGHT
from knowiso_train.errors import DataError, OptionError
from knowiso_train.features.state import preserve_state
from tests.helpers.processes import WORLD, run_in_processes

STEPS, IMAGES = 5, 16
LAYERS = {"2": "2", "4": "4"}
FORMS: dict[str, dict[str, Any]] = {
    "closed_form": {},
    "learned": {"solver": "learned", "order": 1, "scale": "linear", "weight": 1.0},
    # Without another loss, and with one of all outputs that is zero. In log scale a map that explains nothing, as that
    # of the second pair, gives no gradient
    "alone": {"scale": "linear", "weight": 1.0},
    "alone with zeros": {"scale": "linear", "weight": 1.0},
}
EXPECTED = {"closed_form": "closed_form", "learned": "learned", "alone": "alone with zeros"}
# (wrapper, creation of the loss before or after wrapping, form of the loss)
CASES = [
    *((wrapper, "after", "closed_form") for wrapper in ("ddp", "fsdp1", "fsdp2")),
    ("fsdp2", "before", "closed_form"),
    *((wrapper, "after", "learned") for wrapper in ("ddp", "fsdp2")),
    *((wrapper, "after", "alone") for wrapper in ("ddp", "fsdp1", "fsdp2")),
    ("ddp", "after", "alone with zeros"),
]


def network(seed: int, width: int = 6) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1),
        nn.GroupNorm(2, width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 4),
    )


def wrapped(wrapper: str, model: nn.Sequential) -> nn.Module:
    """Return the network under DDP, or sharded with its second convolution in a group of its own."""
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    if wrapper == "fsdp1":
        model[3] = FullyShardedDataParallel(model[3], device_id=torch.device("cpu"), use_orig_params=True)
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(model[3], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the whole weights by plain name; collective."""
    gathered = (
        FullyShardedDataParallel.summon_full_params(model)
        if isinstance(model, FullyShardedDataParallel)
        else preserve_state()
    )
    with gathered:
        weights = {}
        for name, parameter in model.named_parameters():
            whole: Any = parameter.detach()
            plain = name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")
            weights[plain] = (whole.full_tensor() if hasattr(whole, "full_tensor") else whole).clone()
        return weights


def held_out(count: int = 70) -> DataLoader[Any]:
    """Three batches to fit on and one to report on, which two processes cannot share evenly."""
    images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    return DataLoader(TensorDataset(images), batch_size=20)


def trained(wrapper: str, made: str, form: str, rank: int) -> dict[str, Any]:
    """Losses, whole weights and metrics after a few steps on this process's part of the batches."""
    student, teacher = network(1), network(2, 8)
    torch.manual_seed(rank)
    run = wrapped(wrapper, student) if made == "after" else student
    iso = IsomorphismLoss(run, teacher, LAYERS, refresh=2, **FORMS[form])
    if made == "before":
        run = wrapped(wrapper, student)
    optimizer = torch.optim.SGD([*run.parameters(), *iso.parameters()], lr=0.01, momentum=0.9)
    monitor = IsomorphismCallback.of(iso, held_out(), every=2)
    losses = []
    with iso:
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(WORLD * step + rank)
            images = torch.randn(IMAGES, 3, 8, 8, generator=generator)
            logits = run(images)
            if step == 3:
                monitor.measure()  # between forward and backward
            loss = iso()
            if form == "alone with zeros":
                loss = loss + 0 * logits.sum()
            elif form != "alone":
                loss = loss + F.cross_entropy(logits, torch.arange(IMAGES) % 4)
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
            optimizer.step()
            monitor.step()
            losses.append(loss.detach())
    metrics = [entry.metrics for entry in monitor.history]
    weight = iso.log()["iso/train/2/weight"]
    return {"losses": torch.stack(losses), "weights": full_weights(run), "metrics": metrics, "weight": weight}


def averages_gradients() -> bool:
    """Return whether FSDP2 averages gradients on CPUs; that of torch 2.8 adds them, with or without the library."""
    model = fully_shard(nn.Linear(1, WORLD, bias=False), mesh=init_device_mesh("cpu", (WORLD,)))
    model(torch.ones(1, 1)).sum().backward()
    return bool(model.weight.grad.full_tensor().eq(1).all())


def worker(rank: int, folder: str) -> None:
    torch.save(averages_gradients(), Path(folder) / f"averages-{rank}.pt")
    for case in CASES:
        torch.save(trained(*case, rank), Path(folder) / f"{'-'.join(case)}-{rank}.pt")
    # One batch to fit on: the other process does not wait for a forward
    with pytest.raises(DataError, match="no image to fit on for at least one of 2"):
        measure(wrapped("fsdp2", network(1)), network(2, 8), held_out(20), LAYERS, progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded")
    run_in_processes(worker, str(path))
    return path


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("case", [case for case in CASES if case[0] != "ddp" or case[2] == "alone"], ids="-".join)
def test_sharded_training_equals_that_of_ddp(case: tuple[str, str, str], rank: int, folder: Path) -> None:
    if case[0] == "fsdp2" and not torch.load(folder / f"averages-{rank}.pt"):
        pytest.skip("FSDP2 of this torch adds the gradients of CPUs")
    sharded, expected = (
        torch.load(folder / f"{'-'.join(name)}-{rank}.pt", weights_only=True)
        for name in (case, ("ddp", "after", EXPECTED[case[2]]))
    )
    torch.testing.assert_close(sharded["losses"], expected["losses"], rtol=1e-5, atol=1e-6)
    assert sharded["weight"] == pytest.approx(expected["weight"], rel=1e-4)
    if "weight" in FORMS[case[2]]:
        # The learning rate before the last call was a quarter of the first: 4 r (1 - r) = 0.75
        assert sharded["weight"] == pytest.approx(0.75 * FORMS[case[2]]["weight"])
    else:
        assert sharded["weight"] != pytest.approx(0.75 * FALLBACK_WEIGHT)  # balanced
    assert list(sharded["weights"]) == list(expected["weights"])
    start = network(1).state_dict()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(sharded["weights"][name], value, rtol=1e-5, atol=1e-6)
        assert torch.equal(value, start[name]) == (case[2] == "alone" and name.startswith("7."))
    assert len(sharded["metrics"]) == 3
    for figures, others in zip(sharded["metrics"], expected["metrics"], strict=True):
        assert figures == pytest.approx(others, abs=1e-5)


@pytest.fixture
def _group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.usefixtures("_group")
def test_forwards_of_the_library_leave_the_weights_sharded() -> None:
    student, teacher = network(1), network(2, 8)
    fully_shard(student, mesh=init_device_mesh("cpu", (1,)))
    before = list(student.parameters())
    iso = IsomorphismLoss(student, teacher, LAYERS)
    IsomorphismCallback.of(iso, held_out()).measure()
    report = measure(student, teacher, held_out(), LAYERS, order=0, progress=False)
    assert all(now is parameter for now, parameter in zip(student.parameters(), before, strict=True))
    assert report.source == "Sequential (source)"


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("wrapper", ["fsdp1", "fsdp2"])
def test_a_module_inside_a_sharded_network_is_refused(wrapper: str) -> None:
    outer = nn.Sequential(network(1), nn.Identity())
    plain = IsomorphismLoss(outer[0], network(2, 8), LAYERS)
    if wrapper == "fsdp1":
        FullyShardedDataParallel(outer, device_id=torch.device("cpu"), use_orig_params=True)
    else:
        fully_shard(outer, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(OptionError, match=r"Sequential is inside .* that FSDP shards.* Pass the sharded"):
        IsomorphismLoss(outer[0], network(2, 8), LAYERS)
    with pytest.raises(OptionError, match="is inside a network that FSDP shards"):
        IsomorphismCallback.of(plain, held_out()).measure()


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("wrapper", ["fsdp1", "fsdp2"])
def test_a_sharded_network_without_a_suitable_guess_needs_an_example(wrapper: str) -> None:
    def needs_small_images() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 6 * 6, 4))

    for example in (None, torch.zeros(2, 3, 8, 8)):
        student: nn.Module = needs_small_images()
        if wrapper == "fsdp1":
            student = FullyShardedDataParallel(student, device_id=torch.device("cpu"), use_orig_params=True)
        else:
            fully_shard(student, mesh=init_device_mesh("cpu", (1,)))
        if example is None:
            with pytest.raises(OptionError, match=r"cannot run student and teacher on a guessed input.* Pass example="):
                IsomorphismLoss(student, needs_small_images(), "1")
        else:
            with IsomorphismLoss(student, needs_small_images(), "1", example=example) as iso:
                (student(torch.randn(4, 3, 8, 8)).square().mean() + iso()).backward()
