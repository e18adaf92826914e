"""Worker processes that each hold one object and answer calls of its methods; they end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

from .errors import ArgumentError, UserError

# Seconds until a worker whose work is over, but which does not end, is terminated, and then killed.
_PATIENCE = (5.0, 1.0)


class WorkerError(UserError):
    """A worker process ended although it is still needed."""


class Worker:
    """A fresh Python process, of one thread, that makes an object and then answers calls of its methods.

    It starts without a copy of this process's memory, so a script that uses workers needs the usual ``if __name__ == "__main__":``. It
    ignores interrupts and ends as soon as this process does, or leaves it.

    Args:
        make: Makes the object, in the worker. Importable there: a function or class of a module, or ``functools.partial`` of one.
        name: For messages: ``"worker 1 of 2"``.
        duty: For messages, what it is responsible for: ``"environments 0 to 3"``.
        remedy: For messages, what to do if it ends early.

    Raises:
        ArgumentError: ``make`` cannot be sent to another process.
    """

    def __init__(self, make: Callable[[], Any], name: str, duty: str, remedy: str = "start again") -> None:
        require_portable("make", make)
        self._name, self._duty, self._remedy, self._made = name, duty, remedy, False
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, make), name=f"ttcfast {name}", daemon=True)
        self._process.start()
        other.close()  # so that the end of the process closes the pipe

    @property
    def pid(self) -> int | None:
        """Number of the process."""
        return self._process.pid

    def ask(self, method: str, *arguments: Any) -> None:
        """Call a method of the object; :meth:`answer` returns its result.

        Raises:
            WorkerError: The process ended.
        """
        try:
            self._connection.send((method, arguments))
        except OSError as error:
            raise self._gone() from error

    def answer(self) -> Any:
        """Wait for the result of the oldest call that was not answered; the first result is None, once the object is made.

        Raises:
            WorkerError: The process ended.
            UserError, MemoryError: Raised by the method, or by ``make``, in the worker.
            RuntimeError: ``make`` raised another exception.
        """
        if self._connection not in wait([self._connection, self._process.sentinel]) and not self._connection.poll():
            raise self._gone()
        try:
            result = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._gone() from error
        self._made = True
        if isinstance(result, BaseException):
            raise result
        return result

    def _gone(self) -> WorkerError:
        self._process.join(_PATIENCE[0])
        code = self._process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"
        if code == 1:
            how += " (its own message stands above)"
            how += "" if self._made else "; a script that uses workers needs `if __name__ == '__main__':`"
        return WorkerError(f"{self._name} (process {self._process.pid}, {self._duty}) {how}; the others were ended: {self._remedy}")

    def _end(self) -> None:
        for seconds, stop in zip(_PATIENCE, (self._process.terminate, self._process.kill)):
            self._process.join(seconds)
            if self._process.exitcode is None:
                stop()
        self._process.join()
        self._process.close()


def require_portable(name: str, make: object) -> None:
    """Raise ``ArgumentError`` unless the argument ``name`` can be sent to another process."""
    try:
        ForkingPickler.dumps(make)
    except Exception as error:  # pickle raises many kinds
        raise ArgumentError(
            f"{name} cannot be sent to a worker process ({error}); give a function of a module or functools.partial of a class"
        ) from error


def end(workers: Iterable[Worker]) -> None:
    """End workers and wait for them; what they are doing is not finished for longer than a few seconds."""
    held = list(workers)
    for worker in held:
        worker._connection.close()
    for worker in held:
        worker._end()


def answers(workers: Sequence[Worker]) -> list[Any]:
    """Return the next result of each worker, or raise the first error once each has answered."""
    found: list[Any] = []
    for worker in workers:
        try:
            found.append(worker.answer())
        except (UserError, MemoryError, RuntimeError) as error:
            found.append(error)
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found


def in_order(workers: Sequence[Worker], method: str, calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """Yield the results of the calls in their order, whichever worker makes them; each makes one at a time.

    Args:
        workers: Workers of equal objects, whose results do not depend on earlier calls, and which owe no answer.
        method: The method.
        calls: Its arguments for each call.

    Raises:
        As :meth:`Worker.answer`.
    """
    rest, busy, done, shown = enumerate(calls), {}, {}, 0
    idle = list(workers)
    while True:
        while idle and (call := next(rest, None)) is not None:
            idle[-1].ask(method, *call[1])
            busy[idle.pop()] = call[0]
        if not busy:
            return
        ready = wait([end for worker in busy for end in (worker._connection, worker._process.sentinel)])
        for worker in [w for w in busy if w._connection in ready or w._process.sentinel in ready]:
            done[busy.pop(worker)] = worker.answer()
            idle.append(worker)
        while shown in done:
            yield done.pop(shown)
            shown += 1


def _serve(connection: Connection, make: Callable[[], Any]) -> None:
    """Make the object and answer calls until the other end is closed. Runs in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt reaches the asking process, which then closes its end
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if "torch" in sys.modules:  # loaded by the script that started the worker
        sys.modules["torch"].set_num_threads(1)
    try:
        try:
            held = make()
        except Exception as error:
            connection.send(error if isinstance(error, (UserError, MemoryError)) else RuntimeError(f"{type(error).__name__}: {error}"))
            return
        connection.send(None)
        while True:
            method, arguments = connection.recv()
            try:
                result = getattr(held, method)(*arguments)
            except (UserError, MemoryError) as error:
                result = error
            connection.send(result)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # nobody asks any more
