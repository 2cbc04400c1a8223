"""Published protocol of CIFAR-100 distillation on one GPU: 240 epochs, all arms of a seed in one process, resumable.

    python -m benchmarks.distill.bench_protocol --minutes 14        # call again until all epochs are done
    python -m benchmarks.distill.bench_protocol --pair resnet56_resnet20_cifar10 --arms kd kd+fitnet kd+ours --seed 1

SGD with batches of 64, a learning rate of 0.05, divided by 10 after 5/8, 6/8 and 7/8 of the epochs, Nesterov momentum
of 0.9 and weight decay of 5e-4, as in CRD (Tian et al., ICLR 2020) and its successors. Images, augmentation and teacher
are on the device; each batch of the teacher serves all students. `--minutes` ends a call in time: networks, optimizers
and loss terms are then in `benchmarks/.cache/protocol`, and the next call continues there. `--compile` compiles the
teacher into captured graphs, which pays off on a GPU, where small networks wait for launches.
"""

from __future__ import annotations

import argparse
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.results import record, table
from benchmarks.distill.arms import parse_arm
from benchmarks.distill.pairs import PAIRS, Images
from benchmarks.distill.teacher_cache import CACHE, RecordedTeacher, TeacherBatch
from benchmarks.distill.training import BATCH_IMAGES, PEAK_LEARNING_RATE, Run, Student

FOLDER = CACHE.parent / "protocol"
ARMS = ("kd", "kd+fitnet", "kd+review", "kd+srd", "dkd", "std_kd", "kd+ours")
# Fractions of the training after which the learning rate is divided by 10: epochs 150, 180 and 210 of 240
DECAY_FRACTIONS = (5 / 8, 6 / 8, 7 / 8)


class LiveTeacher:
    """Teacher that is run for each batch, in the place of the cache on disk."""

    def __init__(self, teacher: RecordedTeacher, example: Tensor) -> None:
        self.teacher = teacher
        self.shapes = [tensor.shape[1:] for tensor in teacher(example).tensors]

    def batch(self, epoch: int, indices: Tensor, images: Tensor) -> TeacherBatch:
        """Return logits, pooled features and features of the images."""
        return self.teacher(images)


@dataclass(frozen=True)
class ProtocolRun(Run):
    """Training with the published learning rates."""

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return float(PEAK_LEARNING_RATE * 0.1 ** sum(step >= part * self.num_steps for part in DECAY_FRACTIONS))


class ProtocolTraining:
    """Students of one seed that are trained side by side, with a checkpoint of all of them.

    Args:
        run: Pair, images and teacher.
        arms: Texts of the arms.
        path: File of the checkpoint.
    """

    def __init__(self, run: ProtocolRun, arms: list[str], path: Path) -> None:
        self.run, self.path, self.epoch = run, path, 0
        indices = run.images.training_indices("final")[:2]
        images = run.images.augmented(0, indices)
        example = images, run.cache.batch(0, indices, images)
        self.students = [Student(parse_arm(text), run, example) for text in arms]

    def train(self, seconds: float) -> bool:
        """Train until all epochs are done, or no further epoch fits into the time; return whether all are done."""
        began, longest = time.monotonic(), 0.0
        with ExitStack() as stack:
            for student in self.students:
                if student.iso is not None:
                    stack.enter_context(student.iso)
            self._load()
            while self.epoch < self.run.budget:
                start = time.monotonic()
                if start - began + 1.2 * longest > seconds:
                    return False
                self._train_epoch()
                longest = max(longest, time.monotonic() - start)
                self._save()
        return True

    def _train_epoch(self) -> None:
        run, indices = self.run, self.run.images.training_indices("final")
        generator = torch.Generator().manual_seed(1_000_003 * run.seed + self.epoch)
        order = indices[torch.randperm(len(indices), generator=generator).to(indices.device)]
        step = self.epoch * math.ceil(len(indices) / BATCH_IMAGES)
        losses: list[float] = []
        for batch in order.split(BATCH_IMAGES):
            images = run.images.augmented(self.epoch, batch)
            teacher = run.cache.batch(self.epoch, batch, images)
            losses = [student.step(images, run.images.labels[batch], teacher, step) for student in self.students]
            step += 1
        self.epoch += 1
        print(f"epoch {self.epoch} of {run.budget}:", *(f"{loss:.2f}" for loss in losses), flush=True)

    def _save(self) -> None:
        """Write epoch, networks, optimizers and loss terms, so that an interrupted call loses one epoch at most."""
        state = {
            str(student.arm): {
                "modules": [module.state_dict() for module in student.modules()],
                "optimizer": student.optimizer.state_dict(),
                "diverged": student.diverged,
            }
            for student in self.students
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        torch.save({"epoch": self.epoch, "arms": state}, temporary)
        temporary.replace(self.path)

    def _load(self) -> None:
        if not self.path.exists():
            return
        saved = torch.load(self.path, weights_only=True, map_location=self.run.images.labels.device)
        self.epoch = saved["epoch"]
        for student in self.students:
            state = saved["arms"][str(student.arm)]
            for module, values in zip(student.modules(), state["modules"], strict=True):
                module.load_state_dict(values)
            student.optimizer.load_state_dict(state["optimizer"])
            student.diverged = state["diverged"]

    def rows(self) -> list[dict[str, Any]]:
        """Return the test accuracies."""
        return [
            {"arm": str(student.arm), "seed": self.run.seed, "epochs": self.epoch, "diverged": student.diverged}
            | {name: round(value, 2) for name, value in student.accuracies().items()}
            for student in self.students
        ]


def make_run(args: argparse.Namespace) -> ProtocolRun:
    """Load images and teacher onto the device."""
    pair, device = PAIRS[args.pair], torch.device(args.device)
    images, model = Images(pair, device, args.images), pair.teacher().to(device)
    teacher = RecordedTeacher(model, list(pair.layers.values()), pair.classifiers[1])
    if args.compile:
        model.compile(mode="reduce-overhead")
    cache = LiveTeacher(teacher, images.augmented(0, images.training_indices("final")[:2]))
    classifier = model.get_submodule(pair.classifiers[1])
    return ProtocolRun(pair, images, cache, classifier, "final", args.epochs, args.seed)  # type: ignore[arg-type]


def main(words: list[str] | None = None) -> list[dict[str, Any]]:
    """Train or continue, and print and record the accuracies when all epochs are done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=sorted(PAIRS), default="resnet32_resnet8_cifar100")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="loss terms, such as kd+fitnet,weight=100")
    parser.add_argument("--epochs", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="time of this call")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the teacher into captured graphs")
    parser.add_argument("--images", type=int, default=None, help="number of training images, to try the script")
    args = parser.parse_args(words)
    name = f"protocol_{args.pair}_{args.epochs}_{args.seed}"
    training = ProtocolTraining(make_run(args), args.arms, FOLDER / f"{name}.pt")
    if not training.train(60 * args.minutes):
        print(f"{training.epoch} of {args.epochs} epochs are done; call again to continue")
        return []
    rows = training.rows()
    print(table(rows))
    record(name, rows, settings=vars(args))
    return rows


if __name__ == "__main__":
    main()
