"""The options of `fastadv reproduce`."""

from __future__ import annotations

from fastadv.cli.parsing import FAILED, Parser
from fastadv.commands.reproduction import list_items, run_reproduction
from fastadv.interruption import stopped_by_signals


def reproduce(words: list[str]) -> int:
    """Reproduce a table or a figure of a paper, and return the exit status."""
    parser = Parser(
        prog="fastadv reproduce",
        description="Reproduce a table or a figure of the papers of ARREST, VFD-Adv, AFS and ACT: train what is "
        "missing, measure it, and write the table as the paper lays it out, beside the paper's own figures, with "
        "a picture. After an interruption the same command goes on where it was.",
        needs={
            "item": "a table or a figure such as arrest/table2; --list shows all",
            "out": "a folder for the trained models, the tables and the pictures",
        },
    )
    parser.add_argument(
        "item", nargs="?", help="Which table or figure, such as arrest/table2; --list shows all."
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options.")
    parser.add_flag("list", "List all tables and figures.")
    parser.add_flag("plan", "Say how much is left to do and about how long it takes; do nothing.")
    parser.add_flag("quiet", "Show no progress.")
    parser.add_argument(
        "--out",
        type=str,
        default=None,
        help="Folder for the trained models, the tables and the pictures. Its models and results are used again.",
    )
    parser.add_function_arguments(run_reproduction, skip={"item", "out", "plan", "quiet"})
    options = vars(parser.parse_args(words))
    options.pop("config")
    if options.pop("list"):
        print(list_items(options["json"]), end="")
        return 0
    parser.check_given(options)
    with stopped_by_signals("stopped; the same command goes on where it was"):
        result = run_reproduction(**options)
    print(result.text, end="")
    return FAILED if result.failures else 0
