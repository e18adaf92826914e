"""Shell completion of commands, keys and the values of groups: ``complete -C 'ttcfast completion' ttcfast`` in bash, also in zsh.

The shell calls ``ttcfast completion ttcfast <word> <word before>`` with the line in ``COMP_LINE`` and takes each line of the answer as one
candidate for the word. Keys and values are those that Hydra's completion finds in the command's configuration.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from .commands import COMMANDS

INSTALL = "complete -o default -o nospace -C 'ttcfast completion' ttcfast"  # as bash itself writes it
_FLAGS = ("--multirun", "--debug", "--help")


def answer(arguments: Sequence[str]) -> list[str]:
    """Return the lines that ``ttcfast completion`` prints: candidates where a shell asks, else the line that installs it."""
    line = os.environ.get("COMP_LINE")
    if line is None:
        return [INSTALL]
    point = int(os.environ.get("COMP_POINT", len(line)))
    return candidates(line[:point], arguments[1] if len(arguments) > 1 else None)


def candidates(line: str, word: str | None = None) -> list[str]:
    """Return what may stand in place of the last word of a command line.

    Args:
        line: The line up to the cursor, which begins with ``ttcfast``.
        word: What the shell takes for the last word, which in bash is what follows the last ``=``; None for all of it.

    Returns:
        The candidates for ``word``; those that end a word end in a blank. A line that is wrong so far has none.
    """
    words = line.split()
    last = "" if line[-1:].isspace() or len(words) < 2 else words.pop()
    if len(words) < 2:
        found = [f"{name} " for name in (*COMMANDS, "help") if name.startswith(last)]
    elif words[1] not in COMMANDS:
        found = []
    elif last.startswith("-"):
        found = [f"{flag} " for flag in _FLAGS if flag.startswith(last)]
    else:
        found = _keys(words[1], [other for other in words[2:] if "=" in other], last, "--multirun" in words or "-m" in words)
    held = last.removesuffix(last if word is None else word)
    return [each.removeprefix(held) for each in found]


def _keys(command: str, before: Sequence[str], last: str, several: bool) -> list[str]:
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.plugins.completion_plugin import DefaultCompletionPlugin

    from . import configuration

    defaults = configuration.compose(command, [])
    with initialize_config_dir(config_dir=str(configuration.CONFIGS), version_base="1.3"):
        application = GlobalHydra.instance().hydra
        assert application is not None
        plugin = DefaultCompletionPlugin(application.config_loader)
        found = plugin._query(configuration.register(command), " ".join([*before, last]))
    kept = [_written(each, defaults) for each in found if each.partition("=")[0].partition(".")[0] in defaults]
    return kept + [f"{key}=" for key in ("ablation", "hydra/launcher") if several and f"{key}=".startswith(last)]


def _written(candidate: str, defaults: Mapping[str, Any]) -> str:
    """Return a key with ``.`` where others lie below it and ``=`` where it takes a value, a list among them; a value with a blank."""
    if "=" in candidate[:-1]:
        return candidate + " "
    node: Any = defaults
    for part in candidate.rstrip(".=").split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return candidate.rstrip(".=") + ("." if isinstance(node, Mapping) and candidate.endswith(".") else "=")
