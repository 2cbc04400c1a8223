"""Model cards in the form of the Hugging Face hub, beside saved networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from knowiso_train.utils.environment import library_versions
from knowiso_train.utils.serialization import write_file

README_FILE = "README.md"
# Marks a card of this library, which a later save may replace
MARK = "<!-- written by knowiso_train -->"


def loading_code(snippet: str) -> str:
    """Return the code of a card from the snippet of `loading_snippet`: an expression of timm, code, or words.

    Examples:
        >>> print(loading_code("timm.create_model('resnet18')"))
        import timm
        <BLANKLINE>
        model = timm.create_model('resnet18')
    """
    if snippet.startswith("timm."):
        return f"import timm\n\nmodel = {snippet}"
    return snippet if "\n" in snippet else f"# {snippet}"


def write_model_card(
    folder: str | Path,
    title: str,
    summary: str,
    code: str,
    *,
    tags: Sequence[str] = (),
    library: str = "timm",
    base_model: str | None = None,
    figures: Mapping[str, object] | None = None,
) -> None:
    """Write `README.md` with the metadata of a hub repository, unless the folder has a README of another origin.

    Args:
        folder: Folder of the saved network.
        title: Heading.
        summary: Text: origin of the network.
        code: Python code that loads the network.
        tags: Tags beside "image-classification" and "knowiso_train".
        library: Library that loads the network.
        base_model: Network that this one was made of, as on the hub. None: not stated.
        figures: Values of a table, by name. None: no table.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_model_card(folder, "resnet18, pruned", "Half as large.", "model = ...", tags=["pruned"])
        ...     text = Path(folder, "README.md").read_text()
        >>> text.splitlines()[:2], "# resnet18, pruned" in text
        (['---', 'library_name: timm'], True)
    """
    path = Path(folder) / README_FILE
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return
    data = ModelCardData(
        library_name=library,
        pipeline_tag="image-classification",
        base_model=base_model,
        tags=["image-classification", "knowiso_train", *tags],
    )
    rows = "".join(f"| {name} | {value} |\n" for name, value in (figures or {}).items())
    table = f"\n| | |\n|---|---|\n{rows}" if rows else ""
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    write_file(
        path,
        f"---\n{data.to_yaml()}\n---\n\n{MARK}\n# {title}\n\n{summary}\n{table}\n"
        f"## Load\n\n```python\n{code}\n```\n\nVersions: {versions}\n",
    )
