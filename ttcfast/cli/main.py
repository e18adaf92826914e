"""``ttcfast <command> key=value ...``: finds the command, hands it its configuration, turns errors into one line and a status."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from ttcfast.runtime.errors import ArgumentError, UserError, memory_errors

COMMANDS = (
    *("demo", "generate", "train_fm", "build_prm_data", "train_prm", "train_prm_on_policy", "fit_directions", "run_ttc", "ceiling"),
    *("collect", "train_wm", "report", "bench", "info"),
)

_USAGE = "usage: ttcfast <command> [key=value ...] [--multirun] [--debug] [--help]"
_DONE, _FAILED, _BAD_ARGUMENTS, _INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after ``ttcfast``; None takes the process's.

    Returns:
        Exit status: 0 done, 1 failed while running, 2 bad arguments, 130 interrupted. Errors are one line on stderr; ``--debug`` shows
        the trace as well.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        with memory_errors():
            return _run(arguments)
    except KeyboardInterrupt:
        return _say(_INTERRUPTED, "interrupted")
    except BrokenPipeError:  # the reader of our output went away (`ttcfast info | head`), which is no failure
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _DONE
    except UserError as error:
        return _say(error.status, str(error), debug)
    except ValueError as error:  # the library's own checks of arguments
        return _say(_BAD_ARGUMENTS, str(error), debug)
    except Exception as error:
        return _say(_FAILED, f"{type(error).__name__}: {error}; --debug shows where", debug)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("help", "--help", "-h"):
        print(_help())
        return _DONE if arguments else _BAD_ARGUMENTS
    if arguments[0] == "--version":
        from ttcfast import __version__

        print(f"ttcfast {__version__}")
        return _DONE
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise ArgumentError(f"no command {name!r}{f'; did you mean {near[0]}?' if near else ''} Commands: {', '.join(COMMANDS)}")
    from . import configuration  # here, since it loads Hydra and torch, which the lines above do without

    if "--help" in rest or "-h" in rest:
        print(f"ttcfast {name}: {_summary(name)}\n\nKeys and their defaults:\n{configuration.defaults_text(name)}")
        return _DONE
    command = importlib.import_module(f"ttcfast.cli.{name}")
    several = {"--multirun", "-m"} & set(rest)
    if several:
        from .multirun import multirun

        multirun(name, [argument for argument in rest if argument not in several], command.run)
        return _DONE
    command.run(configuration.compose(name, rest))
    return _DONE


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{_summary(name)}" for name in COMMANDS]
    return "\n".join([_USAGE, "", *lines, "", "ttcfast <command> --help prints the keys of a command with their defaults."])


def _summary(name: str) -> str:
    """What the command's file says of itself, read without importing it."""
    text = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))) or ""
    return text.splitlines()[0].partition(": ")[2]


def _say(status: int, message: str, debug: bool = False) -> int:
    if debug:
        traceback.print_exc()
    print(f"ttcfast: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
