"""Which networks' classifiers have a say: those whose output is the classifier's, and whose classes are the network's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from knowiso_train.errors import LayoutError
from knowiso_train.features import device_of, inputs_of
from knowiso_train.refinement.networks import Network, Seen

ALIKE = 1e-2  # relative: half precision rounds by less
LOST = 0.5  # of the images that could be agreed on; where more of them are not, the classes stand in another order, or are others
PROBED = 2  # images


def heard(networks: Sequence[Network], batch: Any) -> list[Network]:
    """The networks, peers without a say marked as `silent`: their output is not what their classifier makes of its input.

    Args:
        networks: in eval mode, first the one that is refined.
        batch: of images.

    Raises:
        LayoutError: the network itself is of this kind, such as one with two classifiers, and would not be the better for a new one.
    """
    found = [replace(net, silent=net.silent or not _is_its_classifiers(net, batch)) for net in networks]
    if found[0].silent:
        raise LayoutError(
            f"{found[0].name}: its output is not what its classifier {found[0].head!r} makes of its features (another beside it, a step behind it). "
            "A new one would not be the network's; name the right layer with head=, or refine a network with one classifier"
        )
    return found


def of_one_order(networks: Sequence[Network], seen: Seen) -> tuple[list[Network], list[str]]:
    """The networks, peers whose classes are not the network's own marked as `silent`, and a note on each.

    As many classes need not be the same ones: what both say of the images tells. Where they agree on less than half of what they would agree on if
    the peer's classes were named anew, they are not.

    Args:
        networks: first the one that is refined.
        seen: by all of them; labels are not read.

    Example:
        >>> from knowiso_train.refinement.networks import network
        >>> nets = [network(torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False)), name) for name in ("own", "same", "turned")]
        >>> for net, order in zip(nets, ([0, 1, 2], [0, 1, 2], [1, 2, 0])):
        ...     net.classifier.weight.data = torch.eye(3)[order]
        >>> x = torch.randn(90, 3)
        >>> [net.silent for net in of_one_order(nets, Seen((x, x, x), None))[0]]
        [False, False, True]
    """
    own, found, notes = networks[0], [networks[0]], []
    said = own.logits(seen.features[0]).argmax(1)
    for net, features in zip(networks[1:], seen.features[1:], strict=True):
        if net.speaks(own.classes):
            other = net.logits(features).argmax(1)
            together = torch.zeros(own.classes, own.classes).index_put_((said, other), torch.ones(len(said)), accumulate=True)
            agreed, possible = float(together.diagonal().sum()) / len(said), float(together.amax(1).sum()) / len(said)
            if agreed < LOST * possible:
                net = replace(net, silent=True)
                notes.append(
                    f"{net.name} tells {net.classes} classes apart as {own.name} does, but says the same of {100 * agreed:.1f} % of the images, and "
                    f"could of {100 * possible:.1f} % if its classes were named anew: they seem to be others, and its classifier is not asked"
                )
        found.append(net)
    return found, notes


@torch.no_grad()
def _is_its_classifiers(net: Network, batch: Any) -> bool:
    made: list[Tensor] = []
    handle = net.classifier.register_forward_hook(lambda _module, _inputs, output: made.append(output))
    images = inputs_of(batch)[:PROBED].to(device_of(net.model) or "cpu")
    try:
        output = net.model(images if net.transform is None else net.transform(images))
    finally:
        handle.remove()
    if len(made) != 1 or not isinstance(output, Tensor) or output.shape != made[0].shape:
        return False
    return float((output - made[0]).abs().max()) <= ALIKE * float(made[0].abs().max().clamp_min(1e-12))
