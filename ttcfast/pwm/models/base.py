"""The base class of world models: encoder, reward and tasks; subclasses add the dynamics."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttcfast.checks import one_of, whole
from ttcfast.ops import VelocityMLP, closed_loop, mlp_flow

from .layers import SIMNORM_GROUP, Network, linear, state
from .two_hot import TwoHot

Task = Tensor | int | str
CONSTANT = 1e-6  # spread below which an entry of the observations counts as constant, such as padding
# Sizes that PWM and TD-MPC2 name, and a small one for the CPU; "48M" counts its whole agent, of which the world model is 19 million.
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"latent_dim": 64, "units": (128, 128), "encoder_units": (128,), "task_dim": 16},
    "5M": {"latent_dim": 512, "units": (512, 512), "encoder_units": (256,), "task_dim": 64},
    "19M": {"latent_dim": 512, "units": (1024, 1024), "encoder_units": (1024, 1024), "task_dim": 64},
    "48M": {"latent_dim": 768, "units": (1792, 1792), "encoder_units": (1792, 1792, 1792), "task_dim": 64},
    "317M": {"latent_dim": 1376, "units": (4096, 4096), "encoder_units": (4096, 4096, 4096, 4096), "task_dim": 96},
}


class BaseWorldModel(nn.Module, ABC):
    """A latent world model: ``z = encode(obs)``, ``z' = next(z, a)``, ``r = reward(z, a)``.

    It maps single steps; rollouts and losses belong to the algorithm. The arguments are those of PWM's configurations. Under
    ``torch.autocast`` matrix products are rounded to 16 bits, while latent states and rewards stay float32.

    Args:
        observation_dim: Size of an observation; with several tasks, of the widest one, to which others are padded with 0.
        action_dim: Size of an action, likewise.
        latent_dim: Size of a latent state, a multiple of SimNorm's group; None for that of an observation.
        units: Sizes of the hidden layers of dynamics and reward.
        encoder_units: Sizes of the hidden layers of the encoder.
        encoder: ``last_layer`` and ``last_layer_kwargs`` of :class:`ttcfast.pwm.models.layers.Network`; None for SimNorm in groups of 8;
            ``{"last_layer": "identity"}`` for no network: the latent state is the observation.
        dynamics: The same for the dynamics; None for the default of the model class.
        reward: The same for the reward; None for a linear layer that starts at 0.
        action_dims: Size of each task's own actions, beyond which entries are masked to 0; None for no mask.
        num_bins: Number of bins of the two-hot reward; None or 1 for a scalar reward.
        vmin: Symlog of the lowest reward that the bins reach.
        vmax: Symlog of the highest reward that the bins reach.
        multitask: Whether to condition all networks on a learned embedding of the task.
        tasks: Names of the tasks in the order of their indices; required if ``multitask``.
        task_dim: Size of the task embedding.
        standardise: Whether :meth:`encode` first centres observations and divides them by their spread, which
            :meth:`set_observation_statistics` sets and the weights keep.

    Raises:
        ValueError: An argument is out of range or does not fit the others.

    Source: Flow plan, "Mathematical Specification"; docs/design/decisions.md ("World models and losses").
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        latent_dim: int | None = 512,
        units: Sequence[int] = (512, 512),
        encoder_units: Sequence[int] = (256,),
        encoder: Mapping[str, Any] | None = None,
        dynamics: Mapping[str, Any] | None = None,
        reward: Mapping[str, Any] | None = None,
        action_dims: Sequence[int] | None = None,
        num_bins: int | None = 101,
        vmin: float = -10.0,
        vmax: float = 10.0,
        multitask: bool = False,
        tasks: Sequence[str] | None = None,
        task_dim: int = 64,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        self.arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        latent_dim = observation_dim if latent_dim is None else latent_dim
        for name, size in (("observation_dim", observation_dim), ("action_dim", action_dim), ("latent_dim", latent_dim)):
            whole(name, size, 1)
        self.observation_dim, self.action_dim, self.latent_dim = observation_dim, action_dim, latent_dim
        self.units = tuple(units)
        self.tasks = tuple(tasks or ())
        self.task_dim = task_dim if multitask else 0
        encoder = dict(encoder or {"last_layer": "simnorm"})
        self.group = _simplex_group(encoder, latent_dim)
        self.task_embedding = self._make_embedding(multitask, task_dim)
        self._make_masks(action_dims)
        self.observation_mean: Tensor | None
        self.observation_std: Tensor | None
        self.register_buffer("observation_mean", torch.zeros(observation_dim) if standardise else None)
        self.register_buffer("observation_std", torch.ones(observation_dim) if standardise else None)
        self.encoder_network = self._make_encoder(encoder_units, encoder)
        self.dynamics_network = self._make_dynamics(latent_dim + self.task_dim + action_dim, dynamics)
        self.two_hot = TwoHot(num_bins, vmin, vmax) if num_bins is not None and num_bins != 1 else None
        head = dict(reward or {"last_layer": "linear", "last_layer_kwargs": {"zero": True}})
        self.reward_network = Network(latent_dim + self.task_dim + action_dim, units, num_bins or 1, **head)

    @classmethod
    def of_size(cls, size: str, observation_dim: int, action_dim: int, **changes: Any) -> BaseWorldModel:
        """Return a model of one of the ``SIZES`` ("cpu", "5M", "19M", "48M", "317M"), with ``changes`` to its arguments.

        Raises:
            ValueError: The size is unknown, or the arguments do not fit.
        """
        one_of("size", size, tuple(SIZES))
        return cls(observation_dim, action_dim, **{**SIZES[size], **changes})

    @abstractmethod
    def _make_dynamics(self, inputs: int, last: Mapping[str, Any] | None) -> Network:
        """Return the network of the dynamics; ``inputs`` is the size of latent, task embedding and action together."""

    @abstractmethod
    def next(self, z: Tensor, a: Tensor, task: Task | None = None) -> Tensor:
        """Return the next latent states, ``[..., latent_dim]``.

        Args:
            z: Latent states, ``[..., latent_dim]``.
            a: Actions in [-1, 1], ``[..., action_dim]``.
            task: As in :meth:`encode`.

        Raises:
            ValueError: As in :meth:`encode`.
        """

    @property
    def evaluations(self) -> int:
        """Evaluations of the dynamics network per call of :meth:`next`."""
        return 1

    def rollout(self, z: Tensor, act: Tensor, task: Task | None = None) -> Tensor:
        """Return the latent states from ``z`` ``[B, latent_dim]`` on under actions ``[H, B, action_dim]``, ``[H + 1, B, latent_dim]``.

        Raises:
            ValueError: As in :meth:`encode`.
        """
        if len(act) and self._integration() is not None:
            return torch.cat([z.unsqueeze(0), self._integrate(z, act, task)])
        latents = [z]
        for a in act:
            latents.append(self.next(latents[-1], a, task))
        return torch.stack(latents)

    def closed_loop(
        self, z: Tensor, offsets: Tensor, policy: Network, task: Task | None = None, *, detach: bool = False
    ) -> tuple[Tensor, Tensor] | None:
        """Return the states after each step ``[H, B, latent_dim]`` and the actions ``tanh(policy(z) + offset)`` by one operation.

        Args:
            z: First states, ``[B, latent_dim]``.
            offsets: As in :func:`ttcfast.ops.closed_loop`, ``[H, B, action_dim]``, like ``detach``.
            policy: Network from latent states to actions.
            task: One task for all, or None.

        Returns:
            None where no one operation does it.
        """
        how = self._integration()
        if how is None or how.get("matmul_dtype") is not None or isinstance(task, Tensor):
            return None
        times, weight_c, network = self._flow(how)
        weight_task, weight_a = weight_c.split([self.task_dim, self.action_dim], dim=-1)
        if self.task_dim or task is not None:
            times = times + F.linear(self._join(z[0, :0], task), weight_task)
        if self.action_masks is not None:
            weight_a = weight_a * self.masked(offsets.new_ones(self.action_dim), task)
        how = {name: value for name, value in how.items() if name != "matmul_dtype"}
        how |= {"eps": self.dynamics_network.eps, "policy_eps": policy.eps, "detach": detach}
        return closed_loop(z, offsets, policy.parts(), weight_a, times, network, **how)

    def _integration(self) -> dict[str, Any] | None:
        """Return the arguments of :func:`ttcfast.ops.mlp_flow` by which it makes a step of the dynamics, None where it cannot."""
        return None

    def encode(self, obs: Tensor, task: Task | None = None) -> Tensor:
        """Return the latent states of observations, ``[..., latent_dim]``.

        Args:
            obs: Observations, ``[..., observation_dim]``.
            task: Task indices, int64 ``[...]`` that broadcast to the leading axes of ``obs``, or one index or name for all; None for a
                model of a single task.

        Raises:
            ValueError: A size is wrong, a task is unknown, or the model has tasks and none is given, or the reverse.
        """
        self._check("obs", obs, self.observation_dim)
        if self.observation_mean is not None and self.observation_std is not None:
            obs = (obs - self.observation_mean) / self.observation_std
        if self.encoder_network is None:
            return state(obs)
        return state(self.encoder_network(self._join(obs, task)))

    def reward(self, z: Tensor, a: Tensor, task: Task | None = None) -> Tensor:
        """Return the output of the reward head for action ``a`` at ``z``: logits ``[..., num_bins]``, or a scalar reward ``[..., 1]``.

        Arguments and errors are those of :meth:`next`.
        """
        return self._at(self.reward_network, z, a, task)

    def step(self, z: Tensor, a: Tensor, task: Task | None = None) -> tuple[Tensor, Tensor]:
        """Return the next latent state ``[..., latent_dim]`` and the reward ``[..., 1]``; arguments and errors as in :meth:`next`."""
        return self.next(z, a, task), self.decode_reward(self.reward(z, a, task))

    def decode_reward(self, head: Tensor) -> Tensor:
        """Return the reward ``[..., 1]`` that the output of the reward head stands for."""
        return state(head) if self.two_hot is None else self.two_hot.decode(head)

    @torch.no_grad()
    def set_observation_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set centre and spread ``[observation_dim]`` of the observations; entries that hardly vary, such as padding, are only centred.

        Raises:
            ValueError: The model was made without ``standardise``, or the numbers are of another size or not finite.
        """
        if self.observation_mean is None or self.observation_std is None:
            raise ValueError("standardise is False; make the model with standardise=True")
        for name, given in (("mean", mean), ("std", std)):
            if tuple(given.shape) != (self.observation_dim,) or not bool(given.isfinite().all()):
                raise ValueError(f"{name} is {given.tolist()}; give {self.observation_dim} finite numbers")
        self.observation_mean.copy_(mean)
        self.observation_std.copy_(torch.where(std > CONSTANT, std, 1.0))

    def task_index(self, task: Task, device: torch.device | str = "cpu") -> Tensor:
        """Return the int64 indices of tasks.

        Raises:
            ValueError: A name or index is not among the tasks, which the message lists.
        """
        if isinstance(task, str):
            if task not in self.tasks:
                raise ValueError(f"task is {task!r}; the model knows {', '.join(self.tasks) or 'none'}")
            task = self.tasks.index(task)
        if isinstance(task, int):
            if not 0 <= task < len(self.tasks):
                known = ", ".join(f"{i}: {name}" for i, name in enumerate(self.tasks))
                raise ValueError(f"task is {task}; the model knows {known or 'none'}")
            return torch.tensor(task, device=device)
        if task.dtype != torch.int64:
            raise ValueError(f"task is {task.dtype} {tuple(task.shape)}; give int64 indices, one index or a name")
        return task.to(device)

    def masked(self, a: Tensor, task: Task | None = None) -> Tensor:
        """Return ``a`` with the entries that the task does not have set to 0, even where they hold NaN."""
        if self.action_masks is None:
            return a
        has = self.action_masks[0] if task is None else self.action_masks[self.task_index(task, a.device)]
        return torch.where(has, a, 0.0)  # a product would keep the NaN that padding may hold

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Treat the parameters as constants within the block, so that backward passes form no gradient for them.

        For the actor's update, which needs gradients with respect to actions alone. The backward pass may run after the block.
        """
        trained = [p for p in self.parameters() if p.requires_grad]
        try:
            for p in trained:
                p.requires_grad_(False)
            yield
        finally:
            for p in trained:
                p.requires_grad_(True)

    @property
    def total_params(self) -> int:
        """Number of parameters of the whole model."""
        return sum(p.numel() for p in self.parameters())

    @property
    def dynamics_params(self) -> int:
        """Number of parameters of the dynamics."""
        return sum(p.numel() for p in self.dynamics_network.parameters())

    def embedding_of(self, task: Task, like: Tensor) -> Tensor:
        """Return task embeddings ``[*like.shape[:-1], task_dim]`` of length at most 1.

        Rows are scaled when they are read, since ``nn.Embedding(max_norm=1)`` would write into the weight during the forward pass.
        """
        assert self.task_embedding is not None
        rows = self.task_embedding(self.task_index(task, like.device))
        rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1)
        return rows.expand(*like.shape[:-1], self.task_dim)

    def _integrate(self, z: Tensor, a: Tensor, task: Task | None) -> Tensor:
        """Return the latent states after one step; for actions with one axis more than ``z [B, latent_dim]`` after each."""
        how = self._integration()
        assert how is not None
        self._check("z", z, self.latent_dim)
        self._check("a", a, self.action_dim)
        if z.shape[:-1] != a.shape[a.ndim - z.ndim : -1]:
            raise ValueError(f"z has shape {tuple(z.shape)} and a {tuple(a.shape)}; their leading axes must be the same")
        times, weight_c, network = self._flow(how)
        rows = linear(self._join(a[..., :0], task, self.masked(a, task)).to(z.dtype), weight_c)
        if z.ndim == weight_c.ndim:
            return mlp_flow(z, rows, times, network, eps=self.dynamics_network.eps, **how)
        flat, rows = z.reshape(-1, self.latent_dim), rows.reshape(-1, rows.shape[-1])
        return mlp_flow(flat, rows, times, network, eps=self.dynamics_network.eps, **how).reshape(z.shape)

    def _flow(self, how: Mapping[str, Any]) -> tuple[Tensor, Tensor, VelocityMLP]:
        """Return what times and bias add to the first product of the dynamics, its weight for task and action, and the rest."""
        parts, sizes = self.dynamics_network.parts(), [self.latent_dim, self.task_dim + self.action_dim]
        weight_z, weight_c, weight_tau = parts.weights[0].split([*sizes, parts.weights[0].shape[-1] - sum(sizes)], dim=-1)
        times = parts.biases[0].unsqueeze(-2)
        if weight_tau.shape[-1]:
            count = how["substeps"] + (how["method"] == "heun")
            times = times + torch.arange(count, device=times.device, dtype=times.dtype).unsqueeze(1) / how["substeps"] * weight_tau.mT
        return times, weight_c, VelocityMLP([weight_z, *parts.weights[1:]], parts.biases[1:], parts.scales, parts.shifts)

    def _at(self, network: Network, z: Tensor, a: Tensor, task: Task | None) -> Tensor:
        """Evaluate ``network`` on latent states, task embedding and actions."""
        self._check_pair(z, a)
        return network(self._join(z, task, self.masked(a, task)))

    def _join(self, x: Tensor, task: Task | None, *rest: Tensor) -> Tensor:
        """Concatenate ``x``, the task embedding and ``rest`` along the last axis."""
        parts = [x, *rest]
        if self.task_embedding is not None:
            if task is None:
                raise ValueError(f"task is None; this model is made for the tasks {', '.join(self.tasks)}: give one of them")
            parts.insert(1, self.embedding_of(task, x))
        elif task is not None and not self.tasks:
            raise ValueError(f"task is {task!r}; this model is made for a single task: give None, or make it with multitask=True")
        return torch.cat(parts, -1) if len(parts) > 1 else x

    def _check(self, name: str, x: Tensor, size: int) -> None:
        if x.ndim == 0 or x.shape[-1] != size:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; this model takes {size} entries in the last axis")

    def _check_pair(self, z: Tensor, a: Tensor) -> None:
        self._check("z", z, self.latent_dim)
        self._check("a", a, self.action_dim)
        if z.shape[:-1] != a.shape[:-1]:
            raise ValueError(f"z has shape {tuple(z.shape)} and a {tuple(a.shape)}; their leading axes must be the same")

    def _make_encoder(self, units: Sequence[int], last: Mapping[str, Any]) -> Network | None:
        if last.get("last_layer") != "identity":
            return Network(self.observation_dim + self.task_dim, units, self.latent_dim, **last)
        if last.get("last_layer_kwargs"):
            raise ValueError(f"encoder is {dict(last)}; an identity takes nothing else")
        if self.latent_dim != self.observation_dim:
            raise ValueError(f"latent_dim is {self.latent_dim} and encoder an identity of {self.observation_dim} entries; give None")
        return None

    def _make_embedding(self, multitask: bool, task_dim: int) -> nn.Embedding | None:
        if not multitask:
            return None
        if not self.tasks:
            raise ValueError("tasks is empty; with multitask=True name the tasks")
        whole("task_dim", task_dim, 1)
        embedding = nn.Embedding(len(self.tasks), task_dim)
        nn.init.uniform_(embedding.weight, -0.02, 0.02)
        return embedding

    def _make_masks(self, action_dims: Sequence[int] | None) -> None:
        masks = None
        if action_dims is not None:
            if len(action_dims) != max(len(self.tasks), 1) or not all(1 <= d <= self.action_dim for d in action_dims):
                raise ValueError(
                    f"action_dims is {tuple(action_dims)}; give one number from 1 to action_dim = {self.action_dim} per task, "
                    f"of which there are {max(len(self.tasks), 1)}"
                )
            masks = torch.arange(self.action_dim) < torch.tensor(tuple(action_dims)).unsqueeze(1)
        self.action_masks: Tensor | None
        self.register_buffer("action_masks", masks, persistent=False)


def _simplex_group(encoder: Mapping[str, Any], latent_dim: int) -> int:
    """Return the size of the simplices that latents lie on, 0 if the encoder does not end in SimNorm."""
    if encoder.get("last_layer") != "simnorm":
        return 0
    group = (encoder.get("last_layer_kwargs") or {}).get("group", SIMNORM_GROUP)
    whole("encoder.last_layer_kwargs.group", group, 1)
    if latent_dim % group:
        raise ValueError(f"latent_dim is {latent_dim}, which SimNorm's group of {group} does not divide; change one of them")
    return group
