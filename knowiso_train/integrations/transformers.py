"""Hugging Face's `Trainer`: the isomorphism loss as one more term, and measurements while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from knowiso_train.callbacks import IsomorphismCallback
from knowiso_train.distillation import IsomorphismLoss
from knowiso_train.errors import DataError, MissingDependencyError, OptionError
from knowiso_train.features import unwrap_model
from knowiso_train.utils.serialization import parse_json, write_json

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint
except ImportError as error:
    raise MissingDependencyError(
        'the Trainer adapter needs transformers, which is not installed; pip install "knowiso_train[transformers]"'
    ) from error

LOSS_FILE, MONITOR_FILE = "isomorphism.safetensors", "isomorphism.json"  # in the Trainer's checkpoint folder


class IsomorphismTrainerCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """Drives a loss's hooks and an `IsomorphismCallback` from the events of any `Trainer(..., callbacks=[this])`; states lie in its checkpoints.

    The loss term itself is added by `IsomorphismTrainer`, or by a `compute_loss` of your own: `loss + iso()`, where the
    model is in training mode.

    Args:
        iso: the loss, attached while the Trainer trains.
        monitor: what measures; it counts optimizer steps.
    """

    def __init__(self, iso: IsomorphismLoss | None = None, monitor: IsomorphismCallback | None = None) -> None:
        self.iso, self.monitor = iso, monitor
        self.folder: str | Path | None = None  # that this training is resumed from, where it is known

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        """Take up the states where the training is resumed; hooks on."""
        for watcher in (self.iso, self.monitor):
            if watcher is not None and model is not None and unwrap_model(model) is not unwrap_model(watcher.student):
                raise OptionError(
                    f"the Trainer trains another network than {type(watcher).__name__} watches; build both from one (no model_init=)"
                )
        if state.global_step > 0:
            self._load(
                Path(
                    self.folder
                    or args.resume_from_checkpoint
                    or Path(args.output_dir) / f"checkpoint-{state.global_step}"
                )
            )
        if self.iso is not None and not self.iso.attached:
            self.iso.attach()

    def on_step_begin(self, *events: Any, **more: Any) -> None:
        """Gradients of the loss's own parameters: the Trainer clears its model's only."""
        if self.iso is not None:
            self.iso.zero_grad()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """An optimizer step; the last one is always measured."""
        if (
            self.monitor is not None
            and self.monitor.step() is None
            and (state.global_step >= state.max_steps or control.should_training_stop)
        ):
            self.monitor.measure()

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """States beside the Trainer's."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and self.iso is not None:
            save_file(
                {name: value.cpu().contiguous() for name, value in self.iso.state_dict().items()}, folder / LOSS_FILE
            )
        if args.should_save and self.monitor is not None:
            write_json(folder / MONITOR_FILE, self.monitor.state_dict())

    def on_train_end(self, *events: Any, **more: Any) -> None:
        """Report written; hooks off."""
        if self.monitor is not None:
            self.monitor.end()
        if self.iso is not None:
            self.iso.detach()

    def _load(self, folder: Path) -> None:
        for name, watcher in ((LOSS_FILE, self.iso), (MONITOR_FILE, self.monitor)):
            if watcher is not None and not (folder / name).is_file():
                raise DataError(
                    f"{folder} has no {name}: resume what this callback saved, and name its folder in args.resume_from_checkpoint too"
                )
            if watcher is not None:
                watcher.load_state_dict(
                    load_file(folder / name)
                    if name == LOSS_FILE
                    else parse_json((folder / name).read_text(encoding="utf-8"))
                )


class IsomorphismTrainer(Trainer):  # type: ignore[misc]
    """A `Trainer` whose loss has the isomorphism term: `IsomorphismTrainer(model=student, ..., iso=iso, monitor=monitor)`.

    `iso.parameters()` join the optimizer, `iso.log()` the logs. With a Trainer class of your own: `class
    Mine(IsomorphismTrainer, YourTrainer): ...`.
    Models are called with keywords: a teacher with others needs `teacher_forward=lambda teacher, images:
        teacher(images)` in the loss.

    Args:
        *args, **kwargs: of Trainer.
        iso: the loss, made for the same model.
        monitor: an `IsomorphismCallback`; its figures go to the Trainer's logs unless it has a `log`.

    Example:
        >>> import tempfile
        >>> from transformers import ResNetConfig, ResNetForImageClassification, TrainingArguments
        >>> config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", hidden_act="silu")
        >>> student, teacher = (ResNetForImageClassification(config) for _ in range(2))
        >>> images = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 2} for i in range(16)]
        >>> iso = IsomorphismLoss(student, teacher, "resnet.encoder.stages.1", example=torch.zeros(1, 3, 16, 16))
        >>> args = TrainingArguments(tempfile.mkdtemp(), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no")
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
            monitor.log = self._log_measured

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; hooks come off also by an error."""
        self._isomorphism.folder = (
            get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is True
            else resume_from_checkpoint or None
        )
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.iso.detach()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """The Trainer's loss, and in training the isomorphism's."""
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch, **kwargs
        )
        if model.training and torch.is_grad_enabled():
            scaled = getattr(self, "loss_is_scaled_for_ga", None)
            if scaled is None:
                scaled = (
                    self.model_accepts_loss_kwargs and num_items_in_batch is not None
                ) or self.compute_loss_func is not None
            # Else the Trainer divides
            loss = loss + self.iso().to(loss.device) / (self.current_gradient_accumulation_steps if scaled else 1)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, which also trains what the loss has of its own."""
        super().create_optimizer(*args, **kwargs)
        known = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        if own := [parameter for parameter in self.iso.to(self.args.device).parameters() if id(parameter) not in known]:
            self.optimizer.add_param_group({"params": own, "weight_decay": self.args.weight_decay})
        return self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's logs of training steps, with the loss's figures."""
        super().log({**logs, **self.iso.log()} if "loss" in logs else logs, *args, **kwargs)

    def _log_measured(self, values: dict[str, float], /, *, step: int) -> None:
        wanted = self.control.should_log  # of the Trainer's own figures, at this step; logging clears it
        self.log(dict(values))
        self.control.should_log = wanted
