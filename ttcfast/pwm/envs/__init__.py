"""Environments for data collection and evaluation, and scripted controllers for them."""

from .controllers import Controller, RandomController, SwingUpController
from .dm_control import TASKS, DMControlEnv

__all__ = ["TASKS", "Controller", "DMControlEnv", "RandomController", "SwingUpController"]
