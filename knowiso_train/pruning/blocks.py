"""Fine-tuning of single blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.errors import NonFiniteError, OptionError
from knowiso_train.features.hooks import FeatureTaps
from knowiso_train.optim import OrthogonalMomentum, split_parameters
from knowiso_train.pruning.calibration import Calibration
from knowiso_train.pruning.finetune_targets import feature_variance
from knowiso_train.pruning.report import BlockResult
from knowiso_train.pruning.tracing import comparable_blocks

# Of an update: images, fewer of large maps, so that positions stay about so many
UPDATE_IMAGES, MIN_UPDATE_IMAGES, UPDATE_POSITIONS = 128, 16, 2**17
BLOCK_LR = 0.01  # longest step, relative to a weight's norm; a block is shallow, and bears more than a network
BLOCK_BIAS_LR_FACTOR = 0.05  # of it, for norms, biases and depthwise convolutions: Adam's steps are absolute
BLOCK_ADAM_BETAS = (0.9, 0.99)
BLOCK_WARMUP_FRACTION = 0.05
BLOCK_VALIDATION_FRACTION = 0.1  # of the images


@dataclass
class BlockFinetuner:
    """What every block of the original gives, and how the pruned network's blocks are brought near it.

    Attributes:
        targets: by name, for all images.
        steps: updates of each block.
        generator: of the order of the images.
        fits: of the blocks that are done, in forward order.
    """

    targets: Mapping[str, Tensor]
    steps: int
    generator: torch.Generator
    fits: list[BlockResult] = field(default_factory=list)

    @classmethod
    def of(
        cls, original: nn.Module, pruned: nn.Module, layers: Sequence[str], images: Calibration, steps: int, seed: int
    ) -> BlockFinetuner:
        """One pass of the original.

        Args:
            original: in eval mode.
            pruned: in eval mode, any widths.
            layers: names of the layers that are solved: a block with fewer than two of them has nothing to add.
            images: all of them are read.
            steps: updates of each block.
            seed: of the order.

        Raises:
            OptionError: no blocks, or steps without meaning.

        Example:
            >>> make = lambda width: nn.Sequential(nn.Sequential(), nn.ModuleDict())
            >>> BlockFinetuner.of(make(2), make(4), [], Calibration([torch.randn(2, 3)]), steps=0, seed=0)
            Traceback (most recent call last):
            knowiso_train.errors.OptionError: block_steps must be 1 or more, got 0
        """
        names = finetunable_blocks(original, pruned, layers, images, steps)
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        for batch in images:
            with FeatureTaps(original, names) as taps:
                images.forward(original, batch)
                for name, feature in taps.collect().items():
                    parts[name].append(feature)
        targets = {name: torch.cat(features) for name, features in parts.items()}
        return cls(
            {name: target for name, target in targets.items() if len(target) == images.count},
            steps,
            torch.Generator().manual_seed(seed),
        )

    def rebuild(
        self, name: str, block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor
    ) -> Tensor:
        """Tune a block in place on what it reads, and give what it then makes of it.

        Raises:
            NonFiniteError: NaN or Inf in the loss.
        """
        target = self.targets[name]
        count, scale = len(target), feature_variance(name, target)
        away, each = max(1, round(BLOCK_VALIDATION_FRACTION * count)), _images(target)
        train, held = torch.arange(count - away), torch.arange(count - away, count)

        def call(index: Tensor) -> Tensor:
            def take(value: Any) -> Any:
                return (
                    value[index.to(value.device)]
                    if isinstance(value, Tensor) and value.ndim and len(value) == count
                    else value
                )

            made: Tensor = type(block).forward(
                block, *map(take, args), **{key: take(value) for key, value in kwargs.items()}
            )
            return made

        def distance(index: Tensor) -> Tensor:
            return (call(index) - target[index.to(target.device)]).square().mean() / scale

        def judged() -> float:
            return sum(float(distance(part)) * len(part) for part in torch.split(held, each)) / away

        start = {key: value.detach().clone() for key, value in block.state_dict().items()}
        asked = {parameter: parameter.requires_grad for parameter in block.parameters()}
        before = judged()
        try:
            with torch.enable_grad():
                self._descend(name, block.requires_grad_(True), train, min(each, len(train)), distance)
        finally:
            for parameter, wanted in asked.items():
                parameter.requires_grad_(wanted)
        after = judged()
        self.fits.append(BlockResult(name, before, min(before, after)))
        if not after < before:
            block.load_state_dict(start)
            return output
        return torch.cat([call(part) for part in torch.split(torch.arange(count), each)])

    def _descend(
        self, name: str, block: nn.Module, train: Tensor, each: int, distance: Callable[[Tensor], Tensor]
    ) -> None:
        matrices, rest = split_parameters(block)
        momentum, adam = (
            OrthogonalMomentum(matrices, BLOCK_LR) if matrices else None,
            torch.optim.Adam(rest, BLOCK_BIAS_LR_FACTOR * BLOCK_LR, betas=BLOCK_ADAM_BETAS) if rest else None,
        )
        optimizers = [
            (optimizer, rate)
            for optimizer, rate in ((momentum, BLOCK_LR), (adam, BLOCK_BIAS_LR_FACTOR * BLOCK_LR))
            if optimizer is not None
        ]
        waiting = train[:0]
        for step in range(self.steps):
            if len(waiting) < each:
                waiting = train[torch.randperm(len(train), generator=self.generator)]
            index, waiting = waiting[:each], waiting[each:]
            loss = distance(index)
            if not bool(loss.detach().isfinite()):
                raise NonFiniteError(f"block {name!r}: NaN or Inf in its distance to the original's at step {step + 1}")
            loss.backward()  # type: ignore[no-untyped-call]
            height = min((step + 1) / max(1.0, BLOCK_WARMUP_FRACTION * self.steps), 1 - step / self.steps)
            for optimizer, rate in optimizers:
                optimizer.param_groups[0]["lr"] = height * rate
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)


def finetunable_blocks(
    original: nn.Module, pruned: nn.Module, layers: Sequence[str], images: Calibration, steps: int
) -> list[str]:
    """Names of the blocks that `BlockFinetuner` would tune; arguments and errors are those of `Blocks.of`.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", pretrained=False).eval()
        >>> finetunable_blocks(model, model, ["layer1.0.conv1", "layer1.0.conv2"], Calibration([torch.randn(2, 3, 32, 32)]), steps=5)
        ['layer1.0']
    """
    if steps < 1:
        raise OptionError(f"block_steps must be 1 or more, got {steps!r}")
    few = images.first(min(2, images.count))
    names = [
        name
        for name in comparable_blocks(pruned, original, lambda network: images.forward(network, few))
        if len([layer for layer in layers if layer.startswith(f"{name}.")]) > 1
    ]
    if not names:
        raise OptionError(
            f"block_steps={steps}, but {type(original).__name__} has no blocks of two or more layers that give one shape before and after "
            "pruning. Pass 0, and use ki.tune"
        )
    return names


def _images(feature: Tensor) -> int:
    """How many images of a (N, C, H, W) map, or of (N, L, C) tokens, make an update."""
    places = feature[0, 0].numel() if feature.ndim == 4 else feature.shape[1]
    return max(MIN_UPDATE_IMAGES, min(UPDATE_IMAGES, UPDATE_POSITIONS // places))
