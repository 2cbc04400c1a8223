"""End-to-end tests of `refine`: result, report, and absence of side effects."""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from knowiso_train.errors import DataError, InputTypeError, KnowisoWarning, LayerNameError, OptionError, ShapeError
from knowiso_train.refinement import HeadConfig, RefineFinetuneConfig, RefineResult, refine
from knowiso_train.refinement.models import classifier_model
from knowiso_train.refinement.peers import PeerEnsemble
from knowiso_train.utils.batch import subsample_loader
from tests.helpers.refine_models import SignalNet, batches, images, with_best_classifier

X, Y = images(1500)
FEW = torch.cat([torch.nonzero(c == Y)[:4, 0] for c in range(3)])
SETS: dict[str, Any] = {
    "labeled": batches(X[FEW], Y[FEW]),
    "validation": batches(*images(300, seed=2)),
    "test": batches(*images(600, seed=3)),
    "progress": False,
}
POOL = batches(X)


def refined(*peers: nn.Module, **options: Any) -> RefineResult:
    return refine(SignalNet(0), list(peers), POOL, **{**SETS, **options})


def test_auto_is_better_than_every_part_alone_and_reports_all() -> None:
    result = refined(SignalNet(1), SignalNet(2), names=["own", "a", "b"], test=batches(*images(3000, seed=3)))
    report = result.report
    after, candidates = report.row("after"), {row.name: row for row in report.rows if row.role == "candidate"}
    labels = max(row.test.accuracy for name, row in candidates.items() if name.startswith("labels only"))
    alone = max(row.test.accuracy for name, row in candidates.items() if name.startswith("self-training"))
    assert after.test.accuracy > labels + 4
    assert after.test.accuracy > alone - 1  # chosen on other images
    assert after.test.accuracy > report.row("before").test.accuracy
    assert after.validation.accuracy == max(
        row.validation.accuracy for row in report.rows if row.role in ("before", "candidate")
    )
    assert [worth.useful for worth in report.peers] == [True, True]
    assert report.num_images == {"unlabeled": 1500, "labeled": 12, "validation": 300, "test": 3000}
    text = str(report)
    assert all(word in text for word in ("own", "(peer)", "(ensemble)", "(after)", "ECE", "noise floor"))
    assert json.loads(report.to_json())["chosen"] == report.chosen


def test_validation_on_the_labeled_images_warns() -> None:
    with pytest.warns(KnowisoWarning, match="12 of 12 validation images are among the labeled images") as caught:
        result = refined(SignalNet(1), validation=SETS["labeled"])
    assert caught[0].filename == __file__
    assert "validation images are among the labeled images" in str(result.report)


def test_one_image_raises_and_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match="1 unlabeled images are too few"):
            refine(SignalNet(0), SignalNet(1), batches(X[:1]), method="head", labeled=SETS["labeled"], progress=False)


def test_the_model_reproduces_the_reported_accuracy() -> None:
    result = refined(SignalNet(1), method="head")
    x, y = images(600, seed=3)
    with torch.no_grad():
        assert 100 * float((result.model(x).argmax(1) == y).float().mean()) == pytest.approx(
            result.report.row("after").test.accuracy, abs=0.2
        )


def test_the_original_is_kept_where_nothing_is_better() -> None:
    """Labels of validation are the network's own predictions, so no candidate can be better."""
    model = with_best_classifier(SignalNet(0), X, Y, logit_scale=20)
    # Judged by its own guesses
    x = images(1500, seed=2)[0]
    result = refine(model, SignalNet(1), POOL, **{**SETS, "validation": batches(x, model(x).argmax(1))})
    assert result.report.chosen == "original"
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), result.model.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("bad", [SignalNet(3, has_signal=False)])
def test_a_useless_peer_costs_nothing(bad: nn.Module) -> None:
    with pytest.warns(KnowisoWarning, match="bad explains .* left out"):
        with_bad = refined(SignalNet(1), bad, names=["own", "good", "bad"])
    alone = refined(SignalNet(1), names=["own", "good"])
    assert [worth.useful for worth in with_bad.report.peers] == [True, False]
    assert with_bad.report.chosen == alone.report.chosen
    assert all(
        torch.equal(a, b)
        for a, b in zip(alone.model.state_dict().values(), with_bad.model.state_dict().values(), strict=True)
    )


def test_only_useless_peers_leave_what_the_network_can_do_alone() -> None:
    with pytest.warns(KnowisoWarning, match="left out"):
        result = refined(SignalNet(3, has_signal=False))
    assert "consensus" not in result.report.chosen
    with pytest.warns(KnowisoWarning, match="left out"):
        same = refine(SignalNet(0), SignalNet(3, has_signal=False), POOL, method="fold", progress=False)
    assert all(
        torch.equal(a, b)
        for a, b in zip(SignalNet(0).state_dict().values(), same.model.state_dict().values(), strict=True)
    )


def test_fold_with_itself_changes_nothing_and_needs_no_labels() -> None:
    model = SignalNet(0)
    result = refine(model, SignalNet(0), POOL, method="fold", progress=False)
    with torch.no_grad():
        torch.testing.assert_close(result.model(X), model(X), rtol=1e-3, atol=1e-3)
    assert result.report.explained["fc (input)"][0] > 0.999


def test_weights_modes_hooks_and_random_state_are_restored() -> None:
    model, peer = SignalNet(0).train(), SignalNet(1).train()
    peer.fc.requires_grad_(False)
    before = copy.deepcopy(model.state_dict()), torch.get_rng_state(), [p.requires_grad for p in peer.parameters()]
    result = refine(model, peer, POOL, finetune_config=RefineFinetuneConfig(steps=2), **SETS)
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), model.state_dict().values(), strict=True))
    assert torch.equal(torch.get_rng_state(), before[1])
    assert [p.requires_grad for p in peer.parameters()] == before[2]
    assert model.training
    assert peer.training
    assert not result.model.training
    assert not any(
        module._forward_hooks or module._forward_pre_hooks
        for net in (model, peer, result.model)
        for module in net.modules()
    )


def test_a_network_that_is_frozen_before_its_classifier_is_not_trained_to_the_consensus() -> None:
    model = SignalNet(0).requires_grad_(False)
    labels_alone = RefineFinetuneConfig(steps=2, consensus_weight=0.0, kd_weight=0.0)
    result = refine(model, SignalNet(1), POOL, method="consensus", finetune_config=labels_alone, **SETS)
    assert torch.equal(result.model.trunk.weight, model.trunk.weight)
    assert not any(parameter.requires_grad for parameter in result.model.parameters())
    with pytest.raises(OptionError, match="all those of network are frozen; unfreeze some"):
        refine(model, SignalNet(1), POOL, method="consensus", **SETS)


def test_consensus_training_raises_the_explained_share() -> None:
    """The trunk mixes in noise that the peers do not share; fine-tuning reduces it."""
    result = refined(
        SignalNet(1),
        SignalNet(2),
        method="consensus",
        finetune_config=RefineFinetuneConfig(steps=120, lr=0.1, consensus_weight=3.0, kd_weight=0.1),
    )
    before, after = result.report.explained["fc (input)"]
    assert after is not None
    assert after > before + 0.05
    assert type(result.model) is SignalNet
    assert "fine-tuned" in result.report.chosen


def test_same_seed_same_result() -> None:
    one, two = (
        refined(SignalNet(1), method="consensus", finetune_config=RefineFinetuneConfig(steps=3), seed=4)
        for _ in range(2)
    )
    assert all(
        torch.equal(a, b) for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True)
    )


def test_paper_rebuilds_the_layer_and_is_not_saved_as_a_plain_network(tmp_path: Path) -> None:
    result = refined(
        SignalNet(1), method="paper", layer="global_pool", finetune_config=RefineFinetuneConfig(steps=80, lr=0.05)
    )
    assert result.report.row("after").test.accuracy > 60
    with torch.no_grad():
        own, noise = X.clone(), torch.randn_like(X)
        own[:, 3:12] = noise[:, 3:12]  # the composite does not use the network's own noise
        torch.testing.assert_close(result.model(own), result.model(X))
    with pytest.raises(OptionError, match="composite"):
        result.save(tmp_path)


def test_saved_result_loads_with_timm_alone(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    model, peer = (timm.create_model("test_resnet", num_classes=3) for _ in range(2))
    pictures = torch.rand(240, 3, 32, 32)
    labels = torch.arange(240) % 3
    pool = batches(pictures)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KnowisoWarning)
        result = refine(
            model,
            peer,
            pool,
            method="head",
            labeled=batches(pictures[:30], labels[:30]),
            min_explained=-1.0,
            progress=False,
        )
    result.save(tmp_path)
    card = json.loads((tmp_path / "card.json").read_text())
    loaded = timm.create_model(
        card["architecture"], checkpoint_path=tmp_path / "model.safetensors", **card["options"]
    ).eval()
    with torch.no_grad():
        assert torch.equal(loaded(pictures[:8]), result.model(pictures[:8]))
    assert "timm.create_model('test_resnet', num_classes=3" in card["load"]


def test_model_card_of_a_network_outside_timm_holds_python_code(tmp_path: Path) -> None:
    refined(SignalNet(1), method="head").save(tmp_path)
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert code.startswith("# build the network as it was built, then model.load_state_dict(")
    assert "timm" not in code


def test_a_peer_of_another_dtype_raises() -> None:
    with pytest.raises(InputTypeError, match="weights of float64 and fails on images of float32"):
        refined(SignalNet(1).double())


def test_batches_as_dictionaries_and_transforms() -> None:
    pool = [{"image": x} for x in POOL]
    few = [{"image": x, "label": y} for x, y in SETS["labeled"]]
    halved = [{"image": x["image"] / 2} for x in pool]
    plain = refine(SignalNet(0), SignalNet(1), pool, method="head", labeled=few, progress=False)
    scaled = refine(
        SignalNet(0), SignalNet(1), halved, method="head", labeled=[{**b, "image": b["image"] / 2} for b in few],
        transform=lambda x: 2 * x, peer_transforms=lambda x: 2 * x, progress=False,
    )  # fmt: skip
    torch.testing.assert_close(plain.model.fc.weight, scaled.model.fc.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"validation": None}, OptionError, "pass validation="),
        ({"method": "head", "labeled": None}, OptionError, "pass labeled="),
        ({"method": "paper"}, OptionError, "needs layer="),
        ({"method": "best"}, OptionError, "method must be"),
        ({"method": "fold"}, OptionError, 'method="fold" uses no labels'),
        ({"layer": "fc"}, OptionError, "layer= is for method=\"paper\" alone, got it with method='auto'"),
        ({"method": "head", "peer_layer": "fc"}, OptionError, "peer_layer= is for"),
        ({"method": "consensus", "order": 1}, OptionError, "order= is for"),
        ({"max_order": 1}, OptionError, "max_order= is for"),
        ({"labeled": batches(X[:20])}, DataError, "expected a tensor of labels"),
        ({"labeled": batches(X[:20], torch.full((20,), 7))}, ShapeError, "reset_classifier"),
        ({"head": "nothing"}, LayerNameError, "no layer 'nothing'"),
        ({"names": ["one"]}, InputTypeError, "names needs"),
        ({"ridge": -1.0, "method": "fold"}, OptionError, "ridge must be"),
        ({"max_images": 20}, DataError, "too few"),
    ],
)
def test_invalid_arguments_raise(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        refined(SignalNet(1), **options)


@pytest.mark.parametrize("method", ["fold", "head"])
def test_a_finetune_config_without_a_fine_tuning_warns(method: str) -> None:
    sets = {**SETS, "labeled": None if method == "fold" else SETS["labeled"]}
    with pytest.warns(KnowisoWarning, match=f'method="{method}" does not fine-tune, so finetune_config= is not used'):
        refine(SignalNet(0), SignalNet(1), POOL, method=method, finetune_config=RefineFinetuneConfig(), **sets)


def test_the_network_as_its_own_peer_raises() -> None:
    model = SignalNet(0)
    with pytest.raises(OptionError, match="expected peers other than the network"):
        refine(model, [SignalNet(1), nn.DataParallel(model)], POOL, method="fold", progress=False)


def test_no_peers_raise() -> None:
    with pytest.raises(InputTypeError, match="at least one peer"):
        refine(SignalNet(0), [], POOL, **SETS)


def test_consensus_needs_no_labels() -> None:
    result = refine(
        SignalNet(0),
        SignalNet(1),
        POOL,
        method="consensus",
        finetune_config=RefineFinetuneConfig(steps=3),
        progress=False,
    )
    assert result.report.chosen == "original, fine-tuned to the consensus"
    assert result.report.row("after").validation is None


def test_soft_targets_are_the_mean_probability_of_all_networks() -> None:
    own, peers = SignalNet(0), [SignalNet(1), SignalNet(2, classes=5)]
    networks = [classifier_model(net, "peer") for net in peers]
    head = nn.Linear(12, 3)
    for heads, wanted in ((None, [own(X), peers[0](X)]), ({1: head}, [own(X), head(peers[1].features(X))])):
        with PeerEnsemble(networks, heads, 3) as told:
            for net in peers:
                net(X)
            mean = torch.stack([(logits / 2).softmax(1) for logits in wanted]).mean(0)
            torch.testing.assert_close((told.soft_targets(own(X), 2.0) / 2).softmax(1), mean)
    assert not any(module._forward_pre_hooks for net in peers for module in net.modules())


def test_a_sorted_loader_is_sampled_at_random() -> None:
    """The first images alone would be of the first classes."""
    loader = DataLoader(TensorDataset(torch.arange(100)), batch_size=7)
    for seed in (0, 1):
        read = torch.cat([batch[0] for batch in subsample_loader(loader, 20, seed)])
        assert len(read.unique()) == 20
        assert read.float().std() > 15
    assert subsample_loader(loader, None) is loader
    assert subsample_loader(loader, 200) is loader
    with pytest.raises(InputTypeError, match="more than once"):
        subsample_loader(iter(loader), 20)
    with pytest.raises(OptionError, match="max_images"):
        subsample_loader(loader, 0)


def sixty_classes() -> tuple[list[nn.Module], torch.Tensor, torch.Tensor]:
    """Return two networks with weak features for sixty classes, images and labels."""
    generator = torch.Generator().manual_seed(0)
    center, y = torch.randn(60, 24, generator=generator), torch.arange(3000) % 60
    x = center[y] + 1.2 * torch.randn(3000, 24, generator=generator)
    x = torch.cat([x, torch.randn(3000, 48, generator=generator)], 1)
    nets: list[nn.Module] = []
    for i in range(2):
        first = nn.Linear(72, 48, bias=False)
        with torch.no_grad():
            first.weight.copy_(torch.eye(72)[[*range(24), *range(24 + 24 * i, 48 + 24 * i)]])
        nets.append(nn.Sequential(first, nn.Linear(48, 60)))
    return nets, x, y


def test_misleading_pseudo_labels_are_not_used() -> None:
    """Without validation images, cross-validation on the labels decides."""
    nets, x, y = sixty_classes()
    options: dict[str, Any] = {
        "labeled": batches(x[:240], y[:240]),
        "test": batches(x[2000:], y[2000:]),
        "progress": False,
    }
    with pytest.warns(
        KnowisoWarning, match="points in cross-validation on the labeled images; the labels alone are used"
    ):
        safe = refine(
            nets[0],
            nets[1],
            batches(x[240:2000]),
            method="head",
            head_config=HeadConfig(inverse_temperature=math.inf),
            **options,
        )
    assert safe.report.chosen.startswith("labels only")
    harmed = next(row for row in safe.report.rows if row.name.startswith("consensus head"))
    assert safe.report.row("after").test.accuracy > harmed.test.accuracy + 10
    better = refine(
        nets[0], nets[1], batches(x[240:2000]), method="head", head_config=HeadConfig(class_prior="uniform"), **options
    )
    assert better.report.chosen.startswith("consensus head")
    assert better.report.row("after").test.accuracy > safe.report.row("after").test.accuracy


def test_auto_trains_on_the_labels_alone_too() -> None:
    nets, x, y = sixty_classes()
    sets: dict[str, Any] = {"labeled": batches(x[:240], y[:240]), "validation": batches(x[2500:], y[2500:])}
    wrong = HeadConfig(inverse_temperature=math.inf, class_prior=(100.0, *(1.0,) * 59))  # the labels alone start it
    training = RefineFinetuneConfig(steps=5, lr=1e-3, layers=["0"])
    report = refine(
        nets[0], nets[1], batches(x[240:2500]), head_config=wrong, finetune_config=training, progress=False, **sets
    ).report
    trained = [row for row in report.rows if "fine-tuned" in row.name]
    assert [row.name.split(", ", 1)[0] for row in trained] == ["labels only"] * 2
    assert [row.name.rsplit(" to ", 1)[1] for row in trained] == ["the consensus", "the labels"]
    assert report.row("after").validation.accuracy == max(
        row.validation.accuracy for row in report.rows if row.role in ("before", "candidate")
    )
    good = refine(
        nets[0],
        nets[1],
        batches(x[240:2500]),
        head_config=HeadConfig(class_prior="uniform"),
        finetune_config=training,
        progress=False,
        **sets,
    ).report
    assert [row.name.rsplit(" to ", 1)[1] for row in good.rows if "fine-tuned" in row.name] == [
        "the consensus",
        "the labels",
    ]
    assert all(row.name.startswith("consensus head") for row in good.rows if "fine-tuned" in row.name)
