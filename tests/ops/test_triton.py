"""Triton kernels under Triton's interpreter, in a process of its own, as it is chosen before Triton's first import."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from knowiso_train.ops import gate, gate_orders, gram_residual_energy, residual_energy
from knowiso_train.ops import reference as plain_gate
from knowiso_train.ops.reference import residual_energy as plain_energy
from knowiso_train.ops.triton import dispatch as kernels
from tests.ops.test_operations import both, close, normal

HERE = Path(__file__).parent
runs_kernels = pytest.mark.skipif(
    not (kernels.interpreted() or torch.cuda.is_available()),
    reason="Triton's interpreter is off here; test_kernels_agree_with_the_references_when_interpreted turns it on",
)


@pytest.mark.skipif(kernels.interpreted(), reason="already interpreted")
def test_kernels_agree_with_the_references_when_interpreted() -> None:
    """Run these tests, and those of the operations with kernels, with the kernels."""
    pytest.importorskip("triton")
    chosen = (
        "runs_the or held or blocks or falls or "
        "(TestAgainstTheReference and not torch.float16 and (test_gate or (residual_energy and 1-)))"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-k",
        chosen,
        "test_operations.py",
        "test_triton.py",
    ]
    done = subprocess.run(
        command, cwd=HERE, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=280
    )
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("the interpreter of this Triton cannot work with this NumPy: Triton 3.4 needs NumPy < 2.4")
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@runs_kernels
def test_runs_the_kernels() -> None:
    x = normal(2, 3, 2, 2)
    assert kernels.gate_kernels(x) is not None
    assert kernels.residual_energy_kernel(x.bfloat16(), x, normal(3, 3, 1, 1)) is not None
    assert kernels.residual_energy_kernel(x, x, normal(3, 3, 1, 1)) is None
    assert kernels.gate_kernels(x.double()) is None


@runs_kernels
@pytest.mark.parametrize(("last", "by_gram"), [(False, True), (True, True), (False, False)])
def test_what_runs_the_fixed_map_rounds_it_and_leaves_no_mean_over(last: bool, by_gram: bool) -> None:
    """Use an offset of 30 standard deviations: a bias for the unrounded map would add a third of the energy."""
    x, weight = normal(6, 5, 4, 3, dtype=torch.bfloat16, offset=30.0, last=last), normal(12, 5, seed=2) / 5**0.5
    mean_x = x.double().mean((0, 2, 3))
    y = torch.einsum("dc,nchw->ndhw", weight.double(), x.double() - mean_x.view(-1, 1, 1)) + 0.2 * normal(
        6, 12, 4, 3, dtype=torch.float64, seed=3
    )
    y = y.bfloat16()
    of_mean = y.double().mean((0, 2, 3))
    exact = x.double().requires_grad_()
    residual = (
        y.double()
        - of_mean.view(-1, 1, 1)
        - torch.einsum("dc,nchw->ndhw", weight.double(), exact - mean_x.view(-1, 1, 1))
    )
    residual.square().sum().backward()
    found = gram_residual_energy(
        x.requires_grad_(), y, weight, weight.T @ weight if by_gram else None, mean_x.float(), of_mean.float()
    )
    found.backward()
    torch.testing.assert_close(found.double(), residual.square().sum(), rtol=2e-3, atol=0)
    close(x.grad, exact.grad, torch.bfloat16)


@runs_kernels
def test_runs_the_fixed_map_in_one_graph_when_compiled() -> None:
    """The kernel is chosen within what is traced."""
    x, y, weight = normal(2, 3, 4, 5, dtype=torch.bfloat16), normal(2, 8, 4, 5, dtype=torch.bfloat16), normal(8, 3)
    rest = (weight, weight.T @ weight, weight[0], weight[:, 0])

    def gradient(of: Callable[..., Tensor]) -> Tensor:
        source = x.clone().requires_grad_()
        return torch.autograd.grad(of(source, y, *rest), source)[0]

    assert torch.equal(
        gradient(torch.compile(gram_residual_energy, fullgraph=True, backend="aot_eager")),
        gradient(gram_residual_energy),
    )


@runs_kernels
@pytest.mark.parametrize("last", [False, True])
def test_rows_that_cannot_be_held(monkeypatch: pytest.MonkeyPatch, last: bool) -> None:
    module = kernels.gate_kernels(normal(1))
    monkeypatch.setattr(module, "MAX_HELD_POSITIONS", 4)
    x, h = normal(2, 3, 5, 3, last=last), normal(2, 3, 5, 3, seed=1, offset=0.2, last=last)
    p = torch.tensor(0.4, device=h.device)
    both(gate, plain_gate.gate, [x, h, p], torch.float32)
    both(gate_orders, plain_gate.gate_orders, [torch.stack([x, h, x]), p], torch.float32)


@runs_kernels
@pytest.mark.parametrize(("c", "d"), [(3, 70), (33, 65), (256, 8)])
def test_blocks_that_do_not_divide(c: int, d: int) -> None:
    x, y = normal(3, c, 7, 5, dtype=torch.bfloat16).requires_grad_(), normal(3, d, 7, 5, seed=1, dtype=torch.bfloat16)
    weight, bias, channel = normal(d, c, 1, 1, seed=2) / c**0.5, normal(d, seed=3), normal(d, seed=4).abs()
    energy = residual_energy(x, y, weight, bias, channel)
    energy.mul(1.7).backward()
    exact = x.detach().double().requires_grad_()
    wanted = plain_energy(exact, y.double(), weight.double(), bias.double(), channel.double())
    wanted.mul(1.7).backward()
    close(energy, wanted, torch.bfloat16)
    close(x.grad, exact.grad, torch.bfloat16)


@runs_kernels
def test_falls_back_where_the_kernel_does_not_reach() -> None:
    wide = normal(1, 257, 2, 2, dtype=torch.bfloat16)
    assert kernels.residual_energy_kernel(wide, wide, normal(257, 257, 1, 1)) is None
    assert kernels.residual_energy_kernel(wide, wide, normal(257, 257, 3, 3)) is None


@pytest.mark.skipif(kernels.interpreted(), reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_kernels_compile_for_a_gpu_that_is_not_here(dtype: str) -> None:
    """Compile to machine code of an H100, with every configuration within its shared memory."""
    pytest.importorskip("triton")
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from knowiso_train.ops.triton import gate as of_gate
    from knowiso_train.ops.triton import residual_energy as of_energy

    chip = GPUTarget("cuda", 90, 32)
    halves = {"x_ptr", "h_ptr", "y_ptr", "out_ptr", "up_ptr", "of_x_ptr"}
    grid = {"BLOCK": 256, "ROWS": 4, "ALIGNED": 4}
    tile = {"HAS_BIAS": True, "HAS_CHANNEL": True, "WANTED": True, "FACTOR": tl.bfloat16}
    widest = [
        {**tile, "BLOCK_C": kernels.MAX_SOURCE_CHANNELS, **config} for config in of_energy.RESIDUAL_ENERGY_CONFIGS
    ]
    for kernel, constants in (
        (of_gate._forward, {"ORDERS": 1, "HAS_X": True, "WHOLE": True, **grid}),
        (of_gate._forward, {"ORDERS": 3, "HAS_X": False, "WHOLE": False, **grid}),
        (of_gate._backward, {"ORDERS": 3, **grid}),
        *((of_energy._kernel, constants) for constants in widest if dtype == "bf16"),
    ):
        launch = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
        signature = {
            name: "constexpr"
            if name in constants
            else f"*{dtype if name in halves else 'fp32'}"
            if name.endswith("_ptr")
            else "fp32"
            if name == "eps"
            else "i32"
            for name in kernel.fn.arg_names
        }
        made = compile(
            ASTSource(fn=kernel.fn, signature=signature, constexprs=constants),
            target=chip,
            options={"num_warps": 4, **launch},
        )
        assert made.asm["cubin"]
        assert made.metadata.shared < 227 * 1024


def test_operations_work_without_triton() -> None:
    """Run in a process in which Triton cannot be imported."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from knowiso_train import ops\n"
        "x = torch.ones(1, 2, 3, 3); print(float(ops.gate(x, x, torch.tensor(0.5)).sum()))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
