"""Lightning: the loss's hooks, measurements and states, driven by its `Trainer`."""

from __future__ import annotations

from functools import partial
from typing import Any

from knowiso_train.callbacks import IsomorphismCallback
from knowiso_train.distillation import IsomorphismLoss
from knowiso_train.errors import FormatError, MissingDependencyError

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise MissingDependencyError(
        'the Lightning adapter needs lightning, which is not installed; pip install "knowiso_train[lightning]"'
    ) from error


class IsomorphismLightningCallback(Callback):  # type: ignore[misc]  # followed as untyped
    """Attaches an `IsomorphismLoss` while Lightning fits, and drives an `IsomorphismCallback`; both states lie in Lightning's checkpoints.

    The term is added in `training_step`, after the student's forward: `loss = loss + self.iso()`. The loss may be a
    submodule of the LightningModule;
    then its parameters are among those that `self.parameters()` gives to the optimizer, and DDP leaves it alone: it
    reduces by itself.

    Args:
        iso: the loss; its figures go to the loggers every `log_every_n_steps`.
        monitor: what measures; it counts optimizer steps. Its figures go to the loggers unless it has a `log`.

    Example:
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
        >>> trainer = lightning.Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        ...                             enable_model_summary=False, callbacks=[IsomorphismLightningCallback(iso)])
        >>> trainer.fit(Distilled(student, iso), torch.utils.data.DataLoader(torch.randn(16, 3, 6, 6), batch_size=8))
        >>> iso.attached, len(iso.log())
        (False, 4)
    """

    def __init__(self, iso: IsomorphismLoss | None = None, monitor: IsomorphismCallback | None = None) -> None:
        self.iso, self.monitor = iso, monitor
        self._logs = monitor is not None and monitor.log is None
        self._registered = False
        self._seen = 0  # optimizer steps that were counted

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before the module is wrapped: DDP would overwrite each process's moments by those of the first."""
        places = [prefix for prefix, module in pl_module.named_modules() if module is self.iso]
        self._registered = bool(places)
        if self.iso is not None and places:
            own = [name for name, _ in (*self.iso.named_parameters(), *self.iso.named_buffers())]
            ignored = [
                *getattr(pl_module, "_ddp_params_and_buffers_to_ignore", ()),
                *(f"{place}.{name}" for place in places for name in own),
            ]
            pl_module._ddp_params_and_buffers_to_ignore = list(dict.fromkeys(ignored))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Hooks on."""
        if self.monitor is not None and self._logs:
            self.monitor.log = partial(_to_loggers, trainer)
        if self.iso is not None:
            self.iso.to(pl_module.device).attach()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """After a resumed training's counts are back."""
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        """A training step, where the optimizer stepped."""
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        if self.iso is not None and self._seen % trainer.log_every_n_steps == 0:
            _to_loggers(trainer, self.iso.log(), step=self._seen)
        if self.monitor is not None:
            self.monitor.step()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The last measurement; report written."""
        if self.monitor is not None:
            self.monitor.end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Hooks off."""
        if self.iso is not None:
            self.iso.detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Hooks off."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """State of the monitor; and of the loss, where it is not in the LightningModule's own."""
        state: dict[str, Any] = {} if self.monitor is None else {"monitor": self.monitor.state_dict()}
        if self.iso is not None and not self._registered:
            state["iso"] = dict(self.iso.state_dict())
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            FormatError: the checkpoint lacks what this callback holds.
        """
        wanted = {
            name
            for name, part in (("monitor", self.monitor), ("iso", None if self._registered else self.iso))
            if part is not None
        }
        if set(state_dict) != wanted:
            raise FormatError(
                f"expected a checkpoint with the states of {sorted(wanted)}, got {sorted(state_dict)}; use the same callback as before"
            )
        if self.monitor is not None:
            self.monitor.load_state_dict(state_dict["monitor"])
        if "iso" in wanted and self.iso is not None:
            self.iso.load_state_dict(state_dict["iso"])


def _to_loggers(trainer: Any, values: dict[str, float], /, *, step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(values, step=step)
