"""PWM's world-model half: the rollout, the loss, and the update with its sanity checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttcfast import integrators
from ttcfast.checks import at_least, whole
from ttcfast.pwm.algorithms.sanity import SanityChecks
from ttcfast.pwm.evaluation.parity import Parity, parameter_parity
from ttcfast.pwm.evaluation.simplex import simplex_distance
from ttcfast.pwm.models.base import BaseWorldModel, Task
from ttcfast.pwm.models.flow_world_model import FlowWorldModel
from ttcfast.pwm.models.layers import wide
from ttcfast.pwm.models.world_model import MLPWorldModel
from ttcfast.pwm.utils.metrics import ESNRMeter
from ttcfast.pwm.utils.targets import build, locate
from ttcfast.runtime.errors import ArgumentError

from .dynamics_loss import DynamicsLoss, FlowMatchingDynamicsLoss, MLPDynamicsLoss, discounts


class WorldModelLoss(NamedTuple):
    """Scalars, but ``latents``; ``total`` is what is minimised."""

    total: Tensor
    dynamics: Tensor
    reward: Tensor
    simplex_distance: Tensor  # of the predicted latents, without gradient
    largest_latent: Tensor  # magnitude, without gradient
    latents: Tensor  # [H + 1, B, latent_dim], the rollout


class PWM:
    """Trains a world model on sequences; the actor and the critic come on top of it.

    Args:
        model: any world model.
        dynamics_loss: the strategy that fits it; None: flow matching for a ``FlowWorldModel``, else the squared error.
        gamma: discount of later steps in the loss.
        dynamics_weight: weight of the dynamics loss.
        reward_weight: weight of the reward loss.
        lr: Adam's step size (PWM: 3e-4).
        betas: Adam's decay rates (PWM: 0.7 and 0.95).
        clip: largest gradient norm (PWM: 20).
        sanity: limits beyond which a batch is skipped; None: the defaults.

    Raises:
        ValueError: a number out of range, or a loss that does not fit the model.

    Source: Flow plan, "Mathematical Specification", "Algorithmic Rollout and Loss (Responsibility Separation)".
    """

    def __init__(
        self,
        model: BaseWorldModel,
        dynamics_loss: DynamicsLoss | None = None,
        *,
        gamma: float = 0.99,
        dynamics_weight: float = 1.0,
        reward_weight: float = 1.0,
        lr: float = 3e-4,
        betas: Sequence[float] = (0.7, 0.95),
        clip: float = 20.0,
        sanity: SanityChecks | None = None,
    ) -> None:
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma is {gamma}; it lies in (0, 1]")
        for name, value in (("dynamics_weight", dynamics_weight), ("reward_weight", reward_weight), ("lr", lr), ("clip", clip)):
            at_least(name, value, 0)
        flow = isinstance(model, FlowWorldModel)
        if dynamics_loss is None:
            dynamics_loss = FlowMatchingDynamicsLoss() if flow else MLPDynamicsLoss()
        if isinstance(dynamics_loss, FlowMatchingDynamicsLoss) and not flow:
            raise ValueError(f"dynamics_loss is FlowMatchingDynamicsLoss and the model a {type(model).__name__}; use MLPDynamicsLoss")
        self.model, self.dynamics_loss, self.gamma = model, dynamics_loss, gamma
        self.weights, self.clip, self.sanity = (dynamics_weight, reward_weight), clip, sanity or SanityChecks()
        self.wm_optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(betas[0], betas[1]))
        self.parity: Parity | None = None

    @property
    def use_flow_dynamics(self) -> bool:
        """The plan's switch (section 2): whether the dynamics are trained by flow matching."""
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
        """Build it from the ``alg`` group of a configuration (``ttcfast/configs/alg``), and log and judge the parity of a flow or residual.

        Args:
            alg: ``model`` and ``dynamics_loss`` with their ``_target_``; ``integrator`` with ``type``, ``substeps``, ``tau_sampling``;
                ``parity`` with ``tolerance``, ``on_violation``; ``sanity``; ``wm`` with this class's numbers; ``use_flow_dynamics``: None
                leaves the choice to the ``_target_``s, true or false selects the pair of model and loss (the plan's section 2).
            observation_dim: of the data.
            action_dim: of the data.
            tasks: names of the data's tasks; more than one makes the model multi-task.
            action_dims: entries that each task's actions really have.

        Raises:
            ArgumentError: an unknown key or class.
            ParityError: see :func:`ttcfast.pwm.evaluation.parity.parameter_parity`.
            ValueError: arguments that do not fit.
        """
        model_config, loss_config = _pair(alg)
        integration = {"type": "heun", "substeps": 2, "tau_sampling": "uniform", **(alg.get("integrator") or {})}
        model_class = locate(model_config["_target_"], BaseWorldModel, "alg.model._target_")  # type: ignore[type-abstract]
        loss_class = locate(loss_config["_target_"], DynamicsLoss, "alg.dynamics_loss._target_")  # type: ignore[type-abstract]
        several = tasks is not None and len(tasks) > 1
        extra: dict[str, Any] = {"tasks": tasks, "multitask": True} if several else {"multitask": False}
        extra["action_dims"] = action_dims
        if issubclass(model_class, FlowWorldModel):
            extra["integrator"] = integrators.make(integration["type"], integration["substeps"])
        loss_extra = {"tau_sampling": integration["tau_sampling"]} if issubclass(loss_class, FlowMatchingDynamicsLoss) else {}
        model = build(model_class, "alg.model", model_config, observation_dim, action_dim, **extra)
        loss = build(loss_class, "alg.dynamics_loss", loss_config, **loss_extra)
        sanity = build(SanityChecks, "alg.sanity", alg.get("sanity") or {})
        agent = build(cls, "alg.wm", alg.get("wm") or {}, model, loss, sanity=sanity)
        if not isinstance(model, MLPWorldModel):
            agent.parity = parameter_parity(model, **(alg.get("parity") or {}))
        return agent

    def rollout(self, z: Tensor, act: Tensor, task: Task | None = None) -> Tensor:
        """Latent states from ``z`` ``[B, latent_dim]`` under actions ``[H, B, action_dim]``: ``[H + 1, B, latent_dim]``, ``z`` first."""
        latents = [z]
        for a in act:
            latents.append(self.model.next(latents[-1], a, task))
        return torch.stack(latents)

    def compute_wm_loss(self, obs: Tensor, act: Tensor, rew: Tensor, task: Task | None = None) -> WorldModelLoss:
        """Loss of the world model on sequences.

        The model encodes the first observation and is rolled out through its own predictions; targets are encodings of the later
        observations, without gradient. ``total = dynamics_weight * dynamics + reward_weight * reward``, each
        ``(1 / H) sum_t gamma^t loss_t`` with ``loss_t`` a mean over the batch.

        Args:
            obs: ``[H + 1, B, observation_dim]``.
            act: ``[H, B, action_dim]``; ``act[t]`` leads from ``obs[t]`` to ``obs[t + 1]``.
            rew: ``[H, B, 1]``, what ``act[t]`` earned.
            task: indices int64 ``[B]``, or one index or name for all; None for a single task.

        Returns:
            The loss, its parts, and what the sanity checks look at.

        Raises:
            ValueError: shapes that do not fit.

        Source: Flow plan, "Mathematical Specification", "Algorithmic Rollout and Loss (Responsibility Separation)". Departures: the
        reward loss is a soft cross-entropy where the reward is two-hot, and it is divided by H once;
        see docs/design/decisions.md ("Loss scale and gradient", "Two-hot rewards").
        """
        self._check(obs, act, rew)
        horizon = len(act)
        with torch.no_grad():
            targets = self.model.encode(obs[1:], task).detach()  # torch.no_grad alone would let forward-mode tangents through
        latents = self.rollout(self.model.encode(obs[0], task), act, task)
        weights = discounts(horizon, self.gamma, latents) / horizon
        dynamics = (weights * self.dynamics_loss(self.model, latents, act, targets, task)).sum()
        reward = (weights * self.reward_loss(latents[:-1], act, rew, task)).sum()
        predicted = latents.detach()[1:]
        return WorldModelLoss(
            self.weights[0] * dynamics + self.weights[1] * reward,
            dynamics,
            reward,
            simplex_distance(predicted, self.model.group),
            predicted.abs().max(),
            latents,
        )

    def reward_loss(self, latents: Tensor, act: Tensor, rew: Tensor, task: Task | None = None) -> Tensor:
        """Loss of the reward head per step ``[H]``: cross-entropy of the two-hot reward, or squared error of a scalar one."""
        head = self.model.reward(latents, act, task)
        if self.model.two_hot is None:
            return (wide(head) - rew).square().mean((1, 2))
        return self.model.two_hot.cross_entropy(head, rew).mean(1)

    def update_wm(
        self, obs: Tensor, act: Tensor, rew: Tensor, task: Task | None = None, *, meter: ESNRMeter | None = None
    ) -> dict[str, float]:
        """One step of Adam on :meth:`compute_wm_loss`, unless the sanity checks skip it.

        Args:
            obs, act, rew, task: as for :meth:`compute_wm_loss`.
            meter: of ``self.model`` (``method="loop"``): the gradient is formed in its M chunks, and its ESNR measured on the way.

        Returns:
            ``loss``, ``dynamics``, ``reward``, ``simplex_distance``, ``largest_latent``, ``gradient_norm`` (before clipping) and
            ``updated`` (1 or 0); with a meter also ``esnr``, ``esnr_db``, ``esnr_unbiased`` and ``noise_scale``. A skipped batch changes
            neither parameters nor Adam's moments; ``sanity.stopped`` tells that training should end.
        """
        self.wm_optimizer.zero_grad(set_to_none=True)
        measured: dict[str, float] = {}
        if meter is None:
            loss = self.compute_wm_loss(obs, act, rew, task)
            loss.total.backward()
            parts = torch.stack([t.detach() for t in loss[:5]])
        else:
            parts, measured = self._measured_gradient(meter, obs, act, rew, task)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        names = ("loss", "dynamics", "reward", "simplex_distance", "largest_latent", "gradient_norm")
        found = dict(zip(names, torch.cat([parts, norm.reshape(1)]).tolist()))  # waits for the device once
        allowed = self.sanity.allows(loss=found["loss"], gradient_norm=found["gradient_norm"], latent=found["largest_latent"])
        if allowed:
            self.wm_optimizer.step()
        return {**found, "updated": float(allowed), **measured}

    def _measured_gradient(
        self, meter: ESNRMeter, obs: Tensor, act: Tensor, rew: Tensor, task: Task | None
    ) -> tuple[Tensor, dict[str, float]]:
        """Leave the gradient in ``.grad``; the first five parts of the loss, of all chunks together, and what the meter says."""
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

    def _check(self, obs: Tensor, act: Tensor, rew: Tensor) -> None:
        whole("horizon (the length of act)", len(act), 1)
        lead = tuple(act.shape[:2])
        if obs.ndim != 3 or act.ndim != 3 or tuple(obs.shape[:2]) != (lead[0] + 1, lead[1]) or tuple(rew.shape) != (*lead, 1):
            raise ValueError(
                f"obs has shape {tuple(obs.shape)}, act {tuple(act.shape)}, rew {tuple(rew.shape)}; "
                "expected [H + 1, B, observation_dim], [H, B, action_dim], [H, B, 1]"
            )


_PAIRS: dict[bool, tuple[type[BaseWorldModel], type[DynamicsLoss]]] = {
    False: (MLPWorldModel, MLPDynamicsLoss),
    True: (FlowWorldModel, FlowMatchingDynamicsLoss),
}


def _pair(alg: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configurations of model and loss after ``use_flow_dynamics`` has had its say."""
    model, loss = dict(alg.get("model") or {}), dict(alg.get("dynamics_loss") or {})
    flow = alg.get("use_flow_dynamics")
    if flow is not None and not isinstance(flow, bool):
        raise ArgumentError(f"alg.use_flow_dynamics is {flow!r}; give true, false, or null to leave it to the _target_ entries")
    chosen = locate(model.get("_target_"), BaseWorldModel, "alg.model._target_")  # type: ignore[type-abstract]
    if flow is not None and issubclass(chosen, FlowWorldModel) != flow:
        model_class, loss_class = _PAIRS[flow]
        model |= {"_target_": f"{model_class.__module__}.{model_class.__name__}", "dynamics": None}
        loss = {"_target_": f"{loss_class.__module__}.{loss_class.__name__}"}
    return model, loss
