"""World models of MLP, residual and flow dynamics, and policies that learn inside them."""

from .algorithms import PWM

__all__ = ["PWM"]
