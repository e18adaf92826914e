"""What a world model and the gradients through it are measured by."""

from .esnr_meter import ESNRMeter, Measurement
from .parity import parameter_parity
from .signal_to_noise import ESNR, esnr

__all__ = ["ESNR", "ESNRMeter", "Measurement", "esnr", "parameter_parity"]
