"""The logic of ``ttcfast build_prm_data``: triplets from a checkpoint and trajectory files."""

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
    """Configuration of a triplet file.

    Args:
        checkpoint: The surrogate, a file of ``ttcfast train_fm``.
        data: Trajectory files or folders of them.
        split: Split of the data; ``"train_small"`` is the plan's name for ``"reward"``.
        reading: Format of the files, and what it leaves open.
        trajectories: Number of trajectories, taken in turn from each file; None takes all.
        builder: K, T_prm and the ranking of candidates.
        stochastic: What makes candidates differ, as in the rollouts in which the reward will choose.
        out: Folder for ``triplets.hdf5``, or the name of the file.
        device: Device of the surrogate.
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
    """Build the triplet file and return its path; resuming and errors as in ``build_triplets``.

    Raises:
        CheckpointError: The checkpoint is missing, damaged or of another architecture.
        ArgumentError: The device does not exist.
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
