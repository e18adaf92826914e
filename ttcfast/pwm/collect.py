"""Collects replay shards of tasks with scripted controllers and exploring starts, resumable and deterministic for a random seed."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ttcfast.checks import at_least, each_once, one_of, whole
from ttcfast.data.alike import require_made_with
from ttcfast.data.replay import ReplaySet
from ttcfast.data.replay_shard import Episode, ReplayShard, write_shard
from ttcfast.runtime.errors import ArgumentError, DataError
from ttcfast.runtime.files import output_folder
from ttcfast.runtime.progress import bar
from ttcfast.runtime.workers import Worker, answers, end, in_order

from .envs.controllers import check_range
from .envs.make import check_task, make_env, versions
from .recording import CONTROLLERS, RecordConfig, Recorder, Recording, check_fits, controllers_of


@dataclass(frozen=True)
class CollectConfig:
    """Settings of ``ttcfast collect``.

    Args:
        out: Folder of the shards, which are named ``<task>_<number>.pt`` and ``<task>_exploring_<number>.pt``.
        tasks: Names for ``ttcfast.pwm.envs.make_env``; the place in the list is the task's number in the shards. Observations and actions
            of several tasks are padded with zeros to the largest, as in MT30.
        episodes: Number of episodes per task from the task's own start, each of 1000 simulation steps in dm_control.
        controllers: Relative frequency of each controller of ``CONTROLLERS``. They take turns, so that every part of a shard holds all of
            them. None is ``{"random": 0.25, "swingup": 0.75}`` for a cart-pole, which alone ``swingup`` drives, and else ``{"random": 1}``.
        noise, pump: Ranges of ``SwingUpController`` from which each episode draws.
        exploring: Number of further episodes per task with exploring starts and held random actions, in shards of their own; see
            ``ttcfast.pwm.envs.exploring``. They show a world model the states that no controller visits.
        exploring_steps: Agent steps of each of these.
        action_repeat: Simulation steps per action.
        per_shard: Episodes per file; a killed run continues at the first missing file.
        processes: Worker processes that record; 0 records in this one. The files do not depend on it.
        seed: Random seed of all episodes.
    """

    out: str = "data/cartpole"
    tasks: tuple[str, ...] = ("cartpole-swingup",)
    episodes: int = 240
    controllers: Mapping[str, float] | None = None
    noise: tuple[float, float] = (0.0, 2.0)
    pump: tuple[float, float] = (0.6, 1.5)
    exploring: int = 0
    exploring_steps: int = 50
    action_repeat: int = 2
    per_shard: int = 40
    processes: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        each_once("tasks", self.tasks)
        for task in self.tasks:
            check_task("tasks", task)
        for name, least in (
            ("episodes", 1),
            ("exploring", 0),
            ("exploring_steps", 1),
            ("per_shard", 1),
            ("action_repeat", 1),
            ("processes", 0),
        ):
            whole(name, getattr(self, name), least)
        at_least("seed", self.seed, 0)
        check_range("noise", self.noise)
        check_range("pump", self.pump)
        for name, share in (self.controllers or {}).items():
            one_of("controllers", name, CONTROLLERS)
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < math.inf:
                raise ArgumentError(f"controllers.{name} is {share!r}; give a number that is not negative")
        if self.controllers is not None and not any(share > 0 for share in self.controllers.values()):
            raise ArgumentError(f"controllers is {dict(self.controllers)}; at least one must have a share above 0")


@dataclass(frozen=True)
class CollectResult:
    """What is there after collecting.

    Attributes:
        files: The shards in order.
        returns: Returns of the episodes by ``(task, controller)``, float64; those with exploring starts have the controller ``exploring``.
        steps: Number of agent steps.
        failures: For each episode that was left out, by file and number, what the simulator did.
    """

    files: list[Path]
    returns: dict[tuple[str, str], Tensor]
    steps: int
    failures: dict[str, str]


def collect(config: CollectConfig) -> CollectResult:
    """Record the missing shards.

    A shard made with the same settings and simulator is kept and any other refused, so running again resumes a killed run. An episode
    depends only on the settings, its task and its number. One in which the simulator raises or returns something that is not finite is
    left out whole; its shard and the result name it.

    Raises:
        DataError: An existing shard has other settings or is damaged, or no episode of a shard could be recorded.
        WorkerError: A worker process ended, for instance killed. The shards that are there are whole.
        OutputError: The folder cannot be written.
        MissingPackageError: dm_control is not installed.
        ArgumentError: A controller does not fit a task.
    """
    output_folder(config.out)
    settings = RecordConfig(**{f.name: getattr(config, f.name) for f in fields(RecordConfig)})
    envs = [make_env(task, action_repeat=config.action_repeat) for task in config.tasks]
    for env in envs:
        check_fits(settings, env, exploring=config.exploring > 0)
    sizes = max(env.observation_dim for env in envs), max(env.action_dim for env in envs)
    jobs = [job for number, env in enumerate(envs) for job in _jobs(config, config.tasks[number], number, env.action_dim, sizes)]
    todo = [job for job in jobs if not _done(job)]
    calls = [call for job in todo for call in job.calls()]
    with bar(len(calls), "collect") as progress, _recordings(settings, calls, config.processes) as recordings:
        for job in todo:
            held = []
            for recording in itertools.islice(recordings, job.parameters["count"]):
                held.append(recording)
                note = recording.failure or f"return {float(recording.rew.sum(dtype='float64')):.0f}"
                progress.advance(note=f"{recording.settings['controller']}: {note}")
            _write(job, held)
    return _result(config, [job.path for job in jobs])


@dataclass(frozen=True)
class _Job:
    """One shard to record."""

    path: Path
    exploring: bool
    parameters: dict[str, Any]

    def calls(self) -> list[tuple[str, bool, int]]:
        """Return the arguments of ``Recorder.record`` for its episodes."""
        task, first, count = (self.parameters[key] for key in ("task", "first", "count"))
        return [(task, self.exploring, i) for i in range(first, first + count)]


def _jobs(config: CollectConfig, task: str, number: int, action_dim: int, sizes: tuple[int, int]) -> list[_Job]:
    told = {"task": task, "number": number, "sizes": sizes, "action_dim": action_dim, "versions": versions(task)}  # without padding
    common = {"action_repeat": config.action_repeat, "seed": config.seed}
    full: dict[str, Any] = {"controllers": controllers_of(config.controllers, task), "noise": config.noise, "pump": config.pump}
    short: dict[str, Any] = {"exploring_steps": config.exploring_steps}
    jobs = []
    for exploring, episodes, settings in ((False, config.episodes, full), (True, config.exploring, short)):
        name = re.sub(r"[^\w.-]", "_", task) + ("_exploring" if exploring else "")
        for place, first in enumerate(range(0, episodes, config.per_shard)):
            made = {**common, **settings, **told, "first": first, "count": min(config.per_shard, episodes - first)}
            jobs.append(_Job(Path(config.out) / f"{name}_{place:04d}.pt", exploring, json.loads(json.dumps(made))))
    return jobs


def _done(job: _Job) -> bool:
    if not job.path.exists():
        return False
    require_made_with(job.path, ReplayShard(job.path).parameters, job.parameters)
    return True


@contextlib.contextmanager
def _recordings(config: RecordConfig, calls: Sequence[tuple[str, bool, int]], processes: int) -> Iterator[Iterator[Recording]]:
    """Yield the recordings of the calls of ``Recorder.record``, in order, made in this process or by workers."""
    count = min(processes, len(calls))
    if count == 0:
        recorder = Recorder(config)
        yield (recorder.record(*call) for call in calls)
        return
    workers: list[Worker] = []
    try:
        for w in range(count):
            remedy = "run again, which goes on at the first missing shard"
            workers.append(Worker(partial(Recorder, config), f"worker {w + 1} of {count}", "which records episodes", remedy))
        answers(workers)
        yield in_order(workers, "record", calls)
    finally:
        end(workers)


def _write(job: _Job, recordings: Sequence[Recording]) -> None:
    """Write the shard of a job; episodes in which the simulator failed are left out and named in its parameters."""
    kept = [recording for recording in recordings if recording.failure is None]
    first, (observation_dim, action_dim), number = (job.parameters[key] for key in ("first", "sizes", "number"))
    failed = {first + i: recording.failure for i, recording in enumerate(recordings) if recording.failure is not None}
    if not kept:
        raise DataError(f"no episode of {job.path} could be recorded: {next(iter(failed.values()))}")
    episodes = []
    for recording in kept:
        obs, act = torch.from_numpy(recording.obs), torch.from_numpy(recording.act)
        obs, act = pad(obs, (0, observation_dim - obs.shape[1])), pad(act, (0, action_dim - act.shape[1]))
        episodes.append(Episode(obs, act, torch.from_numpy(recording.rew), number))
    told = {**job.parameters, "controllers_used": [recording.settings for recording in kept]}
    if failed:
        told["failed"] = failed
    write_shard(job.path, episodes, told)


def _result(config: CollectConfig, files: list[Path]) -> CollectResult:
    returns: dict[tuple[str, str], list[float]] = {}
    failures: dict[str, str] = {}
    steps = 0
    for file in files:
        shard = ReplayShard(file, verify=False)
        task = shard.parameters["task"]
        for settings, value in zip(shard.parameters["controllers_used"], ReplaySet([shard]).returns().tolist(), strict=True):
            returns.setdefault((task, settings["controller"]), []).append(value)
        failures |= {f"{file.name}, episode {i}": reason for i, reason in shard.parameters.get("failed", {}).items()}
        steps += len(shard) * shard.length
    found = {key: torch.tensor(values, dtype=torch.float64) for key, values in sorted(returns.items())}
    return CollectResult(files, found, steps, failures)
