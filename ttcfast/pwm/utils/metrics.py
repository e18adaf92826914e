"""Measures of a world model and of the gradients through it."""

from ttcfast.esnr.meter import ESNRMeter, Measurement
from ttcfast.esnr.ratio import ESNR, esnr
from ttcfast.pwm.evaluation.parity import parameter_parity

__all__ = ["ESNR", "ESNRMeter", "Measurement", "esnr", "parameter_parity"]
