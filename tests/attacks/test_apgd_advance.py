"""The fused step of Auto-PGD gives the bits of the operations of torch that define it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastadv.attacks.apgd_advance import RowFlags, SlotImages, advance, advance_by_torch
from fastadv.ops import NATIVE

pytestmark = pytest.mark.skipif(NATIVE.library is None, reason="needs the compiled part")
LAST = torch.channels_last


def example(shape: tuple[int, ...], dtype: torch.dtype, grad_dtype: torch.dtype) -> dict[str, Any]:
    """Images, a gradient with zeros and NaN, and rows of which every combination of flags occurs."""
    drawn = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=drawn, dtype=dtype)

    def near() -> Tensor:
        return (x + 0.06 * torch.rand(shape, generator=drawn, dtype=dtype) - 0.03).clamp(0, 1)

    def gradient() -> Tensor:
        found = torch.randn(shape, generator=drawn, dtype=torch.float64)
        found[torch.rand(shape, generator=drawn) < 0.1] = 0
        found[torch.rand(shape, generator=drawn) < 0.02] = torch.nan
        return found.to(grad_dtype)

    number = torch.arange(shape[0])
    flags = [(number >> place & 1).bool() for place in range(4)]
    return {
        "images": SlotImages(x, near(), near(), near(), gradient(), near()),
        "grad": gradient(),
        "rows": RowFlags(*flags),
        "alpha": torch.rand(shape[0], generator=drawn, dtype=dtype) * 0.06,
        "eps": 0.03,
        "norm": "linf",
        "bounds": (0.0, 1.0),
    }


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "mixed"])
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.float32, torch.float16),
    ],
)
def test_it_gives_the_bits_of_torch(
    dtype: torch.dtype, grad_dtype: torch.dtype, layout: str
) -> None:
    given = example((16, 3, 7, 5), dtype, grad_dtype)
    if layout != "contiguous":
        images = given["images"]._asdict()
        for name in images if layout == "channels-last" else ("adv", "best"):
            images[name] = images[name].contiguous(memory_format=LAST)
        given["images"] = SlotImages(**images)
    for rows in (given["rows"], given["rows"]._replace(back=None)):
        given["rows"] = rows
        wanted = advance_by_torch(**given)
        copies = SlotImages(*(one.clone() for one in given["images"]))
        found = advance(**{**given, "images": copies})
        for name, one in wanted._asdict().items():
            torch.testing.assert_close(
                getattr(found, name), one, rtol=0, atol=0, equal_nan=True, msg=name
            )
        assert not torch.equal(found.adv, given["images"].adv)


def test_samples_of_other_shapes_and_the_other_norm() -> None:
    for shape, norm in (((5, 11), "linf"), ((1, 1, 1, 1), "linf"), ((6, 2, 9), "l2")):
        given = example(shape, torch.float32, torch.float32) | {"norm": norm}
        wanted = advance_by_torch(**given)
        found = advance(
            **{**given, "images": SlotImages(*(one.clone() for one in given["images"]))}
        )
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_the_op_refuses_what_it_cannot_take() -> None:
    given = example((4, 2, 3, 3), torch.float32, torch.float32)
    x, adv, before, best, best_grad, kept = given["images"]
    rows = list(given["rows"])

    def call(**change: Any) -> None:
        named = {"adv": adv, "before": before, "grad": given["grad"], "fresh": rows[0], **change}
        torch.ops.fastadv.apgd_advance_(
            named["adv"], named["before"], best, best_grad, kept, named["grad"], x, given["alpha"],
            named["fresh"], *rows[1:], 0.03, 0.0, 1.0, 0.75,
        )  # fmt: skip

    call()
    with pytest.raises(ValueError, match="before must have the layout of adv"):
        call(before=before.contiguous(memory_format=LAST))
    with pytest.raises(ValueError, match="grad must have the shape of adv"):
        call(grad=given["grad"][:3])
    with pytest.raises(TypeError, match="grad"):
        call(grad=given["grad"].bfloat16())
    with pytest.raises(TypeError, match="fresh must be a bool tensor"):
        call(fresh=rows[0].float())
    with pytest.raises(ValueError, match="fresh must have shape"):
        call(fresh=rows[0][:2])
