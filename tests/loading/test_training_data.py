"""Tests of training data, run folders, cards and accuracy of the recipes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from knowiso_train.errors import DataError, FormatError, OptionError, ShapeError
from knowiso_train.experiment.arguments import RecipeParser, at_least, parse_key_value
from knowiso_train.experiment.cards import network_card, results_table
from knowiso_train.experiment.evaluation import top1_accuracy
from knowiso_train.experiment.run_folder import RunFolder
from knowiso_train.loading.checkpoints import load_checkpoint
from knowiso_train.loading.datasets import TrainingImages, labeled_images, training_loader
from knowiso_train.loading.timm import InputBridge, InputTransform, input_transform

COUNT = 11


def numbered(count: int = COUNT) -> list[tuple[Tensor, int]]:
    """Image i is i everywhere, and is labeled i."""
    return [(torch.full((3, 6, 5), float(i)), i) for i in range(count)]


def epoch_of(loader: Any, epoch: int) -> list[tuple[Tensor, Tensor]]:
    loader.sampler.epoch = epoch
    return list(loader)


class TestTrainingLoader:
    def test_an_epoch_is_a_permutation_cut_into_whole_batches(self) -> None:
        loader = training_loader(numbered(), batch_size=4)
        orders = [torch.cat([labels for _, labels in epoch_of(loader, epoch)]).tolist() for epoch in range(3)]
        for order in orders:
            assert len(set(order)) == len(order) == 8
            assert set(order) <= set(range(COUNT))
        assert orders[0] != orders[1] != orders[2]
        assert set().union(*orders) == set(range(COUNT))  # none is always left over
        for images, labels in loader:
            assert torch.equal(images[:, 0, 0, 0], labels.float())

    def test_it_depends_on_seed_epoch_and_index_alone(self) -> None:
        pictures = [(torch.rand(3, 6, 5), i) for i in range(COUNT)]
        options: dict[str, Any] = {"batch_size": 3, "padding": 2, "flip": True}
        first = training_loader(pictures, seed=5, **options)
        epoch_of(first, 0)
        torch.manual_seed(99)
        a = epoch_of(first, 1)
        b = epoch_of(training_loader(pictures, seed=5, **options), 1)
        in_workers = epoch_of(training_loader(pictures, seed=5, workers=2, **options), 1)
        other = epoch_of(training_loader(pictures, seed=6, **options), 1)
        for x, y, z in zip(a, b, in_workers, strict=True):
            assert all(torch.equal(*pair) for pair in (*zip(x, y, strict=True), *zip(x, z, strict=True)))
        assert not torch.equal(torch.cat([x for x, _ in a]), torch.cat([x for x, _ in other]))

    def test_persistent_workers_see_the_next_epoch(self) -> None:
        pictures = [(torch.rand(3, 6, 5), i) for i in range(COUNT)]
        here, there = (training_loader(pictures, batch_size=COUNT, padding=2, workers=workers) for workers in (0, 1))
        for epoch in range(3):
            [(a, _)], [(b, _)] = epoch_of(here, epoch), epoch_of(there, epoch)
            assert torch.equal(a, b)

    def test_crops_and_flips_are_what_they_say(self) -> None:
        image = torch.rand(3, 6, 5) + 1
        images = TrainingImages([(image, 7)], padding=2, flip=True)
        padded = F.pad(image, [2, 2, 2, 2])
        crops = {(top, left): padded[:, top : top + 6, left : left + 5] for top in range(5) for left in range(5)}
        possible = {
            (*where, flip): crop.flip(2) if flip else crop for where, crop in crops.items() for flip in (False, True)
        }
        drawn = set()
        for epoch in range(600):
            given, label = images[epoch]
            matches = [key for key, wanted in possible.items() if torch.equal(given, wanted)]
            assert (len(matches), label) == (1, 7)
            drawn.add(matches[0])
        assert drawn == set(possible)

    def test_nothing_asked_for_nothing_changed(self) -> None:
        image = torch.rand(3, 6, 5)
        assert torch.equal(TrainingImages([(image, 0)])[3][0], image)

    @pytest.mark.parametrize("name", ["batch_size", "seed", "padding", "workers"])
    def test_options_without_meaning(self, name: str) -> None:
        with pytest.raises(OptionError, match=f"{name} must be at least"):
            training_loader(numbered(), **{"batch_size": 2, name: -1})  # type: ignore[arg-type]

    def test_images_that_cannot_be_trained_on(self) -> None:
        with pytest.raises(DataError, match="11 training images do not fill one batch of 12"):
            training_loader(numbered(), batch_size=12)
        with pytest.raises(DataError, match="image 0 has no label"):
            list(training_loader([(torch.rand(3, 4, 4), -1)], batch_size=1))


class TestLabeledImages:
    @staticmethod
    def folder(path: Path, **splits: tuple[str, ...]) -> str:
        for split, classes in splits.items():
            for name in classes:
                target = path / split / name / "a.png"
                target.parent.mkdir(parents=True)
                Image.new("RGB", (8, 8), (255, 0, 0)).save(target)
        return str(path)

    def test_two_splits_and_the_number_of_classes(self, tmp_path: Path) -> None:
        train, val, classes = labeled_images(
            self.folder(tmp_path, train=("cat", "dog"), val=("cat", "dog")), "train", "validation", image_size=4
        )
        assert (len(train), len(val), classes) == (2, 2, 2)
        image, label = train[1]
        assert torch.equal(image, torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 4, 4))
        assert label == 1

    def test_labels_of_other_classes_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="different classes"):
            labeled_images(self.folder(tmp_path, train=("cat", "dog"), val=("dog",)), "train", "val")

    def test_unknown_number_of_classes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        dataset = self.folder(tmp_path, train=("cat",), val=("cat",))
        monkeypatch.setattr("knowiso_train.loading.datasets._class_indices", lambda images: {})
        with pytest.raises(OptionError, match="--classes"):
            labeled_images(dataset, "train", "val")
        assert labeled_images(dataset, "train", "val", classes=5)[2] == 5


class StandIn:
    """accelerate's state, as far as a run folder asks for it."""

    def __init__(self, content: str = "", fails: bool = False) -> None:
        self.content, self.fails = content, fails

    def wait_for_everyone(self) -> None: ...

    def save_state(self, folder: str) -> None:
        Path(folder).mkdir()
        (Path(folder) / "half").write_text(self.content)
        if self.fails:
            raise KeyboardInterrupt
        (Path(folder) / "rest").write_text(self.content)

    def load_state(self, folder: str) -> None:
        self.content = (Path(folder) / "half").read_text() + (Path(folder) / "rest").read_text()


class TestRunFolder:
    def test_the_newest_whole_state_counts(self, tmp_path: Path) -> None:
        run, reader = RunFolder(tmp_path), StandIn()
        assert run.load_checkpoint(reader) == {}
        assert reader.content == ""
        for step in (9, 10, 100):
            run.save_checkpoint(StandIn(f"{step},"), {"step": step, "best": 0.1})
        with pytest.raises(KeyboardInterrupt):
            run.save_checkpoint(StandIn("101,", fails=True), {"step": 101})
        assert run.load_checkpoint(reader) == {"step": 100, "best": 0.1}
        assert reader.content == "100,100,"
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-0000000100"]
        run.save_checkpoint(StandIn("102,"), {"step": 102})  # over what the interrupted one left
        assert run.load_checkpoint(reader) == {"step": 102}
        run.delete_checkpoints()
        assert not list(tmp_path.iterdir())

    def test_real_state_of_accelerate(self, tmp_path: Path) -> None:
        def parts(value: float) -> tuple[Accelerator, Any, Any]:
            accelerator, model = Accelerator(cpu=True), nn.Linear(2, 2)
            nn.init.constant_(model.weight, value)
            model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            return accelerator, model, optimizer

        accelerator, model, optimizer = parts(1.0)
        RunFolder(tmp_path).save_checkpoint(accelerator, {"step": 1})
        other, again, its_optimizer = parts(5.0)
        assert RunFolder(tmp_path).load_checkpoint(other) == {"step": 1}
        assert torch.equal(again.weight, model.weight)
        momentum = [o.state_dict()["state"][0]["momentum_buffer"] for o in (optimizer, its_optimizer)]
        assert torch.equal(*momentum)

    def test_a_log_with_a_cut_line_goes_on_after_the_last_whole_one(self, tmp_path: Path) -> None:
        run = RunFolder(tmp_path)
        assert run.read_log() == []
        for step in range(1, 6):
            run.log({"step": step})
        with (tmp_path / "log.jsonl").open("a") as file:
            file.write('{"step": 6, "lo')
        assert [entry["step"] for entry in run.read_log()] == [1, 2, 3, 4, 5]
        run.truncate_log({}, 3)
        run.log({"step": 4, "again": True})
        assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()][2:] == [
            {"step": 3},
            {"step": 4, "again": True},
        ]

    def test_a_run_belongs_to_its_settings(self, tmp_path: Path) -> None:
        RunFolder(tmp_path).check_settings({"lr": 0.1, "layers": ("a", "b"), "file": Path("x")})
        RunFolder(tmp_path).check_settings({"file": Path("x"), "layers": ["a", "b"], "lr": 0.1})
        with pytest.raises(OptionError, match=r"lr is 0.2, was 0.1; seed is 3, was None"):
            RunFolder(tmp_path).check_settings({"lr": 0.2, "layers": ["a", "b"], "file": Path("x"), "seed": 3})

    def test_arms_and_workers_may_differ_and_are_in_the_file_of_the_last_run(self, tmp_path: Path) -> None:
        for arms in (["kd"], ["kd", "ours"]):
            RunFolder(tmp_path).check_settings({"lr": 0.1, "arms": arms, "workers": len(arms)})
        assert json.loads((tmp_path / "settings.json").read_text()) == {"lr": 0.1, "arms": ["kd", "ours"], "workers": 2}

    def test_weights_are_those_of_the_bare_network(self, tmp_path: Path) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
                self.b.weight = self.a.weight
                self.a.weight.data = self.a.weight.data.t()  # strided

        model = Tied()
        RunFolder(tmp_path).write_network("last", nn.DataParallel(model), {"arm": "student"})
        other = Tied()
        load_checkpoint(other, tmp_path / "last.safetensors")
        assert torch.equal(other.a.weight, model.a.weight)
        assert json.loads((tmp_path / "last.json").read_text()) == {"arm": "student"}
        assert {path.name for path in tmp_path.iterdir()} == {"last.json", "last.safetensors"}

    def test_one_process_writes(self, tmp_path: Path) -> None:
        run = RunFolder(tmp_path, writes=False)
        run.log({"step": 1})
        run.check_settings({"lr": 1})
        run.write_network("last", nn.Linear(1, 1), {})
        run.truncate_log({}, 0)
        assert not list(tmp_path.iterdir())

    def test_folders_and_files_that_cannot_be_used(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("{")
        with pytest.raises(DataError, match="cannot be created"):
            RunFolder(tmp_path / "file")
        with pytest.raises(FormatError, match="is no JSON"):
            RunFolder(tmp_path).read_json("file")


class TestInputBridge:
    STUDENT = InputTransform(None, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    TEACHER = InputTransform(None, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))

    def test_the_other_network_sees_what_it_would_have_seen(self) -> None:
        images = torch.rand(4, 3, 10, 8)
        torch.testing.assert_close(
            InputBridge(self.STUDENT, self.TEACHER)(self.STUDENT(images)), self.TEACHER(images), atol=1e-5, rtol=0
        )

    def test_other_resolution(self) -> None:
        images = torch.rand(2, 3, 10, 8)
        teacher = InputTransform((20, 16), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
        torch.testing.assert_close(
            InputBridge(self.STUDENT, teacher)(self.STUDENT(images)), teacher(images), atol=1e-4, rtol=0
        )

    def test_nothing_is_done_where_nothing_differs(self) -> None:
        images = torch.rand(2, 3, 10, 8)
        for wanted in (None, (10, 8)):
            bridge = InputBridge(self.STUDENT, InputTransform(wanted, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
            assert bridge(images) is images

    def test_halves_stay_halves_and_in_range(self) -> None:
        images = torch.rand(2, 3, 10, 8)
        seen = self.STUDENT(images).to(torch.bfloat16)
        given = InputBridge(self.STUDENT, self.TEACHER)(seen)
        assert given.dtype == torch.bfloat16
        torch.testing.assert_close(given.float(), self.TEACHER(images), atol=0.05, rtol=0)

    def test_numbers_of_channels_must_agree(self) -> None:
        with pytest.raises(ShapeError, match="equally many channels, got 3 and 1"):
            InputBridge(self.STUDENT, InputTransform(None, (0.5,), (0.5,)))


class TestAccuracy:
    def test_every_image_counts_once_and_the_mode_stays(self) -> None:
        class Guess(nn.Module):  # the class is the image's value; in training mode always 0
            def forward(self, x: Tensor) -> Tensor:
                return F.one_hot(torch.zeros(len(x), dtype=torch.long) if self.training else x[:, 0, 0, 0].long(), 20)

        images = [(image, label if label < 7 else 19) for image, label in numbered()]
        for training in (True, False):
            model = Guess().train(training)
            assert top1_accuracy(model, images, Accelerator(cpu=True), batch_size=4) == pytest.approx(100 * 7 / COUNT)
            assert model.training is training
        wrong = top1_accuracy(Guess(), images, Accelerator(cpu=True), to_input=lambda x: x + 1)
        assert wrong == 0


class TestCards:
    def test_the_card_makes_the_network_again(self, tmp_path: Path) -> None:
        options = {"num_classes": 3, "channels": (8, 8, 16, 16)}
        model = timm.create_model("test_resnet", **options)
        card = network_card(model, "test_resnet", options, (3, 20, 20))
        RunFolder(tmp_path).write_network("last", model, card)
        again = eval(card["load"].replace("FILE", str(tmp_path / "last.safetensors")), {"timm": timm})
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
        assert card["parameters"] == sum(parameter.numel() for parameter in again.parameters())
        transform = input_transform(model)
        assert card["input"] == {
            "size": (3, 20, 20),
            "mean": tuple(transform.mean.flatten().tolist()),
            "std": tuple(transform.std.flatten().tolist()),
            "interpolation": transform.interpolation,
        }

    def test_table_is_aligned_and_leaves_out_what_is_not_known(self) -> None:
        cards = [
            {"arm": "teacher", "parameters": 12, "top1": 100.0},
            {
                "arm": "ours",
                "parameters": 1234567,
                "top1": 5.25,
                "best_top1": 6.0,
                "best_epoch": 3,
                "seconds": 12.6,
                "explained": {"a": 0.125},
            },
        ]
        log = [
            {"arm": "ours", "loss": 3.0},
            {"arm": "other", "loss": 9.0},
            {"arm": "ours", "top1": 6.0},
            {"arm": "ours", "loss": 1.5},
        ]
        head, teacher, ours = results_table(cards, log).splitlines()
        assert ours.split() == [
            "ours",
            "1,234,567",
            "5.25",
            "%",
            "6.00",
            "%",
            "(3)",
            "3.000,",
            "1.500",
            "12.5",
            "%",
            "13",
        ]
        assert teacher.split() == ["teacher", "12", "100.00", "%"]
        assert (
            head.index("top-1") + len("top-1")
            == teacher.index("100.00 %") + len("100.00 %")
            == ours.index("5.25 %") + len("5.25 %")
        )


class TestRecipeParser:
    def test_help_says_every_default(self) -> None:
        options = RecipeParser("What it does.\n    As it stands.")
        options.add("--epochs", 8, at_least(1), "passes")
        options.add("--arms", ["kd", "ours"], help="which", nargs="+")
        options.add("--file", None, Path, "weights")
        options.add("--flip", False, help="mirror")
        shown = options.format_help()
        assert "\n    As it stands." in shown
        assert "passes (default: 8)" in shown
        assert "which (default: kd ours)" in shown
        assert "weights\n" in shown
        assert vars(options.parse_args([])) == {"epochs": 8, "arms": ["kd", "ours"], "file": None, "flip": False}
        assert vars(options.parse_args(["--epochs", "2", "--arms", "kd", "--file", "x", "--flip"]))["file"] == Path("x")

    @pytest.mark.parametrize("text", ["0", "1.5", "inf", "nan", "", "many"])
    def test_integers_with_a_bound(self, text: str) -> None:
        assert at_least(1)("1") == 1
        with pytest.raises(argparse.ArgumentTypeError, match=f"an integer of at least 1, got '{text}'"):
            at_least(1)(text)

    def test_numbers_or_a_word(self) -> None:
        kind = at_least(0, float, "auto")
        assert (kind("0"), kind("1e-3"), kind("auto")) == (0.0, 1e-3, "auto")
        with pytest.raises(argparse.ArgumentTypeError, match="or auto, got 'inf'"):
            kind("inf")

    def test_keys_and_values(self) -> None:
        given = ["drop_rate=0.1", "channels=(8, 16)", "stem_type=deep", "a=b=c", "flag=True", "empty="]
        assert dict(map(parse_key_value, given)) == {
            "drop_rate": 0.1,
            "channels": (8, 16),
            "stem_type": "deep",
            "a": "b=c",
            "flag": True,
            "empty": "",
        }
        for wrong in ("plain", "=3"):
            with pytest.raises(argparse.ArgumentTypeError, match="expected KEY=VALUE"):
                parse_key_value(wrong)
