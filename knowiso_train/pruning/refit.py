"""Refit of a pruned network to the outputs of the original one, and checks before it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from knowiso_train.errors import OptionError, ShapeError
from knowiso_train.features.state import check_materialized, device_of, preserve_state, restore_on_error
from knowiso_train.features.wrappers import unwrap_models
from knowiso_train.pruning._blocks import BlockFinetuner
from knowiso_train.pruning._report import RefitReport
from knowiso_train.pruning._tracing import TRACE_IMAGES, Epilogue, Forward, count_operations, trace_model
from knowiso_train.pruning.calibration import Calibration, check_counts
from knowiso_train.pruning.kept_indices import KeptIndices, infer_kept_outputs
from knowiso_train.pruning.layer_samples import record_reference_outputs
from knowiso_train.pruning.reconstruction import (
    RECONSTRUCTION_RIDGES,
    REFIT_SAMPLES_PER_FEATURE,
    reconstruct,
    validate_ridges,
)
from knowiso_train.utils.validation import validate_arguments


@validate_arguments
def refit(
    pruned: nn.Module,
    original: nn.Module,
    loader: Iterable[Any],
    *,
    kept: Mapping[str, KeptIndices] | None = None,
    max_images: int = 1024,
    rows: int = REFIT_SAMPLES_PER_FEATURE,
    ridge: float | Sequence[float] = RECONSTRUCTION_RIDGES,
    block_steps: int = 0,
    forward: Forward | None = None,
    seed: int = 0,
    progress: bool = True,
) -> RefitReport:
    """Refit the weights of a pruned network, in place, to the outputs of the original. No labels, no training.

    Weight and intercept of each layer are solved in closed form, in forward order. The input is that of the pruned
    network, with the errors made upstream. The target is the output of the original layer. Where the output is added
    to a residual stream, the target is the original's sum less the stream of the pruned network.
    In front of a rectifier (ReLU, ReLU6, Hardtanh), targets beyond its limits are free to move beyond them: targets and
    weights are solved by alternation, see `layer_regression.ReLURegression`.

    The ridge shrinks towards the surviving original weights. The last tenth of the images is not fitted: it selects
    the ridge of each layer, and measures the unexplained variance.

    Convolutions of any kernel, stride and number of groups and linear layers are refitted, if they run once. The
    intercept goes into the batch norm after the layer, whose statistics become those of the new output. Without a
    batch norm it goes into the layer's bias, which is added if missing. All other parameters stay.

    Args:
        pruned: Network pruned from `original` by any library, with the same layer names. Wrapped or not.
        original: Network before pruning.
        loader: Shuffled batches of images, of which the first ones are taken; labels are never read. See
            `knowiso_train.features.inputs_of`.
        kept: Kept indices of each tensor, from `track_kept_indices`. Default: inferred from the weights, which is
            possible until the pruned network is trained.
        max_images: Maximum number of images. All of them pass through the pruned network at once, so memory grows with
            their number.
        rows: Samples per input feature of a layer, at most all positions of all images.
        ridge: Relative ρ ≥ 0, one or several to choose from. `math.inf` leaves the surviving weights and corrects the
            intercept.
        block_steps: Updates of each block, after its layers are solved, towards the output of the original's block.
            Gradients stay within one block, and labels are not used. 60 updates double the time. Blocks that do not
            improve on other images are restored. The outputs of the original's blocks for all images are held in
            memory. Default: none.
        forward: `forward(model, batch)` for models that need more than images.
        seed: Seed of the positions.
        progress: Show a progress bar.

    Returns:
        Unexplained variance of each layer before and after, on images that were not fitted.

    Raises:
        ShapeError: A network that is no pruned version of the original.
        InputTypeError, OptionError, DataError: Arguments of a wrong kind or out of range.
        NonFiniteError: NaN or Inf, with the layer's name.

    Examples:
        >>> original = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> with torch.no_grad():  # the last two channels are equal
        ...     original[0].weight[7], original[0].bias[7] = original[0].weight[6], original[0].bias[6]
        >>> pruned = nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 4, 3))
        >>> kept = {"0.weight": original[0].weight[:7], "0.bias": original[0].bias[:7]}
        >>> _ = pruned.load_state_dict({**kept, "2.weight": original[2].weight[:, :7], "2.bias": original[2].bias})
        >>> images = torch.randn(64, 3, 8, 8)
        >>> report = refit(pruned, original, [images], ridge=1e-9, progress=False)
        >>> torch.allclose(pruned(images), original(images), atol=1e-4)
        True
    """
    pruned, original = unwrap_models(pruned=pruned, original=original)
    if pruned is original:
        raise OptionError("pruned and original are the same network; keep a copy.deepcopy of it before pruning")
    ridges = validate_ridges(ridge)
    check_network(pruned, original)
    check_counts(rows=rows)
    images = Calibration(loader, max_images, device_of(original), forward)
    # The refit replaces the statistics of batch norms
    norms = [module for module in pruned.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    with preserve_state(pruned, original, updated=norms), restore_on_error(pruned), torch.no_grad():
        batch = images.first(TRACE_IMAGES)
        epilogues = trace_model(original, batch, images.forward)
        outputs = infer_kept_outputs(original, pruned, epilogues, kept)
        _check_same_structure(pruned, original, epilogues, batch, images.forward)
        reference = record_reference_outputs(original, epilogues, images, rows, seed, progress)
        blocks = (
            BlockFinetuner.from_original(original, pruned, list(epilogues), images, block_steps, seed)
            if block_steps
            else None
        )
        fits = reconstruct(
            pruned, epilogues, reference, images, outputs=outputs, ridges=ridges, blocks=blocks, progress=progress
        )
    return RefitReport(tuple(fits), tuple(blocks.results) if blocks is not None else ())


def _check_same_structure(
    pruned: nn.Module, original: nn.Module, epilogues: Mapping[str, Epilogue], batch: Any, forward: Forward
) -> None:
    forward(pruned, batch)  # fills caches, as `trace_model` does for the original
    counts = [count_operations(model, batch, forward) for model in (pruned, original)]
    if counts[0] != counts[1]:
        raise ShapeError(
            f"the pruned network runs {counts[0]} operations and the original {counts[1]}, but layers are matched by "
            "their order. Close FeatureTaps and remove hooks from both first"
        )
    layers = dict(pruned.named_modules())
    different = [name for name in epilogues if type(layers[name]) is not type(original.get_submodule(name))]
    if different:
        raise ShapeError(f"layers {different} of the pruned network are of another class than the original's")


def check_network(*networks: nn.Module) -> None:
    """Check that networks can be pruned.

    Raises:
        OptionError: Weights without data or created in inference mode, or hooks of this library, which would hold old
            widths.
    """
    check_materialized(*networks)
    for network in networks:
        if any(parameter.is_inference() for parameter in network.parameters()):
            raise OptionError(
                f"the weights of this {type(network).__name__} were made under torch.inference_mode() and cannot be "
                "pruned; create or load the network outside of it"
            )
        for name, module in network.named_modules():
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                if type(hook).__module__.startswith("knowiso_train."):
                    raise OptionError(
                        f"FeatureTaps or a loss watches {name or 'the network'!r}: leave its `with` block or call its "
                        "detach() before pruning, and create a new one for the new widths"
                    )
