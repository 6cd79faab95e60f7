"""Whether everything runs on this GPU, and the first headline: the first stage of gpu.sh, in about 90 seconds.

    python bench/gpu_smoke.py --out OUT
    python bench/gpu_smoke.py --device cpu --batch 8 --out OUT     a rehearsal on a machine without a GPU

Checks, in this order: this build has native kernels for the device; every op on every backend once against its
definition in float64, in both layouts; PGD-10 on ResNet-18, captured as a graph, is equal to the bit to PGD-10
without a graph; an ARREST step; the trainer's collectives and a DistributedDataParallel step of adversarial
training, with NCCL on a GPU. A failed check does not stop the next one. The last line is PASS or FAIL, and the
exit status says the same.

Before the last check PGD-10 in images per second is measured: fastadv, torchattacks, eager bfloat16 autocast in
channels-last, and the best torch.compile arrangement. A network of GPUs that does not answer would hold up the
last check for as long as it lasts. OUT gets smoke.json, which is written again after each part.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from arrangements import ALPHA, ATTACKS, EPS, Task, arrest_method, trainer_step, without_graphs
from measure import (
    first_line,
    image_shape,
    interleave,
    machine,
    machine_line,
    text_table,
    write_json,
)
from throughput import OURS, RESULTS, build_all, make_task
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

from op_cases import CASES
from op_cases.budget import check_budget
from op_cases.draw import Spec
from op_cases.running import backends_of, run

import fastadv
from fastadv.ops import REGISTRY
from fastadv.ranks import Ranks
from fastadv.trainers.distributed import Synchroniser

# Both layouts and both widths, each op twice on each backend.
SPECS = ((torch.float32, "contiguous"), (torch.bfloat16, "channels_last"))
HEADLINE = (
    OURS,
    "torchattacks PGD",
    "B2 bf16 autocast",
    "B3 torch.compile of B2, frozen",
    "B4 torch.compile, folded, bf16",
)
_SHOWN = 10  # failures of one check


class Failed(Exception):
    """A check found what must not be."""


def check_build(device: torch.device) -> str:
    """Every op has a kernel for this device, so that plain torch, the reference, serves for no op."""
    owners = {op.name: op.owner(device.type) for op in REGISTRY.values()}
    slow = [name for name, owner in owners.items() if owner == "reference"]
    if slow:
        raise Failed(f"no kernel for {device.type} of: {', '.join(slow)}")
    kinds = list(owners.values())
    counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    return f"{len(kinds)} ops, dispatched to {counted}"


def check_ops(device: torch.device, seconds: float) -> str:
    """Every op on every backend, native kernels first; Triton's compiler may run out of time."""
    begun, calls, failures, left_out = time.perf_counter(), 0, [], 0
    for backend in ("native", "triton", "reference"):
        for case in CASES.values():
            if backend not in backends_of(case.registered, device.type):
                continue
            for dtype, layout in SPECS:
                if dtype not in case.dtypes:
                    continue
                if backend == "triton" and time.perf_counter() - begun > seconds:
                    left_out += 1
                    continue
                spec = Spec(case.shapes[0], dtype, layout, device=device.type)
                try:
                    arguments = case.arguments(spec)
                    check_budget(case, arguments, run(case, arguments, backend), backend)
                except Exception as error:
                    failures.append(f"{case.name} {spec} {backend}: {first_line(error)}")
                calls += 1
    if failures:
        raise Failed(f"{len(failures)} of {calls} calls: " + "; ".join(failures[:_SHOWN]))
    rest = f"; {left_out} Triton calls left out after {seconds:.0f} s" if left_out else ""
    return f"{calls} calls of {len(CASES)} ways to call {len(REGISTRY)} ops{rest}"


def check_graph(task: Task) -> str:
    """A replayed attack and the same attack step by step, to the bit."""
    model = task.twin()
    attack = fastadv.PGD(model, EPS, ALPHA, task.steps, engine="fixed")
    for _ in range(3):  # a GPU records the second call
        found = attack(task.x, task.y, seed=1)
    engine = attack.last.engine
    if task.device.type == "cuda" and engine != "graph":
        raise Failed(f"the attack ran on the engine {engine!r}: {attack.last.reason}")
    plain = fastadv.PGD(model, EPS, ALPHA, task.steps, engine="fixed")
    without_graphs(plain, task.x)
    expected = plain(task.x, task.y, seed=1)
    if not torch.equal(found, expected):
        share = (found != expected).float().mean().item()
        raise Failed(f"{share:.2%} of the values differ from the attack without a graph")
    return f"engine {engine}, equal to the bit"


def check_arrest(task: Task) -> str:
    """One step of the trainer's own method moves the weights, and keeps them finite."""
    from fastadv.trainers.arrest import ArrestRecipe

    method = arrest_method(task, ArrestRecipe(steps=task.steps, phi=90.0))
    before = [p.detach().clone() for p in method.model.parameters()]
    trainer_step(method, task, 0.01)()
    after = list(method.model.parameters())
    if not all(bool(p.isfinite().all()) for p in after):
        raise Failed("the weights are not finite after the step")
    moved = sum(not torch.equal(p, old) for p, old in zip(after, before, strict=True))
    if moved < len(before):
        raise Failed(f"only {moved} of {len(before)} parameters moved")
    return f"all {moved} parameters moved"


def check_parallel(task: Task) -> str:
    """The trainer's collectives, and one step of adversarial training through DistributedDataParallel."""
    on_gpu = task.device.type == "cuda"
    with process_group("nccl" if on_gpu else "gloo"):
        check_collectives(task)
        model = task.twin()
        if on_gpu:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        parallel = nn.parallel.DistributedDataParallel(model)
        adv = fastadv.pgd_fused(parallel.eval(), task.x, task.y, steps=task.steps, seed=0)
        optimizer = torch.optim.SGD(parallel.parameters(), 0.01)
        loss = F.cross_entropy(parallel.train()(adv), task.y)
        loss.backward()
        optimizer.step()
        if not all(bool(p.isfinite().all()) for p in parallel.parameters()):
            raise Failed("the weights are not finite after the step")
        return f"{dist.get_backend()}, loss {loss.item():.3f}"


def check_collectives(task: Task) -> None:
    """What the trainers send, by a group of one process that takes itself for one of two.

    So the sums are the sums of this process alone, and means are half of them.
    """
    ranks = Ranks(0, 2, task.device)
    ranks.wait()
    found = ranks.means([3.0]), ranks.largest([1, 2])
    if found != ([1.5], [1, 2]):
        raise Failed(f"a mean and the largest numbers are {found}")
    sent = [torch.tensor([1, 0], device=task.device, dtype=t) for t in (torch.bool, torch.int16)]
    kept = [t.clone() for t in sent]
    ranks.broadcast(sent)
    if not all(torch.equal(*pair) for pair in zip(sent, kept, strict=True)):
        raise Failed("a broadcast of the first rank has changed its tensors")
    gradients: list[list[Any]] = []
    for together in (True, False):
        model = task.twin()
        loss = F.cross_entropy(model(task.x), task.y)
        if together:  # which sends in the hooks of the backward pass
            Synchroniser([model], ranks).backward(loss)
        else:
            loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for mean, own in zip(*gradients, strict=True):
        if not bool((2 * mean - own).norm() <= 1e-2 * own.norm()):
            raise Failed("the mean gradient of the ranks is not half of this rank's")


@contextmanager
def process_group(backend: str) -> Iterator[None]:
    """A group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(os.path.join(folder, "store"), 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def headline(task: Task, rounds: int, quick: bool, seconds: float) -> dict[str, Any]:
    """Images per second of the strongest arrangements, interleaved; they may be prepared for so many seconds."""
    builders = {name: ATTACKS[name] for name in HEADLINE}
    runs, _, missing = build_all(builders, task, quick, seconds)
    times = interleave(runs, rounds, task.device)
    rates = {name: len(task.x) / s.median for name, s in times.items()}
    rows = [
        [name, f"{rate:.0f}", "" if name == OURS else f"{rates[OURS] / rate:.2f}x"]
        for name, rate in rates.items()
    ]
    print(f"PGD-{task.steps}")
    print(text_table(["", "images/s", "fastadv is"], rows), flush=True)
    for name, why in missing.items():
        print(f"{name}: {why}")
    return {
        "images_per_second": rates,
        "missing": missing,
        "seconds": {name: s.to_dict() for name, s in times.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--model", default="resnet18", help="a name fastadv.models knows")
    parser.add_argument("--image", type=image_shape, default=(3, 32, 32), help="CxHxW, 3x32x32")
    parser.add_argument("--batch", type=int, default=128, help="images per batch")
    parser.add_argument("--steps", type=int, default=10, help="attack steps, K")
    parser.add_argument("--rounds", type=int, default=10, help="of the headline")
    parser.add_argument(
        "--triton-seconds", type=float, default=30.0, help="for the check of the ops with Triton"
    )
    parser.add_argument(
        "--compile-seconds", type=float, default=60.0, help="for the arrangements that compile"
    )
    parser.add_argument("--quick", action="store_true", help="a headline without torch.compile")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of smoke.json")
    args = parser.parse_args()
    device = torch.device(args.device)
    facts = machine(device)
    print(machine_line(facts), flush=True)
    task = make_task(args.model, args.batch, args.steps, device, args.image)
    content: dict[str, Any] = {"machine": facts, "command": " ".join(sys.argv), "checks": {}}
    path = args.out / "smoke.json"

    def passes(name: str, check: Callable[[], str]) -> bool:
        begun = time.perf_counter()
        try:
            told, passed = check(), True
        except Exception as error:
            told, passed = f"{type(error).__name__}: {first_line(error)}", False
        seconds = time.perf_counter() - begun
        content["checks"][name] = {"passed": passed, "told": told, "seconds": seconds}
        print(f"{'ok' if passed else 'FAILED':<7}{name:<9}{seconds:5.1f} s  {told}", flush=True)
        write_json(path, content)
        return passed

    found = [
        passes("build", lambda: check_build(device)),
        passes("ops", lambda: check_ops(device, args.triton_seconds)),
        passes("graph", lambda: check_graph(task)),
        passes("arrest", lambda: check_arrest(task)),
    ]
    try:
        content["headline"] = headline(task, args.rounds, args.quick, args.compile_seconds)
    except Exception as error:
        found.append(False)
        print(f"FAILED headline: {type(error).__name__}: {first_line(error)}", flush=True)
    write_json(path, content)
    found.append(passes("parallel", lambda: check_parallel(task)))
    print("PASS" if all(found) else "FAIL", flush=True)
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
