"""Networks with equal state dicts and unequal functions: each by its name, and no file in the wrong one."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_helpers import copied_state, small_data, small_recipe, states_equal

from fastadv.cli import main
from fastadv.models import (
    Normalized,
    Stack,
    copy_weights,
    create_model,
    form_of,
    forms_of,
    load_published_state_dict,
    model_names,
    small_cnn,
    usual_form,
)
from fastadv.trainers import load_model, load_teacher, train

pytestmark = pytest.mark.usefixtures("one_thread")
STRIDE1, RAW, BARE = "resnet18_layer2_stride1", "preact_resnet18_raw_shortcut", "_no_last_norm"
FAMILIES = [["resnet18", STRIDE1], ["preact_resnet18", RAW], ["preact_resnet18" + BARE, RAW + BARE]]
PAIRS = [(a, b) for family in FAMILIES for a, b in (family, family[::-1])]


def made(name: str, seed: int = 0, channels: int = 3) -> Any:
    """A network in evaluation mode whose BatchNorms do something."""
    return copy.deepcopy(_made(name, seed, channels))


@cache
def _made(name: str, seed: int, channels: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = create_model(name, 4, channels)
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_(std=0.2)
            elif key.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model.eval()


def norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    parts = ("running_mean", "running_var", "weight", "bias")
    mean, var, weight, bias = (state[f"{name}.{p}"][:, None, None] for p in parts)
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def plain_resnet18(state: dict[str, Tensor], x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The network as its authors wrote it down, from the names and tensors of its file alone."""
    x = norm(state, "bn1", F.conv2d(x, state["conv1.weight"], padding=1)).relu()
    for stage, first in enumerate(strides, 1):
        for block, stride in ((0, first), (1, 1)):
            at = f"layer{stage}.{block}"
            out = F.conv2d(x, state[f"{at}.conv1.weight"], stride=stride, padding=1)
            out = norm(state, f"{at}.bn1", out).relu()
            out = norm(state, f"{at}.bn2", F.conv2d(out, state[f"{at}.conv2.weight"], padding=1))
            if f"{at}.shortcut.0.weight" in state:
                x = F.conv2d(x, state[f"{at}.shortcut.0.weight"], stride=stride)
                x = norm(state, f"{at}.shortcut.1", x)
            x = (out + x).relu()
    return x.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]


def plain_preact_resnet18(state: dict[str, Tensor], x: Tensor, raw: bool) -> Tensor:
    """Likewise; projections start from the block's input or from what BatchNorm and ReLU make of it."""
    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage, first in enumerate((1, 2, 2, 2), 1):
        for block, stride in ((0, first), (1, 1)):
            at = f"layer{stage}.{block}"
            active = norm(state, f"{at}.bn1", x).relu()
            out = F.conv2d(active, state[f"{at}.conv1.weight"], stride=stride, padding=1)
            out = norm(state, f"{at}.bn2", out).relu()
            out = F.conv2d(out, state[f"{at}.conv2.weight"], padding=1)
            if f"{at}.shortcut.0.weight" in state:
                x = F.conv2d(x if raw else active, state[f"{at}.shortcut.0.weight"], stride=stride)
            x = out + x
    if "bn.weight" in state:
        x = norm(state, "bn", x).relu()
    return x.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]


PLAIN: dict[str, Any] = {
    "resnet18": lambda s, x: plain_resnet18(s, x, (1, 2, 2, 2)),
    STRIDE1: lambda s, x: plain_resnet18(s, x, (1, 1, 2, 2)),
    "preact_resnet18": lambda s, x: plain_preact_resnet18(s, x, raw=False),
    RAW: lambda s, x: plain_preact_resnet18(s, x, raw=True),
    "preact_resnet18" + BARE: lambda s, x: plain_preact_resnet18(s, x, raw=False),
    RAW + BARE: lambda s, x: plain_preact_resnet18(s, x, raw=True),
}


@pytest.mark.parametrize("name", PLAIN)
def test_each_name_is_its_network(name: str) -> None:
    model = made(name).double()
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert name in model_names()
    for other, plain in PLAIN.items():
        if other.endswith(BARE) == name.endswith(BARE) and other in forms_of(model):
            same = torch.allclose(model(x), plain(model.state_dict(), x), rtol=1e-9)
            assert same == (other == name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_forms_of_a_network_are_what_a_file_cannot_tell_apart(family: list[str]) -> None:
    shapes = []
    for name in family:
        with torch.device("meta"):
            model = create_model(name)
        assert list(forms_of(model)) == list(forms_of(Normalized(model))) == family
        assert form_of(model) == name and usual_form(model) == (name == family[0])
        shapes.append({key: value.shape for key, value in model.state_dict().items()})
    assert shapes[0] == shapes[1]


def test_every_two_networks_of_one_state_dict_are_forms_of_each_other() -> None:
    """So that a network which is added later cannot be mistaken for another one."""
    with torch.device("meta"):
        models = {name: create_model(name) for name in model_names()}
    shapes = {n: {k: v.shape for k, v in m.state_dict().items()} for n, m in models.items()}
    for name, model in models.items():
        alike = {other for other in models if shapes[other] == shapes[name]}
        assert alike == (set(forms_of(model)) or {name})


@pytest.mark.parametrize(("name", "other"), PAIRS)
@pytest.mark.parametrize("strict", [True, False])
def test_a_file_is_loaded_when_its_form_is_named(name: str, other: str, strict: bool) -> None:
    theirs, x = made(name, seed=1), torch.rand(2, 3, 16, 16)
    ours = made(name)
    report = load_published_state_dict(ours, {"net": theirs.state_dict()}, strict, form=name)
    assert report.complete
    assert torch.equal(ours(x), theirs(x))
    wrong = made(other)
    before = copied_state(wrong)
    with pytest.raises(
        ValueError, match=f"form must be '{other}', what the model is, got '{name}'"
    ):
        load_published_state_dict(wrong, theirs.state_dict(), strict, form=name)
    assert states_equal(wrong.state_dict(), before)


@pytest.mark.parametrize("strict", [True, False])
def test_a_plain_resnet18_is_taken_for_the_usual_one_with_a_warning(strict: bool) -> None:
    theirs, ours, x = made("resnet18", seed=1), made("resnet18"), torch.rand(2, 3, 16, 16)
    with pytest.warns(UserWarning, match=r"taken as one of resnet18, the usual one.*stride1"):
        load_published_state_dict(ours, theirs.state_dict(), strict)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("family", FAMILIES[1:])
@pytest.mark.parametrize("wrap", [lambda model: model, Normalized])
def test_a_file_of_unknown_form_is_refused(family: list[str], wrap: Any) -> None:
    usual, other = family
    state = made(other).state_dict()
    model = wrap(made(usual))
    before = copied_state(model)
    for strict in (True, False):
        with pytest.raises(ValueError, match="form must be named") as caught:
            load_published_state_dict(model, state, strict)
    assert f"{usual} (" in str(caught.value) and f"{other} (" in str(caught.value)
    assert states_equal(model.state_dict(), before)
    # Who asks for the rarer network by its name has named the form.
    report = load_published_state_dict(wrap(made(other)), state)
    assert report.complete


def test_what_does_not_fit_is_said_first() -> None:
    with pytest.raises(ValueError, match="nothing loaded"):
        load_published_state_dict(made("resnet18"), made("preact_resnet18").state_dict())
    state = small_cnn().state_dict()
    assert load_published_state_dict(small_cnn(), state).complete
    with pytest.raises(ValueError, match="form must be None for a model of one form, got 'x'"):
        load_published_state_dict(small_cnn(), state, form="x")


def test_weights_are_not_copied_into_another_form() -> None:
    with pytest.raises(ValueError, match=f"model must be '{RAW}'.* got 'preact_resnet18'"):
        copy_weights(made("preact_resnet18"), made(RAW))
    target = made(RAW)
    copy_weights(target, made(RAW, seed=1))
    assert states_equal(target.state_dict(), made(RAW, seed=1).state_dict())


def test_layer2_stride_is_checked() -> None:
    with pytest.raises(ValueError, match="layer2_stride must be 1 or 2, got 3"):
        create_model("resnet18", layer2_stride=3)


def saved(path: Path, model: nn.Module) -> Path:
    torch.save({"state_dict": model.state_dict()}, path)
    return path


def train_one_epoch(method: str, folder: Path, **options: Any) -> Any:
    recipe = small_recipe(method, epochs=1, monitor_steps=0, **options.pop("changes", {}))
    common: dict[str, Any] = {"data": small_data(16, 4), "progress": False, "device": "cpu"}
    return train(method, recipe, run_dir=folder, **(common | options))


@pytest.mark.slow
def test_a_teacher_from_a_file_needs_its_form(tmp_path: Path) -> None:
    teacher = made(STRIDE1, channels=1)
    file = saved(tmp_path / "theirs.pt", teacher)
    changes = {"finetune": False, "distance": "logits_mse", "lam": 1.0, "replay": False}
    options: dict[str, Any] = {"model": "resnet18", "teacher": file, "changes": changes}
    with pytest.raises(ValueError, match=r"theirs.pt: form must be named.*resnet18_layer2_stride1"):
        train_one_epoch("arrest", tmp_path / "refused", **options)
    run = tmp_path / "run"
    train_one_epoch("arrest", run, teacher_model=STRIDE1, **options)
    # The run's own copy knows its form, whatever the model that is trained.
    copy = load_teacher(run / "teacher.safetensors", made("resnet18", channels=1))
    assert form_of(copy) == STRIDE1
    assert states_equal(copy.state_dict(), teacher.state_dict())
    del options["teacher"]
    train_one_epoch("arrest", run, resume=True, **options)


@pytest.mark.slow
def test_finetuning_wants_the_form_of_the_teacher(tmp_path: Path) -> None:
    options: dict[str, Any] = {"teacher": saved(tmp_path / "t.pt", made(RAW, channels=1))}
    options["teacher_model"] = [RAW]
    with pytest.raises(ValueError, match=f"model must be '{RAW}'"):
        train_one_epoch("arrest", tmp_path / "a", model="preact_resnet18", **options)
    result = train_one_epoch("arrest", tmp_path / "b", model=RAW, **options)
    assert form_of(load_model(result.run_dir)) == RAW


@pytest.mark.slow
def test_a_run_of_a_module_records_its_form(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_one_epoch("standard", run, model=made(RAW, channels=1))
    with pytest.raises(ValueError, match=f"model must be '{RAW}', got 'preact_resnet18'"):
        load_model(run, made("preact_resnet18", channels=1))
    assert form_of(load_model(run, made(RAW, channels=1))) == RAW
    with pytest.raises(ValueError, match=r"model\.form"):
        train_one_epoch("standard", run, model=made("preact_resnet18", channels=1), resume=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"teacher_model": "resnet"}, "teacher_model: name must be one of"),
        ({"teacher_model": ["small_cnn", "small_cnn"]}, "teacher_model must name teacher"),
        (
            {"teacher_model": "small_cnn"},
            "teacher_model must be None for a module, got 'small_cnn'",
        ),
    ],
)
def test_wrong_names_of_teachers_are_told(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    teacher = made("small_cnn", channels=1)
    with pytest.raises(ValueError, match=words):
        train_one_epoch("hat", tmp_path, model="small_cnn", teacher=teacher, **options)
    with pytest.raises(ValueError, match="teacher_model must be None without frozen models"):
        train_one_epoch("pgd_at", tmp_path, model="small_cnn", teacher_model="small_cnn")


def test_a_run_says_itself_what_its_network_is(tmp_path: Path) -> None:
    run = tmp_path / "standard"
    train_one_epoch("standard", run, model="small_cnn")
    options: dict[str, Any] = {"model": "small_cnn", "teacher": run}
    with pytest.raises(
        ValueError, match="must be the name that the run records, 'small_cnn', got 'resnet18'"
    ):
        train_one_epoch("hat", tmp_path / "a", teacher_model="resnet18", **options)
    train_one_epoch("hat", tmp_path / "b", teacher_model="small-cnn", **options)


def on_the_command_line(method: str, run: Path, *words: str) -> int:
    quick = "--epochs 1 --batch_size 16 --train_images 32 --monitor_images 8 --monitor_steps 1"
    attack = "--steps 1 --pad 1 --device cpu --precision fp32 --attack_precision fp32 --quiet"
    common = ["train", method, "--data", "digits", "--run", str(run)]
    return main([*common, *quick.split(), *attack.split(), *words])


@pytest.mark.slow
def test_the_form_is_named_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = create_model(STRIDE1, 10, 1)
    words = ["--model", "resnet18", "--teacher", str(saved(tmp_path / "t.pt", model))]
    assert on_the_command_line("hat", tmp_path / "run", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "resnet18 (" in line and f"{STRIDE1} (" in line and "--teacher_model" in line
    assert on_the_command_line("hat", tmp_path / "run", *words, "--teacher-model", STRIDE1) == 0


@pytest.mark.slow
def test_one_name_serves_all_extractors_of_a_stack(tmp_path: Path) -> None:
    files = [saved(tmp_path / f"{i}.pt", create_model(RAW, 10, 1)) for i in range(2)]
    words = ["--teacher", *map(str, files), "--teacher_model", RAW]
    assert on_the_command_line("afs", tmp_path / "run", *words) == 0
    stack = load_model(tmp_path / "run")
    assert isinstance(stack, Stack)
    assert [form_of(extractor) for extractor in stack.extractors] == [RAW, RAW]
