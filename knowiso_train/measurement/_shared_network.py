"""Network of several measurements: its features are computed once, its output is compared with that of others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from knowiso_train.features.extractor import Extractor
from knowiso_train.measurement.config import Direction
from knowiso_train.measurement.data import IndexedBatch
from knowiso_train.measurement.functional import (
    NUM_SUMS,
    ExplainedNetwork,
    FunctionalShare,
    image_sums,
    share_from_sums,
)
from knowiso_train.utils.distributed import ProcessGroup


class SharedNetwork:
    """Network of measurements that read the same images.

    Its features are kept in the main memory up to a limit; those of batches beyond it are computed in every
    measurement. Batches in which the network's output is needed as well are computed again, too.

    Args:
        max_bytes: Limit of the features in memory.
    """

    def __init__(self, max_bytes: int) -> None:
        self._free_bytes = max_bytes
        self._features: dict[bytes, dict[str, Tensor]] = {}
        self._sums = torch.zeros(NUM_SUMS, dtype=torch.float64)

    def run(self, extractor: Extractor, batch: IndexedBatch) -> dict[str, Tensor]:
        """Return the features of a batch by layer name, from memory where they are there."""
        key = batch.index.tobytes()
        stored = self._features.get(key, {})
        # The first batch of a measurement determines the layouts of its extractor
        if extractor.specs and stored.keys() >= set(extractor.names):
            device = extractor.device or torch.device("cpu")
            return {name: stored[name].to(device) for name in extractor.names}
        features = extractor.run(batch.batch)
        new = {name: feature for name, feature in features.items() if name not in stored}
        num_bytes = sum(feature.nbytes for feature in new.values())
        if num_bytes <= self._free_bytes:
            self._free_bytes -= num_bytes
            self._features[key] = stored | {name: feature.cpu() for name, feature in new.items()}
        return features

    def compare_outputs(self, explained: Mapping[Direction, ExplainedNetwork], batch: IndexedBatch) -> None:
        """Compare the outputs of this source and the target on a batch's report images, if they have equal classes."""
        if len(explained) < 2:
            return
        source, target = explained["backward"], explained["forward"]
        own, output = source.log_probabilities, target.log_probabilities
        if own.shape == output.shape:
            images = torch.from_numpy(batch.mask("report")).to(own.device)
            labels = None if source.labels is None else source.labels[images]
            self._sums += image_sums(output.to(own)[images], own[images], labels)

    def take_output_share(self, group: ProcessGroup) -> FunctionalShare | None:
        """Return the target's output compared with the source's own, and start anew; None if nothing was compared."""
        sums = self._sums.to(group.device)
        group.sum_(sums)
        self._sums = torch.zeros_like(self._sums)
        return share_from_sums(sums.cpu()) if sums[0] else None
