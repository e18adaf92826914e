"""The logic of ``ttcfast build_prm_data``: triplets from a checkpoint and trajectory files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ttcfast.checks import whole
from ttcfast.data import ReadOptions
from ttcfast.models.factory import check_one_model, name_of_model, open_surrogate, provenance_of
from ttcfast.models.on_grid import open_on_grid, require_directions_fit
from ttcfast.rewards.prm.triplets.build import TripletConfig, build_triplets
from ttcfast.runtime.devices import device_of
from ttcfast.runtime.files import write_json
from ttcfast.spec import StochasticConfig

SPLIT_NAMES = {"train_small": "reward"}  # the plan's name for the trajectories held out of the surrogate's training


@dataclass(frozen=True)
class BuildPRMDataConfig:
    """Configuration of a triplet file.

    Args:
        checkpoint, factory, args: The surrogate, as in ``RunTTCConfig``.
        data: Trajectory files or folders of them.
        split: Split of the data; ``"train_small"`` is the plan's name for ``"reward"``.
        reading: Format of the files, and what it leaves open.
        trajectories: Number of trajectories, taken in turn from each file; None takes all.
        builder: K, T_prm and the ranking of candidates.
        stochastic: What makes candidates differ, as in the rollouts in which the reward will choose; None is the surrogate's own.
        out: Folder for ``triplets.hdf5``, or the name of the file.
        device: Device of the surrogate.
    """

    checkpoint: str | None
    data: tuple[str, ...]
    split: str | None = "reward"
    reading: ReadOptions = field(default_factory=ReadOptions)
    factory: str | None = field(default=None, kw_only=True)
    args: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    trajectories: int | None = None
    builder: TripletConfig = field(default_factory=TripletConfig)
    stochastic: StochasticConfig | None = field(default_factory=StochasticConfig)
    out: str = "data/prm_triplets"
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_one_model(self.checkpoint, self.factory, self.args)
        if self.trajectories is not None:
            whole("trajectories", self.trajectories, 1)


def build_prm_data(config: BuildPRMDataConfig) -> Path:
    """Build the triplet file and return its path; resuming and errors as in ``build_triplets``.

    Raises:
        CheckpointError: The checkpoint is missing, damaged or of another architecture.
        ArgumentError: The device does not exist.
    """
    surrogate = open_surrogate(config.checkpoint, config.factory, config.args, device=device_of(config.device))
    split = None if config.split is None else SPLIT_NAMES.get(config.split, config.split)
    found = open_on_grid(config.data, split, config.reading, surrogate, name_of_model(config.checkpoint, config.factory))
    require_directions_fit(found, config.stochastic or surrogate.stochastic)
    source = found.first(config.trajectories).converted(surrogate.spec)
    path = build_triplets(
        surrogate,
        source,
        config.out,
        **dataclasses.asdict(config.builder),
        stochastic=config.stochastic,
        source=f"{', '.join(config.data)}{f', split {split}' if split else ''}",
    )
    if model := provenance_of(surrogate):
        write_json(path.with_name(f"{path.stem}.model.json"), model["model"])
    return path
