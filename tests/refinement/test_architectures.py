"""`refine` with trained classifiers, other classes, two heads, networks without `global_pool`, and repeated images."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from knowiso_train.errors import InputTypeError, KnowisoWarning, LayoutError, OptionError
from knowiso_train.refinement import HeadConfig, RefineFinetuneConfig, refine
from knowiso_train.refinement.models import PooledFeatures, classifier_model, flag_unusable_heads, pooled_layer
from tests.helpers.refine_models import SignalNet, batches, images, with_best_classifier

X, Y = images(1500)
FEW = torch.cat([torch.nonzero(c == Y)[:4, 0] for c in range(3)])
LABELED, POOL = batches(X[FEW], Y[FEW]), batches(X)
VALIDATION, TEST = batches(*images(300, seed=2)), batches(*images(1000, seed=3))


def trained(which: int, order: tuple[int, ...] = (0, 1, 2)) -> SignalNet:
    """Return a network with the least-squares classifier, its classes in this order."""
    return with_best_classifier(SignalNet(which), X, Y, logit_scale=10, order=order)


def test_peers_and_ensemble_keep_classifiers_that_were_trained() -> None:
    report = refine(
        trained(0), trained(1), POOL, labeled=LABELED, validation=VALIDATION, test=TEST, progress=False
    ).report
    x, y = images(1000, seed=3)
    with torch.no_grad():
        right = 100 * float((trained(1)(x).argmax(1) == y).float().mean())
    # Of use where there is a classifier to fold into
    assert any(row.name.startswith("fold") for row in report.rows)
    assert report.row("peer").test.accuracy == pytest.approx(right, abs=0.2)
    assert report.row("ensemble").test.accuracy >= report.row("before").test.accuracy


def test_consensus_starts_from_a_classifier_that_was_trained() -> None:
    options: dict[str, Any] = {
        "method": "consensus",
        "labeled": LABELED,
        "finetune_config": RefineFinetuneConfig(steps=0),
        "progress": False,
    }
    model = trained(0)
    result = refine(model, trained(1), POOL, **options)
    assert result.report.chosen == "original, fine-tuned to the consensus"
    assert torch.equal(result.model.fc.weight, model.fc.weight)
    assert refine(SignalNet(0), SignalNet(1), POOL, **options).report.chosen.startswith("consensus head")
    report = refine(trained(0), trained(1), POOL, validation=VALIDATION, **options).report
    assert report.row("after").validation.accuracy >= report.row("before").validation.accuracy


def test_replacing_a_better_trained_classifier_warns() -> None:
    with pytest.warns(KnowisoWarning, match="own classifier, trained with it, seems to be better"):
        result = refine(trained(0), trained(1), POOL, method="head", labeled=LABELED, progress=False)
    assert "own classifier" in result.report.warnings[0]


def test_classes_without_labels_are_named() -> None:
    some = FEW[Y[FEW] < 2]
    with pytest.warns(KnowisoWarning, match=r"1 of 3 classes have no labeled image \(2\)"):
        refine(SignalNet(0), SignalNet(1), POOL, method="head", labeled=batches(X[some], Y[some]), progress=False)


def test_a_peer_with_other_classes_of_equal_number_is_excluded() -> None:
    training = RefineFinetuneConfig(steps=60, lr=0.02)
    with pytest.warns(KnowisoWarning, match="they seem to be others, and its classifier is not used"):
        turned = refine(
            trained(0),
            trained(1, (1, 2, 0)),
            POOL,
            method="consensus",
            finetune_config=training,
            test=TEST,
            progress=False,
        )
    before, after = (turned.report.row(role).test.accuracy for role in ("before", "after"))
    assert after > before - 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refine(
            trained(0),
            trained(1),
            POOL,
            method="consensus",
            finetune_config=RefineFinetuneConfig(steps=1),
            progress=False,
        )


def test_without_a_useful_peer_there_is_no_consensus() -> None:
    useless = SignalNet(3, has_signal=False)
    with (
        pytest.warns(KnowisoWarning, match="left out"),
        pytest.raises(OptionError, match='no useful peer is left for method="consensus"'),
    ):
        refine(SignalNet(0), useless, POOL, method="consensus", progress=False)
    with pytest.warns(KnowisoWarning, match="left out"):
        report = refine(
            SignalNet(0),
            useless,
            POOL,
            labeled=LABELED,
            validation=VALIDATION,
            finetune_config=RefineFinetuneConfig(steps=2),
            progress=False,
        ).report
    assert [row.name.rsplit(" to ", 1)[1] for row in report.rows if "fine-tuned" in row.name] == ["the labels"]


class TwoHeads(SignalNet):
    def __init__(self, which: int) -> None:
        super().__init__(which)
        self.other = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.global_pool(self.trunk(x))
        return (self.fc(pooled) + self.other(pooled)) / 2


def test_two_heads_raise_in_the_network_and_exclude_a_peer() -> None:
    with pytest.raises(LayoutError, match="not the output of its classifier 'fc'"):
        refine(TwoHeads(0), SignalNet(1), POOL, labeled=LABELED, validation=VALIDATION, progress=False)
    assert [
        net.head_excluded
        for net in flag_unusable_heads(
            [classifier_model(SignalNet(0), "own"), classifier_model(TwoHeads(1), "peer")], POOL[0]
        )
    ] == [False, True]


@pytest.mark.parametrize(
    ("name", "layer"), [("test_vit", "fc_norm"), ("test_convnext", "head.flatten"), ("test_resnet", "global_pool")]
)
def test_the_pooled_layer_is_the_input_of_the_classifier(name: str, layer: str) -> None:
    torch.manual_seed(0)
    net, batch = classifier_model(timm.create_model(name, num_classes=3).eval(), name), torch.rand(3, 3, 160, 160)
    assert pooled_layer(net, batch) == layer
    found: dict[str, Tensor] = {}
    handles = [
        net.module.get_submodule(layer).register_forward_hook(lambda _m, _x, output: found.update(emitted=output)),
        net.classifier.register_forward_pre_hook(lambda _m, inputs: found.update(read=inputs[0])),
    ]
    net.module(batch)
    assert torch.equal(found["emitted"], found["read"])
    for handle in handles:
        handle.remove()


def test_networks_without_global_pool_are_trained() -> None:
    torch.manual_seed(0)
    nets = [
        timm.create_model("test_vit", num_classes=3, img_size=32),
        timm.create_model("test_convnext", num_classes=3),
    ]
    pool = batches(torch.rand(100, 3, 32, 32), size=25)
    result = refine(
        nets[0],
        nets[1],
        pool,
        method="consensus",
        finetune_config=RefineFinetuneConfig(steps=2),
        keep_all_peers=True,
        min_explained=-1.0,
        progress=False,
    )
    assert any(
        not torch.equal(a, b)
        for a, b in zip(nets[0].state_dict().values(), result.model.state_dict().values(), strict=True)
    )


def test_half_precision_without_labels() -> None:
    nets = [trained(i).bfloat16() for i in range(2)]
    result = refine(
        nets[0],
        nets[1],
        batches(X.bfloat16()),
        method="consensus",
        finetune_config=RefineFinetuneConfig(steps=2),
        progress=False,
    )
    assert result.model.fc.weight.dtype == torch.bfloat16


def test_labeled_images_in_the_loader_are_counted_once() -> None:
    kept = torch.ones(len(X), dtype=torch.bool)
    kept[FEW] = False
    apart, together = (
        refine(SignalNet(0), SignalNet(1), pool, method="head", labeled=LABELED, progress=False)
        for pool in (batches(X[kept]), POOL)
    )
    torch.testing.assert_close(apart.model.fc.weight, together.model.fc.weight, rtol=1e-4, atol=1e-5)
    rows = SignalNet(0).features(X)
    assert len(PooledFeatures((rows,), None).exclude(PooledFeatures((rows[FEW] + 1e-6,), None))) == len(X) - len(FEW)


def test_a_classifier_without_bias_raises_or_is_not_modified() -> None:
    model = trained(0)
    model.fc.bias = None
    with pytest.raises(OptionError, match="'fc' of network has no bias"):
        refine(model, SignalNet(1), POOL, method="head", labeled=LABELED, progress=False)
    with pytest.warns(KnowisoWarning, match="has no bias, so candidates that need one are not tried"):
        result = refine(model, SignalNet(1), POOL, labeled=LABELED, validation=VALIDATION, progress=False)
    assert result.report.chosen == "original"


def test_peers_as_a_module_list_and_names_that_differ() -> None:
    peers = nn.ModuleList([SignalNet(1), SignalNet(2)])
    result = refine(SignalNet(0), peers, POOL, method="head", labeled=LABELED, names=["own", "a", "b"], progress=False)
    assert [peer.name for peer in result.report.peers] == ["a", "b"]
    with pytest.raises(InputTypeError, match="'a' occurs 2 times"):
        refine(SignalNet(0), peers, POOL, method="head", labeled=LABELED, names=["own", "a", "a"], progress=False)


@pytest.mark.parametrize("name", ["labeled", "validation", "test"])
def test_labeled_images_readable_only_once_raise(name: str) -> None:
    given: dict[str, Any] = {"labeled": LABELED, "validation": VALIDATION, "test": TEST, "progress": False}
    with pytest.raises(InputTypeError, match=f"{name}: expected a DataLoader or a list of batches"):
        refine(SignalNet(0), SignalNet(1), POOL, **{**given, name: iter(given[name])})


def test_saving_warns_where_timm_builds_another_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    nets = [timm.create_model("test_resnet", num_classes=3, in_chans=1) for _ in range(2)]
    pictures, labels = torch.rand(120, 1, 32, 32), torch.arange(120) % 3
    few, recipe = batches(pictures[:30], labels[:30]), HeadConfig(num_rounds=1)
    result = refine(
        nets[0],
        nets[1],
        batches(pictures),
        method="head",
        labeled=few,
        head_config=recipe,
        min_explained=-1.0,
        progress=False,
    )
    with pytest.warns(KnowisoWarning, match=r"'conv1.0.weight' has shape .* options=\{'in_chans': 1\}"):
        result.save(tmp_path)
    assert json.loads((tmp_path / "card.json").read_text())["load"].startswith("build the network as it was built")
    result.save(tmp_path, options={"num_classes": 3, "in_chans": 1})
    assert "in_chans=1" in json.loads((tmp_path / "card.json").read_text())["load"]
    loaded = timm.create_model("test_resnet", num_classes=3, in_chans=1, checkpoint_path=tmp_path / "model.safetensors")
    assert torch.equal(loaded.conv1[0].weight, result.model.conv1[0].weight)


class DictNet(SignalNet):
    """Network with outputs as those of transformers."""

    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x), "hidden": x}


@pytest.mark.parametrize("method", ["head", "consensus", "auto", "paper"])
def test_networks_with_dict_outputs_are_refined_as_those_with_tensors(method: Any) -> None:
    options: dict[str, Any] = {"labeled": LABELED, "validation": VALIDATION, "test": TEST, "progress": False}
    if method in ("consensus", "paper"):
        options["finetune_config"] = RefineFinetuneConfig(steps=3)
    if method == "paper":
        options["layer"] = "global_pool"
    results = []
    for kind in (SignalNet, DictNet):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KnowisoWarning)
            results.append(refine(kind(0), kind(1), POOL, method=method, seed=3, **options))
    plain, wrapped = (result.model.state_dict() for result in results)
    assert plain.keys() == wrapped.keys()
    for name, value in plain.items():
        assert torch.equal(value, wrapped[name]), name
    assert results[0].report.rows == results[1].report.rows


def test_finetuning_on_the_labels_alone_needs_nothing_of_the_peers() -> None:
    alone = RefineFinetuneConfig(steps=2, consensus_weight=0.0, kd_weight=0.0)
    options: dict[str, Any] = {"labeled": LABELED, "validation": VALIDATION, "progress": False}
    options |= {"transform": lambda x: 1.0 * x, "peer_transforms": lambda x: 1.0 * x}
    report = refine(SignalNet(0), SignalNet(1), POOL, finetune_config=alone, **options).report
    tuned = [row.name for row in report.rows if "fine-tuned" in row.name]
    assert [name.rsplit(" to ", 1)[1] for name in tuned] == ["the labels"]
    with pytest.raises(OptionError, match="another transform than the network"):
        refine(SignalNet(0), SignalNet(1), POOL, finetune_config=RefineFinetuneConfig(steps=2), **options)
