"""Run the tutorials and store their printed text and figures.

pip install -e ".[demo]"
python docs/notebooks.py                                  # all of docs/tutorials, about a minute on one core
python docs/notebooks.py docs/tutorials/prune.ipynb
"""

from __future__ import annotations

import argparse
import ast
import base64
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

TUTORIALS = Path(__file__).resolve().parent / "tutorials"
FIGURE_DPI = 90
NUM_COLORS = 96  # of a stored figure, for a third of the size


def code_cells(notebook: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Return the code cells of a notebook, from top to bottom."""
    return (cell for cell in notebook["cells"] if cell["cell_type"] == "code")


def run_cell(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    r"""Run a cell and return its outputs in the form of nbformat 4.

    Args:
        source: Python code. The value of a last expression is an output, as in Jupyter.
        names: Names that the code reads and defines.

    Examples:
        >>> run_cell("n = 2\nn + 1", {})[0]["data"]
        {'text/plain': ['3']}
    """
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    tree, value, text = ast.parse(source), None, io.StringIO()
    last = ast.Expression(tree.body.pop().value) if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with redirect_stdout(text):
        exec(compile(tree, "<cell>", "exec"), names)
        if last is not None:
            value = eval(compile(last, "<cell>", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if printed := text.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": printed.splitlines(keepends=True)})
    figures = [pyplot.figure(number) for number in pyplot.get_fignums()]
    if isinstance(value, Figure):
        figures = [value, *(figure for figure in figures if figure is not value)]
    elif value is not None:
        outputs.append(_display({"text/plain": repr(value).splitlines(keepends=True)}))
    outputs += [_display({"image/png": _png(figure), "text/plain": ["<Figure>"]}) for figure in figures]
    pyplot.close("all")
    return outputs


def run_notebook(path: Path) -> None:
    """Run the cells of a notebook in one namespace and write their outputs into it, also those before an error."""
    notebook = json.loads(path.read_text())
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        for count, cell in enumerate(code_cells(notebook), 1):
            cell["execution_count"] = count
            cell["outputs"] = run_cell("".join(cell["source"]), names)
    finally:
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def _display(data: dict[str, Any]) -> dict[str, Any]:
    return {"output_type": "display_data", "data": data, "metadata": {}}


def _png(figure: Any) -> str:
    from PIL import Image

    full, picture = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=FIGURE_DPI)
    Image.open(full).convert("RGB").quantize(NUM_COLORS).save(picture, "PNG", optimize=True)
    return base64.b64encode(picture.getvalue()).decode() + "\n"


def main() -> None:
    """Run the notebooks of the command line."""
    import matplotlib

    matplotlib.use("Agg")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of docs/tutorials")
    for path in parser.parse_args().notebooks or sorted(TUTORIALS.glob("*.ipynb")):
        run_notebook(path)
        print(f"{path.name}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
