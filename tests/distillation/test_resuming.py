"""States of the loss: what is refused, and the order of objects in checkpoints of accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from knowiso_train.callbacks import IsomorphismCallback
from knowiso_train.distillation import IsomorphismLoss
from knowiso_train.errors import FormatError
from tests.helpers.small_networks import built

FORMS: dict[str, dict[str, Any]] = {
    "closed_form": {},
    "kernel": {"kernel_size": 1},
    "learned": {"solver": "learned"},
    "order": {"solver": "learned", "order": 1},
    "fixed": {"weight": 100.0},
    "consensus": {"target": "consensus", "peers": [built(3)]},
}


def images(seed: int, count: int = 16) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def trained(form: str, layer: str = "3") -> IsomorphismLoss:
    iso = IsomorphismLoss(built(1), built(2), [layer], **FORMS[form])
    with iso:
        for step in range(12):
            loss = iso.student(images(step)).square().mean() + iso()
            loss.backward()
    return iso


def test_the_state_of_a_fixed_weight_names_the_option() -> None:
    with pytest.raises(FormatError, match=r"saved with a fixed one: give that as weight="):
        trained("closed_form").load_state_dict(trained("fixed").state_dict())


def is_unchanged(iso: IsomorphismLoss, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in iso.state_dict().items())


@pytest.mark.parametrize("form", list(FORMS))
def test_states_of_other_losses_are_refused_unloaded(form: str) -> None:
    iso = trained(form)
    before = {name: value.clone() for name, value in iso.state_dict().items()}
    others = [trained(other).state_dict() for other in FORMS if other != form] + [trained(form, "1").state_dict()]
    monitor = IsomorphismCallback.of(iso, [images(0, 100)])
    others += [monitor.state_dict(), {}, [], None, 5, dict(before, more=torch.zeros(1)), dict.fromkeys(before, 1.0)]
    for state in others:
        with pytest.raises(FormatError, match=r"expected the state of this IsomorphismLoss, got .* other entries"):
            iso.load_state_dict(state)  # type: ignore[arg-type]
        assert is_unchanged(iso, before)
    fresh = IsomorphismLoss(built(1), built(2), ["3"], **FORMS[form])
    fresh.load_state_dict(before)
    assert is_unchanged(fresh, before)
    partial = {name: value for name, value in before.items() if "weight" in name or "maps" in name}
    fresh.load_state_dict(partial, strict=False)


def test_state_of_another_number_of_pairs_is_refused_unless_it_is_older() -> None:
    iso = IsomorphismLoss(built(1), built(2), ["1", "3"])
    fresh = IsomorphismLoss(built(1), built(2), ["3"])
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(FormatError, match=r"same layer pairs, which has 9 figures .*, got 13"):
        fresh.load_state_dict({"_extra_state": iso.state_dict()["_extra_state"]}, strict=False)
    assert is_unchanged(fresh, before)
    calls_and_active_calls = torch.tensor([7.0, 5.0], dtype=torch.float64)
    fresh.load_state_dict(before | {"_extra_state": calls_and_active_calls})
    assert fresh.state_dict()["_extra_state"].tolist() == [7, 5, *before["_extra_state"].tolist()[2:]]


@pytest.mark.parametrize("swapped", [False, True])
def test_another_order_in_checkpoints_of_accelerate_is_refused(swapped: bool, tmp_path: Path) -> None:
    def accelerator(iso: IsomorphismLoss, swap: bool) -> Any:
        made = Accelerator(cpu=True)
        parts = [iso, IsomorphismCallback.of(iso, [images(0, 100)])]
        made.register_for_checkpointing(*(reversed(parts) if swap else parts))
        return made

    iso = trained("closed_form")
    accelerator(iso, swapped).save_state(str(tmp_path))
    fresh = IsomorphismLoss(built(1), built(2), ["3"])
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(FormatError, match="in the order of register_for_checkpointing, which must be that of"):
        accelerator(fresh, not swapped).load_state(str(tmp_path))
    assert is_unchanged(fresh, before)
    accelerator(fresh, swapped).load_state(str(tmp_path))
    assert is_unchanged(fresh, iso.state_dict())
