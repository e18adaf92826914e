"""``ttcfast <command> key=value ...``: dispatches to the command and turns errors into one line and an exit status."""

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
from ttcfast.runtime.terminal import any_stdout, wrapped

from .commands import COMMANDS
from .failures import as_user_error

_USAGE = "usage: ttcfast <command> [key=value ...] [--multirun] [--debug] [--help]"
_DONE, _BAD_ARGUMENTS, _INTERRUPTED = 0, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments after ``ttcfast``; None takes those of the process.

    Returns:
        Exit status: 0 done, 1 failed while running, 2 bad arguments, 130 interrupted. Errors are one line on stderr; ``--debug`` shows
        the trace as well.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        with any_stdout(), memory_errors():
            return _run(arguments)
    except KeyboardInterrupt:
        return _say(_INTERRUPTED, "interrupted")
    except Exception as error:
        told = as_user_error(error)
        return _say(told.status, str(told), debug)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("help", "--help", "-h"):
        print(_help())
        return _DONE if arguments else _BAD_ARGUMENTS
    if arguments[0] == "--version":
        from ttcfast import __version__

        print(f"ttcfast {__version__}")
        return _DONE
    if arguments[0] == "completion":
        from . import completion

        # Between two keys a message would spoil the line: without candidates, the shell offers files.
        with contextlib.suppress(Exception) if "COMP_LINE" in os.environ else contextlib.nullcontext():
            print("\n".join(completion.answer(arguments[1:])))
        return _DONE
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise ArgumentError(f"no command {name!r}{f'; did you mean {near[0]}?' if near else ''} Commands: {', '.join(COMMANDS)}")
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(
            f"the current folder cannot be used ({error.strerror}: it was removed or is closed to you); cd to another"
        ) from error
    from . import configuration  # here, since it loads Hydra and torch, which the lines above do without

    if "--help" in rest or "-h" in rest:
        about = "\n".join(wrapped(f"ttcfast {name}: {_summary(name)}"))
        example = " \\\n".join(wrapped(f"Example: {_example(name)}", later="    "))  # still one command
        print(f"{about}\n\n{example}\n\nKeys and their defaults:\n{configuration.defaults_text(name)}")
        return _DONE
    several = {"--multirun", "-m"} & set(rest)
    if several:
        from .multirun import multirun

        multirun(name, [argument for argument in rest if argument not in several])
        return _DONE
    importlib.import_module(f"ttcfast.cli.{name}").run(configuration.compose(name, rest))
    return _DONE


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [line for name in COMMANDS for line in wrapped(_summary(name), f"  {name:<{width}}", " " * (width + 2))]
    return "\n".join([_USAGE, "", *lines, "", "ttcfast <command> --help prints the keys of a command with their defaults."])


def _summary(name: str) -> str:
    """Return the summary in the docstring of the command's file, without importing it."""
    return _docstring(name).splitlines()[0].partition(": ")[2]


def _example(name: str) -> str:
    """Return the example in the docstring of the command's file, a line of its own."""
    return next(line.partition(": ")[2].strip("`") for line in _docstring(name).splitlines() if line.startswith("Example: "))


def _docstring(name: str) -> str:
    return ast.get_docstring(ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))) or ""


def _say(status: int, message: str, debug: bool = False) -> int:
    if debug:
        traceback.print_exc()
    print(f"ttcfast: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
