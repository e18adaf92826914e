"""Prints to terminals, pipes and files, whatever characters and widths these support."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

from .errors import OutputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_IN_ASCII = {"–": "-", "—": "-", "−": "-", "±": "+-", "×": "x", "·": "*", "…": "...", "“": '"', "”": '"', "‘": "'", "’": "'"}
_HANDLER = "ttcfast-ascii"
_RAISE = ("strict", "surrogateescape")  # error handlers that raise for characters that an encoding lacks; LANG=C uses the latter


@contextlib.contextmanager
def any_stdout() -> Iterator[None]:
    """Keep printing from ending the work within the block.

    Characters that stdout's encoding lacks (``LANG=C``, ``PYTHONIOENCODING=latin-1``) are replaced by ASCII. After the reader has closed
    its pipe (``| head -1``) output is discarded, while the work goes on and keeps its results.

    Raises:
        OutputError: stdout cannot be written for another reason, such as a full disk.
    """
    stream = sys.stdout
    before = getattr(stream, "errors", None)
    if isinstance(stream, io.TextIOWrapper) and before in _RAISE:
        stream.reconfigure(errors=_HANDLER)
    if stream is not None:  # None if the process was started with a closed stdout, which print() handles
        sys.stdout = _Heedless(stream)
    try:
        yield
        if stream is not None:
            sys.stdout.flush()
    finally:
        sys.stdout = stream
        if isinstance(stream, io.TextIOWrapper) and before in _RAISE and not stream.closed:
            with contextlib.suppress(OSError):
                stream.reconfigure(errors=before)


class _Heedless:
    """Wraps ``stream`` and discards output after its reader has closed the pipe."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._reader():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._reader():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _reader(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # The rest of the buffer would raise again, at the latest at exit.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            if not isinstance(error, BrokenPipeError):
                raise OutputError(f"cannot write to stdout: {error.strerror}; send it elsewhere. What is in files is kept") from error


def wrapped(text: str, first: str = "", later: str = "") -> list[str]:
    """Return ``text`` in lines that fit the terminal, with room for a continuation sign, at most 100 wide; words stay whole."""
    width = min(100, max(22, shutil.get_terminal_size((100, 24)).columns)) - 2
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False)


def plain_console(given: Console | None = None, width: int | None = None) -> Console:
    """Return a console that prints names literally (``[old] run`` and ``:x:`` are no markup), to where ``given`` writes or stdout."""
    from rich.console import Console

    if given is None:
        return Console(markup=False, emoji=False, highlight=False, width=width)
    return Console(
        file=given.file,
        force_terminal=given.is_terminal,
        no_color=given.no_color,
        width=width or given.width,
        markup=False,
        emoji=False,
        highlight=False,
    )


def print_whole(console: Console, table: Table, width: int | None = None) -> None:
    """Print ``table`` at its own width even if the console is narrower: a wrapped line is better than a truncated number.

    With ``width`` columns that may wrap do so to fit it, and the others stay whole.
    """
    if width is None:
        width = max(console.width, plain_console(width=100_000).measure(table).maximum)
    plain_console(console, max(width, least_width(table))).print(table)


def least_width(table: Table) -> int:
    """Return the characters below which ``table`` would lose some."""
    return plain_console(width=100_000).measure(table).minimum


def fits(console: Console, table: Table) -> bool:
    """Return whether ``table`` fits the console. Pipes and files have unlimited width."""
    return not console.is_terminal or plain_console(width=100_000).measure(table).maximum <= console.width


def _ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_letter, error.object[error.start : error.end])), error.end


def _letter(character: str) -> str:
    if character in _IN_ASCII:
        return _IN_ASCII[character]
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode("ascii")
    return plain or character.encode("ascii", "backslashreplace").decode("ascii")


codecs.register_error(_HANDLER, _ascii)
