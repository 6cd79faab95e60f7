"""Training on the command line in a second, for the tests of what comes after it."""

from __future__ import annotations

from pathlib import Path

from fastadv.cli import main

QUICK = [
    "--epochs",
    "1",
    "--pad",
    "1",
    "--flip",
    "false",
    "--monitor_images",
    "32",
    "--precision",
    "fp32",
    "--device",
    "cpu",
]
ATTACK = [
    "--eps",
    "1/10",
    "--alpha",
    "0.05",
    "--steps",
    "2",
    "--monitor_steps",
    "2",
    "--attack_precision",
    "fp32",
]


def train_quickly(method: str, run: Path, *options: str) -> int:
    attack = [] if method == "standard" else ATTACK
    few = [] if "--train_images" in options else ["--train_images", "256"]
    base = ["train", method, "--data", "digits", "--run", str(run)]
    return main([*base, *QUICK, *few, *attack, *options])
