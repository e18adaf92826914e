"""Trains one-step surrogates with input noise, a pushforward phase, averaged weights, validation on rollouts and exact resume."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttcfast.checks import at_least, one_of
from ttcfast.core.base_fm import Surrogate
from ttcfast.core.normalizer import Normalizer
from ttcfast.data import ReadOptions, TrajectorySet, field_statistics
from ttcfast.data.pairs import WindowSampler
from ttcfast.data.symmetry import random_shift, random_symmetry
from ttcfast.metrics import rollout_mse
from ttcfast.runtime.devices import device_of
from ttcfast.runtime.errors import ArgumentError
from ttcfast.runtime.files import output_folder
from ttcfast.runtime.training import LOSSES, Stopwatch, TrainingError, TrainingRun, check_training
from ttcfast.runtime.units import time_step_of
from ttcfast.spec import EulerSpec
from ttcfast.transfer import sent

from .checkpoint import ARCHITECTURES, load_surrogate, save_surrogate, surrogate_meta
from .fno import FNO
from .on_grid import open_conserved
from .quality import one_step_error
from .vit import ViT

__all__ = ["TrainConfig", "TrainResult", "TrainingError", "train"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of ``ttcfast train_fm``.

    Args:
        data: Folder written by ``ttcfast generate``, or data of another format.
        split: Split to train on.
        valid: Number of trajectories of the valid split used for validation.
        reading: Format of the data, and what it leaves open. Primitive variables are converted to conserved ones.
        out: Receives surrogate.safetensors (averaged weights), training.safetensors (to resume), log.jsonl, log.csv.
        architecture: ``"vit"``, or ``"fno"`` for periodic domains.
        model, fno: Sizes of the ViT (ViTConfig) and of the FNO (FNOConfig); channels, grid and periodicity come from the data. Channels
            that the data declare as given are read by the model and left out of the loss.
        init: Checkpoint to start from (fine-tuning); its architecture and normalizer are kept.
        steps, batch, lr, warmup, weight_decay, clip: AdamW with linear warm-up and cosine decay to 1 % of lr.
        input_noise: Standard deviation of Gaussian noise on the normalised input; the target is the clean next state.
        pushforward: Share of each batch that starts from the model's own step, from the fraction ``pushforward_from`` of training on
            (arXiv:2202.03376).
        ema: Decay of the weight average.
        loss: ``"l1"``, ``"mse"`` or ``"huber"`` of the normalised change.
        precision: ``"float32"``, or ``"bfloat16"`` autocast.
        compile: Compile the forward pass of the training step.
        max_seconds: Stop after so many seconds; the schedule then ends with them.
        clock: ``"wall"``, or ``"cpu"`` for this process's processor time, which other work on the machine does not change.
        augment: Random shifts, mirrors and transposes of a gas; shifts along ``shifts`` of other fields.
        shifts: Axes along which a periodic domain is homogeneous; forcing and boundaries distinguish places along the others.
        val_every, save_every, log_every: Intervals in steps.
        resume: Continue from out/training.safetensors if it exists.
    """

    data: str = "data/euler64"
    split: str = "train"
    valid: int = 16
    reading: ReadOptions = field(default_factory=ReadOptions)
    out: str = "runs/train_fm"
    architecture: str = "vit"
    model: dict[str, Any] = field(default_factory=dict)
    fno: dict[str, Any] = field(default_factory=dict)
    init: str | None = None
    steps: int = 4000
    batch: int = 32
    lr: float = 1e-3
    warmup: int = 100
    weight_decay: float = 1e-4
    clip: float = 1.0
    input_noise: float = 0.005
    pushforward: float = 0.5
    pushforward_from: float = 0.6
    ema: float = 0.995
    loss: str = "l1"
    precision: str = "float32"
    compile: bool = False
    augment: bool = True
    shifts: tuple[int, ...] = ()
    max_seconds: float | None = None
    clock: str = "wall"
    val_every: int = 250
    save_every: int = 250
    log_every: int = 25
    resume: bool = True
    seed: int = 0
    device: str = "cpu"
    tensorboard: bool = False
    wandb: str | None = None

    def __post_init__(self) -> None:
        check_training(self, shares=("pushforward", "pushforward_from", "ema"))
        one_of("precision", self.precision, ("float32", "bfloat16"))
        one_of("architecture", self.architecture, tuple(ARCHITECTURES))
        object.__setattr__(self, "shifts", tuple(self.shifts))
        at_least("input_noise", self.input_noise, 0)


@dataclass(frozen=True)
class TrainResult:
    """Path of the checkpoint, and its errors on the validation trajectories."""

    checkpoint: Path
    steps: int
    validation: dict[str, float]


def train(config: TrainConfig) -> TrainResult:
    """Train, or continue training, and write the averaged weights as a checkpoint that ``load_surrogate`` reads.

    A run that is killed and restarted continues from its last save and ends with the same weights as an uninterrupted one (bit for bit on
    one machine with the same number of threads), unless ``max_seconds`` ends it. Changed settings are refused.

    Raises:
        DataError: There are no data.
        CheckpointError: ``init`` or the training state is of another architecture.
        TrainingError: The loss is not finite.
    """
    out = output_folder(config.out)
    run = _Run(config, out)
    validation = run.train() or run.validate(run.done)
    run.export(run.done, validation)
    return TrainResult(run.checkpoint, run.done, validation)


class _Run(TrainingRun):
    """The state of one training run."""

    model: ViT | FNO

    def __init__(self, config: TrainConfig, out: Path) -> None:
        self.config, self.out = config, out
        self.steps, self.max_seconds = config.steps, config.max_seconds
        self.checkpoint = out / "surrogate.safetensors"
        self.device = device_of(config.device)
        torch.manual_seed(config.seed)
        data = self._open(config.split)
        self.sampler = WindowSampler(data, length=3, seed=config.seed)
        self.spec = data.spec
        if data.spec.ndim != 2:
            raise ArgumentError(f"data has {data.spec.ndim} space dimensions; train_fm's models take 2 (bring a model by fm.factory)")
        wraps = data.spec.periodic_axes
        if len(set(config.shifts)) != len(config.shifts) or not all(0 <= axis < 2 and wraps[axis] for axis in config.shifts):
            known = ", ".join(str(axis) for axis in range(2) if wraps[axis]) or "none"
            raise ArgumentError(f"shifts is {list(config.shifts)}; name each periodic axis of the data at most once: {known}")
        if len(data.spec.given_channels) == data.spec.num_channels:
            raise ArgumentError(f"data declares all its channels ({', '.join(data.spec.names)}) as given; there is nothing to predict")
        self.model, self.normalizer = self._model(data)
        self.model.to(self.device)
        self.normalizer.to(self.device)
        self.forward = torch.compile(self.model, dynamic=False) if config.compile else self.model
        self.start_optimizer()
        self.surrogate_meta = surrogate_meta(self.model, self.normalizer, self.spec, time_step=time_step_of(data.times))
        self.valid = self._open("valid").spread(config.valid).stack().to(self.device)
        self.watch = Stopwatch(config.clock)

    def _open(self, split: str) -> TrajectorySet:
        return open_conserved(self.config.data, split, self.config.reading)

    def step(self, step: int) -> dict[str, float]:
        """Make one update and return loss, gradient norm and learning rate."""
        start, target = self._pair(step)
        # The target is the change from the noisy start to the clean next state, so that the model learns to remove noise.
        wanted = (target - start) / self.normalizer.delta_std.view(-1, 1, 1)
        self.model.train()
        with self._autocast():
            predicted = self.forward(self.normalizer.encode(start))
        predicted = predicted.float()
        predicted, wanted = (self.spec.predicted(x, channel_axis=1) for x in (predicted, wanted))
        loss = LOSSES[self.config.loss](predicted, wanted)
        return self.descend(loss, step, {"loss": loss})

    def _pair(self, step: int) -> tuple[Tensor, Tensor]:
        config = self.config
        windows = self.sampler.batch(step, config.batch)
        if config.augment:
            rng = np.random.default_rng([config.seed, 1, step])
            gas = isinstance(self.spec, EulerSpec)
            windows = random_symmetry(windows, self.spec, rng) if gas else random_shift(windows, config.shifts, rng)
        windows = sent(windows, self.device)
        start, target = windows[:, 0].clone(), windows[:, 1].clone()
        pushed = round(config.pushforward * config.batch) if self.share_done(step) >= config.pushforward_from else 0
        if pushed:
            with torch.no_grad(), self._autocast():
                self.model.eval()
                change = self.model(self.normalizer.encode(start[:pushed]))
            change = self.normalizer.decode_delta(change.float())
            start[:pushed] += self._unless_given(change)
            target[:pushed] = windows[:pushed, 2]
        if config.input_noise:
            noise = config.input_noise * self.normalizer.std.view(-1, 1, 1) * torch.randn_like(start)
            start += self._unless_given(noise)
        return start, target

    def _unless_given(self, change: Tensor) -> Tensor:
        return self.spec.carried(change, torch.zeros_like(change), channel_axis=1)

    def settings(self) -> dict[str, Any]:
        found = super().settings()
        if self.config.architecture == "vit" and not self.config.shifts:  # runs of before there were others have none of the three
            found = {name: value for name, value in found.items() if name not in ("architecture", "fno", "shifts")}
        return found

    def validate(self, step: int) -> dict[str, float]:
        """Return errors of the averaged weights, of single steps along the truth and of rollouts over its whole length."""
        surrogate = self._averaged()
        truth = self.valid
        frames = truth.shape[1]
        one_step = one_step_error(surrogate, truth)
        states = [truth[:, 0]]
        for _ in range(frames - 1):
            states.append(surrogate.deterministic(states[-1], step=len(states) - 1))
        rolled = torch.stack(states, 1)
        rolled, truth = (self.spec.predicted(x, channel_axis=2) for x in (rolled, truth))
        error = rollout_mse(rolled, truth, scale=self.spec.predicted(self.normalizer.std, channel_axis=0))
        result = {"one_step_l1": one_step.surrogate, "persistence_l1": one_step.persistence}
        for horizon in (1, 4, 16, frames - 1):
            if horizon < frames:
                result[f"rollout_mse_{horizon}"] = float(error[:, horizon].mean())
        return result

    def meta(self) -> dict[str, Any]:
        return self.surrogate_meta

    def expected(self) -> dict[str, Any]:
        return {k: self.surrogate_meta[k] for k in ("architecture", "model", "normalizer")}

    def export(self, step: int, validation: dict[str, float]) -> None:
        meta = {**self.surrogate_meta, "training": {**asdict(self.config), "steps_done": step}, "validation": validation}
        save_surrogate(self.checkpoint, self._averaged().model, meta)

    def _averaged(self) -> Surrogate:
        model = type(self.model)(self.model.config).to(self.device)  # type: ignore[arg-type]  # its own config
        model.load_state_dict({n: t.float() for n, t in self.average.items()}, strict=False)
        return Surrogate(model, self.spec, normalizer=self.normalizer, predicts="delta")

    def _model(self, data: TrajectorySet) -> tuple[ViT | FNO, Normalizer]:
        if self.config.init is not None:
            surrogate = load_surrogate(self.config.init)
            assert isinstance(surrogate.model, ViT | FNO) and surrogate.normalizer is not None
            return surrogate.model.train(), surrogate.normalizer
        sizes = {"channels": data.spec.num_channels, "grid": data.shape, "periodic": data.spec.periodic_axes}
        try:
            config, kind = ARCHITECTURES[self.config.architecture]
            given = self.config.fno if self.config.architecture == "fno" else self.config.model
            model = kind(config(**{**given, **sizes}))
        except TypeError as error:
            raise ArgumentError(f"model has an unknown size ({error}); see {config.__name__} for the names") from error
        found = field_statistics(data)
        found.require_variation(data.spec, self.config.data)
        std, delta_std = found.std.float(), found.delta_std.float()
        for c in data.spec.given_channels:  # one that is the same everywhere has no deviation, and none changes on its own
            std[c], delta_std[c] = std[c] if std[c] > 0 else 1.0, 1.0
        return model, Normalizer(found.mean.float(), std, delta_std)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")
