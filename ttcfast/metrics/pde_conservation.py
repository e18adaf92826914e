"""Keeps the plan's module path for the conservation metrics; they live in ``ttcfast.metrics.conservation``."""

from .conservation import conservation_drift, conserved_fields

__all__ = ["conservation_drift", "conserved_fields"]
