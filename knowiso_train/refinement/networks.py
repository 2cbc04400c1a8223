"""A network and its classifier, and what it makes of images: pooled features, from which its logits follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from knowiso_train.errors import DataError, InputTypeError, LayerNameError, LayoutError, ShapeError
from knowiso_train.features import Extractor, bare, batch_size, named_layers

SAME = 1e-4  # relative: features of one image in two batches
LABEL_KEYS = ("label", "labels", "target", "targets", "y")


@dataclass(frozen=True)
class Network:
    """A network, the name of its last linear layer, and what brings the loader's images to it; `silent` where its classifier has no say, because
    its classes are others, or its output is not the classifier's alone."""

    model: nn.Module
    head: str
    name: str
    transform: Callable[[Any], Any] | None = None
    silent: bool = False

    @property
    def classifier(self) -> nn.Linear:
        """The last linear layer."""
        found = named_layers(self.model)[self.head]
        if not isinstance(found, nn.Linear):
            raise LayoutError(f"{self.name}: layer {self.head!r} is a {type(found).__name__}; a classifier must be a Linear")
        return found

    @property
    def classes(self) -> int:
        """Outputs of the classifier."""
        return self.classifier.out_features

    def speaks(self, classes: int) -> bool:
        """Whether its classifier tells these classes apart."""
        return not self.silent and self.classes == classes

    def logits(self, features: Tensor) -> Tensor:
        """What the network's classifier says of its pooled features (N, D), in float64."""
        layer = self.classifier
        scores = features.double() @ layer.weight.detach().cpu().double().T
        return scores if layer.bias is None else scores + layer.bias.detach().cpu().double()


def network(model: nn.Module, name: str, head: str | None = None, transform: Callable[[Any], Any] | None = None) -> Network:
    """A network with its classifier: the one named, that of timm's `get_classifier()`, or the last linear layer.

    Raises:
        InputTypeError: not a module.
        LayerNameError: no layer of this name, or no linear layer at all.
        LayoutError: the classifier is not a Linear.

    Example:
        >>> network(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), "small").head
        '1'
    """
    layers = named_layers(bare(model))
    if head is None:
        own = getattr(bare(model), "get_classifier", None)
        found = own() if callable(own) else None
        head = next((key for key, layer in layers.items() if layer is found), None)
    if head is None:
        head = next((key for key, layer in reversed(layers.items()) if isinstance(layer, nn.Linear)), None)
    if head is None or head not in layers:
        wanted = "no linear layer that could be its classifier" if head is None else f"no layer {head!r}"
        raise LayerNameError(f"{name} has {wanted}; name it with head= or peer_heads=")
    result = Network(model, head, name, transform)
    _ = result.classifier
    return result


@dataclass(frozen=True)
class Seen:
    """Pooled features of every network on the same images.

    Attributes:
        features: (N, D_i) float32 on the CPU, one for each network.
        labels: (N,), or None where they were not asked for.
    """

    features: tuple[Tensor, ...]
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.features[0])

    def of(self, networks: Sequence[int]) -> tuple[Tensor, ...]:
        """Features of some of the networks."""
        return tuple(self.features[i] for i in networks)

    def without(self, others: Seen) -> Seen:
        """What is not among the others, by the first network's features: in other batches the same image gives nearly the same.

        Example:
            >>> x = torch.randn(10, 4)
            >>> len(Seen((x,), None).without(Seen((x[3:5],), None)))
            8
        """
        own, known = self.features[0].double(), others.features[0].double()
        line = torch.randn(own.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        order = (known @ line).argsort()
        at = torch.searchsorted((known @ line)[order], own @ line)
        near = [order[place.clamp(0, len(known) - 1)] for place in (at - 1, at)]
        apart = torch.stack([(own - known[index]).norm(dim=1) for index in near]).amin(0)
        kept = apart > SAME * own.std(0).norm().clamp_min(1e-12)
        return Seen(tuple(feature[kept] for feature in self.features), None if self.labels is None else self.labels[kept])


def see(
    networks: Sequence[Network], loader: Iterable[Any], *, labels: bool, max_images: int | None = None, progress: bool = False, what: str = "images"
) -> Seen:
    """Run every network once on every image; what is kept is the input of each classifier.

    Args:
        networks: in eval mode already.
        loader: batches as `inputs_of` takes them; the labels are their second item, or lie under "label" and the like.
        labels: whether labels are needed.
        max_images: read no more than this many.
        progress: show a progress bar.
        what: for messages.

    Raises:
        DataError: no images, or no labels where they are needed.
        ShapeError: a classifier whose input is not one vector for each image.
    """
    rows: list[list[Tensor]] = [[] for _ in networks]
    known: list[Tensor] = []
    count = 0
    with ExitStack() as stack:
        runners = [stack.enter_context(Extractor(n.model, [n.head], name=n.name, at="input", transform=n.transform)) for n in networks]
        for batch in tqdm(loader, desc=what, unit="batch", disable=not progress):
            room = batch_size(batch) if max_images is None else min(batch_size(batch), max_images - count)
            if room <= 0:
                break
            for kept, runner, net in zip(rows, runners, networks, strict=True):
                feature = runner.run(batch)[net.head]
                if feature.shape[2:] != (1, 1):
                    raise ShapeError(f"{net.name}: the input of {net.head!r} has positions {tuple(feature.shape[2:])}; expected one pooled vector")
                kept.append(feature[:room, :, 0, 0].float().cpu())
            if labels:
                known.append(labels_of(batch, what)[:room])
            count += room
    if not count:
        raise DataError(f"the loader of {what} gave no images")
    return Seen(tuple(torch.cat(kept) for kept in rows), torch.cat(known) if labels else None)


def labels_of(batch: Any, what: str = "images") -> Tensor:
    """Labels (N,) of a batch: its second item, or the entry under one of `LABEL_KEYS`.

    Raises:
        DataError: no labels, or labels that are not one integer for each image.

    Example:
        >>> labels_of((torch.zeros(2, 3, 4, 4), torch.tensor([1, 0]))).tolist()
        [1, 0]
    """
    found: Any = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[1]
    if not isinstance(found, Tensor):
        raise DataError(f"the loader of {what} gives no labels: expected (images, labels), or a mapping with one of {LABEL_KEYS}")
    if found.ndim != 1 or found.is_floating_point() or len(found) != batch_size(batch):
        raise DataError(f"{what}: expected one integer label for each image, got {found.dtype} of shape {tuple(found.shape)}")
    if bool((found < 0).any()):
        raise DataError(f"{what}: an image has no label (its label is negative)")
    return found.cpu().long()


def checked_networks(
    model: nn.Module,
    peers: nn.Module | Iterable[nn.Module],
    head: str | None,
    peer_heads: Sequence[str | None] | None,
    transform: Callable[[Any], Any] | None,
    peer_transforms: Callable[[Any], Any] | Sequence[Callable[[Any], Any] | None] | None,
    names: Sequence[str] | None,
) -> list[Network]:
    """The network that is refined, then its peers."""
    peers = [peers] if isinstance(peers, nn.Module) and not isinstance(peers, nn.ModuleList) else list(peers)
    if not peers:
        raise InputTypeError("expected at least one peer: a network that was trained on the same kind of images (another seed, another architecture)")
    for kind, given in (("peer_heads", peer_heads), ("peer_transforms", None if callable(peer_transforms) else peer_transforms)):
        if given is not None and len(given) != len(peers):
            raise InputTypeError(f"{kind} needs one item for each of {len(peers)} peers, got {len(given)}")
    transforms = [peer_transforms] * len(peers) if peer_transforms is None or callable(peer_transforms) else list(peer_transforms)
    if names is not None and len(names) != 1 + len(peers):
        raise InputTypeError(f"names needs one for the network and one for each of {len(peers)} peers, got {len(names)}")
    called = list(names or ["network", *(f"peer {i}" for i in range(len(peers)))])
    twice = next((name for name in called if called.count(name) > 1), None)
    if twice is not None:
        raise InputTypeError(f"names are to tell the networks apart, but {twice!r} is there {called.count(twice)} times")
    heads = list(peer_heads or [None] * len(peers))
    own = network(model, called[0], head, transform)
    return [own, *(network(p, n, h, t) for p, n, h, t in zip(peers, called[1:], heads, transforms, strict=True))]
