"""Trajectory files of simulations, and replay shards of episodes: making, reading, splits, statistics."""

from .convert import to_spec
from .episodes import Episode
from .formats import ReadOptions, open_trajectories
from .generate import SPLITS, GenerateConfig, generate
from .minari import open_minari
from .pdebench import PDEBenchFile
from .pdegym import PDEGymFile
from .reader import TrajectoryReader
from .replay import ReplaySampler, ReplaySet, Windows
from .replay_shard import ReplayShard, write_shard
from .statistics import Statistics, field_statistics, write_statistics
from .trajectory_file import TrajectoryFile, find_files, read_trajectories
from .trajectory_set import TrajectorySet
from .well_layout import write_well

__all__ = [
    "SPLITS",
    "Episode",
    "GenerateConfig",
    "PDEBenchFile",
    "PDEGymFile",
    "ReadOptions",
    "ReplaySampler",
    "ReplaySet",
    "ReplayShard",
    "Statistics",
    "TrajectoryFile",
    "TrajectoryReader",
    "TrajectorySet",
    "Windows",
    "field_statistics",
    "find_files",
    "generate",
    "open_minari",
    "open_trajectories",
    "read_trajectories",
    "to_spec",
    "write_shard",
    "write_statistics",
    "write_well",
]
