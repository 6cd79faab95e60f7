"""The first things typed: what is missing or mistyped is said, flags are flags, and no option is dropped."""

from __future__ import annotations

import os
import pty
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from processes import Started
from run_helpers import fingerprint
from training_helpers import small_recipe

from fastadv.cli import main
from fastadv.cli.program import open_closed_streams
from fastadv.commands import Flags
from fastadv.ops.values import check_choice, did_you_mean
from fastadv.trainers import Settings, method_names, train

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = ["--data", "digits", "--run", "r"]
QUICK = [
    "--epochs",
    "1",
    "--train_images",
    "64",
    "--batch_size",
    "32",
    "--monitor_images",
    "16",
    "--pad",
    "1",
    "--quiet",
]


def fails(words: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The single line with which a command fails."""
    try:
        status = main(words)
    except SystemExit as exit_:
        status = int(str(exit_.code))
    out, err = capfd.readouterr()
    assert status == 2 and out == "", out
    (line,) = err.splitlines()
    return str(line)


def prints(words: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    try:
        status = main(words)
    except SystemExit as exit_:
        status = int(str(exit_.code))
    out, err = capfd.readouterr()
    assert status == 0 and err == "", err
    return str(out)


@pytest.mark.parametrize("method", method_names())
def test_a_method_alone_says_what_it_needs(method: str, capfd: pytest.CaptureFixture[str]) -> None:
    line = fails(["train", method], capfd)
    wants = method in ("arrest", "hat", "vfd", "kd_at", "afs")
    assert f"needs {'--data, --run and --teacher' if wants else '--data and --run'}" in line
    assert "digits, cifar10, cifar100" in line and "a directory" in line
    assert ("--teacher" in line) == wants


def test_what_is_given_is_not_missing(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "needs --run and --teacher;" in fails(["train", "arrest", "--data", "digits"], capfd)
    (tmp_path / "r.yaml").write_text("run: r\n")
    line = fails(["train", "arrest", "--config", str(tmp_path / "r.yaml")], capfd)
    assert "needs --data and --teacher;" in line
    assert "run must be given, or model" in fails(["eval"], capfd)
    assert "needs RUNS" in fails(["report"], capfd)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["trian", "arrest"], "'train'"),
        (["reprot", "r"], "'report'"),
        (["pgd-at", *RUN], "'train pgd-at'"),
        (["train", "arest", *RUN], "'arrest'"),
        (["train", "pgd_at", *RUN, "--epoch", "3"], "'--epochs'"),
        (["train", "pgd_at", *RUN, "--learning-rate", "3", "--momentun=1"], None),
        (["train", "pgd_at", *RUN, "--batchsize=3"], "'--batch_size'"),
        (["train", "pgd_at", *RUN, "--Quiet"], "'--quiet'"),
        (["eval", "r", "--atacks", "clean"], "'--attacks'"),
        (["report", "r", "--ouput", "x"], None),
        (["info", "--op"], "'--ops'"),
        (["demo", "--outt", "x"], "'--out'"),
        (["train", "arrest", *RUN, "--distance", "angulr"], "'angular'"),
        (["train", "pgd_at", *RUN, "--precision", "BF16"], "'bf16'"),
        (["train", "act", *RUN, "--preset", "offcial"], "'official'"),
        (["train", "pgd_at", *RUN, "--model", "resnet81"], "'resnet18'"),
        (["train", "pgd_at", "--data", "cifar-10", "--run", "r"], "'cifar10'"),
        (["train", "pgd_at", *RUN, "--schedule", "Cosin"], "'Cosine'"),
        (["train", "pgd_at", *RUN, "--schedule", "multistep"], "'MultiStep'"),
        (["train", "pgd_at", *RUN, "--schedule", "Cosine", "--schedule.flor", "0"], "'floor'"),
        (["train", "pgd_at", *RUN, "--schedule.help", "Cosin"], "'Cosine'"),
        (["train", "pgd_at", *RUN, "--epsilon", "8/255"], "'--eps'"),
        (["train", "pgd_at", *RUN, "--step_size", "2/255"], "'--alpha'"),
        (["train", "pgd_at", *RUN, "--amp"], "'--precision'"),
        (["eval", "r", "--max_images", "10"], "'--max_examples'"),
    ],
)
def test_a_mistyped_word_gets_a_suggestion(
    words: list[str],
    meant: str | None,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = fails(words, capfd)
    assert meant is None or f"did you mean {meant}?" in line
    assert not {"zip(", "typing.", "<class"} & set(line.split("'")) and "typing." not in line
    assert list(tmp_path.iterdir()) == []


def test_the_choices_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    line = fails(["train", "arrest", *RUN, "--distance", "x"], capfd)
    assert (
        "\"distance\" must be one of angular, mse, attention, logits_mse, logits_kl, got 'x'"
        in line
    )
    line = fails(["train", "pgd_at", *RUN, "--schedule", "x"], capfd)
    schedules = (
        "Constant, Cosine, Cyclic, EpochCosine, EpochOneCycle, Interpolated, MultiStep, OneCycle"
    )
    assert f"{schedules}, Piecewise, Step, got 'x'" in line
    text = prints(["train", "pgd_at", "--schedule.help"], capfd)
    assert "Half a cosine from the recipe's rate down to a floor" in text
    assert "  Piecewise      A constant factor" in text
    assert "--schedule.floor" in prints(["train", "pgd_at", "--schedule.help", "Cosine"], capfd)
    for value, kind in (
        (["--epochs", "1.5"], "a whole number"),
        (["--patience", "soon"], "a whole number"),
        (["--clip_grad_norm", "x"], "a number or a fraction such as 8/255"),
        (["--flip", "maybe"], "true or false"),
        (["--schedule.milestones", "3"], "a list such as [75,90]"),
    ):
        assert f"must be {kind}, got '{value[1]}'" in fails(
            ["train", "pgd_at", *RUN, *value], capfd
        )


@pytest.mark.parametrize(
    ("words", "flip", "nesterov"),
    [
        ([], True, False),
        (["--flip", "--nesterov"], True, True),
        (["--flip", "false"], False, False),
        (["--flip=False", "--nesterov", "TRUE"], False, True),
        (["--flip", "no", "--nesterov=on"], False, True),
        (["--no-such", "--flip"], None, None),
    ],
)
def test_flags_stand_alone_or_with_a_value(
    words: list[str],
    flip: bool | None,
    nesterov: bool | None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command = ["train", "pgd_at", *RUN, *words, "--print_config"]
    if flip is None:
        assert "--no_such" in fails(command, capfd)
        return
    config = yaml.safe_load(prints(command, capfd))
    assert (config["flip"], config["nesterov"]) == (flip, nesterov)


def test_text_in_a_config_never_turns_a_flag_around(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("flip: 'false'\nnesterov: 'yes'\nquiet: 'no'\n")
    command = ["train", "pgd_at", *RUN, "--config", str(file), "--print_config"]
    config = yaml.safe_load(prints(command, capfd))
    assert (config["flip"], config["nesterov"], config["quiet"]) == (False, True, False)
    file.write_text("flip: 2\n")
    assert "must be true or false" in fails(command, capfd)
    for make in (lambda: Flags(overwrite="false"), lambda: Settings(tensorboard="false")):
        with pytest.raises(TypeError, match="must be True or False, got 'false'"):
            make()  # type: ignore[no-untyped-call]
    with pytest.raises(TypeError, match="overwrite must be True or False"):
        train("standard", data="digits", model="small_cnn", run_dir=tmp_path, overwrite="no")  # type: ignore[arg-type]


def test_switches_take_a_value_too(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = ["train", "standard", "--data", "digits", "--run", str(tmp_path / "r"), *QUICK]
    assert main([*run, "--resume", "false"]) == 0
    assert main([*run, "--overwrite", "--resume=no"]) == 0
    before = fingerprint(tmp_path / "r")
    assert main([*run, "--overwrite", "false"]) == 2
    assert fingerprint(tmp_path / "r") == before
    # A flag before the name of a run takes it for no value.
    words = [
        "eval",
        "--worst_case",
        str(tmp_path / "r"),
        "--attacks",
        "fgsm",
        "--max_examples",
        "9",
    ]
    assert main([*words, "--quiet"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pgd_at", "--root", "x"], "root must be left out with digits"),
        (["pgd_at", "--teacher", "x"], "takes no frozen model"),
        (["pgd_at", "--allow_changes"], "allow_changes must come with resume"),
        (["pgd_at", "--from_checkpoint", "step_000004"], "there is no run in"),
        (["pgd_at", "--extra_fraction", "0.5"], "extra_fraction must be 0"),
        (["pgd_at", "--awp_warmup", "3"], "awp_warmup has no effect with awp_gamma 0"),
        (["pgd_at", "--pad", "0", "--pad_mode", "reflect"], "pad_mode has no effect with pad 0"),
        (["free", "--random_start"], "random_start must be false with free"),
        (["arrest", "--temperature", "2"], "temperature has no effect without distance logits_kl"),
        (["arrest", "--distill", "false", "--lam", "2"], "lam has no effect with distill false"),
        (["arrest", "--replay", "no", "--phi", "45"], "phi has no effect with replay false"),
        (["vfd", "--reach", "3"], "reach has no effect with another base than hat"),
    ],
)
def test_an_option_that_would_be_dropped_is_refused(
    words: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails(["train", *words, *RUN], capfd).replace("takes only", "takes no")


def test_numbers_as_a_preset_has_them_are_no_choice(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["train", "arrest", *RUN, "--temperature", "4", "--awp_warmup", "0"]
    assert "needs --teacher;" in fails(words, capfd)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("words", [["info"], ["train", "pgd_at", "--help"]])
def test_a_reader_that_has_seen_enough_is_no_error(words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    process = Started(["-m", "fastadv", *words], stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and err == ""


@pytest.mark.slow
@pytest.mark.processes
def test_nothing_is_coloured(tmp_path: Path) -> None:
    run = ["train", "standard", "--data", "digits", "--run", str(tmp_path / "r"), *QUICK[:-1]]
    for words in (["train", "pgd_at", "--help"], run):
        master, slave = pty.openpty()
        environment = os.environ | {"NO_COLOR": "1", "TERM": "xterm-256color"}
        process = Started(["-m", "fastadv", *words], environment, stdout=slave, merged=True)
        os.close(slave)
        text = b""
        try:
            while part := os.read(master, 4096):
                text += part
        except OSError:  # so Linux says that the other end is closed
            pass
        process.wait()
        os.close(master)
        assert text and b"\x1b[" not in text


def test_suggestions() -> None:
    assert did_you_mean("Resnet-18", ["resnet18", "resnet_18"]) == "; did you mean 'resnet_18'?"
    assert did_you_mean("zebra", ["resnet18"]) == ""
    check_choice("norm", "l2", ["linf", "l2"])
    with pytest.raises(
        ValueError, match=r"norm must be one of linf, l2, got 'L2'; did you mean 'l2'\?"
    ):
        check_choice("norm", "L2", ["linf", "l2"])


def test_what_people_type_and_there_is_not(capfd: pytest.CaptureFixture[str]) -> None:
    assert "the run stands alone, fastadv eval RUN" in fails(["eval", "--run", "r"], capfd)
    assert "--schedule.milestones" in fails(["train", "mart", *RUN, "--milestones", "7"], capfd)
    assert "--attacks pgd-20" in fails(["eval", "r", "--steps", "20"], capfd)
    assert "or null, got 'none'" in fails(["train", "pgd_at", *RUN, "--ema_decay", "none"], capfd)


@pytest.mark.parametrize("content", ["", "- 1\n", "text\n"])
def test_a_config_that_holds_no_options(
    content: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(content)
    words = ["train", "standard", *RUN, f"--config={config}"]
    assert 'option "config" must be a file of options' in fails(words, capfd)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("eps: .1\nsteps: 3\neps: .2\n", "eps"),
        ("schedule:\n  class_path: MultiStep\n  init_args: {gamma: .1, gamma: .2}\n", "gamma"),
    ],
)
def test_a_config_that_says_a_thing_twice(
    content: str, name: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(content)
    for words in (["--config", str(config)], [f"--config={config}"]):
        line = fails(["train", "pgd_at", *RUN, *words], capfd)
        assert f'option "config" must have each name once, got {name!r} twice' in line


def test_paths_begin_in_the_home_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell leaves the ~ of `--run=~/run` as it is, and so does a config."""
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    words = ["train", "standard", "--data", "digits", *QUICK]
    assert main([*words, "--run=~/first"]) == 0
    config = tmp_path / "config.yaml"
    config.write_text("run: ~/second\n")
    assert main([*words, f"--config={config}"]) == 0
    train(
        "standard",
        small_recipe("standard"),
        data="digits",
        model="small_cnn",
        run_dir="~/third",
        progress=False,
    )
    assert sorted(path.name for path in home.iterdir()) == ["first", "second", "third"]
    assert list(here.iterdir()) == []


def test_a_run_has_a_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as --run "$RUN" where the variable is not set: the working folder is not meant."""
    monkeypatch.chdir(tmp_path)
    words = ["train", "standard", "--data", "digits", "--run", "", *QUICK]
    assert "run_dir must be the path of a directory, got ''" in fails(words, capfd)
    assert list(tmp_path.iterdir()) == []


def test_a_current_folder_that_is_gone_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert main(["report", "run"]) == 2
    assert "the current folder has been deleted" in capfd.readouterr().err


def test_output_that_cannot_be_written_is_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for words in (["--version"], ["report", "--help"]):
        code: object = None
        # Closing the file writes the text once more.
        with suppress(OSError), open("/dev/full", "w") as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            with pytest.raises(SystemExit) as stop:
                main(words)
            code = stop.value.code
        assert code == 2
        assert "the standard output cannot be written: No space left" in capfd.readouterr().err


def test_a_closed_standard_error_is_not_the_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        assert main(["no_such_command"]) == 2
    assert capsys.readouterr().out == ""
    child = os.fork()
    if child == 0:  # files that are opened after the streams get other numbers than theirs
        os.close(1)
        os.close(2)
        open_closed_streams()
        os._exit(0 if os.open(tmp_path, os.O_RDONLY) > 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
