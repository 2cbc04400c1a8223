"""`refine`: a better plain network of the same architecture from its peers, or an honest report that there is none."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from knowiso_train.errors import KnowisoWarning, OptionError
from knowiso_train.features import on_device, undisturbed
from knowiso_train.measurement.versions import versions
from knowiso_train.refinement.board import Board, Images, check_needs, closed_forms, shared
from knowiso_train.refinement.candidates import heads_of_peers, with_classifier
from knowiso_train.refinement.composite import paper_composite
from knowiso_train.refinement.finetune import FineTuning, fine_tune, ways_to_train
from knowiso_train.refinement.head import HeadRecipe
from knowiso_train.refinement.networks import checked_networks, see
from knowiso_train.refinement.result import Refined, RefineReport
from knowiso_train.refinement.sampling import sampled
from knowiso_train.refinement.worth import worth

METHODS = ("auto", "fold", "head", "consensus", "paper")
Transform = Callable[[Any], Any]


def refine(
    model: nn.Module,
    peers: nn.Module | Sequence[nn.Module],
    loader: Iterable[Any],
    *,
    method: str = "auto",
    labelled: Iterable[Any] | None = None,
    validation: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    head: str | None = None,
    peer_heads: Sequence[str | None] | None = None,
    transform: Transform | None = None,
    peer_transforms: Transform | Sequence[Transform | None] | None = None,
    ridge: float | str = "search",
    recipe: HeadRecipe | None = None,
    training: FineTuning | None = None,
    layer: str | None = None,
    peer_layer: str | None = None,
    order: int = 0,
    orders: int | None = None,
    least: float = 0.2,
    keep_useless: bool = False,
    max_images: int | None = 20_000,
    seed: int = 0,
    device: torch.device | str | None = None,
    names: Sequence[str] | None = None,
    progress: bool = True,
) -> Refined:
    """Refine a network by what its peers know too. The result is a plain network of the same architecture; peers are not needed afterwards.

    Every peer is judged first, without labels: one that knows nothing of the network (untrained, another task) is left out with a warning.

    Args:
        model: the network; never modified.
        peers: other seeds, other architectures, older versions; trained on the same kind of images, for whatever task.
        loader: images; labels in it are not read. Some hundred at least, thousands are better. Read once, or as often as training needs.
        method: "fold": the classifier absorbs the map own → peers → own (no labels, no training, exact);
            "head": the classifier is fitted in closed form to the labels and to what all networks together make of the other images
            (`consensus_head`; needs `labelled`), or to the labels alone, where `validation`, or labelled images left out in turn, say that the
            guesses mislead. For networks trained for another task and few labels of the new one: it replaces the classifier,
            and a classifier that was trained together with its network is better left;
            "consensus": fine-tuning of the whole network towards what the peers reproduce, on `loader`, and `labelled` where given;
            "auto": what the arguments allow of these, fine-tuning only with `training=`; the best on `validation` is kept, the original included.
            Where the labels alone gave the best classifier, fine-tuning on them alone is tried beside the consensus;
            "paper": the network's layer rebuilt from a peer's (arXiv 1908.01581): a composite of two networks, for study.
        labelled: batches with labels, few are enough.
        validation: batches with labels, to choose and calibrate on; needed by "auto". They also say how frequent the classes are, unless `recipe`
            does: guesses on the other images are tried as they are and in these proportions.
        test: batches with labels that nothing is chosen on, for the report.
        head: name of the classifier, a Linear; None takes timm's, or the last one.
        peer_heads: of each peer.
        transform: applied to the images before the network (resolution, normalisation).
        peer_transforms: one for all peers, or one for each.
        ridge: of "fold": relative, or "search" on held-out images.
        recipe: settings of "head".
        training: settings of "consensus" and of training in "paper"; in "auto" it also says that there is time to train.
        layer: for "paper": layer of the network that is rebuilt.
        peer_layer: of the (first useful) peer; None takes the same name.
        order: K of the maps for "paper".
        orders: highest order that "paper" hands on; None takes all.
        least: share of the network's features, above the noise floor, that a useful peer explains.
        keep_useless: use peers that were found useless.
        max_images: most unlabelled images for what is done in closed form: their pooled features lie in memory. A DataLoader over a map-style dataset
            that does not shuffle is read at random places; of any other loader the first images are taken.
        seed: of every split and of the training.
        device: run the networks there, and bring them back; None leaves each where it is.
        names: of the network and of each peer, for the report.
        progress: show progress bars.

    Returns:
        `.model`, `.report` (print it, `.to_json(path)`), `.save(folder)`.

    Raises:
        OptionError: an option without meaning, or a method whose images are missing.
        DataError: too few images, or images without labels where these are needed.
        KnowisoError: as its subclasses say; modes, `requires_grad`, devices and random state are as before, also then.

    Source: arXiv 1908.01581; DESIGN §1.4.

    Example:
        >>> signal, labels = torch.randn(400, 2), torch.arange(400) % 2
        >>> signal[:, 0] = labels * 4.0 - 2
        >>> images = torch.cat([signal, torch.randn(400, 2 * 8)], 1)  # both networks see the signal, each has noise of its own
        >>> model, peer = (nn.Sequential(nn.Linear(18, 10), nn.Linear(10, 2)) for _ in range(2))
        >>> with torch.no_grad():
        ...     for i, network in enumerate((model, peer)):
        ...         _ = network[0].weight.copy_(torch.eye(18)[[0, 1, *range(2 + 8 * i, 10 + 8 * i)]])
        >>> batches = [(images[i : i + 50], labels[i : i + 50]) for i in range(0, 400, 50)]
        >>> refined = refine(model, peer, batches[2:], labelled=batches[:1], validation=batches[1:2], progress=False)
        >>> refined.report.row("after").validation.accuracy > 90
        True
    """
    if method not in METHODS:
        raise OptionError(f"method must be one of {METHODS}, got {method!r}")
    check_needs(method, labelled, validation, layer)
    began = time.perf_counter()
    networks = checked_networks(model, peers, head, peer_heads, transform, peer_transforms, names)
    tuning, closed = training or FineTuning(seed=seed), recipe or HeadRecipe()
    with ExitStack() as stack:
        models = [net.model for net in networks]
        stack.enter_context(undisturbed(*models))
        stack.enter_context(on_device(device, *models))
        some = sampled(loader, max_images, seed)
        images = Images.read(networks, some, labelled, validation, test, max_images, progress)
        own = images.unlabelled.features[0]
        judged = [worth(own, images.unlabelled.features[i], net.name, least=least, seed=seed) for i, net in enumerate(networks[1:], 1)]
        useful = [i for i, found in enumerate(judged, 1) if found.useful or keep_useless]
        noted = [f"{found.name} {found.reason}" for found in judged if not found.useful]
        for note in noted:
            warnings.warn(note, KnowisoWarning, stacklevel=2)
        board = Board(networks, images)
        shares: dict[str, tuple[float, float | None]] = {}
        if useful:
            shares[networks[0].head + " (input)"] = (shared(images.unlabelled, useful, seed), None)

        chosen: nn.Module
        if method == "paper":
            if not useful:
                raise OptionError("no useful peer is left to rebuild the layer from; keep_useless=True would use one all the same")
            first = networks[useful[0]]
            chosen = paper_composite(
                networks[0], first, loader, labelled or (), str(layer), peer_layer or str(layer),
                order=order, orders=order if orders is None else orders, steps=tuning.steps, lr=tuning.lr,
                seed=seed, max_images=max_images, progress=progress,
            )  # fmt: skip
            name = f"composite with {first.name}"
            board.whole(name, "after", chosen, validation, test)
        else:
            found = closed_forms(method, networks, useful, images, ridge, closed, seed)
            board.candidates(found[1:] if method == "auto" else found)
            best = board.best(found) if validation is not None else found[-1]
            name, chosen = best.name, with_classifier(model, networks[0].head, best)
            if useful and (method == "consensus" or (method == "auto" and training is not None)):
                few, told, start = images.labelled, None, chosen
                if few is not None and tuning.targets == "ensemble":
                    told = heads_of_peers(networks, few, images.unlabelled, useful, best.recipe or closed, images.validation, best.alone)
                fellows, highest = [networks[i] for i in useful], board.validation(best)
                for towards, settings in ways_to_train(method, tuning, best.alone):
                    tuned = fine_tune(start, networks[0], fellows, loader, labelled, settings, heads=told, progress=progress)
                    called = f"{best.name}, fine-tuned to {towards}"
                    again = board.whole(called, "candidate", tuned, validation, test)
                    if method == "consensus" or again > highest:
                        name, chosen, highest = called, tuned, again
                if chosen is not start:
                    after = see([replace(networks[0], model=chosen), *networks[1:]], some, labels=False, max_images=max_images, what="unlabelled")
                    shares = {key: (before, shared(after, useful, seed)) for key, (before, _) in shares.items()}
            board.after(name)
        board.peers(useful)
    report = RefineReport(
        network=networks[0].name,
        method=method,
        chosen=name,
        rows=tuple(board.rows),
        peers=tuple(judged),
        shares=shares,
        images=images.counts(),
        settings={"seed": seed, "ridge": ridge, "least": least, "recipe": closed.to_dict(), "training": tuning.to_dict()},
        seconds=time.perf_counter() - began,
        versions=versions(),
        warnings=tuple(noted),
    )
    return Refined(chosen, report, plain=method != "paper")
