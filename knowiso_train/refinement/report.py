"""Result and report of a refinement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from knowiso_train.errors import OptionError
from knowiso_train.refinement._metrics import Score
from knowiso_train.refinement._model_folder import save_plain_network
from knowiso_train.refinement.peers import PeerScore
from knowiso_train.utils.serialization import dump_json, write_if_given
from knowiso_train.utils.text_table import format_table

RowRole = Literal["before", "candidate", "after", "peer", "ensemble"]


@dataclass(frozen=True)
class Row:
    """Scores of one network or ensemble.

    Attributes:
        name: Name of the network or of the candidate.
        role: "before", "candidate", "after", "peer", or "ensemble". An ensemble of m networks is an upper reference at
            m times the cost.
        validation: Score on the images that candidates are chosen on. None: no such images.
        test: Score on images that nothing is chosen on. None: no such images.
        note: Remark.
    """

    name: str
    role: RowRole
    validation: Score | None
    test: Score | None
    note: str = ""


@dataclass(frozen=True)
class RefineReport:
    """Scores of everything that a refinement compared, and its choice.

    Attributes:
        network: Name of the network.
        method: Method of `refine`.
        chosen: Name of the chosen candidate; "original" where nothing was better.
        rows: Scores of the network before and after, of every candidate, of the peers and of the ensemble.
        peers: Label-free score of each peer.
        explained: By layer, R² of the network's features, predicted from the useful peers' features: (before, after a
            fine-tuning). None: no fine-tuning.
        num_images: Numbers of unlabeled, labeled, validation and test images.
        settings: Ridges, seeds and other settings.
        seconds: Wall-clock time.
        versions: Versions of the packages that the numbers depend on.
        warnings: Remarks for the user.

    Examples:
        >>> row = Row("original", "before", Score(60.0, 5.0, 100), None)
        >>> report = RefineReport("small", "auto", "original", (row,), (), {}, {"unlabeled": 500}, {"seed": 0}, 1.0, {})
        >>> print(report)  # doctest: +SKIP
        >>> report.row("before").validation.accuracy
        60.0
    """

    network: str
    method: str
    chosen: str
    rows: tuple[Row, ...]
    peers: tuple[PeerScore, ...]
    explained: Mapping[str, tuple[float, float | None]]
    num_images: Mapping[str, int]
    settings: Mapping[str, Any]
    seconds: float
    versions: Mapping[str, str]
    warnings: tuple[str, ...] = ()

    def row(self, role: RowRole) -> Row:
        """Return the first row of a role.

        Raises:
            OptionError: No such row.
        """
        row = next((row for row in self.rows if row.role == role), None)
        if row is None:
            raise OptionError(f"the report has no row {role!r}; it has {sorted({row.role for row in self.rows})}")
        return row

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {name}" for name, count in self.num_images.items() if count)
        title = (
            f"{self.network} refined · method {self.method} · chosen: {self.chosen} · images: {counts} · "
            f"{self.seconds:.1f} s"
        )
        blocks = [title, format_table(self._score_table(), left=(0, -1))]
        if self.peers:
            blocks.append(format_table(self._peer_table(), left=(0, -1)))
        if self.explained:
            blocks.append(format_table(self._explained_table(), left=(0, -1)))
        if all(row.test is None for row in self.rows) and any(row.validation is not None for row in self.rows):
            blocks.append(
                "The result was chosen on the validation images, so its score there is optimistic; test= gives an "
                "unbiased one."
            )
        return "\n\n".join(blocks) + "".join(f"\n! {note}" for note in self.warnings)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as nested dictionaries, lists and numbers."""
        return {"format": "knowiso_train.RefineReport", "format_version": 1, **asdict(self)}

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as strict JSON, and write it to a file where a path is given."""
        return write_if_given(dump_json(self.to_dict()) + "\n", path)

    def _score_table(self) -> list[list[str]]:
        table = [["", "validation", "ECE", "test", "ECE", ""]]
        for row in self.rows:
            title = row.name if row.role == "candidate" else f"{row.name} ({row.role})"
            table.append([title, *_score_cells(row.validation), *_score_cells(row.test), row.note])
        return table

    def _peer_table(self) -> list[list[str]]:
        table = [["peer", "R² of network", "R² of peer", "noise floor", ""]]
        for peer in self.peers:
            shares = (peer.r2_of_model, peer.r2_of_peer, peer.noise_floor)
            table.append([peer.name, *map(_percent, shares), peer.reason or "useful"])
        return table

    def _explained_table(self) -> list[list[str]]:
        table = [["layer", "explained by the peers before", "after"]]
        for name, (before, after) in self.explained.items():
            table.append([name, _percent(before), "–" if after is None else _percent(after)])
        return table


@dataclass(frozen=True)
class RefineResult:
    """Result of `refine`.

    Attributes:
        model: Plain network of the same architecture, in eval mode. For `method="paper"`, a composite of two networks.
        report: Scores of everything that was compared.
        plain: True where the model is a plain network.
        peer_classifiers: By name of the useful peers, classifiers of their pooled features, fitted in the way of the
            network's own, float32. They are teachers for further training. Empty without labeled images.
    """

    model: nn.Module
    report: RefineReport
    plain: bool = field(default=True, repr=False)
    peer_classifiers: Mapping[str, nn.Linear] = field(default_factory=dict, repr=False)

    def save(
        self, folder: str | Path, *, architecture: str | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        """Write `model.safetensors`, a plain state dict, `card.json` with report and loading code, and a model card.

        The weight file holds the card too, as a text entry, so that weights and card of one save stay together.

        `timm.create_model(architecture, checkpoint_path=".../model.safetensors", **options)` loads it, without this
        library.

        Args:
            folder: Folder; it is created where it does not exist.
            architecture: Name of the network in timm. None: the name that timm stored in the network.
            options: Arguments of `timm.create_model`. None: the number of classes.

        Raises:
            OptionError: A composite, which no single architecture can load.
        """
        if not self.plain:
            raise OptionError(
                'method="paper" gives a composite of two networks, for study; it has no architecture to load it. Keep '
                "its state_dict"
            )
        scores = {
            f"top-1, {images}, {row.role}": f"{score.accuracy:.1f} %"
            for row in self.report.rows
            if row.role in ("before", "after")
            for images, score in (("validation", row.validation), ("test", row.test))
            if score is not None
        }
        save_plain_network(
            folder,
            self.model,
            self.report.to_dict(),
            kind="refined",
            summary="refined by the features that other networks confirm (knowiso_train). It runs without them.",
            figures=scores,
            architecture=architecture,
            options=options,
        )


def _score_cells(score: Score | None) -> list[str]:
    return ["–", "–"] if score is None else [f"{score.accuracy:.1f} %", f"{score.ece:.1f}"]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
