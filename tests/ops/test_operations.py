"""Operations against their float64 references: dtypes, layouts, odd shapes, gradients, `opcheck` and compilation.

All tests run on a GPU if one is available. `test_triton.py` runs some of them once more with Triton's interpreter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, library

from knowiso_train.errors import ShapeError
from knowiso_train.ops import gate, gate_orders, gram_residual_energy, moments, residual_energy
from knowiso_train.ops import moments as moments_op
from knowiso_train.ops import reference as plain_gate
from knowiso_train.ops.reference import moments as plain_moments
from knowiso_train.ops.reference import residual_energy as plain_energy

# (N, C, H, W): odd, one channel, one position, one image
SHAPES = [(3, 41, 13, 7), (2, 1, 5, 6), (4, 6, 1, 1), (1, 3, 1, 9)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the largest value
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def exact_and_poisoned() -> Iterator[None]:
    """Fill uninitialized memory with NaN, by `use_deterministic_algorithms`, and disable TF32."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def test_memory_is_poisoned() -> None:
    assert torch.empty(100, device=DEVICE).isnan().all()


def close(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    scale = float(exact.detach().abs().max()) + 1e-6
    torch.testing.assert_close(found.detach().double(), exact.detach().double(), rtol=0, atol=TOLERANCE[dtype] * scale)


def normal(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, offset: float = 0.0, last: bool = False
) -> Tensor:
    made = (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset).to(
        DEVICE, dtype
    )
    return made.to(memory_format=torch.channels_last) if last and made.ndim == 4 else made


def both(of: Callable[..., Any], plain: Callable[..., Any], inputs: list[Tensor | None], dtype: torch.dtype) -> None:
    """Values and gradients under random upstream gradients; the reference runs in float64 on the very same numbers."""
    own = [
        None if x is None else x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs
    ]
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    found, wanted = of(*own), plain(*exact)
    found, wanted = ((out,) if isinstance(out, Tensor) else out for out in (found, wanted))
    pulls = [normal(*out.shape, dtype=torch.float64, seed=7 + i) for i, out in enumerate(found)]
    torch.autograd.backward(found, [pull.to(out.dtype) for pull, out in zip(pulls, found, strict=True)])
    torch.autograd.backward(wanted, pulls)
    for mine, theirs in zip(found, wanted, strict=True):
        close(mine, theirs, dtype)
    for mine, theirs in zip(own, exact, strict=True):
        if mine is not None:
            assert (mine.grad is None) == (theirs.grad is None)
            if mine.grad is not None:
                assert mine.grad.dtype == mine.dtype
                close(mine.grad, theirs.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
class TestAgainstTheReference:
    def test_gate(self, shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> None:
        x, h = (normal(*shape, dtype=dtype, seed=s, offset=0.3, last=last) for s in (1, 2))
        both(gate, plain_gate.gate, [x, h, torch.tensor(0.4, device=DEVICE)], dtype)
        both(
            lambda h, p: gate(None, h, p),
            lambda h, p: plain_gate.gate(None, h, p),
            [h, torch.tensor(0.7, device=DEVICE)],
            dtype,
        )

    def test_gate_orders(self, shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> None:
        orders = torch.stack([normal(*shape, dtype=dtype, seed=s, last=last) for s in (1, 2, 3)])
        if dtype != torch.float32:  # the sign of the sum decides, and a half rounds sums
            orders = orders * (orders.double().sum(0).abs() > 0.1)
        both(gate_orders, plain_gate.gate_orders, [orders, torch.tensor(0.4, device=DEVICE)], dtype)

    @pytest.mark.parametrize("k", [1, 3])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_residual_energy(
        self, shape: tuple[int, ...], dtype: torch.dtype, last: bool, k: int, weighted: bool
    ) -> None:
        n, c, *grid = shape
        x, y = normal(*shape, dtype=dtype, last=last), normal(n, 5, *grid, dtype=dtype, seed=1, last=last)
        weight, bias, channel = (
            normal(5, c, k, k, seed=2) / (c * k * k) ** 0.5,
            normal(5, seed=3),
            normal(5, seed=4).abs() if weighted else None,
        )
        both(
            lambda x, weight, bias: residual_energy(x, y, weight, bias, channel),
            lambda x, weight, bias: plain_energy(
                x, y.double(), weight, bias, None if channel is None else channel.double()
            ),
            [x, weight, bias],
            torch.float32 if dtype == torch.float32 else dtype,
        )

    @pytest.mark.parametrize("k", [1, 3, 5])
    def test_moments(self, shape: tuple[int, ...], dtype: torch.dtype, last: bool, k: int) -> None:
        n, _, *grid = shape
        x, y = (
            normal(*shape, dtype=dtype, offset=2, last=last),
            normal(n, 3, *grid, dtype=dtype, seed=1, offset=-3, last=last),
        )
        both(lambda x, y: moments(x, y, k), lambda x, y: plain_moments(x, y, k), [x, y], dtype)


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (2, 3), (3, 2), (6, 5)], ids=str)
@pytest.mark.parametrize("k", [3, 5, 7])
def test_implicit_patches_equal_the_reference_to_rounding(grid: tuple[int, int], k: int) -> None:
    x, y = normal(3, 2, *grid, dtype=torch.float64, offset=5), normal(3, 3, *grid, dtype=torch.float64, seed=1)
    for mine, theirs in zip(moments(x, y, k), plain_moments(x, y, k), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_explicit_patches_in_bands_equal_the_reference(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    """GPUs, and maps of one position, use this form."""
    module = sys.modules["knowiso_train.ops.moments"]
    x, y = normal(4, 3, 5, 6, dtype=torch.float64, offset=2), normal(4, 7, 5, 6, dtype=torch.float64, seed=1, offset=-1)
    monkeypatch.setattr(
        module, "_bands", lambda columns, _: [slice(0, 2), slice(2, columns - 1), slice(columns - 1, columns)]
    )
    monkeypatch.setattr(module, "MOMENTS_CHUNK_BYTES", 1)
    for found, wanted in zip(module._explicit_moments(x, y, k), plain_moments(x, y, k), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(("device", "max_bands"), [("cuda", 4), ("cpu", 8)])
@pytest.mark.parametrize("columns", [1, 64, 129, 512, 513, 2304, 4609])
def test_bands_are_all_of_the_columns_once(columns: int, device: str, max_bands: int) -> None:
    bands = sys.modules["knowiso_train.ops.moments"]._bands(columns, torch.device(device))
    assert [at for band in bands for at in range(band.start, band.stop)] == list(range(columns))
    assert len(bands) <= max_bands


def test_a_wide_source_equals_the_reference() -> None:
    x, y = normal(3, 259, 2, 3, dtype=torch.float64, offset=5), normal(3, 5, 2, 3, dtype=torch.float64, seed=1)
    for found, wanted in zip(moments(x, y), plain_moments(x, y), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-11)


def test_many_chunks_are_one_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, weight = normal(9, 4, 5, 6, offset=1), normal(9, 7, 5, 6, seed=1), normal(7, 4, 1, 1, seed=2)
    whole = [
        *moments(x, y, 3),
        *moments(x, y, 1),
        residual_energy(x, y, weight),
        gram_residual_energy(x, y, *of_map(weight)),
    ]
    for module, name in (("moments", "MOMENTS"), ("residual_energy", "ENERGY"), ("residual_energy", "GRAM")):
        monkeypatch.setattr(sys.modules[f"knowiso_train.ops.{module}"], f"{name}_CHUNK_BYTES", 1)
    single = [
        *moments(x, y, 3),
        *moments(x, y, 1),
        residual_energy(x, y, weight),
        gram_residual_energy(x, y, *of_map(weight)),
    ]
    for one, many in zip(whole, single, strict=True):
        torch.testing.assert_close(one, many, rtol=2e-5, atol=2e-4)


def of_map(weight: Tensor) -> tuple[Tensor, ...]:
    matrix = weight[:, :, 0, 0]
    return matrix, matrix.T @ matrix, matrix.new_zeros(matrix.shape[1]), matrix.new_zeros(len(matrix))


class TestGradcheck:
    """In float64, references and operations alike."""

    @pytest.mark.parametrize("op", [gate, plain_gate.gate])
    def test_gate(self, op: Any) -> None:
        p = torch.tensor(0.4, device=DEVICE, dtype=torch.float64, requires_grad=True)
        # Σ is 1 at one position; elsewhere it is held, which differences do not know
        h = normal(2, 3, 1, 1, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, h, p: op(x, h, p), (normal(2, 3, 1, 1, dtype=torch.float64, seed=1).requires_grad_(), h, p)
        )

    @pytest.mark.parametrize("op", [gate_orders, plain_gate.gate_orders])
    def test_gate_orders(self, op: Any) -> None:
        p = torch.tensor(0.4, device=DEVICE, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(op, (normal(2, 3, 2, 1, 1, dtype=torch.float64).requires_grad_(), p))

    @pytest.mark.parametrize("op", [residual_energy, plain_energy])
    @pytest.mark.parametrize("k", [1, 3])
    def test_residual_energy(self, op: Any, k: int) -> None:
        y = normal(2, 4, 2, 3, dtype=torch.float64, seed=3)
        shapes = ((2, 2, 2, 3), (4, 2, k, k), (4,))
        x, weight, bias = (
            normal(*shape, dtype=torch.float64, seed=s).requires_grad_() for s, shape in enumerate(shapes)
        )
        assert torch.autograd.gradcheck(lambda x, weight, bias: op(x, y, weight, bias), (x, weight, bias))

    @pytest.mark.parametrize("op", [moments, plain_moments])
    @pytest.mark.parametrize("k", [1, 3])
    def test_moments(self, op: Any, k: int) -> None:
        x, y = (
            normal(2, 2, 2, 3, dtype=torch.float64).requires_grad_(),
            normal(2, 2, 2, 3, dtype=torch.float64, seed=1).requires_grad_(),
        )
        assert torch.autograd.gradcheck(lambda x, y: op(x, y, k), (x, y))


H = normal(2, 3, 4, 5)
P = torch.tensor(0.4, device=DEVICE)
OPS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "gate": ("gate", (normal(2, 3, 4, 5, seed=1), H, P)),
    "gate alone": ("gate", (None, H, P)),
    "gate_backward": ("gate_backward", (H, H, torch.ones(2, 3, device=DEVICE), P)),
    "gate_orders": ("gate_orders", (normal(2, 2, 3, 4, 5), P)),
    "gate_orders_backward": (
        "gate_orders_backward",
        (normal(2, 2, 3, 4, 5), normal(2, 2, 3, 4, 5), torch.ones(2, 3, device=DEVICE), P),
    ),
    "residual_energy": (
        "residual_energy",
        (H, normal(2, 6, 4, 5), normal(6, 3, 1, 1), normal(6), None, True, True, True),
    ),
    "residual_energy, frozen map": (
        "residual_energy",
        (H, normal(2, 6, 4, 5), normal(6, 3, 3, 3), None, normal(6).abs(), True, False, False),
    ),
    "fixed_map_energy": ("fixed_map_energy", (H, normal(2, 6, 4, 5), *of_map(normal(6, 3, 1, 1)))),
    "moments": ("moments", (H, normal(2, 6, 4, 5), 3)),
}


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    """Schema, fake kernel (also with changing shapes), autograd registration."""
    op, inputs = OPS[name]
    asked = inputs[-3:] if op == "residual_energy" else (True,) if op == "fixed_map_energy" else ()
    wanted = (
        {0: True, 2: asked[1:2] == (True,), 3: asked[2:] == (True,)}
        if asked
        else dict.fromkeys(range(len(inputs)), "backward" not in op)
    )
    inputs = tuple(
        value.clone().requires_grad_() if isinstance(value, Tensor) and wanted.get(at, False) else value
        for at, value in enumerate(inputs)
    )
    library.opcheck(getattr(torch.ops.knowiso, op).default, inputs)


def test_one_graph_when_compiled() -> None:
    """`fullgraph=True`, forward and backward, equal to eager."""

    def step(x: Tensor, h: Tensor, p: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        opened = gate(x, h, p)
        parts = gate_orders(torch.stack([x, opened]), p)
        m = moments_op(opened, y, 3)
        return (
            residual_energy(parts.sum(0), y, weight)
            + gram_residual_energy(opened, y, *of_map(weight.detach()))
            + m[2].sum()
            + m[3].square().sum()
        )

    inputs = (normal(2, 3, 4, 5, seed=1), H, P, normal(6, 3, 1, 1), normal(2, 6, 4, 5))
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        own = [value.clone().requires_grad_() for value in inputs]
        loss = run(*own)
        loss.backward()
        results.append([loss, *(value.grad for value in own if value.grad is not None)])
    assert len(results[0]) == len(results[1]) == 6
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_only_what_is_asked_for_is_made() -> None:
    x, y, weight = normal(2, 3, 4, 5), normal(2, 6, 4, 5), normal(6, 3, 1, 1)
    assert not residual_energy(x, y, weight).requires_grad
    residual_energy(x.requires_grad_(), y, weight).backward()
    assert x.grad is not None
    with torch.no_grad():
        assert not residual_energy(x, y, weight.requires_grad_()).requires_grad


@pytest.mark.parametrize("k", [1, 3])
def test_gradients_that_halves_hold_only_as_a_mean(k: int) -> None:
    """A sum's gradient overflows float16 before the mean is taken, and the factor of the mean vanishes in it."""
    x, weight = (
        torch.full((8, 4, 8, 8), 100.0, dtype=torch.float16),
        torch.full((4, 4, k, k), 50.0, dtype=torch.float16),
    )
    y = torch.full((8, 4, 8, 8), -300.0, dtype=torch.float16)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    (plain_energy(exact[0], y.double(), exact[1]) * 1e-9).backward()
    ours = [t.requires_grad_() for t in (x, weight)]
    (residual_energy(ours[0], y, ours[1]) * 1e-9).backward()
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), true.grad, rtol=2e-3, atol=0)


def test_the_gram_form_holds_gradients_of_halves_too() -> None:
    x, weight = torch.full((8, 4, 8, 8), 100.0, dtype=torch.float16, requires_grad=True), torch.full((8, 4), 50.0)
    y = torch.full((8, 8, 8, 8), -300.0)
    (gram_residual_energy(x, y, weight, weight.T @ weight, torch.zeros(4), torch.zeros(8)) * 1e-9).backward()
    true = 2e-9 * 8 * 50.0 * (4 * 50.0 * 100.0 + 300.0)
    torch.testing.assert_close(x.grad.double(), torch.full((8, 4, 8, 8), true, dtype=torch.float64), rtol=2e-3, atol=0)


WRONG: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    (gate, (H, torch.zeros(0, 3, 4, 5), P)),
    (gate, (torch.zeros(2, 3, 4, 6), H, P)),
    (gate, (None, H, torch.ones(2))),
    (gate_orders, (H, P)),
    (gate_orders, (torch.zeros(2, 0, 3, 4, 5), P)),
    (residual_energy, (torch.zeros(0, 3, 4, 5), torch.zeros(0, 6, 4, 5), torch.zeros(6, 3, 1, 1))),
    (residual_energy, (H, torch.zeros(2, 6, 4, 4), torch.zeros(6, 3, 1, 1))),
    (residual_energy, (H, torch.zeros(2, 6, 4, 5), torch.zeros(6, 3, 2, 2))),
    (moments, (torch.zeros(0, 3, 4, 5), torch.zeros(0, 6, 4, 5))),
    (moments, (H, torch.zeros(2, 6, 4, 5), 2)),
]


@pytest.mark.parametrize(("op", "inputs"), WRONG)
def test_what_does_not_fit_is_an_error_with_the_shapes(op: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
    with pytest.raises(ShapeError, match="expected"):
        op(*inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gate_of_a_constant_map_in_half_precision_is_finite(dtype: torch.dtype) -> None:
    """1 / σ of a constant map is 1e5, more than float16 can hold; sums of 4,096 products are more than it can add."""
    p = torch.tensor(0.9, device=DEVICE, requires_grad=True)
    for h in (torch.zeros(1, 2, 64, 64), torch.randn(1, 2, 64, 64) + 5):
        leaf = h.to(DEVICE, dtype).requires_grad_()
        exact = leaf.detach().double().requires_grad_()
        exact_p = p.detach().double().requires_grad_()
        out, plain = gate(None, leaf, p), plain_gate.gate(None, exact, exact_p)
        close(out, plain, dtype)
        upstream = torch.full_like(out, 8.0)
        found = torch.autograd.grad(out, [leaf, p], upstream)
        wanted = torch.autograd.grad(plain, [exact, exact_p], upstream.double())
        for a, b in zip(found, wanted, strict=True):
            assert a.isfinite().all()
            close(a, b, dtype)
        orders = torch.stack([leaf.detach() / 2, leaf.detach() / 2])
        assert gate_orders(orders, p).isfinite().all()
