"""Environments stepped together, in this process or spread over worker processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ttcfast.checks import whole
from ttcfast.runtime.errors import ArgumentError, UserError

from .base import Environment
from .worker import Answer, EnvGroup, serve

# Seconds until a worker whose work is over, but which does not end, is terminated, and then killed.
_PATIENCE = (5.0, 1.0)


class WorkerError(UserError):
    """A worker process ended although the pool still needs it."""


class EnvPool:
    """N environments that are reset and stepped together; a context manager.

    Results do not depend on ``processes``. An environment that fails in :meth:`reset` or :meth:`step` (it raises, or an observation or
    reward is not finite) does not stop the others: its observation and reward are NaN, its episode is over, and ``failures`` says why.

    Args:
        makers: N functions without arguments, each of which makes one environment, such as ``functools.partial(DMControlEnv, task)``. They
            are called in the process that runs the environment, so with ``processes`` they must be importable there.
        processes: Worker processes among which the environments are spread; 0 runs all in this process. Each starts a fresh interpreter
            (about 1 s for dm_control), uses one thread, and ends with this process. A script that uses workers needs the usual
            ``if __name__ == "__main__":``.

    Attributes:
        names: Names of the tasks, one per environment.
        observation_dim, action_dim: Sizes, the same for all environments.
        episode_length: Agent steps of the longest episode.
        failures: For each environment that failed in the last call, what happened.

    Raises:
        ArgumentError: No maker, one that cannot be sent to a worker, or environments of different sizes.
        WorkerError: A worker ended early. The other workers are ended too.
    """

    def __init__(self, makers: Sequence[Callable[[], Environment]], processes: int = 0) -> None:
        if not makers:
            raise ArgumentError("makers is empty; give one function per environment")
        whole("processes", processes, 0)
        self._count = len(makers)
        self.failures: dict[int, str] = {}
        self._groups: list[_Group] = []
        try:
            self._start(makers, processes)
            sizes = [size for answer in _answers(self._groups) for size in answer]
            for size in sizes:
                if size[1:3] != sizes[0][1:3]:
                    raise ArgumentError(
                        f"{size[0]} has observations and actions of sizes {size[1:3]}, {sizes[0][0]} of {sizes[0][1:3]}; use PaddedEnv"
                    )
        except BaseException:
            self.close()
            raise
        self.names = [size[0] for size in sizes]
        self.observation_dim, self.action_dim = sizes[0][1:3]
        self.episode_length = max(size[3] for size in sizes)

    def _start(self, makers: Sequence[Callable[[], Environment]], processes: int) -> None:
        if processes == 0:
            self._groups.append(_Here(range(len(makers)), makers))
            return
        _check_portable(makers)
        workers = min(processes, len(makers))
        for w in range(workers):
            places = range(w * len(makers) // workers, (w + 1) * len(makers) // workers)
            self._groups.append(_Worker(f"{w + 1} of {workers}", places, makers[places.start : places.stop]))

    def __len__(self) -> int:
        """Number of environments, N."""
        return self._count

    def reset(self, seeds: Sequence[int], at: Sequence[int] | None = None) -> NDArray[np.float32]:
        """Start episodes.

        Args:
            seeds: Random seed of each episode, ``[n]``, from 0 to 2**32 - 1.
            at: Numbers of the n environments; None means all N.

        Returns:
            Observations ``[n, O]``.

        Raises:
            ArgumentError: Another number of seeds, or the pool is closed.
            WorkerError: As for the class.
        """
        places = self._places(at)
        if len(seeds) != len(places):
            raise ArgumentError(f"seeds has {len(seeds)} entries for {len(places)} environments; give one each")
        if bad := [seed for seed in seeds if not 0 <= seed < 2**32]:
            raise ArgumentError(f"seeds holds {bad[0]}; give whole numbers from 0 to 2**32 - 1")
        return self._ask("reset", places, [int(seed) for seed in seeds])[0]

    def step(
        self, actions: NDArray[Any], at: Sequence[int] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_]]:
        """Make one agent step.

        Args:
            actions: Actions ``[n, A]`` in [-1, 1].
            at: Numbers of the n environments; None means all N.

        Returns:
            Observations ``[n, O]``, rewards ``[n]``, and whether each episode is over, ``[n]``.

        Raises:
            ArgumentError: Actions of another shape, outside [-1, 1] or not finite; an episode that is over; or the pool is closed.
            WorkerError: As for the class.
        """
        places, given = self._places(at), np.asarray(actions)
        if given.shape != (len(places), self.action_dim):
            raise ArgumentError(f"actions have shape {given.shape}; expected ({len(places)}, {self.action_dim})")
        if not (good := (np.abs(given) <= 1).all(1)).all():
            bad = int(np.argmin(good))
            raise ArgumentError(f"actions of environment {places[bad]} are {given[bad].tolist()}; every entry must lie in [-1, 1]: clip it")
        return self._ask("step", places, given)

    def close(self) -> None:
        """End the workers. A closed pool cannot be used any more."""
        groups, self._groups = self._groups, []
        for group in groups:
            group.leave()
        for group in groups:
            group.end()

    def __enter__(self) -> EnvPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _places(self, at: Sequence[int] | None) -> list[int]:
        if not self._groups:
            raise ArgumentError("the pool is closed; make another one")
        places = list(range(self._count)) if at is None else [int(i) for i in at]
        if len(set(places)) != len(places) or not all(0 <= i < self._count for i in places):
            raise ArgumentError(f"at is {places}; give numbers from 0 to {self._count - 1}, each once")
        return places

    def _ask(self, method: str, places: list[int], values: Any) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_]]:
        asked: list[tuple[_Group, list[int]]] = []
        try:
            for group in self._groups:
                if rows := [row for row, place in enumerate(places) if place in group.places]:
                    group.ask(method, [places[row] - group.places.start for row in rows], [values[row] for row in rows])
                    asked.append((group, rows))
            answers = _answers([group for group, _ in asked])
        except ArgumentError:
            raise
        except BaseException:  # a worker is gone, or requests and answers no longer fit
            self.close()
            raise
        observations = np.full((len(places), self.observation_dim), np.nan, dtype=np.float32)
        rewards, over = np.full(len(places), np.nan), np.ones(len(places), dtype=bool)
        self.failures = {}
        for (_, rows), held in zip(asked, answers, strict=True):
            for row, answer in zip(rows, held, strict=True):
                if answer.failure is None:
                    observations[row], rewards[row], over[row] = answer.observation, answer.reward, answer.over
                else:
                    self.failures[places[row]] = answer.failure
        return observations, rewards, over


class _Group(Protocol):
    """Environments ``places`` of a pool, wherever they run."""

    places: range

    def ask(self, method: str, places: list[int], values: Any) -> None: ...
    def answer(self) -> Any: ...
    def leave(self) -> None: ...
    def end(self) -> None: ...


class _Here:
    """A group in this process."""

    def __init__(self, places: range, makers: Sequence[Callable[[], Environment]]) -> None:
        self.places = places
        self._group = EnvGroup(makers)
        self._answer: list[Answer] | list[tuple[str, int, int, int]] = self._group.sizes()

    def ask(self, method: str, places: list[int], values: Any) -> None:
        self._answer = getattr(self._group, method)(places, values)

    def answer(self) -> Any:
        return self._answer

    def leave(self) -> None:
        pass

    def end(self) -> None:
        pass


class _Worker:
    """A group in a process of its own."""

    def __init__(self, label: str, places: range, makers: Sequence[Callable[[], Environment]]) -> None:
        self.places, self._label, self._ready = places, label, False
        context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of torch and MuJoCo
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, list(makers)), name=f"environments {label}", daemon=True)
        self._process.start()
        other.close()  # so that the end of the process closes the pipe

    def ask(self, method: str, places: list[int], values: Any) -> None:
        try:
            self._connection.send((method, (places, values)))
        except OSError as error:
            raise self._gone() from error

    def answer(self) -> Any:
        if self._connection not in wait([self._connection, self._process.sentinel]) and not self._connection.poll():
            raise self._gone()
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._gone() from error
        self._ready = True
        return answer

    def leave(self) -> None:
        self._connection.close()

    def end(self) -> None:
        for seconds, stop in zip(_PATIENCE, (self._process.terminate, self._process.kill)):
            self._process.join(seconds)
            if self._process.exitcode is None:
                stop()
        self._process.join()
        self._process.close()

    def _gone(self) -> WorkerError:
        self._process.join(_PATIENCE[0])
        code = self._process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"
        first, last = self.places[0], self.places[-1]
        held = f"environment {first}" if first == last else f"environments {first} to {last}"
        why = "" if self._ready else " before they were made (its own message stands above)"
        if not self._ready and code == 1:
            why += "; a script that uses workers needs `if __name__ == '__main__':`"
        return WorkerError(f"worker {self._label} (process {self._process.pid}, {held}) {how}{why}; the others were ended: start again")


def _answers(groups: Sequence[_Group]) -> list[Any]:
    """Return the answers of all groups, or raise the first error once each has answered."""
    answers = [group.answer() for group in groups]
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers


def _check_portable(makers: Sequence[Callable[[], Environment]]) -> None:
    for i, maker in enumerate(makers):
        try:
            ForkingPickler.dumps(maker)
        except Exception as error:  # pickle raises many kinds
            raise ArgumentError(
                f"makers[{i}] cannot be sent to a worker process ({error}); give a function of a module or functools.partial of a class"
            ) from error
