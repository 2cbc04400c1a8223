"""Products in full float32, whichever of PyTorch's ways the user takes to allow less."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from knowiso_train.ops import full_precision
from knowiso_train.regression import batch_moments

NEW = hasattr(torch.backends.mkldnn, "matmul") and hasattr(torch.backends.cuda.matmul, "fp32_precision")
WAYS = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "cuda": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "mkldnn": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
}


@pytest.fixture(autouse=True)
def afterwards() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def settings() -> tuple[str, ...]:
    try:
        known = torch.get_float32_matmul_precision()
    except RuntimeError:
        known = "mixed"
    new = (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision) if NEW else ()
    return known, *new


@pytest.mark.parametrize("way", WAYS)
def test_it_is_full_inside_and_as_before_afterwards(way: str) -> None:
    if way in ("cuda", "mkldnn") and not NEW:
        pytest.skip("came with torch 2.9")
    WAYS[way]()
    before = settings()
    inside: list[tuple[str, ...]] = []

    def work() -> None:
        with full_precision(torch.device("cpu")):
            inside.append(settings())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert inside == [("highest", *["ieee"] * (len(before) - 1))]
    assert inside != [before]
    assert settings() == before


@pytest.mark.parametrize("way", WAYS)
def test_moments_do_not_mind_the_way(way: str) -> None:
    """They ended in PyTorch's error about mixed ways where only the new one was used."""
    if way in ("cuda", "mkldnn") and not NEW:
        pytest.skip("came with torch 2.9")
    x, y = torch.randn(8, 3, 4, 4), torch.randn(8, 2, 4, 4)
    plain = batch_moments(x, y)
    WAYS[way]()
    assert torch.equal(batch_moments(x, y).xx, plain.xx)
