"""Serialises threads, and defers interrupts, where something is modified during a call and restored afterwards."""

from __future__ import annotations

import functools
import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, ParamSpec, TypeVar

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
_PATIENCE = 30.0  # seconds of waiting before a thread logs whom it waits for
_POLL = 0.05  # seconds between checks of the waiting main thread for an interrupt


class turn:
    """Enter a block that one thread of the process runs at a time; others wait. A thread may enter again within its own turn.

    What such blocks modify and restore (hooks, forwards and flags of models, the random streams, torch's fused attention) belongs to the
    process or may be shared by several models, so that one lock covers all of it. Calls that modify models therefore do not overlap, even
    for different models. On a GPU they only launch work, which Python does one thread at a time anyway. A block that waits for another
    thread that needs a turn deadlocks; after 30 seconds the waiting thread says so in the log.

    In the main thread Ctrl-C is deferred until the block has ended and everything is restored, or until ``interruptible``.

    Args:
        what: Name of the block for the log.
    """

    def __init__(self, what: str) -> None:
        self.what, self.outermost = what, False

    def __enter__(self) -> turn:
        self.outermost = _held.owner != threading.get_ident()
        self._open = not self.outermost and _interrupts.close()
        if not self.outermost:
            return self
        self._deferring = _interrupts.defer()  # first: from here on nothing can come between the lock and what releases it
        try:
            self._wait()
        except BaseException:
            if self._deferring:
                _interrupts.undefer()
            raise
        _held.owner, _held.what = threading.get_ident(), f"{self.what} in thread {threading.current_thread().name!r}"
        if self._deferring:
            _interrupts.close()  # another thread may have given it up meanwhile
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.outermost:
            if self._open:
                _interrupts.open()
            return
        _held.owner, _held.what = None, ""
        if self._deferring and not _in_main():
            _interrupts.give_up()
            self._deferring = False
        _held.lock.release()
        if self._deferring:
            _interrupts.undefer()

    def body(self) -> interruptible:
        """Run the caller's own code, in which Ctrl-C acts at once if it did so outside."""
        return interruptible(self.outermost or self._open)

    def _wait(self) -> None:
        waited, step = 0.0, _POLL if self._deferring else _PATIENCE
        while not _held.lock.acquire(timeout=step):
            if self._deferring:
                _interrupts.deliver()
            if waited < _PATIENCE <= waited + step:
                logger.warning("%s has waited %.0f s for %s, since only one of them may run at a time", self.what, _PATIENCE, _held.what)
            waited += step


class interruptible:
    """Let Ctrl-C act at once in a block within a turn, since all enclosing blocks restore their state. No effect outside a turn."""

    def __init__(self, applies: bool = True) -> None:
        self._applies = applies

    def __enter__(self) -> None:
        self._open = self._applies and _interrupts.close()
        if self._applies:
            _interrupts.open()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._applies and not self._open:
            _interrupts.close()


def in_turn(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap ``function`` in one ``turn``."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with turn(function.__qualname__):
            return function(*args, **kwargs)

    return call


class _Held:
    """The lock and its owner. Any thread can release it, since a generator that holds a turn may be closed by another thread."""

    def __init__(self) -> None:
        self.lock, self.owner, self.what = threading.Lock(), None, ""  # type: threading.Lock, int | None, str


class _Interrupts:
    """Handles SIGINT while the main thread has a turn: at once while ``open``, else when the turn is over."""

    def __init__(self) -> None:
        self._previous: Callable[[int, FrameType | None], Any] | None = None
        self._open = self.pending = False

    def defer(self) -> bool:
        """Defer SIGINT and return whether it is deferred: only the main thread receives it, and only a Python handler can be deferred."""
        if not _in_main():
            return False
        previous = signal.getsignal(signal.SIGINT)
        if previous == self._noted:  # of a turn that another thread has ended
            previous = self._previous
        if not callable(previous):
            return False
        self._previous, self._open, self.pending = previous, False, False
        signal.signal(signal.SIGINT, self._noted)
        return True

    def give_up(self) -> None:
        """End deferral from another thread, which cannot restore the handler; SIGINT acts at once from here on."""
        self._open = True

    def undefer(self) -> None:
        previous, self._open = self._previous, False
        if signal.getsignal(signal.SIGINT) == self._noted:  # else another handler was installed meanwhile
            signal.signal(signal.SIGINT, previous)
        self.deliver()
        self._previous = None

    def deliver(self) -> None:
        """Act on a deferred SIGINT."""
        if self.pending and self._previous is not None:
            self._open = self.pending = False
            self._previous(signal.SIGINT, None)

    def open(self) -> None:
        if self._mine():
            self.deliver()
            self._open = True

    def close(self) -> bool:
        """Close, and return whether it was open."""
        was = self._open if self._mine() else False
        if was:
            self._open = False
        return was

    @property
    def held(self) -> bool:
        """Return whether our handler is installed."""
        return self._previous is not None

    def _mine(self) -> bool:
        return self.held and _in_main()

    def _noted(self, number: int, frame: FrameType | None) -> None:
        # Between a generator's block and its end stands code of contextlib, which an exception would keep from going on.
        between = frame is not None and frame.f_globals.get("__name__") == "contextlib"
        if not self._open or between or self._previous is None:
            self.pending = True
            return
        self._open = False  # so that enclosing blocks are restored undisturbed
        self._previous(number, frame)
        self._open = True  # a handler that raises nothing


def _in_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _after_fork() -> None:
    """Reset in a forked child, where only the forking thread goes on and no other could release the lock."""
    _held.lock = threading.Lock()
    if _held.owner == threading.get_ident():
        _held.lock.acquire()
        return
    _held.owner, _held.what = None, ""
    if _interrupts.held:
        _interrupts.pending = False  # of the parent's
        _interrupts.undefer()


_held, _interrupts = _Held(), _Interrupts()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
