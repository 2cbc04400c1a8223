"""The paper's training recipe, its published values as defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from knowiso_train.disentangle.paper import PaperMaps
from knowiso_train.errors import NonFiniteError, OptionError
from knowiso_train.statistics import Sample


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

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> PaperRecipe:
        """A recipe with some values replaced; OptionError on a name that it does not have."""
        options = dict(options or {})
        unknown = sorted(set(options) - set(cls.__dataclass_fields__))
        if unknown:
            raise OptionError(f"unknown options {unknown} for the paper's solver; it takes {sorted(cls.__dataclass_fields__)}")
        return cls(**options)


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
