"""The findings of the checks for gradient masking: the criterion of each check, and the text of its finding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastadv.evaluation.wording import format_eps
from fastadv.fields import check_fields

ROUNDING = 1e-9  # of shares of images, which are compared with each other


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: ``"eps"``, ``"steps"``, ``"unbounded"``, ``"loss"``, ``"black box"``, ``"gradients"`` or
            ``"random"``.
        ok: whether the model behaves like a model with useful gradients.
        message: the finding, in one sentence.
        accuracies: (varied value, accuracy as a fraction) for every run, for a plot or a table. For ``"loss"`` the
            second number is the mean loss.
    """

    check: str
    ok: bool
    message: str
    accuracies: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def verdict(self) -> str:
        """``"ok"``, or ``"suspect"`` where the robust accuracy under gradient attacks may be too high."""
        return "ok" if self.ok else "suspect"


def verdict_of(findings: Sequence[Finding]) -> str:
    """The summary of all findings, in words."""
    failed = sum(not finding.ok for finding in findings)
    if failed == 0:
        return "no sign, which proves nothing"
    return f"{failed} of {len(findings)} checks are suspect: the robust accuracy may be too high"


def findings_text(findings: Sequence[Finding], n: int, eps: float, norm: str) -> str:
    """All findings in words, one line each below a heading.

    Args:
        findings: the result of `sanity_checks`.
        n: number of images.
        eps: radius of the ball.
        norm: norm of the ball.
    """
    width = max((len(finding.check) for finding in findings), default=0)
    lines = [
        f"  {finding.verdict:<7}  {finding.check:<{width}}  {finding.message}"
        for finding in findings
    ]
    heading = (
        f"Signs of gradient masking, {n} images, {format_eps(eps)} {norm}: {verdict_of(findings)}"
    )
    return "\n".join([heading, *lines]) + "\n"


def monotone(check: str, accuracies: Sequence[tuple[float, float]], slack: float) -> Finding:
    """Check that accuracy does not rise: each value is compared with the lowest before it, to find a slow rise."""
    worst, where = _largest_rise(accuracies)
    ok = worst <= slack + ROUNDING
    if where is None:
        message = f"robust accuracy does not rise with {check}"
    else:
        (from_value, from_accuracy), (to_value, to_accuracy) = where
        message = (
            f"robust accuracy rises with {check}: {100 * from_accuracy:.2f} % at {from_value:.4g}, "
            f"{100 * to_accuracy:.2f} % at {to_value:.4g}" + (", within the slack" if ok else "")
        )
    return Finding(check, ok, message, tuple(accuracies))


def unbounded(eps: float, accuracy: float, slack: float) -> Finding:
    """Check that almost no image withstands an attack that may choose any image."""
    ok = accuracy <= slack + ROUNDING
    message = f"{100 * accuracy:.2f} % are still right when any image is allowed (eps {eps:.4g})"
    return Finding("unbounded", ok, message, ((eps, accuracy),))


def rising_loss(losses: Sequence[tuple[float, float]], slack: float) -> Finding:
    """Check that the mean loss does not fall. Each is compared with the highest before it."""
    fall, where = _largest_rise([(eps, -loss) for eps, loss in losses])
    ok = fall <= slack * max(*(loss for _, loss in losses), 1e-12)
    if where is None:
        message = "the loss that PGD reaches does not fall as eps grows"
    else:
        (from_eps, from_loss), (to_eps, to_loss) = ((eps, -negative) for eps, negative in where)
        message = (
            f"the loss that PGD reaches falls as eps grows: {from_loss:.4g} at {from_eps:.4g}, {to_loss:.4g} at "
            f"{to_eps:.4g}" + (", within the slack" if ok else "")
        )
    return Finding("loss", ok, message, tuple(losses))


def _largest_rise(
    points: Sequence[tuple[float, float]],
) -> tuple[float, tuple[tuple[float, float], tuple[float, float]] | None]:
    """The largest rise of the second numbers above the lowest before, and its two points."""
    rise, where = 0.0, None
    lowest = points[0]
    for point in points[1:]:
        if point[1] - lowest[1] > rise:
            rise, where = point[1] - lowest[1], (lowest, point)
        lowest = min(lowest, point, key=lambda p: p[1])
    return rise, where
