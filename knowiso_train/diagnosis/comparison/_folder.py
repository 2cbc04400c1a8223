"""Folder with one file per finished stage."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowiso_train.diagnosis.comparison._digests import hexadecimal_digest
from knowiso_train.diagnosis.comparison.report import StageResult
from knowiso_train.errors import OptionError
from knowiso_train.utils.saved_report import SavedReport
from knowiso_train.utils.serialization import dump_json, parse_json

MAX_FILE_NAME_CHARACTERS = 80


@dataclass(frozen=True)
class _StageFile(SavedReport):
    """Content of a file: the result of a stage, and what it was measured on."""

    saved_format = "knowiso_train.StageFile"

    result: StageResult
    settings: dict[str, Any]
    stage: dict[str, Any]


class StageFolder:
    """Results of finished stages, one JSON file each, which is written completely or not at all.

    Args:
        path: Folder; created with the first file.
        settings: Everything that determines the figures of all stages.
        writes: Write files. False for all processes of a group but the first.

    Raises:
        OptionError: A file of other settings, or a path that is no folder.
        FormatError: A file that is no result of a stage.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], *, writes: bool = True) -> None:
        self.path, self.writes = Path(path), writes
        # As read from a file
        self.settings = parse_json(dump_json(settings))
        if self.path.exists() and not self.path.is_dir():
            raise OptionError(f"path= must be a folder, got the file {self.path}; choose another name")
        self._files: dict[str, _StageFile] = {}
        for file in sorted(self.path.glob("*-????????.json")):
            saved = _StageFile.from_json(file)
            _check_equal(file, saved.settings, self.settings)
            self._files[saved.result.name] = saved

    def read(self, name: str, stage: Mapping[str, Any]) -> StageResult | None:
        """Return the result of a stage, or None if it is not finished.

        Args:
            name: Name of the stage.
            stage: Everything that determines the figures of this stage alone.

        Raises:
            OptionError: A result of another stage of this name.
        """
        saved = self._files.get(name)
        if saved is None:
            return None
        _check_equal(self._file(name), saved.stage, parse_json(dump_json(stage)))
        return saved.result

    def write(self, result: StageResult, stage: Mapping[str, Any]) -> None:
        """Write the result of a stage; see `read`."""
        if self.writes:
            _StageFile(result, self.settings, dict(stage)).to_json(self._file(result.name))

    def _file(self, name: str) -> Path:
        # Names may hold characters that file names cannot; the digest keeps such names apart
        plain = re.sub(r"[^\w.=+-]+", "_", name)[:MAX_FILE_NAME_CHARACTERS]
        return self.path / f"{plain}-{hexadecimal_digest([name.encode()])[:8]}.json"


def _check_equal(file: Path, saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    names = [name for name in {**saved, **present} if saved.get(name) != present.get(name)]
    if names:
        changes = "; ".join(f"{name} is {present.get(name)!r}, was {saved.get(name)!r}" for name in names)
        raise OptionError(
            f"{file} was measured with other settings ({changes}). Remove the file, or choose another path="
        )
