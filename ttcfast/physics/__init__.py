"""Compressible Euler: equation of state, boundary conditions, finite-volume solver, initial conditions."""

from . import initial_conditions
from .equation_of_state import to_conserved, to_primitive
from .solver import EulerSolver, SolverError

__all__ = ["EulerSolver", "SolverError", "initial_conditions", "to_conserved", "to_primitive"]
