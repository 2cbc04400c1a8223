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
    digest: str | None


class StageFolder:
    """Results of finished stages, one JSON file each, which is written completely or not at all.

    Args:
        path: Folder; created with the first file.
        settings: Everything that determines the figures, but the stage itself.
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
        for file in sorted(self.path.glob("*.json")):
            saved = _StageFile.from_json(file)
            self._check_settings(file, saved.settings)
            self._files[saved.result.name] = saved

    def read(self, name: str, digest: str | None) -> StageResult | None:
        """Return the result of a stage, or None if it is not finished.

        Args:
            name: Stage.
            digest: Digest of its network. None: unknown, so that the name alone decides.

        Raises:
            OptionError: A result of another network under this name.
        """
        saved = self._files.get(name)
        if saved is None:
            return None
        if saved.digest != digest:
            raise OptionError(
                f"{self._file(name)} holds stage {name!r} of another network; remove the file, or choose another path="
            )
        return saved.result

    def write(self, result: StageResult, digest: str | None) -> None:
        """Write the result of a stage."""
        if self.writes:
            _StageFile(result, self.settings, digest).to_json(self._file(result.name))

    def _file(self, name: str) -> Path:
        # Names may hold characters that file names cannot; the digest keeps such names apart
        plain = re.sub(r"[^\w.=+-]+", "_", name)[:MAX_FILE_NAME_CHARACTERS]
        return self.path / f"{plain}-{hexadecimal_digest([name.encode()])[:8]}.json"

    def _check_settings(self, file: Path, saved: Mapping[str, Any]) -> None:
        settings = self.settings
        names = [name for name in {**saved, **settings} if saved.get(name) != settings.get(name)]
        if names:
            changes = "; ".join(f"{name} is {settings.get(name)!r}, was {saved.get(name)!r}" for name in names)
            raise OptionError(f"{file} was measured with other settings ({changes}). Choose another path=")
