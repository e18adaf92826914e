"""Shows progress bars on a terminal and nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, Generic, TypeVar, overload

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


class Bar(Generic[T]):
    """A progress bar made by :func:`bar`. Loop over it, or use it as a context manager and call :meth:`advance`."""

    def __init__(self, work: Iterable[T] | int, description: str, still: bool = False):
        self._still = still
        self._items: Iterable[Any] = range(work) if isinstance(work, int) else work
        self._total = len(self._items) if isinstance(self._items, Sized) else None
        self._description = description
        self._task: TaskID | None = None
        self._screen: Progress | None = None

    def __enter__(self) -> Bar[T]:
        self._screen = _shared.enter(self._still)
        if self._screen is not None:
            self._task = self._screen.add_task(self._description, total=self._total, note="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _shared.leave()

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self._items:
                yield item
                self.advance()

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        """Advance by ``steps``; ``note`` (a loss, a file name) is shown behind the bar until the next note."""
        if self._screen is None or self._task is None:
            return
        if note is not None:
            self._screen.update(self._task, note=note)
        self._screen.advance(self._task, steps)
        if self._still:
            self._screen.refresh()


@overload
def bar(work: int, description: str = "", *, still: bool = False) -> Bar[int]: ...
@overload
def bar(work: Iterable[T], description: str = "", *, still: bool = False) -> Bar[T]: ...
def bar(work: Iterable[Any] | int, description: str = "", *, still: bool = False) -> Bar[Any]:
    """Return a progress bar, shown on stderr if that is a terminal.

    Args:
        work: An iterable to loop over, or a number of steps.
        description: Short text before the bar.
        still: Draw the bar only when it advances, so that no thread runs beside what is timed.

    Example:
        ``for chunk in bar(chunks, "generate"): ...`` or ``with bar(4000, "train") as b: ...; b.advance(note=f"loss {loss:.3g}")``.
        Bars may be nested and are shown below one another.
    """
    return Bar(work, description, still)


class _Screen:
    """The live display of the process, of which rich allows one, open while any bar is."""

    def __init__(self) -> None:
        self._depth = 0
        self._progress: Progress | None = None

    def enter(self, still: bool) -> Progress | None:
        if self._depth == 0 and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            # What is printed meanwhile stands above the bar, unless it goes to a file or a pipe.
            shared = sys.stdout is not None and sys.stdout.isatty()
            self._progress = Progress(*columns, console=Console(stderr=True), auto_refresh=not still, redirect_stdout=shared)
            self._progress.start()
        self._depth += 1
        return self._progress

    def leave(self) -> None:
        self._depth -= 1
        if self._depth == 0 and self._progress is not None:
            self._progress.stop()
            self._progress = None


_shared = _Screen()
