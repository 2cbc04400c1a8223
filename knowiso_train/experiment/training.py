"""Step counter, log and checkpoints of a resumable training."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from tqdm import tqdm

from knowiso_train.distillation import IsomorphismLoss, WeightSchedule
from knowiso_train.errors import NonFiniteError
from knowiso_train.experiment.run_folder import RunFolder


def sgd_with_schedule(
    parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float, warmup: int, total: int
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.LambdaLR]:
    """Create SGD with Nesterov momentum 0.9, and a linear warm-up followed by a cosine decay of its learning rate.

    Args:
        parameters: Parameters to train.
        lr: Peak learning rate.
        weight_decay: Coupled weight decay.
        warmup: Number of updates of the warm-up.
        total: Number of updates.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> _, scheduler = sgd_with_schedule(layer.parameters(), lr=1.0, weight_decay=0.0, warmup=0, total=9)
        >>> scheduler.get_last_lr()
        [1.0]
    """
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay, nesterov=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, WeightSchedule(warmup=warmup, total=total))


class ResumableTraining:
    """Step counter, progress bar, log and checkpoints of one training.

    A resumed training repeats the steps after its newest checkpoint with the same batches and random numbers. Create it
    after `accelerator.prepare` and `register_for_checkpointing`, since it loads the newest checkpoint.

    Args:
        accelerator: Accelerator of the training.
        run: Folder of the checkpoints.
        output: Folder of the log, shared with other trainings.
        part: Keys and values of the log entries of this training, such as {"arm": "student"}.
        total: Number of steps (batches).
        seed: Seed of the random numbers of each step.
        log_every: Steps between log entries.
        save_every: Steps between checkpoints.
        values: Further values to save in checkpoints, with their initial values.

    Attributes:
        step: Number of steps done.
        seconds: Time of these steps, over all sessions.
        values: Further values that are saved in checkpoints.

    Examples:
        >>> import tempfile
        >>> from accelerate import Accelerator
        >>> folder = RunFolder(tempfile.mkdtemp())
        >>> accelerator = Accelerator(cpu=True)
        >>> options = {"total": 2, "seed": 0, "log_every": 1, "save_every": 100}
        >>> with ResumableTraining(accelerator, folder, folder, {"arm": "student"}, **options) as training:
        ...     for batch in training.batches(None):
        ...         training.advance({"cross_entropy": torch.tensor(0.5)})
        >>> [(entry["arm"], entry["step"], entry["loss"]) for entry in folder.read_log()]
        [('student', 1, 0.5), ('student', 2, 0.5)]
    """

    def __init__(
        self,
        accelerator: Any,
        run: RunFolder,
        output: RunFolder,
        part: Mapping[str, str],
        *,
        total: int,
        seed: int,
        log_every: int,
        save_every: int,
        values: Mapping[str, Any] | None = None,
    ) -> None:
        self.accelerator, self.run, self.output, self.part = accelerator, run, output, dict(part)
        self.total, self.seed, self.log_every, self.save_every = total, seed, log_every, save_every
        saved = run.load_checkpoint(accelerator)
        self.step: int = saved.get("step", 0)
        self.seconds: float = saved.get("seconds", 0.0)
        self.values: dict[str, Any] = dict(values or {}) | saved.get("values", {})
        output.truncate_log(self.part, self.step)
        self._saved_step = self.step
        self._start = time.monotonic() - self.seconds
        hide = not accelerator.is_main_process
        self._bar = tqdm(total=total, initial=self.step, desc=" ".join(self.part.values()), unit="step", disable=hide)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def batches(self, loader: Any, sampler: Any = None) -> Iterator[Any]:
        """Yield the batches of the remaining steps, and seed the random numbers of each step.

        Args:
            loader: Prepared loader. None: yield None for each step.
            sampler: Sampler of the loader; its `epoch` determines the order of the images.
        """
        while self.step < self.total:
            for batch in self._epoch(loader, sampler):
                # The same dropout masks in a resumed training; other masks in each process
                torch.manual_seed(self.seed * 10**9 + self.step * 10**3 + self.accelerator.process_index)
                yield batch
                if self.step >= self.total:
                    return

    def _epoch(self, loader: Any, sampler: Any) -> Any:
        if loader is None:
            return (None for _ in range(self.total - self.step))
        from accelerate import skip_first_batches

        sampler.epoch, num_done = divmod(self.step, len(loader))
        return skip_first_batches(loader, num_done) if num_done else loader

    def advance(
        self,
        losses: Mapping[str, Tensor],
        values: Mapping[str, Any] | None = None,
        iso: IsomorphismLoss | None = None,
    ) -> None:
        """Count a step, and log its losses at every `log_every`-th one.

        Args:
            losses: Terms of the loss by name; their sum is logged as "loss".
            values: Further values for the log. None: no others.
            iso: Loss whose `log()` is added. None: no such loss.

        Raises:
            NonFiniteError: A loss is NaN or infinite.
        """
        self.step += 1
        self.seconds = round(time.monotonic() - self._start, 2)
        self._bar.update()
        if self.step % self.log_every:
            return
        terms = {name: float(loss.detach()) for name, loss in losses.items()}
        total = sum(terms.values())
        if not math.isfinite(total):
            label = " ".join(self.part.values())
            raise NonFiniteError(
                f"{label}: the losses are {terms} at step {self.step}; try a lower learning rate, or bf16 for fp16"
            )
        self.log({"loss": total, **terms, **(values or {}), **(iso.log() if iso else {})})
        self._bar.set_postfix({name: f"{value:.3f}" for name, value in terms.items()})

    def log(self, values: Mapping[str, Any]) -> None:
        """Log values at the present step."""
        self.output.log({**self.part, "step": self.step, "seconds": self.seconds, **values})

    def save_if_due(self) -> None:
        """Save a checkpoint every `save_every` steps, after a step that updated the weights."""
        due = self.step - self._saved_step >= self.save_every and self.step < self.total
        if due and self.accelerator.sync_gradients:
            progress = {"step": self.step, "seconds": self.seconds, "values": self.values}
            self.run.save_checkpoint(self.accelerator, progress)
            self._saved_step = self.step
