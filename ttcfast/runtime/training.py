"""The training loop that all trainers share: clock, update, averaged weights, saves, and settings that a resume must not change."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ttcfast.checks import at_least, one_of

from . import checkpoints
from .distributed import gathered, rank
from .errors import ArgumentError, CheckpointError, UserError
from .logs import RunLog
from .progress import bar

LOSSES = {"l1": nn.functional.l1_loss, "mse": nn.functional.mse_loss, "huber": nn.functional.smooth_l1_loss}
CLOCKS = ("wall", "cpu")
Result = TypeVar("Result")
_TOLD = 4  # settings that an error about other ones names
FREE_ON_RESUME = frozenset(
    ["out", "resume", "device", "compile", "max_seconds", "valid", "val_every", "save_every", "log_every", "tensorboard", "wandb"]
)
"""Settings of a run that a resume may change, since they do not decide what is learned from a given step on."""


class TrainingError(UserError):
    """Raised if a training cannot go on, as when its loss is not finite."""


class Stopwatch:
    """Measures the seconds of training, including those before a resume.

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


Updates = Generator[int, dict[str, float], Result]


def driven(updates: Updates[Result], step: Callable[[int], dict[str, float]]) -> Result:
    """Make every update that a generator asks for by ``step``, and return its result; it sees what ``step`` raises."""
    try:
        asked = next(updates)
        while True:
            try:
                values = step(asked)
            except BaseException as error:
                updates.throw(error)
                raise
            asked = updates.send(values)
    except StopIteration as end:
        return end.value


class TrainingRun:
    """Base class of trainers: the loop, one AdamW update, averaged weights, saves and the resume.

    A trainer sets ``config`` (with log_every, val_every, save_every, tensorboard, wandb), ``out``, ``model``, ``steps`` (the run's length),
    ``max_seconds``, ``watch`` and, by ``start_optimizer``, ``optimizer`` and ``average``. It defines ``step`` and, where it validates,
    ``validate``. Under torchrun, process 0 logs, saves and reads the clock for all.
    """

    config: Any
    out: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]
    watch: Stopwatch
    steps: int
    max_seconds: float | None = None
    options = ""  # prefix of the optimizer's options, for error messages
    cosine = True  # whether the learning rate decays
    settings_key = "config"
    require_finite = True
    done = 0

    def step(self, step: int) -> dict[str, float]:
        """Make one update and return what is logged, ``loss`` among it."""
        raise NotImplementedError

    def validate(self, step: int) -> dict[str, float]:
        """Measure on held-out data; an empty mapping is not logged."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Settings that a resume must not change, as JSON values."""
        return settings(self.config, FREE_ON_RESUME)

    def state(self) -> dict[str, Any]:
        """State that a resume needs beside model, optimizer, random states, step, seconds and settings."""
        return {"average": dict(self.average)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state`` returned."""
        self.average = average_again(state["average"], self.average)

    def meta(self) -> dict[str, Any]:
        """Header of the training state; a resume requires the same."""
        return {}

    @property
    def optim(self) -> Any:
        """Options of the optimizer: ``lr``, ``warmup``, ``weight_decay``, ``clip`` (0 for none) and ``ema``."""
        return self.config

    def start_optimizer(self) -> None:
        """Make the optimizer of ``model``, and its averaged weights."""
        self.optimizer = adamw(self.model.parameters(), self.optim.lr, self.optim.weight_decay)
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def descend(self, loss: Tensor, step: int, terms: Mapping[str, Tensor]) -> dict[str, float]:
        """Make one AdamW update from the gradient of ``loss``, and move the averaged weights.

        Returns:
            The scalars ``terms`` as numbers, ``grad_norm``, before it is clipped, and the learning rate ``lr``. All are read at once, the
            only time that the host waits for the device.
        """
        optim = self.optim
        lr = learning_rate(optim.lr, step, optim.warmup, self.share_done(step), cosine=self.cosine)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), optim.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        update_average(self.average, self.model.parameters(), optim.ema, step)
        told = {**terms, "grad_norm": norm}
        return {**dict(zip(told, torch.stack([value.detach().double() for value in told.values()]).tolist())), "lr": lr}

    @contextmanager
    def averaged(self, weights: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Give ``model`` its averaged weights, or ``weights``, for the length of a block, in evaluation mode."""
        own = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self._put(self.average if weights is None else weights)
        self.model.eval()
        try:
            yield
        finally:
            self._put(own)
            self.model.train()

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[name])

    def saved(self, step: int) -> None:
        """Called after each save, on process 0."""

    def stopped(self) -> bool:
        """Return whether the trainer's own stopping rule has ended the run."""
        return False

    @property
    def training(self) -> Path:
        """The file that a resume reads."""
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
        return driven(self.updates(advance), self.step)

    def updates(self, advance: Callable[[float, str | None], None] | None = None) -> Updates[dict[str, float]]:
        """:meth:`train` as a generator: it yields the number of every update to be made, and is sent what :meth:`step` would return."""
        config, found, first = self.config, {}, self._start()
        self.done, main = first, rank() == 0
        log = RunLog(self.out, config.tensorboard, config.wandb, config=asdict(config), resume_step=first or None) if main else None
        with log or nullcontext(), bar(self.steps, "train") if main and advance is None else nullcontext() as own:
            tell = advance or (own.advance if own is not None else lambda *_: None)
            tell(first, None)
            late = self.out_of_time()
            while self.done < self.steps and not late and not self.stopped():
                values = yield self.done
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
        """Return whether ``max_seconds`` are over, by the clock of process 0."""
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
        """Return the step of the last save, 0 without one; with resume=false the state of an earlier run is removed."""
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


def update_average(average: Mapping[str, Tensor], parameters: Iterable[Tensor], ema: float, step: int) -> None:
    """Move the averaged weights towards ``parameters`` (in the same order), faster in the first steps."""
    decay = min(ema, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters], 1 - decay)


def average_again(held: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the averaged weights of a training state on the devices of ``like``; raise ``ValueError`` for other names or shapes."""
    if odd := [n for n, t in like.items() if held[n].shape != t.shape or held[n].dtype != t.dtype] + [n for n in held if n not in like]:
        raise ValueError(f"the average of {odd[0]} is of another model")
    return {name: held[name].to(tensor.device) for name, tensor in like.items()}


def settings(config: Any, free: Collection[str]) -> dict[str, Any]:
    """Return the fields of a dataclass that a resume may not change (all but ``free``) as JSON values."""
    return {k: v for k, v in json.loads(json.dumps(asdict(config))).items() if k not in free}


def require_same_settings(path: str | os.PathLike[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ``CheckpointError`` if a training state was made with other settings; entries that ``now`` lacks are ignored."""
    other = sorted(_differences({name: before.get(name) for name in now}, now), key=lambda found: found[0].count("."))
    if other:
        told = "; ".join(f"{name} {one!r}, now {two!r}" for name, one, two in other[:_TOLD])
        more = f"; {len(other) - _TOLD} more" if len(other) > _TOLD else ""
        raise CheckpointError(
            f"checkpoint {path} is of a run with other settings ({told}{more}); give them again, or another out=, or resume=false"
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], group: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted name of every setting that differs, and both its values; None stands for a missing one."""
    for name in dict.fromkeys([*now, *before]):
        one, two = before.get(name), now.get(name)
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            yield from _differences(one, two, f"{group}{name}.")
        elif one != two:
            yield group + name, one, two


def check_training(config: Any, shares: Iterable[str]) -> None:
    """Raise ``ValueError`` for an option of a training run that is out of range; ``shares`` names those that lie in [0, 1]."""
    one_of("loss", config.loss, tuple(LOSSES))
    one_of("clock", config.clock, CLOCKS)
    at_least("warmup", config.warmup, 0)
    for name in ("steps", "batch", "valid", "val_every", "save_every", "log_every"):
        at_least(name, getattr(config, name), 1)
    for name in shares:
        if not 0 <= getattr(config, name) <= 1:
            raise ArgumentError(f"{name} is {getattr(config, name)}; give a number in [0, 1]")
