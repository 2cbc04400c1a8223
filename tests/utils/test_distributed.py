"""Work of one process, whose result and error all processes get."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from knowiso_train.errors import FormatError
from knowiso_train.utils.distributed import ProcessGroup
from tests.helpers.processes import WORLD, run_in_processes


class TwoArgumentsError(Exception):
    """Error that cannot be loaded from its pickle."""

    def __init__(self, name: str, count: int) -> None:
        super().__init__(f"{count} {name}")


def work(kind: str) -> int:
    if kind == "format":
        raise FormatError("damaged")
    if kind == "own":
        raise TwoArgumentsError("files", 2)
    return 5


def worker(rank: int, folder: str) -> None:
    outcomes: list[object] = []
    for kind in ("value", "format", "own"):
        ran: list[str] = []

        def run(kind: str = kind, ran: list[str] = ran) -> int:
            ran.append(kind)
            return work(kind)

        try:
            outcomes.append(ProcessGroup().run_on_first(run))
        except Exception as error:
            outcomes.append([type(error).__name__, str(error)])
        assert bool(ran) == (rank == 0)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(outcomes))


def test_the_error_of_the_first_process_is_raised_in_all(tmp_path: Path) -> None:
    run_in_processes(worker, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD))
    assert first == [5, ["FormatError", "damaged"], ["TwoArgumentsError", "2 files"]]
    assert second == [5, ["FormatError", "damaged"], ["RuntimeError", "TwoArgumentsError: 2 files"]]


def test_a_single_process_runs_the_function() -> None:
    assert ProcessGroup().run_on_first(lambda: work("value")) == 5
    with pytest.raises(FormatError, match="damaged"):
        ProcessGroup().run_on_first(lambda: work("format"))
