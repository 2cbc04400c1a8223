"""Fitting one order ≥ 1: its hidden map and its readouts, trained together on what the orders below leave over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from knowiso_train.disentangle.closed_form import ClosedFormMaps
from knowiso_train.disentangle.muon import Muon
from knowiso_train.disentangle.readout import batches, interior, predicted, solve_readout
from knowiso_train.errors import OptionError
from knowiso_train.statistics import Sample

CHECKS, PATIENCE, SELECT_ROWS = 12, 4, 16_384
READOUTS = ("auto", "trained", "exact")


@dataclass(frozen=True)
class StageRecipe:
    """How orders ≥ 1 are fitted (`solver_options=` of the closed form). One set of values served all that was tried.

    Attributes:
        epochs: passes over the sample; None is 8 for order 1 and 5 above, more for small samples until `rows_seen`, at most 60.
        lr: step of the optimiser (`Muon`) at its peak, for order 1; half of it above.
        weight_decay: decoupled.
        batch_rows: positions a step; fewer for small samples.
        rows_seen: positions that training sees at least, where `epochs` is None.
        readout: "trained" keeps the readouts that were trained with the hidden map, shrunk where the selection images say so; "exact" solves
            `V_k ã_k` in closed form afterwards (orthogonal to all below at ridge 0; on CIFAR ResNets equally good, twice the time);
            "auto" is exact where `ridge` is a number and trained where it is searched.
    """

    epochs: int | None = None
    lr: float = 0.05
    weight_decay: float = 0.1
    batch_rows: int = 3072
    rows_seen: int = 800_000
    readout: str = "auto"

    def __post_init__(self) -> None:
        if self.readout not in READOUTS:
            raise OptionError(f"readout must be one of {READOUTS}, got {self.readout!r}")

    def steps(self, order: int, images: int, rows: int) -> tuple[int, int]:
        """Images a step, and steps."""
        per_image = rows // images
        batch = max(1, min(images, min(self.batch_rows, max(rows // 32, 64)) // per_image))
        epochs = self.epochs or max(8 if order == 1 else 5, min(60, -(-self.rows_seen // rows)))
        return batch, epochs * max(1, images // batch)


def fit_order(
    maps: ClosedFormMaps,
    order: int,
    fit: Sample,
    select: Sample | None,
    scale: float,
    ridge: float | str,
    recipe: StageRecipe,
    *,
    seed: int,
    progress: bool,
    label: str,
) -> float:
    """Fit order k ≥ 1 in place on `fit.y`, what the orders below leave over. On the fitting sample it never leaves more than it found.

    Args:
        maps: orders below are fitted.
        order: k.
        fit: sample to train on.
        select: sample to stop, shrink and choose the ridge on.
        scale: typical deviation of the target itself.
        ridge: number or "search"; of an exact readout.
        recipe: how.
        seed: of initialisation and batches.
        progress: show a bar.
        label: for the bar.

    Returns:
        The ridge of an exact readout, else 0.
    """
    generator = torch.Generator().manual_seed(seed * 1000 + order)
    if order == 1:
        _standardise(maps, fit)
    _initialise(maps, order, generator)
    _train(maps, order, fit, select, scale, recipe, generator, progress=progress, label=label)
    used = 0.0
    if recipe.readout == "exact" or (recipe.readout == "auto" and not isinstance(ridge, str)):
        used = solve_readout(maps, order, fit, select, ridge)
    else:
        explained = _shrinkage(fit.y, predicted(maps, order, fit))[0]
        if explained < 1:
            _scale_readouts(maps.readouts_of(order), explained)
    _normalise(maps, order, fit)
    return used


def _standardise(maps: ClosedFormMaps, fit: Sample) -> None:
    """Centre and scale of the source, over the positions that the targets stand on; nearly constant channels keep a floor."""
    x = interior(fit.x, fit.halo)
    deviation = x.std((0, 2, 3), correction=0)
    floor = 1e-3 * deviation.mean()
    maps.centre.copy_(x.mean((0, 2, 3))[:, None, None])
    maps.scale.copy_(torch.where(deviation > floor, deviation, floor if floor > 0 else torch.ones_like(floor))[:, None, None])


@torch.no_grad()
def _initialise(maps: ClosedFormMaps, order: int, generator: torch.Generator) -> None:
    """First units: the readout of the order below, as units of norm 1; the others Gaussian. Readouts start at zero."""
    layer: nn.Conv2d = maps.layers[order - 1]  # type: ignore[assignment]
    below = maps.linear.weight * maps.scale if order == 1 else maps.readouts_of(order - 1)[-1].weight
    weight = torch.randn(layer.weight.shape, generator=generator).to(layer.weight) / layer.weight[0].numel() ** 0.5
    units = min(len(below), len(weight))
    norm = below.flatten(1).norm(dim=1)[:units, None, None, None]
    weight[:units] = torch.where(norm > 0, below[:units] / norm.clamp(min=torch.finfo(norm.dtype).tiny), weight[:units])
    layer.weight.copy_(weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    _scale_readouts(maps.readouts_of(order), 0.0)


def _train(
    maps: ClosedFormMaps,
    order: int,
    fit: Sample,
    select: Sample | None,
    scale: float,
    recipe: StageRecipe,
    generator: torch.Generator,
    *,
    progress: bool,
    label: str,
) -> None:
    batch, steps = recipe.steps(order, len(fit), fit.rows)
    layer, readouts = maps.layers[order - 1], maps.readouts_of(order)
    trained: list[Tensor] = [*layer.parameters(), *(p for readout in readouts for p in readout.parameters())]
    lr = recipe.lr if order == 1 else recipe.lr / 2
    optimizer = Muon(trained, lr, recipe.weight_decay, largest=max(512, 2 * batch * fit.rows // len(fit)))
    keeper = _Keeper(maps, order, trained, readouts, select, scale)
    check, step, order_of = max(1, steps // CHECKS), 0, torch.empty(0, dtype=torch.long)
    with torch.enable_grad(), tqdm(total=steps, desc=f"order {order}: {label}", unit="step", leave=False, disable=not progress) as bar:
        for p in trained:
            p.requires_grad_(True)
        while step < steps:
            if len(order_of) < batch:
                order_of = torch.randperm(len(fit), generator=generator)
            part, order_of = fit.batch(order_of[:batch].to(fit.x.device)), order_of[batch:]
            progressed = step / steps
            optimizer.param_groups[0]["lr"] = lr * min(progressed / 0.1, (1 - progressed) / 0.9)
            loss = (_output(maps, order, part) - part.y / scale).square().mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
            bar.update()
            if (step % check == 0 or step == steps) and keeper.hopeless(step / steps):
                break
    keeper.restore()
    for p in trained:
        p.requires_grad_(False)
    _scale_readouts(readouts, scale)
    with torch.no_grad():
        readouts[0].weight /= maps.scale  # trained on x / scale, applied to x


def _output(maps: ClosedFormMaps, order: int, part: Sample) -> Tensor:
    """Prediction in units of the target's scale, with x in units of its own."""
    with torch.no_grad():
        found = maps.regressors(part.x, order - 1, part.inside)
        below = found[-1] if order > 1 else (part.x - maps.centre) / maps.scale * (1 if part.inside is None else part.inside)
        found[0] = part.x / maps.scale
    a = torch.relu(maps.layers[order - 1](below))
    return interior(maps.readout(order, [*found, a if part.inside is None else a * part.inside]), part.halo)


class _Keeper:
    """Checks on the selection sample, shrinks, keeps the best, and says when to stop. Without such a sample the last state stands."""

    def __init__(
        self, maps: ClosedFormMaps, order: int, trained: list[Tensor], readouts: list[nn.Conv2d], select: Sample | None, scale: float
    ) -> None:
        self.maps, self.order, self.trained, self.readouts, self.scale = maps, order, trained, readouts, scale
        self.select = select
        if select is not None:
            most = max(1, SELECT_ROWS // (select.y.shape[2] * select.y.shape[3]))
            self.select = select.batch(torch.arange(min(most, len(select)), device=select.x.device))
            self.least = _energy(self.select.y / scale)
        self.best: tuple[float, list[Tensor]] | None = None
        self.bad = 0

    @torch.no_grad()
    def hopeless(self, progressed: float) -> bool:
        if self.select is None:
            return False
        output = torch.cat([_output(self.maps, self.order, self.select.batch(index)) for index in batches(self.select)])
        shrink, left = _shrinkage(self.select.y / self.scale, output)
        if left < self.least:
            self.least, self.bad, self.best = left, 0, (shrink, [p.detach().clone() for p in self.trained])
        else:
            self.bad += 1
        return self.bad >= PATIENCE or (self.best is None and progressed >= 0.25)

    @torch.no_grad()
    def restore(self) -> None:
        if self.select is None:
            return
        for p, kept in zip(self.trained, self.best[1] if self.best else self.trained, strict=True):
            p.copy_(kept)
        _scale_readouts(self.readouts, self.best[0] if self.best else 0.0)


@torch.no_grad()
def _normalise(maps: ClosedFormMaps, order: int, fit: Sample) -> None:
    """Give the channels of a_k unit deviation, for the order above; ReLU is homogeneous, so its readout takes the factor."""
    part = fit.batch(torch.arange(min(len(fit), max(1, 65_536 * len(fit) // fit.rows)), device=fit.x.device))
    deviation = interior(maps.regressors(part.x, order, part.inside)[-1], part.halo).std((0, 2, 3))
    deviation = torch.nan_to_num(deviation).clamp(min=1e-2 * torch.nan_to_num(deviation).mean())
    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    layer: nn.Conv2d = maps.layers[order - 1]  # type: ignore[assignment]
    layer.weight /= deviation[:, None, None, None]
    if layer.bias is not None:
        layer.bias /= deviation
    maps.readouts_of(order)[-1].weight *= deviation[:, None, None]


def _shrinkage(truth: Tensor, output: Tensor) -> tuple[float, float]:
    """Factor in [0, 1] that fits the output to the truth best, and the energy left with it."""
    truth, output = (t - t.mean((0, 2, 3), keepdim=True) for t in (truth, output))
    own = float(output.square().sum())
    factor = min(max(float((truth * output).sum()) / own, 0.0), 1.0) if own > 0 else 0.0
    return factor, _energy(truth - factor * output)


def _energy(t: Tensor) -> float:
    return float((t - t.mean((0, 2, 3), keepdim=True)).square().sum())


@torch.no_grad()
def _scale_readouts(readouts: list[nn.Conv2d], factor: float) -> None:
    for readout in readouts:
        readout.weight *= factor
        if readout.bias is not None:
            readout.bias *= factor
