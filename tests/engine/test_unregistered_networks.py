"""Networks that a model runs without having registered them, and models that share a network."""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastadv
from fastadv.engine.network_lock import locked
from fastadv.engine.networks import networks_of
from fastadv.models import Normalized

X, Y = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 4


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)
    )


class Hiding(nn.Module):
    """Keeps its network in a plain list."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.networks = [network]
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.networks[0](x)


class Predictor:
    """Somebody's plain object around a network."""

    def __init__(self, network: nn.Module) -> None:
        self.parts = {"network": network}

    def logits(self, x: Tensor) -> Tensor:
        return self.parts["network"](x)

    __call__ = logits


def named_globally(network: nn.Module) -> Callable[[Tensor], Tensor]:
    names: dict[str, Any] = {"net": network, "torch": torch}
    exec("model = lambda x: torch.stack([net(part) for part in (x,)])[0]", names)
    return names["model"]


WRAPPINGS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "closure": lambda network: lambda x: network(x),
    "global": named_globally,
    "partial": lambda network: partial(lambda inner, x: inner(x), network),
    "object": Predictor,
    "bound method": lambda network: Predictor(network).logits,
    "list of a module": Hiding,
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_buffers_and_modes_of_a_network_in_train_mode_are_as_before(wrap: Any) -> None:
    network = net().train()
    before = {name: value.clone() for name, value in network.named_buffers()}
    model = wrap(network)
    assert network in networks_of(model)
    fastadv.PGD(model, steps=2)(X, Y)
    assert all(part.training for part in network.modules())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_a_figure_of_a_network_in_train_mode_is_suspect(wrap: Any) -> None:
    network = net().train()
    before = {name: value.clone() for name, value in network.named_buffers()}
    with pytest.warns(UserWarning, match="train mode"):
        report = fastadv.evaluate(wrap(network), (X, Y), ["clean", "fgsm"], progress=False)
    assert report.rows[1].status == "suspect"
    assert "train mode" in " ".join(report.rows[1].notes)
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())
    row = fastadv.evaluate(wrap(network.eval()), (X, Y), ["fgsm"], progress=False).rows[0]
    assert row.status == "ok"


def test_autoattack_on_a_network_in_train_mode_is_suspect() -> None:
    network = net().train()
    attack = fastadv.AutoAttack(lambda x: network(x), 0.1, version=["apgd-ce"])
    with pytest.warns(UserWarning, match="train mode"):
        attack(X[:4], Y[:4], seed=0)
    assert attack.last.status == "suspect" and "train mode" in attack.last.notes[-1]
    assert all(part.training for part in network.modules())


def test_a_matrix_and_an_analysis_of_a_network_in_train_mode_say_so() -> None:
    hiding, plain = Hiding(net().train()), net().eval()
    with pytest.warns(
        UserWarning, match="the model hidden runs a Sequential that is in train mode"
    ):
        matrix = fastadv.evaluation.transfer_matrix(
            {"hidden": hiding, "plain": plain}, (X, Y), "fgsm", eps=0.1, progress=False
        )
    assert any("model hidden runs" in note for note in matrix.notes)
    assert not any("plain runs" in note for note in matrix.notes)
    with pytest.warns(UserWarning, match="the model runs a Sequential that is in train mode"):
        found = fastadv.evaluation.analyse(hiding, (X, Y), ["eps-curve"], radii=[0.1], steps=1)
    assert any("in train mode" in note for note in found["eps-curve"].notes)
    found = fastadv.evaluation.analyse(plain, (X, Y), ["eps-curve"], radii=[0.1], steps=1)
    assert not any("in train mode" in note for note in found["eps-curve"].notes)


class Noisy(nn.Module):
    """Draws noise in train mode, as many defences do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * torch.randn_like(x) if self.training else x


@pytest.mark.parametrize(
    "part", [nn.Dropout(0.5), nn.Sequential(nn.Identity(), nn.Dropout(0.5)), Noisy()]
)
def test_a_part_in_train_mode_that_evaluation_switches_off_is_told(part: nn.Module) -> None:
    model = nn.Sequential(part, net()).eval()
    model[0].train()
    for judge in (fastadv.evaluate, fastadv.evaluation.masking_checks):
        options = {"attacks": ["clean"]} if judge is fastadv.evaluate else {"steps": [1]}
        with pytest.warns(UserWarning, match=f"'0', a {type(part).__name__}, is in train mode"):
            judge(model, (X, Y), progress=False, **options)
    assert model[0].training and not model.training


def test_a_part_whose_mode_changes_nothing_is_not_told_of() -> None:
    model = nn.Sequential(nn.Identity(), net()).eval()
    model[0].train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastadv.evaluate(model, (X, Y), ["clean"], progress=False)


def test_what_torch_and_the_caller_keep_beside_a_network_is_none_of_it() -> None:
    model, other = net(), net()
    model[3].register_forward_hook(lambda *_: other(X) and None)
    assert networks_of(model) == [model]
    lambda_of_attribute = eval("lambda holder, x: holder.net(x)", {"net": other})
    assert networks_of(lambda_of_attribute) == []


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_threads_whose_models_share_a_network(precision: Any) -> None:
    network = net().train()
    models = [network, Normalized(network, [0.5] * 3, [0.2] * 3), lambda x: network(x).flip(1)]
    attacks = [
        partial(
            fastadv.pgd_fused, model, X, Y, eps=0.1, alpha=0.03, steps=3, random_start=False, precision=precision
        )
        for model in models
    ]  # fmt: skip
    serial = [attack() for attack in attacks]
    found: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.__setitem__(i, attacks[i % 3]()))
        for i in range(9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], serial[i % 3]) for i in range(9))
    assert all(part.training for part in network.modules())
    assert all(p.requires_grad for p in network.parameters())


def test_threads_that_evaluate_one_network_leave_it_as_it_was() -> None:
    network, found = net().train(), []

    def work() -> None:
        report = fastadv.evaluate(network, (X, Y), ["clean", "pgd-3"], progress=False)
        found.append([row.correct for row in report.rows])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(rows == found[0] for rows in found)
    assert all(part.training for part in network.modules())
    assert all(p.requires_grad for p in network.parameters())


def test_threads_whose_models_are_each_others_surrogates_do_not_wait_for_each_other() -> None:
    one, other, found = net(), net(), []
    nn.init.normal_(other[4].weight)

    def work(judged: nn.Module, surrogate: nn.Module) -> None:
        for _ in range(3):
            fastadv.evaluate(judged, (X, Y), ["fgsm"], surrogate=surrogate, progress=False)
        found.append(judged)

    threads = [
        threading.Thread(target=work, args=pair, daemon=True)
        for pair in ((one, other), (other, one))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(found) == 2


def test_a_thread_may_enter_again_and_others_wait_for_it_alone() -> None:
    network, entered = net(), []
    with locked(network), locked(Normalized(network, [0.0] * 3, [1.0] * 3)):

        def work(model: nn.Module) -> None:
            with locked(model):
                entered.append(model)

        other, same = net(), Hiding(network)
        threads = [threading.Thread(target=work, args=(model,)) for model in (same, other)]
        for thread in threads:
            thread.start()
        threads[1].join(timeout=60)
        assert entered == [other]
    threads[0].join(timeout=60)
    assert entered == [other, same]


def _scale(model: Any, x: Tensor, y: Tensor) -> Tensor:
    for parameter in model.parameters():
        parameter.data.mul_(-1)
    return x


def _exchange_data(model: Any, x: Tensor, y: Tensor) -> Tensor:
    model[4].bias.data = torch.full((4,), 9.0)
    return x


def _exchange_layer(model: Any, x: Tensor, y: Tensor) -> Tensor:
    model[4] = nn.Linear(288, 4)
    return x


@pytest.mark.parametrize("attack", [_scale, _exchange_data, _exchange_layer])
def test_a_callable_that_changes_the_model_past_torchs_counters_is_told(attack: Any) -> None:
    with pytest.raises(RuntimeError, match="changed the model's parameters or buffers"):
        fastadv.evaluate(net().eval(), (X, Y), [("mine", attack)], progress=False)


def _leave_hook(model: Any, x: Tensor, y: Tensor) -> Tensor:
    model[4].register_forward_hook(lambda module, args, out: -out)
    return x


def _change_attribute(model: Any, x: Tensor, y: Tensor) -> Tensor:
    model[1].eps = 1e3
    return x


@pytest.mark.parametrize("attack", [_leave_hook, _change_attribute])
def test_a_callable_that_changes_what_the_model_computes_is_told(attack: Any) -> None:
    with pytest.raises(RuntimeError, match="changed the results of the model"):
        fastadv.evaluate(net().eval(), (X, Y), [("mine", attack)], progress=False)


class Coin(nn.Module):
    """Turns the images of a pass over, by a generator that is told, with a probability."""

    def __init__(self, toss: Callable[[], float], below: float) -> None:
        super().__init__()
        self.net, self.toss, self.below = net(), toss, below

    def forward(self, x: Tensor) -> Tensor:
        return self.net(1 - x if self.toss() < self.below else x)


OWN = random.Random(0)
TOSSES: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.rand(())),
    "python": random.random,
    "numpy": np.random.random,
    "own": OWN.random,
}


@pytest.mark.parametrize("toss", TOSSES.values(), ids=TOSSES)
def test_a_coin_tossed_once_for_a_pass_is_noticed_however_it_falls(toss: Any) -> None:
    for seed in range(4):
        random.seed(seed)
        np.random.seed(seed)
        OWN.seed(seed)
        report = fastadv.evaluate(
            Coin(toss, 0.3).eval(), (X, Y), ["fgsm"], progress=False, seed=seed
        )
        assert report.rows[0].status == "suspect"
    row = fastadv.evaluate(Coin(toss, -1.0).eval(), (X, Y), ["fgsm"], progress=False).rows[0]
    assert row.status == "ok"


class Shifted(nn.Module):
    """Adds a tensor that is no buffer, then runs a network that is no submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.networks, self.shift, self.inside = [net().eval()], torch.zeros(3, 1, 1), net()

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x) + self.networks[0](x + self.shift)


def _other_tensor(model: Shifted) -> None:
    model.shift = torch.full((3, 1, 1), 0.5)


def _other_weights(model: Shifted) -> None:
    nn.init.normal_(model.networks[0][4].weight)


def _other_code(model: Shifted) -> None:
    model.forward = lambda x: model.inside(1 - x)  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [_other_tensor, _other_weights, _other_code])
def test_kept_work_of_a_model_that_computes_something_else_is_refused(
    change: Callable[[Shifted], None], tmp_path: Path
) -> None:
    model = Shifted()

    def judged() -> list[int]:
        report = fastadv.evaluate(
            model, (X, Y), ["clean", "pgd-3"], progress=False, state_dir=tmp_path
        )
        return [row.correct for row in report.rows]

    assert judged() == judged()
    change(model)
    with pytest.raises(ValueError, match="same weights and computes something else"):
        judged()
