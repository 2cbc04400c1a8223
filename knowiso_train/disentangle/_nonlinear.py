"""Training of the hidden maps of orders one and above."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from knowiso_train.disentangle._closed_form import ClosedFormMaps, predict_component, solve_readout, split_indices, trim
from knowiso_train.disentangle.config import NonlinearConfig
from knowiso_train.optim import Muon
from knowiso_train.regression.ridge import Ridge
from knowiso_train.regression.sampling import Sample

NUM_CHECKS = 12  # of the selection error, in one training
PATIENCE_CHECKS = 4  # without improvement until training stops
FIRST_GAIN_PROGRESS = 0.25  # fraction of the steps without any improvement until training stops
MAX_SELECT_ROWS = 16_384  # positions of a check
WARMUP_FRACTION = 0.1  # of the steps
MAX_NORMALIZATION_ROWS = 65_536  # positions that the deviations of the hidden channels are measured on
# Floors of a channel's standard deviation, relative to the mean of all channels
MIN_SOURCE_DEVIATION, MIN_HIDDEN_DEVIATION = 1e-3, 1e-2
MIN_ORTHOGONALIZED_SIDE = 512  # matrices up to this side take Muon's step whatever the batch


def fit_order(
    maps: ClosedFormMaps,
    order: int,
    fit: Sample,
    select: Sample | None,
    scale: float,
    ridge: Ridge,
    config: NonlinearConfig,
    *,
    seed: int,
    progress: bool,
    label: str,
) -> float:
    """Fit order k ≥ 1 in place to `fit.y`, the residual of the lower orders. The energy of `fit.y` never increases.

    Args:
        maps: Maps whose lower orders are fitted.
        order: k.
        fit: Sample to train on.
        select: Sample for early stopping, shrinkage and the ridge. Default: none of these.
        scale: Standard deviation of the target itself.
        ridge: Relative ridge of an exact readout.
        config: Training options.
        seed: Seed of initialization and batches.
        progress: Show a progress bar.
        label: Text of the bar.

    Returns:
        The ridge of an exact readout, else 0.
    """
    generator = torch.Generator().manual_seed(seed * 1000 + order)
    if order == 1:
        _standardize_source(maps, fit)
    _initialize_hidden(maps, order, generator)
    _train(maps, order, fit, select, scale, config, generator, progress=progress, label=label)
    readout_ridge = 0.0
    if config.readout == "exact" or (config.readout == "auto" and not isinstance(ridge, str)):
        readout_ridge = solve_readout(maps, order, fit, select, ridge)
    else:
        # Scaling by the least-squares factor in [0, 1] cannot increase the energy on the fitting sample
        factor = _shrinkage(fit.y, predict_component(maps, order, fit))[0]
        if factor < 1:
            _scale_readouts(maps.readouts_of(order), factor)
    _normalize_hidden(maps, order, fit)
    return readout_ridge


def _standardize_source(maps: ClosedFormMaps, fit: Sample) -> None:
    """Set center and scale of the source from the positions of the targets; nearly constant channels get a floor."""
    x = trim(fit.x, fit.halo)
    deviation = x.std((0, 2, 3), correction=0)
    floor = MIN_SOURCE_DEVIATION * deviation.mean()
    fallback = floor if floor > 0 else torch.ones_like(floor)
    maps.center.copy_(x.mean((0, 2, 3))[:, None, None])
    maps.scale.copy_(torch.where(deviation > floor, deviation, fallback)[:, None, None])


@torch.no_grad()
def _initialize_hidden(maps: ClosedFormMaps, order: int, generator: torch.Generator) -> None:
    """Initialize a hidden map: first the readout directions of the lower order, with norm 1, then Gaussian ones.

    Readouts start at zero, so that the component starts at zero.
    """
    layer: nn.Conv2d = maps.layers[order - 1]  # type: ignore[assignment]
    # The hidden map takes the standardized source, W x = (W · scale) (x / scale)
    lower = maps.linear.weight * maps.scale if order == 1 else maps.readouts_of(order - 1)[-1].weight
    weight = torch.randn(layer.weight.shape, generator=generator).to(layer.weight) / layer.weight[0].numel() ** 0.5
    units = min(len(lower), len(weight))
    norm = lower.flatten(1).norm(dim=1)[:units, None, None, None]
    weight[:units] = torch.where(norm > 0, lower[:units] / norm.clamp(min=torch.finfo(norm.dtype).tiny), weight[:units])
    layer.weight.copy_(weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    _scale_readouts(maps.readouts_of(order), 0.0)


def _train(
    maps: ClosedFormMaps,
    order: int,
    fit: Sample,
    select: Sample | None,
    scale: float,
    config: NonlinearConfig,
    generator: torch.Generator,
    *,
    progress: bool,
    label: str,
) -> None:
    """Train the hidden map of an order and all its readouts together."""
    batch, num_steps = config.schedule(order, len(fit), fit.rows)
    layer, readouts = maps.layers[order - 1], maps.readouts_of(order)
    parameters: list[Tensor] = [*layer.parameters(), *(p for readout in readouts for p in readout.parameters())]
    peak_lr = config.lr if order == 1 else config.lr / 2
    # Orthogonalizing a matrix pays off while it is cheaper than the products of a batch
    max_side = max(MIN_ORTHOGONALIZED_SIDE, 2 * batch * fit.rows // len(fit))
    optimizer = Muon(parameters, peak_lr, weight_decay=config.weight_decay, max_side=max_side)
    stopping = _EarlyStopping(maps, order, parameters, readouts, select, scale)
    check_interval, step, permutation = max(1, num_steps // NUM_CHECKS), 0, torch.empty(0, dtype=torch.long)
    with (
        torch.enable_grad(),
        tqdm(total=num_steps, desc=f"order {order}: {label}", unit="step", leave=False, disable=not progress) as bar,
    ):
        for p in parameters:
            p.requires_grad_(True)
        while step < num_steps:
            if len(permutation) < batch:
                permutation = torch.randperm(len(fit), generator=generator)
            part, permutation = fit.batch(permutation[:batch].to(fit.x.device)), permutation[batch:]
            # Linear warm-up and linear decay to 0
            done = step / num_steps
            factor = min(done / WARMUP_FRACTION, (1 - done) / (1 - WARMUP_FRACTION))
            optimizer.param_groups[0]["lr"] = peak_lr * factor
            loss = (_scaled_component(maps, order, part) - part.y / scale).square().mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
            bar.update()
            if (step % check_interval == 0 or step == num_steps) and stopping.should_stop(step / num_steps):
                break
    stopping.restore()
    for p in parameters:
        p.requires_grad_(False)
    # From the training's units to those of the features: y / scale → y, and x / maps.scale → x
    _scale_readouts(readouts, scale)
    with torch.no_grad():
        readouts[0].weight /= maps.scale


def _scaled_component(maps: ClosedFormMaps, order: int, part: Sample) -> Tensor:
    """Return x^(order) / scale, differentiable in the trained parameters, with V_{k,0} on x / maps.scale."""
    with torch.no_grad():
        features = maps.features(part.x, order - 1, part.inside)
        hidden = features[-1] if order > 1 else maps.standardize(part.x) * (1 if part.inside is None else part.inside)
        features[0] = part.x / maps.scale
    a = torch.relu(maps.layers[order - 1](hidden))
    return trim(maps.readout(order, [*features, a if part.inside is None else a * part.inside]), part.halo)


class _EarlyStopping:
    """Selection of the best parameters and their shrinkage on the selection sample, if there is one."""

    def __init__(
        self,
        maps: ClosedFormMaps,
        order: int,
        parameters: list[Tensor],
        readouts: list[nn.Conv2d],
        select: Sample | None,
        scale: float,
    ) -> None:
        self.maps, self.order, self.parameters, self.readouts, self.scale = maps, order, parameters, readouts, scale
        self.select = select
        if select is not None:
            max_images = max(1, MAX_SELECT_ROWS // (select.y.shape[2] * select.y.shape[3]))
            self.select = select.batch(torch.arange(min(max_images, len(select)), device=select.x.device))
            # A component of 0 is the first candidate
            self.best_energy = _energy(self.select.y / scale)
        self.best: tuple[float, list[Tensor]] | None = None
        self.num_failures = 0

    @torch.no_grad()
    def should_stop(self, progress: float) -> bool:
        """Check the selection error after a fraction of the steps, and keep the parameters if it is the least."""
        if self.select is None:
            return False
        output = torch.cat(
            [_scaled_component(self.maps, self.order, self.select.batch(index)) for index in split_indices(self.select)]
        )
        factor, energy = _shrinkage(self.select.y / self.scale, output)
        if energy < self.best_energy:
            self.best_energy, self.num_failures = energy, 0
            self.best = (factor, [p.detach().clone() for p in self.parameters])
        else:
            self.num_failures += 1
        return self.num_failures >= PATIENCE_CHECKS or (self.best is None and progress >= FIRST_GAIN_PROGRESS)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the best parameters, shrunk; readouts of 0 if no check improved on a component of 0."""
        if self.select is None:
            return
        factor, best = self.best or (0.0, self.parameters)
        for p, value in zip(self.parameters, best, strict=True):
            p.copy_(value)
        _scale_readouts(self.readouts, factor)


@torch.no_grad()
def _normalize_hidden(maps: ClosedFormMaps, order: int, fit: Sample) -> None:
    """Scale the channels of a_k to unit standard deviation for the next order, without a change of the component."""
    images = min(len(fit), max(1, MAX_NORMALIZATION_ROWS * len(fit) // fit.rows))
    part = fit.batch(torch.arange(images, device=fit.x.device))
    deviation = trim(maps.features(part.x, order, part.inside)[-1], part.halo).std((0, 2, 3))
    deviation = torch.nan_to_num(deviation).clamp(min=MIN_HIDDEN_DEVIATION * torch.nan_to_num(deviation).mean())
    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    # ReLU is homogeneous: V ReLU(M a + c) = (V D) ReLU(D⁻¹ (M a + c)) for a positive diagonal D
    layer: nn.Conv2d = maps.layers[order - 1]  # type: ignore[assignment]
    layer.weight /= deviation[:, None, None, None]
    if layer.bias is not None:
        layer.bias /= deviation
    maps.readouts_of(order)[-1].weight *= deviation[:, None, None]


def _shrinkage(target: Tensor, output: Tensor) -> tuple[float, float]:
    """Return the factor in [0, 1] that minimizes `‖target - factor · output‖²` after centering, and that energy."""
    target, output = (t - t.mean((0, 2, 3), keepdim=True) for t in (target, output))
    output_energy = float(output.square().sum())
    factor = min(max(float((target * output).sum()) / output_energy, 0.0), 1.0) if output_energy > 0 else 0.0
    return factor, _energy(target - factor * output)


def _energy(t: Tensor) -> float:
    return float((t - t.mean((0, 2, 3), keepdim=True)).square().sum())


@torch.no_grad()
def _scale_readouts(readouts: list[nn.Conv2d], factor: float) -> None:
    for readout in readouts:
        readout.weight *= factor
        if readout.bias is not None:
            readout.bias *= factor
