"""Networks that normalise their images by themselves, and files that name the same normalisation once more."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadv.commands.judged import model_of_file
from fastadv.models import Normalized, load_published_state_dict

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
IMAGES = torch.rand(2, 3, 4, 4)


class ByBuffers(nn.Module):
    """As RobustBench's networks: buffers beside the network's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 4)
        self.register_buffer("mu", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("sigma", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv((x - self.mu) / self.sigma).flatten(1)


class ByAttributes(nn.Module):
    """As its DMWideResNet: tensors that are no buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 4)
        self.mean = torch.tensor(MEAN).view(1, 3, 1, 1)
        self.std = torch.tensor(STD).view(1, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv((x - self.mean) / self.std).flatten(1)


class ByParameters(nn.Module):
    """As modules whose constants are parameters, so that they move to a device with the others."""

    def __init__(self, trained: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 4)
        self.mean = nn.Parameter(torch.tensor(MEAN).view(1, 3, 1, 1), requires_grad=trained)
        self.std = nn.Parameter(torch.tensor(STD).view(1, 3, 1, 1), requires_grad=trained)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv((x - self.mean) / self.std).flatten(1)


def by_module() -> nn.Module:
    """A network behind a module of its own."""
    flat = nn.Sequential(nn.Conv2d(3, 10, 4), nn.Flatten())
    return nn.Sequential(Normalized(nn.Identity(), MEAN, STD), flat)


OWN = [ByBuffers, ByAttributes, ByParameters, by_module]


def judged(
    build: Any, state: dict[str, Any], folder: Path, patch: Any, normalise: Any = None
) -> Tensor:
    """The logits of the network that `fastadv eval` judges."""
    torch.save(state, folder / "weights.pt")
    patch.setattr("fastadv.commands.judged.create_model", lambda *_: build())
    images: Any = SimpleNamespace(num_classes=10, in_channels=3)
    model = model_of_file("own:model", str(folder / "weights.pt"), normalise, images).model
    return model(IMAGES)


@pytest.mark.parametrize("build", OWN)
def test_a_normalisation_beside_the_weights_is_not_applied_twice(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    state = {"state_dict": model.state_dict(), "mean": MEAN, "std": STD}
    plain = build is ByAttributes  # nothing in the file shows that its forward pass uses them
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.testing.assert_close(judged(build, state, tmp_path, monkeypatch), model(IMAGES))
    assert [("applied once" in str(w.message)) for w in caught] == [True] * plain


@pytest.mark.parametrize("build", [ByBuffers, ByAttributes, by_module])
def test_another_normalisation_than_the_network_has_is_refused(build: Any) -> None:
    model = build()
    state = {"state_dict": model.state_dict(), "mean": [0.1, 0.2, 0.3], "std": STD}
    with pytest.raises(ValueError, match="by itself with mean"):
        load_published_state_dict(Normalized(model), state)


@pytest.mark.parametrize("build", OWN)
def test_naming_the_normalisation_of_a_network_that_has_it_is_refused(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = build().state_dict()
    named = [",".join(map(str, values)) for values in (MEAN, STD)]
    with pytest.raises(ValueError, match="normalise must be left out"):
        judged(build, state, tmp_path, monkeypatch, named)
    judged(build, state, tmp_path, monkeypatch, ["0", "1"])


def test_a_named_normalisation_that_the_file_has_is_applied_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 10, 4), nn.Flatten())

    whole = Normalized(build(), MEAN, STD)
    named = [",".join(map(str, values)) for values in (MEAN, STD)]
    for made in (build, lambda: Normalized(build())):
        found = judged(made, whole.state_dict(), tmp_path, monkeypatch, named)
        torch.testing.assert_close(found, whole(IMAGES))


def test_constants_that_the_code_has_set_need_not_be_in_the_file() -> None:
    model, trained = ByBuffers(), ByBuffers()
    state = {n: v for n, v in trained.state_dict().items() if n not in ("mu", "sigma")}
    load_published_state_dict(model, state)
    torch.testing.assert_close(model(IMAGES), trained(IMAGES))


def test_parameters_that_were_to_be_trained_are_missing() -> None:
    state = ByAttributes().state_dict()
    load_published_state_dict(ByParameters(), state)
    with pytest.raises(ValueError, match="missing: mean, std"):
        load_published_state_dict(ByParameters(trained=True), state)


def test_constants_that_nobody_has_set_are_missing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 10, 4), Normalized(nn.Identity(), [0.0] * 3, [1.0] * 3))
    state = {n: v for n, v in model.state_dict().items() if n.startswith("0.")}
    with pytest.raises(ValueError, match=r"missing: 1\.mean, 1\.std"):
        load_published_state_dict(model, state)


@pytest.mark.parametrize("build", OWN)
@pytest.mark.filterwarnings("error")
def test_nothing_is_told_of_constants_that_the_network_applies(build: Any) -> None:
    model = build()
    load_published_state_dict(build(), {"state_dict": model.state_dict()})
    options = {"args": {"data_mean": MEAN, "data_std": STD}}
    load_published_state_dict(build(), {"state_dict": model.state_dict(), **options})


class Noisy(nn.Module):
    """Adds noise with a mean of 0 and a std of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 4)
        self.mean, self.std = torch.zeros(3, 1, 1), torch.full((3, 1, 1), 0.1)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(x) * self.std + self.mean if self.training else 0.0
        return self.conv(x + noise).flatten(1)


def test_noise_of_a_network_is_no_normalisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Noisy().eval()
    named = [",".join(map(str, values)) for values in (MEAN, STD)]
    found = judged(lambda: Noisy().eval(), network.state_dict(), tmp_path, monkeypatch, named)
    torch.testing.assert_close(found, Normalized(network, MEAN, STD)(IMAGES))
