"""No call advances a random state, whatever the loader, the network or the user's functions draw."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset

import knowiso_train as ki
from knowiso_train.distillation import suggest_layers
from knowiso_train.features.summary import layer_summary

COUNT, SIDE = 48, 8
OPTIONS: dict[str, Any] = {"progress": False}


def network(seed: int) -> nn.Sequential:
    """Return a small convolutional classifier."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
        ).eval()  # fmt: skip


def draw() -> None:
    """Draw one number from each generator."""
    torch.rand(1)
    random.random()
    np.random.random()  # noqa: NPY002
    if torch.cuda.is_initialized():
        torch.rand(1, device="cuda")


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Dataset that draws from every generator for each image."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(COUNT, 3, SIDE, SIDE, generator=generator)
        # Class means that differ, so that a classifier can be fitted
        self.images += torch.arange(COUNT).remainder(4).view(-1, 1, 1, 1) - 1.5

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        draw()
        return self.images[index], torch.tensor(index % 4)


class Batches:
    """Iterable of batches that draws from every generator for each batch."""

    def __init__(self) -> None:
        self.batches = list(DataLoader(Augmented(), batch_size=16, generator=torch.Generator()))

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            draw()
            yield batch


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(Augmented(), batch_size=16, shuffle=True),
    "sampler": lambda: DataLoader(Augmented(), batch_size=16, sampler=SubsetRandomSampler(range(COUNT))),
    "iterable": Batches,
}


def saved(folder: Path, name: str) -> Path:
    """Return a folder with a saved disentangler, or a saved pruned model."""
    with torch.random.fork_rng():
        if name == "disentangler":
            ki.Disentangler(order=1).fit(torch.randn(60, 4, 4, 4), torch.randn(60, 4, 4, 4)).save(folder)
        else:
            original = network(0)
            result = ki.prune(original, [torch.randn(COUNT, 3, SIDE, SIDE)], macs=0.6, **OPTIONS)
            result.save(folder, factory="external", example=(1, 3, SIDE, SIDE))
    return folder


def pruned_pair() -> tuple[nn.Module, nn.Module]:
    """Return a network, and a narrower one."""
    original = network(0)
    with torch.random.fork_rng():
        images = torch.randn(COUNT, 3, SIDE, SIDE)
        return original, ki.prune(original, [images], macs=0.6, refit=False, **OPTIONS).model


def prune_by_importance(loader: Any) -> None:
    """Prune with torch-pruning and our importance."""
    model = network(0)
    importance = ki.IsomorphismImportance(model, loader, **OPTIONS)
    state = torch.zeros(1, 3, SIDE, SIDE)
    tp.pruner.BasePruner(model, state, importance, pruning_ratio=0.5, ignored_layers=[model[6]]).step()


def refit(loader: Any, **options: Any) -> None:
    """Refit a pruned network."""
    original, pruned = pruned_pair()
    ki.refit(pruned, original, loader, **OPTIONS, **options)


def finetune(loader: Any) -> None:
    """Fine-tune a pruned network."""
    original, pruned = pruned_pair()
    ki.finetune(pruned, original, loader, steps=2, batch_size=16, **OPTIONS)


def train_with_loss(loader: Any, **options: Any) -> None:
    """Make a loss with layers of its choice."""
    with ki.IsomorphismLoss(network(0), network(1), loader=loader, **options) as iso:
        iso.detach()


def monitor(loader: Any) -> None:
    """Measure once while training."""
    ki.IsomorphismCallback(network(0), network(1), loader, ["1"], every=1, order=0).step()


CALLS: dict[str, Callable[[Any], Any]] = {
    "measure": lambda loader: ki.measure(network(0), network(1), loader, "1", order=0, **OPTIONS),
    "measure, paper": lambda loader: ki.measure(
        network(0), network(0), loader, "1", order=1, solver="paper", solver_options={"epochs": 1}, **OPTIONS
    ),
    "suggest_layers": lambda loader: suggest_layers(network(0), network(1), loader, verbose=False),
    "loss, auto": lambda loader: train_with_loss(loader, layers="auto"),
    "prune": lambda loader: ki.prune(network(0), loader, macs=0.6, **OPTIONS),
    "importance": prune_by_importance,
    "refit": refit,
    "finetune": finetune,
    "refine": lambda loader: ki.refine(
        network(0), network(1), loader, labeled=loader, validation=loader, keep_all_peers=True, **OPTIONS
    ),
    "callback": monitor,
}


def random_states() -> list[Any]:
    """Return the states of all global generators."""
    states = [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]  # noqa: NPY002
    if torch.cuda.is_initialized():
        states += [state.tolist() for state in torch.cuda.get_rng_state_all()]
    return states


@pytest.mark.filterwarnings("ignore::knowiso_train.errors.KnowisoWarning")
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("call", CALLS)
def test_random_state_is_that_before_the_call(call: str, loader: str) -> None:
    images = LOADERS[loader]()
    before = random_states()
    CALLS[call](images)
    assert random_states() == before


@pytest.mark.parametrize("call", CALLS)
def test_random_state_is_that_before_a_call_whose_loader_fails(call: str) -> None:
    class Failing(Augmented):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            draw()
            raise OSError("the file is gone")

    loader = DataLoader(Failing(), batch_size=16, shuffle=True)
    before = random_states()
    with pytest.raises(OSError, match="the file is gone"):
        CALLS[call](loader)
    assert random_states() == before


@pytest.mark.parametrize("name", ["disentangler", "pruned"])
def test_random_state_is_that_before_loading(name: str, tmp_path: Path) -> None:
    folder, model = saved(tmp_path, name), network(0)
    before = random_states()
    if name == "disentangler":
        ki.Disentangler.load(folder)
    else:
        ki.load_pruned(folder, model=copy.deepcopy(model))
    assert random_states() == before


@pytest.mark.parametrize("solver", ["closed_form", "paper"])
def test_random_state_is_that_before_a_fit(solver: Any) -> None:
    x, y = torch.randn(60, 4, 4, 4), torch.randn(60, 4, 4, 4)
    before = random_states()
    options = {"epochs": 1} if solver == "paper" else {}
    ki.Disentangler(order=1, solver=solver, solver_options=options).fit(x, y)
    layer_summary(network(0), x[:2, :3])
    assert random_states() == before


def test_order_of_a_training_is_that_without_the_calls() -> None:
    data = TensorDataset(torch.arange(20.0))
    torch.manual_seed(3)
    order = [int(x) for (x,) in DataLoader(data, shuffle=True)]
    torch.manual_seed(3)
    refit(LOADERS["shuffled"](), block_steps=0)
    assert [int(x) for (x,) in DataLoader(data, shuffle=True)] == order
