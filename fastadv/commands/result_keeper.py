"""Saving the results of a long evaluation, each at once. Results that cannot be written are printed, not lost."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from fastadv.evaluation import Report, Result, Subject, add_results
from fastadv.evaluation.results import check_destination, results_of, worst_file
from fastadv.files import remove_leftovers
from fastadv.locks import locked


class UnsavedResultsError(OSError):
    """The results of an evaluation could not be written.

    Attributes:
        table: the results as text.
    """

    def __init__(self, message: str, table: str) -> None:
        super().__init__(message)
        self.table = table


class ResultKeeper:
    """Adds an evaluation's results to a file while it runs.

    It is a context manager. If the evaluation ends early, it says where the results so far are, or prints them.

    Args:
        file: the file of results.
        subject: the judged model and its images.
        command: the command line, which is recorded with the results; empty if there is no command.
        render: turns the results so far into text, if they must be printed.

    Attributes:
        file: the file of results.

    Raises:
        ValueError: if the file's name does not end in .json, or if the file exists and holds no results.
    """

    def __init__(
        self,
        file: Path,
        subject: Subject,
        command: str = "",
        render: Callable[[Report], str] = Report.table,
    ) -> None:
        if file.suffix != ".json":
            raise ValueError(f"out must be a file that ends in .json, got {str(file)!r}")
        self.file = file
        self._subject = subject
        self._failure = check_destination(file)
        self._so_far: Report | None = None
        self._command = command
        self._render = render
        self._results: list[Result] = []

    def __enter__(self) -> ResultKeeper:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, UnsavedResultsError) or self._so_far is None:
            return
        if self._failure is None:
            print(f"the results so far are in {self.file}", file=sys.stderr)
        else:
            print(self._render(self._so_far), end="", flush=True)
            print(f"note: {self._complaint()}", file=sys.stderr)

    def warn(self) -> None:
        """Say on standard error, before hours are spent, that nothing can be written."""
        if self._failure is not None:
            print(f"note: {self._complaint()}", file=sys.stderr)

    def add(self, report: Report) -> None:
        """Add the rows that a report has so far. `close` reports a failure, so that the evaluation goes on."""
        self._so_far = report
        try:
            for result in results_of(report, self._subject)[len(self._results) :]:
                self._results.append(self._completed(result))
            add_results(self.file, self._results)
            self._failure = None
        except (OSError, ValueError) as error:
            self._failure = str(error)

    def _completed(self, result: Result) -> Result:
        """Write the worst images of a result, and return the result with their file, the date and the command."""
        name, worst = "", result.row.worst
        if worst is not None:
            name = worst_file(self.file, result)
            try:
                remove_leftovers((self.file.parent / name).parent)
                worst.save(self.file.parent / name)
            except OSError as error:  # the result is kept without its images
                print(f"note: the worst images are not kept: {error}", file=sys.stderr)
                name = ""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return replace(result, command=self._command, date=now, worst_file=name)

    def close(self, table: str) -> None:
        """End the evaluation.

        Args:
            table: the results as text.

        Raises:
            UnsavedResultsError: if the results could not be written.
        """
        if self._failure is not None:
            raise UnsavedResultsError(self._complaint(), table)

    def _complaint(self) -> str:
        return f"{self._failure}; --out FILE.json keeps the results elsewhere"


@contextmanager
def unfinished_work(folder: Path) -> Iterator[Path | None]:
    """Hold the folder in which an evaluation keeps its finished work, and delete it after success.

    Args:
        folder: the folder, which is made by the evaluation if it is not there.

    Yields:
        The folder; None if it cannot be written.

    Raises:
        ValueError: if another process works at the same evaluation.
    """
    if not _can_be_made(folder.parent):
        yield None
        return
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder, wait=0))
        except TimeoutError as error:
            raise ValueError(f"another process is at the same evaluation; {error}") from error
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()  # if nothing is left in it


def _can_be_made(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "state", wait=0):
            return True
    except TimeoutError:
        return True
    except OSError:
        return False
