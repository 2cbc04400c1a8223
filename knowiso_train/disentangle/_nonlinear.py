"""Training of the hidden maps of orders one and above."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowiso_train.disentangle._closed_form import (
    MAX_SOURCE_DEVIATIONS,
    ClosedFormMaps,
    split_indices,
)
from knowiso_train.disentangle._readouts import ReadoutSolver
from knowiso_train.disentangle.config import NonlinearConfig
from knowiso_train.optim import Muon
from knowiso_train.regression.sampling import Sample, trim

FIRST_GAIN_PROGRESS = 0.25  # fraction of the steps after which training stops without a gain
MIN_GAIN = 1e-5  # fraction of the residual's energy on the selection images that counts as a gain
MAX_SELECT_ROWS = 16_384  # positions of a check
WARMUP_FRACTION = 0.02  # of the steps
MAX_NORMALIZATION_ROWS = 16_384  # positions that the deviations of the hidden channels are measured on
# Floors of a channel's standard deviation, relative to the mean of all channels
MIN_SOURCE_DEVIATION, MIN_HIDDEN_DEVIATION = 1e-1, 1e-2
MOMENTUM_NEWTON_SCHULZ_STEPS = 3  # as good as five for these trainings
MIN_ORTHOGONALIZED_SIDE = 512  # matrices up to this side take Muon's step whatever the batch


def fit_order(
    maps: ClosedFormMaps,
    order: int,
    fit: Sample,
    select: Sample | None,
    scale: float,
    solver: ReadoutSolver,
    config: NonlinearConfig,
    *,
    seed: int,
    advance: Callable[[float], None],
) -> float:
    """Fit order k ≥ 1 in place to `fit.y`, the residual of the lower orders. The energy of `fit.y` never increases.

    Args:
        maps: Maps whose lower orders are fitted.
        order: k.
        fit: Sample to train on, its images in random order.
        select: Sample for early stopping, shrinkage and the ridge. Default: none of these.
        scale: Standard deviation of the target itself.
        solver: Solver of exact readouts, the same for all orders.
        config: Training options.
        seed: Seed of initialization.
        advance: Function that takes the finished fraction of this fit after each step.

    Returns:
        The ridge of an exact readout, else 0.
    """
    if order == 1:
        _standardize_source(maps, fit)
    margin = (order + 1) * (maps.kernel_size // 2)
    fit, select = fit.with_margin(margin), None if select is None else select.with_margin(margin)
    _initialize_hidden(maps, order, torch.Generator().manual_seed(seed * 1000 + order))
    exact = config.is_exact(maps.kernel_size, solver.ridge)
    has_gain = _Training(maps, order, fit, select, scale, config, exact=exact).run(advance)
    if not has_gain:
        _scale_readouts(maps.readouts_of(order), 0.0)
    _normalize_hidden(maps, order, fit)
    return solver.solve(order, fit, select) if has_gain and exact else 0.0


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
    """Initialize a hidden map: first the readout directions of the lower order, with norm 1, then Gaussian ones."""
    layer = maps.layer(order)
    # The hidden map takes the standardized source, W x = (W · scale) (x / scale)
    lower = maps.linear.weight * maps.scale if order == 1 else maps.readouts_of(order - 1)[-1].weight
    weight = torch.randn(layer.weight.shape, generator=generator).to(layer.weight) / layer.weight[0].numel() ** 0.5
    units = min(len(lower), len(weight))
    norm = lower.flatten(1).norm(dim=1)[:units, None, None, None]
    weight[:units] = torch.where(norm > 0, lower[:units] / norm.clamp(min=torch.finfo(norm.dtype).tiny), weight[:units])
    layer.weight.copy_(weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


class _Training:
    """Training of the hidden map of an order together with readouts in units of `y / scale`.

    Where the readout is solved exactly afterwards, the trained one only leads the hidden map. It then has no part on
    the lower features: the ReLU loses its regression on its own input instead.
    """

    def __init__(
        self,
        maps: ClosedFormMaps,
        order: int,
        fit: Sample,
        select: Sample | None,
        scale: float,
        config: NonlinearConfig,
        *,
        exact: bool,
    ) -> None:
        self.maps, self.order, self.fit, self.scale, self.config, self.exact = maps, order, fit, scale, config, exact
        self.layer, self.dtype = maps.layer(order), config.training_dtype(fit.x)
        self.is_centered = exact and maps.kernel_size == 1
        # Without selection images, scaling by the least-squares factor cannot increase the energy of the fitting sample
        self.select = fit if select is None else select.first(MAX_SELECT_ROWS)
        readouts = maps.readouts_of(order)[-1 if self.is_centered else 0 :]
        self.bias = fit.y.new_zeros(len(readouts[0].weight), dtype=readouts[0].weight.dtype)
        self.weight = torch.zeros_like(torch.cat([readout.weight for readout in readouts], 1))

    def run(self, advance: Callable[[float], None]) -> bool:
        """Train, and write the readouts; return False, with readouts unchanged, if there is no gain."""
        config, fit = self.config, self.fit
        images, num_steps = config.schedule(self.order, len(fit), fit.rows, exact=self.exact)
        peak_lr = config.peak_lr(self.order, exact=self.exact)
        parameters: list[Tensor] = [*self.layer.parameters(), self.weight, self.bias]
        optimizer = Muon(
            parameters,
            peak_lr,
            weight_decay=config.weight_decay,
            # Orthogonalizing a matrix pays off while it is cheaper than the products of a batch
            max_side=max(MIN_ORTHOGONALIZED_SIDE, 2 * images * fit.rows // len(fit)),
            dtype=self.dtype,
            newton_schulz_steps=MOMENTUM_NEWTON_SCHULZ_STEPS,
        )
        check_step = max(1, round(FIRST_GAIN_PROGRESS * num_steps))
        factor = 0.0
        with torch.enable_grad():
            for p in parameters:
                p.requires_grad_(True)
            for step in range(num_steps):
                part = fit.slice(step * images, images)
                # Linear warm-up and linear decay to 0
                warmup, decay = (step + 1) / (WARMUP_FRACTION * num_steps), 1 - step / num_steps
                optimizer.param_groups[0]["lr"] = peak_lr * min(warmup, decay)
                loss = (self._component(part) - part.y / self.scale).square().mean()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                advance(1 / num_steps)
                if step + 1 in (check_step, num_steps):
                    factor = self._shrinkage()
                    if not factor:
                        break
        for p in parameters:
            p.requires_grad_(False)
        if factor and not self.is_centered:
            self._write_readouts(factor)
        return factor > 0

    def _component(self, part: Sample) -> Tensor:
        """Return x^(order) / scale, differentiable in the trained parameters."""
        features, inside = self._lower_features(part)
        radius, dtype = self.maps.kernel_size // 2, self.dtype
        padding = 0 if part.halo else radius
        hidden = features[-1] if self.order > 1 else _clamped(features[0])
        weight, bias = (p.to(dtype) for p in self.layer.parameters())
        z = F.conv2d(hidden, weight, bias, padding=padding)
        a = torch.relu(z)
        offset = self.bias[:, None, None]
        if self.is_centered:
            # Stein: the regression of ReLU(z) on a Gaussian z has the slope P(z > 0)
            slope = (z.detach() > 0).to(offset.dtype).mean((0, 2, 3), keepdim=True)
            inputs = a - slope.to(dtype) * z
        else:
            if inside is not None:
                features = [trim(feature, (self.order - k) * radius) for k, feature in enumerate(features)]
                a = a * trim(inside, radius)
            inputs = torch.cat([*features, a], 1)
            # V_0 x / s = V_0 a_0 + V_0 (c / s) within the image
            ratio = self.maps.center / self.maps.scale
            kernel = (self.weight[:, : len(ratio)] * ratio).sum(1, keepdim=True)
            mask = torch.ones_like(part.x[:1, :1]) if part.inside is None else trim(part.inside, self.order * radius)
            offset = offset + F.conv2d(mask, kernel, padding=padding)
        output = F.conv2d(inputs, self.weight.to(dtype), padding=padding)
        return output.to(offset.dtype) + offset

    @torch.no_grad()
    def _lower_features(self, part: Sample) -> tuple[list[Tensor], Tensor | None]:
        """Return a_0 without its limit, a_1 … a_{order-1} and the mask of the last, in the type of the training."""
        a = ((part.x - self.maps.center) / self.maps.scale).to(self.dtype, memory_format=torch.channels_last)
        inside = None if part.inside is None else part.inside.to(self.dtype)
        features = [a if inside is None else a * inside]
        hidden, radius = _clamped(features[0]), self.maps.kernel_size // 2
        for k in range(1, self.order):
            layer = self.maps.layer(k)
            weight, bias = (p.to(self.dtype) for p in layer.parameters())
            hidden = torch.relu(F.conv2d(hidden, weight, bias, padding=radius if inside is None else 0))
            if inside is not None:
                inside = trim(inside, radius)
                hidden = hidden * inside
            features.append(hidden)
        return features, inside

    @torch.no_grad()
    def _shrinkage(self) -> float:
        """Return the factor in [0, 1] of the least error on the selection images, 0 if the gain is too small."""
        output = torch.cat([self._component(self.select.batch(index)) for index in split_indices(self.select)])
        target, output = (t - t.mean((0, 2, 3), keepdim=True) for t in (self.select.y / self.scale, output))
        product, energy = float((target * output).sum()), float(output.square().sum())
        # min_f ‖y - f g‖² = ‖y‖² - (y·g)² / ‖g‖²
        if product <= 0 or product**2 <= MIN_GAIN * energy * float(target.square().sum()):
            return 0.0
        return min(product / energy, 1.0)

    @torch.no_grad()
    def _write_readouts(self, factor: float) -> None:
        """Write the readouts in units of the features: y / scale → y, and x / maps.scale → x."""
        readouts = self.maps.readouts_of(self.order)
        weights = torch.split(self.weight, [readout.in_channels for readout in readouts], 1)
        for readout, weight in zip(readouts, weights, strict=True):
            readout.weight.copy_(weight * (self.scale * factor))
        readouts[0].weight /= self.maps.scale
        readouts[0].bias.copy_(self.bias * (self.scale * factor))  # type: ignore[union-attr]


def _clamped(a: Tensor) -> Tensor:
    return a.clamp(-MAX_SOURCE_DEVIATIONS, MAX_SOURCE_DEVIATIONS)


@torch.no_grad()
def _normalize_hidden(maps: ClosedFormMaps, order: int, fit: Sample) -> None:
    """Scale the channels of a_k to unit standard deviation for the next order, without a change of the component."""
    part = fit.first(MAX_NORMALIZATION_ROWS)
    margin = maps.kernel_size // 2 if part.halo else 0
    deviation = trim(maps.features(part.x, order, part.inside)[-1], margin).std((0, 2, 3))
    deviation = torch.nan_to_num(deviation).clamp(min=MIN_HIDDEN_DEVIATION * torch.nan_to_num(deviation).mean())
    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    # ReLU is homogeneous: V ReLU(M a + c) = (V D) ReLU(D⁻¹ (M a + c)) for a positive diagonal D
    layer = maps.layer(order)
    layer.weight /= deviation[:, None, None, None]
    if layer.bias is not None:
        layer.bias /= deviation
    maps.readouts_of(order)[-1].weight *= deviation[:, None, None]


@torch.no_grad()
def _scale_readouts(readouts: list[nn.Conv2d], factor: float) -> None:
    for readout in readouts:
        readout.weight *= factor
        if readout.bias is not None:
            readout.bias *= factor
