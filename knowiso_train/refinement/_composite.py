"""Composite of two networks, the refinement of arXiv 1908.01581, section 4."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from knowiso_train.disentangle.disentangler import Disentangler
from knowiso_train.errors import DataError, OptionError, ShapeError
from knowiso_train.features.calls import find_logits
from knowiso_train.features.extractor import align
from knowiso_train.features.hooks import FeatureTaps
from knowiso_train.features.state import device_of, preserve_state
from knowiso_train.features.wrappers import unwrap_model
from knowiso_train.measurement.measure import measure
from knowiso_train.refinement.finetune import BatchCycle
from knowiso_train.refinement.models import ClassifierModel
from knowiso_train.utils.batch import get_inputs, labels_of

GRADIENT_PROBE_IMAGES = 2  # images that find the parameters after a layer


class Composite(nn.Module):
    """A network whose layer output is replaced by orders 0 … `max_order` of it, predicted from a peer's layer.

    Args:
        model: Network. The layers after `layer` are trainable.
        layer: Name of the replaced layer; its output is (N, C, H, W) or (N, C).
        peer: Peer; frozen.
        peer_layer: Name of the peer's layer.
        maps: Fitted disentangler from the peer's layer to the network's layer; frozen.
        max_order: Highest order that is used.

    Raises:
        OptionError: An order that the disentangler does not have.

    References:
        Liang et al., arXiv 1908.01581, section on refining features.

    Examples:
        >>> net, peer = (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2))
        >>> x = torch.randn(64, 4)
        >>> maps = Disentangler(order=0).fit(peer[0](x).detach(), net[0](x).detach())
        >>> Composite(net, "0", peer, "0", maps, 0)(x).shape
        torch.Size([64, 2])
    """

    def __init__(
        self, model: nn.Module, layer: str, peer: nn.Module, peer_layer: str, maps: Disentangler, max_order: int
    ) -> None:
        super().__init__()
        if not 0 <= max_order <= maps.config.order:
            raise OptionError(
                f"max_order must lie in 0 … {maps.config.order}, the order of the disentangler; got {max_order}"
            )
        self.model, self.maps = copy.deepcopy(unwrap_model(model)), maps.requires_grad_(False)
        self.peer = copy.deepcopy(unwrap_model(peer)).eval().requires_grad_(False)
        self.layer, self.peer_layer, self.max_order = layer, peer_layer, max_order

    def train(self, mode: bool = True) -> Composite:
        """Set the mode of the network. Peer and maps stay in eval mode."""
        super().train(mode)
        self.peer.eval()
        self.maps.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Compute the network's logits from the peer's features."""
        with torch.no_grad(), FeatureTaps(self.peer, self.peer_layer) as taps:
            self.peer(images)
            feature = taps.collect()[self.peer_layer].float()

        def replace_output(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            # x̂ = x^(0) + … + x^(max_order); the residual x^Δ and higher orders are dropped
            with torch.no_grad():
                orders = self.maps.components(_match_grid(feature, output))[: self.max_order + 1]
                predicted = torch.stack(orders).sum(0)
            if predicted.shape != output.shape:
                raise ShapeError(
                    f"layer {self.layer!r} has an output of shape {tuple(output.shape)}, the maps give "
                    f"{tuple(predicted.shape)}"
                )
            return predicted.to(output.dtype)

        handle = self.model.get_submodule(self.layer).register_forward_hook(replace_output)
        try:
            return find_logits(self.model(images))
        finally:
            handle.remove()


def paper_composite(
    model: ClassifierModel,
    peer: ClassifierModel,
    loader: Iterable[Any],
    labeled: Iterable[Any],
    layer: str,
    peer_layer: str,
    *,
    order: int,
    max_order: int,
    steps: int,
    lr: float,
    seed: int,
    max_images: int | None,
    progress: bool = False,
) -> Composite:
    """Fit the maps of a composite on unlabeled images, then train the layers after `layer` on labeled ones.

    Args:
        model: Network to refine.
        peer: Peer.
        loader: Unlabeled images.
        labeled: Images with labels.
        layer: Name of the replaced layer.
        peer_layer: Name of the peer's layer.
        order: Order K of the maps.
        max_order: Highest order that is used.
        steps: Number of training steps.
        lr: Learning rate.
        seed: Seed of the split, the maps and dropout.
        max_images: Maximum number of unlabeled images. None: all.
        progress: Show progress bars.

    Raises:
        DataError: A loader without images.
        OptionError: Networks with transforms.
        KnowisoError: As `measure`.
    """
    if model.transform is not None or peer.transform is not None:
        raise OptionError("the composite gives both networks the same images: put transforms into the loader")
    report = measure(
        peer.module,
        model.module,
        loader,
        [(peer_layer, layer)],
        order=order,
        seed=seed,
        max_images=max_images,
        noise_floor=False,
        bootstrap=0,
        progress=progress,
    )
    maps = report.pairs[0].disentangler.float()
    with preserve_state(model.module):
        torch.manual_seed(seed)
        composite = Composite(model.module, layer, peer.module, peer_layer, maps, max_order)
        composite.to(device_of(model.module) or "cpu")
        train_after(composite, composite.model, layer, labeled, steps=steps, lr=lr, progress=progress)
    return composite.eval()


def train_after(
    classifier: nn.Module,
    model: nn.Module,
    layer: str,
    labeled: Iterable[Any],
    *,
    steps: int,
    lr: float,
    progress: bool = False,
) -> None:
    """Train the layers of a network that come after a layer, in place, by the cross-entropy of labels.

    Args:
        classifier: Module whose output is trained: a composite that contains `model`, or `model` itself.
        model: Network that contains the layer.
        layer: Name of the layer. It and the layers before it, with their batch-norm statistics, are not modified.
        labeled: Images with labels, readable more than once.
        steps: Number of SGD steps.
        lr: Learning rate.
        progress: Show a progress bar.

    Raises:
        DataError: A loader without images.
        OptionError: All parameters after the layer are frozen.
    """
    parameters = _parameters_after(model, layer, next(iter(labeled), None))
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    classifier.train()
    trained = {id(parameter) for parameter in parameters}
    # Batch norms before the layer keep their statistics
    for module in model.modules():
        if not any(id(parameter) in trained for parameter in module.parameters(recurse=False)):
            module.training = False
    batches = islice(BatchCycle(labeled, "labeled images"), steps)
    for batch in tqdm(batches, desc="paper", total=steps, unit="step", disable=not progress):
        images = get_inputs(batch).to(device_of(classifier) or "cpu")
        labels = labels_of(batch, "labeled images").to(images.device)
        loss = F.cross_entropy(classifier(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    classifier.eval()


def _parameters_after(model: nn.Module, layer: str, batch: Any) -> Sequence[nn.Parameter]:
    """Find the parameters that still have a gradient when the layer's output is detached, without frozen ones."""
    if batch is None:
        raise DataError("the loader of labeled images gave no images")
    images = get_inputs(batch)[:GRADIENT_PROBE_IMAGES].to(device_of(model) or "cpu")
    detach: Any = model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: output.detach())
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with preserve_state(model), torch.enable_grad():
            total = find_logits(model(images)).sum()
            if not total.requires_grad:
                raise OptionError(f"expected trainable layers after {layer!r}, got frozen ones; unfreeze the last ones")
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    finally:
        detach.remove()
    return [parameter for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is not None]


def _match_grid(feature: Tensor, output: Tensor) -> Tensor:
    """Resample a feature to the grid of an output, where both are feature maps."""
    return align(feature, (output.shape[2], output.shape[3])) if feature.ndim == 4 and output.ndim == 4 else feature
