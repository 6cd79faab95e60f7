"""The tests of commands share parsers: what one of them has parsed does not show in the next one."""

from __future__ import annotations

from pathlib import Path

import pytest
from kept_parsers import keep_parsers

import fastadv.cli.train as commands
from fastadv.trainers import find_method

NEEDED = ["--data", "digits", "--teacher", "runs/one"]
GIVEN = [*NEEDED, "--run", "other", "--lr", "0.5", "--quiet", "--schedule", "Cyclic"]
WRONG = (["--lr", "fast"], ["--epochz", "3"], ["--schedule", "Nothing"], ["--schedule.help"])


@pytest.mark.parametrize("method", ["pgd_at", "arrest"])
def test_parsing_leaves_a_parser_as_it_was(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep_parsers(commands)
    build = commands.training_parser.build  # type: ignore[attr-defined]
    used, fresh = (build(find_method(method)) for _ in range(2))
    config = tmp_path / "options.yaml"
    config.write_text("epochs: 7\nflip: false\nrun: from a config\n")
    changed = used.parse_args([*GIVEN, "--config", str(config)])
    assert (changed.lr, changed.epochs, changed.run) == (0.5, 7, "from a config")
    assert type(used.instantiate(changed).schedule).__name__ == "Cyclic"
    for words in WRONG:
        with pytest.raises(SystemExit):
            used.parse_args(words)
    capsys.readouterr()
    assert used.format_help() == fresh.format_help()
    assert used.get_defaults() == fresh.get_defaults()
    plain = [*NEEDED, "--run", "one"]
    assert used.parse_args(plain) == fresh.parse_args(plain) != changed
    for words in WRONG[:3]:
        told = []
        for parser in (used, fresh):
            with pytest.raises(SystemExit):
                parser.parse_args(words)
            told.append(capsys.readouterr().err)
        assert told[0] == told[1]


def test_a_parser_is_built_once_for_each_method_and_its_deciding_settings() -> None:
    keep_parsers(commands)
    one, other = (find_method(name) for name in ("pgd_at", "trades"))
    parsers = [
        commands.training_parser(one),
        commands.training_parser(one, {"epochs": 1}),
        commands.training_parser(one, {"epochs": True}),
        commands.training_parser(one, {"epochs": 1.0}),
        commands.training_parser(other),
    ]
    assert len(set(map(id, parsers))) == len(parsers)
    assert commands.training_parser(one, {}) is parsers[0]
