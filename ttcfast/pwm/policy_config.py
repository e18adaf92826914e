"""The settings of ``ttcfast train_policy``, and those that a comparison shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ttcfast.checks import at_least, one_of, whole
from ttcfast.runtime.devices import device_of
from ttcfast.runtime.errors import ArgumentError

from .algorithms.actor_critic import AgentConfig
from .arms import Arm

MODES = ("offline", "online", "dmo")


@dataclass(frozen=True)
class PolicySettings:
    """Settings that the runs of a comparison share.

    Args:
        alg: Group of ``ttcfast/configs/alg``: the world model, its loss and its optimizer.
        agent: Group of ``ttcfast/configs/agent``: fields of :class:`ttcfast.pwm.algorithms.actor_critic.AgentConfig`.
        mode: ``"offline"``: the recorded episodes alone; the world model is frozen while the policy trains. ``"online"``: the policy also
            plays episodes, from which the world model goes on learning. ``"dmo"``: the policy's rollouts are played in the simulator, and
            only their gradient is the world model's (:class:`ttcfast.pwm.algorithms.simulated.SimulatedEpisodes`).
        wm_steps: Updates of the world model before the policy's first; 0 for a trained ``world_model`` that stays as it is.
        steps: Updates of the policy.
        batch, horizon: Windows per update of the world model, and their steps.
        starts: Recorded states per update of the policy from which imagined rollouts start; in dmo, parallel episodes.
        warmup, wm_lr_floor: Updates of linear warm-up of the world model, and the share of ``alg.wm.lr`` left after ``wm_steps``.
        collect_every, collect_episodes: Online, updates of the policy between rounds of collection, and episodes per round, played with the
            policy's noise. In dmo, updates after which their rollouts join the world model's data, as episodes of ``agent.horizon`` steps.
        wm_updates: Online and in dmo, updates of the world model per update of the policy, at the learning rate's floor; 0 freezes it.
        first_share: Online and in dmo, share of every batch drawn from the recorded data, lest the world model forget where the policy is
            not.
        eval_every, eval_episodes, eval_seed: Updates between evaluations, the first of the initial policy, and their episodes, by the mean
            policy from the random seeds ``eval_seed`` on. The seeds from ``eval_seed + 1000`` on are those of the last evaluation, of
            ``final_episodes``.
        held_out, split_seed, eval_horizon, eval_stride: As in ``ttcfast train_wm``.
        esnr_microbatches: Number of microbatches, a divisor of ``starts``, of the ESNR of the actor's gradient, measured at evaluations.
        gradient_states: Number of states of an episode at which evaluations measure the world model's sensitivity and compare its gradient
            with the simulator's; 0 for neither. It decides nothing that is learned.
        processes: Worker processes of the simulator; 0 for none. In dmo its episodes have as many again.
        save_every, log_every: Updates between saves and between log entries.
        resume: Whether to keep a finished run and to continue an interrupted one.
    """

    alg: Mapping[str, Any] = field(default_factory=dict)
    agent: Mapping[str, Any] = field(default_factory=dict)
    mode: str = "offline"
    wm_steps: int = 1500
    steps: int = 400
    batch: int = 64
    horizon: int = 8
    starts: int = 64
    warmup: int = 50
    wm_lr_floor: float = 0.2
    collect_every: int = 50
    collect_episodes: int = 1
    wm_updates: int = 2
    first_share: float = 0.5
    eval_every: int = 100
    eval_episodes: int = 5
    eval_seed: int = 10_000
    final_episodes: int = 10
    held_out: float = 0.1
    split_seed: int = 0
    eval_horizon: int = 16
    eval_stride: int = 8
    esnr_microbatches: int = 8
    gradient_states: int = 16
    processes: int = 0
    save_every: int = 250
    log_every: int = 25
    resume: bool = True
    device: str = "cpu"
    tensorboard: bool = False
    wandb: str | None = None

    def __post_init__(self) -> None:
        one_of("mode", self.mode, MODES)
        for name in ("eval_seed", "wm_updates", "gradient_states", "processes"):
            whole(name, getattr(self, name), 0)
        whole("wm_steps", self.wm_steps, 0 if getattr(self, "world_model", None) else 1)
        counts = ("steps", "batch", "horizon", "starts", "collect_every", "collect_episodes", "eval_every", "eval_episodes")
        for name in (*counts, "final_episodes", "eval_horizon", "eval_stride", "save_every", "log_every"):
            whole(name, getattr(self, name), 1)
        at_least("warmup", self.warmup, 0)
        for name in ("wm_lr_floor", "first_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}; give a number in [0, 1]")
        if self.esnr_microbatches < 2 or self.starts % self.esnr_microbatches:
            raise ArgumentError(f"esnr_microbatches is {self.esnr_microbatches} and starts {self.starts}; give a divisor of at least 2")
        device_of(self.device)


@dataclass(frozen=True)
class TrainPolicyConfig(PolicySettings):
    """Settings of ``ttcfast train_policy``.

    Args:
        data: Folder of replay shards of one task, as ``ttcfast collect`` writes them.
        out: Folder that receives agent.safetensors, training.safetensors, result.json, the log and, online and in dmo, episodes/.
        arm: Kind of dynamics: ``mlp``, ``residual`` or a flow as ``heun<K>`` or ``euler<K>``.
        seed: Random seed of networks, batches and noise.
        task: The task, where ``data`` hold several; None for their only one.
        world_model: ``world_model.safetensors`` of ``ttcfast train_wm``, of this arm, where training starts; its own settings then stand
            for ``alg``. One that was trained on several tasks, ``task`` among them, is how PWM trains a policy per task.
    """

    data: str = "data/cartpole"
    out: str = "runs/train_policy"
    arm: str = "residual"
    seed: int = 0
    task: str | None = None
    world_model: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        Arm(self.arm)
        whole("seed", self.seed, 0)


def agent_config(given: Mapping[str, Any]) -> AgentConfig:
    try:
        return AgentConfig(**given)
    except TypeError as error:
        raise ArgumentError(f"agent is {dict(given)}; its keys are {', '.join(AgentConfig.__dataclass_fields__)} ({error})") from error
