"""A process that reads one configuration of HOCON or YAML, whoever wrote it, and says what it means as JSON.

Its parsers can be made to open files and addresses, to look up environment variables, and to work for hours: here
nothing can be opened any more, there is no environment, and memory and time are limited.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

import yaml

MAX_BYTES_OF_MEMORY = 1 << 30
MAX_SECONDS = 60


def main(form: str) -> None:
    """Read a text from standard input; write its content, or the line of a mistake, to standard output."""
    text = sys.stdin.buffer.read().decode()
    parse = {"PYHOCON": _parse_hocon, "OMEGACONF": _parse_yaml}[form]
    parse("{a: 1}")  # what is loaded when it is first used must be loaded before the door closes
    _close_the_door()
    try:
        said = json.dumps({"content": parse(text)}, default=repr)
    except MemoryError:
        os._exit(1)
    except Exception as error:  # noqa: BLE001 - whatever a parser raises, the text is not for it
        mark = getattr(error, "problem_mark", None)
        said = json.dumps({"line": mark.line + 1 if mark else getattr(error, "lineno", None)})
    sys.stdout.write(said)


def _close_the_door() -> None:
    os.environ.clear()
    for limit, value in (
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_AS, MAX_BYTES_OF_MEMORY),
        (resource.RLIMIT_CPU, MAX_SECONDS),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def _parse_hocon(text: str) -> Any:
    from nvflare.fuel_opt.utils.pyhocon_loader import PyhoconLoader

    return PyhoconLoader().load_config_from_str(text).to_dict()


class _YamlLoader(yaml.SafeLoader):
    """Without aliases: a few lines of them stand for more than memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not followed")
        return super().compose_node(parent, index)


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_YamlLoader)  # noqa: S506 - a SafeLoader
