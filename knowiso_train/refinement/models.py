"""Networks with a linear classifier, their pooled features, and checks of their classifiers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from knowiso_train.errors import DataError, InputTypeError, LayerNameError, LayoutError, OptionError, ShapeError
from knowiso_train.features.calls import call_model, find_logits
from knowiso_train.features.extractor import Extractor
from knowiso_train.features.hooks import call_input
from knowiso_train.features.modules import named_layers
from knowiso_train.features.recording import record_outputs, remove_afterwards
from knowiso_train.features.state import device_of
from knowiso_train.features.wrappers import unwrap_model
from knowiso_train.utils.batch import batch_size, get_inputs, labels_of

TIMM_POOL_NAME = "global_pool"  # name of the pooling layer in most timm networks
POOL_PROBE_IMAGES = 2  # images that locate the pooling layer
HEAD_PROBE_IMAGES = 2  # images that compare the network's output with its classifier's

MAX_BATCH_DEPENDENCE = 1e-4  # relative difference of one image's features between two batches

MAX_HEAD_DIFFERENCE = 1e-2  # relative; above the rounding of half precision
# Agreement over the agreement after the best renaming of classes, below which two label sets count as different
MIN_AGREEMENT_RATIO = 0.5

Transform = Callable[[Any], Any]


@dataclass(frozen=True)
class ClassifierModel:
    """A network, its classifier, and the transform of its inputs.

    Attributes:
        module: Network.
        head: Name of the classifier, a `Linear` layer.
        name: Name of the network in reports and messages.
        transform: Function from the loader's images to the network's inputs. None: the images as they are.
        head_excluded: Exclude the classifier from ensembles and comparisons. Its classes differ, or the network's
            output is not the classifier's output.
    """

    module: nn.Module
    head: str
    name: str
    transform: Transform | None = None
    head_excluded: bool = False

    @property
    def classifier(self) -> nn.Linear:
        """Classifier layer."""
        layer = named_layers(self.module)[self.head]
        if not isinstance(layer, nn.Linear):
            raise LayoutError(
                f"{self.name}: layer {self.head!r} is a {type(layer).__name__}; a classifier must be a Linear"
            )
        return layer

    @property
    def num_classes(self) -> int:
        """Number of outputs of the classifier."""
        return self.classifier.out_features

    @property
    def has_bias(self) -> bool:
        """True where the classifier has a bias."""
        bias: nn.Parameter | None = self.classifier.bias
        return bias is not None

    def has_compatible_head(self, num_classes: int) -> bool:
        """Return whether the classifier is usable for a problem of this many classes."""
        return not self.head_excluded and self.num_classes == num_classes

    def logits(self, features: Tensor) -> Tensor:
        """Return the classifier's logits (N, C) for pooled features (N, D), in float64."""
        layer = self.classifier
        scores = features.double() @ layer.weight.detach().cpu().double().T
        return scores if layer.bias is None else scores + layer.bias.detach().cpu().double()

    def forward_batch(self, batch: Any, max_images: int) -> Any:
        """Run the network on the first images of a batch, on its own device, and return its output.

        Raises:
            InputTypeError: Images of a dtype that the network fails on.
        """
        images = get_inputs(batch)[:max_images].to(device_of(self.module) or "cpu")
        return call_model(self.module, images if self.transform is None else self.transform(images))


def classifier_model(
    module: nn.Module,
    name: str,
    head: str | None = None,
    transform: Transform | None = None,
    option: str = "head= or peer_heads=",
) -> ClassifierModel:
    """Locate the classifier of a network: the named layer, timm's `get_classifier()`, or the last linear layer.

    Args:
        module: Network.
        name: Name of the network in reports and messages.
        head: Name of the classifier. None: search for it.
        transform: Function from the loader's images to the network's inputs.
        option: The caller's argument that names the classifier, for messages.

    Raises:
        InputTypeError: Not a module.
        LayerNameError: No layer of this name, or no linear layer at all.
        LayoutError: The classifier is not a Linear.

    Examples:
        >>> classifier_model(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), "small").head
        '1'
    """
    layers = named_layers(unwrap_model(module))
    if head is None:
        get_classifier = getattr(unwrap_model(module), "get_classifier", None)
        timm_classifier = get_classifier() if callable(get_classifier) else None
        head = next((key for key, layer in layers.items() if layer is timm_classifier), None)
    if head is None:
        head = next((key for key, layer in reversed(layers.items()) if isinstance(layer, nn.Linear)), None)
    if head is None or head not in layers:
        problem = "no linear layer that could be its classifier" if head is None else f"no layer {head!r}"
        raise LayerNameError(f"{name} has {problem}; name it with {option}")
    model = ClassifierModel(module, head, name, transform)
    _ = model.classifier  # raises where the layer is not linear
    return model


def classifier_models(
    model: nn.Module,
    peers: nn.Module | Iterable[nn.Module],
    head: str | None,
    peer_heads: Sequence[str | None] | None,
    transform: Transform | None,
    peer_transforms: Transform | Sequence[Transform | None] | None,
    names: Sequence[str] | None,
) -> list[ClassifierModel]:
    """Locate the classifiers of the network and of its peers; the arguments are those of `refine`.

    Returns:
        First the network to refine, then its peers.

    Raises:
        InputTypeError: No peers, options of another length than the peers, or equal names.
        OptionError: The network as its own peer.
        LayerNameError, LayoutError: As `classifier_model`.
    """
    modules = [peers] if isinstance(peers, nn.Module) and not isinstance(peers, nn.ModuleList) else list(peers)
    if not modules:
        raise InputTypeError(
            "expected at least one peer: a network that was trained on the same kind of images "
            "(another seed, another architecture)"
        )
    if any(unwrap_model(peer) is unwrap_model(model) for peer in modules):
        raise OptionError(
            "expected peers other than the network, got the network itself, which confirms all of its features; pass a "
            "network of another seed, architecture or version"
        )
    per_peer = peer_transforms if callable(peer_transforms) else None
    transforms = [per_peer] * len(modules) if callable(peer_transforms) or peer_transforms is None else peer_transforms
    heads = [None] * len(modules) if peer_heads is None else peer_heads
    for option, values in (("peer_heads", heads), ("peer_transforms", transforms)):
        if len(values) != len(modules):
            raise InputTypeError(f"{option} needs one item for each of {len(modules)} peers, got {len(values)}")
    if names is None:
        names = ["network", *(f"peer {i}" for i in range(len(modules)))]
    if len(names) != 1 + len(modules):
        raise InputTypeError(
            f"names needs one for the network and one for each of {len(modules)} peers, got {len(names)}"
        )
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate is not None:
        raise InputTypeError(f"names must differ, but {duplicate!r} occurs {names.count(duplicate)} times")
    return [
        classifier_model(model, names[0], head, transform),
        *(classifier_model(m, n, h, t) for m, n, h, t in zip(modules, names[1:], heads, transforms, strict=True)),
    ]


@torch.no_grad()
def pooled_layer(model: ClassifierModel, batch: Any) -> str:
    """Find the name of the first layer whose output is the classifier's input; `global_pool` where it exists.

    Args:
        model: Network in eval mode.
        batch: Batch of images.

    Raises:
        OptionError: No such layer, since the network's own `forward` pools.

    Examples:
        >>> small = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> pooled_layer(classifier_model(small, "small"), torch.rand(2, 3, 8, 8))
        '2'
    """
    layers = named_layers(unwrap_model(model.module))
    if TIMM_POOL_NAME in layers:
        return TIMM_POOL_NAME
    matches: list[str] = []

    def match_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The same memory, not equal values: the layer's output reached the classifier unchanged
        x = call_input(args, kwargs)
        matches.extend(
            name
            for name, outputs in outputs_by_layer.items()
            for y in outputs
            if isinstance(y, Tensor) and y.shape == x.shape and y.data_ptr() == x.data_ptr()
        )

    handle = model.classifier.register_forward_pre_hook(match_input, with_kwargs=True)
    with remove_afterwards([handle]), record_outputs(layers) as outputs_by_layer:
        model.forward_batch(batch, POOL_PROBE_IMAGES)
    if not matches:
        raise OptionError(
            f"{model.name} has no layer whose output is the input of its classifier {model.head!r}; name the layers "
            "to compare with RefineFinetuneConfig(layers=[...], peer_layers=...)"
        )
    return matches[0]


@dataclass(frozen=True)
class PooledFeatures:
    """Pooled features of every network on the same images.

    Attributes:
        features: (N, D_i) float32 on the CPU, one tensor per network.
        labels: (N,). None: the labels were not read.
    """

    features: tuple[Tensor, ...]
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.features[0])

    def select(self, networks: Sequence[int]) -> tuple[Tensor, ...]:
        """Return the features of some networks, by their indices."""
        return tuple(self.features[i] for i in networks)

    def require_labels(self) -> Tensor:
        """Return the labels (N,).

        Raises:
            DataError: The labels were not read.
        """
        if self.labels is None:
            raise DataError("expected labeled images, got images without labels")
        return self.labels

    def check_classes(self, num_classes: int, what: str) -> None:
        """Check that the network has an output for every label.

        Args:
            num_classes: Number of its classes.
            what: Kind of the images, for messages.

        Raises:
            ShapeError: A label at or above this number.
            DataError: The labels were not read.
        """
        highest = int(self.require_labels().max())
        if highest >= num_classes:
            raise ShapeError(
                f"{what} images have labels up to {highest}, but the network has {num_classes} classes; "
                "give it a classifier for these classes first (timm: model.reset_classifier(classes))"
            )

    def exclude(self, others: PooledFeatures) -> PooledFeatures:
        """Drop the images that are also among others, by the features of the first network.

        Features of one image differ between two batches by rounding alone.

        Args:
            others: Images to drop.

        Examples:
            >>> x = torch.randn(10, 4)
            >>> len(PooledFeatures((x,), None).exclude(PooledFeatures((x[3:5],), None)))
            8
        """
        rows, other_rows = self.features[0].double(), others.features[0].double()
        # Equal rows have equal projections on a random line, so each row is compared with its two neighbors there
        line = torch.randn(rows.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        order = (other_rows @ line).argsort()
        rank = torch.searchsorted((other_rows @ line)[order], rows @ line)
        neighbors = [order[position.clamp(0, len(other_rows) - 1)] for position in (rank - 1, rank)]
        distance = torch.stack([(rows - other_rows[index]).norm(dim=1) for index in neighbors]).amin(0)
        mask = distance > MAX_BATCH_DEPENDENCE * torch.cat([rows, other_rows]).std(0).norm().clamp_min(1e-12)
        labels = None if self.labels is None else self.labels[mask]
        return PooledFeatures(tuple(feature[mask] for feature in self.features), labels)


def extract_pooled_features(
    models: Sequence[ClassifierModel],
    loader: Iterable[Any],
    *,
    labels: bool,
    max_images: int | None = None,
    progress: bool = False,
    what: str = "images",
) -> PooledFeatures:
    """Collect the input of every network's classifier in one pass over the images.

    Args:
        models: Networks in eval mode.
        loader: Batches of images. Labels are the second item, or an entry "label", "target" or the like.
        labels: Read the labels too.
        max_images: Maximal number of images to read. None: all.
        progress: Show a progress bar.
        what: Kind of the images, for messages.

    Raises:
        DataError: No images, or no labels where they are needed.
        ShapeError: The input of a classifier is not one vector per image.
    """
    feature_batches: list[list[Tensor]] = [[] for _ in models]
    label_batches: list[Tensor] = []
    num_images = 0
    with ExitStack() as stack:
        extractors = [
            stack.enter_context(Extractor(m.module, [m.head], name=m.name, at="input", transform=m.transform))
            for m in models
        ]
        for batch in tqdm(loader, desc=what, unit="batch", disable=not progress):
            count = batch_size(batch) if max_images is None else min(batch_size(batch), max_images - num_images)
            if count <= 0:
                break
            for features, extractor, model in zip(feature_batches, extractors, models, strict=True):
                feature = extractor.run(batch)[model.head]
                if feature.shape[2:] != (1, 1):
                    raise ShapeError(
                        f"{model.name}: the input of {model.head!r} has positions {tuple(feature.shape[2:])}; "
                        "expected one pooled vector per image"
                    )
                features.append(feature[:count, :, 0, 0].float().cpu())
            if labels:
                label_batches.append(labels_of(batch, what)[:count].cpu())
            num_images += count
    if not num_images:
        raise DataError(f"the loader of {what} gave no images")
    return PooledFeatures(
        tuple(torch.cat(features) for features in feature_batches), torch.cat(label_batches) if labels else None
    )


def flag_unusable_heads(models: Sequence[ClassifierModel], batch: Any) -> list[ClassifierModel]:
    """Set `head_excluded` of the peers whose output is not the output of their classifier.

    Args:
        models: Networks in eval mode, first the one to refine.
        batch: Batch of images.

    Raises:
        LayoutError: The network to refine is of this kind, such as one with two classifiers.
    """
    flagged = [
        replace(model, head_excluded=model.head_excluded or not _outputs_its_head(model, batch)) for model in models
    ]
    if flagged[0].head_excluded:
        raise LayoutError(
            f"{flagged[0].name}: the network's output is not the output of its classifier {flagged[0].head!r} (another "
            "classifier beside it, or a step after it). Name the right layer with head=, or refine a network with one "
            "classifier"
        )
    return flagged


def flag_mismatched_classes(
    models: Sequence[ClassifierModel], pooled: PooledFeatures
) -> tuple[list[ClassifierModel], list[str]]:
    """Set `head_excluded` of the peers whose classes are not those of the network.

    Equal numbers of classes need not mean equal classes. Let C[i, j] count the images that the network assigns to
    class i and the peer to class j. The agreement trace(C) / N is compared with the agreement after the best renaming
    of the peer's classes, bounded by Σ_i max_j C[i, j] / N.

    Args:
        models: First the network to refine, then its peers.
        pooled: Features of all of them. Labels are not read.

    Returns:
        Flagged networks, and a note on each newly excluded classifier.

    Examples:
        >>> names = ("own", "same", "turned")
        >>> models = [classifier_model(nn.Sequential(nn.Linear(3, 3, bias=False)), name) for name in names]
        >>> for model, order in zip(models, ([0, 1, 2], [0, 1, 2], [1, 2, 0])):
        ...     model.classifier.weight.data = torch.eye(3)[order]
        >>> x = torch.randn(90, 3)
        >>> [model.head_excluded for model in flag_mismatched_classes(models, PooledFeatures((x, x, x), None))[0]]
        [False, False, True]
    """
    model, flagged, notes = models[0], [models[0]], []
    num_classes = model.num_classes
    predictions = model.logits(pooled.features[0]).argmax(1)
    for peer, features in zip(models[1:], pooled.features[1:], strict=True):
        if peer.has_compatible_head(num_classes):
            peer_predictions = peer.logits(features).argmax(1)
            confusion = torch.zeros(num_classes, num_classes).index_put_(
                (predictions, peer_predictions), torch.ones(len(predictions)), accumulate=True
            )
            agreement = float(confusion.diagonal().sum()) / len(predictions)
            renamed_agreement = float(confusion.amax(1).sum()) / len(predictions)
            if agreement < MIN_AGREEMENT_RATIO * renamed_agreement:
                peer = replace(peer, head_excluded=True)
                notes.append(
                    f"{peer.name} has {peer.num_classes} classes as {model.name}, but agrees with it on "
                    f"{100 * agreement:.1f} % of the images, and on up to {100 * renamed_agreement:.1f} % after "
                    "renaming its classes: they seem to be others, and its classifier is not used"
                )
        flagged.append(peer)
    return flagged, notes


@torch.no_grad()
def _outputs_its_head(model: ClassifierModel, batch: Any) -> bool:
    with record_outputs({model.head: model.classifier}) as outputs:
        try:
            output = find_logits(model.forward_batch(batch, HEAD_PROBE_IMAGES))
        except ShapeError:
            return False
    head_outputs = outputs.get(model.head, [])
    if len(head_outputs) != 1 or output.shape != head_outputs[0].shape:
        return False
    scale = head_outputs[0].abs().max().clamp_min(1e-12)
    return float((output - head_outputs[0]).abs().max()) <= MAX_HEAD_DIFFERENCE * float(scale)
