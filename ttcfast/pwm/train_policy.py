"""Trains a world model and then a policy by its gradients, from recorded episodes alone or with its own, with exact resume."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ttcfast.data.replay import ReplaySampler, ReplaySet, Windows
from ttcfast.data.replay_shard import ReplayShard, write_shard
from ttcfast.esnr.ratio import ESNR
from ttcfast.ops import normal
from ttcfast.runtime import checkpoints
from ttcfast.runtime.devices import device_of
from ttcfast.runtime.errors import ArgumentError
from ttcfast.runtime.files import output_folder, write_json
from ttcfast.runtime.progress import bar
from ttcfast.runtime.training import Stopwatch, TrainingRun, Updates, driven, settings
from ttcfast.spec import Key

from .algorithms import PWM
from .algorithms.simulated import SimulatedEpisodes
from .arms import Arm
from .checkpoint import WORLD_MODEL, save_agent, world_model_of
from .envs import EnvPool, make_env
from .envs.base import Environment, PaddedEnv
from .envs.rollouts import Rollouts, rollouts
from .evaluation.along import along_episode, saturation
from .evaluation.gradients import settable
from .evaluation.imagination import ImaginationErrors
from .evaluation.parity import parameter_parity
from .policy_config import TrainPolicyConfig, agent_config
from .policy_result import Evaluation, PolicyResult, errors_of, evaluation_of, read_result
from .train_wm import Material

logger = logging.getLogger(__name__)

_SITE_EXPLORE, _SITE_ALONG = 4, 5  # sites of the keyed noise of collected episodes and of measured directions
_FREE_ON_RESUME = {"out", "task", "world_model", "resume", "save_every", "gradient_states", "processes", "tensorboard", "wandb"}


def train_policy(config: TrainPolicyConfig, advance: Callable[[float, str | None], None] | None = None) -> PolicyResult:
    """Train one policy, or return the result of the finished run in ``out``.

    A run that was killed continues from its last save and ends with the same weights as an uninterrupted one, bit for bit on one machine
    with the same number of threads. A resume with other settings is refused.

    Args:
        config: Settings.
        advance: Receives the updates made and a note; None shows a progress bar.

    Raises:
        DataError: There are no data, or of another task.
        ArgumentError: A setting does not fit the data, the models or the task.
        ParityError: As ``alg.parity`` decides.
        CheckpointError: An earlier run in ``out`` is damaged or has other settings.
        MissingPackageError: The simulator is not installed.
    """
    run = PolicyRun(config)
    if config.resume and (found := run.read()) is not None:
        if advance is not None:
            advance(run.steps, None)
        return found
    if advance is not None:
        return run.result(advance)
    with bar(run.steps, "train_policy") as progress:
        return run.result(lambda steps, text: progress.advance(steps, note=text or ""))


class PolicyRun(TrainingRun):
    """The state of one training run; its first ``wm_steps`` updates are those of the world model, the rest the policy's."""

    settings_key, require_finite = "settings", False  # the sanity checks skip updates that are not finite

    def __init__(self, config: TrainPolicyConfig, material: Material | None = None) -> None:
        self.config, self.out = config, output_folder(config.out)
        self.arm, self.agent_config = Arm(config.arm), agent_config(config.agent)
        self._trained = None if config.world_model is None else checkpoints.load(config.world_model, {"architecture": WORLD_MODEL})
        self.alg = self.arm.configure(config.alg) if self._trained is None else self._trained[1]["alg"]
        self.steps, self.report = config.wm_steps + config.steps, self.out / "result.json"
        names = self._trained[1]["sizes"]["tasks"] or () if self._trained is not None else ()
        self.material = material or Material(config.data, config, names if config.task is not None else (), config.task)
        self.task, self.env = task_of(self.material.train, config.data, config.task)
        self.number = int(self.material.train.tasks()[0])
        self.sizes = self.material.sizes if self._trained is None else self._checked_sizes()
        self.first = ReplaySampler(self.material.train, config.horizon, seed=config.seed)
        self.own: ReplaySampler | None = None
        self.rounds, self.failed, self.stopped_by_policy = 0, 0, False
        self.evaluations: list[Evaluation] = []
        self.norms: list[float] = []  # of the actor's gradients since the last evaluation
        self.before: ImaginationErrors | None = None
        self.simulated: SimulatedEpisodes | None = None
        self.probe: Environment | None = None  # simulator of the measured gradients
        self.learns = config.mode != "offline" and config.wm_updates > 0  # whether the world model goes on learning
        if config.mode == "dmo" and self.learns and config.horizon > self.agent_config.horizon:
            raise ArgumentError(
                f"horizon is {config.horizon} and agent.horizon {self.agent_config.horizon}; in dmo the world model learns from rollouts "
                "of agent.horizon steps: give a horizon of at most that, or wm_updates=0"
            )

    def result(self, advance: Callable[[float, str | None], None]) -> PolicyResult:
        """Train or resume the run, measure it, and write agent.safetensors and result.json."""
        return driven(self.stages(advance), self.step)

    def stages(self, advance: Callable[[float, str | None], None]) -> Updates[PolicyResult]:
        """:meth:`result` as a generator, like :meth:`ttcfast.runtime.training.TrainingRun.updates`."""
        config, material = self.config, self.material
        if not config.resume:
            self.report.unlink(missing_ok=True)
            for file in self._shards():
                file.unlink()
        torch.manual_seed(config.seed)
        self.agent = self._new_agent()
        several = self.agent.model.task_embedding is not None
        torch.manual_seed(config.seed)  # arms of one seed begin with the same policy, whatever their world models have drawn
        largest = max(float(material.train[i].rew.abs().max()) for i in range(len(material.train)))
        told = {"reward_scale": max(largest, 1e-6), "seed": config.seed, "task": self.task if several else None}
        self.policy = self.agent.add_policy(self.agent_config, **told)
        self.model, self.optimizer = self.agent.model, self.agent.wm_optimizer
        self.lr = float(self.optimizer.param_groups[0]["lr"])
        self.watch, self.cpu = Stopwatch(running=False), Stopwatch("cpu", running=False)
        self.wm_watch = Stopwatch(running=False)
        with self._pool(max(config.eval_episodes, config.collect_episodes)) as self.pool, ExitStack() as stack:
            if (self.pool.observation_dim, self.pool.action_dim) != (self.agent.model.observation_dim, self.agent.model.action_dim):
                raise ArgumentError(
                    f"{config.data} has observations and actions of sizes {self.agent.model.observation_dim, self.agent.model.action_dim}, "
                    f"{self.task} of {self.pool.observation_dim, self.pool.action_dim}; give data of this task"
                )
            if config.mode == "dmo":
                own = stack.enter_context(self._pool(config.starts))
                self.simulated = SimulatedEpisodes(own, self.policy, first_seed=config.eval_seed + 10_000, keep=self.learns)
            yield from self.updates(advance)
        if self.stopped():
            logger.error("%s, seed %d: stopped after %d of %d updates", self.arm.label, config.seed, self.done, self.steps)
            advance(self.steps - self.done, None)
        about = {"task": self.task, "arm": self.arm.name, "seed": config.seed, "steps": self.done}
        save_agent(self.out / "agent.safetensors", self.agent, self.alg, self.sizes, **about)
        found = self._result()
        write_json(self.report, {"result": asdict(found), "settings": self.settings()})
        return found

    def _checked_sizes(self) -> dict[str, Any]:
        """Return the sizes of the trained world model, once they are known to fit the arm, the data and the task."""
        assert self._trained is not None
        path, sizes, arm = self.config.world_model, dict(self._trained[1]["sizes"]), self._trained[1].get("arm")
        if arm != self.arm.name:
            raise ArgumentError(f"arm is {self.arm.name}; {path} was trained as {arm}: give arm={arm}")
        own, theirs = (tuple(s[n] for n in ("observation_dim", "action_dim")) for s in (self.material.sizes, sizes))
        if own != theirs:
            raise ArgumentError(f"{self.config.data} has observations and actions of sizes {own}, {path} of {theirs}; give its data")
        tasks = sizes["tasks"] or [self.task]
        if self.task not in tasks or (len(tasks) > 1 and tasks.index(self.task) != self.number):
            known = ", ".join(f"{i}: {name}" for i, name in enumerate(tasks))
            raise ArgumentError(f"{self.config.data} has {self.task} as task {self.number}; {path} knows {known}: give its data")
        return sizes

    def _new_agent(self) -> PWM:
        if self._trained is None:
            return self.material.agent(self.alg, self.config.device)
        assert self.config.world_model is not None
        return world_model_of(*self._trained, self.config.world_model, device=self.config.device)

    def _pool(self, count: int) -> EnvPool:
        return EnvPool([self.env] * count, self.config.processes)

    def read(self) -> PolicyResult | None:
        """Return the result of a finished run, None if there is none."""
        return read_result(self.report, self.settings())

    @property
    def val_every(self) -> int:
        return 1  # validate() knows when an evaluation is due

    def stopped(self) -> bool:
        return self.agent.sanity.stopped or self.stopped_by_policy

    def settings(self) -> dict[str, Any]:
        """Return the settings that decide the outcome, as JSON values."""
        own = {"alg": self.alg, "agent": asdict(self.agent_config), "sizes": self.sizes, "episodes": self.material.episodes}
        if self._trained is not None:
            own["world_model"] = {name: self._trained[1].get(name) for name in ("arm", "seed", "steps")}
        return json.loads(json.dumps({**settings(self.config, _FREE_ON_RESUME), **own, "windows": len(self.first)}))

    def state(self) -> dict[str, Any]:
        before = None if self.before is None else asdict(self.before)
        seconds = {"cpu": self.cpu.seconds(), "wm": self.wm_watch.seconds()}
        counts = {"rounds": self.rounds, "failed": self.failed, "stopped_by_policy": self.stopped_by_policy}
        return {
            "policy": self.policy.state_dict(),
            "sanity": self.agent.sanity.state_dict(),
            "evaluations": [asdict(e) for e in self.evaluations],
            "norms": self.norms,
            "before": before,
            "simulated": None if self.simulated is None else self.simulated.state_dict(),
            "spent": seconds,
            **counts,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        self.agent.sanity.load_state_dict(state["sanity"])
        self.evaluations = [evaluation_of(held) for held in state["evaluations"]]
        self.norms = list(state["norms"])
        self.before = None if state["before"] is None else errors_of(state["before"])
        self.rounds, self.failed = int(state["rounds"]), int(state["failed"])
        self.stopped_by_policy = bool(state["stopped_by_policy"])
        self.cpu.restart_at(float(state["spent"]["cpu"]))
        self.wm_watch.restart_at(float(state["spent"]["wm"]))
        self._open_own()
        if self.simulated is not None:
            self.simulated.load_state_dict(state["simulated"])

    def step(self, step: int) -> dict[str, float]:
        for watch in (self.watch, self.cpu):
            watch.go_on()
        later = step - self.config.wm_steps
        if later == 0 and not self.evaluations:  # there was no update of the world model after which the first would have come
            self.validate(step)
        if later >= 0 and self.config.mode != "offline" and later % self.config.collect_every == 0:
            for watch in (self.watch, self.cpu):
                watch.pause()
            self._collect()
            for watch in (self.watch, self.cpu):
                watch.go_on()
        found = self._update_wm(step, step) if later < 0 else self._update_policy(later)
        for watch in (self.watch, self.cpu):
            watch.pause()
        return found

    def validate(self, step: int) -> dict[str, float]:
        config, later = self.config, step - self.config.wm_steps
        errors: dict[str, float] = {}
        if later == 0:
            self.before = self.material.errors(self.agent.model)
            errors = {"observation_error": self.before.observation[-1], "reward_error": self.before.reward[-1]}
        last = step == self.steps or self.stopped()
        if later < 0 or not (self._due(later) or last):
            return {}
        count, seed = (config.final_episodes, config.eval_seed + 1000) if last else (config.eval_episodes, config.eval_seed)
        self.evaluations.append(found := self._evaluate(later, [seed + i for i in range(count)]))
        return {**errors, "return": found.mean, **{name: value for name, value in asdict(found).items() if name not in ("step", "returns")}}

    def _due(self, later: int) -> bool:
        """Return whether an evaluation comes after so many updates of the policy."""
        return later % self.config.eval_every == 0 or later == self.config.steps

    def _update_wm(self, step: int, draw: int, lr: float | None = None) -> dict[str, float]:
        self.wm_watch.go_on()
        self.set_wm_rate(step, lr)
        obs, act, rew, _ = self.windows(draw, self.config.batch)
        found = self.agent.update_wm(obs, act, rew, self.policy.task)
        self.wm_watch.pause()
        return found

    def set_wm_rate(self, step: int, lr: float | None = None) -> None:
        """Set the learning rate of the world model for update ``step``, or to ``lr``."""
        config = self.config
        done = step / max(config.wm_steps, 1)
        share = (step + 1) / config.warmup if step < config.warmup else 1 - (1 - config.wm_lr_floor) * done
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * share if lr is None else lr

    def _update_policy(self, step: int) -> dict[str, float]:
        config, found = self.config, {}
        for i in range(config.wm_updates if self.learns else 0):
            draw = config.wm_steps + step * config.wm_updates + i
            found = {f"wm/{k}": v for k, v in self._update_wm(config.wm_steps, draw, self.lr * config.wm_lr_floor).items()}
            if self.agent.sanity.stopped:
                return {**found, "loss": math.nan}
        if self.simulated is None:
            update = self.agent.update_policy(self.observations(step), step, progress=step / config.steps)
        else:
            measured = config.esnr_microbatches if self._due(step + 1) else 0
            roll = partial(self.simulated.rollout, microbatches=measured)
            update = self.policy.update(self.simulated.starts(), step, progress=step / config.steps, imagine=roll)
        return {**found, **self.told(update)}

    def told(self, update: dict[str, float]) -> dict[str, float]:
        """Take note of an update of the policy and return what is logged of it."""
        self.norms.append(update["actor_gradient_norm"])
        # As for the world model, so many skipped updates in a row mean that nothing will come any more.
        self.stopped_by_policy = bool(self.agent.sanity.patience) and self.policy.skipped_in_a_row >= self.agent.sanity.patience
        return {**update, "loss": update["actor_loss"]}

    def _starts(self, step: int) -> Tensor:
        """Return the latents from which the imagined rollouts of update ``step`` start."""
        with torch.no_grad():
            return self.agent.model.encode(self.observations(step), self.policy.task)

    def observations(self, step: int) -> Tensor:
        """Return the recorded observations ``[starts, observation_dim]`` where the imagined rollouts of update ``step`` start."""
        return self.windows(10**9 + step, self.config.starts).obs[0]

    def windows(self, draw: int, size: int) -> Windows:
        """Return windows of the recorded episodes and, once there are any, of the policy's own."""
        if self.own is None:
            return self.first.batch(draw, size).to(self.config.device)
        recorded = round(self.config.first_share * size)
        parts = [sampler.batch(draw, n) for sampler, n in ((self.first, recorded), (self.own, size - recorded)) if n]
        joined = [torch.cat(held, 0 if held[0].ndim == 1 else 1) for held in zip(*parts)]
        return Windows(*joined).to(self.config.device)

    def _collect(self) -> None:
        """Add a round of episodes to the data, as one shard: played with the policy's noise or, in dmo, the rollouts since the last."""
        config = self.config
        if self.simulated is not None:
            kept = [replace(episode, task=self.number) for episode in self.simulated.take()]
        else:
            seeds = [config.eval_seed + 10_000 + self.rounds * config.collect_episodes + i for i in range(config.collect_episodes)]
            played = self._play(seeds, noise=Key(config.seed, self.rounds, _SITE_EXPLORE))
            self.failed += played.failed
            kept = played.kept()
        if kept:
            write_shard(self._shard(self.rounds), kept, {"task": self.task, "number": self.number, "round": self.rounds})
        self.rounds += 1
        self._open_own()

    def _shard(self, number: int) -> Path:
        return self.out / "episodes" / f"round_{number:05d}.pt"

    def _shards(self) -> list[Path]:
        folder = self.out / "episodes"
        return sorted(folder.glob("round_*.pt")) if folder.is_dir() else []

    def _open_own(self) -> None:
        """Read the policy's own episodes; those of rounds that a resume repeats are overwritten."""
        files = [file for file in map(self._shard, range(self.rounds)) if file.exists()]
        if files:
            shards = [ReplayShard(file, verify=False) for file in files]
            self.own = ReplaySampler(ReplaySet(shards), self.config.horizon, seed=self.config.seed)

    def _play(self, seeds: list[int], noise: Key | None = None) -> Rollouts:
        """Play episodes by the mean policy, or with ``noise``."""

        def policy(obs: Tensor, step: int, episodes: Tensor) -> Tensor:
            eps = None
            if noise is not None:
                rows = torch.stack([episodes, torch.full_like(episodes, step)], 1)
                eps = normal(len(obs), (self.agent.model.action_dim,), key=noise, rows=rows).to(self.config.device)
            return self.agent.act(obs.to(self.config.device), eps).cpu()

        played = rollouts(self.pool, policy, seeds, task=self.number)
        if played.failures and not self.failed:  # told once; the result counts them
            logger.warning("an episode was dropped, in which the simulator failed: %s", next(iter(played.failures.values())))
        return played

    def _evaluate(self, step: int, seeds: list[int]) -> Evaluation:
        played = self._play(seeds)
        self.failed += played.failed
        kept, gamma = played.kept(), self.agent_config.gamma
        realised = [float((gamma ** torch.arange(len(e.rew), dtype=torch.float64)) @ e.rew.double().flatten()) for e in kept]
        predicted = math.nan
        if kept:
            with torch.no_grad():
                first = torch.stack([e.obs[0] for e in kept]).to(self.config.device)
                z = self.agent.model.encode(first, self.policy.task)
                predicted = float(self.policy.value(z).mean())
        starts, norms = self._starts(step), [norm for norm in self.norms if math.isfinite(norm)]
        self.norms = []
        if self.simulated is None:
            ratio: ESNR | None = self.policy.measure_esnr(starts, step, self.config.esnr_microbatches)
        else:
            ratio = self.simulated.esnr  # of the update before
        return Evaluation(
            step=step,
            returns=tuple(played.returns[~played.returns.isnan()].tolist()),
            predicted=predicted,
            realised=sum(realised) / len(realised) if realised else math.nan,
            esnr_db=math.nan if ratio is None else ratio.raw_db,
            esnr_unbiased_db=math.nan if ratio is None else ratio.unbiased_db,
            gradient_cosine=self.policy.finite_difference_cosine(starts[:16], step),
            gradient_norm=median(norms) if norms else math.nan,
            seconds=self.watch.seconds(),
            cpu_seconds=self.cpu.seconds(),
            **self._along(played, seeds, step),
        )

    def _along(self, played: Rollouts, seeds: list[int], step: int) -> dict[str, float]:
        """Return the saturation of the episodes' actions, and what is measured along the first of them."""
        if not (kept := played.kept()):
            return {}
        found = {"saturation": saturation(self.agent.model, kept, self.policy.task)}
        if not self.config.gradient_states:
            return found
        if self.probe is None:
            self.probe = self.env()
        first = next(seed for seed, episode in zip(seeds, played.episodes) if episode is not None)
        key, states = Key(self.config.seed, step, _SITE_ALONG), self.config.gradient_states
        return found | along_episode(self.agent, settable(self.probe), kept[0], seed=first, states=states, key=key)

    def _result(self) -> PolicyResult:
        config, model, later = self.config, self.agent.model, max(self.done - self.config.wm_steps, 0)
        parity = self.agent.parity or parameter_parity(model)
        updates = self.done - later + (later * config.wm_updates if self.learns else 0)
        fields = updates * self.agent.wm_evaluations(config.horizon) + later * self.agent_config.horizon * model.evaluations
        errors = self.material.errors(model)
        own_steps = 0 if self.own is None else int(self.own.data.lengths().sum())
        return PolicyResult(
            task=self.task,
            arm=self.arm.name,
            seed=config.seed,
            mode=config.mode,
            evaluations=tuple(self.evaluations),
            errors=errors,
            errors_before=self.before or errors,
            detach=self.agent_config.detach,
            parameters=parity.model,
            dynamics_gap=parity.dynamics_gap,
            dynamics_evaluations=model.evaluations,
            field_evaluations=fields,
            own_episodes=0 if self.own is None else len(self.own.data),
            failed=self.failed + (0 if self.simulated is None else self.simulated.failed),
            wm_seconds=self.wm_watch.seconds(),
            policy_seconds=self.watch.seconds() - self.wm_watch.seconds(),
            cpu_seconds=self.cpu.seconds(),
            skipped=self.agent.sanity.skipped + self.policy.skipped,
            stopped=self.stopped(),
            device=device_of(config.device).type,
            environment_steps=own_steps if self.simulated is None else self.simulated.steps,
        )


def task_of(data: ReplaySet, place: str, task: str | None = None) -> tuple[str, Callable[[], Environment]]:
    """Return the task of the shards, ``task`` where they name none, and what makes its environment, with the sizes of the data."""
    made = [shard.parameters for shard in data.shards]
    names = {str(p.get("task", task)) for p in made}
    if len(names) != 1 or names == {"None"}:
        raise ArgumentError(f"data is {place}, with shards of {', '.join(sorted(names))}; give a folder of one named task, or task=")
    repeats = {int(p.get("action_repeat", 2)) for p in made}
    if len(repeats) != 1:
        raise ArgumentError(f"data is {place}, with shards of action repeats {sorted(repeats)}; give a folder of one")
    (found,) = names
    return found, partial(_padded, found, repeats.pop(), data.observation_dim, data.action_dim)


def _padded(task: str, action_repeat: int, observation_dim: int, action_dim: int) -> Environment:
    env = make_env(task, action_repeat=action_repeat)
    fits = (env.observation_dim, env.action_dim) == (observation_dim, action_dim)
    return env if fits else PaddedEnv(env, observation_dim, action_dim)
