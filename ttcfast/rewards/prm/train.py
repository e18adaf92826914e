"""Trains a reward model on triplets: ``train_prm`` as in the plan's sketch, and ``train`` for ``ttcfast train_prm``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from typing import Any

from ttcfast.runtime.distributed import process_group, ranks

from .network import PairNetwork
from .training.config import (
    DataOptions,
    ModelOptions,
    OptimOptions,
    SchedOptions,
    SurrogateOptions,
    TrainPRMConfig,
    TrainPRMResult,
)
from .training.losses import LossOptions, triplet_margin_loss
from .training.run import PRMTraining
from .triplets.batches import AugmentOptions
from .triplets.file import Place

__all__ = [
    "DataOptions",
    "ModelOptions",
    "OptimOptions",
    "SchedOptions",
    "SurrogateOptions",
    "TrainPRMConfig",
    "TrainPRMResult",
    "train_prm",
    "triplet_margin_loss",
]


def train_prm(
    manifest_paths: Place | Iterable[Place],
    in_ch: int,
    epochs: int = 50,
    lr: float = 3e-4,
    margin: float = 0.2,
    bs: int = 32,
    *,
    out: Place | None = None,
    **options: Any,
) -> PairNetwork:
    """Train a reward model as in the plan's sketch; ``ttcfast train_prm`` and ``TrainPRMConfig`` have further settings.

    Args:
        manifest_paths: As for ``PRMTripletSet``.
        in_ch: 2C, checked against the triplets.
        epochs, lr, margin, bs: As in the sketch.
        out: Folder for the model, its log and the training state; None keeps nothing.
        options: Fields of ``TrainPRMConfig`` and of its groups, as mappings (``model={"kind": "dense"}``).

    Returns:
        The trained ``PRM`` (or ``DensePRM``), in evaluation.

    Raises:
        ValueError: An option is out of range, the margin is not finite and positive, or ``in_ch`` differs.
        DataError: There are no triplets.
        TrainingError: The loss is not finite.

    Source: TTC plan, "Process Reward Model (PRM)".
    """
    one = isinstance(manifest_paths, (str, os.PathLike))
    roots = (str(manifest_paths),) if one else tuple(str(p) for p in manifest_paths)  # type: ignore[union-attr]
    groups = {"model": ModelOptions, "augment": AugmentOptions, "sched": SchedOptions, "fm": SurrogateOptions}
    given = {name: groups[name](**value) if name in groups and isinstance(value, dict) else value for name, value in options.items()}
    more = {name: given.pop(name, {}) for name in ("data", "optim", "loss")}
    with tempfile.TemporaryDirectory() as scratch:
        config = TrainPRMConfig(
            data=DataOptions(**{"root": roots, **more["data"]}),
            optim=OptimOptions(**{"epochs": epochs, "lr": lr, "batch": bs, **more["optim"]}),
            loss=LossOptions(**{"margin": margin, **more["loss"]}),
            out=str(scratch if out is None else out),
            **given,
        )
        return train(config, in_ch=in_ch).prm


def train(config: TrainPRMConfig, *, in_ch: int | None = None) -> TrainPRMResult:
    """Train, or continue training, and write the reward model.

    A run that is killed and restarted ends with the same weights as an uninterrupted one (bit for bit on one machine with the same number
    of threads), unless ``max_seconds`` ends it. Processes under torchrun share each batch and follow the losses of a single process.

    Raises:
        As ``train_prm``.
        CheckpointError: ``out`` holds a run with other settings or triplets (the same triplets may have moved), or another surrogate.
    """
    with process_group() as device:
        training = PRMTraining(config, device if ranks() > 1 else None, in_ch)
        training.train()
        return training.result()
