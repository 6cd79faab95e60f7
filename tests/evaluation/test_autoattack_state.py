"""AutoAttack's state on disk: a stopped run goes on, and no other run's state is taken."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from linear_model import linear_problem
from short_autoattack import shorten

from fastadv.evaluation import autoattack, evaluate
from fastadv.evaluation.autoattack_state import AutoAttackState

pytest.importorskip("pyautoattack")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
EPS = 0.02
FAST = ("apgd-ce", "apgd-t")


@pytest.mark.parametrize("engine", ["auto", "fp32", "reference"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, engine, monkeypatch):
    # Passes have more rows than a batch, as those of small images have, and fewer than all images.
    monkeypatch.setattr("fastadv.evaluation.autoattack_run._MOST_ROWS", 8)
    n = {"reference": 16, "fp32": 24, "auto": 40}[engine]  # a pool takes longer for a batch
    model, x, y = linear_problem(classes=4, n=n, wrong=2)
    settings = {"eps": EPS, "version": FAST, "batch_size": 4, "engine": engine}
    counts = []
    with _counted(model, counts):
        whole = autoattack(model, (x, y), state_dir=tmp_path / "whole", **settings)
    stopped = tmp_path / "stopped"
    finished = []
    for part in (1 / 3, 1 / 3):
        # A copy hardly asks the model itself, so that its runs are stopped where they keep something.
        stop = (
            _stopped_at_record(monkeypatch, 5)
            if engine == "auto"
            else _stopped_after(model, int(part * len(counts)))
        )
        with pytest.raises(KeyboardInterrupt), stop:
            autoattack(model, (x, y), state_dir=stopped, **settings)
        finished.append(len(list(stopped.glob("*.pt"))))
    assert 0 < finished[0] < finished[1]

    counts.clear()
    with _counted(model, counts):
        resumed = autoattack(model, (x, y), state_dir=stopped, **settings)
        needed = len(counts)
        again = autoattack(model, (x, y), state_dir=stopped, **settings)
    for result in (resumed, again):
        assert torch.equal(result.robust, whole.robust)
        assert torch.equal(result.fooled, whole.fooled)
        if engine == "reference":  # of several images that break one, an engine may find another
            assert torch.equal(result.adversarial, whole.adversarial)
        assert (model(result.adversarial).argmax(1) != y[result.fooled]).all()
        assert (result.stages, result.status, result.notes) == (
            whole.stages,
            whole.status,
            whole.notes,
        )
    # The engine's proof of a new model takes some passes.
    assert len(counts) - needed < 40, "a finished run must attack nothing again"
    assert not list(stopped.glob("*.tmp"))


def test_evaluate_resumes_too(tmp_path, monkeypatch):
    shorten(monkeypatch)
    model, x, y = linear_problem(classes=4, n=10)
    arguments = {"eps": EPS, "progress": False, "state_dir": tmp_path}
    first = evaluate(model, (x, y), "autoattack", **arguments)["autoattack"]
    counts = []
    with _counted(model, counts):
        second = evaluate(model, (x, y), "autoattack", **arguments)["autoattack"]
    assert second.correct == first.correct and second.stages == first.stages
    assert len(counts) < 40  # the proof of the engine, and the clean images


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("weights", "other model"),
        ("buffer", "other model"),
        ("images", "other data"),
        ("labels", "other data"),
        ("eps", r"eps was 0\.02 and is 0\.03"),
        ("seed", "seed was 0 and is 1"),
        ("batch_size", "batch_size was 256 and is 5"),
        ("version", "attacks was"),
    ],
)
def test_the_state_of_another_run_is_refused(tmp_path, change, message):
    model, x, y = linear_problem(classes=4, n=6)
    model.register_buffer("scale", torch.ones(1), persistent=False)
    settings = {"eps": EPS, "version": ("apgd-ce",), "seed": 0, "batch_size": 256}
    autoattack(model, (x, y), state_dir=tmp_path, **settings)
    with torch.no_grad():
        if change == "weights":
            model.linear.weight[0, 0] += 1e-3
        elif change == "buffer":
            model.scale += 1
        elif change == "images":
            x = x.clone()
            x[5, 0, 0, 0] = 0.5
        elif change == "labels":
            y = y.clone()
            y[5] = (y[5] + 1) % 4
        else:
            settings[change] = {"eps": 0.03, "seed": 1, "batch_size": 5, "version": FAST}[change]
    before = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        autoattack(model, (x, y), state_dir=tmp_path, **settings)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir()) == before


def test_a_damaged_or_foreign_state_is_refused(tmp_path):
    model, x, y = linear_problem(classes=4, n=6)
    settings = {"eps": EPS, "version": ("apgd-ce",), "state_dir": tmp_path}
    autoattack(model, (x, y), **settings)
    (batch,) = tmp_path.glob("*.pt")
    whole = batch.read_bytes()
    indices = torch.load(batch)["indices"].numpy().tobytes()
    place = whole.index(indices)  # one other bit in the numbers of the images
    batch.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(
        ValueError, match=r"apgd-ce-00000\.pt cannot be read .*is damaged.* delete it"
    ):
        autoattack(model, (x, y), **settings)
    batch.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"apgd-ce-00000\.pt cannot be read .* delete it"):
        autoattack(model, (x, y), **settings)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 0}))
    with pytest.raises(ValueError, match="has format 0"):
        autoattack(model, (x, y), **settings)
    manifest.unlink()
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        autoattack(model, (x, y), **settings)
    with pytest.raises(TypeError, match="state_dir needs a torch module"):
        autoattack(lambda images: model(images), (x, y), **settings)


@contextlib.contextmanager
def _counted(model, counts):
    handle = model.register_forward_hook(lambda *_: counts.append(1))
    yield
    handle.remove()


@contextlib.contextmanager
def _stopped_at_record(monkeypatch, count):
    """Interrupt a run when it is about to keep so many records."""
    save, made = AutoAttackState.save, []

    def save_or_stop(self, *arguments):
        made.append(arguments)
        if len(made) == count:
            raise KeyboardInterrupt
        save(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(AutoAttackState, "save", save_or_stop)
        yield


@contextlib.contextmanager
def _stopped_after(model, calls):
    left = [calls]

    def stop(*_):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    handle = model.register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()
