"""Results files: figures with versions, device, date and commit."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from knowiso_train.utils.environment import library_versions
from knowiso_train.utils.serialization import write_file
from knowiso_train.utils.text_table import format_table

# Set KNOWISO_RESULTS to try a benchmark without changing the recorded results
RESULTS = Path(os.environ.get("KNOWISO_RESULTS", Path(__file__).resolve().parents[1] / "results"))


def device_name() -> str:
    """Return the name of the GPU, or of the CPU with cores and threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def record(name: str, figures: Any, **more: Any) -> Path:
    """Write `results/<name>.json`.

    Args:
        name: Name of the results file.
        figures: JSON-serializable figures.
        more: Further entries, such as settings.

    Returns:
        Path of the file.
    """
    root = Path(__file__).parents[2]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=root, check=False
    ).stdout.strip()
    dirty = bool(
        subprocess.run(
            ["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, cwd=root, check=False
        ).stdout.strip()
    )
    path = RESULTS / f"{name}.json"
    content = {
        "figures": figures,
        **more,
        "versions": library_versions(),
        "device": device_name(),
        "date": datetime.date.today().isoformat(),
        "commit": commit + ("+" if dirty else ""),
    }
    write_file(path, json.dumps(content, indent=1) + "\n")
    return path


def table(rows: list[dict[str, Any]]) -> str:
    """Format rows as a table with aligned columns.

    The keys of the first row are the header.
    """
    header = list(rows[0])
    cells = [header, *([f"{row[k]:.4g}" if isinstance(row[k], float) else str(row[k]) for k in header] for row in rows)]
    return format_table(cells, left=())
