"""Random calls of ops, attacks and the engine, checked against plain torch. Not part of the normal suite.

    python tests/fuzz/fuzz.py --minutes 30 --seed 0 [--only ops|attacks|engine|sequences] [--case M]

The parts take turns until the time is over. Each failure is printed with the line that repeats it; the exit status
is 1 if there was one. tests/fuzz/test_fuzz.py runs the first cases of each part.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE), str(_HERE.parent), str(_HERE.parent / "helpers")]

import attack_fuzz  # noqa: E402
import engine_fuzz  # noqa: E402
import op_fuzz  # noqa: E402
import sequence_fuzz  # noqa: E402
import torch  # noqa: E402

PARTS: dict[str, Callable[[random.Random], None]] = {
    "ops": op_fuzz.run,
    "attacks": attack_fuzz.run,
    "engine": engine_fuzz.run,
    "sequences": sequence_fuzz.run,
}
_LONGEST = 300  # seconds that a case may take
_LONGEST_REPORT = 4000  # letters


def run_case(part: str, seed: int, case: int) -> None:
    """One case of a part; raises what is wrong."""
    rng = random.Random(f"{part} {seed} {case}")
    torch.manual_seed(rng.randrange(2**31))
    PARTS[part](rng)


def _line(part: str, seed: int, case: int) -> str:
    return f"python tests/fuzz/fuzz.py --only {part} --seed {seed} --case {case}"


def _report(part: str, seed: int, case: int) -> None:
    told = traceback.format_exc(limit=-4, chain=False)
    print(f"\n=== {_line(part, seed, case)}\n{told[:_LONGEST_REPORT]}", flush=True)


def _work(options: argparse.Namespace, progress: Path) -> int:
    """Run cases until the time is over; the number of failures."""
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * options.minutes
    parts = [options.only] if options.only else list(PARTS)
    done, failures, case = dict.fromkeys(parts, 0), 0, options.case or 0
    while time.monotonic() < end:
        for part in parts:
            progress.write_text(_line(part, options.seed, case))
            faulthandler.dump_traceback_later(_LONGEST, exit=True, file=sys.__stderr__)
            try:
                run_case(part, options.seed, case)
            except Exception:
                failures += 1
                _report(part, options.seed, case)
            done[part] += 1
        if options.case is not None:
            break
        case += 1
    faulthandler.cancel_dump_traceback_later()
    print(f"cases: {done}, failures: {failures}")
    for what, count in engine_fuzz.ENGINES.most_common(40):
        print(f"{count:6} {what}")
    return failures


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--case", type=int, help="run this one case alone")
    parser.add_argument("--progress", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run the cases in a process of their own, so that one which kills the process is named as well."""
    options = _options()
    if options.progress:
        faulthandler.enable()
        return min(1, _work(options, options.progress))
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "case"
        command = [sys.executable, *sys.argv, "--progress", str(progress)]
        status = subprocess.run(command, check=False).returncode
        if status not in (0, 1) or not progress.is_file():
            last = progress.read_text() if progress.is_file() else "the first case"
            print(f"\n=== {last}\nthe process ended with status {status}")
    return min(1, abs(status))


if __name__ == "__main__":
    sys.exit(main())
