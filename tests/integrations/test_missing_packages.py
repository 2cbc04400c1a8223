"""Messages for adapters whose package is not installed."""

from __future__ import annotations

import importlib
import sys

import pytest

from knowiso_train.errors import MissingDependencyError


@pytest.mark.parametrize(("package", "adapter"), [("transformers", "Trainer"), ("lightning", "Lightning")])
def test_a_missing_package_is_named_with_the_way_to_get_it(
    package: str, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"knowiso_train.integrations.{package}", raising=False)
    with pytest.raises(
        ImportError, match=rf"{adapter} adapter needs {package}.* pip install \"knowiso_train\[{package}\]\""
    ) as raised:
        importlib.import_module(f"knowiso_train.integrations.{package}")
    assert isinstance(raised.value, MissingDependencyError)
