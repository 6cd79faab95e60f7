"""Saved images of attacks under torchattacks' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attack_helpers import digits_test, trained_small_cnn
from compat_helpers import short
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastadv
from fastadv import compat

pytestmark = pytest.mark.usefixtures("one_thread")


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
