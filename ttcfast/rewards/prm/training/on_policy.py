"""Trains a dense reward model along the rollouts that it corrects, with the surrogate in the loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttcfast.checks import at_least
from ttcfast.core.base_fm import Surrogate
from ttcfast.core.normalizer import Normalizer
from ttcfast.data import ReadOptions, TrajectorySet
from ttcfast.data.symmetry import random_declared, random_symmetry
from ttcfast.metrics import rollout_mse
from ttcfast.models.factory import check_one_model, name_of_model, open_surrogate, provenance_of
from ttcfast.models.grid_solvers import solver_of
from ttcfast.models.on_grid import open_conserved, require_fit, units_of_data
from ttcfast.physics import SolverError
from ttcfast.rewards.prm.dense import DensePRM
from ttcfast.runtime.devices import device_of
from ttcfast.runtime.errors import ArgumentError, CheckpointError
from ttcfast.runtime.files import output_folder
from ttcfast.runtime.training import LOSSES, Stopwatch, TrainingRun, check_training
from ttcfast.runtime.units import require_units, time_step_of
from ttcfast.spec import EulerSpec, StateSpec
from ttcfast.states.symmetry import Frames
from ttcfast.transfer import indices, sent

FRAMES = 4
"""Symmetries over which the averaged rollouts take a mean."""

_LATER: dict[str, Any] = {"factory": None, "args": {}, "init": None, "solver": 0.0, "averaged": 0.0}
"""Settings that runs of earlier versions do not have, and what they trained with."""


@dataclass(frozen=True)
class OnPolicyConfig:
    """Settings of ``ttcfast train_prm_on_policy``.

    Args:
        fm: Checkpoint of the surrogate.
        factory: Function of one's own that returns the surrogate instead, ``"package.module:function"``.
        args: Keyword arguments of the factory.
        data: Folder of trajectories.
        split: Split to train on, which the surrogate has not seen.
        valid: Number of trajectories of the valid split that are rolled out for validation.
        reading: Format of the data, and what it leaves open.
        out: Receives config.json and model.safetensors (averaged weights), training.safetensors (to resume), log.jsonl, log.csv.
        model: Arguments of ``DensePRM``; residual=true takes the features of ``EulerResidual`` with the data's time step and cell.
        init: Folder of a ``DensePRM`` to train further, in place of ``model``.
        batch: Number of rollouts, each of which gives one sample per step.
        restart: See ``RolloutPool``.
        refined: Share of samples whose candidate was already moved along the model's own field, so that repeated refinement is learned.
        stochastic: Share of samples whose candidate is stochastic instead of the deterministic step.
        solver: Share of samples whose candidate is a mean, of random weights, of the surrogate's step and the classical solver's, so that
            the reward may move either (``ttcfast.models.grid_solvers``).
        averaged: Share of rollouts that continue from the mean of corrected steps under ``FRAMES`` symmetries of the layout, so that the
            reward meets the states that such means lead to.
        steps, lr, warmup, weight_decay, clip, ema: AdamW with linear warm-up and cosine decay to 1 % of lr; decay of the weight average.
        loss: ``"l1"``, ``"mse"`` or ``"huber"`` of the field, in units of the step's standard deviation.
        max_seconds: Stop after so many seconds; the schedule then ends with them.
        clock: ``"wall"``, or ``"cpu"`` for this process's processor time, which other work on the machine does not change.
        val_every, save_every, log_every: Intervals in steps.
        resume: Continue from out/training.safetensors if it exists.
    """

    fm: str | None = None
    data: str = "data/euler64"
    split: str = "reward"
    valid: int = 16
    reading: ReadOptions = field(default_factory=ReadOptions)
    out: str = "runs/train_prm"
    model: dict[str, Any] = field(default_factory=dict)
    batch: int = 8
    restart: float = 0.2
    refined: float = 0.5
    stochastic: float = 0.25
    solver: float = 0.0
    averaged: float = 0.0
    steps: int = 4000
    lr: float = 2e-3
    warmup: int = 50
    weight_decay: float = 1e-4
    clip: float = 1.0
    ema: float = 0.99
    loss: str = "l1"
    max_seconds: float | None = None
    clock: str = "wall"
    val_every: int = 500
    save_every: int = 250
    log_every: int = 25
    resume: bool = True
    seed: int = 0
    device: str = "cpu"
    tensorboard: bool = False
    wandb: str | None = None
    factory: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    init: str | None = None

    def __post_init__(self) -> None:
        check_one_model(self.fm, self.factory, self.args)
        check_training(self, shares=("restart", "refined", "stochastic", "solver", "averaged", "ema"))


def train_on_policy(config: OnPolicyConfig) -> tuple[Path, dict[str, float]]:
    """Train a ``DensePRM``, or continue training; return the folder that ``PRM.from_pretrained`` reads and the last validation.

    Each step advances every rollout of a ``RolloutPool``: the input is a candidate (deterministic, stochastic or refined), the target its
    difference from the truth, and the next state the candidate moved along the predicted field. A killed run continues from its last save
    to the same weights as an uninterrupted one, unless ``max_seconds`` ends it.

    Raises:
        DataError: There are no data.
        CheckpointError: ``fm`` cannot be loaded, or the training state has other settings.
        TrainingError: The loss is not finite.
        ArgumentError: The surrogate sees several frames.
    """
    out = output_folder(config.out)
    run = _Run(config, out)
    validation = run.train() or run.validate(run.done)
    run.export(run.done, validation)
    return out, validation


class RolloutPool:
    """Rollouts along different trajectories, one per sample of a batch, which every training step advances by one step.

    Within a rollout a reward model encounters states that its own choices lead to. Here it encounters them in training: a rollout starts
    on the truth at a random time, under a random symmetry, continues from the corrected state, and restarts at the trajectory's end, with
    probability ``restart`` before it, or if it is no longer finite.

    Args:
        data: Trajectories in conserved variables.
        size: Number of rollouts.
        restart: Probability of a restart per step; 1 gives true states only.
        seed: Random seed of all choices.

    Source: data aggregation along the learner's own rollouts (DAgger, arXiv:1011.0686), for a one-step corrector.
    """

    def __init__(self, data: TrajectorySet, size: int, *, restart: float, seed: int) -> None:
        at_least("size", size, 1)
        if not 0 <= restart <= 1:
            raise ValueError(f"restart is {restart}; give a probability")
        self.data, self.spec, self.restart, self.seed = data, data.spec, restart, seed
        self.last = len(data.times) - 1
        self.time = torch.zeros(size, dtype=torch.int64)
        self.truth = torch.empty(size, self.last + 1, data.spec.num_channels, *data.shape)
        self.state = torch.empty(size, data.spec.num_channels, *data.shape)
        for slot in range(size):
            self._begin(slot, np.random.default_rng([seed, 3, slot]))

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return states ``[M, C, *S]`` and the truth one step later, in physical units."""
        return self.state.clone(), self.truth[torch.arange(len(self.time)), self.time + 1]

    def advance(self, after: Tensor, step: int) -> None:
        """Continue from the states ``after [M, C, *S]``; the training ``step`` determines which rollouts restart."""
        rng = np.random.default_rng([self.seed, 4, step])
        ends = rng.random(len(self.time)) < self.restart
        self.time += 1
        self.state = after.detach().cpu().float()
        finite = self.state.isfinite().flatten(1).all(1)
        for slot in range(len(self.time)):
            if ends[slot] or int(self.time[slot]) >= self.last or not bool(finite[slot]):
                self._begin(slot, rng)

    def state_dict(self) -> dict[str, Tensor]:
        return {"time": self.time, "truth": self.truth, "state": self.state}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        self.time, self.truth, self.state = (values[name].clone() for name in ("time", "truth", "state"))

    def _begin(self, slot: int, rng: np.random.Generator) -> None:
        trajectory = self.data.read(int(rng.integers(len(self.data))))
        turned = random_symmetry if isinstance(self.spec, EulerSpec) else random_declared
        self.truth[slot] = turned(trajectory.unsqueeze(0), self.spec, rng)[0]
        self.time[slot] = int(rng.integers(self.last))
        self.state[slot] = self.truth[slot, self.time[slot]]


class _Run(TrainingRun):
    """The state of one training run."""

    model: DensePRM

    def __init__(self, config: OnPolicyConfig, out: Path) -> None:
        self.config, self.out = config, out
        self.steps, self.max_seconds = config.steps, config.max_seconds
        self.device = device_of(config.device)
        torch.manual_seed(config.seed)
        self.surrogate = open_surrogate(config.fm, config.factory, config.args, device=self.device)
        name = name_of_model(config.fm, config.factory)
        if self.surrogate.history > 1:
            raise ArgumentError(
                f"fm is {name} with history={self.surrogate.history} and train_prm_on_policy steps from single states; give a model with "
                "history=1, or train on triplets (ttcfast build_prm_data, train_prm), which take any history"
            )
        if self.surrogate.inputs is not None:
            raise ArgumentError(
                f"the surrogate of {name} has inputs, and here each state stands at a time of its own; give one without inputs"
            )
        data = self._open(config.split)
        require_fit(data, self.surrogate, name)
        self.spec, self.unit = self.surrogate.spec, self._normalizer().delta_std.view(-1, 1, 1).to(self.device)
        self.solver = solver_of(data, self.spec, work=config.steps * config.batch) if config.solver else None
        self.layout = data.spec  # with the symmetries that the files declare
        if config.averaged and not (self.layout.symmetries or self.layout.translations):
            raise ArgumentError(f"averaged is {config.averaged} and neither model nor data declare a symmetry; give 0")
        self.model = _model(config, self.surrogate, data).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.pool = RolloutPool(data, config.batch, restart=config.restart, seed=config.seed)
        self.start_optimizer()
        self.valid = self._open("valid").first(config.valid).stack().to(self.device)
        self.watch = Stopwatch(config.clock)

    def _normalizer(self) -> Normalizer:
        if self.surrogate.normalizer is None:
            name = name_of_model(self.config.fm, self.config.factory)
            raise CheckpointError(f"the surrogate of {name} has no normaliser; the reward model's units come from it: give it one")
        return self.surrogate.normalizer

    def _open(self, split: str) -> TrajectorySet:
        return open_conserved(self.config.data, split, self.config.reading, self.surrogate.spec)

    def step(self, step: int) -> dict[str, float]:
        """One update."""
        config = self.config
        state, truth = (sent(v, self.device) for v in self.pool.batch())
        candidate = self._candidates(state, step)
        target = self.spec.carried((truth - candidate) / self.unit, torch.zeros_like(truth), channel_axis=1)
        self.model.train()
        found = self.model.error(state, candidate)
        loss = LOSSES[config.loss](found, target)
        made = self.descend(loss, step, {"loss": loss, "unmoved": LOSSES[config.loss](target, torch.zeros_like(target))})
        after = candidate + found.detach() * self.unit
        turned = self._drawn(config.averaged, step, 6)
        if len(turned):
            after[turned] = self._mean_of_frames(state[turned], step)
        self.pool.advance(_conserving(state, after, self.spec), step)
        return made

    @torch.no_grad()
    def _candidates(self, state: Tensor, step: int) -> Tensor:
        """Return one candidate per state: the deterministic step, a stochastic one, or either moved along the model's own field."""
        config, n = self.config, len(state)
        rng = np.random.default_rng([config.seed, 5, step])
        candidate = self.surrogate.deterministic(state)
        ids = _below(config.stochastic, rng, n)
        if len(ids):
            noisy = sent(ids, self.device)
            drawn = self.surrogate.candidates(state[noisy], torch.tensor([1]), problem_ids=ids, seed=config.seed, step=step + 1)
            candidate[noisy] = drawn[:, 0]
        if self.solver is not None and len(mixed := self._drawn(config.solver, step, 7)):
            weight = self._sent(np.random.default_rng([config.seed, 8, step]).random((len(mixed), 1, 1, 1)))
            candidate[mixed] = torch.lerp(candidate[mixed], self._solved(state[mixed]), weight)
        moved = sent(_below(config.refined, rng, n), self.device)
        if len(moved):
            length = self._sent(rng.choice([0.5, 1.0], (len(moved), 1, 1, 1)))
            field_of = self.model.error(state[moved], candidate[moved])
            candidate[moved] += length * field_of * self.unit
        return self.spec.carried(candidate, state, channel_axis=1)

    def _drawn(self, share: float, step: int, stream: int) -> Tensor:
        """Return the rows of the batch, each with probability ``share``, that this step treats in one way."""
        return sent(_below(share, np.random.default_rng([self.config.seed, stream, step]), self.config.batch), self.device)

    def _sent(self, numbers: np.ndarray) -> Tensor:
        return sent(torch.from_numpy(numbers).float(), self.device)

    def _solved(self, state: Tensor) -> Tensor:
        """Return the classical solver's step, or the surrogate's where a rollout has led to states that it cannot take."""
        assert self.solver is not None
        try:
            return self.solver.step(state)
        except SolverError:
            return self.surrogate.deterministic(state)

    @torch.no_grad()
    def _mean_of_frames(self, state: Tensor, step: int) -> Tensor:
        """Return the mean over symmetries of the deterministic step and two moves."""
        n, options = len(state), {"seed": self.config.seed, "step": step}
        frames = Frames(self.layout, state.shape[2:], torch.arange(FRAMES).expand(n, -1), torch.arange(n), **options)
        seen = frames.into(state.unsqueeze(1).expand(n, FRAMES, *state.shape[1:])).flatten(0, 1)
        return frames.back(self._moved(seen, 2).unflatten(0, (n, FRAMES))).mean(1)

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Return mean squared errors relative to the deterministic step, for single steps and rollouts with 0, 1 and 2 moves."""
        with self.averaged():
            return self._errors(self.valid)

    def _errors(self, truth: Tensor) -> dict[str, float]:
        before, after = truth[:, :-1:4].flatten(0, 1), truth[:, 1::4].flatten(0, 1)
        result: dict[str, float] = {}
        base: dict[str, float] = {}
        for moves in (0, 1, 2):
            one = torch.cat([self._moved(b, moves) for b in before.split(32)])
            rolled = [truth[:, 0]]
            for _ in range(truth.shape[1] - 1):
                rolled.append(self._moved(rolled[-1], moves))
            error = self._error(torch.stack(rolled, 1), truth)
            found = {"one_step": float(self._error(one.unsqueeze(1), after.unsqueeze(1)).mean())}
            found |= {f"rollout_{h}": float(error[:, h].mean()) for h in (4, 16) if h < truth.shape[1]}
            if moves == 0:
                base, first = found, error
            else:
                result |= {f"{name}_ratio_{moves}": value / base[name] for name, value in found.items()}
                result[f"improved_{moves}"] = float((error.mean(1) < first.mean(1)).float().mean())
        return result

    def _error(self, found: Tensor, truth: Tensor) -> Tensor:
        scale = self._normalizer().std.to(self.device)
        found, truth, scale = (self.spec.predicted(x, channel_axis=k) for x, k in ((found, 2), (truth, 2), (scale, 0)))
        return rollout_mse(found, truth, scale=scale)

    def _moved(self, state: Tensor, moves: int) -> Tensor:
        new = self.surrogate.deterministic(state)
        for _ in range(moves):
            new = new + self.model.error(state, new) * self.unit
        return _conserving(state, new, self.spec)

    def settings(self) -> dict[str, Any]:
        found = super().settings()
        found = {name: value for name, value in found.items() if name not in _LATER or value != _LATER[name]}
        return found | provenance_of(self.surrogate)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "pool": self.pool.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.pool.load_state_dict(state["pool"])

    def export(self, step: int, validation: dict[str, float]) -> None:
        training = {**asdict(self.config), "steps_done": step, "seconds": round(self.watch.seconds())}
        self.model.info = {**self.model.info, "training": training, "validation": validation}
        with self.averaged():
            self.model.save_pretrained(self.out)


def _model(config: OnPolicyConfig, surrogate: Surrogate, data: TrajectorySet) -> DensePRM:
    name = name_of_model(config.fm, config.factory)
    remedy = "give data of one kind, or model.residual with their dt and cell (gamma is the surrogate's), or model.residual=false"
    info = {"fm": Path(name).name, "time_step": time_step_of(data.times), **provenance_of(surrogate)}
    if config.init is not None:
        model = _begun(config, surrogate, info)
        require_units(units_of_data(data), model.units(f"init {config.init}"), "give the reward model of such data, or no init")
        return model
    sizes = dict(config.model)
    residual = sizes.pop("residual", True)
    if residual is True and not isinstance(surrogate.spec, EulerSpec):
        residual = None  # its features are those of the Euler equations
    if residual is True:
        step = float(data.times[1] - data.times[0])
        volume = data.spec.cell_volume
        if torch.is_tensor(volume) or len(set(data.shape)) != 1:
            raise ArgumentError("model.residual is true but the cells may not be square; give model.residual.dt and .cell, or false")
        residual = {"dt": step, "cell": [float(volume) ** 0.5] * 2}
    try:
        model = DensePRM(
            2 * surrogate.spec.num_channels,
            **sizes,
            normalizer=surrogate.normalizer,
            spec=surrogate.spec,
            residual=residual or None,
            info=info,
        )
    except TypeError as error:
        raise ArgumentError(f"model has an unknown size ({error}); see DensePRM for the names") from error
    require_units(units_of_data(data), model.units("the reward model"), remedy)
    return model


def _begun(config: OnPolicyConfig, surrogate: Surrogate, info: Mapping[str, Any]) -> DensePRM:
    """Return the reward model that the training begins with."""
    assert config.init is not None
    model = DensePRM.from_pretrained(config.init)
    ours, theirs = surrogate.normalizer, model.normalizer
    assert ours is not None
    names = ("mean", "std", "delta_std")
    alike = theirs is not None and all(torch.allclose(getattr(ours, n).cpu(), getattr(theirs, n).cpu()) for n in names)
    if not isinstance(model, DensePRM) or model.channels != surrogate.spec.num_channels or not alike:
        raise ArgumentError(
            f"init is {config.init}, which is no DensePRM in the channels and units of this surrogate; give one, or no init"
        )
    model.info = {**info, "init": model.info.get("training")}
    return model


def _conserving(state: Tensor, new: Tensor, spec: StateSpec) -> Tensor:
    """Return ``new`` with the totals of ``state``, as after a projection, if the domain conserves them and cells are equal."""
    new = spec.carried(new, state, channel_axis=1)
    if not spec.conserved_channels or torch.is_tensor(spec.cell_volume):
        return new
    at = indices(spec.conserved_channels, new.device)
    out = new.clone()
    out[:, at] -= (new[:, at] - state[:, at]).mean((2, 3), keepdim=True)
    return out


def _below(share: float, rng: np.random.Generator, n: int) -> Tensor:
    """Return which of ``n`` rows are drawn, each with probability ``share``."""
    return torch.from_numpy(rng.random(n) < share).nonzero().flatten()
