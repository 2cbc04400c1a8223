"""Classifier and pooled features of a network, and checks of its head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from knowiso_train.errors import DataError, InputTypeError, LayerNameError, LayoutError, OptionError, ShapeError
from knowiso_train.features.extractor import Extractor
from knowiso_train.features.hooks import call_input, record_outputs, remove_afterwards
from knowiso_train.features.modules import named_layers, unwrap_model
from knowiso_train.features.state import device_of
from knowiso_train.utils.batch import batch_size, get_inputs, labels_of

TIMM_POOL_NAME = "global_pool"  # in most of timm's networks
POOL_PROBE_IMAGES = 2  # images

MAX_BATCH_DEPENDENCE = 1e-4  # relative: features of one image in two batches

MAX_HEAD_DIFFERENCE = 1e-2  # relative: half precision rounds by less
# Of the images that could be agreed on; where more of them are not, the classes stand in another order, or are others
MIN_AGREEMENT_RATIO = 0.5
HEAD_PROBE_IMAGES = 2  # images


@torch.no_grad()
def pooled_layer(net: ClassifierModel, batch: Any) -> str:
    """Name of the first layer whose output is the classifier's input; `global_pool` where there is one.

    Args:
        net: in eval mode.
        batch: of images.

    Raises:
        OptionError: there is none, since the network's own `forward` pools.

    Example:
        >>> small = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> pooled_layer(classifier_model(small, "small"), torch.rand(2, 3, 8, 8))
        '2'
    """
    layers = named_layers(unwrap_model(net.model))
    if TIMM_POOL_NAME in layers:
        return TIMM_POOL_NAME
    candidates: list[str] = []

    def compare(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = call_input(args, kwargs)
        # The same memory: the layer's output reached the classifier unchanged.
        candidates.extend(
            name
            for name, outputs in outputs_by_layer.items()
            for output in outputs
            if isinstance(output, Tensor) and output.shape == x.shape and output.data_ptr() == x.data_ptr()
        )

    images = get_inputs(batch)[:POOL_PROBE_IMAGES].to(device_of(net.model) or "cpu")
    handle = net.classifier.register_forward_pre_hook(compare, with_kwargs=True)
    with remove_afterwards([handle]), record_outputs(layers) as outputs_by_layer:
        net.model(images if net.transform is None else net.transform(images))
    if not candidates:
        raise OptionError(
            f"{net.name} has no layer that emits what its classifier {net.head!r} reads; say with FineTuning(layers=[...]), and peer_layers for the "
            "peers, where it is to agree with them"
        )
    return candidates[0]


@dataclass(frozen=True)
class ClassifierModel:
    """A network, the name of its last linear layer, and what brings the loader's images to it; `head_excluded` where its classifier has no say, because
    its classes are others, or its output is not the classifier's alone."""

    model: nn.Module
    head: str
    name: str
    transform: Callable[[Any], Any] | None = None
    head_excluded: bool = False

    @property
    def classifier(self) -> nn.Linear:
        """The last linear layer."""
        found = named_layers(self.model)[self.head]
        if not isinstance(found, nn.Linear):
            raise LayoutError(
                f"{self.name}: layer {self.head!r} is a {type(found).__name__}; a classifier must be a Linear"
            )
        return found

    @property
    def classes(self) -> int:
        """Outputs of the classifier."""
        return self.classifier.out_features

    def has_compatible_head(self, classes: int) -> bool:
        """Whether its classifier tells these classes apart."""
        return not self.head_excluded and self.classes == classes

    def logits(self, features: Tensor) -> Tensor:
        """What the network's classifier says of its pooled features (N, D), in float64."""
        layer = self.classifier
        scores = features.double() @ layer.weight.detach().cpu().double().T
        return scores if layer.bias is None else scores + layer.bias.detach().cpu().double()


def classifier_model(
    model: nn.Module, name: str, head: str | None = None, transform: Callable[[Any], Any] | None = None
) -> ClassifierModel:
    """A network with its classifier: the one named, that of timm's `get_classifier()`, or the last linear layer.

    Raises:
        InputTypeError: not a module.
        LayerNameError: no layer of this name, or no linear layer at all.
        LayoutError: the classifier is not a Linear.

    Example:
        >>> classifier_model(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), "small").head
        '1'
    """
    layers = named_layers(unwrap_model(model))
    if head is None:
        own = getattr(unwrap_model(model), "get_classifier", None)
        found = own() if callable(own) else None
        head = next((key for key, layer in layers.items() if layer is found), None)
    if head is None:
        head = next((key for key, layer in reversed(layers.items()) if isinstance(layer, nn.Linear)), None)
    if head is None or head not in layers:
        wanted = "no linear layer that could be its classifier" if head is None else f"no layer {head!r}"
        raise LayerNameError(f"{name} has {wanted}; name it with head= or peer_heads=")
    result = ClassifierModel(model, head, name, transform)
    _ = result.classifier
    return result


@dataclass(frozen=True)
class PooledFeatures:
    """Pooled features of every network on the same images.

    Attributes:
        features: (N, D_i) float32 on the CPU, one for each network.
        labels: (N,), or None where they were not asked for.
    """

    features: tuple[Tensor, ...]
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.features[0])

    def select(self, networks: Sequence[int]) -> tuple[Tensor, ...]:
        """Features of some of the networks."""
        return tuple(self.features[i] for i in networks)

    def exclude(self, others: PooledFeatures) -> PooledFeatures:
        """What is not among the others, by the first network's features: in other batches the same image gives nearly the same.

        Example:
            >>> x = torch.randn(10, 4)
            >>> len(PooledFeatures((x,), None).exclude(PooledFeatures((x[3:5],), None)))
            8
        """
        own, known = self.features[0].double(), others.features[0].double()
        line = torch.randn(own.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        order = (known @ line).argsort()
        at = torch.searchsorted((known @ line)[order], own @ line)
        near = [order[place.clamp(0, len(known) - 1)] for place in (at - 1, at)]
        apart = torch.stack([(own - known[index]).norm(dim=1) for index in near]).amin(0)
        kept = apart > MAX_BATCH_DEPENDENCE * own.std(0).norm().clamp_min(1e-12)
        return PooledFeatures(
            tuple(feature[kept] for feature in self.features), None if self.labels is None else self.labels[kept]
        )


def extract_pooled_features(
    networks: Sequence[ClassifierModel],
    loader: Iterable[Any],
    *,
    labels: bool,
    max_images: int | None = None,
    progress: bool = False,
    what: str = "images",
) -> PooledFeatures:
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
        runners = [
            stack.enter_context(Extractor(n.model, [n.head], name=n.name, at="input", transform=n.transform))
            for n in networks
        ]
        for batch in tqdm(loader, desc=what, unit="batch", disable=not progress):
            room = batch_size(batch) if max_images is None else min(batch_size(batch), max_images - count)
            if room <= 0:
                break
            for kept, runner, net in zip(rows, runners, networks, strict=True):
                feature = runner.run(batch)[net.head]
                if feature.shape[2:] != (1, 1):
                    raise ShapeError(
                        f"{net.name}: the input of {net.head!r} has positions {tuple(feature.shape[2:])}; expected one pooled vector"
                    )
                kept.append(feature[:room, :, 0, 0].float().cpu())
            if labels:
                known.append(labels_of(batch, what)[:room].cpu())
            count += room
    if not count:
        raise DataError(f"the loader of {what} gave no images")
    return PooledFeatures(tuple(torch.cat(kept) for kept in rows), torch.cat(known) if labels else None)


def classifier_models(
    model: nn.Module,
    peers: nn.Module | Iterable[nn.Module],
    head: str | None,
    peer_heads: Sequence[str | None] | None,
    transform: Callable[[Any], Any] | None,
    peer_transforms: Callable[[Any], Any] | Sequence[Callable[[Any], Any] | None] | None,
    names: Sequence[str] | None,
) -> list[ClassifierModel]:
    """The network that is refined, then its peers."""
    peers = [peers] if isinstance(peers, nn.Module) and not isinstance(peers, nn.ModuleList) else list(peers)
    if not peers:
        raise InputTypeError(
            "expected at least one peer: a network that was trained on the same kind of images (another seed, another architecture)"
        )
    for kind, given in (
        ("peer_heads", peer_heads),
        ("peer_transforms", None if callable(peer_transforms) else peer_transforms),
    ):
        if given is not None and len(given) != len(peers):
            raise InputTypeError(f"{kind} needs one item for each of {len(peers)} peers, got {len(given)}")
    transforms = (
        [peer_transforms] * len(peers)
        if peer_transforms is None or callable(peer_transforms)
        else list(peer_transforms)
    )
    if names is not None and len(names) != 1 + len(peers):
        raise InputTypeError(
            f"names needs one for the network and one for each of {len(peers)} peers, got {len(names)}"
        )
    called = list(names or ["network", *(f"peer {i}" for i in range(len(peers)))])
    twice = next((name for name in called if called.count(name) > 1), None)
    if twice is not None:
        raise InputTypeError(
            f"names are to tell the networks apart, but {twice!r} is there {called.count(twice)} times"
        )
    heads = list(peer_heads or [None] * len(peers))
    own = classifier_model(model, called[0], head, transform)
    return [
        own,
        *(classifier_model(p, n, h, t) for p, n, h, t in zip(peers, called[1:], heads, transforms, strict=True)),
    ]


def flag_unusable_heads(networks: Sequence[ClassifierModel], batch: Any) -> list[ClassifierModel]:
    """The networks, peers without a say marked as `head_excluded`: their output is not what their classifier makes of its input.

    Args:
        networks: in eval mode, first the one that is refined.
        batch: of images.

    Raises:
        LayoutError: the network itself is of this kind, such as one with two classifiers, and would not be the better
            for a new one.
    """
    found = [replace(net, head_excluded=net.head_excluded or not _is_its_classifiers(net, batch)) for net in networks]
    if found[0].head_excluded:
        raise LayoutError(
            f"{found[0].name}: its output is not what its classifier {found[0].head!r} makes of its features (another beside it, a step behind it). "
            "A new one would not be the network's; name the right layer with head=, or refine a network with one classifier"
        )
    return found


def flag_mismatched_classes(
    networks: Sequence[ClassifierModel], seen: PooledFeatures
) -> tuple[list[ClassifierModel], list[str]]:
    """The networks, peers whose classes are not the network's own marked as `head_excluded`, and a note on each.

    As many classes need not be the same ones: what both say of the images tells. Where they agree on less than half of
    what they would agree on if
    the peer's classes were named anew, they are not.

    Args:
        networks: first the one that is refined.
        seen: by all of them; labels are not read.

    Example:
        >>> nets = [classifier_model(torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False)), name) for name in ("own", "same", "turned")]
        >>> for net, order in zip(nets, ([0, 1, 2], [0, 1, 2], [1, 2, 0])):
        ...     net.classifier.weight.data = torch.eye(3)[order]
        >>> x = torch.randn(90, 3)
        >>> [net.head_excluded for net in flag_mismatched_classes(nets, PooledFeatures((x, x, x), None))[0]]
        [False, False, True]
    """
    own, found, notes = networks[0], [networks[0]], []
    said = own.logits(seen.features[0]).argmax(1)
    for net, features in zip(networks[1:], seen.features[1:], strict=True):
        if net.has_compatible_head(own.classes):
            other = net.logits(features).argmax(1)
            together = torch.zeros(own.classes, own.classes).index_put_(
                (said, other), torch.ones(len(said)), accumulate=True
            )
            agreed, possible = float(together.diagonal().sum()) / len(said), float(together.amax(1).sum()) / len(said)
            if agreed < MIN_AGREEMENT_RATIO * possible:
                net = replace(net, head_excluded=True)
                notes.append(
                    f"{net.name} tells {net.classes} classes apart as {own.name} does, but says the same of {100 * agreed:.1f} % of the images, and "
                    f"could of {100 * possible:.1f} % if its classes were named anew: they seem to be others, and its classifier is not asked"
                )
        found.append(net)
    return found, notes


@torch.no_grad()
def _is_its_classifiers(net: ClassifierModel, batch: Any) -> bool:
    images = get_inputs(batch)[:HEAD_PROBE_IMAGES].to(device_of(net.model) or "cpu")
    with record_outputs({net.head: net.classifier}) as outputs:
        output = net.model(images if net.transform is None else net.transform(images))
    logits = outputs.get(net.head, [])
    if len(logits) != 1 or not isinstance(output, Tensor) or output.shape != logits[0].shape:
        return False
    difference = float((output - logits[0]).abs().max())
    return difference <= MAX_HEAD_DIFFERENCE * float(logits[0].abs().max().clamp_min(1e-12))
