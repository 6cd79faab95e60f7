"""torchattacks' names and habits on our attacks."""

from __future__ import annotations

import inspect
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attack_helpers import digits_test, trained_small_cnn
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastadv
from fastadv import compat
from fastadv.engine.network_lock import locked

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY = [getattr(compat, n) for n in compat.__all__ if n not in ("Attack", "MultiAttack")]
EPS = 0.1


def short(kind: Any, model: nn.Module, **more: Any) -> compat.Attack:
    """An attack of few steps, in float32."""
    known = inspect.signature(kind).parameters
    steps, eps = (60 if kind is compat.CW else 4), (1.0 if kind is compat.PGDL2 else EPS)
    options = {"eps": eps, "steps": steps, "n_queries": 30, "lr": 0.05, **more}
    attack: compat.Attack = kind(model, **{k: v for k, v in options.items() if k in known})
    attack.own.precision = "fp32"
    return attack


def test_defaults_and_arguments_are_those_of_torchattacks() -> None:
    theirs = pytest.importorskip("torchattacks")
    for kind in EVERY:
        own = inspect.signature(kind).parameters
        for name, argument in inspect.signature(getattr(theirs, kind.__name__)).parameters.items():
            if name == "eps_for_division":
                continue
            assert name in own, f"{kind.__name__} lacks {name}"
            assert own[name].default == argument.default, f"{kind.__name__}.{name}"


def test_the_models_own_predictions_wait_while_another_thread_has_the_model() -> None:
    model, x = trained_small_cnn(half=False), digits_test(4)[0]
    entered = threading.Event()
    model.register_forward_hook(lambda *_: entered.set())
    attacks = [
        short(compat.BIM, model),
        compat.MultiAttack([short(compat.BIM, model), short(compat.FGSM, model)]),
    ]
    with locked(model):
        threads = [threading.Thread(target=attack, args=(x,), daemon=True) for attack in attacks]
        for thread in threads:
            thread.start()
        assert not entered.wait(timeout=0.3)
    for thread in threads:
        thread.join(timeout=60)
    assert entered.is_set()


@pytest.mark.parametrize("kind", EVERY)
def test_every_attack_breaks_images_within_its_ball(kind: Any) -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(32)
    attack = short(kind, model, alpha=0.05)
    adv = attack(x, y)
    assert adv.shape == x.shape and adv.min() >= 0 and adv.max() <= 1
    if hasattr(attack, "eps"):
        attack.eps = 0.0
        torch.testing.assert_close(attack(x, y), x, rtol=0, atol=2e-7)
    assert (model(adv).argmax(1) == y).sum() < (model(x).argmax(1) == y).sum()


def test_it_moves_the_images_as_the_own_attack_does() -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(16)
    adv = short(compat.BIM, model, alpha=0.03)(x, y)
    own = fastadv.PGD(model, EPS, 0.03, 4, random_start=False, precision="fp32")
    assert torch.equal(adv, own(x, y))
    l2 = short(compat.PGDL2, model, eps=0.5)
    assert ((l2(x, y) - x).flatten(1).norm(dim=1) <= 0.5 + 1e-5).all() and l2.norm == "l2"


def test_it_moves_the_images_as_torchattacks_does() -> None:
    theirs = pytest.importorskip("torchattacks")
    model, (x, y) = trained_small_cnn(half=False).eval(), digits_test(16)
    steps: dict[str, Any] = {"eps": EPS, "alpha": 0.03, "steps": 4}
    in_l2 = {**steps, "eps": 0.8, "alpha": 0.2, "random_start": False}
    every = {"BIM": steps, "FGSM": {"eps": EPS}, "MIFGSM": steps, "PGDL2": in_l2}
    for name, options in every.items():
        wanted = getattr(theirs, name)(model, **options)(x, y)
        ours = getattr(compat, name)(model, **options)
        ours.own.precision = "fp32"
        assert ((ours(x, y) - wanted).abs() > 1e-6).float().mean() < 0.01, name


def test_pgdl2_starts_at_torchattacks_distances() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(200)
    x = x.clamp(0.2, 0.8)
    attack = compat.PGDL2(model, eps=0.1, alpha=1e-6, steps=1)
    attack.seed = 4
    for eps, adv in ((0.1, attack(x, y)), (0.05, attack(x, y, epsilons=0.05))):
        distance = (adv - x).flatten(1).norm(dim=1) / eps
        assert 0.4 < float(distance.mean()) < 0.6 and float(distance.min()) < 0.1
    assert torch.equal(attack(x, y), attack(x, y))
    attack.random_start = False
    assert float((attack(x, y) - x).abs().max()) < 1e-5


def test_settings_are_read_and_set_with_their_checks() -> None:
    attack = compat.PGD(trained_small_cnn(half=False))
    attack.eps, attack.steps = 4 / 255, 3
    assert attack.own.eps == attack.eps == 4 / 255 and attack.own.steps == 3
    with pytest.raises(ValueError, match="steps must be >= 1"):
        attack.steps = 0
    with pytest.raises(AttributeError, match="did you mean 'eps'"):
        _ = attack.epsilon
    assert "eps=0.0156" in repr(attack) and "steps=3" in repr(attack) and "PGD(" in repr(attack)


def test_labels_left_out_are_the_models_own() -> None:
    model, (x, _) = trained_small_cnn(half=False), digits_test(8)
    attack = short(compat.BIM, model)
    assert torch.equal(attack(x), attack(x, model(x).argmax(1)))


@pytest.mark.parametrize("width", [np.uint8, np.int8, np.int16, np.int32, np.int64])
def test_numpy_images_and_labels_of_any_width(width: Any) -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(8)
    attack = short(compat.BIM, model)
    adv = attack(x.numpy(), y.numpy().astype(width))
    assert isinstance(adv, np.ndarray) and np.array_equal(adv, attack(x, y).numpy())


def test_bytes_count_as_images_in_255ths() -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(8)
    as_bytes = (x * 255).round().to(torch.uint8)
    attack = short(compat.BIM, model)
    assert torch.equal(attack(as_bytes, y), attack(as_bytes.float() / 255, y))


def test_several_radii_give_a_list() -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(8)
    attack = short(compat.BIM, model, alpha=0.06)
    found = attack(x, y, epsilons=[0.05, EPS])
    assert [round(float((adv - x).abs().max()), 4) for adv in found] == [0.05, 0.1]
    assert torch.equal(found[1], attack(x, y))
    assert torch.equal(found[0], attack(x, y, epsilons=0.05))
    assert torch.equal(found[0], attack(x, y, epsilons=np.float64(0.05)))
    assert torch.equal(attack(x, y, epsilons=np.float32(0.0625)), attack(x, y, epsilons=0.0625))
    with pytest.raises(ValueError, match="epsilons must be None for CW"):
        short(compat.CW, model)(x, y, epsilons=0.1)


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


def test_images_of_other_channels_than_the_normalisation_are_named() -> None:
    attack = short(compat.PGD, trained_small_cnn(half=False))
    attack.set_normalization_used([0.5, 0.5], [0.2, 0.2])
    with pytest.raises(ValueError, match=r"inputs must have 2 channels.*got \(6, 1, 8, 8\)"):
        attack(*digits_test(6))


def test_normalised_images_are_attacked_in_units_of_the_image() -> None:
    inner, (x, y) = trained_small_cnn(half=False), digits_test(16)

    class Denormalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, z: Tensor) -> Tensor:
            return self.inner(z * 0.25 + 0.5)

    attack = short(compat.BIM, Denormalising())
    attack.set_normalization_used(mean=[0.5], std=[0.25])
    adv = attack((x - 0.5) / 0.25, y) * 0.25 + 0.5
    assert (adv - x).abs().max() <= EPS + 1e-5 and adv.min() >= -1e-6
    plain = short(compat.BIM, inner)(x, y)
    assert ((adv - plain).abs() > 1e-4).float().mean() < 0.02


def test_saved_images_are_those_of_the_batches(tmp_path: Path) -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(24)
    attack, loader = short(compat.BIM, model), DataLoader(TensorDataset(x, y), batch_size=10)
    found = attack.save(
        loader, tmp_path / "adv.pt", verbose=False, return_verbose=True, save_predictions=True
    )
    content = torch.load(tmp_path / "adv.pt", weights_only=True)
    assert set(content) == {"adv_inputs", "labels", "preds", "save_type"}
    adv = attack(x, y)
    torch.testing.assert_close(content["adv_inputs"], adv, rtol=0, atol=1e-6)
    assert torch.equal(content["labels"], y)
    robust = model(content["adv_inputs"]).argmax(1) == y
    assert found is not None and found[0] == pytest.approx(100 * float(robust.float().mean()))
    distance = (content["adv_inputs"] - x).flatten(1).norm(dim=1)[~robust].mean()
    assert found[1] == pytest.approx(float(distance), abs=1e-5)
    assert len(found) == 3 and found[2] > 0
    attack.save(
        loader, tmp_path / "bytes.pt", verbose=False, save_clean_inputs=True, save_type="int"
    )
    content = torch.load(tmp_path / "bytes.pt", weights_only=True)
    assert content["adv_inputs"].dtype == content["clean_inputs"].dtype == torch.uint8


def test_saved_images_are_loaded_as_they_were_attacked(tmp_path: Path) -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(10)
    attack, loader = short(compat.BIM, model), DataLoader(TensorDataset(x, y), batch_size=4)
    for save_type, atol in (("float", 1e-6), ("int", 0.51 / 255)):
        file = tmp_path / f"{save_type}.pt"
        options: dict[str, Any] = {"save_type": save_type, "save_clean_inputs": True}
        attack.save(loader, file, verbose=False, save_predictions=True, **options)
        normalize = {"mean": [0.5], "std": [0.25]}
        plain = list(attack.load(file, batch_size=6))
        assert [len(part) for part in plain] == [2, 2] and len(plain[0][0]) == 6
        adv, labels = (torch.cat(part) for part in zip(*plain, strict=True))
        torch.testing.assert_close(adv, attack(x, y), rtol=0, atol=atol)
        assert torch.equal(labels, y)
        ((seen, _, predicted, clean),) = compat.Attack.load(
            file, normalize=normalize, load_predictions=True, load_clean_inputs=True
        )
        torch.testing.assert_close(seen, (adv - 0.5) / 0.25)
        torch.testing.assert_close(clean * 0.25 + 0.5, x, rtol=0, atol=atol)
        assert torch.equal(predicted, model(attack(x, y)).argmax(1))
    attack.save(loader, file, verbose=False)
    with pytest.raises(ValueError, match="load_path must be a file with preds"):
        attack.load(file, load_predictions=True)
    with pytest.raises(ValueError, match="normalize must have mean and std"):
        attack.load(file, normalize={"mean": [0.5]})
    for mean, std in (([0.5] * 3, [0.5]), (0.5, [0.5]), (["a"], [0.5]), ([0.5], [0.0])):
        with pytest.raises(ValueError, match=r"normalize\['(mean|std)'\] must"):
            attack.load(file, normalize={"mean": mean, "std": std})  # type: ignore[dict-item]


def test_a_file_that_holds_no_saved_images_is_named(tmp_path: Path) -> None:
    file, x, y = tmp_path / "adv.pt", torch.rand(4, 1, 8, 8), torch.arange(4)
    torch.save({"adv_inputs": x, "labels": y}, file)
    assert len(compat.Attack.load(file).dataset) == 4  # type: ignore[arg-type]
    whole = file.read_bytes()
    place = whole.index(x.numpy().tobytes()) + 100
    damaged = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    for content, message in (
        (damaged, "cannot be read: .* is damaged"),
        (b"no archive", "cannot be read"),
        (x, "holds a Tensor"),
        ({"adv_inputs": x.tolist(), "labels": y}, "a file with adv_inputs"),
        ({"adv_inputs": x, "labels": y[:3]}, r"one value for each image.*labels \[3\]"),
    ):
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        with pytest.raises(ValueError, match=f"load_path must be .*{message}") as error:
            compat.Attack.load(file)
        assert "adv.pt" in str(error.value) or "a file with" in str(error.value)


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


def test_the_mean_of_several_gradients_is_followed() -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(8)
    noisy = nn.Sequential(nn.Dropout(0.3), model)
    several = compat.EOTPGD(noisy, EPS, 0.03, 4, eot_iter=3, random_start=False)
    assert several.own.passes == several.eot_iter == 3
    assert torch.equal(several(x, y), compat.BIM(model, EPS, 0.03, 4)(x, y))  # in eval mode


def test_several_attacks_take_what_is_left() -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(48)
    weak, strong = short(compat.BIM, model, eps=0.02, alpha=0.01), short(compat.BIM, model, eps=0.2)
    adv = compat.MultiAttack([weak, strong])(x, y)
    broken = model(weak(x, y)).argmax(1) != y
    assert broken.any()
    torch.testing.assert_close(adv[broken], weak(x, y)[broken], rtol=0, atol=1e-5)
    right = model(adv).argmax(1) == y
    assert torch.equal(adv[right], x[right])
    assert right.sum() <= (model(strong(x, y)).argmax(1) == y).sum()
    with pytest.raises(ValueError, match="at least two"):
        compat.MultiAttack([weak])


def test_wrong_inputs_are_named() -> None:
    attack, (x, y) = short(compat.BIM, trained_small_cnn(half=False)), digits_test(4)
    for labels in (y.float(), y.bool(), [0.5, 1, 2, 3], "0123", {0: 1}, [[1], [2, 3]]):
        with pytest.raises(TypeError, match="labels must be integers"):
            attack(x, labels)
    with pytest.raises(TypeError, match="inputs must be a tensor or a NumPy array"):
        attack([1, 2], y)
    with pytest.raises(TypeError, match="model must be a module"):
        compat.PGD(lambda x: x)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda attack, x, y: attack(x + 1, y), "inputs must be finite and within bounds"),
        (lambda attack, x, y: attack(x, y[:3]), r"labels must have shape \(4,\), got \(3,\)"),
        (lambda attack, x, y: attack(x, y[:, None]), r".* pass labels\.flatten\(\)"),
        (
            lambda attack, x, y: attack(x[:3, 0], y[:1]),
            r"inputs must .* pass inputs\.unsqueeze\(0\) and labels\.reshape\(1\)",
        ),
        (lambda attack, x, y: attack((255 * x).long(), y), "inputs must be float32"),
        (lambda attack, x, y: attack(x, y + 10), r"labels must be in 0 \.\. 9"),
        (lambda attack, x, y: attack(x, y, epsilons=8), "epsilons must be at most 1 in linf"),
    ],
)
def test_errors_of_a_call_have_its_own_names(call: Any, words: str) -> None:
    attack, (x, y) = short(compat.BIM, trained_small_cnn(half=False)), digits_test(4)
    with pytest.raises((TypeError, ValueError), match=f"^{words}") as told:
        call(attack, x, y)
    assert not re.search(r"\b[xy]\b", str(told.value))


def test_targets_out_of_range_are_called_targets() -> None:
    attack, (x, y) = short(compat.BIM, trained_small_cnn(half=False)), digits_test(4)
    attack.set_mode_targeted_by_function(lambda images, labels: labels + 10)
    with pytest.raises(ValueError, match=r"^targets must be in 0 \.\. 9, the model's 10 classes"):
        attack(x, y)
    attack.set_mode_targeted_by_label()
    with pytest.raises(ValueError, match=r"^labels must be in 0 \.\. 9"):
        attack(x, y + 10)


def test_an_error_of_the_model_keeps_its_words() -> None:
    class Picky(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("the x of this model is too small, and eps is not its concern")

    x, y = digits_test(4)
    with pytest.raises(ValueError, match="the x of this model is too small, and eps is not"):
        short(compat.BIM, Picky())(x, y)


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (compat.APGD, {"n_restarts": 0}, "^n_restarts must be >= 1"),
        (compat.APGDT, {"eot_iter": "2"}, "^eot_iter must be an integer"),
        (compat.APGD, {"verbose": "no"}, "^verbose must be True or False"),
        (compat.Square, {"n_queries": 0}, "^n_queries must be >= 1"),
        (compat.Square, {"resc_schedule": "no"}, "^resc_schedule must be True or False"),
        (compat.FAB, {"verbose": 2}, "^verbose must be True or False"),
    ],
)
def test_wrong_settings_are_named_as_they_were_given(
    kind: Any, wrong: dict[str, Any], message: str
) -> None:
    model = trained_small_cnn(half=False)
    with pytest.raises((TypeError, ValueError), match=message):
        kind(model, **wrong)
    attack, ((name, value),) = kind(model), wrong.items()
    if name != "verbose":
        with pytest.raises((TypeError, ValueError), match=message):
            setattr(attack, name, value)


def test_a_file_that_is_no_path_is_named_before_the_attack() -> None:
    attack, batch = short(compat.BIM, trained_small_cnn(half=False)), digits_test(2)
    with pytest.raises(TypeError, match="save_path must be a path, got 3"):
        attack.save([batch], 3)  # type: ignore[arg-type]


def test_bytes_under_a_normalisation_are_judged_as_they_come_back(tmp_path: Path) -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(24)
    wrapped = nn.Sequential(fastadv.models.Normalized(nn.Identity(), [-2.0], [4.0]), model)
    images = (x * 255).round().to(torch.uint8)
    attacks = []
    for eps in (0.07, 0.2):
        attacks.append(short(compat.BIM, wrapped, eps=eps, alpha=eps / 2))
        attacks[-1].set_normalization_used([0.5], [0.25])  # the two make up the identity

    def right(adv: Tensor) -> Tensor:
        return model(adv).argmax(1) == y

    found = attacks[1].save([(images, y)], verbose=False, return_verbose=True)
    adv = attacks[1](images, y)
    assert found is not None and found[0] == pytest.approx(100 * float(right(adv).float().mean()))
    distance = (adv - images / 255).flatten(1).norm(dim=1)[~right(adv)].mean()
    assert found[1] == pytest.approx(float(distance), abs=1e-5)
    assert wrapped.training and not model.training  # no mode was changed
    together = compat.MultiAttack(attacks)(images, y)
    weak = attacks[0](images, y)
    broken = ~right(weak)
    assert broken.any() and not broken.all()
    torch.testing.assert_close(together[broken], weak[broken], rtol=0, atol=1e-5)
    torch.testing.assert_close(together[right(together)], (images / 255)[right(together)])
    plain = short(compat.BIM, wrapped)
    with pytest.raises(ValueError, match="attacks must have one normalisation"):
        compat.MultiAttack([attacks[0], plain])(images, y)


def test_several_attacks_take_numpy_images() -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(16)
    several = compat.MultiAttack([short(compat.FGSM, model), short(compat.BIM, model)])
    found = several(x.numpy(), y.numpy())
    assert isinstance(found, np.ndarray) and np.array_equal(found, several(x, y).numpy())


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


def test_attributes_that_would_have_no_effect_are_refused() -> None:
    model = trained_small_cnn(half=False)
    attack = short(compat.BIM, model)
    for name, value in (
        ("model", trained_small_cnn(half=False)),
        ("targeted", True),
        ("epss", 0.1),
    ):
        with pytest.raises(AttributeError, match=name):
            setattr(attack, name, value)
    apgd, square = short(compat.APGD, model), short(compat.Square, model)
    apgd.n_restarts, apgd.eot_iter, square.n_queries = 2, 3, 7
    assert (apgd.own.restarts, apgd.own.passes, square.own.queries) == (2, 3, 7)
    assert (apgd.n_restarts, apgd.eot_iter, square.n_queries) == (2, 3, 7)


def test_images_that_are_not_normalised_are_refused() -> None:
    """They would be cut to 0..1 without a word."""
    x, y = digits_test(4)
    attack = short(compat.PGD, trained_small_cnn(half=False))
    with pytest.raises(ValueError, match=r"mean must be the mean of images in 0\.\.1, got 128"):
        attack.set_normalization_used(128, 64)
    attack.set_normalization_used([0.5], [0.25])
    with pytest.raises(ValueError, match="inputs must be normalised by the mean and std"):
        attack((x - 0.5) / 0.1, y)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert attack(((x - 0.5) / 0.25).to(dtype), y).dtype == dtype


def test_flags_are_no_text() -> None:
    model = trained_small_cnn(half=False)
    with pytest.raises(TypeError, match="multi_targeted must be True or False, got 'no'"):
        compat.FAB(model, multi_targeted="no")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="save_predictions must be True or False, got 'no'"):
        compat.PGD(model).save([], save_predictions="no")  # type: ignore[arg-type]


def test_several_radii_are_a_list_or_an_array() -> None:
    x, y = digits_test(4)
    attack = short(compat.PGD, trained_small_cnn(half=False))
    assert len(attack(x, y, epsilons=torch.tensor([0.1, 0.2]))) == 2
    assert attack(x, y, epsilons=np.float32(0.1)).shape == x.shape
    for wrong, words in (("8/255", "'8/255'"), ([], "one radius or several")):
        with pytest.raises((TypeError, ValueError), match=f"epsilons must be .*{words}"):
            attack(x, y, epsilons=wrong)


def test_attacks_of_another_kind_are_not_joined() -> None:
    model = trained_small_cnn(half=False)
    for wrong in ([model, model], compat.PGD(model), [fastadv.PGD(model)] * 2):
        with pytest.raises(
            TypeError, match=r"attacks must be a list of attacks of fastadv\.compat"
        ):
            compat.MultiAttack(wrong)  # type: ignore[arg-type]
