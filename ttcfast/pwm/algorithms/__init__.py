"""Rollouts, losses and updates of world models."""

from .dynamics_loss import DynamicsLoss, FlowMatchingDynamicsLoss, MLPDynamicsLoss
from .pwm import PWM, WorldModelLoss

__all__ = ["PWM", "DynamicsLoss", "FlowMatchingDynamicsLoss", "MLPDynamicsLoss", "WorldModelLoss"]
