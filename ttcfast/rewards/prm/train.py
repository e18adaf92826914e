"""Training a reward model on triplets: ``train_prm`` as in the seed, and what is behind it, the run of ``ttcfast train_prm``."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ttcfast.checks import at_least, one_of, whole
from ttcfast.runtime.errors import ArgumentError

from .network import PairNetwork
from .training.losses import LossOptions, triplet_margin_loss
from .triplets.batches import AugmentOptions
from .triplets.file import Place

__all__ = ["TrainPRMConfig", "train_prm", "triplet_margin_loss"]


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
    """Train a reward model, as in the sketch; ``ttcfast train_prm`` and ``TrainPRMConfig`` have the rest.

    Args:
        manifest_paths: as ``PRMTripletSet`` takes them.
        in_ch: 2C, checked against the triplets.
        epochs, lr, margin, bs: the sketch's.
        out: folder for the model, its log and what a resume needs; None keeps nothing.
        options: fields of ``TrainPRMConfig``; of its groups too, as mappings (``model={"kind": "dense"}``).

    Returns:
        The trained ``PRM`` (or ``DensePRM``), in evaluation.

    Raises:
        ValueError: an option out of range, a margin that is no finite number above 0, another ``in_ch``. DataError: no triplets.
        TrainingError: the loss is not finite.

    Source: seeds/ttc-integration-plan.md section 5.
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
    """Train, or go on training, and write the reward model.

    A run that is killed and started again ends with the same weights as one that was not (bit for bit on one machine with the same number
    of threads), unless ``max_seconds`` ends it. Several processes under torchrun share each batch and follow the single process's losses.

    Raises:
        As ``train_prm``. CheckpointError: ``out`` holds a run of other settings, or of other triplets (the same ones may lie elsewhere).
        CheckpointError, DataError: another surrogate.
    """
    from ttcfast.runtime.distributed import process_group, ranks

    from .training.run import run

    with process_group() as device:
        return run(config, device if ranks() > 1 else None, in_ch)
