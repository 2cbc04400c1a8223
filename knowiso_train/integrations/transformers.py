"""Trainer and callback for Hugging Face transformers: isomorphism loss, and measurements during training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knowiso_train.callbacks import IsomorphismCallback
from knowiso_train.distillation import IsomorphismLoss
from knowiso_train.errors import DataError, MissingDependencyError, OptionError
from knowiso_train.features import unwrap_model
from knowiso_train.integrations._placement import move_frozen_networks
from knowiso_train.utils.serialization import read_json, read_tensors, write_json, write_tensors

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint
except ImportError as error:
    raise MissingDependencyError(
        'the Trainer adapter needs transformers, which is not installed; pip install "knowiso_train[transformers]"'
    ) from error

# In the Trainer's checkpoint folders
LOSS_FILE, MONITOR_FILE = "isomorphism.safetensors", "isomorphism.json"


class IsomorphismTrainerCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """Callback for any `Trainer` that attaches a loss and runs an `IsomorphismCallback`, with both in checkpoints.

    The callback does not add the loss term. Use `IsomorphismTrainer` for that, or return `loss + iso()` from a custom
    `compute_loss` in training mode.

    Args:
        iso: Loss, attached during training. None: no loss.
        monitor: Measurements, per optimizer step. None: no measurements.

    Attributes:
        folder: Checkpoint folder to resume from. None: that of the Trainer's arguments.
    """

    def __init__(self, iso: IsomorphismLoss | None = None, monitor: IsomorphismCallback | None = None) -> None:
        self.iso, self.monitor = iso, monitor
        if monitor is not None and monitor.iso is None:
            monitor.iso = iso
        self.folder: str | Path | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        """Restore the states of a resumed training, move teacher and peers off the CPU, and register the hooks."""
        for part in (self.iso, self.monitor):
            if part is not None and model is not None and unwrap_model(model) is not unwrap_model(part.student):
                raise OptionError(
                    f"the Trainer and {type(part).__name__} have different networks; "
                    "create both with the same model (no model_init=)"
                )
        if state.global_step > 0:
            default = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self._load(Path(self.folder or args.resume_from_checkpoint or default))
        if self.iso is not None:
            move_frozen_networks(self.iso, args.device)
            if not self.iso.attached:
                self.iso.attach()

    def on_step_begin(self, *events: Any, **more: Any) -> None:
        """Clear the gradients of the loss's parameters; the Trainer clears only those of its model."""
        if self.iso is not None:
            self.iso.zero_grad()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Count an optimizer step, and always measure the last one."""
        if (
            self.monitor is not None
            and self.monitor.step() is None
            and (state.global_step >= state.max_steps or control.should_training_stop)
        ):
            self.monitor.measure()

    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Measure the last step of a training that this evaluation has stopped, before other weights are loaded."""
        if self.monitor is not None and control.should_training_stop and not self.monitor.measured:
            self.monitor.measure()

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Save the states in the Trainer's checkpoint folder."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and self.iso is not None:
            write_tensors(folder / LOSS_FILE, self.iso.state_dict())
        if args.should_save and self.monitor is not None:
            write_json(folder / MONITOR_FILE, self.monitor.state_dict())

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Write the report, and remove the hooks."""
        if self.monitor is not None:
            # The best weights may be loaded by now, which are not those of the last step
            restored = args.load_best_model_at_end and state.best_model_checkpoint is not None
            self.monitor.end(measure=not restored or not self.monitor.history)
        if self.iso is not None:
            self.iso.detach()

    def _load(self, folder: Path) -> None:
        for name, part in ((LOSS_FILE, self.iso), (MONITOR_FILE, self.monitor)):
            if part is not None and not (folder / name).is_file():
                raise DataError(
                    f"{folder} has no {name}; resume a checkpoint of this callback, "
                    "and give its folder as args.resume_from_checkpoint too"
                )
            if part is not None:
                part.load_state_dict(read_tensors(folder / name)[0] if name == LOSS_FILE else read_json(folder / name))


class IsomorphismTrainer(Trainer):  # type: ignore[misc]
    """`Trainer` with the isomorphism loss: `IsomorphismTrainer(model=student, ..., iso=iso, monitor=monitor)`.

    The optimizer includes `iso.parameters()`, the logs include `iso.log()`. Combine it with another Trainer class by
    `class MyTrainer(IsomorphismTrainer, OtherTrainer): ...`. The Trainer calls models with keywords; a teacher without
    these keywords needs `teacher_forward=lambda teacher, images: teacher(images)` in the loss.

    Args:
        *args: Arguments of `Trainer`.
        iso: Loss for the same model.
        monitor: Measurements; logged by the Trainer if `monitor.log` is None. None: no measurements.
        **kwargs: Keyword arguments of `Trainer`.

    Examples:
        >>> import tempfile
        >>> from transformers import ResNetConfig, ResNetForImageClassification, TrainingArguments
        >>> config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
        >>> student, teacher = (ResNetForImageClassification(config) for _ in range(2))
        >>> images = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 2} for i in range(16)]
        >>> iso = IsomorphismLoss(student, teacher, "resnet.encoder.stages.1", example=torch.zeros(1, 3, 16, 16))
        >>> quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no"}
        >>> args = TrainingArguments(tempfile.mkdtemp(), max_steps=2, use_cpu=True, **quiet)
        >>> IsomorphismTrainer(model=student, args=args, train_dataset=images, iso=iso).train().global_step
        {'train_runtime': ...}
        2
    """

    def __init__(
        self, *args: Any, iso: IsomorphismLoss, monitor: IsomorphismCallback | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.iso, self._isomorphism = iso, IsomorphismTrainerCallback(iso, monitor)
        self.add_callback(self._isomorphism)
        if monitor is not None and monitor.log is None:
            monitor.log = self._log_measurement

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does, and remove the hooks also after an error."""
        self._isomorphism.folder = (
            get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is True
            else resume_from_checkpoint or None
        )
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.iso.detach()

    def distillation_loss(self, outputs: Any) -> Tensor:
        """Return the isomorphism loss of a training step. Override it to add terms, such as KD on the logits.

        `compute_loss` divides the sum by the steps of gradient accumulation where the Trainer does not.

        Args:
            outputs: Output of the student. That of the teacher is `self.iso.teacher_output` after `self.iso()`.
        """
        loss: Tensor = self.iso()
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """Return the Trainer's loss, plus `distillation_loss` in training mode."""
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch, **kwargs
        )
        if model.training and torch.is_grad_enabled():
            # The loss is either divided by the accumulation steps already, or by the Trainer afterwards
            divided = getattr(self, "loss_is_scaled_for_ga", None)
            if divided is None:
                divided = self.compute_loss_func is not None or (
                    self.model_accepts_loss_kwargs and num_items_in_batch is not None
                )
            term = self.distillation_loss(outputs).to(loss.device)
            loss = loss + (term / self.current_gradient_accumulation_steps if divided else term)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the Trainer's optimizer with the loss's parameters as a further group."""
        super().create_optimizer(*args, **kwargs)
        registered = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        parameters = [p for p in self.iso.to(self.args.device).parameters() if id(p) not in registered]
        if parameters:
            self.optimizer.add_param_group({"params": parameters, "weight_decay": self.args.weight_decay})
        return self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does, with the loss's metrics in the entries of training steps."""
        super().log({**logs, **self.iso.log()} if "loss" in logs else logs, *args, **kwargs)

    def _log_measurement(self, values: dict[str, float], /, *, step: int) -> None:
        # Logging clears this flag, which the Trainer's own metrics of this step need
        should_log = self.control.should_log
        self.log(dict(values))
        self.control.should_log = should_log
