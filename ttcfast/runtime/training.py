"""What training runs have in common: the loop, their time, optimizer, averaged weights, and the settings that a resume must not change."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoints
from .distributed import gathered, rank
from .errors import CheckpointError, UserError
from .logs import RunLog
from .progress import bar

CLOCKS = ("wall", "cpu")


class TrainingError(UserError):
    """The loss stopped being finite."""


class Stopwatch:
    """Seconds of training, those before a resume included.

    Args:
        clock: ``"wall"``, or ``"cpu"``: the processor time of this process, which other work on the machine does not change.
        running: False starts paused.
    """

    def __init__(self, clock: str = "wall", *, running: bool = True) -> None:
        self._now = time.process_time if clock == "cpu" else time.monotonic
        self._spent, self._started = 0.0, self._now() if running else None

    def restart_at(self, spent: float) -> None:
        """Set the count to ``spent`` seconds; a paused watch stays paused."""
        self._spent, self._started = spent, None if self._started is None else self._now()

    def go_on(self) -> None:
        """Count on after ``pause``."""
        self._spent, self._started = self.seconds(), self._now()

    def pause(self) -> None:
        """Stop counting until ``go_on``."""
        self._spent, self._started = self.seconds(), None

    def seconds(self) -> float:
        """Seconds counted so far."""
        return self._spent if self._started is None else self._spent + self._now() - self._started


class TrainingRun:
    """One training run: its loop, its saves, its resume. A trainer derives from it and gives what is its own.

    A trainer sets ``config`` (with log_every, val_every, save_every, tensorboard, wandb), ``out``, ``model``, ``optimizer``, ``watch``,
    ``steps`` (length of the run) and ``max_seconds``, and defines ``step``, ``validate``, ``settings``, ``state`` and ``restore``.
    Under torchrun, process 0 logs, saves and reads the clock for all.
    """

    config: Any
    out: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    watch: Stopwatch
    steps: int
    max_seconds: float | None = None
    options = ""  # prefix of the optimiser's options, for error messages
    settings_key = "config"
    require_finite = True
    done = 0

    def step(self, step: int) -> dict[str, float]:
        """Make one update; returns what is logged, ``loss`` among it."""
        raise NotImplementedError

    def validate(self, step: int) -> dict[str, float]:
        """Measure on held-out data; an empty mapping is not logged."""
        return {}

    def settings(self) -> dict[str, Any]:
        """What a resume must not change, as JSON has it."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What a resume needs beside model, optimizer, random states, step, seconds and settings."""
        raise NotImplementedError

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state`` returned."""
        raise NotImplementedError

    def meta(self) -> dict[str, Any]:
        """Header of the training state; a resume requires the same."""
        return {}

    def saved(self, step: int) -> None:
        """Called after each save, on process 0."""

    def stopped(self) -> bool:
        """Whether the trainer's own stop rule has ended the run."""
        return False

    @property
    def training(self) -> Path:
        """The file a resume reads."""
        return self.out / "training.safetensors"

    def train(self, advance: Callable[[float, str | None], None] | None = None) -> dict[str, float]:
        """Train until the steps are done, the time is up or the run has stopped; logs, validates and saves on the way.

        Args:
            advance: Receives the updates made and a note; None shows a progress bar of this run.

        Returns:
            The last validation, empty without one. ``done`` is the number of steps made in all.

        Raises:
            CheckpointError: The training state is damaged, or of other settings.
            TrainingError: The loss is not finite.
        """
        config, found, first = self.config, {}, self._start()
        self.done, main = first, rank() == 0
        log = RunLog(self.out, config.tensorboard, config.wandb, config=asdict(config), resume_step=first or None) if main else None
        with log or nullcontext(), bar(self.steps, "train") if main and advance is None else nullcontext() as own:
            tell = advance or (own.advance if own is not None else lambda *_: None)
            tell(first, None)
            late = self.out_of_time()
            while self.done < self.steps and not late and not self.stopped():
                values = self.step(self.done)
                self.done += 1
                if self.require_finite and not math.isfinite(values["loss"]):
                    raise TrainingError(
                        f"the loss is {values['loss']} at step {self.done - 1}; lower {self.options}lr or raise {self.options}warmup, "
                        f"and resume from {self.out}"
                    )
                late = self.out_of_time()
                last = self.done == self.steps or late or self.stopped()
                if log is not None and (self.done % config.log_every == 0 or last):
                    log.log({**values, "seconds": self.watch.seconds()}, self.done)
                if self.done % self.val_every == 0 or last:
                    found = self.validate(self.done)
                    if log is not None and found:
                        log.log({f"valid/{k}": v for k, v in found.items()}, self.done)
                if self.done % config.save_every == 0 or last or self.stopped():
                    self.save(self.done)
                tell(1, f"loss {values['loss']:.4f}")
        return found

    @property
    def val_every(self) -> int:
        return int(self.config.val_every)

    def out_of_time(self) -> bool:
        """Whether ``max_seconds`` are over, by the clock of process 0."""
        return self.max_seconds is not None and bool(gathered(self.watch.seconds() >= self.max_seconds)[0])

    def share_done(self, step: int) -> float:
        """Share of training done: of the steps, or of the time where that ends it earlier."""
        by_time = gathered(self.watch.seconds())[0] / self.max_seconds if self.max_seconds else 0.0
        return min(1.0, max(step / self.steps, by_time))

    def save(self, step: int) -> None:
        """Write everything that a resume needs."""
        if rank() == 0:
            extra = {"step": step, "seconds": self.watch.seconds(), self.settings_key: self.settings(), **self.state()}
            checkpoints.save_training(self.training, self.model, self.optimizer, extra, meta=self.meta())
            self.saved(step)

    def _start(self) -> int:
        """The step of the last save, 0 without one; with resume=false an earlier run is forgotten, lest a kill bring it back."""
        if not self.config.resume:
            if rank() == 0:
                self.training.unlink(missing_ok=True)
            gathered(None)
            return 0
        if not self.training.exists():
            return 0
        try:
            extra = checkpoints.load_training(self.training, self.model, self.optimizer, self.expected())
        except CheckpointError as error:
            raise CheckpointError(f"{error}; to start anew give another out= or resume=false") from error
        with checkpoints.entries_of(self.training, "a training state"):
            require_same_settings(self.training, extra[self.settings_key], self.settings())
            self.restore(extra)
            self.watch.restart_at(float(extra["seconds"]))
            return int(extra["step"])

    def expected(self) -> dict[str, Any]:
        """Entries of the header that a resume requires."""
        return self.meta()


def learning_rate(lr: float, step: int, warmup: int, progress: float, *, cosine: bool = True) -> float:
    """Linear warm-up over ``warmup`` steps, then cosine decay to 1 % of ``lr`` as ``progress`` goes to 1 (or none)."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))) if cosine else lr


def adamw(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and kernels alone, not biases and gains."""
    given = list(parameters)
    groups = [
        {"params": [p for p in given if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in given if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def update_average(average: Mapping[str, Tensor], parameters: Iterable[Tensor], ema: float, step: int) -> None:
    """Move the averaged weights towards ``parameters`` (same order), faster in the first steps."""
    decay = min(ema, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters], 1 - decay)


def average_again(held: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The averaged weights of a training state, on the devices of ``like``; other names, shapes or kinds of number raise ValueError."""
    if odd := [n for n, t in like.items() if held[n].shape != t.shape or held[n].dtype != t.dtype] + [n for n in held if n not in like]:
        raise ValueError(f"the average of {odd[0]} is of another model")
    return {name: held[name].to(tensor.device) for name, tensor in like.items()}


def settings(config: Any, free: Collection[str]) -> dict[str, Any]:
    """The fields of a dataclass that a resume may not change (all but ``free``), as JSON has them."""
    return {k: v for k, v in json.loads(json.dumps(asdict(config))).items() if k not in free}


def require_same_settings(path: str | os.PathLike[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ``CheckpointError`` where a training state was made with other settings."""
    if other := [f"{k} {before.get(k)!r}, now {v!r}" for k, v in now.items() if before.get(k) != v]:
        raise CheckpointError(
            f"checkpoint {path} is of a run with other settings ({'; '.join(other)}); give them again, or another out=, or resume=false"
        )
