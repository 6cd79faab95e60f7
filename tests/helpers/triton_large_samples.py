"""Samples that several Triton programs share; run by test_triton.py under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from fastadv.kernels import layout, linear_merger
from op_cases import CASES
from op_cases.budget import check_budget, check_same_bits
from op_cases.case import OpCase
from op_cases.draw import Spec
from op_cases.running import run

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory", "one_thread", "small_parts"),
    pytest.mark.interpreter,
]

PART = 4096  # elements: two steps of a loop
LARGE = 2 * PART + 1809  # three parts, the last of them short
# With the number of samples: one where the interpreter takes many seconds for it, and another case has two.
CHOSEN = (
    ("pgd_step/l2", torch.float32, 2),
    ("pgd_step/l2", torch.float64, 1),
    ("pgd_step/l1", torch.float32, 1),
    ("momentum_update_/same-dtype", torch.float32, 2),
    ("random_start/l2", torch.float32, 2),
    ("random_start/l1", torch.float32, 1),
    ("angular_distance/same-dtype", torch.float32, 2),
    ("replay_mask/same-dtype", torch.float64, 2),
    ("euclidean_distance/norm", torch.float32, 2),
    ("vanilla_feature_distillation/same-dtype", torch.float64, 2),
)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are a quarter of those on a GPU: the interpreter takes its time for each element."""
    monkeypatch.setattr(layout, "_ONE_PROGRAM", PART)
    monkeypatch.setattr(layout, "_PART", PART)


@pytest.mark.parametrize(
    ("case", "dtype", "samples"),
    [pytest.param(CASES[name], dtype, samples, id=name) for name, dtype, samples in CHOSEN],
)
def test_parts_of_a_sample_add_up(case: OpCase, dtype: torch.dtype, samples: int) -> None:
    spec = Spec((samples, LARGE), dtype)
    results = run(case, case.arguments(spec), "triton")
    check_budget(case, case.arguments(spec), results, f"triton, {spec}")
    if dtype in case.bit_equal:
        for result, expected in zip(
            results, run(case, case.arguments(spec), "reference"), strict=True
        ):
            check_same_bits(result, expected, f"{case.name}, {spec}")


def test_attention_maps_of_several_blocks() -> None:
    case = CASES["attention_map_distance/more-channels"]
    spec = Spec((2, 3, 1500))
    results = run(case, case.arguments(spec), "triton")
    check_budget(case, case.arguments(spec), results, f"triton, {spec}")


@pytest.mark.parametrize("shape", [(2, 3, 20, 20), (1, 70, 2, 6)], ids=str)
def test_noise_on_channels_last_images_of_several_blocks(shape: tuple[int, ...]) -> None:
    """Of pixels, or of channels."""
    case = CASES["random_start/linf"]
    arguments = case.arguments(Spec(shape, layout="channels_last"))
    (expected,) = run(case, arguments, "reference")
    check_same_bits(run(case, arguments, "triton")[0], expected, str(shape))


@pytest.mark.parametrize(
    "merger",
    [
        "linear_merger/bias",
        "linear_merger_backward_features/all",
        "linear_merger_backward_weight/plain",
    ],
)
def test_matrices_that_count_their_elements_in_64_bits(
    merger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a matrix has gigabytes. The limit is lowered instead."""
    monkeypatch.setattr(linear_merger, "_INT32", 0)
    case = CASES[merger]
    spec = Spec((70, 20, 30, 40), torch.float64)
    check_budget(case, case.arguments(spec), run(case, case.arguments(spec), "triton"), merger)


def test_64_bit_seeds_and_sample_ids() -> None:
    case = CASES["random_start/linf"]
    arguments = case.arguments(Spec((3, 3, 7, 9)))
    for seed in (2**63 - 1, -(2**63), -1, 1 << 40):
        ids = torch.tensor([-(2**63), 2**63 - 1, (1 << 40) + 5])
        given = {**arguments, "seed": seed, "sample_ids": ids}
        (expected,) = run(case, given, "reference")
        check_same_bits(run(case, given, "triton")[0], expected, f"seed {seed}")
