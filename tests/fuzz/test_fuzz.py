"""Bad inputs end in a KnowisoError, and leave networks, random states and files as they were."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz.calls import calls
from tests.fuzz.fuzzer import bad_arguments, damaged_files, interrupts


def findings(inputs: Iterator[tuple[str, str, str | None]]) -> list[str]:
    """Return the findings of some inputs, one line each."""
    lines, count = [], 0
    for target, shown, finding in inputs:
        count += 1
        if finding:
            lines.append(f"{target}({shown}): {finding}")
    assert count
    return lines


@pytest.mark.filterwarnings("ignore::knowiso_train.errors.KnowisoWarning")
@pytest.mark.parametrize("target", list(calls()))
def test_the_calls_succeed_without_bad_arguments(target: str) -> None:
    call = calls()[target]()
    call.function(**call.arguments)


@pytest.mark.parametrize("target", list(calls()))
def test_bad_arguments(target: str, request: pytest.FixtureRequest) -> None:
    count = request.config.getoption("--fuzz") // 10
    assert findings(bad_arguments(count, seed=count, targets=[target])) == []


def test_interrupts(request: pytest.FixtureRequest) -> None:
    assert findings(interrupts(1, request.config.getoption("--fuzz") // 10)) == []


def test_damaged_files(request: pytest.FixtureRequest) -> None:
    assert findings(damaged_files(1, request.config.getoption("--fuzz") // 5)) == []
