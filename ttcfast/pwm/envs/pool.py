"""Environments stepped together, in this process or spread over worker processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttcfast.checks import whole
from ttcfast.runtime.errors import ArgumentError
from ttcfast.runtime.workers import Worker, answers, end, require_portable

from .base import Environment
from .group import EnvGroup


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
        terminated: The environments of the last call whose episode has ended on its own, see ``Environment``.

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
        self.terminated: set[int] = set()
        self._group: EnvGroup | None = None  # the environments of this process
        self._workers: list[Worker] = []
        self._parts = [range(len(makers))]  # the environments of each worker
        try:
            if processes == 0:
                self._group = EnvGroup(makers)
            else:
                self._start(makers, min(processes, len(makers)))
            sizes = [size for part in self._call("sizes", dict.fromkeys(range(len(self._parts)), ())) for size in part]
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

    def _start(self, makers: Sequence[Callable[[], Environment]], count: int) -> None:
        for i, maker in enumerate(makers):
            require_portable(f"makers[{i}]", maker)
        self._parts = [range(w * len(makers) // count, (w + 1) * len(makers) // count) for w in range(count)]
        for w, part in enumerate(self._parts):
            duty = f"environment {part[0]}" if len(part) == 1 else f"environments {part[0]} to {part[-1]}"
            self._workers.append(Worker(partial(EnvGroup, list(makers[part.start : part.stop])), f"worker {w + 1} of {count}", duty))
        answers(self._workers)

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
        workers, self._workers, self._group = self._workers, [], None
        end(workers)

    def __enter__(self) -> EnvPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _places(self, at: Sequence[int] | None) -> list[int]:
        if self._group is None and not self._workers:
            raise ArgumentError("the pool is closed; make another one")
        places = list(range(self._count)) if at is None else [int(i) for i in at]
        if len(set(places)) != len(places) or not all(0 <= i < self._count for i in places):
            raise ArgumentError(f"at is {places}; give numbers from 0 to {self._count - 1}, each once")
        return places

    def _call(self, method: str, calls: dict[int, tuple[Any, ...]]) -> list[Any]:
        """Return the results of a method of ``EnvGroup`` for the parts and arguments in ``calls``."""
        if self._group is not None:
            return [getattr(self._group, method)(*arguments) for arguments in calls.values()]
        for part, arguments in calls.items():
            self._workers[part].ask(method, *arguments)
        return answers([self._workers[part] for part in calls])

    def _ask(self, method: str, places: list[int], values: Any) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_]]:
        rows = {p: [row for row, place in enumerate(places) if place in part] for p, part in enumerate(self._parts)}
        rows = {p: held for p, held in rows.items() if held}
        try:
            found = self._call(
                method, {p: ([places[r] - self._parts[p].start for r in held], [values[r] for r in held]) for p, held in rows.items()}
            )
        except ArgumentError:
            raise
        except BaseException:  # a worker is gone, or calls and answers no longer fit
            self.close()
            raise
        observations = np.full((len(places), self.observation_dim), np.nan, dtype=np.float32)
        rewards, over = np.full(len(places), np.nan), np.ones(len(places), dtype=bool)
        self.failures, self.terminated = {}, set()
        for held, results in zip(rows.values(), found, strict=True):
            for row, answer in zip(held, results, strict=True):
                if answer.failure is None:
                    observations[row], rewards[row], over[row] = answer.observation, answer.reward, answer.over
                    if answer.terminated:
                        self.terminated.add(places[row])
                else:
                    self.failures[places[row]] = answer.failure
        return observations, rewards, over
