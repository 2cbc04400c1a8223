"""Disentangler of the paper (arXiv 1908.01581, section 3) and its training recipe."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from knowiso_train.disentangle.config import DisentangleConfig, PaperConfig, parse_solver_options
from knowiso_train.disentangle.fitter import FitSpec, Fitter, MemoryEstimate
from knowiso_train.errors import NonFiniteError, OptionError, ShapeError
from knowiso_train.ops.gate import gate, gate_orders
from knowiso_train.ops.reference import channel_scale
from knowiso_train.regression.sampling import FeatureSample, Sample


class PaperMaps(nn.Module):
    """`h_k = U_k x + V_k z_k + b_k`, `z_k = p_k · ReLU(h_{k-1} / σ(h_{k-1}))`, `g(x) = h_K`; tied and bias-free (U_k = V_k) it is the paper's.

    Args:
        source_channels: C_A.
        target_channels: C_B; tied maps need C_A = C_B.
        order: K ≥ 0, the number of non-linear steps.
        kernel_size: odd; zero padding keeps the grid. The paper uses 3.
        tied: one bias-free map per step, as published; None ties where the channels allow it.

    Raises:
        OptionError: tied maps between different numbers of channels.

    Example:
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
                f"tied maps need as many source as target channels, got {source_channels} and {target_channels}; use tied=False for the general form"
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
        """p_1 … p_K in (0, 1), what the paper penalizes."""
        return torch.sigmoid(self.q)

    def _gated_map(self, step: int) -> nn.Module:
        return self.of_source[step] if self.tied else self.of_gated[step - 1]

    def forward(self, x: Tensor) -> Tensor:
        """g(x): (N, C_A, H, W) → (N, C_B, H, W)."""
        return self.of_normalized(self._normalized(x))

    def of_normalized(self, x: Tensor) -> Tensor:
        """g(x) of a source that was divided by its scale already."""
        return self._after(self.order, x)

    def last_step(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Source, weight and bias of the convolution that gives `of_normalized(x)`, for whoever wants its residual and not itself.

        Returns:
            (N, C, H, W), (C_B, C, k, k) and (C_B,) or None, where C is C_A, or C_A + C_B if untied maps read the source
            and the gated signal.
        """
        last = self.of_source[self.order]
        weight, bias = last.get_parameter("weight"), last.bias
        if not self.order:
            return x, weight, bias  # type: ignore[return-value]
        h, p = self._after(self.order - 1, x), self.gates[-1]
        if self.tied:
            return gate(x, h, p), weight, bias  # type: ignore[return-value]
        of_gated = self.of_gated[-1].get_parameter("weight")
        return torch.cat([x, gate(None, h, p)], 1), torch.cat([weight, of_gated], 1), bias  # type: ignore[return-value]

    def _after(self, steps: int, x: Tensor) -> Tensor:
        h: Tensor = self.of_source[0](x)
        for step, p in enumerate(self.gates[:steps], start=1):
            h = (
                self.of_source[step](gate(x, h, p))
                if self.tied
                else self.of_source[step](x) + self.of_gated[step - 1](gate(None, h, p))
            )
        return h

    def components(self, x: Tensor) -> list[Tensor]:
        """x^(0) … x^(K), which sum to g(x): the orders go side by side through gates frozen at this input, in one pass.

        Returns:
            K + 1 tensors (N, C_B, H, W); the k-th has passed exactly k gates. Biases belong to order 0 of the step that
            adds them.
        """
        x = self._normalized(x)
        orders: list[Tensor] = [self.of_source[0](x)]
        for step, p in enumerate(self.gates, start=1):
            raised = self._gated_map(step)(gate_orders(torch.stack(orders), p).flatten(0, 1))
            orders = [self.of_source[step](x), *raised.chunk(len(orders))]
        return orders

    def _normalized(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.source_channels:
            raise ShapeError(f"expected a source of shape (N, {self.source_channels}, H, W), got {tuple(x.shape)}")
        return x / channel_scale(x)


def fit_paper(
    maps: PaperMaps, sample: Sample, recipe: PaperConfig, *, seed: int = 0, progress: bool = False, label: str = ""
) -> PaperMaps:
    """Train `maps` in place on whole images, as published, and return them frozen, in eval mode.

    Raises:
        NonFiniteError: the loss is no longer finite; names the epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(maps.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    rates = torch.logspace(math.log10(recipe.lr), math.log10(recipe.lr_end), recipe.epochs).tolist()
    start = _resume(recipe, maps, optimizer, generator)
    with (
        torch.enable_grad(),
        tqdm(
            range(start, recipe.epochs), desc=f"paper's recipe {label}".strip(), unit="epoch", disable=not progress
        ) as bar,
    ):
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
                raise NonFiniteError(
                    f"the paper's recipe diverged in epoch {epoch} {label}; lower solver_options={{'lr': ...}} (now {recipe.lr:g})"
                )
            bar.set_postfix(loss=f"{mean:.4f}")
            if recipe.checkpoint and (epoch % 50 == 49 or epoch == recipe.epochs - 1):
                _save(recipe, maps, optimizer, generator, epoch + 1)
    return maps.requires_grad_(False).eval()


def _loss(maps: PaperMaps, batch: Sample, penalty: float) -> Tensor:
    loss: Tensor = (batch.y - maps(batch.x)).square().mean() + penalty * maps.gates.square().sum()
    return loss


def _save(
    recipe: PaperConfig, maps: PaperMaps, optimizer: torch.optim.Optimizer, generator: torch.Generator, epoch: int
) -> None:
    state = {
        "epoch": epoch,
        "maps": maps.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": generator.get_state(),
    }
    path = Path(str(recipe.checkpoint))
    torch.save(state | {"recipe": _identity(recipe)}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def _resume(recipe: PaperConfig, maps: PaperMaps, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> int:
    if not recipe.checkpoint or not Path(recipe.checkpoint).exists():
        return 0
    state = torch.load(recipe.checkpoint, weights_only=True, map_location=maps.q.device)
    if state["recipe"] != _identity(recipe):
        raise OptionError(
            f"{recipe.checkpoint} was written by another recipe ({state['recipe']}); delete it or name another checkpoint"
        )
    maps.load_state_dict(state["maps"])
    optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["random"].cpu())
    return int(state["epoch"])


def _identity(recipe: PaperConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(recipe).items() if name != "checkpoint"}


class PaperFitter(Fitter):
    """Keeps whole images up to `max_rows` positions, those for selecting too, and trains the paper's network on them."""

    def __init__(self, task: FitSpec) -> None:
        super().__init__(task)
        self.recipe = parse_solver_options(PaperConfig, task.settings.solver_options, "paper's")
        self.sample = FeatureSample(task.settings.max_rows, task.expected, 1, 0, task.settings.seed, whole_images=True)

    @staticmethod
    def estimate_memory(
        settings: DisentangleConfig,
        source_channels: int,
        target_channels: int,
        targets: int,
        expected_rows: int | None,
    ) -> MemoryEstimate:
        sample = Fitter.sample_bytes(settings, source_channels, target_channels, targets, expected_rows)
        return MemoryEstimate(source_channels * (settings.kernel_size or 1) ** 2, sample, sample)

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
                maps = PaperMaps(
                    task.source_channels, task.target_channels, settings.order, settings.kernel_size or 3
                ).to(task.device, task.dtype)
            y = sample.y[:, self.part(target)]
            if task.group.rank == 0:
                name = label if target == 0 else f"{label} (shuffled)"
                fit_paper(maps, sample.with_target(y), self.recipe, seed=settings.seed, progress=progress, label=name)
            task.group.broadcast_(list(maps.state_dict().values()))
            self.ridges.append(())
            self.centers.append(y.double().mean((0, 2, 3)))
            results.append(maps.requires_grad_(False).eval())
        return results
