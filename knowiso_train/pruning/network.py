"""Refit a pruned network: closed-form weights in place of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.errors import InputTypeError, OptionError, ShapeError
from knowiso_train.features import bare, device_of, undisturbed
from knowiso_train.pruning.blocks import Blocks
from knowiso_train.pruning.calibration import Calibration, Forward, check_counts
from knowiso_train.pruning.forward import RIDGES, refit_forward
from knowiso_train.pruning.kept import kept_outputs
from knowiso_train.pruning.originals import originals
from knowiso_train.pruning.report import RefitReport
from knowiso_train.pruning.rows import readable
from knowiso_train.pruning.trace import Tail, operations, tails
from knowiso_train.pruning.twin import Kept

TRACED = 2  # images
REFIT_ROWS = 100  # per regressor; more than the criterion needs


def refit(
    pruned: nn.Module,
    original: nn.Module,
    loader: Iterable[Any],
    *,
    kept: Mapping[str, Kept] | None = None,
    max_images: int = 1024,
    rows: int = REFIT_ROWS,
    ridge: float | Sequence[float] = RIDGES,
    block_steps: int = 0,
    forward: Forward | None = None,
    seed: int = 0,
    progress: bool = True,
) -> RefitReport:
    """Give a pruned network, in place, weights that reproduce the original's outputs from what is left (DESIGN §1.4). No labels, no training.

    Layer after layer in the order in which they run, each one's weight and intercept are solved in closed form from what the layer now reads, errors
    made upstream included, to what the original's layer gives; where its output joins a residual stream, to what the stream lacks of the original's.
    Where a rectifier (ReLU, ReLU6, Hardtanh) is all that reads the result, what lies beyond its limits may be anything beyond them: targets and
    weights are found by turns, see `pruning.rectified`.

    The ridge pulls towards the surviving original weights. A tenth of the images, the last ones, is never fitted: it chooses each layer's ridge, and
    says what is left unexplained.

    Refitted are convolutions of any kernel, stride and number of groups (depthwise: each channel by itself) and linear layers that run once. The
    intercept goes into the following batch norm, whose statistics then are those of the new output, or into the layer's bias, which is added where
    there is none. Batch norms, layer norms and all other parameters stay as pruning left them.

    Args:
        pruned: pruned from `original` by any library, with the same layer names. Wrapped or not.
        original: the network before pruning.
        loader: batches of images, see `knowiso_train.features.inputs_of`; shuffled, as the first ones are taken; labels are never read.
        kept: what pruning kept, from `recording`; None reads it off the weights, which works until the pruned network is trained.
        max_images: to look at. All of them pass through the pruned network at once, so memory grows with them.
        rows: of each regression, per regressor, at most all positions of all images.
        ridge: relative ρ ≥ 0, one or several to choose from; `math.inf` leaves the surviving weights and corrects the intercept.
        block_steps: where more than 0, every block is tuned as a whole once its layers are solved, by so many updates towards what the original's
            block gives: gradients within one block, still no labels. 60 take as long again as the rest; what is not better on other images is undone.
            What the original's blocks give for all images is held in memory.
        forward: `forward(model, batch)` for networks that need more than images.
        seed: of the positions.
        progress: whether to show a bar.

    Returns:
        Per layer the unexplained share before and after, on images that were not fitted.

    Raises:
        ShapeError: not a pruned version of the original.
        InputTypeError, OptionError, DataError: arguments without meaning.
        NonFiniteError: NaN or Inf, with the layer's name.

    Example:
        >>> original = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> with torch.no_grad():
        ...     original[0].weight[7], original[0].bias[7] = original[0].weight[6], original[0].bias[6]  # a channel that is there twice
        >>> pruned = nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 4, 3))
        >>> cut = {"0.weight": original[0].weight[:7], "0.bias": original[0].bias[:7]}
        >>> _ = pruned.load_state_dict({**cut, "2.weight": original[2].weight[:, :7], "2.bias": original[2].bias})
        >>> images = torch.randn(64, 3, 8, 8)
        >>> report = refit(pruned, original, [images], ridge=1e-9, progress=False)
        >>> torch.allclose(pruned(images), original(images), atol=1e-4)
        True
    """
    for role, model in (("pruned", pruned), ("original", original)):
        if not isinstance(model, nn.Module):
            raise InputTypeError(f"{role}: expected a torch.nn.Module, got {type(model).__name__}")
    small, whole = bare(pruned), bare(original)
    if small is whole:
        raise OptionError("pruned and original are the same network; keep a copy.deepcopy of it before pruning")
    ridges = checked_ridges(ridge)
    check_network(small, whole)
    check_counts(rows=rows)
    images = Calibration(loader, max_images, device_of(whole), forward)
    with undisturbed(small, whole), torch.no_grad():
        found = traced(whole, images)
        outputs = kept_outputs(whole, small, found, kept)
        few = images.some(min(TRACED, images.count))
        counts = [operations(partial(images.run, network, few)) for network in (small, whole)]
        if counts[0] != counts[1]:
            raise ShapeError(
                f"the pruned network runs {counts[0]} operations and the original {counts[1]}, so that they cannot be told to be the same ones. "
                "Close FeatureTaps and take hooks off both first"
            )
        layers = dict(small.named_modules())
        strange = [name for name in found if type(layers[name]) is not type(whole.get_submodule(name))]
        if strange:
            raise ShapeError(f"layers {strange} of the pruned network are of another kind than the original's")
        target = originals(whole, dict(whole.named_modules()), found, images, rows, seed, progress)
        blocks = Blocks.of(whole, small, list(found), images, block_steps, seed) if block_steps else None
        fits = refit_forward(small, layers, found, target, images, outputs=outputs, ridge=ridges, blocks=blocks, progress=progress)
    return RefitReport(tuple(fits), tuple(blocks.fits) if blocks is not None else ())


def traced(model: nn.Module, images: Calibration) -> dict[str, Tail]:
    """What follows every convolution and linear layer that runs once and has its weight for itself, in forward order."""
    owners = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    layers: dict[str, nn.Module] = {name: layer for name, layer in model.named_modules() if readable(layer) and owners.count(id(layer.weight)) == 1}
    count = min(TRACED, images.count)
    few = images.some(count)
    apart: set[str] = set()  # layers that do not see images, such as one that makes a position code

    def looking(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or len(output) % count:
                apart.add(name)

        return hook

    handles = [layer.register_forward_hook(looking(name)) for name, layer in layers.items()]
    try:
        found = tails(model, layers, lambda: images.run(model, few))
    finally:
        for handle in handles:
            handle.remove()
    return {name: tail for name, tail in found.items() if name not in apart}


def check_network(*networks: nn.Module) -> None:
    """Raises:
    OptionError: weights that inference mode made; or a network that this library's hooks watch: what they hold would change with its widths, and
        copies would carry them.
    """
    for network in networks:
        if any(parameter.is_inference() for parameter in network.parameters()):
            raise OptionError(
                f"the weights of this {type(network).__name__} were made under torch.inference_mode(), which makes them unfit for pruning; make or "
                "load the network outside of it"
            )
        for name, module in network.named_modules():
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                if type(hook).__module__.startswith("knowiso_train."):
                    raise OptionError(
                        f"FeatureTaps or a loss watches {name or 'the network'!r}: leave its `with` block, or call its detach(), before you prune "
                        "or refit, and make a new one for the new widths"
                    )


def checked_ridges(ridge: float | Sequence[float]) -> tuple[float, ...]:
    """One ridge or several as a tuple.

    Raises:
        OptionError: none, or a negative one.

    Example:
        >>> checked_ridges(0.1)
        (0.1,)
    """
    found = tuple(ridge) if isinstance(ridge, Sequence) else (ridge,)
    if not found or not all(isinstance(value, (int, float)) and value >= 0 for value in found):
        raise OptionError(f"ridge must be a number >= 0 (relative to the mean variance of what a layer reads) or several, got {ridge!r}")
    return found
