"""Disentangler of the paper (arXiv 1908.01581, section 3) and its published training."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from knowiso_train.disentangle._checkpoint import Checkpoint, checkpoint_path
from knowiso_train.disentangle.config import DisentangleConfig, FitSpec, Fitter, MemoryEstimate, PaperConfig
from knowiso_train.errors import NonFiniteError, OptionError, ShapeError
from knowiso_train.ops.gate import gate, gate_orders
from knowiso_train.ops.reference import channel_scale
from knowiso_train.regression.sampling import FeatureSample, Sample

CHECKPOINT_EPOCHS = 50


class PaperMaps(nn.Module):
    """Recursion of linear maps and learned gates, with an exact split by non-linear order.

    `h_0 = U_0 x + b_0`, `z_k = p_k · ReLU(h_{k-1} / σ(h_{k-1}))`, `h_k = U_k x + V_k z_k + b_k`, `g(x) = h_K`. The
    source x is divided by its own σ first. σ is the standard deviation over positions of each image and channel,
    without gradient. Tied and bias-free, U_k = V_k, this is the paper's network.

    Args:
        source_channels: C_A.
        target_channels: C_B; tied maps need C_A = C_B.
        order: K ≥ 0, the number of non-linear steps.
        kernel_size: Odd kernel; zero padding keeps the grid. The paper uses 3.
        tied: Use one bias-free map per step, as published. Default: if the channels allow it.

    Raises:
        OptionError: Tied maps between different numbers of channels.

    Examples:
        >>> maps = PaperMaps(4, 4, order=2, kernel_size=3)
        >>> x = torch.randn(2, 4, 5, 5)
        >>> torch.allclose(sum(maps.components(x)), maps(x), atol=1e-5)
        True
    """

    def __init__(
        self, source_channels: int, target_channels: int, order: int = 2, kernel_size: int = 3, tied: bool | None = None
    ) -> None:
        super().__init__()
        if tied and source_channels != target_channels:
            raise OptionError(
                f"tied maps need as many source as target channels, got {source_channels} and {target_channels}; "
                "use tied=False for the general form"
            )
        self.order, self.kernel_size = order, kernel_size
        self.source_channels, self.target_channels = source_channels, target_channels
        self.tied = source_channels == target_channels if tied is None else tied
        pad = kernel_size // 2

        def conv(inputs: int, bias: bool) -> nn.Conv2d:
            return nn.Conv2d(inputs, target_channels, kernel_size, padding=pad, bias=bias)

        self.of_source = nn.ModuleList(conv(source_channels, not self.tied) for _ in range(order + 1))
        self.of_gated = (
            nn.ModuleList() if self.tied else nn.ModuleList(conv(target_channels, False) for _ in range(order))
        )
        self.q = nn.Parameter(torch.zeros(order))

    @property
    def gates(self) -> Tensor:
        """Gates p_1 … p_K in (0, 1), which the paper penalizes."""
        return torch.sigmoid(self.q)

    def _gated_map(self, step: int) -> nn.Module:
        return self.of_source[step] if self.tied else self.of_gated[step - 1]

    def forward(self, x: Tensor) -> Tensor:
        """Return g(x): (N, C_A, H, W) → (N, C_B, H, W)."""
        return self.forward_normalized(self._normalize(x))

    def forward_normalized(self, x: Tensor) -> Tensor:
        """Return g(x) for a source already divided by its σ."""
        return self._hidden(self.order, x)

    def last_step(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return input, weight and bias of the last convolution for a normalized source.

        The residual `y - g(x)` can then be computed with `ops.residual_energy`, which never stores g(x).

        Returns:
            (N, C, H, W), (C_B, C, k, k) and (C_B,) or None. C is C_A for tied maps, and C_A + C_B for untied ones,
            whose input is the source and the gated signal side by side.
        """
        last = self.of_source[self.order]
        weight, bias = last.get_parameter("weight"), last.bias
        if not self.order:
            return x, weight, bias  # type: ignore[return-value]
        h, p = self._hidden(self.order - 1, x), self.gates[-1]
        if self.tied:
            return gate(x, h, p), weight, bias  # type: ignore[return-value]
        # U x + V z = [U V] [x; z]
        gated_weight = self.of_gated[-1].get_parameter("weight")
        inputs, weights = torch.cat([x, gate(None, h, p)], 1), torch.cat([weight, gated_weight], 1)
        return inputs, weights, bias  # type: ignore[return-value]

    def _hidden(self, steps: int, x: Tensor) -> Tensor:
        """Return h_steps."""
        h: Tensor = self.of_source[0](x)
        for step, p in enumerate(self.gates[:steps], start=1):
            h = (
                self.of_source[step](gate(x, h, p))
                if self.tied
                else self.of_source[step](x) + self.of_gated[step - 1](gate(None, h, p))
            )
        return h

    def components(self, x: Tensor) -> list[Tensor]:
        """Return x^(0) … x^(K), which sum to g(x), in one pass.

        Returns:
            K + 1 tensors (N, C_B, H, W); the k-th has passed exactly k gates. Biases belong to order 0 of the step that
            adds them.
        """
        # With the gates frozen at this input, D_k = p_k diag(1[h_{k-1} > 0] / σ), each step is linear in each order:
        # h_k^(0) = U_k x + b_k and h_k^(j) = V_k D_k h_{k-1}^(j-1). The orders pass each step side by side, as a batch.
        x = self._normalize(x)
        orders: list[Tensor] = [self.of_source[0](x)]
        for step, p in enumerate(self.gates, start=1):
            raised = self._gated_map(step)(gate_orders(torch.stack(orders), p).flatten(0, 1))
            orders = [self.of_source[step](x), *raised.chunk(len(orders))]
        return orders

    def _normalize(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.source_channels:
            raise ShapeError(f"expected a source of shape (N, {self.source_channels}, H, W), got {tuple(x.shape)}")
        return x / channel_scale(x)


def fit_paper(
    maps: PaperMaps,
    sample: Sample,
    config: PaperConfig,
    *,
    seed: int = 0,
    on_epoch: Callable[[float], object] | None = None,
    label: str = "",
) -> PaperMaps:
    """Train maps in place on whole images, as published, and return them frozen and in eval mode.

    Raises:
        NonFiniteError: The loss is not finite; the message names the epoch.
        FormatError: A damaged checkpoint, or one of another fit.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(maps.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    rates = torch.logspace(math.log10(config.lr), math.log10(config.lr_end), config.epochs).tolist()
    checkpoint = None
    if config.checkpoint:
        checkpoint = Checkpoint.of(config, maps, optimizer, generator, sample, seed=seed, label=label)
    start = checkpoint.resume() if checkpoint is not None else 0
    with torch.enable_grad():
        for epoch in range(start, config.epochs):
            optimizer.param_groups[0]["lr"] = rates[epoch]
            total = torch.zeros((), device=sample.x.device)
            for index in torch.split(torch.randperm(len(sample), generator=generator), config.batch_size):
                loss = _loss(maps, sample.batch(index.to(sample.x.device)), config.penalty)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += loss.detach() * len(index)
            mean = float(total) / len(sample)
            if not math.isfinite(mean):
                raise NonFiniteError(
                    f"{label}: the loss was not finite in epoch {epoch}; "
                    f"lower solver_options={{'lr': ...}}, now {config.lr:g}"
                )
            if on_epoch is not None:
                on_epoch(mean)
            if checkpoint is not None and ((epoch + 1) % CHECKPOINT_EPOCHS == 0 or epoch == config.epochs - 1):
                checkpoint.save(epoch + 1)
    return maps.requires_grad_(False).eval()


def _loss(maps: PaperMaps, batch: Sample, penalty: float) -> Tensor:
    # mean((y - g(x))²) + λ Σ p_k²
    loss: Tensor = (batch.y - maps(batch.x)).square().mean() + penalty * maps.gates.square().sum()
    return loss


def _fit_in_place(*arguments: Any, **options: Any) -> None:
    """Train as `fit_paper`, without its result, which would be sent to all processes."""
    fit_paper(*arguments, **options)


class PaperFitter(Fitter):
    """Training of the paper's network on whole images, all or up to `max_rows` positions, selection included."""

    def __init__(self, spec: FitSpec) -> None:
        super().__init__(spec)
        config = spec.config
        max_rows = config.max_rows or sys.maxsize
        self.sample = FeatureSample(max_rows, spec.expected_images, 1, 0, config.seed, whole_images=True)
        self.num_images = 0

    @staticmethod
    def estimate_memory(
        config: DisentangleConfig,
        source_channels: int,
        target_channels: int,
        num_targets: int,
        expected_rows: int | None,
    ) -> MemoryEstimate:
        """Estimate the memory, see `Fitter.estimate_memory`."""
        sample = Fitter.sample_bytes(config, source_channels, target_channels, num_targets, expected_rows)
        return MemoryEstimate(source_channels * (config.kernel_size or 1) ** 2, sample, sample)

    def update(self, x: Tensor, y: Tensor, index: NDArray[np.int64], select: NDArray[np.bool_]) -> None:
        """Add images, see `Fitter.update`."""
        self.num_images += len(index)
        self.sample.add(x, y, index)

    @property
    def work(self) -> float:
        """Approximate multiply-adds, see `Fitter.work`."""
        spec, config = self.spec, self.spec.config
        weights = spec.source_channels * spec.target_channels * (config.kernel_size or 3) ** 2
        return float(spec.num_targets * config.paper_config().epochs * self.num_images * weights)

    def finish(self, *, bar: tqdm[Any], label: str) -> list[nn.Module]:
        """Fit the maps, see `Fitter.finish`."""
        spec, config = self.spec, self.spec.config
        sample = self.sample.result(spec.group)
        num_images = sum(spec.group.gather(self.num_images))
        if sample is None:
            raise self.empty_fit_error(label)
        self.rows = sample.rows
        if len(sample) < num_images:
            self.notes.append(
                f"trained on {len(sample)} of {num_images} images ({sample.rows} rows), as max_rows={config.max_rows}"
            )
        if spec.source_channels != spec.target_channels:
            self.notes.append(
                f"{spec.source_channels} source and {spec.target_channels} target channels: the general form with "
                "untied maps and biases"
            )
        results: list[nn.Module] = []
        for target in range(spec.num_targets):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                maps = PaperMaps(spec.source_channels, spec.target_channels, config.order, config.kernel_size or 3)
                maps = maps.to(spec.device, spec.dtype)
            y = sample.y[:, self.channels_of(target)]
            name = label if target == 0 else f"{label} (shuffled)"
            training = config.paper_config()
            if training.checkpoint:
                training = replace(training, checkpoint=checkpoint_path(training.checkpoint, name))
            epoch_work = self.work / (spec.num_targets * training.epochs)

            def on_epoch(loss: float, name: str = name, epoch_work: float = epoch_work) -> None:
                bar.set_postfix_str(f"{name}, loss {loss:.4f}", refresh=False)
                bar.update(epoch_work)

            options: dict[str, Any] = {"seed": config.seed, "on_epoch": on_epoch, "label": name}
            spec.group.run_on_first(partial(_fit_in_place, maps, sample.with_target(y), training, **options))
            spec.group.broadcast_(list(maps.state_dict().values()))
            self.ridges.append(())
            self.centers.append(y.double().mean((0, 2, 3)))
            results.append(maps.requires_grad_(False).eval())
        return results
