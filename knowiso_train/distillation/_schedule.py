"""Factor of the loss during a training, which follows the learning rate of the student's optimizer by default."""

from __future__ import annotations

import math
import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from knowiso_train.distillation.config import Schedule
from knowiso_train.errors import KnowisoWarning, OptionError

# Factor at learning rate 0, with which the student still follows the teacher
MIN_FACTOR = 0.02
# Steps of an optimizer with fewer weights of the student, without one of the optimizer before, until it is followed
MAX_STEPS_OF_OTHERS = 20
# Calls in training mode without a step of an optimizer of the student, after which a warning is due
MAX_CALLS_WITHOUT_STEP = 1000


def learning_rate_factor(ratio: float) -> float:
    """Return `4 r (1 - r)` for r < 1/2, at least 0.02, and 1 for larger r: learning rate over its maximum.

    With a cosine of the learning rate to 0 this is 1 in the first half of the training, then a cosine down to 0.02.

    Examples:
        >>> [round(learning_rate_factor(ratio), 2) for ratio in (1.0, 0.5, 0.25, 0.1, 0.0)]
        [1.0, 1.0, 0.75, 0.36, 0.02]
    """
    return 1.0 if ratio >= 0.5 else max(MIN_FACTOR, 4 * ratio * (1 - ratio))


class FactorSchedule:
    """Factor of the loss by call, from a function or from the learning rate of the student's optimizer.

    The learning rate is that of the last step of the optimizer with most of the student's weights, and the largest of
    its parameter groups with such weights. It is compared with the maximum so far of the same optimizer, so that the
    factor is 1 while the learning rate rises or is constant. An optimizer with fewer weights is followed once it has
    made 20 steps without one of the optimizer before, as in a second stage with frozen layers. The first optimizer
    after a restored state continues the saved maximum if it trains as many weights.

    Args:
        schedule: "learning_rate", a function from call to factor, or None for a constant 1.
        student: Network in training, in any wrapper that keeps its parameters.

    Examples:
        >>> student = nn.Linear(2, 2)
        >>> schedule, optimizer = FactorSchedule("learning_rate", student), torch.optim.SGD(student.parameters(), lr=1)
        >>> (handle,), factors = schedule.attach(), []
        >>> for lr in (1.0, 0.5, 0.25):
        ...     optimizer.param_groups[0]["lr"] = lr
        ...     optimizer.step()
        ...     factors.append(schedule.factor())
        >>> handle.remove()
        >>> factors
        [1.0, 1.0, 0.75]
    """

    def __init__(self, schedule: Schedule, student: nn.Module) -> None:
        self.schedule, self.student = schedule, student
        self.active_calls, self.num_weights, self.peak, self.ratio = 0, 0, 0.0, 1.0
        self._student_ids: set[int] = set()
        self._warned = False
        self._steps_of_others = 0
        # Maximum of the learning rate by optimizer, and whether the next new optimizer continues `peak`
        self._peaks: WeakKeyDictionary[Optimizer, float] = WeakKeyDictionary()
        self._continues = False

    def attach(self) -> list[RemovableHandle]:
        """Observe the steps of all optimizers, if the schedule needs it, until the returned handles are removed."""
        self._student_ids.clear()
        return [register_optimizer_step_post_hook(self._record)] if self.schedule == "learning_rate" else []

    def factor(self) -> float:
        """Return the factor of the coming call.

        Raises:
            OptionError: A schedule that returns NaN or Inf.
        """
        if self.schedule == "learning_rate":
            return learning_rate_factor(self.ratio)
        factor = 1.0 if self.schedule is None else float(self.schedule(self.active_calls))
        if not math.isfinite(factor):
            raise OptionError(f"schedule= must return a finite factor, got {factor} at call {self.active_calls}")
        return factor

    def count_call(self) -> None:
        """Count a call in training mode with a solved map; warn once if no optimizer of the student makes steps."""
        self.active_calls += 1
        if self.schedule != "learning_rate" or self.num_weights or self._warned:
            return
        if self.active_calls > MAX_CALLS_WITHOUT_STEP:
            self._warned = True
            warnings.warn(
                f"no torch.optim optimizer with weights of the student made a step in {self.active_calls} calls, so "
                "the weight of the loss does not follow the learning rate. Pass schedule=WeightSchedule(total=...), "
                "or schedule=None for a constant weight",
                KnowisoWarning,
                stacklevel=2,
            )

    def state(self) -> list[float]:
        """Return the number of counted calls, the optimizer's number of weights, and its learning rates."""
        return [self.active_calls, self.num_weights, self.peak, self.ratio]

    def set_state(self, active_calls: float, num_weights: float, peak: float, ratio: float) -> None:
        """Restore the figures of `state`."""
        self.active_calls, self.num_weights, self.peak, self.ratio = int(active_calls), int(num_weights), peak, ratio
        self._continues = True

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, whose first optimizer continues the maximum."""
        return {name: value for name, value in vars(self).items() if name != "_peaks"} | {"_continues": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._peaks = WeakKeyDictionary()

    # An optimizer step may be compiled
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _record(self, optimizer: Optimizer, *_: Any) -> None:
        """Take the learning rate of an optimizer's step, if it trains at least as many weights as the one before."""
        if not self._student_ids or not self.num_weights:
            # Sharding after `attach` replaces the parameters of a module
            self._student_ids = {id(parameter) for parameter in self.student.parameters()}
        num_weights, rates = 0, []
        for group in optimizer.param_groups:
            sizes = [parameter.numel() for parameter in group["params"] if id(parameter) in self._student_ids]
            # Adafactor may have None in place of a learning rate
            if sizes and group.get("lr") is not None:
                num_weights += sum(sizes)
                rates.append(float(group["lr"].detach() if isinstance(group["lr"], Tensor) else group["lr"]))
        if not rates:
            return
        if num_weights < self.num_weights and self._steps_of_others < MAX_STEPS_OF_OTHERS:
            self._steps_of_others += 1
            return
        continued = self.peak if self._continues and num_weights == self.num_weights else 0.0
        self.num_weights, self._continues, self._steps_of_others = num_weights, False, 0
        self.peak = self._peaks[optimizer] = max(self._peaks.get(optimizer, continued), *rates)
        self.ratio = max(rates) / self.peak if self.peak > 0 else 1.0
