"""Environments for data collection and evaluation, pools of them, and scripted controllers."""

from .base import Environment, PaddedEnv
from .controllers import Controller, RandomController, SwingUpController
from .dm_control import TASKS, DMControlEnv
from .gymnasium import GymnasiumEnv, as_gymnasium
from .make import make_env
from .pool import EnvPool

__all__ = [
    "TASKS",
    "Controller",
    "DMControlEnv",
    "EnvPool",
    "Environment",
    "GymnasiumEnv",
    "PaddedEnv",
    "RandomController",
    "SwingUpController",
    "as_gymnasium",
    "make_env",
]
