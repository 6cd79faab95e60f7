"""Running the chosen analyses on one model after another. Each result is saved as soon as it is done."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import nn

from fastadv.commands.judged import JudgedModel
from fastadv.digest import digest_of
from fastadv.evaluation import AnalysisSettings, Measured
from fastadv.evaluation.analyses.analyse import run_analyses
from fastadv.evaluation.analyses.analysis import Analysis
from fastadv.evaluation.analyses.pictures import images_of, picture_of
from fastadv.evaluation.analyses.records import AnalysisRecord
from fastadv.evaluation.context import device_of
from fastadv.evaluation.report import library_versions
from fastadv.evaluation.samples import Samples
from fastadv.files import write_atomically


@dataclass
class Analyser:
    """Runs the chosen analyses on each of several models.

    Attributes:
        chosen: the analyses.
        settings: the settings of all analyses.
        samples: the images; None if no analysis needs them.
        train: the training set; None if no analysis needs it.
        teacher: the standard model; None if no analysis needs it.
        command: the command line.
        anew: whether to compute also the analyses that are there.
        quiet: whether to show no progress.
        missing: why no picture was drawn; empty if nothing prevented it.
        unsaved: why numbers were not written; empty if nothing prevented it.
    """

    chosen: Sequence[Analysis]
    settings: AnalysisSettings
    samples: Samples | None
    train: Samples | None
    teacher: nn.Module | None
    command: str
    anew: bool
    quiet: bool
    missing: str = ""
    unsaved: str = ""

    def __post_init__(self) -> None:
        self._teacher_digest = "" if self.teacher is None else digest_of(self.teacher.state_dict())
        self._images = "" if self.samples is None else self.samples.fingerprint()
        self._train_images = "" if self.train is None else self.train.fingerprint()

    def analyse(self, name: str, judged: JudgedModel, folder: Path) -> list[AnalysisRecord]:
        """Analyse one model. Finished analyses are read, and each new record is saved at once."""
        weights = digest_of(judged.model.state_dict())
        found = []
        for analysis in self.chosen:
            record = self._record(analysis, judged, weights)
            file = record.path(folder)
            if file.is_file() and not self.anew:
                self._say(f"{name}: {analysis.name} is there")
                record = AnalysisRecord.load(file)
            else:
                self._say(f"{name}: {analysis.name}")
                measured = run_analyses(
                    judged.model,
                    [analysis],
                    self.settings,
                    samples=self.samples,
                    train=self.train,
                    teacher=self.teacher,
                    device=None,
                )[analysis.name]
                now = datetime.now(timezone.utc).isoformat(timespec="seconds")
                record = replace(record, measured=measured, date=now)
            try:
                if not file.is_file() or self.anew:
                    record.save(folder)
                self._draw_pictures(name, record, folder)
            except OSError as error:  # the numbers are not lost, as they are printed in the end
                self.unsaved = str(error)
            found.append(record)
        return found

    def _record(self, analysis: Analysis, judged: JudgedModel, weights: str) -> AnalysisRecord:
        """The record of an analysis before it is run."""
        samples, images = None, ""
        if "images" in analysis.needs:
            samples, images = self.samples, self._images
        elif "train" in analysis.needs:
            samples, images = self.train, self._train_images
        subject = judged.subject(weights, "" if samples is None else samples.name, images)
        return AnalysisRecord(
            Measured(analysis.name, (), ()),
            subject,
            0 if samples is None else len(samples),
            {name: _as_json_type(getattr(self.settings, name)) for name in analysis.uses},
            self._teacher_digest if "teacher" in analysis.needs else "",
            library_versions("fastadv", "torch", *analysis.libraries),
            str(device_of(judged.model)),
            self.command,
        )

    def _draw_pictures(self, name: str, record: AnalysisRecord, folder: Path) -> None:
        """Draw the missing pictures of one record. Without matplotlib, note why they are missing."""
        files = {".png": lambda: picture_of({name: record.measured}, title=name)}
        if record.measured.originals is not None:
            files["_images.png"] = lambda: images_of(record.measured) or b""
        for suffix, draw in files.items():
            path = record.path(folder, suffix)
            if path.is_file() and not self.anew:
                continue
            try:
                write_atomically(path, draw())
            except ImportError as error:
                self.missing = str(error)

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(f"analyse: {text}", file=sys.stderr)


def _as_json_type(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
