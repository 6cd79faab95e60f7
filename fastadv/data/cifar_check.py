"""Inspecting all files of CIFAR, for a list of everything that is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastadv.data.cifar import files_of, find_folder, read_file
from fastadv.data.cifar_content import check_content
from fastadv.data.cifar_layout import CifarLayout, Records, concatenate
from fastadv.data.errors import DataFormatError


@dataclass(frozen=True)
class FileState:
    """The findings on one file.

    Attributes:
        name: the file's name.
        size: its number of bytes; None where it is missing.
        problem: the problem with it; empty where there is no problem.
    """

    name: str
    size: int | None
    problem: str = ""


@dataclass(frozen=True)
class SourceState:
    """The findings on a data set.

    Attributes:
        folder: the folder of its files; None without files.
        files: the findings on each file.
        problems: problems of the data set as a whole: missing files, or content that is not genuine.
    """

    folder: Path | None
    files: tuple[FileState, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def is_good(self) -> bool:
        """Whether the data set can be used."""
        return not self.problems and not any(file.problem for file in self.files)


def inspect_cifar(layout: CifarLayout, root: Path) -> SourceState:
    """Look at all files of a data set.

    Sizes, counts and ranges of labels are checked for each file. The content of a split is checked where all its
    files are good, as `read_cifar` does it.

    Args:
        layout: which data set.
        root: the unpacked folder or its parent.
    """
    try:
        folder, is_binary = find_folder(layout, root.expanduser())
    except FileNotFoundError as error:
        return SourceState(None, problems=(str(error),))
    files: list[FileState] = []
    problems: list[str] = []
    for split, title in ((layout.train, "train"), (layout.test, "test")):
        parts: list[Records] = []
        for name in files_of(split, is_binary):
            path, problem = folder / name, ""
            try:
                parts.append(read_file(path, layout, split, is_binary, verify=True))
            except (DataFormatError, OSError) as error:
                problem = str(error)
            files.append(FileState(name, path.stat().st_size if path.is_file() else None, problem))
        if len(parts) == len(files_of(split, is_binary)):
            try:
                check_content(concatenate(parts), layout, split, title, folder)
            except DataFormatError as error:
                problems.append(str(error))
    return SourceState(folder, tuple(files), tuple(problems))
