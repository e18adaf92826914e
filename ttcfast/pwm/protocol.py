"""Trains policies inside world models of several kinds: every task with every arm and random seed, finished runs kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from ttcfast.checks import each_once
from ttcfast.runtime.errors import ArgumentError
from ttcfast.runtime.files import output_folder
from ttcfast.runtime.locks import run_lock
from ttcfast.runtime.progress import bar

from .arms import Arm, check_runs
from .policy_config import PolicySettings, TrainPolicyConfig, agent_config
from .policy_result import PolicyResult
from .train_policy import task_of
from .train_together import train_policies
from .train_wm import Material

ARMS = ("mlp", "residual", "euler1", "heun2", "heun4")


@dataclass(frozen=True)
class ProtocolConfig(PolicySettings):
    """Settings of ``ttcfast protocol``; those that are not named here are of every run.

    Args:
        data: Folders of replay shards, each of one task, no two of the same.
        out: Folder that receives ``<task>/<arm>_seed<k>/`` for each run, with the files of ``ttcfast train_policy``.
        arms: Kinds of dynamics, ``mlp``, ``residual`` or flows as ``heun<K>`` or ``euler<K>``. Heun evaluates the network 2 K times per
            imagined step, Euler K times.
        seeds: Random seeds; runs of one seed have the same batches and the same initial actor and critic.
        together: Whether the random seeds of an arm train at once where they can (:func:`ttcfast.pwm.train_together.train_policies`), with
            the same results in less time. Online and in dmo they cannot: every seed has data of its own length there, and a simulator.
    """

    data: tuple[str, ...] = ("data/cartpole",)
    out: str = "runs/protocol"
    arms: tuple[str, ...] = ARMS
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    together: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("data", "arms", "seeds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        each_once("data", self.data)
        check_runs(self.arms, self.seeds)


def protocol(config: ProtocolConfig) -> list[PolicyResult]:
    """Train every arm with every seed on every task, except for runs that are finished, and return all in this order.

    Offline the random seeds of an arm train together if ``together``. Otherwise seeds come before arms, so that what a killed protocol
    leaves can be compared. Tasks, settings and the parity of all arms are checked before the first run. Every run locks its own folder:
    processes with different arms, seeds or data work side by side in one ``out``, and a last call gathers the results.

    Raises:
        ArgumentError: Two folders are of one task, or a setting does not fit the data, the models or the task.
        OutputError: Another process trains one of the runs.
        Others as :func:`ttcfast.pwm.train_policy.train_policy`.
    """
    out, found = output_folder(config.out), {}
    tasks = _tasks(config)
    with bar(len(tasks) * len(config.arms) * len(config.seeds) * (config.wm_steps + config.steps), "protocol") as progress:

        def note(run: TrainPolicyConfig, steps: float, text: str | None) -> None:
            progress.advance(steps, note=f"{tasks[run.data]}, {Arm(run.arm).label}, seed {run.seed}: {text or ''}")

        for group in _groups(config, out, tasks):
            with ExitStack() as locks:
                for run in group:
                    locks.enter_context(run_lock(run.out))
                for run, result in zip(group, train_policies(group, [partial(note, run) for run in group])):
                    found[run.data, run.arm, run.seed] = result
    return [found[data, arm, seed] for data in config.data for arm in config.arms for seed in config.seeds]


def _tasks(config: ProtocolConfig) -> dict[str, str]:
    """Return the task of every folder, having built what the runs will build first."""
    tasks: dict[str, str] = {}
    agent_config(config.agent)
    for place in config.data:
        material = Material(place, config)
        task, _ = task_of(material.train, place)
        if earlier := next((other for other, name in tasks.items() if name == task), None):
            raise ArgumentError(f"data names {earlier} and {place}, both of {task}; give one folder per task")
        tasks[place] = task
        for arm in config.arms:
            material.agent(Arm(arm).configure(config.alg), config.device)
    return tasks


def _groups(config: ProtocolConfig, out: Path, tasks: dict[str, str]) -> Iterator[list[TrainPolicyConfig]]:
    """Yield the runs in their order, those that may train together in one list."""
    shared = {field.name: getattr(config, field.name) for field in fields(PolicySettings)}
    for data, task in tasks.items():
        folder = out / re.sub(r"[^\w.+-]+", "_", task)
        runs = {
            (arm, seed): TrainPolicyConfig(data=data, out=str(folder / f"{arm}_seed{seed}"), arm=arm, seed=seed, **shared)
            for seed in config.seeds
            for arm in config.arms
        }
        if config.together and config.mode == "offline":
            yield from ([runs[arm, seed] for seed in config.seeds] for arm in config.arms)
        else:
            yield from ([run] for run in runs.values())
