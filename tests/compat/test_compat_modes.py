"""The modes of attacks under torchattacks' names: which targets they choose, and how the model runs."""

from __future__ import annotations

import pytest
import torch
from attack_helpers import digits_test, trained_small_cnn
from compat_helpers import short
from torch import Tensor, nn

from fastadv import compat

pytestmark = pytest.mark.usefixtures("one_thread")


def share_at(model: nn.Module, adv: Tensor, target: Tensor) -> float:
    return float((model(adv).argmax(1) == target).float().mean())


def test_modes_choose_the_targets() -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(32)
    attack = short(compat.BIM, model, eps=0.3, alpha=0.1, steps=10)
    plain = attack(x, y)
    attack.set_mode_targeted_by_label()
    target = (y + 3) % 10
    aimed = attack(x, target)
    assert share_at(model, aimed, target) > share_at(model, plain, target) and attack.targeted
    attack.set_mode_targeted_by_function(lambda images, labels: (labels + 3) % 10)
    assert torch.equal(attack(x, y), aimed)
    attack.set_mode_targeted_by_function(lambda images, labels: (labels.numpy() + 3) % 10)  # type: ignore[arg-type,return-value]
    assert torch.equal(attack(x, y), aimed)
    attack.set_mode_targeted_least_likely(kth_min=2)
    logits = model(x).detach().scatter(1, y.unsqueeze(1), torch.inf)
    second = logits.argsort(1)[:, 1]
    assert share_at(model, attack(x, y), second) > share_at(model, plain, second)
    attack.set_mode_targeted_random()
    torch.manual_seed(0)
    first = attack(x, y)
    torch.manual_seed(0)
    assert torch.equal(attack(x, y), first)
    assert attack.get_mode() == "targeted(random)"
    attack.set_mode_default()
    assert torch.equal(attack(x, y), plain)
    for kind in (compat.TPGD, compat.FAB):
        with pytest.raises(ValueError, match="has no targeted mode"):
            short(kind, model).set_mode_targeted_by_label()


@pytest.mark.parametrize("away", [10, -10])
def test_labels_out_of_range_get_no_targets(away: int) -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(6)
    attack = short(compat.PGD, model)
    for choose in (attack.set_mode_targeted_random, attack.set_mode_targeted_least_likely):
        choose()
        with pytest.raises(ValueError, match=r"^labels must be in 0 \.\. 9, the model's 10"):
            attack(x, y + away)
        assert attack(x[:0], y[:0]).shape == x[:0].shape


def test_targets_that_are_missing_or_the_labels_themselves_are_named() -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(6)
    attack = short(compat.PGD, model)
    attack.set_mode_targeted_by_function(lambda images, labels: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match=r"target_map_function must return .* got None"):
        attack(x, y)
    mixed = torch.where(torch.arange(6) < 2, y, (y + 1) % 10)
    attack.set_mode_targeted_by_function(lambda images, labels: mixed)
    with pytest.warns(UserWarning, match="returned the label itself for 2 of 6 images"):
        attack(x, y)
    attack.set_mode_targeted_by_label()
    attack(x, y)  # the labels of the call are the targets: no warning


def test_the_model_is_attacked_in_the_mode_that_was_set() -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(8)
    attack, before = short(compat.BIM, model), model.bn1.running_mean.clone()
    attack.set_model_training_mode(False, False, False)
    evaluated = attack(x, y)
    assert torch.equal(model.bn1.running_mean, before)
    attack.set_model_training_mode(True, True, True)
    assert not torch.equal(attack(x, y), evaluated)
    assert not torch.equal(model.bn1.running_mean, before)  # as in torchattacks
    for flags, name in (((True, False, True), "batchnorm"), ((True, True, False), "dropout")):
        with pytest.raises(ValueError, match=f"{name}_training must be True"):
            attack.set_model_training_mode(*flags)


def test_targets_out_of_range_are_called_targets() -> None:
    attack, (x, y) = short(compat.BIM, trained_small_cnn(half=False)), digits_test(4)
    attack.set_mode_targeted_by_function(lambda images, labels: labels + 10)
    with pytest.raises(ValueError, match=r"^targets must be in 0 \.\. 9, the model's 10 classes"):
        attack(x, y)
    attack.set_mode_targeted_by_label()
    with pytest.raises(ValueError, match=r"^labels must be in 0 \.\. 9"):
        attack(x, y + 10)


def test_targets_by_label_are_never_taken_for_labels() -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(8)
    attack = short(compat.BIM, model)
    attack.set_mode_targeted_by_label()
    with pytest.raises(ValueError, match="labels must be given in the mode"):
        attack(x)
    with pytest.raises(ValueError, match="verbose and return_verbose must be False"):
        attack.save([(x, y)])
    with pytest.raises(ValueError, match="attacks must not be in the mode"):
        compat.MultiAttack([attack, short(compat.FGSM, model)])(x, y)
