"""Settings of a reward model's training, and what the training returns."""

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
    """The triplets, and what of them is held out.

    Args:
        root: triplet files, folders of them, or a ``.txt`` that names some; one or a list.
        valid: share of the trajectories held out for validation; 0 for none.
        valid_samples: at most so many held-out samples are used.
        valid_groups: of so many all K candidates are made again from their keys (with ``fm.ckpt``) and kept: 6 MB each at K = 100, 64x64.
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
    """The network.

    Args:
        kind: ``scalar`` (``PRM``) or ``dense`` (``DensePRM``). size: a name of ``sizes.SIZES``, or None for the sketch's.
        width, depth, levels, patch, padding: replace those of ``size``; see the classes. init: a reward model to go on from.
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
    """Optimisation.

    Args:
        lr, weight_decay, warmup, clip: AdamW with linear warm-up (in steps), the gradient's norm clipped.
        batch: samples per step, of all processes together.
        epochs: length of the run; steps: replaces it. max_seconds: stop after that many (the schedule then follows the time).
        ema: decay of the weight average, which is what is validated and saved.
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
    """The learning rate's course.

    Args:
        cosine: decay of the learning rate to 1 % of it; False keeps it after the warm-up.
    """

    cosine: bool = True


@dataclass(frozen=True)
class SurrogateOptions:
    """The surrogate of the triplets.

    Args:
        ckpt: to validate over all K candidates; None validates on the stored ones. Another surrogate is refused.
    """

    ckpt: str | None = None


@dataclass(frozen=True)
class TrainPRMConfig:
    """What ``ttcfast train_prm`` does.

    Args:
        data, fm, model, optim, sched, loss, augment: see there.
        out: receives the reward model (``config.json``, ``model.safetensors``), ``training.safetensors`` (to resume), the logs.
        val_every, save_every, log_every: in steps. patience: stop when the validation loss has not improved for so many validations.
        precision: float32, or bfloat16 autocast. compile: torch.compile of the loss. channels_last: of weights and activations.
        resume: go on from ``out`` if a killed run is there, to the same weights. device: of a single process; under torchrun each
            process takes a GPU (NCCL), or the CPU (gloo) where there are not enough.
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
        """What a resumed run may not change, as JSON has it; the triplets themselves are compared by ``Triplets.fingerprint``."""
        free = {"out", "resume", "device", "compile", "val_every", "save_every", "log_every", "patience", "tensorboard", "wandb"}
        found = {k: v for k, v in json.loads(json.dumps(asdict(self))).items() if k not in free}
        found["optim"].pop("max_seconds")
        found["data"] = {k: v for k, v in found["data"].items() if k == "valid"}
        return {k: v for k, v in found.items() if k != "fm"}


@dataclass(frozen=True)
class TrainPRMResult:
    """The reward model (averaged weights, the best of the validations), where it lies, the steps done, and its validation."""

    prm: PairNetwork
    folder: Path
    steps: int
    validation: dict[str, float]
