"""Records episodes of tasks under scripted controllers. An episode depends only on the settings, its task and its number."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttcfast.runtime.errors import ArgumentError, UserError

from .envs.base import Environment, raised
from .envs.controllers import Controller, RandomController, SwingUpController, cartpole, is_cartpole
from .envs.exploring import ExploringStarts, HeldController, with_state
from .envs.make import make_env

CONTROLLERS = ("random", "swingup")


@dataclass(frozen=True)
class RecordConfig:
    """What an episode depends on beside its task and number; see ``CollectConfig``."""

    controllers: Mapping[str, float] | None
    noise: tuple[float, float]
    pump: tuple[float, float]
    action_repeat: int
    exploring_steps: int
    seed: int


@dataclass(frozen=True)
class Recording:
    """An episode: ``obs [T+1, O]``, ``act [T, A]``, ``rew [T]``, float32, and the controller that drove it with its settings.

    ``failure`` says what the simulator did wrong, and then the arrays are empty: no part of an episode is kept.
    """

    obs: NDArray[np.float32]
    act: NDArray[np.float32]
    rew: NDArray[np.float32]
    settings: dict[str, Any]
    failure: str | None = None


class Recorder:
    """Simulators and controllers of tasks, made when they are first needed."""

    def __init__(self, config: RecordConfig) -> None:
        self._config = config
        self._made: dict[tuple[str, bool], _FullEpisodes | _ExploringEpisodes] = {}

    def record(self, task: str, exploring: bool, i: int) -> Recording:
        """Return episode ``i`` of a task.

        Args:
            task: Name of the task.
            exploring: Whether it is one with an exploring start and held random actions, of ``exploring_steps`` steps, or one of the
                task's own start and length under one of the controllers.
            i: Number of the episode among those of its kind.

        Raises:
            ArgumentError: The settings do not fit the task.
            MissingPackageError: A package that the task needs is not installed.
        """
        if (task, exploring) not in self._made:
            self._made[task, exploring] = (_ExploringEpisodes if exploring else _FullEpisodes)(self._config, task)
        # Keyed by the task's name, so that other tasks in the list do not change the episode.
        name = f"{task} exploring" if exploring else task
        return self._made[task, exploring].record(i, np.random.default_rng([self._config.seed, zlib.crc32(name.encode()), i]))


def controllers_of(given: Mapping[str, float] | None, task: str) -> Mapping[str, float]:
    """Return the relative frequencies of the controllers of a task, those ``given`` or its own."""
    if given is not None:
        return given
    return {"random": 0.25, "swingup": 0.75} if is_cartpole(task) else {"random": 1.0}


def check_fits(config: RecordConfig, env: Environment, *, exploring: bool) -> None:
    """Raise ``ArgumentError`` unless the settings fit the task of ``env``, before anything is recorded."""
    if controllers_of(config.controllers, env.name).get("swingup", 0) > 0:
        cartpole(env)
    if exploring and config.exploring_steps > with_state(env).episode_length:
        raise ArgumentError(f"exploring_steps is {config.exploring_steps}; an episode of {env.name} has {env.episode_length} steps")


class _FullEpisodes:
    def __init__(self, config: RecordConfig, task: str) -> None:
        self._env = make_env(task, action_repeat=config.action_repeat)
        self._shares = {name: share for name, share in sorted(controllers_of(config.controllers, task).items()) if share > 0}
        self._turns: list[str] = []
        self._controllers: dict[str, Controller] = {}
        for name in self._shares:
            if name == "random":
                self._controllers[name] = RandomController(self._env)
            else:
                # Linearised in a simulator of its own, so that recording starts from a fresh one.
                other = make_env(task, action_repeat=config.action_repeat)
                self._controllers[name] = SwingUpController(other, noise=config.noise, pump=config.pump)

    def record(self, i: int, random: np.random.Generator) -> Recording:
        name = self._turn(i)
        controller = self._controllers[name]
        settings = {"controller": name, **controller.start(random)}
        seed = int(random.integers(2**31))
        return _recorded(self._env, lambda: self._env.reset(seed), controller, random, self._env.episode_length, settings)

    def _turn(self, i: int) -> str:
        """Return the controller of episode ``i``, always the one furthest behind its share."""
        total = sum(self._shares.values())
        while len(self._turns) <= i:
            due = {name: share / total * (len(self._turns) + 1) - self._turns.count(name) for name, share in self._shares.items()}
            self._turns.append(max(due, key=due.__getitem__))
        return self._turns[i]


class _ExploringEpisodes:
    def __init__(self, config: RecordConfig, task: str) -> None:
        self._env = make_env(task, action_repeat=config.action_repeat)
        # Found in a simulator of its own, so that recording starts from a fresh one.
        speeds = ExploringStarts(make_env(task)).speeds
        self._starts, self._controller = ExploringStarts(self._env, speeds), HeldController(self._env)
        self._steps = config.exploring_steps

    def record(self, i: int, random: np.random.Generator) -> Recording:
        settings = {"controller": "exploring", **self._controller.start(random)}
        return _recorded(self._env, lambda: self._starts.reset(random), self._controller, random, self._steps, settings)


def _recorded(
    env: Environment,
    reset: Callable[[], NDArray[np.float32]],
    controller: Controller,
    random: np.random.Generator,
    steps: int,
    settings: dict[str, Any],
) -> Recording:
    """Play an episode of ``steps`` steps from the observation that ``reset`` returns."""
    observations: list[NDArray[np.float32]] = []
    actions: list[NDArray[np.float32]] = []
    rewards: list[float] = []
    nothing = np.zeros((0, 0), dtype=np.float32)
    try:
        observations.append(reset())
        for _ in range(steps):
            actions.append(controller.act(observations[-1], random).astype(np.float32))
            observation, reward, _ = env.step(actions[-1])
            observations.append(observation)
            rewards.append(reward)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a simulator may raise anything
        when = f"at step {len(rewards)}" if observations else "at the reset"
        return Recording(nothing, nothing, nothing.ravel(), settings, f"{raised(env, error)}, {when}")
    obs, act, rew = np.stack(observations), np.stack(actions), np.array(rewards, dtype=np.float32)
    if not (np.isfinite(obs).all() and np.isfinite(rew).all()):
        return Recording(nothing, nothing, nothing.ravel(), settings, f"{env.name} returned an observation or a reward that is not finite")
    return Recording(obs, act, rew, settings)
