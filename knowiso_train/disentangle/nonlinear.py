"""Training of the hidden maps of orders one and above."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from knowiso_train.disentangle.closed_form import ClosedFormMaps, batches, interior, predicted, solve_readout
from knowiso_train.disentangle.config import NonlinearConfig
from knowiso_train.optim import Muon
from knowiso_train.regression.ridge import Ridge
from knowiso_train.regression.sampling import Sample

CHECKS, PATIENCE, SELECT_ROWS = 12, 4, 16_384


def fit_order(
    maps: ClosedFormMaps,
    order: int,
    fit: Sample,
    select: Sample | None,
    scale: float,
    ridge: Ridge,
    recipe: NonlinearConfig,
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
        seed: of initialization and batches.
        progress: show a bar.
        label: for the bar.

    Returns:
        The ridge of an exact readout, else 0.
    """
    generator = torch.Generator().manual_seed(seed * 1000 + order)
    if order == 1:
        _standardize_source(maps, fit)
    _initialize_hidden(maps, order, generator)
    _train(maps, order, fit, select, scale, recipe, generator, progress=progress, label=label)
    used = 0.0
    if recipe.readout == "exact" or (recipe.readout == "auto" and not isinstance(ridge, str)):
        used = solve_readout(maps, order, fit, select, ridge)
    else:
        explained = _shrinkage(fit.y, predicted(maps, order, fit))[0]
        if explained < 1:
            _scale_readouts(maps.readouts_of(order), explained)
    _normalize_hidden(maps, order, fit)
    return used


def _standardize_source(maps: ClosedFormMaps, fit: Sample) -> None:
    """Center and scale of the source, over the positions that the targets stand on; nearly constant channels keep a floor."""
    x = interior(fit.x, fit.halo)
    deviation = x.std((0, 2, 3), correction=0)
    floor = 1e-3 * deviation.mean()
    maps.center.copy_(x.mean((0, 2, 3))[:, None, None])
    maps.scale.copy_(
        torch.where(deviation > floor, deviation, floor if floor > 0 else torch.ones_like(floor))[:, None, None]
    )


@torch.no_grad()
def _initialize_hidden(maps: ClosedFormMaps, order: int, generator: torch.Generator) -> None:
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
    recipe: NonlinearConfig,
    generator: torch.Generator,
    *,
    progress: bool,
    label: str,
) -> None:
    batch, steps = recipe.steps(order, len(fit), fit.rows)
    layer, readouts = maps.layers[order - 1], maps.readouts_of(order)
    trained: list[Tensor] = [*layer.parameters(), *(p for readout in readouts for p in readout.parameters())]
    lr = recipe.lr if order == 1 else recipe.lr / 2
    optimizer = Muon(trained, lr, weight_decay=recipe.weight_decay, max_side=max(512, 2 * batch * fit.rows // len(fit)))
    keeper = _EarlyStopping(maps, order, trained, readouts, select, scale)
    check, step, order_of = max(1, steps // CHECKS), 0, torch.empty(0, dtype=torch.long)
    with (
        torch.enable_grad(),
        tqdm(total=steps, desc=f"order {order}: {label}", unit="step", leave=False, disable=not progress) as bar,
    ):
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
        below = (
            found[-1]
            if order > 1
            else (part.x - maps.center) / maps.scale * (1 if part.inside is None else part.inside)
        )
        found[0] = part.x / maps.scale
    a = torch.relu(maps.layers[order - 1](below))
    return interior(maps.readout(order, [*found, a if part.inside is None else a * part.inside]), part.halo)


class _EarlyStopping:
    """Checks on the selection sample, shrinks, keeps the best, and says when to stop. Without such a sample the last state stands."""

    def __init__(
        self,
        maps: ClosedFormMaps,
        order: int,
        trained: list[Tensor],
        readouts: list[nn.Conv2d],
        select: Sample | None,
        scale: float,
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
def _normalize_hidden(maps: ClosedFormMaps, order: int, fit: Sample) -> None:
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
