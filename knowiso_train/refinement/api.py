"""Refinement of a classifier by the features that its peers reproduce."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import torch
from torch import nn

from knowiso_train.errors import DataError, KnowisoWarning, OptionError
from knowiso_train.features.state import check_materialized, checked_device, device_of, on_device, preserve_state
from knowiso_train.refinement._candidate_search import CandidateSearch, closed_form_candidates
from knowiso_train.refinement._candidates import Candidate, heads_of_peers, replace_classifier
from knowiso_train.refinement._composite import paper_composite
from knowiso_train.refinement._evaluator import CandidateEvaluator, FeatureSets, explained_by_peers
from knowiso_train.refinement._metrics import significantly_less
from knowiso_train.refinement.config import RefineConfig, RefineFinetuneConfig, RefineMethod, RidgeOption
from knowiso_train.refinement.finetune import (
    finetune_classifier,
    finetune_schedules,
    resolve_consensus_layers,
)
from knowiso_train.refinement.heads import HeadConfig
from knowiso_train.refinement.models import (
    ClassifierModel,
    Transform,
    classifier_models,
    extract_pooled_features,
    flag_mismatched_classes,
    flag_unusable_heads,
)
from knowiso_train.refinement.peers import PeerScore, score_peer
from knowiso_train.refinement.report import RefineReport, RefineResult
from knowiso_train.utils.batch import subsample_loader
from knowiso_train.utils.environment import library_versions
from knowiso_train.utils.validation import validate_arguments


@validate_arguments
def refine(
    model: nn.Module,
    peers: nn.Module | Iterable[nn.Module],
    loader: Iterable[Any],
    *,
    method: RefineMethod = "auto",
    labeled: Iterable[Any] | None = None,
    validation: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    head: str | None = None,
    peer_heads: Sequence[str | None] | None = None,
    transform: Transform | None = None,
    peer_transforms: Transform | Sequence[Transform | None] | None = None,
    ridge: RidgeOption = "search",
    head_config: HeadConfig | None = None,
    finetune_config: RefineFinetuneConfig | None = None,
    layer: str | None = None,
    peer_layer: str | None = None,
    order: int = 0,
    max_order: int | None = None,
    min_explained: float = 0.2,
    keep_all_peers: bool = False,
    max_images: int | None = 20_000,
    seed: int = 0,
    device: torch.device | str | None = None,
    names: Sequence[str] | None = None,
    progress: bool = True,
) -> RefineResult:
    """Refine a classifier by the features that its peers reproduce.

    The result is a plain network of the same architecture; the peers are not needed afterwards. Peers are scored first,
    without labels: one whose features predict nothing of the network's (untrained, another task) is left out with a
    warning. A peer with other classes does not contribute predictions.

    Each of several processes would do all of the work. Call the function in one of them, with the whole loader, as
    `recipes/refine.py` does.

    Args:
        model: Network to refine. It is not modified. Fine-tuning keeps its frozen layers, except for the classifier.
        peers: One or several networks: other seeds, other architectures, older versions. They were trained on the same
            kind of images, for any task.
        loader: Images; labels are not read. Some hundred at least, thousands are better. It is read once, and
            repeatedly for fine-tuning.
        method: "fold": fold the map network → peers → network into the classifier (no labels, no training, exact).
            "head": fit the classifier in closed form to the labels and to pseudo-labels of all networks together
            (`consensus_head`), or to the labels alone where pseudo-labels mislead. It is for networks that were trained
            for another task; a warning says where the present classifier is better.
            "consensus": fine-tune the whole network towards the features and predictions that the peers confirm, from
            the best classifier of "head" and the present one.
            "auto": try all of these that the arguments allow, fine-tuning only with `finetune_config`, and keep the
            best on `validation`, the original included. With labels it fine-tunes twice: towards the consensus, and on
            the labels alone.
            "paper": rebuild a layer from a peer's layer (arXiv 1908.01581), a composite of two networks, for study.
        labeled: Batches with labels, not for "fold". Few are enough; the images may be in `loader` too.
        validation: Batches with labels to choose and calibrate on, not of the images in `labeled`; required by "auto".
            Their class frequencies are tried as the prior of pseudo-labels, unless `head_config` gives one.
        test: Batches with labels for the report alone.
        head: Name of the classifier, a Linear. None: timm's classifier, or the last Linear.
        peer_heads: Name of each peer's classifier.
        transform: Transform of the images for the network (resolution, normalization).
        peer_transforms: Transform for all peers, or one per peer.
        ridge: Relative ridge of "fold", or "search" on held-out images.
        head_config: Settings of the consensus head.
        finetune_config: Settings of fine-tuning in "consensus", "auto" and "paper". None: defaults, and no fine-tuning
            in "auto".
        layer: Layer to rebuild, for "paper".
        peer_layer: Layer of the first useful peer, for "paper". None: the same name.
        order: Order K of the maps, for "paper".
        max_order: Highest order that "paper" uses. None: `order`.
        min_explained: R² of the network's features above the noise floor that a useful peer reaches.
        keep_all_peers: Use peers that are not useful, too.
        max_images: Maximum number of unlabeled images of the closed forms, whose pooled features are kept in memory.
            They are drawn at random from a DataLoader over a map-style dataset that does not shuffle. Of any other
            loader they are the first images. None: all.
        seed: Seed of every split, and of fine-tuning without `finetune_config`.
        device: Device to run on; the networks are brought back afterwards. None: where they are.
        names: Name of the network and of each peer, for the report.
        progress: Show progress bars.

    Returns:
        Result with `.model`, `.report` (print it, or `.to_json(path)`) and `.save(folder)`.

    Raises:
        OptionError: An option out of bounds, a method without the images that it needs or with options of another
            method, the network as its own peer, or no useful peer for "consensus" and "paper".
        LayoutError: The network's output is not the output of one classifier.
        DataError: Too few images, or images without labels where these are needed.
        KnowisoError: See its subclasses. Modes, `requires_grad`, devices and random state are restored also then.

    References:
        Liang et al., arXiv 1908.01581.

    Examples:
        >>> signal, labels = torch.randn(400, 2), torch.arange(400) % 2
        >>> signal[:, 0] = labels * 4.0 - 2
        >>> images = torch.cat([signal, torch.randn(400, 16)], 1)  # the signal, and 8 channels of noise per network
        >>> model, peer = (nn.Sequential(nn.Linear(18, 10), nn.Linear(10, 2)) for _ in range(2))
        >>> with torch.no_grad():
        ...     for i, network in enumerate((model, peer)):
        ...         _ = network[0].weight.copy_(torch.eye(18)[[0, 1, *range(2 + 8 * i, 10 + 8 * i)]])
        >>> batches = [(images[i : i + 50], labels[i : i + 50]) for i in range(0, 400, 50)]
        >>> refined = refine(model, peer, batches[2:], labeled=batches[:1], validation=batches[1:2], progress=False)
        >>> refined.report.row("after").validation.accuracy > 90
        True
    """
    config = RefineConfig(
        method=method,
        labeled=labeled,
        validation=validation,
        test=test,
        head=head,
        peer_heads=peer_heads,
        transform=transform,
        peer_transforms=peer_transforms,
        ridge=ridge,
        head_config=HeadConfig() if head_config is None else head_config,
        finetune_config=finetune_config,
        layer=layer,
        peer_layer=peer_layer,
        order=order,
        max_order=max_order,
        min_explained=min_explained,
        keep_all_peers=keep_all_peers,
        max_images=max_images,
        seed=seed,
        device=device,
        names=names,
        progress=progress,
    )
    return run_refinement(model, peers, loader, config)


def run_refinement(
    model: nn.Module, peers: nn.Module | Iterable[nn.Module], loader: Iterable[Any], config: RefineConfig
) -> RefineResult:
    """Run `refine` with the options of a config."""
    start, device = time.perf_counter(), device_of(model)
    models = classifier_models(
        model, peers, config.head, config.peer_heads, config.transform, config.peer_transforms, config.names
    )
    config.check_bias(models[0])
    config.check_trainable(models[0])
    notes = NoteLog()
    notes.add(config.notes)
    with ExitStack() as stack:
        modules = [model.module for model in models]
        check_materialized(*modules)
        checked_device(config.device, *modules)  # initializes CUDA, whose random state is then restored too
        stack.enter_context(preserve_state(*modules))
        stack.enter_context(on_device(config.device, *modules))
        sample = subsample_loader(loader, config.max_images, config.seed)
        models, images = prepare_features(models, sample, config)
        notes.add(images.overlap_notes())
        selection = select_peers(models, images, config, notes)
        run = RefinementRun(config, loader, sample, images, selection, notes)
        outcome = refine_by_composite(run) if config.method == "paper" else refine_by_candidates(run)
        run.evaluator.add_peers(selection.useful)
    report = RefineReport(
        network=models[0].name,
        method=config.method,
        chosen=outcome.name,
        rows=tuple(run.evaluator.rows),
        peers=tuple(selection.scores),
        explained=outcome.explained,
        num_images=images.counts(),
        settings=config.to_dict(),
        seconds=time.perf_counter() - start,
        versions=library_versions(),
        warnings=tuple(notes.texts),
    )
    module = outcome.module if device is None else outcome.module.to(device)
    return RefineResult(module, report, plain=config.method != "paper", peer_classifiers=outcome.peer_classifiers)


@dataclass
class NoteLog:
    """Remarks for the user, each also issued as a warning."""

    texts: list[str] = field(default_factory=list)

    def add(self, texts: Sequence[str]) -> None:
        """Issue and keep some remarks."""
        # The warning points to the caller of the package
        frame: FrameType | None = sys._getframe()
        level = 0
        while frame is not None and frame.f_globals.get("__name__", "").startswith("knowiso_train"):
            frame, level = frame.f_back, level + 1
        for text in texts:
            self.texts.append(text)
            warnings.warn(text, KnowisoWarning, stacklevel=level + 1)


@dataclass(frozen=True)
class PeerSelection:
    """Scored peers.

    Attributes:
        models: First the network to refine, then all peers, with unusable classifiers flagged.
        scores: Score of each peer.
        useful: Indices of the useful peers in `models`.
    """

    models: Sequence[ClassifierModel]
    scores: Sequence[PeerScore]
    useful: Sequence[int]


@dataclass(frozen=True)
class Outcome:
    """Chosen network of a refinement.

    Attributes:
        name: Name of the chosen candidate.
        module: Network.
        explained: By layer, R² of the network's features predicted from the useful peers', before and after.
        peer_classifiers: By name of the useful peers, their fitted classifiers.
    """

    name: str
    module: nn.Module
    explained: dict[str, tuple[float, float | None]]
    peer_classifiers: dict[str, nn.Linear] = field(default_factory=dict)


class RefinementRun:
    """Inputs and intermediate results that the stages of a refinement share.

    Args:
        config: Options.
        loader: Unlabeled images.
        sample: Those of them that the closed forms use.
        images: Pooled features of all networks.
        selection: Scored peers.
        notes: Remarks for the user.
    """

    def __init__(
        self,
        config: RefineConfig,
        loader: Iterable[Any],
        sample: Iterable[Any],
        images: FeatureSets,
        selection: PeerSelection,
        notes: NoteLog,
    ) -> None:
        self.config, self.loader, self.sample, self.images, self.notes = config, loader, sample, images, notes
        self.models, self.useful = selection.models, selection.useful
        self.evaluator = CandidateEvaluator(self.models, images)

    @property
    def model(self) -> ClassifierModel:
        """Network to refine."""
        return self.models[0]

    @property
    def useful_peers(self) -> list[ClassifierModel]:
        """Useful peers."""
        return [self.models[i] for i in self.useful]

    def explained(self, module: nn.Module | None = None) -> dict[str, tuple[float, float | None]]:
        """Compute R² of the pooled features, predicted from the useful peers', before and after a fine-tuning.

        Args:
            module: Fine-tuned network. None: the features did not change.
        """
        if not self.useful:
            return {}
        before = explained_by_peers(self.images.unlabeled, self.useful, self.config.seed)
        after = None
        if module is not None:
            models = [replace(self.model, module=module), *self.models[1:]]
            pooled = extract_pooled_features(
                models, self.sample, labels=False, max_images=self.config.max_images, what="unlabeled"
            )
            after = explained_by_peers(pooled, self.useful, self.config.seed)
        return {f"{self.model.head} (input)": (before, after)}


def prepare_features(
    models: Sequence[ClassifierModel], sample: Iterable[Any], config: RefineConfig
) -> tuple[list[ClassifierModel], FeatureSets]:
    """Flag unusable classifiers, check the layers of a later fine-tuning, and extract pooled features.

    Args:
        models: First the network to refine, then its peers, in eval mode.
        sample: Unlabeled images.
        config: Options.

    Raises:
        DataError: No images.
        KnowisoError: As `refine`.
    """
    batch = next(iter(sample), None)
    if batch is None:
        raise DataError("the loader of unlabeled images gave no images")
    flagged = flag_unusable_heads(models, batch)
    if config.finetunes and config.finetuning.uses_peers:
        # Layers that cannot be compared are an error before the work, not after it
        resolve_consensus_layers(config.finetuning, flagged[0], flagged[1:], batch)
    images = FeatureSets.extract(
        flagged, sample, config.labeled, config.validation, config.test, config.max_images, config.progress
    )
    return flagged, images


def select_peers(
    models: Sequence[ClassifierModel], images: FeatureSets, config: RefineConfig, notes: NoteLog
) -> PeerSelection:
    """Score every peer without labels, and note those that are left out.

    Args:
        models: First the network to refine, then its peers.
        images: Pooled features of all of them.
        config: Options.
        notes: Remarks for the user.

    Raises:
        OptionError: No useful peer for a method that requires one.
        DataError: Too few images.
    """
    features = images.unlabeled.features
    scores = [
        score_peer(features[0], features[i], peer.name, min_explained=config.min_explained, seed=config.seed)
        for i, peer in enumerate(models[1:], 1)
    ]
    useful = [i for i, score in enumerate(scores, 1) if score.useful or config.keep_all_peers]
    flagged, class_notes = flag_mismatched_classes(models, images.unlabeled)
    notes.add([f"{score.name} {score.reason}" for score in scores if not score.useful])
    if config.labeled is None:
        # With labels every peer gets a classifier of the same classes
        notes.add(class_notes)
    if not useful and config.method in ("consensus", "paper"):
        raise OptionError(
            f'no useful peer is left for method="{config.method}"; keep_all_peers=True would use the others'
        )
    return PeerSelection(flagged, scores, useful)


def refine_by_composite(run: RefinementRun) -> Outcome:
    """Rebuild a layer of the network from the first useful peer's (method "paper")."""
    config, peer = run.config, run.useful_peers[0]
    layer = str(config.layer)
    composite = paper_composite(
        run.model,
        peer,
        run.loader,
        () if config.labeled is None else config.labeled,
        layer,
        config.peer_layer or layer,
        order=config.order,
        max_order=config.order if config.max_order is None else config.max_order,
        steps=config.finetuning.steps,
        lr=config.finetuning.lr,
        seed=config.seed,
        max_images=config.max_images,
        progress=config.progress,
    )
    name = f"composite with {peer.name}"
    run.evaluator.add_model(name, "after", composite, config.validation, config.test)
    return Outcome(name, composite, run.explained())


def refine_by_candidates(run: RefinementRun) -> Outcome:
    """Choose among closed-form classifiers, and fine-tune from the best one where the method does."""
    candidate = choose_candidate(run)
    teachers = fit_teachers(run, candidate)
    start = replace_classifier(run.model.module, run.model.head, candidate)
    name, module = candidate.name, start
    if run.config.finetunes:
        name, module = finetune_from(run, candidate, start, teachers)
    run.evaluator.add_result(name)
    peer_names = [peer.name for peer in run.useful_peers]
    return Outcome(
        name,
        module,
        run.explained(None if module is start else module),
        {peer_names[position]: layer for position, layer in (teachers or {}).items()},
    )


def choose_candidate(run: RefinementRun) -> Candidate:
    """Evaluate the closed-form candidates of the method and choose the best on the validation images."""
    config = run.config
    search = CandidateSearch(run.models, run.useful, run.images, config.ridge, config.head_config, config.seed)
    found = closed_form_candidates(config.method, search)
    run.notes.add(found.notes)
    run.evaluator.add_candidates(found.candidates)
    return found.default if config.validation is None else run.evaluator.best(found.candidates)


def fit_teachers(run: RefinementRun, candidate: Candidate) -> dict[int, nn.Linear] | None:
    """Fit a classifier to every useful peer, in the way of the chosen candidate. None: no labels to fit to."""
    if run.images.labeled is None or not run.useful or run.config.method == "fold":
        return None
    return heads_of_peers(
        run.models,
        run.images.labeled,
        run.images.unlabeled_only,
        run.useful,
        candidate.head_config or run.config.head_config,
        run.images.validation,
        candidate.from_labels_only,
    )


def finetune_from(
    run: RefinementRun, candidate: Candidate, start: nn.Module, teachers: dict[int, nn.Linear] | None
) -> tuple[str, nn.Module]:
    """Fine-tune the network by every schedule of the method.

    Args:
        run: Refinement.
        candidate: Classifier to start from.
        start: Network with this classifier.
        teachers: Classifiers of the useful peers. None: their own.

    Returns:
        Name and network of the best: with "auto" on the validation images, the start included; else the last one.
    """
    config, evaluator = run.config, run.evaluator
    name, module, highest = candidate.name, start, evaluator.validation_accuracy(candidate)
    has_labels = config.labeled is not None
    for target, settings in finetune_schedules(
        config.method, config.finetuning, labels=has_labels, peers=bool(run.useful)
    ):
        tuned = finetune_classifier(
            start,
            run.model,
            run.useful_peers,
            run.loader,
            config.labeled,
            settings,
            heads=teachers,
            progress=config.progress,
        )
        tuned_name = f"{candidate.name}, fine-tuned to {target}"
        accuracy = evaluator.add_model(tuned_name, "candidate", tuned, config.validation, config.test)
        if config.method == "consensus" or accuracy > highest:
            name, module, highest = tuned_name, tuned, accuracy
    before, after = evaluator.validation_score(candidate), evaluator.row(name).validation
    if before is not None and after is not None and significantly_less(after, before):
        run.notes.add(
            [
                f"fine-tuning took the validation images from {before.accuracy:.1f} % to {after.accuracy:.1f} %; "
                'method="auto" would have kept the start'
            ]
        )
    return name, module
