"""Figures, one kind a file. Each function returns a matplotlib ``Figure`` made without pyplot, so none leaves global state."""

from .calibration_buckets import calibration_figure, calibration_rows
from .drift import drift_against_branching, drift_against_time
from .errors import error_against_branching, error_against_evaluations, error_against_seconds, error_against_time
from .gain_histogram import gain_histogram
from .panels import field_panels
from .style import save

__all__ = [
    "calibration_figure",
    "calibration_rows",
    "drift_against_branching",
    "drift_against_time",
    "error_against_branching",
    "error_against_evaluations",
    "error_against_seconds",
    "error_against_time",
    "field_panels",
    "gain_histogram",
    "save",
]
