"""Training by two processes: like one, in step with each other, and unharmed by the death of one."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from paths import environment
from processes import ran, spawn, warm_python
from run_helpers import assert_same_end
from torch import Tensor, nn
from training_helpers import make_model, small_data, small_recipe, states_equal

from fastadv.attacks import PGD
from fastadv.losses import cross_entropy
from fastadv.models.small_cnn import SmallCNN, small_cnn
from fastadv.ranks import Ranks
from fastadv.trainers import (
    Attacked,
    LossResult,
    NonFiniteLossError,
    Settings,
    Standard,
    TrainBatch,
    distributed,
    train,
)
from fastadv.trainers.distributed import Synchroniser, with_synced_norms
from fastadv.trainers.logs import read_records

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
METHODS = ["standard", "pgd_at", "trades", "arrest", "act", "s2o", "las_at", "grad_align"]
PROCESSES, STEPS = 2, 8
UNUSUAL = (torch.int16, torch.bool, torch.complex64, torch.bfloat16, torch.float8_e5m2)
COLLECTIVES = ("all_reduce", "broadcast", "all_gather", "reduce", "gather", "scatter", "barrier")
SETTINGS = Settings(checkpoint_every=3, log_every=1, keep=3)
OTHER_SETTINGS = Settings(checkpoint_every=5, log_every=2, keep=3)  # checkpoints between records


def run(method: Any, folder: Path, **options: Any) -> Any:
    """Train on the small data."""
    name = method if isinstance(method, str) else "standard"
    if name == "arrest":
        options.setdefault("teacher", make_model(1))
    changes = {"ema_decay": 0.8, "batch_size": 16} | options.pop("changes", {})
    arguments: dict[str, Any] = {
        "data": small_data(),
        "model": "small_cnn",
        "run_dir": folder,
        "settings": SETTINGS,
        "progress": False,
        "device": "cpu",
    }
    return train(method, small_recipe(name, **changes), **(arguments | options))


class WideCNN(SmallCNN):
    """A network in float64: in float32 a rounding can turn the sign of a gradient, and so move a pixel."""

    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(x.double())


def wide_model(seed: int) -> nn.Module:
    model = WideCNN(4, 1).double()
    model.load_state_dict(make_model(seed, torch.float64).state_dict())
    return model


def run_wide(method: str, folder: Path) -> Any:
    """Train in float64, with BatchNorm over the global batch."""
    teacher = wide_model(1) if method == "arrest" else None
    return run(method, folder, model=wide_model(0), teacher=teacher, changes={"sync_bn": True})


class Failing(Standard):
    """Standard training whose loss, but not its gradient, is infinite on one rank at some steps."""

    def training_loss(self, batch: TrainBatch, adv: Attacked) -> LossResult:
        loss = cross_entropy(self.model(adv.x), batch.y)
        bad = dist.get_rank() == 1 and (batch.epoch, batch.step) in {(0, 1), (1, 0), (1, 1)}
        return LossResult(loss + (torch.inf if bad else 0))


@contextlib.contextmanager
def counted_collectives() -> Iterator[Counter[str]]:
    """Count the collectives inside attacks, inside backward passes, and elsewhere."""
    counts: Counter[str] = Counter()
    inside = ["elsewhere"]

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[inside[-1]] += 1
            return function(*args, **kwargs)

        return call

    def marking(function: Callable[..., Any], place: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[f"calls of {place}"] += 1
            inside.append(place)
            try:
                return function(*args, **kwargs)
            finally:
                inside.pop()

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(dist, name, counting(getattr(dist, name)))
        patch.setattr(PGD, "__call__", marking(PGD.__call__, "attack"))
        patch.setattr(Tensor, "backward", marking(Tensor.backward, "backward"))
        yield counts


def written_by_this_process(folder: Path) -> list[str]:
    """A list that grows with whatever this process writes in a folder from now on."""
    found: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        changes = ("os.mkdir", "os.rename", "os.remove", "os.symlink", "os.rmdir", "os.truncate")
        writes = (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if (event in changes or writes) and str(folder) in " ".join(map(str, args)):
            found.append(f"{event} {args}")

    sys.addaudithook(hook)
    return found


def normed(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What a BatchNorm gives and learns: output, gradients, statistics."""
    out = model(x)
    out.square().mul(
        torch.arange(out[0].numel(), dtype=x.dtype).view(out[0].shape)
    ).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def normed_twice(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients of a BatchNorm's squared input gradient, in which it is differentiated twice."""
    out = model(x)
    loss = out.pow(3).mul(torch.arange(out[0].numel(), dtype=x.dtype).view(out[0].shape)).sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    gradient.square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def norm_input() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 4, 2, generator=generator, dtype=torch.float64) * 2 + 100


class Partial(nn.Module):
    """Parameters for all ranks, for one rank, and for nobody."""

    def __init__(self) -> None:
        super().__init__()
        values = [torch.arange(1.0, n + 1, dtype=torch.float64) for n in (4, 3, 2)]
        self.all, self.one, self.none = (nn.Parameter(v) for v in values)

    def loss(self, rank: int) -> Tensor:
        loss = (self.all**2).sum() * (rank + 1)
        return loss + (self.one**3).sum() if rank == 1 else loss


def process(rank: int, folder: str) -> None:
    """All that two processes are needed for, in one start of them; results go to files."""
    torch.set_num_threads(1)
    here = Path(folder)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES
    )
    distributed._BUCKET_BYTES = 100_000  # so that the small network has several
    found: dict[str, Any] = {"written": written_by_this_process(here / "runs")}
    for method in METHODS:
        result = run_wide(method, here / "runs" / method)
        found[method] = result.model.state_dict(), result.progress.best_score
    output = io.StringIO()
    with (
        counted_collectives() as counts,
        contextlib.redirect_stderr(output),
        contextlib.redirect_stdout(output),
    ):
        live = make_model(rank)  # of which that of rank 0 is taken
        options = {"model": live, "progress": True, "settings": OTHER_SETTINGS}
        result = run("arrest", here / "runs" / "plain", **options)
        found["plain"] = {**live.state_dict(), **result.model.state_dict()}
    found["counts"], found["output"] = counts, output.getvalue()
    failed = make_model(0)
    with pytest.raises(NonFiniteLossError) as caught:
        run(Failing, here / "runs" / "failing", model=failed, changes={"max_bad_steps": 2})
    found["failing"], found["error"] = failed.state_dict(), str(caught.value)
    found["wrote"] = list(found.pop("written"))

    ranks = Ranks(rank, PROCESSES)
    ranks.wait()
    sent = [torch.tensor([rank, rank + 1], dtype=dtype) for dtype in UNUSUAL]
    ranks.broadcast(sent)
    found["sent"] = sent, [ranks.gather(torch.tensor([[rank]], dtype=dtype)) for dtype in UNUSUAL]
    norm = with_synced_norms(nn.BatchNorm2d(3).double(), ranks)
    found["norm"] = normed(norm, norm_input().chunk(2)[rank].clone().requires_grad_())
    norm = with_synced_norms(nn.BatchNorm2d(3).double(), ranks)
    found["twice"] = normed_twice(norm, norm_input().chunk(2)[rank].clone().requires_grad_())
    partial = Partial()
    loss = Synchroniser([partial], ranks).backward(partial.loss(rank))
    found["partial"] = [loss, *(p.grad for p in partial.parameters())]
    torch.save(found, here / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Where two processes ran, and what each found."""
    folder = tmp_path_factory.mktemp("together")
    spawn(process, (str(folder),), PROCESSES)
    return folder / "runs", [torch.load(folder / f"{r}.pt", weights_only=False) for r in (0, 1)]


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in read_records(folder / "metrics.jsonl") if r["kind"] == "step"]


@pytest.mark.processes
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_have_the_loss_curve_of_one(
    method: str, together: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    runs, found = together
    run_wide(method, tmp_path)
    alone = losses(tmp_path)
    assert len(alone) == STEPS and alone[-1] != pytest.approx(alone[0], rel=0.01)
    assert losses(runs / method) == pytest.approx(alone, rel=2e-6)  # with the six digits of the log
    states, scores = zip(*(one[method] for one in found), strict=True)
    assert states_equal(*states) and scores[0] == scores[1]
    records = [read_records(folder / "metrics.jsonl")[-1] for folder in (tmp_path, runs / method)]
    for name in ("clean_accuracy", "robust_accuracy", "grad_norm", "train_adv_accuracy"):
        if name in records[0]:
            assert records[1][name] == pytest.approx(records[0][name], rel=2e-6), name


@pytest.mark.processes
def test_tensors_of_any_dtype_are_sent(together: tuple[Path, list[dict[str, Any]]]) -> None:
    for found in together[1]:
        for dtype, one, both in zip(UNUSUAL, *found["sent"], strict=True):
            assert one.dtype == both.dtype == dtype
            assert one.float().tolist() == [0, 1] and both.float().tolist() == [[0], [1]]


@pytest.mark.processes
def test_ranks_agree_though_each_normalises_its_own_part(
    together: tuple[Path, list[dict[str, Any]]],
) -> None:
    assert states_equal(together[1][0]["plain"], together[1][1]["plain"])


@pytest.mark.processes
def test_no_collective_runs_in_an_attack_and_gradients_are_sent_during_the_backward_pass(
    together: tuple[Path, list[dict[str, Any]]],
) -> None:
    for one in together[1]:
        counts = one["counts"]
        assert counts["calls of attack"] >= 4 and counts["elsewhere"] > STEPS
        assert counts["attack"] == 0
        parameters = list(small_cnn(4, 1).parameters())[::-1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed, "_BUCKET_BYTES", 100_000)
            buckets = len(distributed._in_buckets(parameters))
        assert buckets > 1 and counts["backward"] == STEPS * buckets


@pytest.mark.processes
def test_the_first_rank_alone_writes_and_speaks(
    together: tuple[Path, list[dict[str, Any]]],
) -> None:
    _, (first, second) = together
    assert "on cpu x 2" in first["output"] and "epoch 2/2" in first["output"]
    assert second["output"] == ""
    assert any("metrics.jsonl" in line for line in first["wrote"])
    assert second["wrote"] == []


@pytest.mark.processes
def test_what_is_not_finite_on_one_rank_is_not_taken_by_any(
    together: tuple[Path, list[dict[str, Any]]],
) -> None:
    runs, found = together
    assert states_equal(found[0]["failing"], found[1]["failing"])
    assert found[0]["error"] == found[1]["error"] and "2 iterations in a row" in found[0]["error"]
    (file,) = (runs / "failing").glob("nonfinite_step_*.pt")
    saved = torch.load(file, weights_only=True)
    assert saved["x"].shape == (16, 1, 8, 8) and saved["ids"].unique().numel() == 16
    assert saved["step"] == 1 and saved["epoch"] == 1


@pytest.mark.processes
def test_synced_batch_norm_is_batch_norm_of_the_whole(
    together: tuple[Path, list[dict[str, Any]]],
) -> None:
    whole = normed(nn.BatchNorm2d(3).double(), norm_input().requires_grad_())
    parts = list(zip(*(one["norm"] for one in together[1]), strict=True))
    for wanted, found in zip(whole[:2], parts[:2], strict=True):
        torch.testing.assert_close(torch.cat(found), wanted)
    for wanted, found in zip(whole[2:4], parts[2:4], strict=True):
        torch.testing.assert_close(found[0] + found[1], wanted)
    for wanted, found in zip(whole[4:], parts[4:], strict=True):
        for one in found:
            torch.testing.assert_close(one, wanted)


@pytest.mark.processes
def test_synced_batch_norm_is_differentiated_twice(
    together: tuple[Path, list[dict[str, Any]]],
) -> None:
    whole = normed_twice(nn.BatchNorm2d(3).double(), norm_input().requires_grad_())
    parts = list(zip(*(one["twice"] for one in together[1]), strict=True))
    torch.testing.assert_close(torch.cat(parts[0]), whole[0])
    for wanted, found in zip(whole[1:], parts[1:], strict=True):
        torch.testing.assert_close(found[0] + found[1], wanted)


@pytest.mark.processes
def test_gradients_are_means_over_the_ranks_also_where_one_has_none(
    together: tuple[Path, list[dict[str, Any]]],
) -> None:
    model = Partial()
    loss = (model.loss(0) + model.loss(1)) / 2
    loss.backward()
    for one in together[1]:
        mean, of_all, of_one, of_none = one["partial"]
        torch.testing.assert_close(mean, loss.detach())
        torch.testing.assert_close(of_all, model.all.grad)
        torch.testing.assert_close(of_one, model.one.grad)
        assert of_none is None


CHILD = """
import os, signal, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from test_distributed import OTHER_SETTINGS, run
from training_helpers import make_model

def die(progress):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and os.environ["RANK"] == "1" and progress.step == 7:
        os.kill(os.getpid(), signal.SIGKILL)

run("arrest", sys.argv[1], model=make_model(0), settings=OTHER_SETTINGS, on_step=die)
"""


@pytest.mark.processes
def test_a_run_goes_on_after_a_worker_was_killed(
    together: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    folder = tmp_path / "cut"
    launcher = ["-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", "2", "--max-restarts", "1"]
    here = str(Path(__file__).parent)
    words = [*launcher, str(script), str(folder), here]
    with warm_python() as python:
        variables = environment(OMP_NUM_THREADS="1", PYTHON_EXEC=python)
        done = ran(words, env=variables)
    assert done.returncode == 0, done.stderr
    assert f"{-signal.SIGKILL}" in done.stderr
    assert_same_end(folder, together[0] / "plain")
    logs = [read_records(path / "metrics.jsonl") for path in (folder, together[0] / "plain")]
    untimed = [
        [{k: v for k, v in r.items() if "seconds" not in k and "per_second" not in k} for r in log]
        for log in logs
    ]
    assert untimed[0] == untimed[1]


def test_a_restart_goes_on_with_a_run_of_the_same_job_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def under_torchrun(job: str, attempt: int) -> None:
        names = {"RUN_ID": job, "RESTART_COUNT": str(attempt)}
        for name, value in names.items():
            monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
        monkeypatch.setenv("WORLD_SIZE", "1")
        monkeypatch.setenv("RANK", "0")

    under_torchrun("one", 0)
    run("standard", tmp_path, changes={"epochs": 1})
    with pytest.raises(FileExistsError):
        run("standard", tmp_path, changes={"epochs": 1})
    under_torchrun("another", 1)  # whose first attempt failed before it began
    with pytest.raises(FileExistsError):
        run("standard", tmp_path, changes={"epochs": 1})
    under_torchrun("one", 1)
    again = run("standard", tmp_path, changes={"epochs": 1}, overwrite=True)
    assert again.progress.step == STEPS // 2 and again.record == {}
