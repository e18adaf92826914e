"""Trains world models of several kinds on the same data and measures each on the same held-out episodes, with exact resume."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ttcfast.checks import at_least, each_once, whole
from ttcfast.data.replay import ReplaySampler, ReplaySet
from ttcfast.runtime.devices import device_of
from ttcfast.runtime.errors import ArgumentError, CheckpointError
from ttcfast.runtime.files import output_folder, parse_json, require_regular, write_json
from ttcfast.runtime.progress import bar
from ttcfast.runtime.training import Stopwatch, TrainingRun, require_same_settings, settings

from .algorithms import PWM
from .arms import Arm, check_runs
from .checkpoint import save_world_model
from .evaluation.imagination import ImaginationErrors, Scale, fit_probe, imagination_errors, persistence
from .models.base import BaseWorldModel
from .policy_config import PolicySettings
from .utils.metrics import ESNRMeter

logger = logging.getLogger(__name__)

ARMS = ("mlp", "residual", "euler1", "euler2", "euler4", "heun1", "heun2", "heun4")
# Settings that a resume may change. log_every is not among them: it decides which updates are measured, in chunks.
_FREE_ON_RESUME = {"out", "resume", "arms", "seeds", "save_every", "tensorboard", "wandb"}


@dataclass(frozen=True)
class TrainWMConfig:
    """Settings of ``ttcfast train_wm``.

    Args:
        data: Folder of replay shards, as ``ttcfast collect`` writes them.
        out: Folder that receives ``<arm>_seed<k>/`` for each run, with world_model.safetensors, training.safetensors, result.json and log.
        alg: Group of ``ttcfast/configs/alg`` with sizes, losses and optimizer; arms change its model, loss and integrator.
        arms: Kinds of dynamics, ``mlp``, ``residual`` or flows as ``heun<K>`` or ``euler<K>``, each trained with each of the seeds.
        seeds: Random seeds; runs of one seed see the same batches in the same order.
        tasks: Names of the tasks in the order of their numbers, for data that record none, such as TD-MPC2's published shards.
        steps, batch, horizon: Number of updates, windows per update, steps per window.
        warmup: Updates of linear warm-up, after which the learning rate falls linearly to 1 % of ``alg.wm.lr``.
        held_out, split_seed: Share of the episodes that is held out for measuring, and random seed of their choice.
        eval_horizon, eval_stride: Steps imagined per held-out window, and steps between the starts of the windows. Windows come from the
            episodes that are long enough, in training as well.
        save_every, log_every: Updates between saves and between log entries.
        esnr_microbatches: Number M of chunks in which the gradient of logged updates is formed to measure its ESNR; a divisor of ``batch``
            of at least 2, or 0 for no measurement.
        resume: Whether to keep finished runs and to continue an interrupted one from its last save.
    """

    data: str = "data/cartpole"
    out: str = "runs/train_wm"
    alg: Mapping[str, Any] = field(default_factory=dict)
    arms: tuple[str, ...] = ARMS
    seeds: tuple[int, ...] = (0, 1, 2)
    tasks: tuple[str, ...] = ()
    steps: int = 1000
    batch: int = 64
    horizon: int = 4
    warmup: int = 50
    held_out: float = 0.1
    split_seed: int = 0
    eval_horizon: int = 16
    eval_stride: int = 8
    save_every: int = 500
    log_every: int = 50
    esnr_microbatches: int = 8
    resume: bool = True
    device: str = "cpu"
    tensorboard: bool = False
    wandb: str | None = None

    def __post_init__(self) -> None:
        for name in ("arms", "seeds", "tasks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_runs(self.arms, self.seeds)
        if self.tasks:
            each_once("tasks", self.tasks)
        for name in ("steps", "batch", "horizon", "eval_horizon", "eval_stride", "save_every", "log_every"):
            whole(name, getattr(self, name), 1)
        at_least("warmup", self.warmup, 0)
        whole("esnr_microbatches", self.esnr_microbatches, 0)
        if self.esnr_microbatches and (self.esnr_microbatches < 2 or self.batch % self.esnr_microbatches):
            raise ArgumentError(
                f"esnr_microbatches is {self.esnr_microbatches} and batch {self.batch}; give a divisor of the batch of at least 2, or 0"
            )
        device_of(self.device)


@dataclass(frozen=True)
class ArmResult:
    """Outcome of one run.

    Attributes:
        parameters, dynamics_parameters: Parameter counts; ``parameter_gap`` and ``dynamics_gap`` are relative to the MLP.
        base_parameters: Parameter count of the MLP.
        evaluations: Evaluations of the dynamics network per imagined step.
        training_evaluations: Evaluations of the dynamics network in training, that of a batch counting as one.
        seconds, cpu_seconds: Wall-clock and processor time of the updates alone.
        skipped, stopped: Number of skipped updates, and whether the sanity checks ended the run.
        esnr_db: Raw ESNR of the loss gradient in dB, smoothed over the last measurements; NaN without any.
    """

    arm: str
    seed: int
    steps: int
    parameters: int
    base_parameters: int
    parameter_gap: float
    dynamics_parameters: int
    dynamics_gap: float
    evaluations: int
    training_evaluations: int
    seconds: float
    cpu_seconds: float
    skipped: int
    stopped: bool
    esnr_db: float
    errors: ImaginationErrors


@dataclass(frozen=True)
class Comparison:
    """All runs in order of arms and seeds, the errors of predicting no change, and the number of held-out windows."""

    runs: list[ArmResult]
    persistence: ImaginationErrors
    windows: int
    episodes: tuple[int, int]  # trained on, held out


def train_wm(config: TrainWMConfig) -> Comparison:
    """Train every arm with every seed, except for runs that are already finished.

    A run that was killed continues from its last save and ends with the same weights as an uninterrupted one, bit for bit on one machine
    with the same number of threads. A resume with other settings is refused.

    Raises:
        DataError: There is no data.
        ArgumentError: A setting does not fit the data or the models.
        ParityError: As ``alg.parity`` decides.
        CheckpointError: An earlier run in ``out`` is damaged or has other settings.
    """
    out = output_folder(config.out)
    material = Material(config.data, config, config.tasks)
    runs = [_Run(config, Arm(arm), seed, out, material) for arm in config.arms for seed in config.seeds]
    results = []
    with bar(len(runs) * config.steps, "train_wm") as progress:
        for run in runs:

            def note(steps: float, text: str | None, run: _Run = run) -> None:
                progress.advance(steps, note=f"{run.arm.label}, seed {run.seed}: {text or ''}")

            results.append(run.result(note))
    return Comparison(results, persistence(material.held_out, material.scale), material.held_out.act.shape[1], material.episodes)


class Material:
    """The data that all runs share, split into episodes to train on and held-out ones; windows come from those that are long enough.

    Raises:
        DataError: There are no data, or none of the task.
        ArgumentError: No episode to train on has ``horizon`` steps, or no held-out one ``eval_horizon``.
    """

    def __init__(self, place: str, config: TrainWMConfig | PolicySettings, tasks: Sequence[str] = (), task: str | None = None) -> None:
        """Open the data; ``tasks`` names those whose shards do not, and ``task`` is the only one wanted."""
        data = ReplaySet.open(place)
        tasks, wanted = data.task_names(tasks), None
        if task is not None:
            if task not in tasks:
                raise ArgumentError(f"task is {task!r}; {place} has {', '.join(tasks)}")
            wanted = tasks.index(task)
            data = data.of_task(wanted)
        self.train, held = data.split(config.held_out, config.split_seed)
        self.episodes = len(self.train), len(held)
        for name, of, part in (("horizon", "trained on", self.train), ("eval_horizon", "held out", held)):
            steps, longest = getattr(config, name), int(part.lengths().max())
            if steps > longest:
                raise ArgumentError(
                    f"{name} is {steps}; the longest of the {len(part)} episodes of {place} that are {of} has {longest} steps: "
                    "give at most that, or collect longer episodes"
                )
        self.scale = Scale.of(self.train)
        self.held_out = held.windows(*held.grid(config.eval_horizon, config.eval_stride), config.eval_horizon)
        self.probing = self.train.windows(*self.train.grid(1, config.eval_stride), 1)
        dims = {s.parameters["number"]: s.parameters["action_dim"] for s in data.shards if "action_dim" in s.parameters}
        numbers = range(len(tasks)) if wanted is None else [wanted]
        self.sizes: dict[str, Any] = {
            "observation_dim": data.observation_dim,
            "action_dim": data.action_dim,
            "tasks": [tasks[n] for n in numbers],
            "action_dims": [dims[n] for n in numbers] if set(numbers) <= set(dims) else None,
        }

    def agent(self, alg: Mapping[str, Any], device: str) -> PWM:
        """Return an untrained agent of the ``alg`` group, which knows the spread of the training observations."""
        agent = PWM.from_config(alg, **self.sizes)
        if agent.model.observation_mean is not None:
            agent.model.set_observation_statistics(self.scale.mean, self.scale.std)
        agent.model.to(device)
        return agent

    def errors(self, model: BaseWorldModel) -> ImaginationErrors:
        """Return the errors of imagination on the held-out episodes."""
        return imagination_errors(model, fit_probe(model, self.probing, self.scale), self.held_out, self.scale)


class _Run(TrainingRun):
    """One arm with one seed."""

    settings_key, require_finite = "settings", False  # the sanity checks skip updates that are not finite

    def __init__(self, config: TrainWMConfig, arm: Arm, seed: int, out: Path, material: Material) -> None:
        self.config, self.arm, self.seed, self.material = config, arm, seed, material
        self.out, self.steps = out / f"{arm.name}_seed{seed}", config.steps
        self.report = self.out / "result.json"
        self.alg = arm.configure(config.alg)
        self.sampler = ReplaySampler(material.train, config.horizon, seed=seed)
        self._lr = 0.0
        self._meter: ESNRMeter | None = None

    def result(self, note: Callable[[float, str | None], None]) -> ArmResult:
        """Train or resume the run, or read its earlier result; ``note`` receives the updates made and a text."""
        if self.config.resume and (found := self._read()) is not None:
            note(self.steps, None)
            return found
        if not self.config.resume:
            self.report.unlink(missing_ok=True)
        torch.manual_seed(self.seed)
        self.agent = agent = self.material.agent(self.alg, self.config.device)
        self.model, self.optimizer = agent.model, agent.wm_optimizer
        self._lr = float(agent.wm_optimizer.param_groups[0]["lr"])
        if self.config.esnr_microbatches:
            self._meter = ESNRMeter(agent.model, self.config.esnr_microbatches)
        self.watch, self._cpu = Stopwatch(running=False), Stopwatch("cpu", running=False)
        self.train(note)
        if agent.sanity.stopped:
            logger.error("%s, seed %d: stopped after %d of %d updates", self.arm.label, self.seed, self.done, self.steps)
            note(self.steps - self.done, None)
        path, more = self.out / "world_model.safetensors", {"arm": self.arm.name, "seed": self.seed, "steps": self.done}
        save_world_model(path, agent, self.alg, self.material.sizes, **more)
        found = self._measure(agent, self.done)
        write_json(self.report, {"result": asdict(found), "settings": self.settings()})
        return found

    @property
    def val_every(self) -> int:
        return self.steps  # a world model is measured once, after training

    def stopped(self) -> bool:
        return self.agent.sanity.stopped

    def state(self) -> dict[str, Any]:
        meter = None if self._meter is None else self._meter.state_dict()
        return {"cpu_seconds": self._cpu.seconds(), "sanity": self.agent.sanity.state_dict(), "meter": meter}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.agent.sanity.load_state_dict(state["sanity"])
        if self._meter is not None:
            self._meter.load_state_dict(state["meter"])
        self._cpu.restart_at(float(state["cpu_seconds"]))

    def step(self, step: int) -> dict[str, float]:
        config, agent = self.config, self.agent
        self.watch.go_on()
        self._cpu.go_on()
        decayed = 1 - 0.99 * (step - config.warmup) / max(config.steps - config.warmup, 1)
        lr = self._lr * ((step + 1) / config.warmup if step < config.warmup else decayed)
        for group in agent.wm_optimizer.param_groups:
            group["lr"] = lr
        obs, act, rew, task = self.sampler.batch(step, config.batch).to(config.device)
        of = task if agent.model.task_embedding is not None else None
        logged = (step + 1) % config.log_every == 0 or step + 1 == config.steps
        found = agent.update_wm(obs, act, rew, of, meter=self._meter if logged else None)
        self.watch.pause()
        self._cpu.pause()
        return {**found, "lr": lr}

    def _measure(self, agent: PWM, done: int) -> ArmResult:
        model, errors = agent.model, self.material.errors(agent.model)
        parity = agent.parity
        assert parity is not None  # from_config sets it
        return ArmResult(
            arm=self.arm.name,
            seed=self.seed,
            steps=done,
            parameters=parity.model,
            base_parameters=parity.base,
            parameter_gap=parity.gap,
            dynamics_parameters=parity.dynamics_model,
            dynamics_gap=parity.dynamics_gap,
            evaluations=model.evaluations,
            training_evaluations=done * agent.wm_evaluations(self.config.horizon),
            seconds=self.watch.seconds(),
            cpu_seconds=self._cpu.seconds(),
            skipped=agent.sanity.skipped,
            stopped=agent.sanity.stopped,
            esnr_db=self._esnr_db(),
            errors=errors,
        )

    def _esnr_db(self) -> float:
        try:
            return math.nan if self._meter is None else self._meter.smoothed().raw_db
        except ValueError:  # nothing finite was measured
            return math.nan

    def _read(self) -> ArmResult | None:
        """Return the result of a finished run, None if there is none."""
        if not self.report.exists():
            return None
        try:
            held = parse_json(require_regular(self.report, "result", "", CheckpointError).read_text(encoding="utf-8"))
            values: dict[str, Any] = dict(held["result"])
            errors: dict[str, Any] = {k: tuple(map(_number, v)) if isinstance(v, list) else _number(v) for k, v in values["errors"].items()}
            values |= {"errors": ImaginationErrors(**errors), "esnr_db": _number(values["esnr_db"])}
            found = ArmResult(**values)
            before = dict(held["settings"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.report} is damaged ({error}); remove it, or give another out= or resume=false") from error
        require_same_settings(self.report, before, self.settings())
        return found

    def settings(self) -> dict[str, Any]:
        """Return the settings that decide the outcome, as JSON values."""
        own = {"alg": self.alg, "seed": self.seed, "sizes": self.material.sizes, "episodes": self.material.episodes}
        return json.loads(json.dumps({**settings(self.config, _FREE_ON_RESUME), **own, "windows": len(self.sampler)}))


def _number(value: float | None) -> float:
    """Return ``value``, NaN for the null that strict JSON has in its place, as after a training that diverged."""
    return math.nan if value is None else float(value)
