"""Seeds as pure functions: every random number of a run follows from its seed and its place in the run."""

from __future__ import annotations

import hashlib

import torch

_SEED_BITS = 63  # torch.Generator and int64 schema arguments take non-negative 63-bit integers


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    """Derive the seed of one purpose, epoch, step... from the seed of the run.

    Args:
        seed: the run's seed, any integer.
        purpose: the use of the numbers, e.g. ``"shuffle"``; different purposes are independent.
        counters: where in the run, e.g. epoch and step.

    Returns:
        An integer in [0, 2**63), the same for the same arguments on every machine.
    """
    key = repr((int(seed), purpose, *(int(c) for c in counters))).encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - _SEED_BITS)


def draw_seed() -> int:
    """Draw a seed from torch's default generator, so that ``torch.manual_seed`` governs it."""
    if torch.compiler.is_compiling():
        raise ValueError("seed must be an integer inside torch.compile, got None")
    return int(torch.randint(0, 2**_SEED_BITS - 1, (), dtype=torch.int64, device="cpu"))
