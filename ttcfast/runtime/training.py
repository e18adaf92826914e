"""What training runs have in common: the loop, their time, optimizer, averaged weights, and the settings that a resume must not change."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

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
    """

    def __init__(self, clock: str = "wall") -> None:
        self._now = time.process_time if clock == "cpu" else time.monotonic
        self.go_on(0.0)

    def go_on(self, spent: float) -> None:
        """Count on from ``spent`` seconds."""
        self._spent, self._started = spent, self._now()

    def seconds(self) -> float:
        return self._spent + self._now() - self._started


class Run(Protocol):
    """One training run, as ``train_steps`` drives it; ``config`` has steps, lr, log_every, val_every, save_every and max_seconds."""

    config: Any
    watch: Stopwatch

    def step(self, step: int) -> dict[str, float]: ...
    def validate(self) -> dict[str, float]: ...
    def save(self, step: int) -> None: ...


def train_steps(run: Run, first: int, out: Path) -> tuple[int, dict[str, float]]:
    """Train from step ``first`` until the steps are done or the time is up, logging, validating and saving on the way.

    Returns:
        How many steps are done, and the last validation.

    Raises:
        TrainingError: the loss is not finite.
    """
    config, done, validation = run.config, first, {}
    log = RunLog(out, config.tensorboard, config.wandb, config=asdict(config), resume_step=first or None)
    with log, bar(config.steps, "train") as progress:
        progress.advance(first)
        for step in range(first, config.steps):
            if out_of_time(run):
                break
            entry = run.step(step)
            done = step + 1
            if not math.isfinite(entry["loss"]):
                raise TrainingError(
                    f"the loss is {entry['loss']} at step {step}; lower lr (now {config.lr}) or raise warmup, and resume from {out}"
                )
            last = done == config.steps or out_of_time(run)
            if done % config.log_every == 0 or last:
                log.log({**entry, "seconds": run.watch.seconds()}, done)
                progress.advance(0, note=f"loss {entry['loss']:.4f}")
            if done % config.val_every == 0 or last:
                validation = run.validate()
                log.log({f"valid/{k}": v for k, v in validation.items()}, done)
            if done % config.save_every == 0 or last:
                run.save(done)
            progress.advance()
        if done == first:
            validation = run.validate()
    return done, validation


def out_of_time(run: Run) -> bool:
    return run.config.max_seconds is not None and run.watch.seconds() >= run.config.max_seconds


def share_done(run: Run, step: int) -> float:
    """Share of training done: of the steps, or of the time where that ends it earlier."""
    by_time = run.watch.seconds() / run.config.max_seconds if run.config.max_seconds else 0.0
    return min(1.0, max(step / run.config.steps, by_time))


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
