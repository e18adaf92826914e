"""Rollouts, losses and updates of world models and of the policies inside them."""

from .actor_critic import ActorCritic, AgentConfig
from .dynamics_loss import DynamicsLoss, FlowMatchingDynamicsLoss, MLPDynamicsLoss
from .pwm import PWM, WorldModelLoss

__all__ = ["PWM", "ActorCritic", "AgentConfig", "DynamicsLoss", "FlowMatchingDynamicsLoss", "MLPDynamicsLoss", "WorldModelLoss"]
