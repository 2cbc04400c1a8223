"""The paper's training recipe, its published values as defaults."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from knowiso_train.disentangle.fitter import Fitter, Task
from knowiso_train.disentangle.options import recipe_of
from knowiso_train.disentangle.paper import PaperMaps
from knowiso_train.errors import NonFiniteError, OptionError
from knowiso_train.statistics import FeatureSample, Sample


@dataclass(frozen=True)
class PaperRecipe:
    """Adam with coupled weight decay, learning rate log-spaced per epoch, squared error plus `penalty · Σ p_k²`.

    Attributes:
        epochs: passes over the sample.
        lr: learning rate of the first epoch.
        lr_end: learning rate of the last epoch.
        weight_decay: coupled (added to the gradient), on the gates' logits too.
        penalty: λ, 0.1 as published (8.0 in the AlexNet runs).
        batch_size: images a step.
        checkpoint: file to resume from and to write every 50 epochs; None for none.
    """

    epochs: int = 1000
    lr: float = 1e-4
    lr_end: float = 1e-6
    weight_decay: float = 1e-4
    penalty: float = 0.1
    batch_size: int = 64
    checkpoint: str | None = None


def fit_paper(maps: PaperMaps, sample: Sample, recipe: PaperRecipe, *, seed: int = 0, progress: bool = False, label: str = "") -> PaperMaps:
    """Train `maps` in place on whole images, as published, and return them frozen, in eval mode.

    Raises:
        NonFiniteError: the loss is no longer finite; names the epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(maps.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    rates = torch.logspace(math.log10(recipe.lr), math.log10(recipe.lr_end), recipe.epochs).tolist()
    start = _resume(recipe, maps, optimizer, generator)
    with torch.enable_grad(), tqdm(range(start, recipe.epochs), desc=f"paper's recipe {label}".strip(), unit="epoch", disable=not progress) as bar:
        for epoch in bar:
            optimizer.param_groups[0]["lr"] = rates[epoch]
            total = torch.zeros((), device=sample.x.device)
            for chosen in torch.split(torch.randperm(len(sample), generator=generator), recipe.batch_size):
                loss = _loss(maps, sample.batch(chosen.to(sample.x.device)), recipe.penalty)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += loss.detach() * len(chosen)
            mean = float(total) / len(sample)
            if not math.isfinite(mean):
                raise NonFiniteError(f"the paper's recipe diverged in epoch {epoch} {label}; lower solver_options={{'lr': ...}} (now {recipe.lr:g})")
            bar.set_postfix(loss=f"{mean:.4f}")
            if recipe.checkpoint and (epoch % 50 == 49 or epoch == recipe.epochs - 1):
                _save(recipe, maps, optimizer, generator, epoch + 1)
    return maps.requires_grad_(False).eval()


def _loss(maps: PaperMaps, batch: Sample, penalty: float) -> Tensor:
    loss: Tensor = (batch.y - maps(batch.x)).square().mean() + penalty * maps.gates.square().sum()
    return loss


def _save(recipe: PaperRecipe, maps: PaperMaps, optimizer: torch.optim.Optimizer, generator: torch.Generator, epoch: int) -> None:
    state = {"epoch": epoch, "maps": maps.state_dict(), "optimizer": optimizer.state_dict(), "random": generator.get_state()}
    path = Path(str(recipe.checkpoint))
    torch.save(state | {"recipe": _identity(recipe)}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def _resume(recipe: PaperRecipe, maps: PaperMaps, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> int:
    if not recipe.checkpoint or not Path(recipe.checkpoint).exists():
        return 0
    state = torch.load(recipe.checkpoint, weights_only=True, map_location=maps.q.device)
    if state["recipe"] != _identity(recipe):
        raise OptionError(f"{recipe.checkpoint} was written by another recipe ({state['recipe']}); delete it or name another checkpoint")
    maps.load_state_dict(state["maps"])
    optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["random"].cpu())
    return int(state["epoch"])


def _identity(recipe: PaperRecipe) -> dict[str, Any]:
    return {name: value for name, value in asdict(recipe).items() if name != "checkpoint"}


class PaperFitter(Fitter):
    """Keeps whole images up to `max_rows` positions, those for selecting too, and trains the paper's network on them."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.recipe = recipe_of(PaperRecipe, task.settings.solver_options, "paper's")
        self.sample = FeatureSample(task.settings.max_rows, task.expected, 1, 0, task.settings.seed, whole=True)

    def update(self, x: Tensor, y: Tensor, index: NDArray[np.int64], select: NDArray[np.bool_]) -> None:
        self.sample.add(x, y, index)

    def finish(self, *, progress: bool, label: str) -> list[nn.Module]:
        task, settings = self.task, self.task.settings
        sample = self.sample.result(task.group)
        if sample is None:
            raise self.nothing_to_fit(label)
        self.rows = sample.rows
        if task.source_channels != task.target_channels:
            self.notes.append(
                f"{task.source_channels} source and {task.target_channels} target channels: the general form with untied maps and biases"
            )
        results: list[nn.Module] = []
        for target in range(task.targets):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed)
                maps = PaperMaps(task.source_channels, task.target_channels, settings.order, settings.kernel_size or 3).to(task.device, task.dtype)
            y = sample.y[:, self.part(target)]
            if task.group.rank == 0:
                name = label if target == 0 else f"{label} (shuffled)"
                fit_paper(maps, sample.with_target(y), self.recipe, seed=settings.seed, progress=progress, label=name)
            task.group.broadcast_(list(maps.state_dict().values()))
            self.ridges.append(())
            self.centres.append(y.double().mean((0, 2, 3)))
            results.append(maps.requires_grad_(False).eval())
        return results
