"""The checkpoint that a sweep judges."""

from __future__ import annotations

from fastadv.sweeps.plan import Plan, SweepRun
from fastadv.trainers.checkpoint import find_checkpoint


def judged_checkpoint(plan: Plan, run: SweepRun) -> str:
    """The name of the checkpoint that `fastadv eval` judges with the plan's options."""
    # The parser imports the commands, which import the sweeps.
    from fastadv.cli.evaluate import evaluation_options

    which = evaluation_options(["RUN", *plan.evaluation])["checkpoint"]
    return find_checkpoint(run.folder, which).name
