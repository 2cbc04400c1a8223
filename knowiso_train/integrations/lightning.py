"""Lightning callback for the isomorphism loss and for measurements during training."""

from __future__ import annotations

from functools import partial
from typing import Any

from knowiso_train.callbacks import IsomorphismCallback
from knowiso_train.distillation import IsomorphismLoss
from knowiso_train.errors import FormatError, MissingDependencyError
from knowiso_train.integrations._placement import move_frozen_networks

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise MissingDependencyError(
        'the Lightning adapter needs lightning, which is not installed; pip install "knowiso_train[lightning]"'
    ) from error


class IsomorphismLightningCallback(Callback):  # type: ignore[misc]  # followed as untyped
    """Callback that attaches an `IsomorphismLoss` and runs an `IsomorphismCallback`, with both in checkpoints.

    Add the term in `training_step`, after the student's forward pass: `loss = loss + self.iso()`. If the loss is a
    submodule of the LightningModule, `self.parameters()` and the checkpoint's `state_dict` include it. DDP then ignores
    its parameters, since the loss reduces them itself. A loss in a list (`self.held = [iso]`) stays out of the
    `state_dict`, and this callback saves it. Lightning's tuners train with the loss.

    Args:
        iso: Loss; its metrics are logged every `log_every_n_steps`. None: no loss.
        monitor: Measurements, per optimizer step. Their metrics are logged by Lightning if `monitor.log` is None.
            None: no measurements.

    Examples:
        >>> import lightning
        >>> class Distilled(lightning.LightningModule):
        ...     def __init__(self, student, iso):
        ...         super().__init__()
        ...         self.student, self.iso = student, iso
        ...     def training_step(self, batch, index):
        ...         return self.student(batch).square().mean() + self.iso()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> student, teacher = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()) for _ in range(2))
        >>> iso = IsomorphismLoss(student, teacher, "1")
        >>> quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = lightning.Trainer(
        ...     max_steps=2, accelerator="cpu", enable_checkpointing=False,
        ...     callbacks=[IsomorphismLightningCallback(iso)], **quiet,
        ... )
        >>> loader = torch.utils.data.DataLoader(torch.randn(16, 3, 6, 6), batch_size=8)
        >>> trainer.fit(Distilled(student, iso), loader)
        >>> iso.attached, len(iso.log())
        (False, 5)
    """

    def __init__(self, iso: IsomorphismLoss | None = None, monitor: IsomorphismCallback | None = None) -> None:
        self.iso, self.monitor = iso, monitor
        if monitor is not None and monitor.iso is None:
            monitor.iso = iso
        self._logs_measurements = monitor is not None and monitor.log is None
        self._is_submodule = False
        self._optimizer_steps = 0
        self._stage = "fit"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Exclude the loss from DDP before the module is wrapped, and register its hooks before any tuner trains."""
        self._stage = stage
        prefixes = [prefix for prefix, module in pl_module.named_modules() if module is self.iso]
        self._is_submodule = bool(prefixes)
        if self.iso is not None and prefixes:
            # DDP would overwrite the moments of each process by those of rank 0
            names = [name for name, _ in (*self.iso.named_parameters(), *self.iso.named_buffers())]
            ignored = [
                *getattr(pl_module, "_ddp_params_and_buffers_to_ignore", ()),
                *(f"{prefix}.{name}" for prefix in prefixes for name in names),
            ]
            pl_module._ddp_params_and_buffers_to_ignore = list(dict.fromkeys(ignored))
        # Tuners train in their own on_fit_start, which runs before the one of this callback
        if self.iso is not None and stage == "fit" and not self.iso.attached:
            device = trainer.strategy.root_device
            self.iso.to(device).attach()
            move_frozen_networks(self.iso, device)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Connect the measurements to the loggers."""
        if self.monitor is not None and self._logs_measurements:
            self.monitor.log = partial(_log_metrics, trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take over the step count, which a resumed training has restored by now."""
        self._optimizer_steps = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        """Log and measure after each optimizer step, of which accumulation makes fewer than batches."""
        if trainer.global_step == self._optimizer_steps:
            return
        self._optimizer_steps = trainer.global_step
        if self.iso is not None and self._optimizer_steps % trainer.log_every_n_steps == 0:
            _log_metrics(trainer, self.iso.log(), step=self._optimizer_steps)
        if self.monitor is not None:
            self.monitor.step()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure the last step, and write the report."""
        if self.monitor is not None:
            self.monitor.end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remove the hooks."""
        if self.iso is not None:
            self.iso.detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the hooks after an error."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the monitor and, unless the LightningModule saves it, of the loss."""
        state: dict[str, Any] = {} if self.monitor is None else {"monitor": self.monitor.state_dict()}
        if self.iso is not None and not self._is_submodule:
            state["iso"] = dict(self.iso.state_dict())
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the states of `state_dict` for a training; an evaluation of a checkpoint does not restore them.

        Raises:
            FormatError: The checkpoint is of a callback with another loss or monitor.
        """
        if self._stage != "fit":
            return
        parts = {"monitor": self.monitor, "iso": None if self._is_submodule else self.iso}
        expected = {name for name, part in parts.items() if part is not None}
        if set(state_dict) != expected:
            raise FormatError(
                f"expected a checkpoint with the states of {sorted(expected)}, got {sorted(state_dict)}; "
                "use the same callback as before"
            )
        if self.monitor is not None:
            self.monitor.load_state_dict(state_dict["monitor"])
        if "iso" in expected and self.iso is not None:
            self.iso.load_state_dict(state_dict["iso"])


def _log_metrics(trainer: Any, values: dict[str, float], /, *, step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(values, step=step)
