"""Adapter of the Trainer of Hugging Face: loss term, hooks, logged figures and resuming."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from knowiso_train import IsomorphismCallback, IsomorphismLoss, measure
from knowiso_train.distillation import kd_loss
from knowiso_train.errors import DataError, OptionError
from tests.helpers.training import count_hooks

SHARE = "iso/val/{0}-to-{0}/share"
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
        if batches > 1:
            trainer.distillation_loss = lambda out: (
                trainer.iso() + kd_loss(out.logits, trainer.iso.teacher_output.logits)
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
        assert count_hooks(trainer.iso.student, trainer.iso.teacher) == 0

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
                loss = out.loss + iso()
                if batches > 1:
                    loss = loss + kd_loss(out.logits, iso.teacher_output.logits)
                (loss / batches).backward()
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
            assert count_hooks(student, teacher) == 0
            assert monitor.steps == steps
        assert [measured.metrics for measured in monitor.history] == [
            measured.metrics for measured in self.monitor(first).history
        ]
        assert all(torch.equal(first.model.state_dict()[name], value) for name, value in student.state_dict().items())

    def test_the_last_step_is_measured_before_the_best_weights_are_loaded(self, tmp_path: Path) -> None:
        trainer = self.trainer(tmp_path, max_steps=9)
        callback, monitor = trainer._isomorphism, self.monitor(trainer)
        monitor.steps = 3
        stops = SimpleNamespace(should_training_stop=True)
        callback.on_evaluate(trainer.args, trainer.state, SimpleNamespace(should_training_stop=False))
        assert not monitor.measured
        callback.on_evaluate(trainer.args, trainer.state, stops)
        assert monitor.measured
        # A step that was not measured is not that of the weights that were loaded
        monitor.steps = 5
        arguments = SimpleNamespace(load_best_model_at_end=True)
        callback.on_train_end(arguments, SimpleNamespace(best_model_checkpoint="checkpoint-3"), stops)
        assert [measured.step for measured in monitor.history] == [3]
        callback.on_train_end(arguments, SimpleNamespace(best_model_checkpoint=None), stops)
        assert [measured.step for measured in monitor.history] == [3, 5]

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
        assert count_hooks(trainer.iso.student, trainer.iso.teacher) == 0

    def test_the_teacher_moves_to_the_device_of_the_trainer(self, tmp_path: Path) -> None:
        trainer = self.trainer(tmp_path)
        callback = self.own.IsomorphismTrainerCallback(trainer.iso)
        callback.on_train_begin(SimpleNamespace(device="meta"), SimpleNamespace(global_step=0), None)
        trainer.iso.detach()
        assert {p.device.type for p in trainer.iso.teacher.parameters()} == {"meta"}

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
