"""The YAML of configs and of values on the command line: YAML 1.2's numbers, in which 010 is ten.

PyYAML reads YAML 1.1, where 010 is eight, 1:30 is ninety, and 1e-3 is text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from jsonargparse import set_loader

MODE = "fastadv"  # the name by which parsers know `load_yaml`

_INT = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"
_TIME = "tag:yaml.org,2002:timestamp"
_WHOLE = re.compile(r"[-+]?(0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+|[0-9][0-9_]*)$")
_REAL = re.compile(
    r"""[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*\.[0-9_]*)([eE][-+]?[0-9]+)?$
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$
    |[-+]?\.(inf|Inf|INF)$
    |\.(nan|NaN|NAN)$""",
    re.VERBOSE,
)


# Degrees and minutes, or hours and minutes: in YAML 1.1 a number to the base 60.
_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers of YAML 1.2, and without dates. "yes" and "no" stay true and false."""

    yaml_implicit_resolvers = {  # noqa: RUF012, PyYAML wants an attribute of the class
        first: [(tag, form) for tag, form in pairs if tag not in (_INT, _FLOAT, _TIME)]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_yaml_int(self, node: Any) -> int:
        text = str(self.construct_scalar(node)).replace("_", "").lower()
        try:
            return int(text, 0 if text.lstrip("+-")[:2] in ("0x", "0o", "0b") else 10)
        except ValueError as error:  # of a number with the tag !!int
            raise yaml.constructor.ConstructorError(
                None, None, str(error), node.start_mark
            ) from error


_Loader.add_implicit_resolver(_INT, _WHOLE, list("-+0123456789"))
_Loader.add_implicit_resolver(_FLOAT, _REAL, list("-+0123456789."))
_Loader.add_constructor(_INT, _Loader.construct_yaml_int)


def is_base_60(text: str) -> bool:
    """Whether YAML 1.1 reads a text as a whole number to the base 60, as 1:30."""
    return _BASE_60.fullmatch(text.strip()) is not None


def load_yaml(text: str) -> Any:
    """Read YAML.

    Args:
        text: a config, or one value of the command line.

    Returns:
        The content. A name alone before a colon, and words alone in braces, are the text itself.

    Raises:
        yaml.YAMLError: the text is no YAML.
    """
    content = yaml.load(text, Loader=_Loader)
    if isinstance(content, dict) and content and all(value is None for value in content.values()):
        stripped = text.strip()
        words = {word.strip() for word in stripped.strip("{}").split(",")}
        if stripped == f"{next(iter(content))}:" or words == set(content):
            return text
    return content


set_loader(MODE, load_yaml, (yaml.YAMLError,))
