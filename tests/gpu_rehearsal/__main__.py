"""``python -m gpu_rehearsal SCRIPT ARGUMENTS``: run a script with the pretended GPU."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from gpu_rehearsal.start import start

start()
from gpu_rehearsal import torch_cuda  # noqa: E402  imports torch

del sys.argv[0]
sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    for fault in torch_cuda.faults():
        print(f"GPU rehearsal: {fault}", file=sys.stderr)
