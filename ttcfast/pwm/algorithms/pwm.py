"""PWM: a world model's rollout, loss and update with sanity checks, and the policy that is trained inside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttcfast import integrators
from ttcfast.checks import at_least, whole
from ttcfast.pwm.algorithms.sanity import SanityChecks
from ttcfast.pwm.evaluation.parity import Parity, parameter_parity
from ttcfast.pwm.models.base import BaseWorldModel, Task
from ttcfast.pwm.models.flow_world_model import FlowWorldModel
from ttcfast.pwm.models.layers import simplex_distance, wide
from ttcfast.pwm.models.world_model import MLPWorldModel
from ttcfast.pwm.utils.metrics import ESNRMeter
from ttcfast.pwm.utils.targets import build, group, locate
from ttcfast.runtime.errors import ArgumentError

from .actor_critic import ActorCritic, AgentConfig
from .dynamics_loss import DynamicsLoss, FlowMatchingDynamicsLoss, MLPDynamicsLoss
from .flat_adam import FlatAdam

GROUPS = ("use_flow_dynamics", "model", "dynamics_loss", "integrator", "parity", "sanity", "wm", "agent")
INTEGRATION = {"type": "heun", "substeps": 2, "tau_sampling": "uniform"}


class WorldModelLoss(NamedTuple):
    """Loss of a world model; all entries but ``latents`` are scalars, of S models stacked ``[S]``."""

    total: Tensor  # what is minimised
    dynamics: Tensor
    reward: Tensor
    simplex_distance: Tensor  # of ``latents``, without gradient
    largest_latent: Tensor  # largest magnitude in ``latents``; the unit is the largest target's, at least 1 (on simplices: 1)
    latents: Tensor  # the rollout, [H + 1, B, latent_dim]; [H, B, latent_dim] if the dynamics loss does not read the last state


class PWM:
    """Trains a world model on sequences and, after :meth:`add_policy`, a policy inside it.

    Args:
        model: World model to train.
        dynamics_loss: Loss of its dynamics; None for flow matching with a ``FlowWorldModel`` and the squared error otherwise.
        gamma: Discount of later steps in the loss.
        dynamics_weight: Weight of the dynamics loss (TD-MPC2: 20).
        reward_weight: Weight of the reward loss (TD-MPC2: 0.1), which is about a thousand times as large.
        lr: Learning rate of Adam (PWM: 3e-4).
        betas: Decay rates of Adam (PWM: 0.7 and 0.95).
        clip: Largest gradient norm (PWM: 20).
        sanity: Limits beyond which an update is skipped; None for the defaults.

    Raises:
        ValueError: A number is out of range, or the loss does not fit the model.

    Source: Flow plan, "Mathematical Specification", "Algorithmic Rollout and Loss (Responsibility Separation)".
    """

    def __init__(
        self,
        model: BaseWorldModel,
        dynamics_loss: DynamicsLoss | None = None,
        *,
        gamma: float = 0.99,
        dynamics_weight: float = 20.0,
        reward_weight: float = 0.1,
        lr: float = 3e-4,
        betas: Sequence[float] = (0.7, 0.95),
        clip: float = 20.0,
        sanity: SanityChecks | None = None,
    ) -> None:
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma is {gamma}; it lies in (0, 1]")
        for name, value in (("dynamics_weight", dynamics_weight), ("reward_weight", reward_weight), ("lr", lr), ("clip", clip)):
            at_least(name, value, 0)
        dynamics_loss = dynamics_loss or _loss_of(type(model))()
        if isinstance(dynamics_loss, FlowMatchingDynamicsLoss) and not isinstance(model, FlowWorldModel):
            raise ValueError(f"dynamics_loss is FlowMatchingDynamicsLoss and the model a {type(model).__name__}; use MLPDynamicsLoss")
        self.model, self.dynamics_loss, self.gamma = model, dynamics_loss, gamma
        self.weights, self.clip, self.sanity = (dynamics_weight, reward_weight), clip, sanity or SanityChecks()
        self.wm_optimizer = FlatAdam(model.parameters(), lr, (betas[0], betas[1]))
        self.parity: Parity | None = None
        self.policy: ActorCritic | None = None

    @property
    def use_flow_dynamics(self) -> bool:
        """Whether the dynamics are trained by flow matching, the plan's switch."""
        return isinstance(self.dynamics_loss, FlowMatchingDynamicsLoss)

    @classmethod
    def from_config(
        cls,
        alg: Mapping[str, Any],
        *,
        observation_dim: int,
        action_dim: int,
        tasks: Sequence[str] | None = None,
        action_dims: Sequence[int] | None = None,
    ) -> PWM:
        """Build an agent from the ``alg`` group of a configuration (``ttcfast/configs/alg``), checking and logging its parity.

        Args:
            alg: Group with ``model`` and ``dynamics_loss``, each with its ``_target_``, the loss optional as in the constructor;
                ``integrator`` with ``type``, ``substeps`` and ``tau_sampling``, read by flows alone; ``parity`` with ``tolerance`` and
                ``on_violation``; ``sanity``; ``wm`` with this class's numbers; and ``use_flow_dynamics``, which replaces both model and
                loss where they are not what true or false asks for, while None leaves the choice to the ``_target_``s.
            observation_dim: Size of the observations.
            action_dim: Size of the actions.
            tasks: Names of the tasks; more than one make a multi-task model.
            action_dims: Size of each task's own actions.

        Raises:
            ArgumentError: A key or class is unknown, or a group is none.
            ParityError: As :func:`ttcfast.pwm.evaluation.parity.parameter_parity` decides.
            ValueError: The arguments do not fit.
        """
        group({"alg": alg}, "alg", GROUPS, "")
        model_class, model_config, loss_class, loss_config = _classes(alg)
        integration = {**INTEGRATION, **group(alg, "integrator", INTEGRATION)}
        several = tasks is not None and len(tasks) > 1
        extra: dict[str, Any] = {"tasks": tasks, "multitask": True} if several else {"multitask": False}
        extra["action_dims"] = action_dims
        if issubclass(model_class, FlowWorldModel):
            extra["integrator"] = integrators.make(integration["type"], integration["substeps"])
        loss_extra = {"tau_sampling": integration["tau_sampling"]} if issubclass(loss_class, FlowMatchingDynamicsLoss) else {}
        model = build(model_class, "alg.model", model_config, observation_dim, action_dim, **extra)
        loss = build(loss_class, "alg.dynamics_loss", loss_config, **loss_extra)
        sanity = build(SanityChecks, "alg.sanity", group(alg, "sanity"))
        agent = build(cls, "alg.wm", group(alg, "wm"), model, loss, sanity=sanity)
        agent.parity = parameter_parity(model, **group(alg, "parity", ("tolerance", "on_violation")))
        return agent

    def add_policy(
        self, config: AgentConfig | None = None, *, reward_scale: float = 1.0, seed: int = 0, task: Task | None = None
    ) -> ActorCritic:
        """Make an untrained actor and critic on the model's device, :attr:`policy`; arguments as for :class:`ActorCritic`."""
        policy = ActorCritic(self.model, config or AgentConfig(), reward_scale=reward_scale, seed=seed, task=task)
        self.policy = policy.to(next(self.model.parameters()).device)
        return self.policy

    def update_policy(self, obs: Tensor, step: int, *, progress: float = 0.0) -> dict[str, float]:
        """Make one update of actor and critic from the encodings of ``obs [B, observation_dim]``, as :meth:`ActorCritic.update` does.

        Raises:
            ValueError: There is no policy.
            TrainingError: The sanity checks have stopped the world model's training.
        """
        self.sanity.require_running()
        policy = self._policy()
        with torch.no_grad():
            z = self.model.encode(obs, policy.task)
        return policy.update(z, step, progress=progress)

    def act(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return actions ``[..., action_dim]`` for observations ``[..., observation_dim]``; without ``noise`` the mean policy's.

        Raises:
            ValueError: There is no policy.
        """
        policy = self._policy()
        with torch.no_grad():
            return policy.act(self.model.encode(obs, policy.task), noise)

    def rollout(self, z: Tensor, act: Tensor, task: Task | None = None) -> Tensor:
        """Return the latent states from ``z`` ``[B, latent_dim]`` on under actions ``[H, B, action_dim]``, ``[H + 1, B, latent_dim]``."""
        return self.model.rollout(z, act, task)

    def compute_wm_loss(self, obs: Tensor, act: Tensor, rew: Tensor, task: Task | None = None) -> WorldModelLoss:
        """Return the loss of the world model on sequences.

        The model encodes the first observation and is rolled out through its own predictions; targets are encodings of the later
        observations, without gradient. ``total = dynamics_weight * dynamics + reward_weight * reward``, each
        ``(1 / H) sum_t gamma^t loss_t`` with ``loss_t`` a mean over the batch.

        Args:
            obs: Observations, ``[H + 1, B, observation_dim]``.
            act: Actions, ``[H, B, action_dim]``; ``act[t]`` leads from ``obs[t]`` to ``obs[t + 1]``.
            rew: Rewards of ``act[t]``, ``[H, B, 1]``.
            task: Task indices, int64 ``[B]``, or one index or name for all; None for a single task.

        Raises:
            ValueError: The shapes do not fit.

        Source: Flow plan, "Mathematical Specification", "Algorithmic Rollout and Loss (Responsibility Separation)". Departures: the
        reward loss is a soft cross-entropy if the reward is two-hot, and it is divided by H once;
        see docs/design/decisions.md ("Loss scale and gradient", "Two-hot rewards").
        """
        self._check(obs, act, rew)
        with torch.no_grad():
            targets = self.model.encode(obs[1:], task).detach()  # torch.no_grad alone would let forward-mode tangents through
        rolled = act if self.dynamics_loss.reads_last else act[:-1]
        latents = self.rollout(self.model.encode(obs[0], task), rolled, task)
        weights = self.gamma ** torch.arange(len(act), dtype=latents.dtype, device=latents.device) / len(act)
        weights = weights.unflatten(0, (-1, *[1] * (act.ndim - 3)))
        dynamics = (weights * self.dynamics_loss(self.model, latents, act, targets, task)).sum(0)
        reward = (weights * self.reward_loss(latents[: len(act)], act, rew, task)).sum(0)
        states, of_set = latents.detach(), (0, -2, -1)
        return WorldModelLoss(
            self.weights[0] * dynamics + self.weights[1] * reward,
            dynamics,
            reward,
            simplex_distance(states, self.model.group, of_set),
            states.abs().amax(of_set) / targets.abs().amax(of_set).clamp_min(1),
            latents,
        )

    def wm_evaluations(self, horizon: int) -> int:
        """Return the evaluations of the dynamics network in a loss over ``horizon`` steps, that of a batch counting as one."""
        rolled = horizon if self.dynamics_loss.reads_last else horizon - 1
        return rolled * self.model.evaluations + horizon * self.dynamics_loss.evaluations

    def reward_loss(self, latents: Tensor, act: Tensor, rew: Tensor, task: Task | None = None) -> Tensor:
        """Return the loss of the reward head per step, ``[H]``: cross-entropy of a two-hot reward, squared error of a scalar one."""
        head = self.model.reward(latents, act, task)
        if self.model.two_hot is None:
            return (wide(head) - rew).square().mean((-2, -1))
        return self.model.two_hot.cross_entropy(head, rew).mean(-1)

    def update_wm(
        self, obs: Tensor, act: Tensor, rew: Tensor, task: Task | None = None, *, meter: ESNRMeter | None = None
    ) -> dict[str, float]:
        """Make one step of Adam on :meth:`compute_wm_loss`, unless the sanity checks skip it.

        A skipped update changes neither parameters nor Adam's moments. ``sanity.stopped`` says when training should end.

        Args:
            obs, act, rew, task: As in :meth:`compute_wm_loss`.
            meter: Meter of ``self.model`` (``method="loop"``) that forms the gradient in M chunks and measures its ESNR.

        Returns:
            ``loss``, ``dynamics``, ``reward``, ``simplex_distance``, ``largest_latent``, ``gradient_norm`` (before clipping) and
            ``updated`` (1 or 0); with a meter also ``esnr``, ``esnr_db``, ``esnr_unbiased`` and ``noise_scale``.

        Raises:
            TrainingError: The sanity checks have stopped the training.
        """
        self.sanity.require_running()
        measured: dict[str, float] = {}
        parameters = self.wm_optimizer.views
        if meter is None:
            loss = self.compute_wm_loss(obs, act, rew, task)
            gradients: list[Tensor | None] = list(torch.autograd.grad(loss.total, parameters, allow_unused=True))
            parts = torch.stack([t.detach() for t in loss[:5]])
        else:
            parts, measured = self._measured_gradient(meter, obs, act, rew, task)
            gradients = [p.grad for p in parameters]
            self.model.zero_grad(set_to_none=True)
        norm = self.wm_optimizer.collect(gradients, self.clip)
        return {**judged([self], parts, norm)[0], **measured}

    def _measured_gradient(
        self, meter: ESNRMeter, obs: Tensor, act: Tensor, rew: Tensor, task: Task | None
    ) -> tuple[Tensor, dict[str, float]]:
        """Leave the gradient in ``.grad``; return the first five entries of the loss over all chunks, and what the meter found."""
        chunks: list[Tensor] = []

        def loss_of(rows: Tensor) -> Tensor:
            of = task[rows] if isinstance(task, Tensor) and task.ndim else task
            loss = self.compute_wm_loss(obs[:, rows], act[:, rows], rew[:, rows], of)
            chunks.append(torch.stack([t.detach() for t in loss[:5]]))
            return loss.total

        found = meter.measure(loss_of, torch.arange(act.shape[1], device=act.device)).esnr
        every = torch.stack(chunks)
        parts = torch.cat([every[:, :4].mean(0), every[:, 4].max().reshape(1)])
        return parts, {"esnr": found.raw, "esnr_db": found.raw_db, "esnr_unbiased": found.unbiased, "noise_scale": found.noise_scale}

    def _policy(self) -> ActorCritic:
        if self.policy is None:
            raise ValueError("there is no policy yet; call add_policy() first")
        return self.policy

    def _check(self, obs: Tensor, act: Tensor, rew: Tensor) -> None:
        whole("horizon (the length of act)", len(act), 1)
        lead = tuple(act.shape[:-1])
        given = obs.ndim, act.ndim, tuple(obs.shape[:-1]), tuple(rew.shape)
        if act.ndim not in (3, 4) or given != (act.ndim, act.ndim, (lead[0] + 1, *lead[1:]), (*lead, 1)):
            raise ValueError(
                f"obs has shape {tuple(obs.shape)}, act {tuple(act.shape)}, rew {tuple(rew.shape)}; "
                "expected [H + 1, B, observation_dim], [H, B, action_dim], [H, B, 1]"
            )


def judged(agents: Sequence[PWM], parts: Tensor, norms: Tensor) -> list[dict[str, float]]:
    """Make each agent's step of Adam on its world model, unless its sanity checks skip it, and return what :meth:`PWM.update_wm` tells.

    Args:
        agents: Agents whose optimizers hold their gradients.
        parts: The first five entries of the loss, ``[5]``, of several agents ``[5, S]``.
        norms: Norms of the gradients, ``[]`` or ``[S]``.
    """
    names = ("loss", "dynamics", "reward", "simplex_distance", "largest_latent", "gradient_norm")
    table = torch.cat([parts, norms.unsqueeze(0)]).reshape(len(names), -1).T.tolist()  # waits for the device once
    results = []
    for agent, row in zip(agents, table):
        found = dict(zip(names, row))
        allowed = agent.sanity.allows(loss=found["loss"], gradient_norm=found["gradient_norm"], latent=found["largest_latent"])
        if allowed:
            agent.wm_optimizer.step()
        results.append({**found, "updated": float(allowed)})
    return results


def _classes(alg: Mapping[str, Any]) -> tuple[type[BaseWorldModel], dict[str, Any], type[DynamicsLoss], dict[str, Any]]:
    """Return the classes of model and loss that ``use_flow_dynamics`` or the ``_target_`` entries choose, each with its configuration."""
    model, loss, flow = group(alg, "model"), group(alg, "dynamics_loss"), alg.get("use_flow_dynamics")
    if flow is not None and not isinstance(flow, bool):
        raise ArgumentError(f"alg.use_flow_dynamics is {flow!r}; give true, false, or null to leave it to the _target_ entries")
    model_class = locate(model.get("_target_"), BaseWorldModel, "alg.model._target_")  # type: ignore[type-abstract]
    if flow is not None and issubclass(model_class, FlowWorldModel) != flow:
        model_class = FlowWorldModel if flow else MLPWorldModel
        model["dynamics"] = None
    if not loss:
        return model_class, model, _loss_of(model_class), {}
    loss_class = locate(loss.get("_target_"), DynamicsLoss, "alg.dynamics_loss._target_")  # type: ignore[type-abstract]
    if flow is not None and issubclass(loss_class, FlowMatchingDynamicsLoss) != flow:
        return model_class, model, _loss_of(model_class), {}
    return model_class, model, loss_class, loss


def _loss_of(model_class: type[BaseWorldModel]) -> type[DynamicsLoss]:
    """Return the class of the loss that trains a kind of dynamics by default."""
    return FlowMatchingDynamicsLoss if issubclass(model_class, FlowWorldModel) else MLPDynamicsLoss
