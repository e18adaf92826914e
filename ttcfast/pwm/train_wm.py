"""Training world models of several kinds on the same data, and measuring each on the same held-out episodes; exact resume."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ttcfast.checks import at_least, whole
from ttcfast.data.replay import ReplaySampler, ReplaySet
from ttcfast.runtime.devices import device_of
from ttcfast.runtime.errors import ArgumentError, CheckpointError
from ttcfast.runtime.files import output_folder, parse_json, require_regular, write_json
from ttcfast.runtime.progress import bar
from ttcfast.runtime.training import Stopwatch, TrainingRun, require_same_settings

from .algorithms import PWM
from .arms import Arm
from .checkpoint import save_world_model, world_model_meta
from .evaluation.imagination import ImaginationErrors, Scale, fit_probe, imagination_errors, persistence
from .evaluation.parity import parameter_parity
from .utils.metrics import ESNRMeter

logger = logging.getLogger(__name__)

ARMS = ("mlp", "residual", "euler1", "euler2", "euler4", "heun1", "heun2", "heun4")
# What may differ between a run and its resumption without changing what comes out; log_every says which updates are measured, in chunks.
_FREE_ON_RESUME = {"out", "resume", "arms", "seeds", "save_every", "tensorboard", "wandb"}


@dataclass(frozen=True)
class TrainWMConfig:
    """What ``ttcfast train_wm`` does.

    Args:
        data: folder of replay shards, as ``ttcfast collect`` writes them.
        out: receives ``<arm>_seed<k>/`` (world_model.safetensors, training.safetensors, result.json, the log) for each run.
        alg: a group of ``ttcfast/configs/alg``: sizes, losses, optimizer. Arms change its model, loss and integrator.
        arms: ``mlp``, ``residual``, and flows as ``heun<K>`` or ``euler<K>``; each is trained with each of the seeds. Runs of one seed
            see the same batches in the same order.
        steps, batch, horizon: updates, windows an update, steps a window.
        warmup: updates of linear warm-up; then the step size falls linearly to 1 % of ``alg.wm.lr``.
        held_out: share of the episodes that is measured on and not trained on; split_seed: of their choice.
        eval_horizon: steps imagined when measuring; eval_stride: steps between the starts of held-out windows.
        save_every, log_every: in updates. resume: finished runs are kept, a broken one goes on from its last save.
        esnr_microbatches: M of the updates that are logged: their gradient is formed in M chunks and its ESNR logged; M divides batch, at
            least 2. 0 measures none.
    """

    data: str = "data/cartpole"
    out: str = "runs/train_wm"
    alg: Mapping[str, Any] = field(default_factory=dict)
    arms: tuple[str, ...] = ARMS
    seeds: tuple[int, ...] = (0, 1, 2)
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
        object.__setattr__(self, "arms", tuple(self.arms))
        object.__setattr__(self, "seeds", tuple(self.seeds))
        for name in ("arms", "seeds"):
            given = getattr(self, name)
            if not given or len(set(given)) != len(given):
                raise ArgumentError(f"{name} is {list(given)}; give at least one, each once")
        for arm in self.arms:
            Arm(arm)
        for seed in self.seeds:
            whole("seeds", seed, 0)
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
    """What one run gave.

    ``parameters`` and ``dynamics_parameters`` with their gaps to the MLP's; ``evaluations``: of the dynamics network per imagined step;
    ``training_evaluations``: of the dynamics network in training, one of a batch counting as one; ``seconds`` of the clock and
    ``cpu_seconds`` of the process, of training alone; ``skipped`` updates and whether the sanity checks ``stopped`` it; ``esnr_db`` of the
    loss's gradient, raw, smoothed over the last measurements (NaN: none).
    """

    arm: str
    seed: int
    steps: int
    parameters: int
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
    """All runs, in order of arms and seeds, beside what saying "nothing changes" would err by; ``windows`` are those measured on."""

    runs: list[ArmResult]
    persistence: ImaginationErrors
    windows: int
    episodes: tuple[int, int]  # trained on, held out


def train_wm(config: TrainWMConfig) -> Comparison:
    """Train every arm with every seed, or what is missing of that.

    A run that is killed and started again goes on from its last save and ends with the same weights as one that was not (bit for bit on
    one machine with the same number of threads). Other settings than the first time are refused.

    Raises:
        DataError: no data. ArgumentError: a setting that does not fit the data or the models. ParityError: as ``alg.parity`` says.
        CheckpointError: what a former run left there is damaged or of other settings.
    """
    out = output_folder(config.out)
    material = _Material(config)
    runs = [_Run(config, Arm(arm), seed, out, material) for arm in config.arms for seed in config.seeds]
    results = []
    with bar(len(runs) * config.steps, "train_wm") as progress:
        for run in runs:

            def note(steps: float, text: str | None, run: _Run = run) -> None:
                progress.advance(steps, note=f"{run.arm.label}, seed {run.seed}: {text or ''}")

            results.append(run.result(note))
    return Comparison(results, persistence(material.held_out, material.scale), material.held_out.act.shape[1], material.episodes)


class _Material:
    """The data as every run sees them."""

    def __init__(self, config: TrainWMConfig) -> None:
        data = ReplaySet.open(config.data)
        self.train, held = data.split(config.held_out, config.split_seed)
        self.episodes = len(self.train), len(held)
        shortest = int(data.lengths().min())
        for name in ("horizon", "eval_horizon"):
            if getattr(config, name) > shortest:
                raise ArgumentError(f"{name} is {getattr(config, name)}; the shortest episode of {config.data} has {shortest} steps")
        self.scale = Scale.of(self.train)
        self.held_out = held.windows(*held.grid(config.eval_horizon, config.eval_stride), config.eval_horizon)
        self.probing = self.train.windows(*self.train.grid(1, config.eval_stride), 1)
        tasks = data.task_names()
        dims = {s.parameters["number"]: s.parameters["action_dim"] for s in data.shards if "action_dim" in s.parameters}
        self.sizes: dict[str, Any] = {
            "observation_dim": data.observation_dim,
            "action_dim": data.action_dim,
            "tasks": tasks,
            "action_dims": [dims[n] for n in range(len(tasks))] if set(range(len(tasks))) <= set(dims) else None,
        }


class _Run(TrainingRun):
    """One arm with one seed."""

    settings_key, require_finite = "settings", False  # the sanity checks skip updates that are not finite

    def __init__(self, config: TrainWMConfig, arm: Arm, seed: int, out: Path, material: _Material) -> None:
        self.config, self.arm, self.seed, self.material = config, arm, seed, material
        self.out, self.steps = out / f"{arm.name}_seed{seed}", config.steps
        self.report = self.out / "result.json"
        self.alg = arm.configure(config.alg)
        self.sampler = ReplaySampler(material.train, config.horizon, seed=seed)
        self._lr = 0.0
        self._meter: ESNRMeter | None = None

    def result(self, note: Callable[[float, str | None], None]) -> ArmResult:
        """Train, or go on, or read what was measured before; ``note(updates made, text)`` is called on the way."""
        if self.config.resume and (found := self._read()) is not None:
            note(self.steps, None)
            return found
        if not self.config.resume:
            self.report.unlink(missing_ok=True)
        torch.manual_seed(self.seed)
        self.agent = agent = PWM.from_config(self.alg, **self.material.sizes)
        agent.model.to(self.config.device)
        self.model, self.optimizer = agent.model, agent.wm_optimizer
        self._lr = float(agent.wm_optimizer.param_groups[0]["lr"])
        if self.config.esnr_microbatches:
            self._meter = ESNRMeter(agent.model, self.config.esnr_microbatches)
        self.watch, self._cpu = Stopwatch(running=False), Stopwatch("cpu", running=False)
        self.train(note)
        if agent.sanity.stopped:
            logger.error("%s, seed %d: stopped after %d of %d updates", self.arm.label, self.seed, self.done, self.steps)
            note(self.steps - self.done, None)
        meta = world_model_meta(self.alg, self.material.sizes, arm=self.arm.name, seed=self.seed, steps=self.done)
        save_world_model(self.out / "world_model.safetensors", agent, meta)
        found = self._measure(agent, self.done)
        write_json(self.report, {"result": asdict(found), "settings": self.settings()})
        return found

    @property
    def val_every(self) -> int:
        return self.steps  # a world model is measured once, when it is trained

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
        """One update; the clocks count updates alone."""
        self.watch.go_on()
        self._cpu.go_on()
        said = self._update(self.agent, step)
        self.watch.pause()
        self._cpu.pause()
        return said

    def _update(self, agent: PWM, step: int) -> dict[str, float]:
        lr = self._lr * _schedule(step, self.config.steps, self.config.warmup)
        for group in agent.wm_optimizer.param_groups:
            group["lr"] = lr
        obs, act, rew, task = self.sampler.batch(step, self.config.batch).to(self.config.device)
        of = task if agent.model.task_embedding is not None else None
        logged = (step + 1) % self.config.log_every == 0 or step + 1 == self.config.steps
        return {**agent.update_wm(obs, act, rew, of, meter=self._meter if logged else None), "lr": lr}

    def _measure(self, agent: PWM, done: int) -> ArmResult:
        model, material = agent.model, self.material
        errors = imagination_errors(model, fit_probe(model, material.probing, material.scale), material.held_out, material.scale)
        parity = agent.parity or parameter_parity(model)
        # The loss of a flow asks for the velocity once more at a time of its own.
        per_step = model.evaluations + (1 if agent.use_flow_dynamics else 0)
        return ArmResult(
            arm=self.arm.name,
            seed=self.seed,
            steps=done,
            parameters=parity.model,
            parameter_gap=parity.gap,
            dynamics_parameters=parity.dynamics_model,
            dynamics_gap=parity.dynamics_gap,
            evaluations=model.evaluations,
            training_evaluations=done * self.config.horizon * per_step,
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
        """The result of a finished run."""
        if not self.report.exists():
            return None
        try:
            held = parse_json(require_regular(self.report, "result", "", CheckpointError).read_text(encoding="utf-8"))
            values = dict(held["result"])
            found = ArmResult(**values | {"errors": _read_errors(values["errors"]), "esnr_db": _number(values["esnr_db"])})
            before = dict(held["settings"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.report} is damaged ({error}); remove it, or give another out= or resume=false") from error
        require_same_settings(self.report, before, self.settings())
        return found

    def settings(self) -> dict[str, Any]:
        """What decides the outcome, as JSON has it."""
        kept = {k: v for k, v in asdict(self.config).items() if k not in _FREE_ON_RESUME}
        data = {"episodes": self.material.episodes, "windows": len(self.sampler)}
        return json.loads(json.dumps({**kept, "alg": self.alg, "seed": self.seed, "sizes": self.material.sizes, **data}))


def _read_errors(held: Mapping[str, Any]) -> ImaginationErrors:
    observation, reward, latent = (tuple(map(_number, held[name])) for name in ("observation", "reward", "latent"))
    return ImaginationErrors(observation, reward, latent, _number(held["unread"]), _number(held["simplex_distance"]))


def _number(value: float | None) -> float:
    """Strict JSON has null for what is not finite, as after a training that diverged."""
    return math.nan if value is None else float(value)


def _schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up to 1, then linear decay to 0.01."""
    if step < warmup:
        return (step + 1) / warmup
    return 1 - 0.99 * (step - warmup) / max(steps - warmup, 1)
