"""Triplets from a checkpoint and trajectory files: the logic of ``ttcfast build_prm_data``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from ttcfast.checks import whole
from ttcfast.data import ReadOptions
from ttcfast.models import load_surrogate
from ttcfast.models.on_grid import open_on_grid, require_directions_fit
from ttcfast.rewards.prm.triplets.build import TripletConfig, build_triplets
from ttcfast.runtime.devices import device_of
from ttcfast.spec import StochasticConfig

SPLIT_NAMES = {"train_small": "reward"}  # the plan's name for the trajectories held out of the surrogate's training


@dataclass(frozen=True)
class BuildPRMDataConfig:
    """Triplets of the reward split.

    Args:
        checkpoint: the surrogate, as ``ttcfast train_fm`` writes it.
        data: trajectory files or folders of them. reading: their format, and what it leaves open.
        split: of the data; ``"train_small"`` is the plan's name for ``"reward"``.
        trajectories: how many to take, the first of each file, then the second of each; None takes all.
        builder: K, T_prm and how candidates are ranked.
        stochastic: what makes candidates differ: as in the rollouts in which the reward will choose.
        out: folder for ``triplets.hdf5``, or the name of the file.
        device: where the surrogate runs.
    """

    checkpoint: str
    data: tuple[str, ...]
    split: str | None = "reward"
    reading: ReadOptions = field(default_factory=ReadOptions)
    trajectories: int | None = None
    builder: TripletConfig = field(default_factory=TripletConfig)
    stochastic: StochasticConfig = field(default_factory=StochasticConfig)
    out: str = "data/prm_triplets"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.trajectories is not None:
            whole("trajectories", self.trajectories, 1)


def build_prm_data(config: BuildPRMDataConfig) -> Path:
    """Make the triplet file and return its path; arguments, resuming and errors as ``build_triplets``.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of another architecture. ArgumentError: a device that is not there.
    """
    surrogate = load_surrogate(config.checkpoint, device=device_of(config.device))
    split = None if config.split is None else SPLIT_NAMES.get(config.split, config.split)
    found = open_on_grid(config.data, split, config.reading, surrogate, config.checkpoint)
    require_directions_fit(found, config.stochastic)
    source = found.first(config.trajectories).converted(surrogate.spec)
    return build_triplets(
        surrogate,
        source,
        config.out,
        **dataclasses.asdict(config.builder),
        stochastic=config.stochastic,
        source=f"{', '.join(config.data)}{f', split {split}' if split else ''}",
    )
