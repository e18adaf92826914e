"""Declares the layout of a state: what its channels are, what of them is conserved or bounded, and the domain that they live on.

``StateSpec.fields`` declares states of any physics by the names of their channels; ``EulerSpec`` is the layout of a compressible gas, whose
pressure law the channels' names alone do not tell.
"""

from .base import StateSpec
from .euler import EulerSpec
from .fields import FieldSpec
from .symmetry import Symmetry

__all__ = ["EulerSpec", "FieldSpec", "StateSpec", "Symmetry"]
