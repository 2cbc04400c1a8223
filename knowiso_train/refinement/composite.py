"""Composite of two networks (arXiv 1908.01581, section 4)."""

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
from knowiso_train.features.extractor import align
from knowiso_train.features.hooks import FeatureTaps
from knowiso_train.features.modules import unwrap_model
from knowiso_train.features.state import device_of, preserve_state
from knowiso_train.measurement.config import Solver
from knowiso_train.measurement.measure import measure
from knowiso_train.refinement.models import ClassifierModel
from knowiso_train.utils.batch import get_inputs, labels_of


class Composite(nn.Module):
    """A network whose layer emits what a disentangler tells of a peer's layer: order 0 … `max_order` of it.

    Args:
        model: the network; its layers after `layer` are what is trained.
        layer: name of the layer that is replaced; it emits (N, C, H, W) or (N, C).
        peer: the network that is asked; frozen.
        peer_layer: name of its layer.
        maps: fitted disentangler, peer's layer → network's layer; frozen.
        max_order: highest order that is handed on.

    Source: arXiv 1908.01581, section on refining features.

    Raises:
        OptionError: more orders than the disentangler has.

    Example:
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
                f"max_order must lie in 0 … {maps.config.order}, what the disentangler was fitted with; got {max_order}"
            )
        self.model, self.maps = copy.deepcopy(unwrap_model(model)), maps.requires_grad_(False)
        self.peer = copy.deepcopy(unwrap_model(peer)).eval().requires_grad_(False)
        self.layer, self.peer_layer, self.max_order = layer, peer_layer, max_order

    def train(self, mode: bool = True) -> Composite:
        """The peer and the maps stay in eval mode."""
        super().train(mode)
        self.peer.eval()
        self.maps.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the network from the peer's features."""
        with torch.no_grad(), FeatureTaps(self.peer, self.peer_layer) as taps:
            self.peer(images)
            feature = taps.collect()[self.peer_layer].float()

        def replaced(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            with torch.no_grad():
                told = torch.stack(self.maps.components(_on_grid(feature, output))[: self.max_order + 1]).sum(0)
            if told.shape != output.shape:
                raise ShapeError(f"layer {self.layer!r} emits {tuple(output.shape)}, the maps give {tuple(told.shape)}")
            return told.to(output.dtype)

        handle = self.model.get_submodule(self.layer).register_forward_hook(replaced)
        try:
            logits: Tensor = self.model(images)
        finally:
            handle.remove()
        return logits


def paper_composite(
    own: ClassifierModel,
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
    solver: Solver = "closed_form",
    progress: bool = False,
) -> Composite:
    """Fit the maps on unlabeled images, then train the layers after `layer` on labeled ones with a small learning rate.

    Raises:
        DataError: a loader without images.
        KnowisoError: as `measure`.
    """
    if own.transform is not None or peer.transform is not None:
        raise OptionError("the composite hands both networks the same images: put transforms into the loader")
    report = measure(
        peer.model, own.model, loader, [(peer_layer, layer)],
        order=order, solver=solver, seed=seed, max_images=max_images, noise_floor=False, bootstrap=0, progress=progress,
    )  # fmt: skip
    maps = report.pairs[0].disentangler.float()
    with preserve_state(own.model):
        torch.manual_seed(seed)
        composite = Composite(own.model, layer, peer.model, peer_layer, maps, max_order).to(
            device_of(own.model) or "cpu"
        )
        train_after(composite, composite.model, layer, labeled, steps=steps, lr=lr, progress=progress)
    return composite.eval()


def train_after(
    whole: nn.Module,
    model: nn.Module,
    layer: str,
    labeled: Iterable[Any],
    *,
    steps: int,
    lr: float,
    progress: bool = False,
) -> None:
    """Train the layers of `model` that come after `layer`, in place, by the cross-entropy of `whole` (the composite, or the model itself).

    Raises:
        DataError: a loader without images.
    """
    trained = _after(model, layer, next(iter(labeled), None))
    optimizer = torch.optim.SGD(trained, lr=lr, momentum=0.9)
    whole.train()
    reached = {id(parameter) for parameter in trained}
    for module in model.modules():  # batch norms before the layer stay as they are
        if not any(id(parameter) in reached for parameter in module.parameters(recurse=False)):
            module.training = False
    for batch in tqdm(islice(_forever(labeled), steps), desc="paper", total=steps, unit="step", disable=not progress):
        labels = labels_of(batch, "labeled images")
        images = get_inputs(batch).to(device_of(whole) or "cpu")
        loss = F.cross_entropy(whole(images), labels.to(images.device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    whole.eval()


def _after(model: nn.Module, layer: str, batch: Any) -> Sequence[nn.Parameter]:
    """Parameters that the loss reaches when the layer's output is replaced: those of the layers after it."""
    if batch is None:
        raise DataError("the loader of labeled images gave no images")
    images = get_inputs(batch)[:2].to(device_of(model) or "cpu")
    cut: Any = model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: output.detach())
    try:
        with preserve_state(model), torch.enable_grad():
            reached = torch.autograd.grad(
                model(images).sum(), parameters := list(model.parameters()), allow_unused=True
            )
    finally:
        cut.remove()
    return [parameter for parameter, gradient in zip(parameters, reached, strict=True) if gradient is not None]


def _forever(loader: Iterable[Any]) -> Iterable[Any]:
    while True:
        yield from loader


def _on_grid(feature: Tensor, output: Tensor) -> Tensor:
    return align(feature, (output.shape[2], output.shape[3])) if feature.ndim == 4 and output.ndim == 4 else feature
