"""Tests of import order, third-party imports, module size, docstrings and the public names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "knowiso_train"
ORDER = [
    "errors",
    "utils",
    "pages",
    "ops",
    "features",
    "loading",
    "regression",
    "optim",
    "disentangle",
    "measurement",
    "diagnosis",
    "distillation",
    "pruning",
    "refinement",
    "callbacks",
    "integrations",
    "experiment",
    "cli",
]
# Files that may import a third-party library when they are loaded or called
THIRD_PARTY = {
    "timm": ("loading/timm.py", "loading/datasets.py"),
    "accelerate": ("experiment/processes.py", "experiment/training.py"),
    "torch_pruning": ("pruning/_dependencies.py", "pruning/importance.py"),
    "transformers": ("integrations/transformers.py", "loading/hub.py"),
    "lightning": ("integrations/lightning.py",),
    "pandas": ("measurement/report.py", "measurement/_records.py"),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module)
    return found


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if p.name != "__init__.py" or p.parent != PACKAGE],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_each_part_sees_only_the_parts_before_it(path: Path) -> None:
    own = part_of(path)
    assert own in ORDER, f"{own} has no place in the order of the parts"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "knowiso_train" and len(parts) > 1:
            assert ORDER.index(parts[1]) <= ORDER.index(own), f"{path} imports {name}"
            assert (own, parts[1]) != ("refinement", "pruning"), "pruning and refinement do not know each other"
        if parts[0] in THIRD_PARTY:
            assert str(path.relative_to(PACKAGE)) in THIRD_PARTY[parts[0]], f"{path} imports {name}"


def test_importing_is_cheap_and_starts_no_cuda() -> None:
    code = (
        "import sys, knowiso_train as ki; assert 'torch' not in sys.modules; ki.measure; "
        "import torch; assert not torch.cuda.is_initialized(); "
        "heavy = {'timm', 'accelerate', 'matplotlib', 'datasets', 'torch_pruning'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


PUBLIC_NAMES = {
    "Disentangler",
    "FeatureTaps",
    "IsomorphismCallback",
    "IsomorphismImportance",
    "IsomorphismLoss",
    "KnowisoError",
    "KnowisoWarning",
    "Report",
    "compare_stages",
    "diagnose",
    "finetune",
    "load_pruned",
    "measure",
    "preserve_optimizer_state",
    "prune",
    "refine",
    "refit",
    "save_pruned",
    "stability",
}


def test_public_surface_is_small_and_complete() -> None:
    import knowiso_train as ki

    assert set(ki.__all__) == PUBLIC_NAMES
    assert len(ki.__all__) == len(PUBLIC_NAMES)
    for name in ki.__all__:
        assert getattr(ki, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ki.nothing


def module_name(path: Path) -> str:
    """Return the dotted name of a module of the package."""
    parts = (PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


def runtime_imports(path: Path, modules: set[str]) -> set[str]:
    """Return the modules of the package that a module imports, also in functions, but not under TYPE_CHECKING."""
    imported: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            full_names = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= (full_names & modules) or {node.module}
        pending += ast.iter_child_nodes(node)
    return imported & modules


def test_modules_import_each_other_in_one_direction() -> None:
    paths = {module_name(path): path for path in FILES if path != PACKAGE / "__init__.py"}
    sorter = TopologicalSorter({name: runtime_imports(path, set(paths)) for name, path in paths.items()})
    sorter.prepare()  # raises CycleError


def test_torch_pruning_is_imported_in_two_files() -> None:
    importing = {str(path.relative_to(PACKAGE)) for path in FILES if "torch_pruning" in imports(path)}
    assert importing == set(THIRD_PARTY["torch_pruning"])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_have_at_most_500_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_docstrings_do_not_begin_with_a_question_word(path: Path) -> None:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(n) or "" for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, kinds)]
    assert [text for text in docstrings if re.match(r"(What|Which|Whether|How|Where|Why)\b", text)] == []


def test_a_constant_name_has_one_value() -> None:
    values: dict[str, set[str]] = defaultdict(set)
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            for name in (leaf for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)):
                if name.id.isupper():
                    values[name.id].add(ast.unparse(node.value))
    assert values
    assert {name: found for name, found in values.items() if len(found) > 1} == {}
