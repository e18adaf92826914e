"""Settings and result of training a reward model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ttcfast.checks import at_least, one_of, whole
from ttcfast.rewards.prm.network import PairNetwork
from ttcfast.rewards.prm.triplets.batches import AugmentOptions
from ttcfast.runtime.errors import ArgumentError

from .losses import LossOptions


@dataclass(frozen=True)
class DataOptions:
    """Triplets to train on, and the held-out share.

    Args:
        root: Triplet files, folders of them, or a ``.txt`` file that names some; one or a list.
        valid: Share of the trajectories held out for validation; 0 for none.
        valid_samples: Largest number of held-out samples to use.
        valid_groups: Number of samples whose K candidates are all regenerated from their keys (with ``fm.ckpt``) and kept: 6 MB each at
            K = 100, 64x64.
    """

    root: str | tuple[str, ...] = "data/prm_triplets"
    valid: float = 0.125
    valid_samples: int = 256
    valid_groups: int = 16

    def __post_init__(self) -> None:
        whole("valid_samples", self.valid_samples, 1)
        whole("valid_groups", self.valid_groups, 0)
        if not 0 <= self.valid < 1:
            raise ArgumentError(f"valid is {self.valid}; give a share of the trajectories in [0, 1)")


@dataclass(frozen=True)
class ModelOptions:
    """Kind and sizes of the network.

    Args:
        kind: ``"scalar"`` (``PRM``) or ``"dense"`` (``DensePRM``).
        size: Name in ``sizes.SIZES``, or None for the plan's.
        width, depth, levels, patch, padding: Override those of ``size``; see the classes.
        init: Reward model to start from.
    """

    kind: str = "scalar"
    size: str | None = None
    width: int | tuple[int, ...] | None = None
    depth: int | tuple[int, ...] | None = None
    levels: int | None = None
    patch: int | None = None
    padding: str = "boundary"
    init: str | None = None

    def sizes(self) -> dict[str, Any]:
        return {"width": self.width, "depth": self.depth, "levels": self.levels, "patch": self.patch}


@dataclass(frozen=True)
class OptimOptions:
    """Options of the optimizer.

    Args:
        lr, weight_decay, warmup, clip: AdamW with linear warm-up (in steps) and clipped gradient norm.
        batch: Samples per step over all processes.
        epochs: Length of the run in epochs.
        steps: Length in steps, which overrides ``epochs``.
        max_seconds: Stop after so many seconds; the schedule then follows the time.
        ema: Decay of the weight average, which is validated and saved.
    """

    lr: float = 3e-4
    weight_decay: float = 1e-4
    warmup: int = 50
    clip: float = 1.0
    batch: int = 32
    epochs: int = 50
    steps: int | None = None
    max_seconds: float | None = None
    ema: float = 0.99

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("epochs", 1), ("warmup", 0), *((("steps", 1),) if self.steps is not None else ())):
            whole(name, getattr(self, name), least)
        for name in ("lr", "weight_decay", "clip"):
            at_least(name, getattr(self, name), 0)
        if not 0 <= self.ema < 1:
            raise ArgumentError(f"ema is {self.ema}; give a number in [0, 1)")


@dataclass(frozen=True)
class SchedOptions:
    """Schedule of the learning rate.

    Args:
        cosine: Whether the learning rate decays to 1 % by a cosine; False keeps it constant after the warm-up.
    """

    cosine: bool = True


@dataclass(frozen=True)
class SurrogateOptions:
    """Surrogate of the triplets.

    Args:
        ckpt: Checkpoint with which to validate on all K candidates; None validates on the stored ones. Another surrogate is refused.
    """

    ckpt: str | None = None


@dataclass(frozen=True)
class TrainPRMConfig:
    """Settings of ``ttcfast train_prm``.

    Args:
        data, fm, model, optim, sched, loss, augment: See their classes.
        out: Receives the reward model (``config.json``, ``model.safetensors``), ``training.safetensors`` (to resume) and the logs.
        val_every, save_every, log_every: Intervals in steps.
        patience: Stop if the validation loss has not improved for so many validations.
        precision: ``"float32"``, or ``"bfloat16"`` autocast.
        compile: Compile the loss.
        channels_last: Store weights and activations channels last.
        resume: Continue a killed run in ``out``, to the same weights.
        device: Device of a single process; under torchrun each process takes a GPU (NCCL), or the CPU (gloo) if there are too few.
    """

    data: DataOptions = field(default_factory=DataOptions)
    fm: SurrogateOptions = field(default_factory=SurrogateOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    sched: SchedOptions = field(default_factory=SchedOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    out: str = "runs/train_prm"
    val_every: int = 200
    save_every: int = 200
    log_every: int = 25
    patience: int | None = None
    precision: str = "float32"
    compile: bool = False
    channels_last: bool = False
    resume: bool = True
    seed: int = 0
    device: str = "cpu"
    tensorboard: bool = False
    wandb: str | None = None

    def __post_init__(self) -> None:
        one_of("precision", self.precision, ("float32", "bfloat16"))
        for name, least in (("val_every", 1), ("save_every", 1), ("log_every", 1), ("seed", 0)):
            whole(name, getattr(self, name), least)
        if self.patience is not None:
            whole("patience", self.patience, 1)

    def settings(self) -> dict[str, Any]:
        """Return the settings that a resume may not change as JSON; the triplets are compared by ``Triplets.fingerprint``."""
        free = {"out", "resume", "device", "compile", "val_every", "save_every", "log_every", "patience", "tensorboard", "wandb"}
        found = {k: v for k, v in json.loads(json.dumps(asdict(self))).items() if k not in free}
        found["optim"].pop("max_seconds")
        found["data"] = {k: v for k, v in found["data"].items() if k == "valid"}
        return {k: v for k, v in found.items() if k != "fm"}


@dataclass(frozen=True)
class TrainPRMResult:
    """The reward model (averaged weights of the best validation), its path, the number of steps and its validation."""

    prm: PairNetwork
    folder: Path
    steps: int
    validation: dict[str, float]
