"""Adapter of Lightning: loss term, hooks, logged figures and resuming."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from knowiso_train import IsomorphismCallback, IsomorphismLoss, measure
from knowiso_train.errors import FormatError
from tests.helpers.training import count_hooks

SHARE = "iso/val/{0}-to-{0}/share"
LINEAR: dict[str, Any] = {"scale": "linear", "weight": 1.0}


def drawn(step: int) -> tuple[Tensor, Tensor]:
    """A batch; dropout goes on from its seed."""
    torch.manual_seed(step)
    return torch.randn(8, 3, 8, 8), torch.arange(8) % 3


class TestLightning:
    @pytest.fixture(autouse=True)
    def _package(self) -> None:
        self.lightning: Any = importlib.import_module("lightning")
        self.own: Any = importlib.import_module("knowiso_train.integrations.lightning")

    @staticmethod
    def network(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(6, 3),
        )

    def module(self, solver: Any, registered: bool, watch: Callable[[int], None] | None = None) -> Any:
        lightning = self.lightning

        class Distilled(lightning.LightningModule):  # type: ignore[misc, name-defined]
            def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
                super().__init__()
                self.student = student
                iso = IsomorphismLoss(student, teacher, "2", solver=solver, refresh=2, **LINEAR)
                self.held = [iso]
                if registered:
                    self.iso = iso

            def training_step(self, batch: Any, index: int) -> Tensor:
                if watch is not None:
                    watch(self.global_step)
                # And not the loader's batch: Lightning resumes an epoch at its beginning
                x, y = drawn(self.global_step)
                loss: Tensor = F.cross_entropy(self.student(x), y) + self.held[0]()
                return loss

            def validation_step(self, batch: Any, index: int) -> None:
                self.student(batch[0])

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD([*self.student.parameters(), *self.held[0].parameters()], lr=0.05)

        return Distilled(self.network(1), self.network(2))

    def images(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.zeros(64, 3, 8, 8)), batch_size=8)

    def held_out(self) -> DataLoader[Any]:
        return DataLoader(
            TensorDataset(torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(4))), batch_size=20
        )

    def trainer(
        self, module: Any, folder: Path, steps: int, every: int = 2, **more: Any
    ) -> tuple[Any, IsomorphismCallback]:
        monitor = IsomorphismCallback.of(module.held[0], self.held_out(), every=every)
        callback = self.own.IsomorphismLightningCallback(module.held[0], monitor)
        quiet = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        options = (
            quiet
            | {"max_steps": steps, "accelerator": "cpu", "default_root_dir": folder, "log_every_n_steps": 1}
            | more
        )
        return self.lightning.Trainer(callbacks=[callback], **options), monitor

    @pytest.mark.parametrize("solver", ["closed_form", "learned"])
    def test_it_trains_as_a_plain_loop_does(self, solver: Any, tmp_path: Path) -> None:
        module = self.module(solver, registered=True)
        begun = {name: value.clone() for name, value in module.held[0].state_dict().items()}
        trainer, monitor = self.trainer(
            module, tmp_path, 5, accumulate_grad_batches=1, limit_val_batches=2, num_sanity_val_steps=1
        )
        trainer.fit(module, self.images(), self.images())
        assert count_hooks(module.student, module.held[0].teacher) == 0
        assert [measured.step for measured in monitor.history] == [2, 4, 5]

        student, teacher = self.network(1), self.network(2)
        iso = IsomorphismLoss(student, teacher, "2", solver=solver, refresh=2, **LINEAR)
        iso.load_state_dict(begun)
        optimizer = torch.optim.SGD([*student.parameters(), *iso.parameters()], lr=0.05)
        with iso:
            for step in range(5):
                x, y = drawn(step)
                loss = F.cross_entropy(student(x), y) + iso()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for name, value in student.state_dict().items():
            assert torch.equal(module.student.state_dict()[name], value), name
        kernel_size = min(iso.kernel_sizes.values())
        now = measure(student, teacher, self.held_out(), "2", order=0, kernel_size=kernel_size, progress=False)
        assert monitor.history[-1].metrics[SHARE.format("2")] == now["2"].explained

    @pytest.mark.parametrize("registered", [True, False])
    def test_resumed_equals_uninterrupted(self, registered: bool, tmp_path: Path) -> None:
        whole = self.module("learned", registered)
        begun = {name: value.clone() for name, value in whole.held[0].state_dict().items()}
        trainer, all_of_it = self.trainer(whole, tmp_path, 7)
        trainer.fit(whole, self.images())

        first = self.module("learned", registered)
        first.held[0].load_state_dict(begun)
        trainer, _ = self.trainer(first, tmp_path, 3)
        trainer.fit(first, self.images())
        trainer.save_checkpoint(tmp_path / "cut.ckpt")
        saved = torch.load(tmp_path / "cut.ckpt", weights_only=True)
        (state,) = saved["callbacks"].values()
        assert set(state) == ({"monitor"} if registered else {"monitor", "iso"})

        second = self.module("learned", registered)
        trainer, resumed = self.trainer(second, tmp_path, 7)
        trainer.fit(second, self.images(), ckpt_path=tmp_path / "cut.ckpt", weights_only=True)
        for name, value in whole.student.state_dict().items():
            assert torch.equal(second.student.state_dict()[name], value), name
        for name, value in whole.held[0].state_dict().items():
            assert torch.equal(second.held[0].state_dict()[name], value), name
        assert [measured.step for measured in resumed.history] == [2, 3, 4, 6, 7]  # the first run ended at 3
        kept = {measured.step: measured.metrics for measured in resumed.history}
        assert all(kept[measured.step] == measured.metrics for measured in all_of_it.history)

    def test_the_figures_go_to_the_loggers(self, tmp_path: Path) -> None:
        from lightning.pytorch.loggers import CSVLogger

        rows: list[tuple[int, dict[str, float]]] = []

        class Listed(CSVLogger):  # type: ignore[misc]
            def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
                rows.append((int(step or 0), metrics))

        module = self.module("closed_form", registered=True)
        trainer, monitor = self.trainer(module, tmp_path, 4, logger=Listed(tmp_path), accumulate_grad_batches=2)
        trainer.fit(module, self.images())
        measured = [(step, values) for step, values in rows if SHARE.format("2") in values]
        assert measured == [(entry.step, entry.metrics) for entry in monitor.history]
        assert [step for step, _ in measured] == [2, 4]
        # Optimizer steps, not batches
        assert [step for step, values in rows if "iso/train/2/loss" in values] == [1, 2, 3, 4]

    def test_an_error_leaves_no_hook(self, tmp_path: Path) -> None:
        def fail(step: int) -> None:
            if step == 2:
                raise ZeroDivisionError("in the third step")

        module = self.module("closed_form", registered=True, watch=fail)
        trainer, _ = self.trainer(module, tmp_path, 5)
        with pytest.raises(ZeroDivisionError, match="third step"):
            trainer.fit(module, self.images())
        assert count_hooks(module.student, module.held[0].teacher) == 0

    def test_ddp_leaves_a_registered_loss_alone(self, tmp_path: Path) -> None:
        module = self.module("learned", registered=True)
        trainer, _ = self.trainer(module, tmp_path, 1)
        trainer.fit(module, self.images())
        ignored = set(module._ddp_params_and_buffers_to_ignore)
        own = [name for name, _ in (*module.named_parameters(), *module.named_buffers()) if name.startswith("iso.")]
        assert len(own) > 3
        assert ignored == set(own)

    def test_the_evaluation_of_a_checkpoint_does_not_restore_the_monitor(self, tmp_path: Path) -> None:
        module = self.module("closed_form", registered=False)
        trainer, monitor = self.trainer(module, tmp_path, steps=2)
        trainer.fit(module, self.images())
        trainer.save_checkpoint(tmp_path / "two.ckpt")
        trainer.fit_loop.epoch_loop.max_steps = 4
        trainer.fit(module, self.images())
        steps = [measured.step for measured in monitor.history]
        assert monitor.steps == 4
        trainer.validate(module, self.held_out(), ckpt_path=tmp_path / "two.ckpt", weights_only=False)
        assert monitor.steps == 4
        assert [measured.step for measured in monitor.history] == steps

    def test_another_callbacks_state_is_refused(self) -> None:
        module = self.module("closed_form", registered=False)
        callback = self.own.IsomorphismLightningCallback(module.held[0])
        with pytest.raises(FormatError, match=r"expected a checkpoint with the states of \['iso'\], got \['monitor'\]"):
            callback.load_state_dict({"monitor": {"steps": 1, "history": []}})

    @pytest.mark.parametrize(("solver", "registered"), [("closed_form", True), ("learned", True), ("learned", False)])
    @pytest.mark.parametrize("tuner", ["lr_find", "LearningRateFinder", "BatchSizeFinder", "scale_batch_size"])
    def test_tuners_train_with_the_loss(self, tuner: str, solver: Any, registered: bool, tmp_path: Path) -> None:
        from lightning.pytorch import callbacks
        from lightning.pytorch.tuner import Tuner

        module = self.module(solver, registered)
        module.lr, module.batch_size = 0.01, 8
        module.configure_optimizers = lambda: torch.optim.SGD(
            [*module.student.parameters(), *module.held[0].parameters()], lr=module.lr
        )
        module.train_dataloader = lambda: DataLoader(TensorDataset(torch.zeros(64, 3, 8, 8)), module.batch_size)
        module.val_dataloader = module.train_dataloader
        trainer, monitor = self.trainer(module, tmp_path, 4, limit_val_batches=1)
        if tuner == "lr_find":
            Tuner(trainer).lr_find(module, num_training=12, update_attr=True)
        elif tuner == "scale_batch_size":
            Tuner(trainer).scale_batch_size(module, max_trials=2, steps_per_trial=2)
        elif tuner == "LearningRateFinder":
            trainer.callbacks.insert(0, callbacks.LearningRateFinder(num_training_steps=12))
        else:
            trainer.callbacks.insert(0, callbacks.BatchSizeFinder(max_trials=2, steps_per_trial=2))
        trainer.fit(module)
        assert trainer.global_step == 4
        assert [measured.step for measured in monitor.history] == [2, 4]
        assert count_hooks(module.student, module.held[0].teacher) == 0

    def test_the_teacher_moves_to_the_device_of_the_module(self) -> None:
        module = self.module("closed_form", registered=True)
        elsewhere = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
        self.own.IsomorphismLightningCallback(module.held[0]).setup(elsewhere, module, "fit")
        assert {p.device.type for p in module.held[0].teacher.parameters()} == {"meta"}

    def test_an_attached_loss_is_tolerated(self, tmp_path: Path) -> None:
        module = self.module("closed_form", registered=False)
        module.held[0].attach()
        trainer, _ = self.trainer(module, tmp_path, 2)
        trainer.fit(module, self.images())
        assert count_hooks(module.student, module.held[0].teacher) == 0
