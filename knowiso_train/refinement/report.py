"""Result and report of a refinement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from knowiso_train.errors import OptionError
from knowiso_train.features.modules import network_name, unwrap_model
from knowiso_train.loading.timm import input_config, loading_snippet
from knowiso_train.refinement.metrics import Score
from knowiso_train.refinement.peers import PeerScore
from knowiso_train.utils.serialization import dump_json, replace_file, write_file
from knowiso_train.utils.text_table import format_table

REFINED_WEIGHTS_FILE, CARD_FILE = "model.safetensors", "card.json"
ROW_ROLES = ("before", "candidate", "after", "peer", "ensemble")


@dataclass(frozen=True)
class Row:
    """One network's figures.

    Attributes:
        name: of the network, or of what was tried.
        role: "before", "candidate", "after", "peer", or "ensemble" (every network is run: the ceiling, at m times the
            cost).
        validation: on the images that candidates are chosen on; None where there are none.
        test: on images that nothing was chosen on; None where none were given.
        note: what else is to be known.
    """

    name: str
    role: str
    validation: Score | None
    test: Score | None
    note: str = ""


@dataclass(frozen=True)
class RefineReport:
    """What was tried, what it was worth, what was chosen; `print` it, save it.

    Attributes:
        network: name of the network.
        method: as it was asked for.
        chosen: name of the candidate that was taken; "original" where nothing was better.
        rows: figures of the network before and after, of every candidate, of the peers and of the ensemble.
        peers: what each peer knows of the network, without labels.
        explained: by layer, share of the network that the useful peers explain, (before, after); None where it was not
            measured.
        num_images: how many were unlabeled, labeled, to validate and to test.
        settings: ridges, seeds, …
        seconds: wall-clock time.
        versions: of the packages that figures depend on.

    Example:
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

    def row(self, role: str) -> Row:
        """The first row of a role.

        Raises:
            OptionError: no such row.
        """
        found = next((row for row in self.rows if row.role == role), None)
        if found is None:
            raise OptionError(f"the report has no row {role!r}; it has {sorted({row.role for row in self.rows})}")
        return found

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {name}" for name, count in self.num_images.items() if count)
        lines = [
            f"{self.network} refined · method {self.method} · chosen: {self.chosen} · images: {counts} · {self.seconds:.1f} s",
            "",
        ]
        head = ["", "validation", "ECE", "test", "ECE", ""]
        body = [
            [f"{row.name} ({row.role})" if row.role != "candidate" else row.name, *_cells(row), row.note]
            for row in self.rows
        ]
        lines.append(format_table([head, *body], left=(0, -1)))
        if self.peers:
            table = [["peer", "explains", "is explained", "noise floor", ""]]
            table += [
                [w.name, _share(w.r2_of_model), _share(w.r2_of_peer), _share(w.noise_floor), w.reason or "useful"]
                for w in self.peers
            ]
            lines += ["", format_table(table, left=(0, -1))]
        if self.explained:
            table = [["layer", "known to the peers before", "after"]]
            table += [
                [name, _share(before), "–" if after is None else _share(after)]
                for name, (before, after) in self.explained.items()
            ]
            lines += ["", format_table(table, left=(0, -1))]
        if all(row.test is None for row in self.rows) and any(row.validation is not None for row in self.rows):
            lines += [
                "",
                "The result was chosen on the validation images, so its figure there is a little too good; test= gives one that is not.",
            ]
        return "\n".join([*lines, *(f"! {note}" for note in self.warnings)])

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return {"format": "knowiso_train.RefineReport", "format_version": 1, **asdict(self)}

    def to_json(self, path: str | Path | None = None) -> str:
        """Strict JSON; also written to `path` where one is given."""
        text = dump_json(self.to_dict()) + "\n"
        if path is not None:
            write_file(path, text)
        return text


@dataclass(frozen=True)
class RefineResult:
    """What `refine` returns.

    Attributes:
        model: a plain network of the same architecture, in eval mode; for `method="paper"` a composite of two networks.
        report: what was tried and what it was worth.
        peer_classifiers: by the names of the useful peers, what the same labels and consensus make their classifiers
            (pooled features → logits,
            float32): teachers for a training of your own. Empty without labeled images.
    """

    model: nn.Module
    report: RefineReport
    plain: bool = field(default=True, repr=False)
    peer_classifiers: Mapping[str, nn.Linear] = field(default_factory=dict, repr=False)

    def save(
        self, folder: str | Path, *, architecture: str | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        """Write `model.safetensors`, a plain state dict, and `card.json`, how to load it and the report.

        `timm.create_model(architecture, checkpoint_path=".../model.safetensors", **options)` loads it, without this
        library.

        Args:
            folder: made where it is missing.
            architecture: timm's name of the network; None takes what timm wrote into it.
            options: of `timm.create_model`; None takes its number of classes.

        Raises:
            OptionError: a composite, which no single architecture can load.
        """
        if not self.plain:
            raise OptionError(
                'method="paper" gives a composite of two networks, for study; it has no architecture to load it. Keep its state_dict'
            )
        from safetensors.torch import save_file

        inner, folder = unwrap_model(self.model), Path(folder)
        state = {name: value.detach().cpu().clone().contiguous() for name, value in inner.state_dict().items()}
        classes = getattr(inner, "num_classes", None)
        chosen = dict(options) if options is not None else ({} if classes is None else {"num_classes": classes})
        name = architecture or network_name(inner)
        config = input_config(inner)
        card = {
            "architecture": name,
            "options": chosen,
            "load": loading_snippet(name, chosen, state, REFINED_WEIGHTS_FILE),
            "input": {} if config is None else config._asdict(),
            "parameters": sum(parameter.numel() for parameter in inner.parameters()),
            "report": self.report.to_dict(),
        }
        text = dump_json(card) + "\n"
        with replace_file(folder / REFINED_WEIGHTS_FILE) as partial:
            save_file(state, partial)
        write_file(folder / CARD_FILE, text)


def _cells(row: Row) -> list[str]:
    cells: list[str] = []
    for found in (row.validation, row.test):
        cells += ["–", "–"] if found is None else [f"{found.accuracy:.1f} %", f"{found.ece:.1f}"]
    return cells


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"
