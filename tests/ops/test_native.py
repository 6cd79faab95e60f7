"""The compiled part: which file is loaded, and that the package works without one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import fastadv.kernels
import pytest
import torch

from fastadv import info
from fastadv.ops import NATIVE, REGISTRY, native

_found = re.match(r"\d+\.\d+", torch.__version__)
assert _found is not None
MINOR = _found[0]
PACKAGE = Path(info.__file__).parent
KERNELS = Path(fastadv.kernels.__file__).parent

WITHOUT = """
import warnings
import torch

def refuse(path):
    raise OSError("refused by the test")

torch.ops.load_library = refuse
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastadv
messages = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
assert len(messages) == 1 and "slowly" in messages[0] and "refused by the test" in messages[0], messages

from fastadv import info, losses
from fastadv.ops import REGISTRY
assert {op.owner("cpu") for op in REGISTRY.values()} == {"reference"}
assert "not in use: it could not be loaded" in info.render(info.collect())

torch.manual_seed(0)
logits = torch.randn(6, 10, requires_grad=True)
other = torch.randn(6, 10, requires_grad=True)
y = torch.arange(6)
for kept in (True, False):  # the graph, as where two losses share it
    losses.trades(logits, other, y, 6.0).backward(retain_graph=kept)
    found = [t.grad.clone() for t in (logits, other)]
    logits.grad = other.grad = None
    p, q = logits.log_softmax(1), other.log_softmax(1)
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    expected = torch.nn.functional.nll_loss(p, y) + 6 * kl
    for a, b in zip(found, torch.autograd.grad(expected, (logits, other)), strict=True):
        torch.testing.assert_close(a, b)

from fastadv.models import small_cnn
model = small_cnn(num_classes=10, in_channels=1).eval()
x = torch.rand(6, 1, 8, 8)
y = model(x).argmax(1)
for attack in (
    fastadv.PGD(model, eps=0.1, alpha=0.03, steps=3),
    fastadv.PGD(model, eps=0.5, alpha=0.2, steps=3, norm="l2"),
    fastadv.FAB(model, eps=1.0, steps=10),
):
    for _ in range(2):
        moved = attack(x, y) - x
    assert 0 < moved.abs().max()
    assert moved.abs().max() <= attack.eps + 1e-5
print("done")
"""


def test_the_loaded_part_says_what_it_is() -> None:
    facts = NATIVE.build_info()
    assert NATIVE.problem == ""
    assert NATIVE.path is not None
    assert NATIVE.path.name == f"libfastadv_torch{MINOR}.so"
    assert facts["torch"].startswith(f"{MINOR}.")
    assert isinstance(facts["cuda"], bool)
    text = info.render(info.collect())
    assert f"built with {facts['compiler']} against torch {facts['torch']}" in text
    assert facts["simd"] in text


def test_the_level_is_the_widest_of_the_processor() -> None:
    flags = set()
    if Path("/proc/cpuinfo").exists():
        flags = set(Path("/proc/cpuinfo").read_text().split())
    simd = NATIVE.build_info()["simd"]
    avx2 = {"avx2", "bmi1", "bmi2", "fma"} <= flags
    avx512 = avx2 and {f"avx512{part}" for part in ("f", "bw", "cd", "dq", "vl")} <= flags
    avx512 = avx512 and os.environ.get("FASTADV_MAX_CPU_ISA") != "AVX2"
    assert ("AVX-512" in simd) == avx512
    assert ("AVX2" in simd) == (avx2 and not avx512)


def test_none_is_there(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="this installation has none"):
        found = native.load([str(tmp_path)])
    assert found.library is None
    assert found.build_info() == {}


def test_one_for_another_torch(tmp_path: Path) -> None:
    for minor in ("2.1", "9.12"):
        (tmp_path / f"libfastadv_torch{minor}.so").write_bytes(b"")
    with pytest.warns(RuntimeWarning) as caught:
        found = native.load([str(tmp_path)], "2.13.0+cpu")
    assert found.library is None
    assert len(caught) == 1
    assert "against torch 2.1, 9.12, and this is torch 2.13.0+cpu" in str(caught[0].message)


def test_one_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / f"libfastadv_torch{MINOR}.so").write_bytes(b"no library")
    with pytest.warns(RuntimeWarning, match=r"could not be loaded \(.*libfastadv_torch"):
        found = native.load([str(tmp_path)])
    assert found.library is None


def test_the_first_folder_counts(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / f"libfastadv_torch{MINOR}.so").write_bytes(b"no library")
    with pytest.warns(RuntimeWarning, match=re.escape(str(first))):
        native.load([str(tmp_path), str(first), str(second)])


def test_every_op_on_the_cpu_is_compiled() -> None:
    missing = [op.name for op in REGISTRY.values() if op.owner("cpu") != "native"]
    assert missing == []


def test_in_the_checkout_the_installed_part_is_taken(tmp_path: Path) -> None:
    assert NATIVE.path is not None
    checkout, installed = tmp_path / "checkout", tmp_path / "installed" / "fastadv"
    for folder in (checkout, installed):
        folder.mkdir(parents=True)
    (checkout / "fastadv").mkdir()
    for part in PACKAGE.iterdir():
        if part.suffix != ".so" and part.name != "kernels":
            (checkout / "fastadv" / part.name).symlink_to(part)
    (installed / "__init__.py").touch()
    (installed / "kernels").symlink_to(KERNELS, target_is_directory=True)
    (installed / NATIVE.path.name).symlink_to(NATIVE.path)
    program = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if type(f) is type];"  # not editable
        "import fastadv, fastadv.kernels; from fastadv.ops import NATIVE;"
        "print(fastadv.__file__, fastadv.kernels.__file__, NATIVE.path, sep='\\n')"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", program],
        capture_output=True,
        text=True,
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(installed.parent)},
        check=True,
    )
    assert result.stdout.splitlines() == [
        str(checkout / "fastadv" / "__init__.py"),
        str(installed / "kernels" / "__init__.py"),
        str(installed / NATIVE.path.name),
    ]


def test_the_package_works_without_it() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert result.stdout == "done\n", result.stderr
