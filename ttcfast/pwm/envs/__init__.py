"""Environments for data collection and evaluation, pools of them, and scripted controllers."""

from .base import Environment, PaddedEnv
from .controllers import Controller, RandomController, SwingUpController
from .dm_control import TASKS, DMControlEnv
from .pool import EnvPool, WorkerError

__all__ = [
    "TASKS",
    "Controller",
    "DMControlEnv",
    "EnvPool",
    "Environment",
    "PaddedEnv",
    "RandomController",
    "SwingUpController",
    "WorkerError",
]
