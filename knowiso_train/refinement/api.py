"""Refinement of a network by the features that peers reproduce."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from knowiso_train.errors import DataError, KnowisoWarning, OptionError
from knowiso_train.features.state import device_of, on_device, preserve_state
from knowiso_train.refinement.candidate_search import check_needs, closed_forms
from knowiso_train.refinement.candidates import heads_of_peers, replace_classifier
from knowiso_train.refinement.composite import paper_composite
from knowiso_train.refinement.evaluator import CandidateEvaluator, FeatureSets, explained_by_peers
from knowiso_train.refinement.finetune import (
    RefineFinetuneConfig,
    finetune_classifier,
    finetune_schedules,
    resolve_consensus_layers,
)
from knowiso_train.refinement.heads import HeadConfig
from knowiso_train.refinement.metrics import significantly_less
from knowiso_train.refinement.models import (
    classifier_models,
    extract_pooled_features,
    flag_mismatched_classes,
    flag_unusable_heads,
)
from knowiso_train.refinement.peers import score_peer
from knowiso_train.refinement.report import RefineReport, RefineResult
from knowiso_train.utils.batch import subsample_loader
from knowiso_train.utils.environment import library_versions

METHODS = ("auto", "fold", "head", "consensus", "paper")
Transform = Callable[[Any], Any]


def refine(
    model: nn.Module,
    peers: nn.Module | Iterable[nn.Module],
    loader: Iterable[Any],
    *,
    method: str = "auto",
    labeled: Iterable[Any] | None = None,
    validation: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    head: str | None = None,
    peer_heads: Sequence[str | None] | None = None,
    transform: Transform | None = None,
    peer_transforms: Transform | Sequence[Transform | None] | None = None,
    ridge: float | str = "search",
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
    """Refine a network by what its peers know too. The result is a plain network of the same architecture; peers are not needed afterwards.

    Every peer is judged first, without labels: one that knows nothing of the network (untrained, another task) is left
    out with a warning. A peer
    that tells as many classes apart, but other ones, is not asked for its guesses.

    Of several processes each does all of this by itself: call it in one of them, with the whole loader, as
    `recipes/refine.py` does.

    Args:
        model: the network; never modified.
        peers: one or several: other seeds, other architectures, older versions; trained on the same kind of images, for
            whatever task.
        loader: images; labels in it are not read. Some hundred at least, thousands are better. Read once, or as often
            as training needs.
        method: "fold": the classifier absorbs the map own → peers → own (no labels, no training, exact);
            "head": the classifier is fitted in closed form to the labels and to what all networks together make of the
            other images
            (`consensus_head`; needs `labeled`), or to the labels alone, where `validation`, or labeled images left
            out in turn, say that the
            guesses mislead. For networks trained for another task and few labels of the new one: it replaces the
            classifier,
            and a classifier that was trained together with its network is better left (a warning says so where that is
            seen);
            "consensus": fine-tuning of the whole network towards what the peers reproduce, on `loader`, and `labeled`
            where given. It starts from
            the best of the classifiers that "head" tries and the network's own;
            "auto": what the arguments allow of these, fine-tuning only with `finetune_config=`; the best on `validation` is
            kept, the original included.
            With labels it fine-tunes twice, towards the consensus and on the labels alone: where guesses mislead, the
            latter is better;
            "paper": the network's layer rebuilt from a peer's (arXiv 1908.01581): a composite of two networks, for
            study.
        labeled: batches with labels, few are enough. They may be in `loader` too.
        validation: batches with labels, to choose and calibrate on; needed by "auto". They also say how frequent the
            classes are, unless `head_config`
            does: guesses on the other images are tried as they are and in these proportions.
        test: batches with labels that nothing is chosen on, for the report.
        head: name of the classifier, a Linear; None takes timm's, or the last one.
        peer_heads: of each peer.
        transform: applied to the images before the network (resolution, normalization).
        peer_transforms: one for all peers, or one for each.
        ridge: of "fold": relative, or "search" on held-out images.
        head_config: settings of "head".
        finetune_config: settings of "consensus" and of training in "paper"; in "auto" it also says that there is time to
            train.
        layer: for "paper": layer of the network that is rebuilt.
        peer_layer: of the (first useful) peer; None takes the same name.
        order: K of the maps for "paper".
        max_order: highest order that "paper" hands on; None takes all.
        min_explained: share of the network's features, above the noise floor, that a useful peer explains.
        keep_all_peers: use peers that were found useless.
        max_images: most unlabeled images for what is done in closed form: their pooled features lie in memory. A
            DataLoader over a map-style dataset
            that does not shuffle is read at random places; of any other loader the first images are taken.
        seed: of every split, and of the training unless `finetune_config` says.
        device: run the networks there, and bring them back; None leaves each where it is.
        names: of the network and of each peer, for the report.
        progress: show progress bars.

    Returns:
        `.model`, `.report` (print it, `.to_json(path)`), `.save(folder)`.

    Raises:
        OptionError: an option without meaning, a method whose images are missing, or no useful peer for "consensus" and
            "paper".
        LayoutError: the network's output is not what one classifier makes of its features.
        DataError: too few images, or images without labels where these are needed.
        KnowisoError: as its subclasses say; modes, `requires_grad`, devices and random state are as before, also then.

    Source: arXiv 1908.01581; DESIGN §1.4.

    Example:
        >>> signal, labels = torch.randn(400, 2), torch.arange(400) % 2
        >>> signal[:, 0] = labels * 4.0 - 2
        >>> images = torch.cat([signal, torch.randn(400, 2 * 8)], 1)  # both networks extract_pooled_features the signal, each has noise of its own
        >>> model, peer = (nn.Sequential(nn.Linear(18, 10), nn.Linear(10, 2)) for _ in range(2))
        >>> with torch.no_grad():
        ...     for i, network in enumerate((model, peer)):
        ...         _ = network[0].weight.copy_(torch.eye(18)[[0, 1, *range(2 + 8 * i, 10 + 8 * i)]])
        >>> batches = [(images[i : i + 50], labels[i : i + 50]) for i in range(0, 400, 50)]
        >>> refined = refine(model, peer, batches[2:], labeled=batches[:1], validation=batches[1:2], progress=False)
        >>> refined.report.row("after").validation.accuracy > 90
        True
    """
    if method not in METHODS:
        raise OptionError(f"method must be one of {METHODS}, got {method!r}")
    began, home = time.perf_counter(), device_of(model)
    networks = classifier_models(model, peers, head, peer_heads, transform, peer_transforms, names)
    check_needs(method, networks[0], layer, labeled=labeled, validation=validation, test=test)
    tuning, closed = finetune_config or RefineFinetuneConfig(seed=seed), head_config or HeadConfig()
    trains = method == "consensus" or (method == "auto" and finetune_config is not None)
    noted: list[str] = []

    def tell(notes: Sequence[str]) -> None:
        noted.extend(notes)
        for note in notes:
            warnings.warn(note, KnowisoWarning, stacklevel=3)

    with ExitStack() as stack:
        models = [net.model for net in networks]
        stack.enter_context(preserve_state(*models))
        stack.enter_context(on_device(device, *models))
        some = subsample_loader(loader, max_images, seed)
        first = next(iter(some), None)
        if first is None:
            raise DataError("the loader of unlabeled images gave no images")
        networks = flag_unusable_heads(networks, first)
        if trains:
            # What it lacks is said before the work, not after
            resolve_consensus_layers(tuning, networks[0], networks[1:], first)
        images = FeatureSets.read(networks, some, labeled, validation, test, max_images, progress)
        own = images.unlabeled.features[0]
        judged = [
            score_peer(own, images.unlabeled.features[i], net.name, min_explained=min_explained, seed=seed)
            for i, net in enumerate(networks[1:], 1)
        ]
        useful = [i for i, found in enumerate(judged, 1) if found.useful or keep_all_peers]
        networks, others = flag_mismatched_classes(networks, images.unlabeled)
        tell([f"{found.name} {found.reason}" for found in judged if not found.useful])
        tell(others if labeled is None else [])  # with labels all of them get classifiers of the same classes
        if not useful and method in ("consensus", "paper"):
            raise OptionError(
                f'no useful peer is left for method="{method}"; keep_all_peers=True would use one all the same'
            )
        board = CandidateEvaluator(networks, images)
        shares: dict[str, tuple[float, float | None]] = {}
        if useful:
            shares[networks[0].head + " (input)"] = (explained_by_peers(images.unlabeled, useful, seed), None)

        chosen: nn.Module
        classifiers: dict[str, nn.Linear] = {}
        if method == "paper":
            peer = networks[useful[0]]
            chosen = paper_composite(
                networks[0], peer, loader, () if labeled is None else labeled, str(layer), peer_layer or str(layer),
                order=order, max_order=order if max_order is None else max_order, steps=tuning.steps, lr=tuning.lr,
                seed=seed, max_images=max_images, progress=progress,
            )  # fmt: skip
            name = f"composite with {peer.name}"
            board.whole(name, "after", chosen, validation, test)
        else:
            found, notes = closed_forms(method, networks, useful, images, ridge, closed, seed)
            tell(notes)
            board.candidates(found[1:] if method == "auto" else found)
            best = board.best(found) if validation is not None else found[-1]
            name, chosen = best.name, replace_classifier(model, networks[0].head, best)
            few, told = images.labeled, None
            if few is not None and useful and method != "fold":
                told = heads_of_peers(
                    networks, few, images.others, useful, best.recipe or closed, images.validation, best.alone
                )
                classifiers = {networks[i].name: told[place] for place, i in enumerate(useful)}
            if trains:
                start = chosen
                fellows, highest = [networks[i] for i in useful], board.accuracy(best)
                for towards, settings in finetune_schedules(method, tuning, labels=few is not None, peers=bool(useful)):
                    tuned = finetune_classifier(
                        start, networks[0], fellows, loader, labeled, settings, heads=told, progress=progress
                    )
                    called = f"{best.name}, fine-tuned to {towards}"
                    again = board.whole(called, "candidate", tuned, validation, test)
                    if method == "consensus" or again > highest:
                        name, chosen, highest = called, tuned, again
                before, after = board.validation(best), board.row(name).validation
                if before is not None and after is not None and significantly_less(after, before):
                    fell = (
                        f"fine-tuning took the validation images from {before.accuracy:.1f} % to {after.accuracy:.1f} %"
                    )
                    tell([f'{fell}; method="auto" would have kept what it started from'])
                if useful and chosen is not start:
                    seen = extract_pooled_features(
                        [replace(networks[0], model=chosen), *networks[1:]],
                        some,
                        labels=False,
                        max_images=max_images,
                        what="unlabeled",
                    )
                    shares = {
                        key: (known, explained_by_peers(seen, useful, seed)) for key, (known, _) in shares.items()
                    }
            board.after(name)
        board.peers(useful)
    report = RefineReport(
        network=networks[0].name,
        method=method,
        chosen=name,
        rows=tuple(board.rows),
        peers=tuple(judged),
        explained=shares,
        num_images=images.counts(),
        settings={
            "seed": seed,
            "ridge": ridge,
            "min_explained": min_explained,
            "head_config": closed.to_dict(),
            "finetune_config": tuning.to_dict(),
        },
        seconds=time.perf_counter() - began,
        versions=library_versions(),
        warnings=tuple(noted),
    )
    return RefineResult(
        chosen if home is None else chosen.to(home), report, plain=method != "paper", peer_classifiers=classifiers
    )
