"""Solvers and initial conditions: compressible Euler by finite volumes, incompressible Navier-Stokes in two dimensions by spectra."""

from . import initial_conditions
from .equation_of_state import to_conserved, to_primitive
from .navier_stokes import VorticitySolver
from .solver import EulerSolver, SolverError

__all__ = ["EulerSolver", "SolverError", "VorticitySolver", "initial_conditions", "to_conserved", "to_primitive"]
