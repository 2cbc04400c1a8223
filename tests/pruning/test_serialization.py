"""Saved pruned models: round trips without a pruning library, damaged files, wrong models, fingerprints."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from knowiso_train.errors import (
    DataError,
    FormatError,
    InputTypeError,
    KnowisoError,
    NonFiniteError,
    OptionError,
    ShapeError,
)
from knowiso_train.pruning._model_factory import input_shape
from knowiso_train.pruning._structure import OutputFingerprint, weights_hash
from knowiso_train.pruning.index_tracking import track_kept_indices
from knowiso_train.pruning.serialization import PRUNED_FILE, load_kept_indices, load_pruned, save_pruned
from knowiso_train.utils.serialization import DESCRIPTION_KEY, read_description, read_tensors, write_tensors
from tests.helpers.pruned_models import NETWORKS, SIDE, network, prune

SHAPE = (1, 3, SIDE, SIDE)


def small(width: int, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(3, width, bias=bias), nn.ReLU(), nn.Linear(width, 2))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A pruned timm network in a folder."""
    model = network("test_resnet")
    original = copy.deepcopy(model)
    prune(model)
    save_pruned(tmp_path, model, original, example=SHAPE)
    return tmp_path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    save_pruned(tmp_path, small(2), small(8), factory="external", example=(1, 3))
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    weights, content = read_tensors(folder / PRUNED_FILE)
    change(content)
    write_tensors(folder / PRUNED_FILE, weights, content)


def write_text(folder: Path, text: str) -> None:
    """Replace the description by a text, which need not be JSON."""
    weights, _ = read_tensors(folder / PRUNED_FILE)
    save_file(weights, folder / PRUNED_FILE, metadata={DESCRIPTION_KEY: text})


def test_all_families_load_in_a_process_without_torch_pruning(tmp_path: Path) -> None:
    x = torch.randn(2, 3, SIDE, SIDE)
    for name, options in NETWORKS.items():
        model = network(name)
        original = copy.deepcopy(model)
        with track_kept_indices(model) as kept:
            prune(model)
        factory = (name, {"num_classes": 5, **options}) if options else None
        save_pruned(tmp_path / name, model, original, factory=factory, kept=kept, example=torch.zeros(SHAPE))
        assert load_kept_indices(tmp_path / name) == kept
        with torch.no_grad():
            save_file({"x": x, "y": model(x)}, tmp_path / f"{name}.safetensors")
    code = (
        "import sys, torch; from pathlib import Path; from safetensors.torch import load_file\n"
        "from knowiso_train.pruning.serialization import load_pruned\n"
        "for name in sys.argv[2:]:\n"
        "    model = load_pruned(Path(sys.argv[1]) / name)\n"
        "    pair = load_file(Path(sys.argv[1]) / f'{name}.safetensors')\n"
        "    with torch.no_grad(): torch.testing.assert_close(model(pair['x']), pair['y'])\n"
        "    model.train()(pair['x']).sum().backward()\n"
        "    print(name, type(model).__module__)\n"
        "assert 'torch_pruning' not in sys.modules\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *NETWORKS], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert [line.split()[0] for line in process.stdout.splitlines()] == list(NETWORKS)
    assert all("timm" in line for line in process.stdout.splitlines())


class TestRoundTrip:
    def test_architecture_and_tag_are_inferred(self, saved: Path) -> None:
        state = torch.get_rng_state()
        model = load_pruned(saved)
        assert torch.equal(state, torch.get_rng_state())
        assert not model.training
        assert model.pretrained_cfg["tag"] == timm.create_model("test_resnet").pretrained_cfg["tag"]
        content = read_description(saved / PRUNED_FILE)
        assert content["factory"]["arguments"] == {"num_classes": 5}
        assert content["kept"] is None
        assert load_kept_indices(saved) is None
        assert {"timm", "torch", "knowiso_train"} <= content["versions"].keys()
        assert sorted(path.name for path in saved.iterdir()) == ["model.safetensors"]

    def test_a_second_save_replaces_the_first(self, saved: Path) -> None:
        (saved / "notes.txt").write_text("mine")
        model = load_pruned(saved)
        with torch.no_grad():
            next(model.parameters()).mul_(2)
        before = copy.deepcopy(model.state_dict())
        save_pruned(saved, model, network("test_resnet"), example=SHAPE)
        assert all(torch.equal(value, before[name]) for name, value in load_pruned(saved).state_dict().items())
        assert (saved / "notes.txt").read_text() == "mine"

    def test_external_models(self, tmp_path: Path) -> None:
        pruned = small(2).train()
        save_pruned(tmp_path, pruned, small(8), factory="external", example=(1, 3))
        assert pruned.training
        fresh = small(8)
        assert load_pruned(tmp_path, model=fresh) is fresh
        assert all(torch.equal(fresh.state_dict()[name], value) for name, value in pruned.state_dict().items())

    def test_added_biases(self, tmp_path: Path) -> None:
        save_pruned(tmp_path, small(2), small(8, bias=False), factory="external", example=(1, 3))
        assert load_pruned(tmp_path, model=small(8, bias=False))[0].bias.shape == (2,)

    def test_half_precision(self, tmp_path: Path) -> None:
        pruned = small(2).to(torch.bfloat16)
        save_pruned(tmp_path, pruned, small(8), factory="external", example=(1, 3))
        loaded = load_pruned(tmp_path, model=small(8))
        assert all(
            value.dtype == torch.bfloat16 and torch.equal(value, pruned.state_dict()[name])
            for name, value in loaded.state_dict().items()
        )

    def test_tied_weights_are_stored_once_and_tied_again(self, tmp_path: Path) -> None:
        def make(width: int, tie: bool) -> nn.Sequential:
            model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
            model[1].weight = model[0].weight if tie else model[1].weight
            return model

        pruned = make(3, True)
        pruned[1].bias = nn.Parameter(torch.zeros(6)[:3])  # a view: safetensors refuses shared memory
        save_pruned(tmp_path, pruned, make(3, False), factory="external", example=(1, 3))
        assert load_file(tmp_path / "model.safetensors").keys() == {"0.weight", "0.bias", "1.bias"}
        loaded = load_pruned(tmp_path, model=make(3, False))
        assert loaded[0].weight is loaded[1].weight
        untied = make(3, False)
        save_pruned(tmp_path, untied, make(3, True), factory="external", example=(1, 3))
        loaded = load_pruned(tmp_path, model=make(3, True))
        assert torch.equal(loaded[1].weight, untied[1].weight)
        assert torch.equal(loaded[0].weight, untied[0].weight)

    def test_groups_with_different_inputs(self, tmp_path: Path) -> None:
        original = nn.Sequential(nn.Conv2d(8, 4, 1, groups=2, bias=False))
        pruned = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2, bias=False))
        flat = torch.tensor([[0, 1], [4, 5], [9, 11], [13, 15]])[..., None, None]
        save_pruned(tmp_path, pruned, original, factory="external", kept={"0.weight": flat}, example=(1, 4, 2, 2))
        kept = load_kept_indices(tmp_path)
        assert kept is not None
        assert torch.equal(kept["0.weight"], flat)

    def test_tuples_among_the_arguments(self, tmp_path: Path) -> None:
        model = network("convnext_atto")
        save_pruned(
            tmp_path,
            model,
            model,
            factory=("convnext_atto", {"num_classes": 5, **NETWORKS["convnext_atto"]}),
            example=SHAPE,
        )
        assert read_description(tmp_path / PRUNED_FILE)["factory"]["arguments"]["depths"] == {"tuple": [1, 1, 1, 1]}
        load_pruned(tmp_path)


class TestDamage:
    def test_truncated_weights_raise(self, saved: Path) -> None:
        path = saved / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(FormatError, match="damaged, it is no complete safetensors file"):
            load_pruned(saved)

    def test_one_changed_byte_of_the_weights_raises(self, saved: Path) -> None:
        path = saved / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-7] ^= 1
        path.write_bytes(content)
        with pytest.raises(FormatError, match=r"does not hold the weights that its description was written for"):
            load_pruned(saved)

    def test_missing_files_raise(self, saved: Path) -> None:
        (saved / "model.safetensors").unlink()
        with pytest.raises(DataError, match="is not there"):
            load_pruned(saved)
        with pytest.raises(DataError, match="is not there"):
            load_pruned(saved / "nowhere")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "description is no JSON"),
            ("[]", "got None"),
            ('{"format_version": "1"}', "expected a format_version"),
            ('{"format_version": true}', "expected a format_version"),
            ('{"format_version": 1}', "'factory' is not there"),
            (
                '{"format_version": 2, "versions": {"knowiso_train": "0.9"}}',
                "version 2, written by knowiso_train 0.9; .* Upgrade",
            ),
            ('{"format_version": 7, "versions": 3}', "version 7, written by knowiso_train a later version"),
        ],
    )
    def test_invalid_descriptions_raise(self, saved: Path, content: str, message: str) -> None:
        write_text(saved, content)
        with pytest.raises(FormatError, match=message):
            load_pruned(saved)
        with pytest.raises(FormatError, match=message):
            load_kept_indices(saved)

    @pytest.mark.parametrize(
        "change",
        [
            lambda c: c.update(factory={"name": 3}),
            lambda c: c.update(factory={"name": "test_resnet", "arguments": {"num_classes": {"what": 5}}}),
            lambda c: c["shapes"].update({"fc.bias": 5}),
            lambda c: c["shapes"].update({"nowhere.bias": [5]}),
            lambda c: c["shapes"].update({"fc.bias": [6]}),
            lambda c: c["shapes"].update({"fc.bias": [-6]}),
            lambda c: c["shapes"].update({"fc.bias": [10**15]}),
            lambda c: c["original_shapes"].update({"fc.bias": None}),
            lambda c: c["attributes"].update({"fc": {"forward": 1}}),
            lambda c: c["attributes"].update({"fc": 1}),
            lambda c: c["attributes"].update({"layer1": {"0": 1}}),
            lambda c: c["added"].append("fc.forward"),
            lambda c: c["added"].append(4),
            lambda c: c["tied"].update({"fc.weight": "nowhere"}),
            lambda c: c["fingerprint"].pop("seed"),
            lambda c: c["fingerprint"].update(shape=[1, 5]),
            lambda c: c["fingerprint"].update(norm=2 * c["fingerprint"]["norm"]),
            lambda c: c["fingerprint"]["projections"].reverse(),
            lambda c: c["fingerprint"].update(projections=[]),
            lambda c: c["fingerprint"].update(seed=1),
        ],
    )
    def test_every_field_is_checked(self, saved: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        edit(saved, change)
        with pytest.raises(FormatError):
            load_pruned(saved)

    @pytest.mark.parametrize(
        "factory",
        [
            {"name": "test_resnet", "arguments": {"checkpoint_path": "x.pth"}},
            {"name": "test_resnet", "arguments": {"pretrained": True}},
            {"name": "hf-hub:someone/something", "arguments": {}},
            {"name": "resnet_of_tomorrow", "arguments": {}},
            {"name": "test_resnet", "arguments": {"color": 1}},
        ],
        ids=str,
    )
    def test_unknown_factories_and_those_that_read_files_raise(self, saved: Path, factory: dict[str, Any]) -> None:
        edit(saved, lambda c: c.update(factory=factory))
        with pytest.raises(OptionError):
            load_pruned(saved)

    def test_errors_name_versions_that_differ(self, saved: Path) -> None:
        edit(saved, lambda c: (c["versions"].update(timm="0.1"), c["original_shapes"].update({"fc.bias": [9]})))
        with pytest.raises(
            FormatError, match=r"'fc.bias' was expected with shape \(9,\), got \(5,\).*saved with timm 0.1 \(here "
        ):
            load_pruned(saved)


class TestWrongModels:
    def test_another_structure_raises(self, saved: Path, tiny: Path) -> None:
        with pytest.raises(
            FormatError,
            match=r"not built as the original of .*'0.weight' was expected with shape \(8, 3\), got \(9, 3\)",
        ):
            load_pruned(tiny, model=small(9))
        with pytest.raises(FormatError, match=r"'0.weight' was expected"):
            load_pruned(tiny, model=nn.Linear(3, 8))
        with pytest.raises(FormatError, match=r"was not expected, got"):
            load_pruned(tiny, model=nn.Sequential(*small(8), nn.Linear(2, 2)))

    def test_another_function_raises(self, tiny: Path) -> None:
        model = small(8)
        model[1] = nn.Tanh()
        with pytest.raises(FormatError, match="does not compute what the pruned model computed"):
            load_pruned(tiny, model=model)

    def test_a_missing_external_model_raises(self, tiny: Path) -> None:
        with pytest.raises(OptionError, match="Pass model="):
            load_pruned(tiny)
        with pytest.raises(InputTypeError, match="got str"):
            load_pruned(tiny, model="resnet")  # type: ignore[arg-type]


class TestSaving:
    def assert_rejected(
        self, folder: Path, error: type[KnowisoError], message: str, *args: Any, **options: Any
    ) -> None:
        with pytest.raises(error, match=message):
            save_pruned(folder, *args, **options)
        assert not list(folder.iterdir())

    def test_invalid_factories(self, tmp_path: Path) -> None:
        self.assert_rejected(
            tmp_path,
            OptionError,
            'Sequential does not record .* factory="external"',
            small(2),
            small(8),
            example=(1, 3),
        )
        self.assert_rejected(
            tmp_path, OptionError, "factory must be", small(2), small(8), example=(1, 3), factory="timm"
        )
        self.assert_rejected(
            tmp_path,
            OptionError,
            "'resnet_of_tomorrow'",
            small(2),
            small(8),
            example=(1, 3),
            factory=("resnet_of_tomorrow", {}),
        )
        self.assert_rejected(
            tmp_path,
            OptionError,
            "reads no file",
            small(2),
            small(8),
            example=(1, 3),
            factory=("test_resnet", {"pretrained": True}),
        )

    def test_missing_arguments_of_the_factory(self, tmp_path: Path) -> None:
        model = network("vit_tiny_patch16_224")
        message = r"does not make the original: 'pos_embed' was expected with shape \(1, 5, 192\), got \(1, 197, 192\)"
        self.assert_rejected(tmp_path, OptionError, message, model, model)
        options: dict[str, Any] = {"num_classes": 5, **NETWORKS["vit_tiny_patch16_224"], "norm_layer": nn.LayerNorm}
        self.assert_rejected(
            tmp_path,
            OptionError,
            "'norm_layer' of the factory is",
            model,
            model,
            factory=("vit_tiny_patch16_224", options),
            example=SHAPE,
        )

    def test_example_shapes(self, tmp_path: Path) -> None:
        assert input_shape(network("vit_tiny_patch16_224")) == (1, 3, 32, 32)
        assert input_shape(network("test_resnet")) == (1, 3, 160, 160)
        self.assert_rejected(
            tmp_path, OptionError, "Sequential does not record its input size", small(2), small(8), factory="external"
        )
        self.assert_rejected(
            tmp_path,
            OptionError,
            r"shape \(1, 4\).*with example=",
            small(2),
            small(8),
            factory="external",
            example=(1, 4),
        )

    def test_changes_that_json_cannot_hold_fail_the_fingerprint(self, tmp_path: Path) -> None:
        class Gained(nn.Module):
            def __init__(self, width: int) -> None:
                super().__init__()
                self.layer, self.gain = nn.Linear(3, width), torch.ones(1)

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(x) * self.gain

        pruned = Gained(2)
        pruned.gain = torch.full((1,), 2.0)
        self.assert_rejected(
            tmp_path,
            FormatError,
            "does not compute .* changed by hand",
            pruned,
            Gained(4),
            factory="external",
            example=(1, 3),
        )

    def test_other_modules_and_wrong_kept_indices(self, tmp_path: Path) -> None:
        other = small(2)
        other[1] = nn.GELU()
        options: dict[str, Any] = {"factory": "external", "example": (1, 3)}
        self.assert_rejected(tmp_path, ShapeError, "widths only", other, small(8), **options)
        self.assert_rejected(
            tmp_path, ShapeError, "kept leads to shape", small(2), small(8), kept={"0.bias": [[0, 1, 2]]}, **options
        )
        self.assert_rejected(
            tmp_path, ShapeError, "do not fit", small(2), small(8), kept={"0.bias": [[0, 9]]}, **options
        )
        self.assert_rejected(
            tmp_path,
            ShapeError,
            "'9.bias', which is no tensor",
            small(2),
            small(8),
            kept={"9.bias": [[0, 1]]},
            **options,
        )

    def test_nonfinite_outputs(self, tmp_path: Path) -> None:
        pruned = small(2)
        with torch.no_grad():
            pruned[0].bias.fill_(float("nan"))
        self.assert_rejected(
            tmp_path, NonFiniteError, "not finite", pruned, small(8), factory="external", example=(1, 3)
        )

    def test_a_full_disk_leaves_the_last_save(self, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def raise_full(*_: Any, **__: Any) -> None:
            raise OSError("No space left on device")

        monkeypatch.setattr("safetensors.torch.save_file", raise_full)
        with pytest.raises(OSError, match="No space"):
            save_pruned(tiny, small(3), small(8), factory="external", example=(1, 3))
        assert sorted(path.name for path in tiny.iterdir()) == ["model.safetensors"]
        assert load_pruned(tiny, model=small(8))[0].out_features == 2


class TestFingerprint:
    def test_rounding_passes_and_a_changed_weight_fails(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        fingerprint = OutputFingerprint.compute(model, (1, 64))
        fingerprint.check_equal(OutputFingerprint.compute(copy.deepcopy(model).double(), (1, 64)), "it")
        with torch.no_grad():
            model[0].weight[3, 4] += 0.1
        with pytest.raises(FormatError, match="it does not compute"):
            fingerprint.check_equal(OutputFingerprint.compute(model, (1, 64)), "it")

    def test_projections_depend_on_signs_order_and_seed(self) -> None:
        class Fixed(nn.Module):
            def __init__(self, values: Tensor) -> None:
                super().__init__()
                self.values = values

            def forward(self, x: Tensor) -> dict[str, Any]:
                return {"out": self.values[:4], "rest": (self.values[4:],)}

        values = torch.arange(1.0, 9.0)
        fingerprint = OutputFingerprint.compute(Fixed(values), (1,))
        assert fingerprint.norm == pytest.approx(float(values.norm()))
        for other in (-values, values.flip(0)):
            assert OutputFingerprint.compute(Fixed(other), (1,)).norm == pytest.approx(fingerprint.norm)
            with pytest.raises(FormatError):
                fingerprint.check_equal(OutputFingerprint.compute(Fixed(other), (1,)), "it")
        assert OutputFingerprint.compute(Fixed(values), (1,), seed=1).projections != fingerprint.projections

    def test_outputs_without_tensors_raise(self) -> None:
        class Words(nn.Module):
            def forward(self, x: Tensor) -> str:
                return "cat"

        with pytest.raises(InputTypeError, match="got str"):
            OutputFingerprint.compute(Words(), (1,))

    def test_the_hash_depends_on_names_types_shapes_and_values(self) -> None:
        base = {
            "a": torch.zeros(2, 3),
            "b": torch.tensor(0),
            "c": torch.zeros(0),
            "d": torch.zeros(2, dtype=torch.bool),
        }
        variants: list[dict[str, Tensor]] = [
            base | {"a": torch.zeros(3, 2)},
            base | {"a": torch.zeros(2, 3, dtype=torch.int32)},
            base | {"b": torch.tensor(1)},
            {("e" if name == "d" else name): value for name, value in base.items()},
        ]
        hashes = {weights_hash(state) for state in [base, *variants]}
        assert len(hashes) == 5
        assert weights_hash(dict(reversed(list(base.items())))) == weights_hash(base)
        assert weights_hash({"a": torch.arange(6.0).view(2, 3).t()}) == weights_hash(
            {"a": torch.arange(6.0).view(2, 3).t().contiguous()}
        )
