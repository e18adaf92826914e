"""Operations with a reference, a CPU and a GPU implementation that agree; each is also ``torch.ops.ttcfast.<name>``."""

from .arm import ArmScores, arm
from .info import Info, info
from .registry import BackendError

__all__ = ["ArmScores", "BackendError", "Info", "arm", "info"]
