"""What the loss costs in a training step: time and peak memory beside plain distillation and beside published feature losses.

    OMP_NUM_THREADS=2 python -m benchmarks.distill.bench_loss               # CPU, about a quarter of an hour
    python -m benchmarks.distill.bench_loss                                 # the same command takes a GPU where there is one:
    224 pixels, batch 128
    python -m benchmarks.distill.bench_loss --autocast                      # bfloat16, on a GPU

Every contender has networks of its own and stays in memory; in each round each takes one whole step (forward, backward,
optimizer), in an order drawn
anew. A closed form takes in one batch of two and is solved at every 10th step: ratios are of medians over the steps
that take one in, those that do
not and those that refresh, and "with refresh" weighs them as often as they come; "10 % .. 90 %" is of ratios within a
round. Every feature loss
stands beside teacher + KD, so all are held against that.

A timed step begins when the device is idle and ends when it is idle again, so what the host takes to launch it counts.
On a GPU a training loop runs
ahead of it: "in a row" is of twenty steps one after the other, without waiting in between, the median of three such
    runs of each, interleaved.

Peak memory is what tensors took at most during a refreshing step and a plain one, with weights, optimizer and own
state: on a GPU from PyTorch's
allocator; on the CPU from the profiler's record of every allocation, which leaves out the scratch memory inside
oneDNN's kernels.
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

from benchmarks.baselines.feature_kd import AttentionTransfer, FitNet, ReviewKD
from benchmarks.common.models import CifarResNet
from benchmarks.common.profiling import CLOCKS, peak_allocated_bytes, quantile
from benchmarks.common.results import record, table
from knowiso_train import IsomorphismLoss
from knowiso_train.distillation import kd_loss
from knowiso_train.distillation.estimators import updates_moments

REFRESH_INTERVAL = 10  # the library's default
STEPS_PER_RUN, NUM_RUNS = 2 * REFRESH_INTERVAL, 3
BASE, HINTS, OURS = "teacher + KD", "+ FitNet", "+ ours, moment"
BASELINES: dict[str, Callable[[list[int], list[int]], nn.Module]] = {
    HINTS: FitNet,
    "+ attention transfer": lambda *_: AttentionTransfer(),
    "+ ReviewKD": ReviewKD,
}
LOSS_OPTIONS: dict[str, dict[str, Any]] = {
    OURS: {},
    "+ ours, learned, order 0": {"solver": "learned", "order": 0},
    "+ ours, learned, order 1": {"solver": "learned", "order": 1},
    "+ ours, consensus, one peer": {"target": "consensus"},
}
CONTENDERS = ["student alone", "student + teacher forward", BASE, *BASELINES, *LOSS_OPTIONS]


@dataclass(frozen=True)
class Case:
    """A student, its teacher and a peer of the teacher; the layers that are paired, which have the same names; and the images."""

    name: str
    networks: tuple[Callable[[], nn.Module], Callable[[], nn.Module], Callable[[], nn.Module]]
    layers: tuple[str, ...]
    batch: int
    side: int


def cases(gpu: bool) -> list[Case]:
    large = tuple(
        lambda name=name: timm.create_model(name, num_classes=1000) for name in ("resnet18", "resnet50", "resnet34")
    )
    small = tuple(lambda depth=depth: CifarResNet(depth) for depth in (20, 56, 44))
    return [
        Case("resnet18 ← resnet50", large, ("layer2", "layer3", "layer4"), *((128, 224) if gpu else (32, 112))),
        Case("resnet20 ← resnet56", small, ("layer1", "layer2", "layer3"), 128, 32),
    ]


class Contender:
    """Networks, losses and optimizer of one way to train, and its step."""

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
        self.rival: nn.Module | None = None
        self.of_student: dict[str, Tensor] = {}
        self.of_teacher: dict[str, Tensor] = {}
        if kind in BASELINES:
            self.rival = self._rival(case)
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
            [*self.student.parameters(), *self.own().parameters()], lr=1e-3, momentum=0.9, weight_decay=1e-4
        )
        self.steps = 0

    def own(self) -> nn.Module:
        """The loss's own module, if any."""
        return self.iso or self.rival or nn.Module()

    def _rival(self, case: Case) -> nn.Module:
        for model, kept in ((self.student, self.of_student), (self.teacher, self.of_teacher)):
            for layer in case.layers:
                model.get_submodule(layer).register_forward_hook(
                    lambda _m, _x, out, layer=layer, kept=kept: kept.update({layer: out})
                )
        with torch.no_grad():
            self.student.eval()(self.images[:2]), self.student.train(), self.teacher(self.images[:2])
        widths = [[feature.shape[1] for feature in kept.values()] for kept in (self.of_student, self.of_teacher)]
        return BASELINES[self.kind](*widths).to(self.device)

    def step(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits = self.student(self.images)
            loss = F.cross_entropy(logits, self.labels)
            if self.iso is not None:
                loss = loss + self.iso() + kd_loss(logits, self.iso.teacher_output)
            elif self.kind != "student alone":
                loss = loss + self._taught(logits)
        loss.backward()
        self.optimizer.step()
        self.of_student.clear(), self.of_teacher.clear()
        self.steps += 1

    def _taught(self, logits: Tensor) -> Tensor:
        with torch.no_grad():
            output = self.teacher(self.images)
        loss = 0 * logits.sum() if self.kind == "student + teacher forward" else kd_loss(logits, output)
        return (
            loss
            if self.rival is None
            else loss + self.rival(list(self.of_student.values()), list(self.of_teacher.values()))
        )

    def warm_up(self) -> None:
        """Until every map stands, and to a step at which closed forms are refreshed: all contenders are refreshed in the same rounds."""
        while self.steps < REFRESH_INTERVAL or self.steps % REFRESH_INTERVAL or not self.on():
            if self.steps >= 20 * REFRESH_INTERVAL:
                raise RuntimeError(f"{self.kind}: the loss is not on after {self.steps} steps")
            if self.iso is None and self.steps >= 3:
                self.steps = REFRESH_INTERVAL  # nothing to wait for
            else:
                self.step()

    def on(self) -> bool:
        return self.iso is None or all(map_.ready for map_ in self.iso.maps.values())

    def held(self) -> int:
        """Bytes between steps: images, networks, own state, optimizer."""
        tensors = [self.images, self.labels]
        for module in (self.student, *self.frozen, self.own()):
            tensors += [*module.parameters(), *module.buffers()]
        tensors += [
            value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        ]
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def with_recomputed_statistics(model: nn.Module, images: Tensor) -> nn.Module:
    """A frozen network whose batch norms know the images, so that its features are of ordinary size."""
    with torch.no_grad():
        for _ in range(3):
            model.train()(images)
    return model.eval().requires_grad_(False)


def time_steps(contender: Contender, clock: Callable[[], float], steps: int = 1) -> float:
    """Of one step among so many in a row."""
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
    """Bytes at the peak of a refreshing step and a plain one, all that is held between steps included."""
    contender.optimizer.zero_grad()
    if contender.device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contender.step(), contender.step()
        torch.cuda.synchronize()
        return contender.held() + torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        contender.step(), contender.step()
    return contender.held() + peak_allocated_bytes(watched)


def table_rows(times: dict[str, list[float]], first: dict[str, int], peaks: dict[str, int]) -> Iterator[dict[str, Any]]:
    """`first` is the number of each contender's first timed step, a multiple of `REFRESH_INTERVAL`."""
    rounds = range(len(times[BASE]))
    refreshed, plain = [i for i in rounds if i % REFRESH_INTERVAL == 0], [i for i in rounds if i % REFRESH_INTERVAL]

    def ratios(kind: str, rounds: list[int]) -> list[float]:
        return [times[kind][i] / times[BASE][i] for i in rounds]

    def middle(kind: str, rounds: list[int]) -> float:
        return quantile([times[kind][i] for i in rounds], 0.5)

    for kind in times:
        seldom = middle(kind, refreshed) / middle(BASE, refreshed)
        parts = [[i for i in plain if updates_moments(first[kind] + i) == joined] for joined in (False, True)]
        often = sum(len(part) * middle(kind, part) / middle(BASE, part) for part in parts if part) / len(plain)
        yield {
            "contender": kind,
            "ms": 1000 * middle(kind, plain),
            f"of {BASE}": round(often, 3),
            "10 % .. 90 %": " .. ".join(f"{quantile(ratios(kind, plain), q):.3f}" for q in (0.1, 0.9)),
            "refreshing step": round(seldom, 3),
            "with refresh": round(((REFRESH_INTERVAL - 1) * often + seldom) / REFRESH_INTERVAL, 3),
            "peak MiB": round(peaks[kind] / 2**20, 1),
            "memory": round(peaks[kind] / peaks[BASE], 3),
        }


def compare_with_targets(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The targets: at most 5 % over teacher + KD in time, 10 % in memory, and less than FitNet with its adapters."""
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
    parser.add_argument("--rounds", type=int, default=0, help="a multiple of 10; 0 is 40 on the CPU, 100 on a GPU")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: time on the processor, for a busy machine; use OMP_NUM_THREADS=1 with it",
    )
    parser.add_argument("--autocast", action="store_true", help="bfloat16")
    parser.add_argument("--only", nargs="*", help="contenders; the targets need all")
    parser.add_argument("--case", help="part of a case's name")
    parser.add_argument("--batch", type=int, help="images per step, in place of the case's")
    parser.add_argument("--side", type=int, help="pixels, in place of the case's")
    parser.add_argument("--name", help="of the results file; bench_loss, or bench_loss_gpu where there is a GPU")
    args = parser.parse_args()
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
            medians = {kind: quantile(own, 0.5) for kind, own in runs.items()}
            for row in rows:
                row["in a row, ms"] = round(1000 * medians[row["contender"]], 2)
                row["in a row"] = round(medians[row["contender"]] / medians[BASE], 3)
        print(f"{case.name}, {case.batch} images of {case.side} pixels, {rounds} rounds\n{table(rows)}", flush=True)
        figures[case.name] = {
            "batch": case.batch,
            "pixels": case.side,
            "layers": case.layers,
            "rows": rows,
            "seconds": {kind: [round(t, 5) for t in own] for kind, own in times.items()},
        }
        if not args.only:
            figures[case.name]["target"] = compare_with_targets(rows)
            print(figures[case.name]["target"], flush=True)
        for contender in contenders:
            if contender.iso is not None:
                contender.iso.detach()
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
