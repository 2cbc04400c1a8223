"""Time and memory of the custom operators, relative to eager mode and `torch.compile`.

    OMP_NUM_THREADS=1 python -m benchmarks.ops.bench_ops          # CPU, 10 minutes
    python -m benchmarks.ops.bench_ops                            # uses a GPU if there is one, with larger shapes
    python -m benchmarks.ops.bench_ops --quick                    # smoke test, writes no results

Modes: "forward" runs without gradient. "both" is forward and backward to all learned inputs. "backward" is the second
half of "both".

In each round every implementation runs once, in random order. Time is the median over the rounds, with the 10 and 90 %
quantiles. On a GPU it is device time: the work is queued behind a sleep, as in a training step with a full queue;
"host ms" is the launch time. Memory is the peak above inputs and outputs (results and gradients). The limits of the
hardware are measured in the same run: a copy of a large tensor, and a large matrix product of the same precision.
"""

from __future__ import annotations

import argparse
import gc
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.profiling import CLOCKS, peak_allocated_bytes, quantile
from benchmarks.common.results import RESULTS, record, table
from knowiso_train import ops
from knowiso_train.ops import reference as plain_gate
from knowiso_train.ops.reference import moments as plain_moments
from knowiso_train.ops.reference import residual_energy as plain_energy

MODES = ("forward", "backward", "both")
GPU_CYCLES_PER_SECOND = 2e9  # approximately, of a recent GPU


@dataclass(frozen=True)
class Case:
    """Operator at one shape, with its reference and its minimal work.

    Attributes:
        op: Name of the operator.
        shape: Shape, formatted.
        learned: Inputs that get a gradient.
        ours: The operator.
        plain: The reference in plain PyTorch.
        moved: Bytes that must be read and written, by mode.
        products: Floating-point operations, by mode.
        modes: Modes to time.
    """

    op: str
    shape: str
    learned: tuple[Tensor, ...]
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    moved: dict[str, int]
    products: dict[str, int]
    modes: tuple[str, ...] = ("forward", "both")

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape}"


def cases(device: torch.device, dtype: torch.dtype, gpu: bool) -> Iterator[Case]:
    """Yield the operators and shapes for the device."""

    def random_tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    p = torch.tensor(0.4, device=device)
    for n, c, side in (
        ((256, 256, 14), (256, 64, 56), (256, 1024, 14)) if gpu else ((32, 256, 14), (16, 64, 56), (32, 512, 7))
    ):
        x, h = random_tensor(n, c, side, side), random_tensor(n, c, side, side)
        size = x.numel() * x.element_size()
        moved = {"forward": 3 * size, "backward": 3 * size, "both": 6 * size}
        yield Case("gate", format_shape(x), (x, h, p), ops.gate, plain_gate.gate, moved, {}, MODES)
    orders = torch.stack([random_tensor(*((256, 256, 14, 14) if gpu else (16, 256, 14, 14))) for _ in range(3)])
    size = orders.numel() * orders.element_size()
    moved = {"forward": 2 * size, "backward": 3 * size, "both": 5 * size}
    yield Case(
        "gate_orders", format_shape(orders), (orders, p), ops.gate_orders, plain_gate.gate_orders, moved, {}, MODES
    )

    for n, c, d, side in (
        ((256, 256, 256, 14), (256, 128, 512, 28), (256, 512, 2048, 7))
        if gpu
        else ((32, 256, 256, 14), (32, 128, 512, 14))
    ):
        x, y = random_tensor(n, c, side, side), random_tensor(n, d, side, side)
        weight, bias = random_tensor(d, c, 1, 1, dtype=torch.float32) / c**0.5, random_tensor(d, dtype=torch.float32)
        matrix, mean_x, mean_y = weight[:, :, 0, 0].contiguous(), torch.zeros(c, device=device), bias
        one = 2 * n * side**2 * c * d
        shape = f"{format_shape(x)} to {d}"
        yield Case(
            "residual_energy",
            shape,
            (x,),
            lambda x, y=y, w=weight, b=bias: ops.residual_energy(x, y, w, b),
            lambda x, y=y, w=weight, b=bias: plain_energy(x, y, w, b),
            {},
            {"forward": one, "both": 2 * one},
        )
        yield Case(
            "residual_energy, learned",
            shape,
            (x, weight, bias),
            lambda x, w, b, y=y: ops.residual_energy(x, y, w, b),
            lambda x, w, b, y=y: plain_energy(x, y, w, b),
            {},
            {"forward": one, "both": 3 * one},
        )
        if d >= 2 * c:
            gram = matrix.T @ matrix
            yield Case(
                "fixed_map_energy",
                shape,
                (x,),
                lambda x, y=y, w=matrix, g=gram, a=mean_x, b=mean_y: ops.gram_residual_energy(x, y, w, g, a, b),
                lambda x, y=y, w=weight, b=bias: plain_energy(x, y, w, b),
                {},
                {"forward": one, "both": 2 * one},
            )
    for n, c, d, side, k in (
        ((256, 256, 256, 14, 3), (256, 512, 512, 7, 3), (256, 256, 1024, 14, 1))
        if gpu
        else (
            (32, 64, 64, 14, 3),
            (32, 128, 128, 14, 3),
            (32, 128, 256, 7, 3),
            (32, 256, 512, 14, 1),
        )
    ):
        x, y = random_tensor(n, c, side, side), random_tensor(n, d, side, side)
        columns = k * k * c
        flops = 2 * n * side**2 * columns * (columns + d)
        yield Case(
            f"moments {k}x{k}",
            f"{format_shape(x)} to {d}",
            (x,),
            lambda x, y=y, k=k: ops.moments(x, y, k),
            lambda x, y=y, k=k: plain_moments(x, y, k),
            {},
            {"forward": flops},
            ("forward",),
        )


def format_shape(x: Tensor) -> str:
    """Format a shape."""
    return "×".join(map(str, x.shape))


class Run:
    """One implementation of one case."""

    def __init__(self, case: Case, function: Callable[..., Any]) -> None:
        self.function = function
        self.inputs = [tensor.detach().clone().requires_grad_() for tensor in case.learned]
        with torch.no_grad():
            out = function(*self.inputs)
        self.single = isinstance(out, Tensor)
        self.upstream = torch.randn_like(out) if self.single else None
        self.out: Any = None

    def forward(self) -> None:
        with torch.no_grad():
            self.out = self.function(*self.inputs)

    def prepare(self, mode: str) -> None:
        """Compute what the timed part requires."""
        self.gradients: tuple[Tensor, ...] = ()
        self.out = self.function(*self.inputs) if mode == "backward" else None

    def backward(self) -> None:
        self.gradients = torch.autograd.grad(self.out, self.inputs, self.upstream)

    def both(self) -> None:
        self.out = self.function(*self.inputs)
        self.backward()

    def results(self) -> int:
        """Return the bytes of outputs and gradients."""
        outs = [self.out] if self.single else list(self.out)
        return sum(t.numel() * t.element_size() for t in [*outs, *self.gradients])


def time_run(run: Run, mode: str, clock: Callable[[], float], wait: float | None) -> tuple[float, float]:
    """Return the seconds of the work and of its launch.

    A GPU sleeps for `wait` seconds before it starts, so that all of the work is queued.
    """
    run.prepare(mode)
    if wait is None:
        began = clock()
        getattr(run, mode)()
        return (clock() - began,) * 2
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(wait * GPU_CYCLES_PER_SECOND))
    first.record()
    began = clock()
    getattr(run, mode)()
    launched = clock() - began
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000, launched


def peak_memory(run: Run, mode: str, gpu: bool) -> int:
    """Return the peak bytes above inputs and outputs."""
    run.prepare(mode)
    gc.collect()
    if gpu:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        getattr(run, mode)()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            getattr(run, mode)()
        peak = peak_allocated_bytes(profiler)
    return max(0, peak - run.results())


def hardware_limits(
    device: torch.device, dtype: torch.dtype, clock: Callable[[], float], gpu: bool
) -> dict[str, float]:
    """Measure GB/s of a copy (read and write) and GFLOP/s of a matrix product, best of ten."""
    large = torch.randn(2**28 if gpu else 2**24, device=device, dtype=dtype)
    into = torch.empty_like(large)
    side = 8192 if gpu else 1536
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def best(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(10):
            if gpu:
                torch.cuda.synchronize()
            began = clock()
            work()
            if gpu:
                torch.cuda.synchronize()
            times.append(clock() - began)
        return min(times)

    return {
        "copy GB/s": 2 * large.nbytes / best(lambda: into.copy_(large)) / 1e9,
        "product GFLOP/s": 2 * side**3 / best(lambda: a @ b) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=0, help="timed rounds; default: 30 on a CPU, 100 on a GPU")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: processor time, for a busy machine; use with OMP_NUM_THREADS=1",
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tf32", action="store_true", help="allow TF32 in all implementations")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    parser.add_argument("--quick", action="store_true", help="one round, no torch.compile, no results file")
    parser.add_argument("--only", default="", help="part of an operator's name")
    parser.add_argument("--name", help="results file; default: bench_ops, or bench_ops_gpu on a GPU")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.no_compile = 1, True
    gpu = torch.cuda.is_available()
    device, dtype, clock = torch.device("cuda" if gpu else "cpu"), getattr(torch, args.dtype), CLOCKS[args.clock]
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.tf32
    torch.manual_seed(0)
    order, rows = random.Random(0), []
    for case in cases(device, dtype, gpu):
        if args.only not in case.op:
            continue
        functions = {"eager": case.plain, "ours": case.ours}
        if not args.no_compile:
            torch.compiler.reset()
            functions["compiled"] = torch.compile(case.plain)
        runs = {name: Run(case, function) for name, function in functions.items()}
        for mode in case.modes:
            times: dict[str, list[float]] = {name: [] for name in runs}
            hosts: dict[str, list[float]] = {name: [] for name in runs}
            for turn in range((args.rounds or (100 if gpu else 30)) + 3):
                for name in order.sample(list(runs), len(runs)):
                    wait = 2e-4 + 2 * max(hosts[name][-3:], default=0.0) if gpu else None
                    seconds, host = time_run(runs[name], mode, clock, wait)
                    hosts[name] = [*hosts[name], host] if turn else []  # the first run compiles
                    if turn >= 3:
                        times[name].append(seconds)
            peaks = {name: peak_memory(run, mode, gpu) for name, run in runs.items()}
            rows += [
                table_row(case, mode, name, times, peaks)
                | ({"host ms": 1e3 * quantile(hosts[name], 0.5)} if gpu else {})
                for name in runs
            ]
            print(
                f"{case.name}, {mode}: " + ", ".join(f"{n} {1e3 * quantile(t, 0.5):.2f} ms" for n, t in times.items()),
                flush=True,
            )
        del runs
        gc.collect()
    limits = hardware_limits(device, dtype, clock, gpu)
    for row in rows:
        seconds = row["ms"] / 1000
        row["of copy"] = round(row.pop("moved") / seconds / 1e9 / limits["copy GB/s"], 2)
        row["of product"] = round(row.pop("products") / seconds / 1e9 / limits["product GFLOP/s"], 2)
    print(table(rows), "\n", {name: round(value, 1) for name, value in limits.items()})
    targets = compare_with_targets(rows, gpu)
    print("\n".join(f"{name}: {value}" for name, value in targets.items()))
    if args.quick:
        return
    name = args.name or ("bench_ops_gpu" if gpu else "bench_ops")
    driver = {"triton": _version("triton"), "cuda": torch.version.cuda, "tf32": args.tf32, "dtype": args.dtype}
    record(name, {"rows": rows, "ceilings": limits, "targets": targets}, clock=args.clock, **driver)
    plot(rows, RESULTS / f"{name}.png")


def _version(module: str) -> str | None:
    try:
        return str(__import__(module).__version__)
    except ImportError:
        return None


def table_row(case: Case, mode: str, name: str, times: dict[str, list[float]], peaks: dict[str, int]) -> dict[str, Any]:
    """Return the row of one implementation."""
    ms = 1e3 * quantile(times[name], 0.5)
    return {
        "operation": case.op,
        "shape": case.shape,
        "mode": mode,
        "contender": name,
        "ms": ms,
        "10 % .. 90 %": " .. ".join(f"{1e3 * quantile(times[name], q):.2f}" for q in (0.1, 0.9)),
        "of eager": round(quantile(times[name], 0.5) / quantile(times["eager"], 0.5), 3),
        "MiB": round(peaks[name] / 2**20, 2),
        "memory of eager": round(peaks[name] / max(peaks["eager"], 1), 3),
        "moved": case.moved.get(mode, 0),
        "products": case.products.get(mode, 0),
    }


def compare_with_targets(rows: list[dict[str, Any]], gpu: bool) -> dict[str, str]:
    """Return each target with the worst measured case."""

    def worst(op: str, key: str, mode: str = "", largest: bool = True) -> float:
        values = [
            row[key]
            for row in rows
            if row["contender"] == "ours" and row["operation"].startswith(op) and mode in row["mode"]
        ]
        return (max if largest else min)(values, default=float("nan"))

    def against_compiled(op: str) -> float:
        times = {(row["operation"], row["shape"], row["mode"], row["contender"]): row["ms"] for row in rows}
        if not any(row["contender"] == "compiled" for row in rows):
            return float("nan")
        speedups = [
            times[name, shape, mode, "compiled"] / ms
            for (name, shape, mode, contender), ms in times.items()
            if contender == "ours" and name == op
        ]
        return min(speedups, default=float("nan"))

    if not gpu:
        return {
            f"{op}: {name} of eager at most {limit}": f"{worst(op, key):.3f}"
            for op in ("residual_energy", "moments")
            for name, key, limit in (("time", "of eager", "1.05"), ("memory", "memory of eager", "1/3"))
        }
    return {
        "gate: of copy bandwidth, forward, at least 0.8": f"{worst('gate', 'of copy', 'forward', largest=False):.2f}",
        "gate: of copy bandwidth, backward, at least 0.8": f"{worst('gate', 'of copy', 'backward', largest=False):.2f}",
        "gate: times eager's speed, at least 3": f"{1 / worst('gate', 'of eager'):.2f}",
        "gate: times the compiled speed, at least 1.2": f"{against_compiled('gate'):.2f}",
        "residual_energy: of a product's rate, forward, at least 0.7": (
            f"{worst('residual_energy', 'of product', 'forward', largest=False):.2f}"
        ),
        "residual_energy: of a product's rate, both, at least 0.7": (
            f"{worst('residual_energy', 'of product', 'both', largest=False):.2f}"
        ),
        "residual_energy: memory of eager at most 0.1": f"{worst('residual_energy', 'memory of eager'):.3f}",
        "moments 3x3: times eager's speed, at least 3": f"{1 / worst('moments 3x3', 'of eager'):.2f}",
        "moments 3x3: memory of eager at most 1/9": f"{worst('moments 3x3', 'memory of eager'):.3f}",
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot time and memory relative to eager mode, one bar per implementation."""
    import matplotlib.pyplot as plt

    labels = list(dict.fromkeys((row["operation"], row["shape"], row["mode"]) for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(12, 0.36 * len(labels) + 1.2), sharey=True, layout="constrained")
    colors = {"eager": "#b9bec7", "compiled": "#e2a458", "ours": "#2f6f9f"}
    for axis, key, title in zip(
        axes, ("of eager", "memory of eager"), ("time", "memory above inputs and outputs"), strict=True
    ):
        values = {(row["operation"], row["shape"], row["mode"], row["contender"]): row[key] for row in rows}
        contenders = [name for name in ("compiled", "ours") if any(row["contender"] == name for row in rows)]
        for turn, name in enumerate(contenders):
            bar_positions = [index + 0.38 * (turn - (len(contenders) - 1) / 2) for index in range(len(labels))]
            axis.barh(
                bar_positions,
                [min(values[(*label, name)], 2.0) for label in labels],
                height=0.36,
                color=colors[name],
                label=name,
            )
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(xlim=(0, 2.02), xlabel="1 is the eager reference", title=title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(labels)), [f"{op}  {shape}  {mode}" for op, shape, mode in labels], fontsize=8)
    axes[0].invert_yaxis()
    axes[1].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
