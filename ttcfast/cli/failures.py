"""Translation of exceptions into the errors that users of a command see: one line and an exit status."""

from __future__ import annotations

from pathlib import Path

from ttcfast.runtime.errors import ArgumentError, UserError

_PACKAGE = Path(__file__).resolve().parents[1]


def as_user_error(error: Exception) -> UserError:
    """Return the user error that reports ``error``."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, PermissionError):
        return UserError(f"{error.filename or 'a file'}: {error.strerror}; make it readable, or give another place")
    if _is_our_check(error):
        return ArgumentError(str(error))
    return UserError(f"{type(error).__name__}: {error}; --debug shows where")


def _is_our_check(error: Exception) -> bool:
    """Whether ``error`` is a ValueError raised by this package itself, not by a library it calls (numpy, a codec, JSON)."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else trace.tb_frame.f_code.co_filename
    return type(error) is ValueError and Path(place).is_relative_to(_PACKAGE)
