"""Collects replay shards of dm_control tasks with scripted controllers, resumable and deterministic for a random seed."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ttcfast.checks import at_least, one_of, whole
from ttcfast.data.alike import require_made_with
from ttcfast.data.replay import ReplaySet
from ttcfast.data.replay_shard import Episode, ReplayShard, write_shard
from ttcfast.runtime.errors import ArgumentError
from ttcfast.runtime.files import output_folder
from ttcfast.runtime.progress import bar

from .envs import TASKS, Controller, DMControlEnv, RandomController, SwingUpController
from .envs.controllers import check_range
from .envs.dm_control import versions

CONTROLLERS = ("random", "swingup")


@dataclass(frozen=True)
class CollectConfig:
    """Settings of ``ttcfast collect``.

    Args:
        out: Folder of the shards, which are named ``<task>_<number>.pt``.
        tasks: Names in ``ttcfast.pwm.envs.TASKS``; the place in the list is the task's number in the shards. Observations and actions of
            several tasks are padded with zeros to the largest, as in MT30.
        episodes: Number of episodes per task, each of 1000 simulation steps.
        controllers: Relative frequency of each controller. They take turns, so that every part of a shard holds all of them; ``swingup``
            drives only the cart-pole.
        noise, pump: Ranges of ``SwingUpController`` from which each episode draws.
        action_repeat: Simulation steps per action.
        per_shard: Episodes per file; a killed run continues at the first missing file.
        seed: Random seed of all episodes.
    """

    out: str = "data/cartpole"
    tasks: tuple[str, ...] = ("cartpole-swingup",)
    episodes: int = 240
    controllers: Mapping[str, float] = field(default_factory=lambda: {"random": 0.25, "swingup": 0.75})
    noise: tuple[float, float] = (0.0, 2.0)
    pump: tuple[float, float] = (0.6, 1.5)
    action_repeat: int = 2
    per_shard: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ArgumentError(f"tasks is {list(self.tasks)}; name at least one, each once")
        for task in self.tasks:
            one_of("tasks", task, TASKS)
        for name in ("episodes", "per_shard", "action_repeat"):
            whole(name, getattr(self, name), 1)
        at_least("seed", self.seed, 0)
        check_range("noise", self.noise)
        check_range("pump", self.pump)
        for name, share in self.controllers.items():
            one_of("controllers", name, CONTROLLERS)
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < math.inf:
                raise ArgumentError(f"controllers.{name} is {share!r}; give a number that is not negative")
        if not any(share > 0 for share in self.controllers.values()):
            raise ArgumentError(f"controllers is {dict(self.controllers)}; at least one must have a share above 0")


@dataclass(frozen=True)
class CollectResult:
    """The shards in order, the returns of the episodes by ``(task, controller)`` as float64, and the number of agent steps."""

    files: list[Path]
    returns: dict[tuple[str, str], Tensor]
    steps: int


def collect(config: CollectConfig) -> CollectResult:
    """Record the missing shards.

    A shard made with the same settings and simulator is kept and any other refused, so running again resumes a killed run. An episode
    depends only on the settings, its task and its number.

    Raises:
        DataError: An existing shard has other settings or is damaged.
        OutputError: The folder cannot be written.
        MissingPackageError: dm_control is not installed.
        ArgumentError: A controller does not fit a task.
    """
    output_folder(config.out)
    recorders = [_Recorder(config, task) for task in config.tasks]
    sizes = max(r.env.observation_dim for r in recorders), max(r.env.action_dim for r in recorders)
    jobs = [job for number, recorder in enumerate(recorders) for job in _jobs(config, recorder, number, sizes)]
    todo = [job for job in jobs if not _done(job)]
    with bar(sum(job.parameters["count"] for job in todo), "collect") as progress:
        for job in todo:
            episodes, told = [], []
            first, count, number = (job.parameters[key] for key in ("first", "count", "number"))
            for i in range(first, first + count):
                episode, settings = job.recorder.record(i)
                obs = pad(episode.obs, (0, sizes[0] - episode.obs.shape[1]))
                act = pad(episode.act, (0, sizes[1] - episode.act.shape[1]))
                episodes.append(Episode(obs, act, episode.rew, number))
                told.append(settings)
                progress.advance(note=f"{settings['controller']}: return {float(episode.rew.double().sum()):.0f}")
            write_shard(job.path, episodes, {**job.parameters, "controllers_used": told})
    return _result(config, [job.path for job in jobs])


@dataclass(frozen=True)
class _Job:
    """One shard to record."""

    path: Path
    recorder: _Recorder
    parameters: dict[str, Any]


class _Recorder:
    """Simulator and controllers of one task."""

    def __init__(self, config: CollectConfig, task: str) -> None:
        self.task, self.seed = task, config.seed
        self.env = DMControlEnv(task, action_repeat=config.action_repeat)
        self._shares = {name: share for name, share in sorted(config.controllers.items()) if share > 0}
        self._turns: list[str] = []
        self._controllers: dict[str, Controller] = {}
        for name in self._shares:
            if name == "random":
                self._controllers[name] = RandomController(self.env)
            else:
                # Linearised in a simulator of its own, so that recording starts from a fresh one.
                other = DMControlEnv(task, action_repeat=config.action_repeat)
                self._controllers[name] = SwingUpController(other, noise=config.noise, pump=config.pump)

    def record(self, i: int) -> tuple[Episode, dict[str, Any]]:
        """Return episode ``i``, and the controller that drove it with its settings."""
        # Keyed by the task's name, so that other tasks in the list do not change the episode.
        random = np.random.default_rng([self.seed, zlib.crc32(self.task.encode()), i])
        name = self._turn(i)
        controller = self._controllers[name]
        settings = {"controller": name, **controller.start(random)}
        observations, actions, rewards = [self.env.reset(int(random.integers(2**31)))], [], []
        over = False
        while not over:
            actions.append(controller.act(observations[-1], random).astype(np.float32))
            observation, reward, over = self.env.step(actions[-1])
            observations.append(observation)
            rewards.append(reward)
        obs, act = torch.from_numpy(np.stack(observations)), torch.from_numpy(np.stack(actions))
        return Episode(obs, act, torch.tensor(rewards, dtype=torch.float32)), settings

    def _turn(self, i: int) -> str:
        """Return the controller of episode ``i``, always the one furthest behind its share."""
        total = sum(self._shares.values())
        while len(self._turns) <= i:
            due = {name: share / total * (len(self._turns) + 1) - self._turns.count(name) for name, share in self._shares.items()}
            self._turns.append(max(due, key=due.__getitem__))
        return self._turns[i]


def _jobs(config: CollectConfig, recorder: _Recorder, number: int, sizes: tuple[int, int]) -> list[_Job]:
    kept = {name: value for name, value in asdict(config).items() if name not in ("out", "tasks", "episodes", "per_shard")}
    jobs = []
    for place, first in enumerate(range(0, config.episodes, config.per_shard)):
        count = min(config.per_shard, config.episodes - first)
        made = {"task": recorder.task, "number": number, "first": first, "count": count, "sizes": sizes}
        made["action_dim"] = recorder.env.action_dim  # without padding
        parameters = json.loads(json.dumps({**kept, **made, "versions": versions()}))
        jobs.append(_Job(Path(config.out) / f"{recorder.task}_{place:04d}.pt", recorder, parameters))
    return jobs


def _done(job: _Job) -> bool:
    if not job.path.exists():
        return False
    require_made_with(job.path, ReplayShard(job.path).parameters, job.parameters)
    return True


def _result(config: CollectConfig, files: list[Path]) -> CollectResult:
    returns: dict[tuple[str, str], list[float]] = {}
    steps = 0
    for file in files:
        shard = ReplayShard(file, verify=False)
        for settings, value in zip(shard.parameters["controllers_used"], ReplaySet([shard]).returns().tolist(), strict=True):
            returns.setdefault((shard.parameters["task"], settings["controller"]), []).append(value)
        steps += len(shard) * shard.length
    return CollectResult(files, {key: torch.tensor(values, dtype=torch.float64) for key, values in sorted(returns.items())}, steps)
