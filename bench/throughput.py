"""The headline benchmark: images per second of a PGD-10 attack and of an ARREST training step.

    python bench/throughput.py                 ResNet-18, 3x32x32, batch 64; under 5 minutes on 2 cores
    python bench/throughput.py --quick         under a minute: fewer rounds, nothing that compiles
    python bench/throughput.py --model wrn_28_10 --batch 16 --only attack
    python bench/throughput.py --model small_cnn --image 1x8x8 --batch 128 --only attack
    python bench/throughput.py --precision fp32                the attack in float32, everybody's and ours

For a processor without bfloat16, or with AVX2 alone, run the last one as
    FASTADV_MAX_CPU_ISA=AVX512 ONEDNN_MAX_CPU_ISA=AVX512_CORE python bench/throughput.py --precision fp32
    FASTADV_MAX_CPU_ISA=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 \
        python bench/throughput.py --precision fp32

Every arrangement runs in this process, interleaved round by round (see `measure.py`). GFLOP/s count
2 F per attack step and 3 F per training pass, F one forward pass: an arrangement that spends 3 F on a step
gets no credit for the third. An ARREST step is counted as (2K + 3) F though its two feature passes cost 2 F more.
The first call of fastadv on a GPU is two, since the second is recorded.
With `--seconds` arrangements that are still being compiled after 70 % of a table's time are left out, and there
are as many rounds as the rest allows.
Results go to bench/results: a JSON, and a picture beside it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from arrangements import ATTACKS, COMPILED, GPU_ATTACKS, GPU_STEPS, STEPS, Run, Task
from attack_parts import parts_of_attack
from float32_arrangements import FLOAT32_ATTACKS, FLOAT32_COMPILED
from measure import (
    PeakMemory,
    at_most,
    first_line,
    image_shape,
    interleave,
    machine,
    machine_line,
    synchronize,
    text_table,
    write_json,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastadv.engine.precision import isa_limit
from fastadv.models import create_model

OURS = "fastadv"
RESULTS = Path(__file__).parent / "results"
_PREPARING = 0.7  # of the time of a comparison, until which arrangements may be compiled


def make_task(
    model_name: str,
    batch: int,
    steps: int,
    device: torch.device,
    image: tuple[int, int, int] = (3, 32, 32),
) -> Task:
    """A random net with running statistics as a trained one has, and random images [C, H, W]."""
    torch.manual_seed(0)
    model = create_model(model_name, 10, image[0])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    x, y = torch.rand(batch, *image), torch.randint(0, 10, (batch,))
    return Task(model.eval().to(device), x.to(device), y.to(device), steps)


def forward_flops(task: Task) -> int:
    """F of the whole batch."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        task.model(task.x)
    return counter.get_total_flops()


def say(text: str) -> None:
    """The progress: one changing line on a terminal, a line each elsewhere."""
    terminal = sys.stderr.isatty()
    sys.stderr.write(f"\r\033[K{text}\r" if terminal else f"{text}\n")
    sys.stderr.flush()


def build_all(
    builders: Mapping[str, Callable[[Task], Run]],
    task: Task,
    quick: bool,
    seconds: float | None = None,
) -> tuple[dict[str, Run], dict[str, Any], dict[str, str]]:
    """Build and warm up: the runs, their facts (first call, peak memory), and why others are missing.

    Those that compile come last. They are left out if they are not ready after ``seconds``, None is any time.
    """
    runs: dict[str, Run] = {}
    facts: dict[str, Any] = {}
    missing: dict[str, str] = {}
    begun = time.perf_counter()
    for name in sorted(builders, key=_compiles):
        build, compiles = builders[name], _compiles(name)
        if quick and compiles:
            missing[name] = "left out by --quick"
            continue
        left = None
        if seconds is not None and compiles:
            left = seconds - (time.perf_counter() - begun)
            if left <= 0:
                missing[name] = f"left out after {seconds:.0f} s"
                continue
        say(f"preparing {name}")
        peak = PeakMemory(task.device)
        # A loop that neither compiles nor keeps memory is warm after one step, on a twin of its own.
        lasting = compiles or name.startswith(OURS)
        start = time.perf_counter()
        try:
            with nullcontext() if left is None else at_most(left), peak:
                runs[name] = build(task)
                first = runs[name] if lasting else build(replace(task, steps=1))
                first()
                if lasting and task.device.type == "cuda":
                    first()  # on a GPU the second attack of a batch size is recorded
                synchronize(task.device)
        except ImportError as error:
            missing[name] = f"not installed ({error})"
            continue
        except Exception as error:  # the compiler may fail where it has not been tried
            if name == OURS:
                raise
            runs.pop(name, None)
            missing[name] = f"failed ({first_line(error)})"
            continue
        spent = time.perf_counter() - start
        if compiles:  # the compiler's own memory is not the arrangement's
            peak = PeakMemory(task.device)
            with peak:
                runs[name]()
                synchronize(task.device)
        facts[name] = {"first_call_seconds": spent if lasting else None, "peak_bytes": peak.bytes}
    return {name: runs[name] for name in builders if name in runs}, facts, missing


def _compiles(name: str) -> bool:
    return name in COMPILED or name in FLOAT32_COMPILED


def compare(
    title: str,
    builders: Mapping[str, Callable[[Task], Run]],
    task: Task,
    flops: float,
    args: Any,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Run one comparison, in about ``seconds`` if they are given; returns its part of the JSON."""
    end = float("inf") if seconds is None else time.perf_counter() + seconds
    preparing = None if seconds is None else _PREPARING * seconds
    runs, facts, missing = build_all(builders, task, args.quick, preparing)
    left = end - time.perf_counter()
    times = interleave(runs, args.rounds, task.device, say, patience=5.0, seconds=left)
    images = len(task.x)
    rows = {
        name: {
            **facts[name],
            "seconds": seconds.to_dict(),
            "images_per_second": images / seconds.median,
            "gflops_per_second": flops / seconds.median / 1e9,
            "speedup_of_fastadv": seconds.median / times[OURS].median,
        }
        for name, seconds in times.items()
    }
    return {"title": title, "flops": flops, "rows": rows, "missing": missing}


def show(part: dict[str, Any]) -> str:
    """One comparison as a table."""
    header = [
        "",
        "images/s",
        "seconds",
        "(min to max)",
        "GFLOP/s",
        "peak MB",
        "first call s",
        "fastadv is",
    ]
    rows = []
    for name, row in part["rows"].items():
        s, peak = row["seconds"], row["peak_bytes"]
        rows.append(
            [
                name,
                f"{row['images_per_second']:.1f}",
                f"{s['median']:.3f}",
                f"{s['smallest']:.3f} to {s['largest']:.3f}",
                f"{row['gflops_per_second']:.0f}",
                "?" if peak is None else f"{peak / 1e6:.0f}",
                "" if row["first_call_seconds"] is None else f"{row['first_call_seconds']:.1f}",
                "" if name == OURS else f"{row['speedup_of_fastadv']:.2f}x",
            ]
        )
    lines = [part["title"], text_table(header, rows)]
    return "\n".join([*lines, *(f"{name}: {why}" for name, why in part["missing"].items())])


def draw(parts: list[dict[str, Any]], caption: str, path: Path) -> None:
    """Bars of images per second, one panel per comparison."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.42 * sum(len(p["rows"]) + 2 for p in parts)))
    FigureCanvasAgg(figure)
    heights = [len(part["rows"]) for part in parts]
    panels = figure.subplots(len(parts), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, part in zip(panels, parts, strict=True):
        names = list(part["rows"])[::-1]
        values = [part["rows"][name]["images_per_second"] for name in names]
        colours = ["#1f6f8b" if name.startswith(OURS) else "#b8c4c8" for name in names]
        bars = panel.barh(names, values, color=colours)
        panel.bar_label(bars, [f"{value:.1f}" for value in values], padding=4)
        panel.set_title(part["title"], loc="left", fontsize=11)
        panel.set_xlim(0, max(values) * 1.12)
        panel.spines[["top", "right"]].set_visible(False)
    where, what = caption.split("; ", 1)
    panels[-1].set_xlabel(f"images per second\n{where}\n{what}", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def parse_arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="resnet18", help="a name fastadv.models knows")
    parser.add_argument("--batch", type=int, default=64, help="images per batch")
    parser.add_argument("--image", type=image_shape, default=(3, 32, 32), help="CxHxW, 3x32x32")
    parser.add_argument("--steps", type=int, default=10, help="attack steps, K")
    rounds = (
        "counted rounds (3; quick: 1; on a GPU tenfold); a loop of over 5 s gets two at the most"
    )
    parser.add_argument("--rounds", type=int, default=None, help=rounds)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--precision", choices=("bf16", "fp32"), default="bf16", help="fp32: the attack in float32"
    )
    parser.add_argument("--only", choices=("attack", "training"), help="one of the two tables")
    parser.add_argument("--quick", action="store_true", help="under a minute on 2 cores")
    parser.add_argument("--seconds", type=float, help="for all of it, about; no limit by default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    if args.precision == "fp32":
        if args.only == "training":
            parser.error("--precision fp32 compares attacks; leave out --only training")
        args.only = "attack"
    if args.quick:
        args.steps = min(args.steps, 3)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    args.device = torch.device(auto if args.device == "auto" else args.device)
    usual = (1 if args.quick else 3) * (10 if args.device.type == "cuda" else 1)
    args.rounds = args.rounds or usual
    return args


def main() -> None:
    args = parse_arguments()
    device = args.device
    task = make_task(args.model, args.batch, args.steps, device, args.image)
    flops, k = forward_flops(task), args.steps
    image = "x".join(str(n) for n in args.image)
    shape = f"{args.model}, {image}, batch {args.batch}"
    facts = machine(device)
    print(f"{machine_line(facts)}\n")
    kind = args.model if args.image == (3, 32, 32) else f"{args.model}_{image}"
    kind += "_fp32" if args.precision == "fp32" else ""
    limit = f"_{isa_limit()}".lower() if isa_limit() else ""
    stem = f"throughput_{device.type}{limit}_{kind}_b{args.batch}{'_quick' if args.quick else ''}"
    parts: list[dict[str, Any]] = []
    content = {
        "machine": facts,
        "command": " ".join(sys.argv),
        "rounds": args.rounds,
        "comparisons": parts,
        "breakdown_of": "",
        "breakdown": {},
    }

    def add(part: dict[str, Any]) -> None:
        """Keep and show a comparison, at once, as the next may be interrupted."""
        parts.append(part)
        print(show(part), end="\n\n", flush=True)
        write_json(args.out / f"{stem}.json", content)

    attacks, steps = ATTACKS, STEPS
    if device.type == "cuda":
        attacks, steps = {**ATTACKS, **GPU_ATTACKS}, {**STEPS, **GPU_STEPS}
    if args.precision == "fp32":
        attacks = FLOAT32_ATTACKS
    each = args.seconds and args.seconds / (1 if args.only else 2)
    if args.only != "training":
        add(compare(f"PGD-{k} attack, {shape}", attacks, task, 2 * k * flops, args, each))
    if args.only != "attack":
        title = f"ARREST training step, K = {k}, {shape}"
        add(compare(title, steps, task, (2 * k + 3) * flops, args, each))
    if device.type == "cpu":
        content["breakdown_of"], times = parts_of_attack(task, 5, args.precision)
        content["breakdown"] = {name: seconds.to_dict() for name, seconds in times.items()}
        write_json(args.out / f"{stem}.json", content)
        print(f"where an attack's time goes ({content['breakdown_of']}):")
    for name, seconds in content["breakdown"].items():
        print(f"{name:<42} {seconds['median'] * 1e3:8.2f} ms")
    draw(parts, machine_line(facts), args.out / f"{stem}.png")
    print(f"\nwritten: {args.out / stem}.json and .png")


if __name__ == "__main__":
    main()
