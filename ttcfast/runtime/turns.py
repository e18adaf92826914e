"""Turns: one thread at a time, and no interrupt in between, where something is edited for the length of a call and put back afterwards."""

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
_PATIENCE = 30.0  # seconds of waiting before a thread says for whom it waits
_POLL = 0.05  # seconds after which the main thread looks whether it was interrupted while it waited


class turn:
    """A block that one thread of the process runs at a time; others wait. A thread may enter again within its own turn.

    What is edited and put back in such blocks (hooks, forwards and flags of models, the random streams, torch's fused attention) belongs to
    the process, or may be shared by models that know nothing of each other, so there is one lock for all of it. The price: calls that edit
    a model do not overlap, also where the models differ. On a GPU they only launch, which Python does one thread at a time anyway.
    A block that waits for another thread which needs a turn never ends; after 30 seconds the one that waits says so in the log.

    In the main thread Ctrl-C is held back until the block has ended, with everything put back, or until ``interruptible``.

    Args:
        what: the block is, for the log.
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
            _interrupts.close()  # which somebody may have given up meanwhile
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
        """The part of the block that is the caller's own code, in which Ctrl-C acts at once if it did outside."""
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
    """Within a turn: a block in which Ctrl-C acts at once, because all that encloses it puts things back. Without a turn, no effect."""

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
    """``function`` as one ``turn``."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with turn(function.__qualname__):
            return function(*args, **kwargs)

    return call


class _Held:
    """The lock, and who has it. Any thread can release it: a generator that holds a turn may be closed by another one."""

    def __init__(self) -> None:
        self.lock, self.owner, self.what = threading.Lock(), None, ""  # type: threading.Lock, int | None, str


class _Interrupts:
    """SIGINT while the main thread has its turn: acts at once while ``open``, else when the turn is over."""

    def __init__(self) -> None:
        self._previous: Callable[[int, FrameType | None], Any] | None = None
        self._open = self.pending = False

    def defer(self) -> bool:
        """Whether SIGINT is held back from here on: only the main thread gets it, and only a handler of Python's can be asked to wait."""
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
        """Another thread ends the turn: it cannot put the handler back, but SIGINT acts at once from here on."""
        self._open = True

    def undefer(self) -> None:
        previous, self._open = self._previous, False
        if signal.getsignal(signal.SIGINT) == self._noted:  # else somebody has put a handler of their own there
            signal.signal(signal.SIGINT, previous)
        self.deliver()
        self._previous = None

    def deliver(self) -> None:
        """Act on a SIGINT that was held back."""
        if self.pending and self._previous is not None:
            self._open = self.pending = False
            self._previous(signal.SIGINT, None)

    def open(self) -> None:
        if self._mine():
            self.deliver()
            self._open = True

    def close(self) -> bool:
        """Whether it was open."""
        was = self._open if self._mine() else False
        if was:
            self._open = False
        return was

    @property
    def held(self) -> bool:
        """Whether the handler is ours."""
        return self._previous is not None

    def _mine(self) -> bool:
        return self.held and _in_main()

    def _noted(self, number: int, frame: FrameType | None) -> None:
        # Between a generator's block and its end stands code of contextlib, which an exception would keep from going on.
        between = frame is not None and frame.f_globals.get("__name__") == "contextlib"
        if not self._open or between or self._previous is None:
            self.pending = True
            return
        self._open = False  # what encloses the block is put back undisturbed
        self._previous(number, frame)
        self._open = True  # a handler that raises nothing


def _in_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _after_fork() -> None:
    """In a child only the thread that forked goes on: nobody else would release the lock, or act on an interrupt."""
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
