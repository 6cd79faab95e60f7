"""The options of `fastadv transfer`."""

from __future__ import annotations

from fastadv.cli.parsing import Parser
from fastadv.commands.transfer import run_transfer


def transfer(words: list[str]) -> int:
    """Let models judge each other's adversarial images, and return the exit status."""
    parser = Parser(
        prog="fastadv transfer",
        description="Make adversarial images on each of several models, and measure the accuracy of all the "
        "models on them. This prints one table: a row is the model on which the images were made, a column the "
        "model that classifies them.",
        needs={
            "models": "two or more run directories, files of weights (with --model), or module:function"
        },
    )
    parser.add_argument(
        "models",
        nargs="+",
        help="Two or more models: run directories, files of weights (with --model), or module:function.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options.")
    parser.add_flag("quiet", "Show no progress.")
    parser.add_function_arguments(run_transfer, skip={"models", "quiet"})
    options = vars(parser.parse_args(words))
    options.pop("config")
    print(run_transfer(**options), end="")
    return 0
