"""World models of MLP, residual and flow dynamics, and policies that learn inside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .algorithms import PWM

__all__ = ["PWM"]


def __getattr__(name: str) -> Any:
    """Import ``PWM`` when it is first used: the simulator's worker processes need no torch."""
    if name != "PWM":
        raise AttributeError(f"module 'ttcfast.pwm' has no attribute {name!r}; it has PWM")
    from .algorithms import PWM

    return PWM
