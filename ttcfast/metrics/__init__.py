"""Rollout errors, conservation drift, SampleGain and calibration, each under the field's name and summed in float64."""

from .calibration import Calibration, calibration
from .conservation import conservation_drift
from .rollout_errors import nrmse, relative_l1, rollout_mse, vrmse
from .sample_gain import fraction_improved, sample_gain
from .spectrum import band_variances

__all__ = [
    "rollout_mse",
    "nrmse",
    "vrmse",
    "relative_l1",
    "band_variances",
    "conservation_drift",
    "sample_gain",
    "fraction_improved",
    "Calibration",
    "calibration",
]
