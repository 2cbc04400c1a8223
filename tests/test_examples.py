"""Every example in a docstring runs, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import numpy as np
import pytest
import torch

import knowiso_train
from knowiso_train.errors import KnowisoError, MissingDependencyError

MODULES = sorted(m.name for m in pkgutil.walk_packages(knowiso_train.__path__, "knowiso_train."))


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except MissingDependencyError as error:  # an adapter of an optional package
        pytest.skip(str(error))
    names = {"torch": torch, "nn": torch.nn, "np": np, **vars(module)}
    result = doctest.testmod(module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in knowiso_train.__all__
        if inspect.isfunction(getattr(knowiso_train, n)) or inspect.isclass(getattr(knowiso_train, n))
    ],
)
def test_public_names_have_an_example(name: str) -> None:
    value = getattr(knowiso_train, name)
    if name == "KnowisoWarning":
        return
    assert ">>>" in (inspect.getdoc(value) or ""), f"{name} has no example"


def test_every_error_is_also_a_builtin_one() -> None:
    kinds = [
        k
        for k in vars(importlib.import_module("knowiso_train.errors")).values()
        if inspect.isclass(k) and issubclass(k, KnowisoError) and k is not KnowisoError
    ]
    assert len(kinds) >= 8
    for kind in kinds:
        builtin = [
            base
            for base in kind.__mro__
            if base.__module__ == "builtins" and base not in (Exception, BaseException, object)
        ]
        assert builtin, kind
        assert str(kind("what to do")) == "what to do"
