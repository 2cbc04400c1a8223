"""Training scripts of `benchmarks/clients`: plain scripts, and as many added lines as the guide highlights."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from benchmarks.clients.run_clients import CLIENTS, FOLDER, added_lines, guide_lines, plain_script


def test_marks_of_added_and_replaced_lines() -> None:
    text = "import a  # + knowiso\n    x = f(  # + knowiso, for: x = g(\ny = 1  # knowiso\n"
    assert plain_script(text) == "    x = g(\ny = 1  # knowiso\n"
    assert added_lines(text) == ["import a", "x = f("]


def test_every_script_is_run() -> None:
    assert {path.stem for path in Path(FOLDER).glob("*.py")} - {"run_clients"} == set(CLIENTS)


@pytest.mark.parametrize("name", CLIENTS)
def test_a_script_has_at_most_the_lines_of_the_guide(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text()
    added, guide = added_lines(text), guide_lines(CLIENTS[name].section)
    assert 0 < len(added) <= len(guide)
    # The plain script is a script, without names that only the added lines define
    plain = plain_script(text)
    ast.parse(plain)
    assert not {"knowiso", "iso.", "iso("} & {word for word in ("knowiso", "iso.", "iso(") if word in plain}
    # Each added line has its kind in the guide
    for kind in ("knowiso_train", "teacher = ", "IsomorphismLoss("):
        assert any(kind in line for line in added), kind
        assert any(kind in line for line in guide), kind
