"""Time and memory of a training step: the loss, plain distillation and published feature losses.

    OMP_NUM_THREADS=2 python -m benchmarks.distill.bench_loss     # CPU, 15 minutes
    python -m benchmarks.distill.bench_loss                       # uses a GPU if there is one: 224 pixels, batch 128
    python -m benchmarks.distill.bench_loss --autocast            # bfloat16, on a GPU
    python -m benchmarks.distill.bench_loss --quick               # smoke test, writes no results

Every method has its own networks, which stay in memory. In each round every method runs one complete step (forward,
backward, optimizer), in random order. A closed form adds every second batch to its moments and is solved in every 10th
step. Ratios are of medians over each kind of step: adding, not adding, refreshing. "with refresh" weights these by
frequency. "10 % .. 90 %" are quantiles of ratios within a round. Every feature loss is added to teacher + KD, so all
ratios are relative to that.

A timed step starts and ends with an idle device, so it includes the launch time of the host. In training, the host
runs ahead of a GPU. "in a row" is therefore the time of twenty steps without synchronization, the median of three
interleaved runs.

Peak memory includes weights, optimizer and state, over one refreshing and one plain step. On a GPU it comes from
PyTorch's allocator, on a CPU from the profiler's record of allocations, which excludes the scratch memory of oneDNN.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from benchmarks.baselines.distillation.hints import AttentionTransfer, FitNet
from benchmarks.baselines.distillation.review import ReviewKD
from benchmarks.common.models import CifarResNet
from benchmarks.common.profiling import CLOCKS, peak_allocated_bytes, quantile
from benchmarks.common.results import record, table
from knowiso_train import IsomorphismLoss
from knowiso_train.distillation import kd_loss
from knowiso_train.distillation._closed_form_map import updates_moments

REFRESH_INTERVAL = 10  # the library's default
STEPS_PER_RUN, NUM_RUNS = 2 * REFRESH_INTERVAL, 3
BASE, HINTS, OURS = "teacher + KD", "+ FitNet", "+ ours"
BASELINES: dict[str, Callable[[list[int], list[int]], nn.Module]] = {
    HINTS: FitNet,
    "+ attention transfer": lambda *_: AttentionTransfer(),
    "+ ReviewKD": ReviewKD,
}
LOSS_OPTIONS: dict[str, dict[str, Any]] = {
    OURS: {},
    "+ ours, 1×1 maps": {"kernel_size": 1},
    "+ ours, learned, order 0": {"solver": "learned", "order": 0},
    "+ ours, learned, order 1": {"solver": "learned", "order": 1},
    "+ ours, consensus, one peer": {"target": "consensus"},
}
CONTENDERS = ["student alone", "student + teacher forward", BASE, *BASELINES, *LOSS_OPTIONS]


@dataclass(frozen=True)
class Case:
    """Student, teacher and peer with the layers that are paired and the size of the images.

    Paired layers have equal names.
    """

    name: str
    networks: tuple[Callable[[], nn.Module], Callable[[], nn.Module], Callable[[], nn.Module]]
    layers: tuple[str, ...]
    batch: int
    side: int


def cases(gpu: bool) -> list[Case]:
    """Return the pairs of networks for the device."""
    large = tuple(
        lambda name=name: timm.create_model(name, num_classes=1000) for name in ("resnet18", "resnet50", "resnet34")
    )
    small = tuple(lambda depth=depth: CifarResNet(depth) for depth in (20, 56, 44))
    return [
        Case("resnet18 ← resnet50", large, ("layer2", "layer3", "layer4"), *((128, 224) if gpu else (32, 112))),
        Case("resnet20 ← resnet56", small, ("layer1", "layer2", "layer3"), 128, 32),
    ]


class Contender:
    """Networks, losses, optimizer and training step of one method."""

    def __init__(self, kind: str, case: Case, device: torch.device, autocast: bool) -> None:
        torch.manual_seed(0)
        self.kind, self.autocast, self.device = kind, autocast, device
        self.images = torch.randn(case.batch, 3, case.side, case.side, device=device)
        self.labels = torch.randint(10, (case.batch,), device=device)
        student, teacher, peer = case.networks
        self.student = student().to(device)
        self.frozen = [
            with_recomputed_statistics(make().to(device), self.images)
            for make in ((teacher, peer) if "peer" in kind else (teacher,))
        ]
        self.teacher = self.frozen[0]
        self.iso: IsomorphismLoss | None = None
        self.baseline: nn.Module | None = None
        self.student_features: dict[str, Tensor] = {}
        self.teacher_features: dict[str, Tensor] = {}
        if kind in BASELINES:
            self.baseline = self._baseline(case)
        if kind in LOSS_OPTIONS:
            self.iso = IsomorphismLoss(
                self.student,
                self.teacher,
                case.layers,
                refresh=REFRESH_INTERVAL,
                peers=self.frozen[1:],
                **LOSS_OPTIONS[kind],
            )
            self.iso.to(device).attach()
        self.optimizer = torch.optim.SGD(
            [*self.student.parameters(), *self.loss_module().parameters()], lr=1e-3, momentum=0.9, weight_decay=1e-4
        )
        self.steps = 0

    def loss_module(self) -> nn.Module:
        """Return the module of the loss, or an empty one."""
        return self.iso or self.baseline or nn.Module()

    def _baseline(self, case: Case) -> nn.Module:
        for model, features in ((self.student, self.student_features), (self.teacher, self.teacher_features)):
            for layer in case.layers:
                model.get_submodule(layer).register_forward_hook(
                    lambda _m, _x, out, layer=layer, features=features: features.update({layer: out})
                )
        with torch.no_grad():
            self.student.eval()(self.images[:2]), self.student.train(), self.teacher(self.images[:2])
        widths = [
            [feature.shape[1] for feature in features.values()]
            for features in (self.student_features, self.teacher_features)
        ]
        return BASELINES[self.kind](*widths).to(self.device)

    def step(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits = self.student(self.images)
            loss = F.cross_entropy(logits, self.labels)
            if self.iso is not None:
                loss = loss + self.iso() + kd_loss(logits, self.iso.teacher_output)
            elif self.kind != "student alone":
                loss = loss + self._distillation_loss(logits)
        loss.backward()
        self.optimizer.step()
        self.student_features.clear(), self.teacher_features.clear()
        self.steps += 1

    def _distillation_loss(self, logits: Tensor) -> Tensor:
        with torch.no_grad():
            output = self.teacher(self.images)
        loss = 0 * logits.sum() if self.kind == "student + teacher forward" else kd_loss(logits, output)
        return (
            loss
            if self.baseline is None
            else loss + self.baseline(list(self.student_features.values()), list(self.teacher_features.values()))
        )

    def warm_up(self) -> None:
        """Train until every map is ready and closed forms are due to be refreshed.

        All methods then refresh in the same rounds.
        """
        while self.steps < REFRESH_INTERVAL or self.steps % REFRESH_INTERVAL or not self.is_active():
            if self.steps >= 20 * REFRESH_INTERVAL:
                raise RuntimeError(f"{self.kind}: the loss is not on after {self.steps} steps")
            if self.iso is None and self.steps >= 3:
                self.steps = REFRESH_INTERVAL  # these have no map to wait for
            else:
                self.step()

    def is_active(self) -> bool:
        return self.iso is None or all(feature_map.ready for feature_map in self.iso.maps.values())

    def held_bytes(self) -> int:
        """Return the bytes held between steps: images, networks, loss, optimizer."""
        tensors = [self.images, self.labels]
        for module in (self.student, *self.frozen, self.loss_module()):
            tensors += [*module.parameters(), *module.buffers()]
        tensors += [
            value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        ]
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def with_recomputed_statistics(model: nn.Module, images: Tensor) -> nn.Module:
    """Freeze a network after computing its batch-norm statistics on the images.

    Its features then have ordinary magnitudes.
    """
    with torch.no_grad():
        for _ in range(3):
            model.train()(images)
    return model.eval().requires_grad_(False)


def time_steps(contender: Contender, clock: Callable[[], float], steps: int = 1) -> float:
    """Return the seconds per step of consecutive steps."""
    synchronize(contender.device)
    began = clock()
    for _ in range(steps):
        contender.step()
    synchronize(contender.device)
    return (clock() - began) / steps


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(contender: Contender) -> int:
    """Return the peak bytes of a refreshing and a plain step, with all that is held between steps."""
    contender.optimizer.zero_grad()
    if contender.device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contender.step(), contender.step()
        torch.cuda.synchronize()
        return contender.held_bytes() + torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        contender.step(), contender.step()
    return contender.held_bytes() + peak_allocated_bytes(profiler)


def table_rows(times: dict[str, list[float]], first: dict[str, int], peaks: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Yield the row of each method.

    Args:
        times: Seconds of each method's steps.
        first: Index of each method's first timed step, a multiple of `REFRESH_INTERVAL`.
        peaks: Peak memory of each method in bytes.
    """
    rounds = range(len(times[BASE]))
    refreshed, plain = [i for i in rounds if i % REFRESH_INTERVAL == 0], [i for i in rounds if i % REFRESH_INTERVAL]

    def ratios(kind: str, rounds: list[int]) -> list[float]:
        return [times[kind][i] / times[BASE][i] for i in rounds]

    def median(kind: str, rounds: list[int]) -> float:
        return quantile([times[kind][i] for i in rounds], 0.5)

    for kind in times:
        refresh_ratio = median(kind, refreshed) / median(BASE, refreshed)
        parts = [[i for i in plain if updates_moments(first[kind] + i) == joined] for joined in (False, True)]
        plain_ratio = sum(len(part) * median(kind, part) / median(BASE, part) for part in parts if part) / len(plain)
        yield {
            "contender": kind,
            "ms": 1000 * median(kind, plain),
            f"of {BASE}": round(plain_ratio, 3),
            "10 % .. 90 %": " .. ".join(f"{quantile(ratios(kind, plain), q):.3f}" for q in (0.1, 0.9)),
            "refreshing step": round(refresh_ratio, 3),
            "with refresh": round(((REFRESH_INTERVAL - 1) * plain_ratio + refresh_ratio) / REFRESH_INTERVAL, 3),
            "peak MiB": round(peaks[kind] / 2**20, 1),
            "memory": round(peaks[kind] / peaks[BASE], 3),
        }


def compare_with_targets(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare with the targets.

    They are at most 5 % time and 10 % memory over teacher + KD, and less than FitNet with its adapters.
    """
    ours, hints = (next(row for row in rows if row["contender"] == kind) for kind in (OURS, HINTS))
    time_over, memory_over = ours["with refresh"] - 1, ours["memory"] - 1
    return {
        "time over teacher + KD": f"{time_over:+.1%}",
        "within 5 %": time_over <= 0.05,
        "memory over teacher + KD": f"{memory_over:+.1%}",
        "within 10 %": memory_over <= 0.1,
        "FitNet's time over": f"{hints['with refresh'] - 1:+.1%}",
        "FitNet's memory over": f"{hints['memory'] - 1:+.1%}",
        "less time than FitNet": ours["with refresh"] < hints["with refresh"],
        "less memory than FitNet": ours["memory"] < hints["memory"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=0, help="a multiple of 10; default: 40 on a CPU, 100 on a GPU")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: processor time, for a busy machine; use with OMP_NUM_THREADS=1",
    )
    parser.add_argument("--autocast", action="store_true", help="bfloat16")
    parser.add_argument("--only", nargs="*", help="methods; the targets need all")
    parser.add_argument("--case", help="part of a case's name")
    parser.add_argument("--batch", type=int, help="images per step; default: that of the case")
    parser.add_argument("--side", type=int, help="height and width in pixels; default: that of the case")
    parser.add_argument("--name", help="results file; default: bench_loss, or bench_loss_gpu on a GPU")
    parser.add_argument("--quick", action="store_true", help="ten rounds of small batches, no results file")
    args = parser.parse_args()
    if args.quick:
        args.case, args.batch, args.side, args.rounds = "resnet20", 8, 32, 10
    gpu = torch.cuda.is_available()
    device, rounds = torch.device("cuda" if gpu else "cpu"), args.rounds or (100 if gpu else 40)
    torch.backends.cudnn.benchmark = True
    figures: dict[str, Any] = {}
    for case in cases(gpu):
        if args.case and args.case not in case.name:
            continue
        case = Case(case.name, case.networks, case.layers, args.batch or case.batch, args.side or case.side)
        contenders = [Contender(kind, case, device, args.autocast) for kind in args.only or CONTENDERS]
        for contender in tqdm(contenders, f"{case.name}, warm up"):
            contender.warm_up()
        times: dict[str, list[float]] = {contender.kind: [] for contender in contenders}
        first = {contender.kind: contender.steps for contender in contenders}
        order = random.Random(0)
        for _ in tqdm(range(rounds), case.name):
            for contender in order.sample(contenders, len(contenders)):
                times[contender.kind].append(time_steps(contender, CLOCKS[args.clock]))
        rows = list(table_rows(times, first, {contender.kind: peak_memory(contender) for contender in contenders}))
        if gpu:
            runs: dict[str, list[float]] = {contender.kind: [] for contender in contenders}
            for _ in range(NUM_RUNS):
                for contender in order.sample(contenders, len(contenders)):
                    runs[contender.kind].append(time_steps(contender, CLOCKS[args.clock], STEPS_PER_RUN))
            medians = {kind: quantile(run_times, 0.5) for kind, run_times in runs.items()}
            for row in rows:
                row["in a row, ms"] = round(1000 * medians[row["contender"]], 2)
                row["in a row"] = round(medians[row["contender"]] / medians[BASE], 3)
        print(f"{case.name}, {case.batch} images of {case.side} pixels, {rounds} rounds\n{table(rows)}", flush=True)
        figures[case.name] = {
            "batch": case.batch,
            "pixels": case.side,
            "layers": case.layers,
            "rows": rows,
            "seconds": {kind: [round(t, 5) for t in step_times] for kind, step_times in times.items()},
        }
        if not args.only:
            figures[case.name]["target"] = compare_with_targets(rows)
            print(figures[case.name]["target"], flush=True)
        for contender in contenders:
            if contender.iso is not None:
                contender.iso.detach()
    if args.quick:
        return
    record(
        args.name or ("bench_loss_gpu" if gpu else "bench_loss"),
        figures,
        rounds=rounds,
        clock=args.clock,
        autocast=args.autocast,
        refresh=REFRESH_INTERVAL,
        load=os.getloadavg(),
    )


if __name__ == "__main__":
    main()
