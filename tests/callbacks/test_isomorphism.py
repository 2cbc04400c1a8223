"""Measuring while training: the right figures, files and messages."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from knowiso_train import IsomorphismCallback, IsomorphismLoss, measure
from knowiso_train.errors import DataError, FormatError, InputTypeError, KnowisoWarning, LayerNameError, OptionError
from knowiso_train.utils.batch import get_inputs
from tests.helpers.training import LAYERS, SHARES, held_out, network


class TestFigures:
    def test_a_copied_teacher_is_explained_and_another_is_not(self) -> None:
        teacher = network(1)
        student = copy.deepcopy(teacher)
        callback = IsomorphismCallback(student, teacher, held_out(), LAYERS)
        assert [callback.measure()[layer].explained for layer in LAYERS] == pytest.approx([1.0, 1.0], abs=1e-5)
        with torch.no_grad():
            student[5].weight.zero_()  # layer 5 knows nothing any more
        callback.steps = 1
        with pytest.warns(KnowisoWarning, match=r"5 → 5.* 6 source channel\(s\) without variance"):
            callback.measure()
        first, second = (measured.metrics for measured in callback.history)
        assert second[SHARES[0]] == first[SHARES[0]]
        assert second[SHARES[1]] == pytest.approx(0.0, abs=0.1)

    def test_it_reports_what_measure_reports_wherever_it_is_called(self) -> None:
        student, teacher = network(1), network(2, 8)
        options: dict[str, Any] = {
            "order": 1,
            "max_images": 80,
            "seed": 3,
            "directions": "both",
            "solver_options": {"epochs": 1},
        }
        direct = measure(student, teacher, held_out(), LAYERS, progress=False, **options)
        for around in ("nothing", "autocast", "no_grad", "eval"):
            callback = IsomorphismCallback(student, teacher, held_out(), LAYERS, every=2, **options)
            with (
                torch.autocast("cpu", torch.bfloat16, enabled=around == "autocast"),
                torch.set_grad_enabled(around != "no_grad"),
            ):
                student.train(around != "eval")
                assert callback.step() is None
                report = callback.step()
            assert report is not None
            assert report.pairs == direct.pairs
            assert report.settings == direct.settings
        figures = callback.history[0].metrics
        assert figures["iso/val/2-to-2/share"] == direct["2"].explained
        assert figures["iso/val/5-to-5/order_1"] == direct["5"].shares[1]
        assert figures["iso/val/5-to-5/backward/share"] == direct["5", "backward"].explained
        assert figures["iso/val/5-to-5/noise_floor"] == direct["5"].noise_floor
        assert len(figures) == 4 * 4

    def test_from_a_loss(self) -> None:
        class Keyed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = network(2)

            def forward(self, *, pixels: Tensor) -> Tensor:
                out: Tensor = self.net(pixels)
                return out

        student, teacher = network(1), Keyed()
        iso = IsomorphismLoss(
            student,
            teacher,
            {"2": "net.2"},
            kernel_size=3,
            teacher_transform=lambda images: 2 * images,
            teacher_forward=lambda model, images: model(pixels=images),
        )
        callback = IsomorphismCallback.of(iso, held_out(), every=7)
        direct = measure(
            student,
            teacher,
            held_out(),
            {"2": "net.2"},
            order=0,
            kernel_size=3,
            target_transform=lambda images: 2 * images,
            forward=lambda model, batch: (
                model(pixels=get_inputs(batch)) if model is teacher else model(get_inputs(batch))
            ),
            progress=False,
        )
        assert callback.every == 7
        assert callback.measure().pairs == direct.pairs
        assert IsomorphismCallback.of(iso, held_out(), kernel_size=1).measure().settings["kernel_size"] == 1

    def test_steps_history_and_end(self, tmp_path: Path) -> None:
        logged: list[tuple[int, dict[str, float]]] = []
        student, teacher = network(1), network(2)
        callback = IsomorphismCallback(
            student,
            teacher,
            held_out(),
            LAYERS,
            every=3,
            path=tmp_path / "out",
            log=lambda values, step: logged.append((step, values)),
        )
        callback.measure()
        for _ in range(6):
            callback.step()
        last = callback.end()  # step 6 is measured already
        assert [step for step, _ in logged] == [0, 3, 6] == [measured.step for measured in callback.history]
        assert [values for _, values in logged] == [measured.metrics for measured in callback.history]
        callback.step()
        assert callback.end().pairs == last.pairs  # the same networks
        assert [step for step, _ in logged] == [0, 3, 6, 7]
        assert all(pair.disentangler is None for measured in callback.history for pair in measured.report)

        rows = json.loads((tmp_path / "out" / "history.json").read_text())
        assert rows == [{"step": measured.step, **measured.metrics} for measured in callback.history]
        assert type(last).from_json(tmp_path / "out" / "report.json") == callback.history[-1].report
        assert (tmp_path / "out" / "shares.png").read_bytes().startswith(b"\x89PNG")

    def test_without_matplotlib_the_figures_are_written_all_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in [name for name in sys.modules if name.startswith("matplotlib")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        callback = IsomorphismCallback(network(1), network(2), held_out(), LAYERS, path=tmp_path)
        with pytest.warns(KnowisoWarning, match=r"shares\.png is not written: .*knowiso_train\[plots\]"):
            callback.end()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["history.json", "report.json"]


class TestMessages:
    def test_options_are_refused_at_once(self) -> None:
        student, teacher = network(1), network(2)

        def made(loader: Any = None, layers: Any = LAYERS, **wrong: Any) -> IsomorphismCallback:
            return IsomorphismCallback(student, teacher, held_out() if loader is None else loader, layers, **wrong)

        for wrong, message in (
            ({"every": 0}, "every must be"),
            ({"every": 0.5}, "every must be"),
            ({"log": "tensorboard"}, "log must be a function or None, got the string"),
            ({"path": __file__}, "is a file"),
            ({"max_image": 5}, r"'max_image' is no option.*nearest: \['max_images'"),
            ({"device": "cpu"}, "'device' is no option"),
            ({"order": -1}, "order must be"),
            ({"kernel_size": 2}, "kernel_size must be"),
            ({"split": (0.5, 0.5)}, "split must be"),
            ({"teacher_forward": len, "forward": len}, "not both"),
        ):
            with pytest.raises(OptionError, match=message):
                made(**wrong)
        with pytest.raises(LayerNameError):
            made(layers={"2": "nothing"})
        with pytest.raises(InputTypeError, match="can be read more than once"):
            made(iter(held_out()))
        with pytest.raises(DataError, match="empty"):
            made(DataLoader(TensorDataset(torch.zeros(0, 3, 8, 8))))

    def test_other_states_change_nothing(self) -> None:
        callback = IsomorphismCallback(network(1), network(2), held_out(), LAYERS)
        callback.step()
        callback.measure()
        before = copy.deepcopy(callback.state_dict())
        for wrong in (
            {},
            {"steps": "1", "history": []},
            {"steps": 5, "history": [{}]},
            {"steps": 5, "history": [{"step": 1, "report": {}}]},
            [],
        ):
            with pytest.raises(FormatError):
                callback.load_state_dict(wrong)  # type: ignore[arg-type]
            assert callback.state_dict() == before
