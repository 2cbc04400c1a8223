"""Fine-tuning of single blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.errors import DataError, NonFiniteError, OptionError
from knowiso_train.features.hooks import FeatureTaps
from knowiso_train.optim import FINETUNE_WARMUP_FRACTION, build_optimizers, check_trainable_precision
from knowiso_train.pruning._finetune_targets import feature_variance, shuffled_batches
from knowiso_train.pruning._report import BlockResult
from knowiso_train.pruning._tracing import comparable_blocks
from knowiso_train.pruning.calibration import Calibration

# An update takes fewer images of large feature maps, so that it has about UPDATE_POSITIONS positions
UPDATE_IMAGES, MIN_UPDATE_IMAGES, UPDATE_POSITIONS = 128, 16, 2**17
# Peak step relative to a weight's norm; a single block tolerates larger steps than the full model
BLOCK_LR = 0.01
BLOCK_VALIDATION_FRACTION = 0.1


@dataclass
class BlockFinetuner:
    """Fine-tuning of the blocks of a pruned model towards the original's block outputs.

    Attributes:
        targets: Outputs of the original's blocks by name, for all images.
        steps: Updates of each block.
        generator: Random generator of the order of the images.
        results: Results of the finished blocks, in forward order.
    """

    targets: Mapping[str, Tensor]
    steps: int
    generator: torch.Generator
    results: list[BlockResult] = field(default_factory=list)

    @classmethod
    def from_original(
        cls, original: nn.Module, pruned: nn.Module, layers: Sequence[str], images: Calibration, steps: int, seed: int
    ) -> BlockFinetuner:
        """Record the outputs of the original's blocks in one pass over the images.

        Args:
            original: Original model, in eval mode.
            pruned: Pruned model of any widths, in eval mode.
            layers: Names of the reconstructed layers. Blocks with fewer than two of them are left out.
            images: Calibration images.
            steps: Updates of each block.
            seed: Seed of the order.

        Raises:
            OptionError: `steps` below 1, or a model without such blocks.
            DataError: Fewer than two images.

        Examples:
            >>> make = lambda width: nn.Sequential(nn.Sequential(), nn.ModuleDict())
            >>> BlockFinetuner.from_original(make(2), make(4), [], Calibration([torch.randn(2, 3)]), steps=0, seed=0)
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
        outputs = {name: torch.cat(features) for name, features in parts.items()}
        # Outputs without one entry for each image cannot be split into updates
        targets = {name: output for name, output in outputs.items() if len(output) == images.count}
        return cls(targets, steps, torch.Generator().manual_seed(seed))

    def finetune(
        self, name: str, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor
    ) -> Tensor:
        """Fine-tune a block in place on its recorded inputs, and return its new output for all images.

        The last tenth of the images selects: without an improvement on them the weights are restored.

        Args:
            name: Name of the block.
            module: Block of the pruned model.
            args: Positional arguments of its call, for all images.
            kwargs: Keyword arguments of its call.
            output: Present output of the block, returned if fine-tuning does not improve it.

        Raises:
            NonFiniteError: NaN or Inf in the loss.
        """
        target = self.targets[name]
        block = _RecordedBlock(name, module, args, kwargs, target, feature_variance(name, target))
        size, num_held_out = _update_images(target), max(1, round(BLOCK_VALIDATION_FRACTION * len(target)))
        index = torch.arange(len(target))
        training, held_out = index[:-num_held_out], index[-num_held_out:]
        # Updated in place: the dict holds the versions of the modules, which some of them check
        initial = module.state_dict()
        initial.update({key: value.detach().clone() for key, value in initial.items()})
        trainable = {parameter: parameter.requires_grad for parameter in module.parameters()}
        before = block.mean_distance(held_out, size)
        try:
            with torch.enable_grad():
                module.requires_grad_(True)
                self._optimize(block, training, min(size, len(training)))
        finally:
            for parameter, flag in trainable.items():
                parameter.requires_grad_(flag)
        after = block.mean_distance(held_out, size)
        self.results.append(BlockResult(name, before, min(before, after)))
        if not after < before:
            module.load_state_dict(initial)
            return output
        return torch.cat([block.forward(part) for part in torch.split(index, size)])

    def _optimize(self, block: _RecordedBlock, index: Tensor, batch_size: int) -> None:
        optimizers = build_optimizers(block.module, BLOCK_LR)
        batches = shuffled_batches(index, batch_size, self.generator)
        for step in range(1, self.steps + 1):
            loss = block.distance(next(batches))
            if not bool(loss.detach().isfinite()):
                raise NonFiniteError(f"block {block.name!r}: NaN or Inf in its loss at step {step} of {self.steps}")
            loss.backward()  # type: ignore[no-untyped-call]
            # Linear warm-up, then linear decay
            factor = min(step / max(1.0, FINETUNE_WARMUP_FRACTION * self.steps), 1 - (step - 1) / self.steps)
            for optimizer, peak_lr in optimizers:
                optimizer.param_groups[0]["lr"] = factor * peak_lr
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class _RecordedBlock:
    """One block with the arguments of its call and the original's output, for all images.

    Attributes:
        name: Name of the block.
        module: Block of the pruned model.
        args: Positional arguments of its call.
        kwargs: Keyword arguments of its call.
        target: (N, …) output of the original's block.
        variance: Variance of the target, which divides squared distances.
    """

    name: str
    module: nn.Module
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    target: Tensor
    variance: float

    def forward(self, index: Tensor) -> Tensor:
        """Return the block's output for the images with these indices."""
        args = [self._select(value, index) for value in self.args]
        kwargs = {key: self._select(value, index) for key, value in self.kwargs.items()}
        # The instance's `forward` may be overridden by the caller, which runs this block
        output: Tensor = type(self.module).forward(self.module, *args, **kwargs)
        return output

    def distance(self, index: Tensor) -> Tensor:
        """Return ‖output - target‖² / Var(target) for the images with these indices, a scalar."""
        return (self.forward(index) - self.target[index.to(self.target.device)]).square().mean() / self.variance

    def mean_distance(self, index: Tensor, batch_size: int) -> float:
        """Return the distance over any number of images, computed batch by batch."""
        return sum(float(self.distance(part)) * len(part) for part in torch.split(index, batch_size)) / len(index)

    def _select(self, value: Any, index: Tensor) -> Any:
        # Arguments of another length, such as masks, are shared by all images
        is_batch = isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(self.target)
        return value[index.to(value.device)] if is_batch else value


def finetunable_blocks(
    original: nn.Module, pruned: nn.Module, layers: Sequence[str], images: Calibration, steps: int
) -> list[str]:
    """Return the names of the blocks that `BlockFinetuner.from_original` would record, with its arguments and errors.

    Examples:
        >>> import timm
        >>> model = timm.create_model("test_resnet", pretrained=False).eval()
        >>> layers, images = ["layer1.0.conv1", "layer1.0.conv2"], Calibration([torch.randn(2, 3, 32, 32)])
        >>> finetunable_blocks(model, model, layers, images, steps=5)
        ['layer1.0']
    """
    if steps < 1:
        raise OptionError(f"block_steps must be 1 or more, got {steps!r}")
    check_trainable_precision(pruned)
    if images.count < 2:
        raise DataError("block_steps needs 2 calibration images or more, one of them for validation; got 1")
    batch = images.first(2)
    names = [
        name
        for name in comparable_blocks(pruned, original, batch, images.forward)
        if sum(layer.startswith(f"{name}.") for layer in layers) > 1
    ]
    if not names:
        raise OptionError(
            f"block_steps={steps}, but {type(original).__name__} has no blocks of two or more layers whose output "
            "keeps its shape. Pass block_steps=0, and call ki.finetune afterwards"
        )
    return names


def _update_images(feature: Tensor) -> int:
    """Return the number of images of an update, for feature maps (N, C, H, W) or tokens (N, L, C)."""
    num_positions = feature[0, 0].numel() if feature.ndim == 4 else feature.shape[1]
    return max(MIN_UPDATE_IMAGES, min(UPDATE_IMAGES, UPDATE_POSITIONS // num_positions))
