"""Build the documentation site in `build/site`, strictly: a broken link or an undocumented public name is an error.

    pip install -e ".[docs]"
    python docs/build.py            # pages open from disk: build/site/index.html
    python docs/build.py --serve    # serves them at localhost and rebuilds nothing

Zensical renders the pages with the settings of `mkdocs.yml`; formulas become MathML, so that no script is loaded.
"""

from __future__ import annotations

import argparse
import functools
import html
import http.server
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE, SITE = ROOT / "build/site-source", ROOT / "build/site"
# Packages whose exported names a user calls; each name needs an entry in the API reference
PUBLIC_PACKAGES = (
    "callbacks",
    "diagnosis",
    "diagnosis.comparison",
    "disentangle",
    "distillation",
    "features",
    "loading",
    "measurement",
    "pruning",
    "refinement",
)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\([(\[])(.*?)\\[)\]]\s*</\1>', re.DOTALL)
DOCUMENT_LINK = re.compile(r"\]\(\.\./(?!assets/)((?:[\w.-]+/)*[\w.-]+)(#[\w-]+)?\)")
PAIR_OF_NUMBERS = re.compile(r"(?<=\d) ([±…]) (?=[\d+−])")
WORKER_OF_THEME = "https://unpkg.com/iframe-worker/shim"
PICTURE_LINK = re.compile(r"\]\(\.\./(benchmarks/[\w./-]+\.png)\)")
REPOSITORY = "https://github.com/knowiso/knowiso_train/blob/main/"


def write_sources() -> None:
    """Copy `docs/` without scripts, and write the tutorials as pages."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(ROOT / "docs", SOURCE, ignore=shutil.ignore_patterns("*.py", "__pycache__", "*.ipynb"))
    for page in SOURCE.glob("*.md"):
        text = page.read_text()
        for picture in PICTURE_LINK.findall(text):
            shutil.copy(ROOT / picture, SOURCE / "assets")
        # Other files outside docs/ are in the repository, not on the site
        text = PICTURE_LINK.sub(lambda match: f"](assets/{Path(match[1]).name})", text)
        page.write_text(DOCUMENT_LINK.sub(rf"]({REPOSITORY}\1\2)", text))
    for notebook in (ROOT / "docs").rglob("*.ipynb"):
        page = SOURCE / notebook.relative_to(ROOT / "docs").with_suffix(".md")
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(notebook_page(json.loads(notebook.read_text())))
    for page in SOURCE.rglob("*.md"):
        # In the repository links lead to notebooks, on the site to their pages
        page.write_text(page.read_text().replace(".ipynb)", ".md)"))


def notebook_page(notebook: dict) -> str:
    """Return the cells of a notebook as Markdown, with their recorded text and pictures."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                picture = "".join(data["image/png"]).replace("\n", "")
                parts.append(f'<img alt="Output of the cell above" src="data:image/png;base64,{picture}">')
            elif printed := "".join(output.get("text", data.get("text/plain", ""))):
                parts.append(f'```text title="Output"\n{printed.rstrip()}\n```')
    return "\n\n".join(parts) + "\n"


def render() -> None:
    """Render the pages. Warnings are errors."""
    shutil.rmtree(SITE, ignore_errors=True)
    subprocess.run([Path(sys.executable).parent / "zensical", "build", "--clean", "--strict"], cwd=ROOT, check=True)
    for page in SITE.rglob("*.html"):
        text = FORMULA.sub(lambda match: mathml(match[3], is_block=match[2] == "["), page.read_text())
        # Mean and standard error, and both ends of an interval, stand in one line of a table
        text = PAIR_OF_NUMBERS.sub("\N{NO-BREAK SPACE}\\1\N{NO-BREAK SPACE}", text)
        # The theme requests stars and releases of the repository from its host, and a script for the search from disk
        text = text.replace('data-md-component="source"', "")
        folder = "../" * (len(page.relative_to(SITE).parts) - 1)
        page.write_text(text.replace(WORKER_OF_THEME, f"{folder}assets/search_from_disk.js"))


def mathml(formula: str, *, is_block: bool) -> str:
    """Return a LaTeX formula as MathML."""
    from latex2mathml.converter import convert

    return convert(html.unescape(formula).strip(), display="block" if is_block else "inline")


def undocumented_names() -> list[str]:
    """Return the public names without an entry in the API reference."""
    sys.path.insert(0, str(ROOT))
    names = set()
    for package in ("knowiso_train", *(f"knowiso_train.{package}" for package in PUBLIC_PACKAGES)):
        module = importlib.import_module(package)
        objects = {name: getattr(module, name) for name in module.__all__}
        # Functions and classes stand under the module that defines them, other names under the package
        names |= {
            f"{value.__module__}.{value.__qualname__}"
            if inspect.isroutine(value) or inspect.isclass(value)
            else f"{package}.{name}"
            for name, value in objects.items()
        }
    # The inventory of Sphinx: four lines of text, then compressed lines with a name each
    inventory = (SITE / "objects.inv").read_bytes().split(b"\n", 4)[4]
    documented = {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines()}
    return sorted(names - documented)


def unsearchable_names() -> list[str]:
    """Return the public names without a heading of theirs, and the commands without a text, in the search index."""
    knowiso_train, cli = importlib.import_module("knowiso_train"), importlib.import_module("knowiso_train.cli._main")
    items = json.loads((SITE / "search.json").read_text())["items"]
    # Titles have further tags, such as that of a dataclass
    headings = {re.sub(r"<.*", "", item["title"]).strip() for item in items}
    text = html.unescape(" ".join(item["title"] + " " + item["text"] for item in items))
    commands = [f"knowiso {command}" for command in (*cli.COMMANDS, *cli.RECIPES)]
    return sorted(set(knowiso_train.__all__) - headings) + [name for name in commands if name not in text]


def main() -> None:
    """Build the site, and serve it on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help="serve the finished site at port 8000")
    args = parser.parse_args()
    write_sources()
    render()
    if names := undocumented_names():
        sys.exit("public names without an entry in docs/api:\n  " + "\n  ".join(names))
    if names := unsearchable_names():
        sys.exit("names that the search of the site does not find:\n  " + "\n  ".join(names))
    print(f"{len(list(SITE.rglob('*.html')))} pages in {SITE.relative_to(ROOT)}")
    if args.serve:
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=SITE)
        http.server.ThreadingHTTPServer(("localhost", 8000), handler).serve_forever()


if __name__ == "__main__":
    main()
