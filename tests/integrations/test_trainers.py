"""Adapters of the Trainer of Hugging Face and of Lightning: loss term, hooks, logged figures and resuming."""

from __future__ import annotations

import importlib
import json
import sys
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
from knowiso_train.errors import DataError, FormatError, MissingDependencyError, OptionError
from knowiso_train.features.hooks import DetachedOnCopyHook

SHARE = "iso/val/{0}-to-{0}/share"


def own_hooks(*models: nn.Module) -> int:
    tables = [
        table
        for model in models
        for module in model.modules()
        for table in (module._forward_hooks, module._forward_pre_hooks)
    ]
    return sum(isinstance(hook, DetachedOnCopyHook) for table in tables for hook in table.values())


@pytest.mark.parametrize(("package", "adapter"), [("transformers", "Trainer"), ("lightning", "Lightning")])
def test_a_missing_package_is_named_with_the_way_to_get_it(
    package: str, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"knowiso_train.integrations.{package}", raising=False)
    with pytest.raises(
        ImportError, match=rf"{adapter} adapter needs {package}.* pip install \"knowiso_train\[{package}\]\""
    ) as raised:
        importlib.import_module(f"knowiso_train.integrations.{package}")
    assert isinstance(raised.value, MissingDependencyError)


LINEAR: dict[str, Any] = {"scale": "linear", "weight": 1.0}


class TestTransformers:
    LAYER = "resnet.encoder.stages.1"

    @pytest.fixture(autouse=True)
    def _package(self) -> None:
        # Both packages are in the test extra: without them these tests fail instead of being skipped
        self.hf: Any = importlib.import_module("transformers")
        self.own: Any = importlib.import_module("knowiso_train.integrations.transformers")

    def network(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        config = self.hf.ResNetConfig(
            embedding_size=6, hidden_sizes=[6, 8], depths=[1, 1], layer_type="basic", hidden_act="silu", num_labels=3
        )
        model: nn.Module = self.hf.ResNetForImageClassification(config)
        return model

    def images(self, count: int = 48) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(3)
        return [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 3} for i in range(count)]

    def held_out(self) -> DataLoader[Any]:
        return DataLoader(
            TensorDataset(torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(4))), batch_size=20
        )

    def arguments(self, folder: Path, **more: Any) -> Any:
        fixed = {
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "per_device_train_batch_size": 8,
            "logging_steps": 1,
            "save_strategy": "no",
        }
        return self.hf.TrainingArguments(
            str(folder), **fixed | {"learning_rate": 0.05, "optim": "sgd", "max_grad_norm": 0.0} | more
        )

    def trainer(self, folder: Path, solver: Any = "closed_form", every: int = 2, **more: Any) -> Any:
        student, teacher = self.network(1), self.network(2)
        iso = IsomorphismLoss(
            student, teacher, self.LAYER, solver=solver, refresh=2, example=torch.zeros(1, 3, 16, 16), **LINEAR
        )
        monitor = IsomorphismCallback.of(iso, self.held_out(), every=every)
        images = self.images()
        return self.own.IsomorphismTrainer(
            model=student,
            args=self.arguments(folder, **more),
            train_dataset=images,
            eval_dataset=images[:16],
            iso=iso,
            monitor=monitor,
        )

    def monitor(self, trainer: Any) -> IsomorphismCallback:
        found: IsomorphismCallback = trainer._isomorphism.monitor
        return found

    @pytest.mark.parametrize("solver", ["closed_form", "learned"])
    @pytest.mark.parametrize(("batches", "counted"), [(1, False), (2, False), (2, True)])
    def test_it_trains_as_a_plain_loop_does(self, solver: Any, batches: int, counted: bool, tmp_path: Path) -> None:
        trainer = self.trainer(
            tmp_path,
            solver,
            max_steps=4,
            lr_scheduler_type="constant",
            gradient_accumulation_steps=batches,
            eval_strategy="steps",
            eval_steps=2,
        )
        trainer.model_accepts_loss_kwargs = False  # the Trainer divides by the accumulated batches
        if counted:  # the loss is over all images of the step already, and the Trainer divides nothing
            trainer.compute_loss_func = lambda out, labels, num_items_in_batch=None: (
                F.cross_entropy(out.logits, labels, reduction="sum") / (num_items_in_batch or len(labels))
            )
        order: list[list[float]] = []
        handle = trainer.model.register_forward_pre_hook(
            lambda module, args, kwargs: (
                order.append(kwargs["pixel_values"].flatten(1)[:, 0].tolist()) if module.training else None
            ),
            with_kwargs=True,
        )
        trainer.train()
        handle.remove()
        assert own_hooks(trainer.iso.student, trainer.iso.teacher) == 0

        by_first = {float(entry["pixel_values"].flatten()[0]): entry for entry in self.images()}
        student, teacher = self.network(1), self.network(2)
        iso = IsomorphismLoss(
            student, teacher, self.LAYER, solver=solver, refresh=2, example=torch.zeros(1, 3, 16, 16), **LINEAR
        )
        if solver == "learned":  # as it began there
            iso.load_state_dict(self.trainer(tmp_path, solver).iso.state_dict())
        optimizer = torch.optim.SGD([*student.parameters(), *iso.parameters()], lr=0.05)
        student.train()
        with iso:
            for step, firsts in enumerate(order):
                entries = [by_first[first] for first in firsts]
                labels = torch.tensor([entry["labels"] for entry in entries])
                out = student(pixel_values=torch.stack([entry["pixel_values"] for entry in entries]), labels=labels)
                ((out.loss + iso()) / batches).backward()
                if (step + 1) % batches == 0:
                    optimizer.step()
                    optimizer.zero_grad()
        assert len(order) == 4 * batches
        for name, value in student.state_dict().items():
            torch.testing.assert_close(trainer.model.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
        for name, value in iso.state_dict().items():
            torch.testing.assert_close(trainer.iso.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)

    def test_the_figures_are_in_the_logs(self, tmp_path: Path) -> None:
        trainer = self.trainer(tmp_path, max_steps=5)
        untouched = self.trainer(tmp_path, max_steps=5)
        untouched.remove_callback(self.own.IsomorphismTrainerCallback)
        with untouched.iso:
            untouched.train()
        trainer.train()
        for name, value in untouched.model.state_dict().items():
            assert torch.equal(trainer.model.state_dict()[name], value), name  # measuring changes nothing
        history = trainer.state.log_history
        shares = {row["step"]: row[SHARE.format(self.LAYER)] for row in history if SHARE.format(self.LAYER) in row}
        assert sorted(shares) == [2, 4, 5]
        assert shares == {
            measured.step: measured.metrics[SHARE.format(self.LAYER)] for measured in self.monitor(trainer).history
        }
        now = measure(trainer.iso.student, trainer.iso.teacher, self.held_out(), self.LAYER, order=0, progress=False)
        assert shares[5] == now[self.LAYER].explained
        trained = [row for row in history if "loss" in row]
        assert [row["step"] for row in trained] == [1, 2, 3, 4, 5]  # a measured step's own figures are not lost
        assert trained[-1][f"iso/train/{self.LAYER}/loss"] > 0

    @pytest.mark.parametrize("solver", ["closed_form", "learned"])
    def test_resumed_equals_uninterrupted(self, solver: Any, tmp_path: Path) -> None:
        whole = self.trainer(tmp_path / "whole", solver, max_steps=7)
        whole.train()
        first = self.trainer(tmp_path / "cut", solver, max_steps=7, save_strategy="steps", save_steps=3)
        first.add_callback(self.stopping(at=4))
        first.train()
        folder = tmp_path / "cut" / "checkpoint-3"
        assert {"isomorphism.safetensors", "isomorphism.json"} <= {path.name for path in folder.iterdir()}
        assert json.loads((folder / "isomorphism.json").read_text())["steps"] == 3
        second = self.trainer(tmp_path / "cut", solver, max_steps=7, save_strategy="steps", save_steps=3)
        second.train(resume_from_checkpoint=True)
        for name, value in whole.model.state_dict().items():
            assert torch.equal(second.model.state_dict()[name], value), name
        for name, value in whole.iso.state_dict().items():
            assert torch.equal(second.iso.state_dict()[name], value), name
        figures = [(measured.step, measured.metrics) for measured in self.monitor(whole).history]
        assert figures == [(measured.step, measured.metrics) for measured in self.monitor(second).history]
        assert [step for step, _ in figures] == [2, 4, 6, 7]

    def test_a_trainer_of_ones_own_with_the_callback_alone(self, tmp_path: Path) -> None:
        class Mine(self.hf.Trainer):  # type: ignore[misc, name-defined]
            def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
                loss, out = super().compute_loss(model, inputs, return_outputs=True, **more)
                return (loss, out) if return_outputs else loss + iso()

        first = self.trainer(tmp_path / "whole", max_steps=4)
        first.train()
        for steps, resumed in ((2, None), (4, True)):
            student, teacher = self.network(1), self.network(2)
            iso = IsomorphismLoss(student, teacher, self.LAYER, refresh=2, example=torch.zeros(1, 3, 16, 16), **LINEAR)
            monitor = IsomorphismCallback.of(iso, self.held_out(), every=2)
            args = self.arguments(tmp_path / "own", max_steps=4, save_strategy="steps", save_steps=2)
            callbacks = [self.own.IsomorphismTrainerCallback(iso, monitor), self.stopping(at=steps)]
            Mine(model=student, args=args, train_dataset=self.images(), callbacks=callbacks).train(
                resume_from_checkpoint=resumed
            )
            assert own_hooks(student, teacher) == 0
            assert monitor.steps == steps
        assert [measured.metrics for measured in monitor.history] == [
            measured.metrics for measured in self.monitor(first).history
        ]
        assert all(torch.equal(first.model.state_dict()[name], value) for name, value in student.state_dict().items())

    def stopping(self, at: int) -> Any:
        class Stopping(self.hf.TrainerCallback):  # type: ignore[misc, name-defined]
            def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                control.should_training_stop = state.global_step >= at

        return Stopping()

    def test_an_error_leaves_no_hook(self, tmp_path: Path) -> None:
        trainer = self.trainer(tmp_path, max_steps=4)
        trainer.train_dataset[:] = [
            {**entry, "pixel_values": entry["pixel_values"][:2]} for entry in trainer.train_dataset
        ]
        with pytest.raises(ValueError, match="channel"):
            trainer.train()
        assert own_hooks(trainer.iso.student, trainer.iso.teacher) == 0

    def test_messages(self, tmp_path: Path) -> None:
        trainer = self.trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
        trainer.train()
        (tmp_path / "checkpoint-1" / "isomorphism.json").unlink()
        with pytest.raises(DataError, match=r"checkpoint-1 has no isomorphism\.json"):
            self.trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        other = self.trainer(tmp_path, max_steps=2)
        other.model = other.model_wrapped = self.network(5)
        with pytest.raises(OptionError, match="the Trainer and IsomorphismLoss have different networks"):
            other.train()


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
        assert own_hooks(module.student, module.held[0].teacher) == 0
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
        assert own_hooks(module.student, module.held[0].teacher) == 0

    def test_ddp_leaves_a_registered_loss_alone(self, tmp_path: Path) -> None:
        module = self.module("learned", registered=True)
        trainer, _ = self.trainer(module, tmp_path, 1)
        trainer.fit(module, self.images())
        ignored = set(module._ddp_params_and_buffers_to_ignore)
        own = [name for name, _ in (*module.named_parameters(), *module.named_buffers()) if name.startswith("iso.")]
        assert len(own) > 3
        assert ignored == set(own)

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
        assert own_hooks(module.student, module.held[0].teacher) == 0

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
        assert own_hooks(module.student, module.held[0].teacher) == 0
