"""Measuring while training: the right figures, and a training that notices nothing of it."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import GeneralTracker, on_main_process
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset

from knowiso_train import FeatureTaps, IsomorphismCallback, IsomorphismLoss, measure
from knowiso_train.callbacks.apart import apart
from knowiso_train.errors import DataError, FormatError, InputTypeError, KnowisoWarning, LayerNameError, OptionError
from knowiso_train.features import inputs_of
from knowiso_train.features.capture import Hook

LAYERS = {"2": "2", "5": "5"}
SHARES = ["iso/val/2→2/share", "iso/val/5→5/share"]


def network(seed: int, width: int = 6) -> nn.Sequential:
    """With everything that a forward could disturb: batch norm, dropout, an in-place activation."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Dropout(0.2),
        nn.Conv2d(width, width, 3, 2, 1),
        nn.BatchNorm2d(width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 4),
    )


def held_out(count: int = 90) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(7))), batch_size=30)


def train(
    student: nn.Module,
    teacher: nn.Module,
    steps: int,
    *,
    start: int = 0,
    taught: bool = True,
    watch: Callable[[], Any] | None = None,
    at: str = "end",
) -> dict[str, Tensor]:
    """Everything that training leaves behind. `watch` is called at the end of each step, or between the student's forward and iso()."""
    iso = IsomorphismLoss(student, teacher, LAYERS, weight="balanced", refresh=2)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    student.train()
    torch.manual_seed(99)
    with iso:
        for step in range(start, start + steps):
            x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(step))
            loss = F.cross_entropy(student(x), torch.arange(16) % 4)
            if watch and at == "middle":
                watch()
            if taught:
                loss = loss + iso()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if watch and at == "end":
                watch()
    momentum = [state["momentum_buffer"] for state in optimizer.state.values()]
    left = {**student.state_dict(), **{f"iso.{name}": value for name, value in iso.state_dict().items()}, "rng": torch.get_rng_state()}
    return left | {f"momentum.{i}": value for i, value in enumerate(momentum)}


def own_hooks(*models: nn.Module) -> int:
    tables = [table for model in models for module in model.modules() for table in (module._forward_hooks, module._forward_pre_hooks)]
    return sum(isinstance(hook, Hook) for table in tables for hook in table.values())


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


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
        first, second = (measured.figures for measured in callback.history)
        assert second[SHARES[0]] == first[SHARES[0]]
        assert second[SHARES[1]] == pytest.approx(0.0, abs=0.1)

    def test_it_reports_what_measure_reports_wherever_it_is_called(self) -> None:
        student, teacher = network(1), network(2, 8)
        options: dict[str, Any] = {"order": 1, "max_images": 80, "seed": 3, "directions": "both", "solver_options": {"epochs": 1}}
        direct = measure(student, teacher, held_out(), LAYERS, progress=False, **options)
        for around in ("nothing", "autocast", "no_grad", "eval"):
            callback = IsomorphismCallback(student, teacher, held_out(), LAYERS, every=2, **options)
            with torch.autocast("cpu", torch.bfloat16, enabled=around == "autocast"), torch.set_grad_enabled(around != "no_grad"):
                student.train(around != "eval")
                assert callback.step() is None
                report = callback.step()
            assert report is not None
            assert report.pairs == direct.pairs
            assert report.settings == direct.settings
        figures = callback.history[0].figures
        assert figures["iso/val/2→2/share"] == direct["2"].explained
        assert figures["iso/val/5→5/order_1"] == direct["5"].shares[1]
        assert figures["iso/val/5→5/backward/share"] == direct["5", "backward"].explained
        assert figures["iso/val/5→5/noise_floor"] == direct["5"].noise_floor
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
            forward=lambda model, batch: model(pixels=inputs_of(batch)) if model is teacher else model(inputs_of(batch)),
            progress=False,
        )
        assert callback.every == 7
        assert callback.measure().pairs == direct.pairs
        assert IsomorphismCallback.of(iso, held_out(), kernel_size=1).measure().settings["kernel_size"] == 1

    def test_steps_history_and_end(self, tmp_path: Path) -> None:
        logged: list[tuple[int, dict[str, float]]] = []
        student, teacher = network(1), network(2)
        callback = IsomorphismCallback(
            student, teacher, held_out(), LAYERS, every=3, path=tmp_path / "out", log=lambda values, step: logged.append((step, values))
        )
        callback.measure()
        for _ in range(6):
            callback.step()
        last = callback.end()  # step 6 is measured already
        assert [step for step, _ in logged] == [0, 3, 6] == [measured.step for measured in callback.history]
        assert [values for _, values in logged] == [measured.figures for measured in callback.history]
        callback.step()
        assert callback.end().pairs == last.pairs  # the same networks
        assert [step for step, _ in logged] == [0, 3, 6, 7]
        assert all(pair.disentangler is None for measured in callback.history for pair in measured.report)

        rows = json.loads((tmp_path / "out" / "history.json").read_text())
        assert rows == [{"step": measured.step, **measured.figures} for measured in callback.history]
        assert type(last).from_json(tmp_path / "out" / "report.json") == callback.history[-1].report
        assert (tmp_path / "out" / "shares.png").read_bytes().startswith(b"\x89PNG")

    def test_without_matplotlib_the_figures_are_written_all_the_same(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in [name for name in sys.modules if name.startswith("matplotlib")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        callback = IsomorphismCallback(network(1), network(2), held_out(), LAYERS, path=tmp_path)
        with pytest.warns(KnowisoWarning, match=r"shares\.png is not written: .*knowiso_train\[plots\]"):
            callback.end()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["history.json", "report.json"]


class TestTrainingNoticesNothing:
    @pytest.mark.parametrize("at", ["end", "middle"])
    @pytest.mark.parametrize("taught", [True, False])
    def test_bit_for_bit(self, at: str, taught: bool) -> None:
        student, teacher = network(1), network(2)
        alone = train(student, teacher, 6, taught=taught)
        student = network(1)
        loader = DataLoader(held_out().dataset, batch_size=30, sampler=SubsetRandomSampler(range(80)))  # draws from the global random state
        callback = IsomorphismCallback(student, teacher, loader, LAYERS, every=2)
        watched = train(student, teacher, 6, taught=taught, watch=callback.step, at=at)
        assert [measured.step for measured in callback.history] == [2, 4, 6]
        assert callback.history[0].figures != callback.history[2].figures
        assert watched.keys() == alone.keys()
        assert [name for name, value in alone.items() if not torch.equal(value, watched[name])] == []
        assert own_hooks(student, teacher) == 0

    @pytest.mark.usefixtures("fresh_accelerate")
    def test_inside_one_autocast_block_the_gradients_stay(self) -> None:
        """Up to torch 2.8 at least, weights cast under no_grad stay in autocast's cache, and the next forward in the block has no gradient."""

        def gradients(watch: bool) -> list[Tensor]:
            model, teacher = network(1), network(2)
            accelerated = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)  # its forward keeps its own autocast
            callback = IsomorphismCallback(accelerated, teacher, held_out(), LAYERS, every=1)
            torch.manual_seed(5)
            with torch.autocast("cpu", torch.bfloat16):
                if watch:
                    callback.step()
                accelerated(torch.randn(8, 3, 8, 8)).square().sum().backward()
            return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

        alone, watched = gradients(False), gradients(True)
        assert len(alone) == len(watched) == len(list(network(1).parameters()))
        assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))

    @pytest.mark.parametrize("in_place", [True, False])
    def test_a_compiled_student(self, in_place: bool) -> None:
        def trained(watch: bool) -> tuple[dict[str, Tensor], IsomorphismCallback, int]:
            torch.compiler.reset()
            student, teacher = network(1), network(2)
            compiled: Any = student
            graphs: list[int] = []

            def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
                graphs.append(1)
                return graph.forward

            if in_place:
                student.compile(backend=counting)
            else:
                compiled = torch.compile(student, backend=counting)
            callback = IsomorphismCallback(compiled, teacher, held_out(), LAYERS, every=2)
            return train(compiled, teacher, 4, watch=callback.step if watch else None), callback, len(graphs)

        alone, _, graphs = trained(False)
        watched, callback, graphs_watched = trained(True)
        assert [name for name, value in alone.items() if not torch.equal(value, watched[name])] == []
        assert graphs_watched == graphs > 0  # nothing is compiled anew
        assert [measured.step for measured in callback.history] == [2, 4]
        torch.compiler.reset()

    def test_captures_and_the_order_of_hooks_stand(self) -> None:
        model = network(1)
        fired: list[str] = []

        def once(*args: Any) -> None:
            fired.append("once")
            handle.remove()

        model[2].register_forward_hook(lambda *args: fired.append("before"))
        taps = FeatureTaps(model, "2").attach()
        handle = model[2].register_forward_hook(once)
        model[2].register_forward_hook(lambda *args: fired.append("after"))
        order = list(model[2]._forward_hooks.values())
        with apart(model):
            assert own_hooks(model) == 0
            model(torch.randn(2, 3, 8, 8))
        order.remove(once)  # it took itself off, and stays off
        assert list(model[2]._forward_hooks.values()) == order
        assert fired == ["before", "once", "after"]
        x = torch.randn(4, 3, 8, 8)
        model(x)
        with pytest.raises(RuntimeError, match="channels"), apart(model):
            model(torch.randn(2, 5, 8, 8))
        assert len(taps.collect()["2"]) == 4
        taps.detach()

    def test_an_error_in_the_loader_leaves_nothing(self) -> None:
        class Broken(Dataset[Tensor]):
            def __len__(self) -> int:
                return 90

            def __getitem__(self, index: int) -> Tensor:
                if index == 40:
                    raise OSError("image 40 cannot be read")
                return torch.zeros(3, 8, 8)

        student, teacher = network(1), network(2)
        callback = IsomorphismCallback(student, teacher, DataLoader(Broken(), batch_size=9), LAYERS, every=1)
        with IsomorphismLoss(student, teacher, LAYERS) as iso:
            hooks, random = own_hooks(student, teacher), torch.get_rng_state()
            out = student(torch.randn(16, 3, 8, 8))
            with pytest.raises(OSError, match="image 40"):
                callback.step()
            assert own_hooks(student, teacher) == hooks > 0
            assert student.training
            assert all(module.training for module in student.modules())
            assert not torch.equal(torch.get_rng_state(), random)  # dropout's draw stands
            (out.sum() + iso()).backward()  # what was captured before it is still there
        assert callback.history == []
        assert own_hooks(student, teacher) == 0

    def test_own_hooks_stay_off_after_the_loss(self) -> None:
        student, teacher = network(1), network(2)
        callback = IsomorphismCallback(student, teacher, held_out(), LAYERS, every=1)
        with IsomorphismLoss(student, teacher, LAYERS) as iso:
            callback.step()
            with pytest.raises(RuntimeError, match="the student has not run"):
                iso()  # the measurement's forward is none of the student's
        assert own_hooks(student, teacher) == 0


class Listed(GeneralTracker):  # type: ignore[misc]
    """A tracker that remembers."""

    name, requires_logging_directory, main_process_only = "listed", False, True

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> list[Any]:
        return self.rows

    @on_main_process  # type: ignore[untyped-decorator]
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Nothing to store."""

    @on_main_process  # type: ignore[untyped-decorator]
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.rows.append((step, values))


@pytest.mark.usefixtures("fresh_accelerate")
class TestAccelerate:
    def run(self, folder: Path, steps: int, *, resume: bool = False, save: bool = False) -> tuple[IsomorphismCallback, Listed, dict[str, Tensor]]:
        tracker = Listed()
        accelerator = Accelerator(cpu=True, log_with=tracker)
        accelerator.init_trackers("training")
        student, teacher = network(1), network(2)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
        prepared, prepared_optimizer = accelerator.prepare(student, optimizer)
        iso = IsomorphismLoss(prepared, teacher, LAYERS)
        callback = IsomorphismCallback.of(iso, held_out(), every=2, log=accelerator.log)
        accelerator.register_for_checkpointing(iso, callback)
        if resume:
            accelerator.load_state(str(folder))
        with iso:
            for step in range(callback.steps, callback.steps + steps):
                loss = prepared(torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(step))).square().mean() + iso()
                accelerator.backward(loss)
                prepared_optimizer.step()
                prepared_optimizer.zero_grad()
                callback.step()
        if save:
            accelerator.save_state(str(folder), safe_serialization=True)
        return callback, tracker, student.state_dict()

    def test_saved_and_resumed_it_goes_on(self, tmp_path: Path) -> None:
        whole, _, weights = self.run(tmp_path / "none", 7)
        first, _, _ = self.run(tmp_path / "state", 3, save=True)
        resumed, tracker, resumed_weights = self.run(tmp_path / "state", 4, resume=True)
        assert resumed.steps == 7
        assert [measured.step for measured in resumed.history] == [2, 4, 6]
        assert [measured.figures for measured in resumed.history] == [measured.figures for measured in whole.history]
        assert resumed.history[0] == first.history[0]  # as it was saved, seconds and all
        assert all(torch.equal(value, resumed_weights[name]) for name, value in weights.items())
        assert [step for step, _ in tracker.rows] == [4, 6]
        plain = torch.load(tmp_path / "state" / "custom_checkpoint_1.pkl", weights_only=True)
        assert plain == first.state_dict()

    def test_trackers_get_the_figures(self, tmp_path: Path) -> None:
        callback, tracker, _ = self.run(tmp_path, 5)
        assert tracker.rows == [(measured.step, measured.figures) for measured in callback.history]
        assert [step for step, _ in tracker.rows] == [2, 4]
        assert all(0 < values[name] < 1 for _, values in tracker.rows for name in SHARES)


class TestMessages:
    def test_options_are_refused_at_once(self) -> None:
        student, teacher = network(1), network(2)

        def made(loader: Any = None, layers: Any = LAYERS, **wrong: Any) -> IsomorphismCallback:
            return IsomorphismCallback(student, teacher, held_out() if loader is None else loader, layers, **wrong)

        for wrong, message in (
            ({"every": 0}, "every must be"),
            ({"every": 0.5}, "every must be"),
            ({"log": "tensorboard"}, r"log must be callable.*accelerator\.log"),
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
        for wrong in ({}, {"steps": "1", "history": []}, {"steps": 5, "history": [{}]}, {"steps": 5, "history": [{"step": 1, "report": {}}]}, []):
            with pytest.raises(FormatError):
                callback.load_state_dict(wrong)  # type: ignore[arg-type]
            assert callback.state_dict() == before


def worker(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(29_000 + os.getppid() % 500))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        logged: list[int] = []
        student = nn.parallel.DistributedDataParallel(network(1))  # its own forward would broadcast buffers and wait for the other process
        callback = IsomorphismCallback(
            student, network(2), held_out(95), LAYERS, every=2, path=Path(folder) / f"of-{rank}", log=lambda values, step: logged.append(step)
        )
        for _ in range(3):
            callback.step()
        callback.end()
        torch.save({"logged": logged, **callback.state_dict()}, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_measure_what_one_measures_and_one_speaks(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2, join=True)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [state["logged"] for state in states] == [[2, 3], []]
    assert (tmp_path / "of-0" / "report.json").exists()
    assert not (tmp_path / "of-1").exists()
    one = measure(network(1), network(2), held_out(95), LAYERS, order=0, progress=False)
    for state in states:
        assert state["steps"] == 3
        assert [entry["step"] for entry in state["history"]] == [2, 3]
        for entry in state["history"]:
            report = entry["report"]
            assert report["images"] == one.images
            assert [pair["unexplained"] for pair in report["pairs"]] == pytest.approx([pair.unexplained for pair in one], abs=1e-5)
