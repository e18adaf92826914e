"""Trajectory files: making, reading, splits, statistics."""

from .generate import SPLITS, GenerateConfig, generate
from .statistics import Statistics, field_statistics, write_statistics
from .trajectory_file import TrajectoryFile, find_files, read_trajectories
from .well_layout import write_well

__all__ = [
    "SPLITS",
    "GenerateConfig",
    "Statistics",
    "TrajectoryFile",
    "field_statistics",
    "find_files",
    "generate",
    "read_trajectories",
    "write_statistics",
    "write_well",
]
