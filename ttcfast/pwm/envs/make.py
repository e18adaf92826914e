"""Environments by the name of their task."""

from __future__ import annotations

from ttcfast.runtime.errors import ArgumentError

from . import dm_control
from .base import Environment
from .dm_control import TASKS, DMControlEnv
from .gymnasium import GymnasiumEnv, package

GYMNASIUM = "gymnasium:"


def make_env(task: str, *, action_repeat: int = 2) -> Environment:
    """Return the environment of a task.

    Args:
        task: A name in ``TASKS``, or ``"gymnasium:"`` and a name registered there, such as ``"gymnasium:Pendulum-v1"``.
        action_repeat: Simulation steps per agent step.

    Raises:
        ArgumentError: The task is unknown, or does not fit; see ``DMControlEnv`` and ``GymnasiumEnv``.
        MissingPackageError: A package that the task needs is not installed.
    """
    check_task("task", task)
    if task.startswith(GYMNASIUM):
        return GymnasiumEnv(task.removeprefix(GYMNASIUM), action_repeat=action_repeat)
    return DMControlEnv(task, action_repeat=action_repeat)


def check_task(name: str, task: str) -> None:
    """Raise ``ArgumentError`` unless the argument ``name`` is a task of ``TASKS`` or one of gymnasium."""
    if task not in TASKS and not (task.startswith(GYMNASIUM) and len(task) > len(GYMNASIUM)):
        known = ", ".join(map(repr, TASKS))
        raise ArgumentError(f"{name} is {task!r}; it must be one of {known}, or '{GYMNASIUM}' and a name registered with gymnasium")


def versions(task: str) -> dict[str, str]:
    """Return the versions of the simulator of a task, on which its physics depends.

    Raises:
        MissingPackageError: It is not installed.
    """
    if task.startswith(GYMNASIUM):
        return {"gymnasium": package().__version__}
    return dm_control.versions()
