"""An attack's settings: typed arguments, attributes that can be set, and words for what is neither."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, get_type_hints

import pytest
import torch
from attack_helpers import digits_test, images, trained_small_cnn
from attack_zoo import ATTACKS
from torch import nn

import fastadv
from fastadv import attacks
from fastadv.attacks import PGD, Attack

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = sorted(
    (
        kind
        for kind in vars(attacks).values()
        if isinstance(kind, type) and issubclass(kind, Attack)
    ),
    key=lambda kind: kind.__name__,
)
KINDS.remove(Attack)
every_kind = pytest.mark.parametrize("kind", KINDS)
NOT_IN_SETTINGS = {"model", "seed", "check_inputs"}

# For each setting another value than the default, with which all attacks that have it can run on digits.
OTHER: dict[str, Any] = {
    **{"eps": 0.1, "alpha": 0.03, "steps": 3, "random_start": False, "norm": "l2", "restarts": 2},
    **{
        "bounds": (-0.5, 1.5),
        "targeted": True,
        "loss": "cw",
        "precision": "fp32",
        "engine": "eager",
    },
    **{"train_mode": True, "keep": "best", "sparsity": 0.5, "seed": 7, "check_inputs": False},
    **{"decay": 0.5, "tau": 2, "target_classes": 2, "rho": 0.5},
    **{"c": 0.5, "kappa": 0.1, "lr": 0.05, "search_steps": 2},
    **{"alpha_max": 0.2, "eta": 1.2, "beta": 0.8, "early_stop": False},
    **{"queries": 30, "p_init": 0.3, "rescale_schedule": True, "batch_size": 48},
}
# For the attacks whose default is that value.
SECOND: dict[str, Any] = {"precision": "bf16", "random_start": True, "loss": "ce"}
# Short, so that the attacks with many steps end, and without chance.
BASE: dict[str, Any] = {"seed": 1, "precision": "fp32", "engine": "eager"}


def model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))


def arguments_of(kind: type[Attack]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(kind).parameters)


def short(kind: type[Attack], name: str = "") -> dict[str, Any]:
    known = arguments_of(kind)
    options = {**BASE, "steps": 2, "search_steps": 1, "c": 1.0, "lr": 0.1, "queries": 15}
    if kind is fastadv.FAB:  # of the nine classes that it would try one after the other
        options["target_classes"] = 1
    if kind is fastadv.MIM and name == "restarts":  # which without chance would be one run again
        options["random_start"] = True
    return {key: value for key, value in options.items() if key in known and key != name}


def test_all_attacks_are_public_and_in_the_zoo() -> None:
    names = {kind.__name__ for kind in KINDS}
    of_fastadv = {name for name in fastadv._ATTACKS if inspect.isclass(getattr(fastadv, name))}
    assert names == of_fastadv and names <= {*attacks.__all__} & {*fastadv.__all__}
    assert names == {type(make(model())).__name__ for make in ATTACKS.values()}, "attack_zoo.py"
    assert set(OTHER) == {n for kind in KINDS for n in arguments_of(kind)} - {"model"}


@every_kind
def test_every_setting_stands_in_the_signature_with_its_type(kind: type[Attack]) -> None:
    arguments = arguments_of(kind)
    settings = get_type_hints(kind)["settings"]
    hints = get_type_hints(kind.__init__)
    wanted = {field.name: field for field in fields(settings) if field.init}
    assert set(arguments) - NOT_IN_SETTINGS == set(wanted)
    for name, argument in arguments.items():
        assert argument.kind in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY), name
        assert hints[name] is not Any, name
        # CWL2 alone does not leave the precision to the hardware.
        if name in wanted and (kind.__name__, name) != ("CWL2", "precision"):
            assert argument.default == wanted[name].default, name


@every_kind
def test_the_docstring_has_a_line_for_every_argument(kind: type[Attack]) -> None:
    documented = inspect.getdoc(kind).split("Args:")[1].split("Raises:")[0]  # type: ignore[union-attr]
    for name in arguments_of(kind):
        assert f"\n    {name}: " in documented, name


def test_the_function_has_the_arguments_of_the_class() -> None:
    function = dict(inspect.signature(fastadv.pgd_fused).parameters)
    assert set(function) - {"x", "y", "sample_ids"} == set(arguments_of(PGD)) - {"check_inputs"}
    for name, argument in arguments_of(PGD).items():
        if name in function:
            assert argument.default == function[name].default, name


CASES = [(kind, name) for kind in KINDS for name in arguments_of(kind) if name != "model"]
# In place of defaults that take seconds; so far from those in OTHER that the results differ.
FEWER = {"steps": 30, "search_steps": 1, "queries": 15}
# Where a setting acts that has no effect in the short attacks, by the names of attack and setting.
FAR: dict[str, Any] = {
    "eps": 0.3,
    "steps": 4,
    "early_stop": False,
}  # as FAB returns no image beyond eps
WHERE: dict[tuple[str, str], dict[str, Any]] = {
    **{("FAB", name): FAR for name in arguments_of(fastadv.FAB)},
    ("APGD", "target_classes"): {"loss": "dlr-t", "eps": 0.1, "steps": 4},
    ("APGD", "rho"): {"eps": 0.2, "steps": 24},
    ("MIM", "eps"): {"steps": 8},
    **{("CWL2", n): {"c": 20.0, "steps": 20} for n in ("c", "kappa", "lr", "search_steps")},
    **{(kind.__name__, "sparsity"): {"norm": "l1", "eps": 5.0, "alpha": 2.0} for kind in KINDS},
    **{
        (kind.__name__, "keep"): {"eps": 0.3, "alpha": 0.25, "steps": 7, "tau": 6} for kind in KINDS
    },
    ("FriendlyPGD", "tau"): {"eps": 0.3, "alpha": 0.1, "steps": 6},
}
# They change how the result is computed, or nothing where an attack draws nothing.
WITHOUT_EFFECT = {
    *((kind.__name__, name) for kind in KINDS for name in ("engine", "precision", "check_inputs")),
    *((name, "seed") for name in ("CWL2", "FAB", "FGSM", "MIM")),
    *(("FAB", name) for name in ("batch_size", "restarts")),
    ("FGSMRS", "keep"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda c: getattr(c, "__name__", c))
def test_a_setting_that_is_set_counts_from_the_next_call_on(kind: type[Attack], name: str) -> None:
    net, (x, y) = trained_small_cnn(), digits_test(12)
    more = WHERE.get((kind.__name__, name), {})
    acting = {k: v for k, v in more.items() if k != name and k in arguments_of(kind)}
    options = short(kind, name) | acting
    attack = kind(net, **options)
    default = arguments_of(kind)[name].default
    assert getattr(attack, name) == default
    other = OTHER[name] if OTHER[name] != default else SECOND[name]
    if name in FEWER:
        attack = kind(net, **{**options, name: FEWER[name]})
    assert getattr(attack, name) != other
    if name != "seed" and attack.seed is None:
        attack.seed = 1
    before = attack(x, y)
    setattr(attack, name, other)
    assert getattr(attack, name) == other
    made = kind(net, **{**options, name: other})
    if name != "seed" and made.seed is None:
        attack.seed = made.seed = 1
    assert attack.settings == made.settings
    after = attack(x, y)
    assert torch.equal(after, made(x, y))
    if (kind.__name__, name) not in WITHOUT_EFFECT:
        assert not torch.equal(after, before)


def test_a_smaller_radius_and_fewer_steps_hold() -> None:
    net, (x, y) = trained_small_cnn(), digits_test(8)
    attack = PGD(net, eps=0.1, precision="fp32", engine="eager")
    attack(x, y)
    attack.eps, attack.steps = 0.01, 1
    assert (attack(x, y) - x).abs().max() <= 0.01 + 1e-6
    assert len(attack.last.loss_per_step) == 1
    fgsm = fastadv.FGSM(net, 0.1, precision="fp32")
    fgsm.eps = 0.02
    assert fgsm.alpha == 0.02 and (fgsm(x, y) - x).abs().max() == pytest.approx(0.02, abs=1e-6)
    once = fastadv.FGSMRS(net, 0.1)
    assert once.alpha is None and once.settings.step_size == pytest.approx(0.125)
    once.eps = 0.2
    assert once.settings.step_size == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("eps", 8, ValueError, "eps must be at most 1"),
        ("eps", "8/255", TypeError, "eps must be a number"),
        ("steps", 0, ValueError, "steps must be >= 1"),
        ("steps", 2.0, TypeError, "steps must be an integer"),
        ("targeted", "false", TypeError, "targeted must be True or False"),
        ("loss", "mse", ValueError, "loss must be one of"),
        ("norm", "l3", ValueError, "norm must be one of"),
        ("random_start", 0, TypeError, "random_start must be True or False"),
        ("seed", 0.5, TypeError, "seed must be an integer"),
        ("check_inputs", None, TypeError, "check_inputs must be True or False"),
        ("settings", {}, TypeError, "settings must be PGDSettings"),
    ],
)
def test_what_is_set_is_checked_and_a_refusal_changes_nothing(
    name: str, value: object, error: type[Exception], words: str
) -> None:
    attack = PGD(model(), 0.1)
    before = repr(attack)
    with pytest.raises(error, match=words):
        setattr(attack, name, value)
    assert repr(attack) == before


def test_an_engine_that_the_attack_cannot_have_is_refused_when_set() -> None:
    attack = fastadv.APGD(model())
    with pytest.raises(ValueError, match="engine must be 'auto', 'eager' or 'compiled'"):
        attack.engine = "graph"
    assert attack.engine == "auto"


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: fastadv.FGSM(model()), "steps"),
        (lambda: fastadv.FGSM(model()), "alpha"),
        (lambda: fastadv.FGSMRS(model()), "random_start"),
        (lambda: fastadv.CW(model()), "loss"),
        (lambda: fastadv.CWL2(model()), "eps"),
        (lambda: fastadv.CWL2(model()), "norm"),
    ],
)
def test_what_an_attack_fixes_can_be_read_alone(make: Callable[[], Attack], name: str) -> None:
    attack = make()
    value = getattr(attack, name)
    with pytest.raises(AttributeError, match=f"{name} of {type(attack).__name__} cannot be set"):
        setattr(attack, name, value)


@every_kind
def test_an_attribute_that_is_no_setting_is_refused(kind: type[Attack]) -> None:
    attack = kind(model())
    with pytest.raises(AttributeError, match=f"{kind.__name__} has no setting 'colour'"):
        attack.colour = "red"  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=f"{kind.__name__} has no attribute 'colour'"):
        attack.colour  # type: ignore[attr-defined]  # noqa: B018
    if "eps" in arguments_of(kind):
        with pytest.raises(AttributeError, match="'epsilon'; did you mean 'eps'"):
            attack.epsilon = 0.1  # type: ignore[attr-defined]
    attack.model = other = model()
    attack._note = 3  # type: ignore[attr-defined]
    assert attack.model is other


@pytest.mark.parametrize(
    ("kind", "named", "words"),
    [
        (fastadv.PGD, "epsilon", "PGD has no argument 'epsilon'; did you mean 'eps'"),
        (fastadv.PGD, "num_steps", "did you mean 'steps'"),
        (fastadv.PGD, "step_size", "did you mean 'alpha'"),
        (fastadv.PGD, "random_strat", "did you mean 'random_start'"),
        (fastadv.APGD, "n_restarts", "APGD has no argument 'n_restarts'; did you mean 'restarts'"),
        (fastadv.FGSM, "alpha", "FGSM has no argument 'alpha'; .*FGSMRS.* have one"),
        (fastadv.FGSM, "steps", "FGSM has no argument 'steps'; .*PGD.* have one"),
        (fastadv.CW, "kappa", "CW has no argument 'kappa'; CWL2 has one"),
        (fastadv.CW, "confidence", "CW has no argument 'confidence'"),
        (fastadv.CWL2, "confidence", "did you mean 'kappa'"),
        (fastadv.PGD, "decay", "PGD has no argument 'decay'; MIM has one"),
        (fastadv.PGD, "loss_fn", "did you mean 'loss'"),
        (fastadv.Square, "n_queries", "did you mean 'queries'"),
        (fastadv.FAB, "n_target_classes", "did you mean 'target_classes'"),
    ],
)
def test_an_unknown_argument_is_answered_with_what_was_meant(
    kind: type[Attack], named: str, words: str
) -> None:
    with pytest.raises(TypeError, match=words):
        kind(model(), **{named: 1})


def test_functions_answer_in_the_same_way() -> None:
    x, y = images(4), torch.arange(4)
    with pytest.raises(TypeError, match="pgd_fused has no argument 'epsilon'; did you mean 'eps'"):
        fastadv.pgd_fused(model(), x, y, epsilon=0.1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="evaluate has no argument 'epsilon'; did you mean 'eps'"):
        fastadv.evaluate(model(), (x, y), epsilon=0.1)  # type: ignore[call-arg]
    with pytest.raises(
        TypeError, match="call of an attack has no argument 'epsilon'; did you mean"
    ):
        PGD(model())(x, y, epsilon=0.1)  # type: ignore[call-arg]


def test_too_many_arguments_without_names_are_counted() -> None:
    with pytest.raises(TypeError, match=r"FGSM takes 2 without a name \(model, eps\), got 3"):
        fastadv.FGSM(model(), 0.1, 0.1)  # type: ignore[misc]


@pytest.mark.parametrize(
    "positional", [(1, 0, 50, 0.01), (1e-4, 0, 1000), (0.5, 0), (1e-4, 0.5, 50, 0.01)]
)
def test_the_arguments_of_another_carlini_and_wagner_are_refused(
    positional: tuple[float, ...],
) -> None:
    with pytest.raises((TypeError, ValueError), match="is CWL2"):
        fastadv.CW(model(), *positional)


@every_kind
def test_the_text_of_an_attack_is_the_call_that_makes_it(kind: type[Attack]) -> None:
    attack = kind(model(), **short(kind))
    text = repr(attack)
    assert text.startswith(f"{kind.__name__}(Sequential, ")
    options = eval(f"dict({text.partition(', ')[2]}", {})
    assert repr(kind(model(), **options)) == text
    assert kind(model(), **options).settings == attack.settings


@every_kind
def test_copies_keep_what_was_set(kind: type[Attack]) -> None:
    attack = kind(model(), **short(kind))
    attack.bounds = (-0.5, 1.5)
    for twin in (copy.copy(attack), copy.deepcopy(attack), pickle.loads(pickle.dumps(attack))):
        assert repr(twin) == repr(attack)
        with pytest.raises(AttributeError, match="has no setting"):
            twin.colour = "red"


def test_an_attack_of_ones_own_may_have_attributes_of_its_own() -> None:
    class Counting(PGD):
        limit: int

        def __init__(self, net: nn.Module, *, calls: int = 0) -> None:
            super().__init__(net, 0.1, steps=1)
            self.calls = calls

    attack = Counting(model(), calls=2)
    attack.calls += 1
    attack.limit = 5
    assert (attack.calls, attack.limit) == (3, 5)
    with pytest.raises(
        AttributeError, match="Counting has no setting 'callz'; did you mean 'calls'"
    ):
        attack.callz = 3  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="Counting has no argument 'epsilon'"):
        Counting(model(), epsilon=1)  # type: ignore[call-arg]


def test_a_frozen_record_of_settings_stays_one() -> None:
    attack = PGD(model(), 0.1)
    before = attack.settings
    attack.eps = 0.2
    assert before.eps == 0.1
    attack.settings = replace(attack.settings, steps=3)
    assert (attack.eps, attack.steps) == (0.2, 3)
